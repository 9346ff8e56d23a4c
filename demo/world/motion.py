"""Random natural motion at 25 fps: expressions, head pose and cameras of a clip.

Everything is drawn from one numpy Generator, so a seed gives the same clip everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from demo.world.head import ARKIT_INDEX, ARKIT_NAMES, HeadModel, rotation_from_angles

FPS = 25
KINDS = ("frontal", "novel", "orbit", "all")  # what moves: see sample_clip
KIND_SHARES = (0.35, 0.25, 0.15, 0.25)
FACE_SHARE = 0.67  # chin to hairline, as a share of the frame's height
YAW, PITCH, ROLL = np.radians([35.0, 20.0, 15.0])

_MOUTH_SHAPES = (  # of speech: about one every 0.16 s
    {"jawOpen": 0.55, "mouthLowerDownLeft": 0.3, "mouthLowerDownRight": 0.3},
    {
        "jawOpen": 0.35,
        "mouthStretchLeft": 0.4,
        "mouthStretchRight": 0.4,
        "mouthUpperUpLeft": 0.3,
        "mouthUpperUpRight": 0.3,
    },
    {
        "jawOpen": 0.22,
        "mouthSmileLeft": 0.35,
        "mouthSmileRight": 0.35,
        "mouthLowerDownLeft": 0.4,
        "mouthLowerDownRight": 0.4,
    },
    {"jawOpen": 0.30, "mouthFunnel": 0.75},
    {"jawOpen": 0.14, "mouthPucker": 0.85},
    {"mouthPressLeft": 0.6, "mouthPressRight": 0.6, "mouthRollLower": 0.3, "mouthRollUpper": 0.3},
    {"mouthRollLower": 0.75, "mouthUpperUpLeft": 0.3, "mouthUpperUpRight": 0.3, "jawOpen": 0.05},
    {"jawOpen": 0.18, "tongueOut": 0.25, "mouthShrugUpper": 0.2},
    {"jawOpen": 0.25, "mouthClose": 0.22, "jawForward": 0.3},
    {"mouthShrugLower": 0.4, "mouthClose": 0.05, "jawOpen": 0.08},
    {},
)
_EXPRESSIONS = (
    {"mouthSmile": 0.9, "cheekSquint": 0.7, "eyeSquint": 0.35},
    {"mouthSmile": 1.0, "jawOpen": 0.5, "cheekSquint": 0.8, "mouthUpperUp": 0.5, "eyeSquint": 0.5, "mouthDimple": 0.3},
    {"browInnerUp": 1.0, "browOuterUp": 0.9, "eyeWide": 0.9, "jawOpen": 0.65},
    {"browInnerUp": 0.8, "browOuterUp": 0.9, "eyeWide": 0.5, "mouthPress": 0.3},
    {"browDown": 1.0, "noseSneer": 0.5, "mouthPress": 0.7, "eyeSquint": 0.5},
    {"browDown": 0.9, "noseSneer": 1.0, "mouthUpperUp": 0.8, "jawOpen": 0.3, "mouthLowerDown": 0.6},
    {"browInnerUp": 0.9, "mouthFrown": 1.0, "mouthShrugLower": 0.7},
    {"mouthFrown": 0.8, "mouthShrugUpper": 0.6, "mouthShrugLower": 0.8, "browOuterUp": 0.5},
    {"mouthPucker": 1.0, "cheekSquint": 0.2},
    {"mouthFunnel": 1.0, "jawOpen": 0.3, "browInnerUp": 0.4},
    {"cheekPuff": 1.0, "mouthPress": 0.4, "mouthPucker": 0.3},
    {"tongueOut": 1.0, "jawOpen": 0.55, "eyeSquint": 0.3},
    {"jawLeft": 1.0, "mouthLeft": 0.6}, {"jawRight": 1.0, "mouthRight": 0.6},
    {"mouthLeft": 1.0, "mouthSmileLeft": 0.4}, {"mouthRight": 1.0, "mouthSmileRight": 0.4},
    {"mouthSmileLeft": 1.0, "mouthDimpleLeft": 0.7, "cheekSquintLeft": 0.7, "browOuterUpLeft": 0.6},
    {"mouthSmileRight": 1.0, "mouthDimpleRight": 0.7, "cheekSquintRight": 0.7, "browOuterUpRight": 0.6},
    {"browOuterUpLeft": 1.0, "browDownRight": 0.8, "eyeSquintRight": 0.5},
    {"browOuterUpRight": 1.0, "browDownLeft": 0.8, "eyeSquintLeft": 0.5},
    {"eyeBlinkLeft": 1.0, "cheekSquintLeft": 0.7, "mouthSmileLeft": 0.6},
    {"eyeBlinkRight": 1.0, "cheekSquintRight": 0.7, "mouthSmileRight": 0.6},
    {"eyeBlink": 1.0, "mouthSmile": 0.3}, {"eyeSquint": 1.0, "browDown": 0.5, "noseSneer": 0.4},
    {"mouthRollLower": 1.0, "mouthRollUpper": 1.0, "mouthPress": 0.6}, {"mouthStretch": 1.0, "jawOpen": 0.3},
    {"jawForward": 1.0, "mouthShrugLower": 0.6}, {"jawOpen": 1.0}, {"jawOpen": 0.6, "mouthClose": 0.6},
    {"mouthDimple": 1.0, "mouthPress": 0.5}, {"mouthLowerDown": 1.0, "mouthUpperUp": 0.9, "jawOpen": 0.1},
)  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """What a clip shows, frame by frame; T frames."""

    kind: str
    coefficients: np.ndarray  # [T, 52] 0..1
    rotation: np.ndarray  # [T, 3, 3] of the head about the neck pivot
    translation: np.ndarray  # [T, 3] metres
    K: np.ndarray  # [T, 3, 3] pixels
    c2w: np.ndarray  # [T, 4, 4] OpenCV, canonical head space


def wander(rng: np.random.Generator, seconds: np.ndarray, period: float, count: int) -> np.ndarray:
    """Smooth noise [T, count] of unit deviation whose fastest wave lasts `period` seconds."""
    waves = 5
    frequency = rng.uniform(0.15, 1.0, (waves, count)) / period
    phase = rng.uniform(0, 2 * np.pi, (waves, count))
    weight = rng.normal(size=(waves, count))
    weight /= np.linalg.norm(weight, axis=0) / np.sqrt(2)
    return (weight * np.sin(2 * np.pi * frequency * seconds[:, None, None] + phase)).sum(1)


def _glide(rng: np.random.Generator, seconds: np.ndarray, draw, hold: tuple[float, float], ease: float) -> np.ndarray:
    """Holds values that `draw()` returns for random times and eases between them -> [T, ...]."""
    clock = float(seconds[0]) - rng.uniform(0, hold[1])
    value = np.asarray(draw(), float)
    out = np.repeat(value[None], len(seconds), 0)
    while clock < seconds[-1]:
        clock += rng.uniform(*hold)
        target = np.asarray(draw(), float)
        t = np.clip((seconds - clock) / (ease * rng.uniform(0.7, 1.4)), 0, 1)
        t = (t * t * (3 - 2 * t)).reshape(-1, *[1] * value.ndim)
        out = out + t * (target - value)
        value = target
    return out


def _vector(shape: dict[str, float], rng: np.random.Generator, skew: float = 0.0) -> np.ndarray:
    """Names (a side may be left out: both sides) -> coefficients [52]; skew makes the sides unequal."""
    out = np.zeros(len(ARKIT_NAMES))
    lean = skew * rng.normal()
    for name, amount in shape.items():
        for side, sign in (("", 0), ("Left", 1), ("Right", -1)):
            if name + side in ARKIT_INDEX:
                out[ARKIT_INDEX[name + side]] = amount * np.clip(1 + sign * lean, 0, 1.3) * rng.uniform(0.85, 1.15)
    return out


def blinks(rng: np.random.Generator, seconds: np.ndarray, rate: float = 0.4) -> np.ndarray:
    """Closure of the lids [T]: quick down, slower up."""
    out = np.zeros(len(seconds))
    clock = float(seconds[0]) - 0.3 + rng.exponential(1 / rate) * rng.random()
    while clock < seconds[-1] + 0.2:
        close, shut, reopen = rng.uniform(0.07, 0.11), rng.uniform(0.0, 0.06), rng.uniform(0.12, 0.2)
        curve = np.interp(seconds - clock, [-close, 0, shut, shut + reopen], [0, 1, 1, 0])
        out = np.maximum(out, curve * rng.uniform(0.85, 1.0))
        clock += 0.35 + rng.exponential(1 / rate)
    return out


def gaze(rng: np.random.Generator, seconds: np.ndarray, reach: float) -> np.ndarray:
    """Fixations and saccades -> coefficients [T, 52] of the eight eyeLook actions."""

    def draw() -> np.ndarray:
        return np.clip(rng.normal(0, reach, 2) * [1.0, 0.8], -1, 1)

    look = _glide(rng, seconds, draw, (0.25, 1.3), 0.06) + 0.02 * wander(rng, seconds, 0.5, 2)
    out = np.zeros((len(seconds), len(ARKIT_NAMES)))
    for name, value in (
        ("eyeLookOutLeft", look[:, 0]), ("eyeLookInRight", look[:, 0]), ("eyeLookInLeft", -look[:, 0]),
        ("eyeLookOutRight", -look[:, 0]), ("eyeLookUpLeft", look[:, 1]), ("eyeLookUpRight", look[:, 1]),
        ("eyeLookDownLeft", -look[:, 1]), ("eyeLookDownRight", -look[:, 1]),
    ):  # fmt: skip
        out[:, ARKIT_INDEX[name]] = np.maximum(value, 0)
    return out


def expressions(rng: np.random.Generator, frames: int) -> np.ndarray:
    """[frames, 52] float32 in 0..1: a mix of speech, held expressions and single actions, with gaze and blinks."""
    seconds = np.arange(frames) / FPS
    mode = rng.choice(["speech", "emotion", "actions", "both"], p=[0.27, 0.30, 0.26, 0.17])
    total = np.zeros((frames, len(ARKIT_NAMES)))
    if mode in ("speech", "both"):
        gain = rng.uniform(0.6, 1.25)
        talk = _glide(
            rng,
            seconds,
            lambda: gain * _vector(_MOUTH_SHAPES[rng.integers(len(_MOUTH_SHAPES))], rng, 0.1),
            (0.1, 0.24),
            0.12,
        )
        total += talk
    if mode in ("emotion", "both"):
        gain = rng.uniform(0.55, 1.1)
        total += _glide(
            rng, seconds,
            lambda: gain * rng.uniform(0.5, 1.1) * _vector(_EXPRESSIONS[rng.integers(len(_EXPRESSIONS))], rng, 0.3),
            (0.35, 1.4), 0.32,
        )  # fmt: skip
    if mode == "actions":
        names = rng.choice(len(ARKIT_NAMES), rng.integers(3, 9), replace=False)
        curves = np.clip(0.35 + 0.55 * wander(rng, seconds, 0.8, len(names)), 0, 1)
        total[:, names] += curves * rng.uniform(0.6, 1.1, len(names))
    total += np.maximum(0, 0.05 * wander(rng, seconds, 0.7, len(ARKIT_NAMES)))  # nobody is ever still
    total[:, [i for i, n in enumerate(ARKIT_NAMES) if n.startswith("eyeLook")]] *= 0.8
    total = total + gaze(rng, seconds, rng.choice([0.2, 0.45, 0.65]))
    lids = blinks(rng, seconds)
    for side in ("Left", "Right"):
        column = ARKIT_INDEX["eyeBlink" + side]
        total[:, column] = np.maximum(total[:, column], lids * rng.uniform(0.93, 1.0))
        total[:, ARKIT_INDEX["eyeWide" + side]] *= 1 - lids
        total[:, ARKIT_INDEX["eyeSquint" + side]] *= 1 - 0.7 * total[:, column].clip(0, 1)
    return tidy(total)


def tidy(coefficients: np.ndarray) -> np.ndarray:
    """Limits [T, 52] that keep the mouth whole: mouthClose at most jawOpen, a tongue needs an open mouth."""
    out = np.clip(coefficients, 0, 1)
    jaw, close, tongue = (ARKIT_INDEX[n] for n in ("jawOpen", "mouthClose", "tongueOut"))
    out[:, jaw] = np.maximum(out[:, jaw], 0.55 * out[:, tongue])
    out[:, close] = np.minimum(out[:, close], out[:, jaw])
    for names in (("mouthPucker", "mouthFunnel"), ("cheekPuff",)):
        for name in names:  # a wide smile and a pucker do not go together
            wide = np.maximum(out[:, ARKIT_INDEX["mouthSmileLeft"]], out[:, ARKIT_INDEX["mouthSmileRight"]])
            out[:, ARKIT_INDEX[name]] *= 1 - 0.6 * wide
    return out.astype(np.float32)


def head_poses(rng: np.random.Generator, frames: int, extent: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """-> rotation [frames, 3, 3] (yaw within 35, pitch 20, roll 15 degrees), translation [frames, 3] metres."""
    seconds = np.arange(frames) / FPS
    reach = extent * rng.uniform(0.25, 1.0)
    centre = rng.normal(0, 0.45, 3)
    path = reach * (centre + 0.75 * wander(rng, seconds, rng.uniform(1.2, 2.6), 3))
    angles = np.tanh(path) * (YAW, PITCH, ROLL)
    shift = 0.006 * np.tanh(wander(rng, seconds, 2.0, 3)) + rng.normal(0, 0.003, 3)
    return np.stack([rotation_from_angles(*a) for a in angles]), np.clip(shift, -0.015, 0.015) * extent


def look_at(head: HeadModel, azimuth: float, elevation: float, distance: float, zoom: float, offset: np.ndarray,
            height: int, width: int) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Camera on the dome around the middle of the face -> K [3, 3], c2w [4, 4].

    Radians and metres; zoom 1 frames the face at FACE_SHARE; offset [2] moves the principal point (share of the frame).
    """
    target = np.array([0.0, 0.5 * (head.chin[1] + head.hairline[1]) + 0.008, 0.02])
    outwards = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    forward = -outwards
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    c2w = np.eye(4)
    c2w[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    c2w[:3, 3] = target + distance * outwards
    focal = zoom * FACE_SHARE * height * (distance - 0.06) / (head.hairline[1] - head.chin[1])
    K = np.array([[focal, 0, (0.5 + offset[0]) * width], [0, focal, (0.5 + offset[1]) * height], [0, 0, 1.0]])
    return K, c2w


def cameras(rng: np.random.Generator, frames: int, kind: str, head: HeadModel, height: int, width: int):
    """-> K [frames, 3, 3], c2w [frames, 4, 4] for a kind of clip."""
    seconds = np.arange(frames) / FPS
    moves = kind in ("orbit", "all")
    if kind == "frontal":
        centre = rng.normal(0, np.radians(3), 2)
    else:
        centre = rng.uniform(-1, 1, 2) * np.radians([35, 15])
    sweep = np.radians([35, 15]) * np.tanh(0.9 * wander(rng, seconds, rng.uniform(1.4, 3.0), 2))
    angles = 0.35 * centre + sweep if moves else np.repeat(centre[None], frames, 0)
    angles = np.clip(angles, -np.radians([35, 15]), np.radians([35, 15]))
    distance = rng.uniform(0.65, 1.3) * (
        1 + (0.08 * np.tanh(wander(rng, seconds, 2.5, 1)[:, 0]) if moves else np.zeros(frames))
    )
    zoom = rng.uniform(0.93, 1.06)
    offset = rng.normal(0, 0.012, 2).clip(-0.03, 0.03)
    pairs = [look_at(head, a, e, d, zoom, offset, height, width) for (a, e), d in zip(angles, distance, strict=True)]
    return np.stack([k for k, _ in pairs]), np.stack([c for _, c in pairs])


def sample_clip(
    rng: np.random.Generator, head: HeadModel, frames: int, height: int, width: int, kind: str | None = None
) -> Clip:
    """A random clip. Kinds: frontal (fixed camera in front), novel (fixed random camera), both with moving pose and
    expression; orbit (moving camera, frozen pose and expression); all (everything moves)."""
    kind = kind or str(rng.choice(KINDS, p=KIND_SHARES))
    coefficients = expressions(rng, frames)
    rotation, translation = head_poses(rng, frames)
    if kind == "orbit":
        frozen = int(rng.integers(frames))
        coefficients, rotation, translation = (
            np.repeat(x[frozen][None], frames, 0) for x in (coefficients, rotation, translation)
        )
    K, c2w = cameras(rng, frames, kind, head, height, width)
    return Clip(kind, coefficients, rotation, translation, K, c2w)


def sample_portrait(rng: np.random.Generator, head: HeadModel, height: int, width: int) -> Clip:
    """One frame: near-frontal camera, small pose, open eyes; neutral in half of the cases, else mildly expressive."""
    coefficients = np.zeros((1, len(ARKIT_NAMES)), np.float32)
    if rng.random() < 0.5:
        shape = _vector(_EXPRESSIONS[rng.integers(len(_EXPRESSIONS))], rng, 0.3) * rng.uniform(0.2, 0.6)
        coefficients = tidy(shape[None] + gaze(rng, np.zeros(1), 0.15))
        for side in ("Left", "Right"):
            coefficients[:, ARKIT_INDEX["eyeBlink" + side]] *= 0.3
    rotation, translation = head_poses(rng, 1, 0.4)
    K, c2w = cameras(rng, 1, "frontal", head, height, width)
    return Clip("frontal", coefficients, rotation, translation, K, c2w)
