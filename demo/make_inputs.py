"""Render the files that a user would bring: python -m demo.make_inputs [--out demo/inputs].

People of the test split, which no training clip shows. Written: portrait.png and two more portraits (512 px),
driving.mp4 (256 px, 25 fps), driving_clip/ (video.mp4, mesh.npz, cameras.json), arkit.csv (Live Link Face),
camera_orbit.json (nerfstudio transforms), head.npz (mean head that head angles can pose).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from demo.dataset import render_clip
from demo.world.appearance import Identity
from demo.world.head import ARKIT_INDEX, ARKIT_NAMES, JOINTS, MATERIALS, HeadModel, load_basis, rotation_from_angles
from demo.world.motion import FPS, _vector, blinks, look_at, tidy, wander
from factorportrait.runtime.media.writer import VideoWriter

PORTRAITS = {"portrait.png": 14, "portrait_2.png": 3, "portrait_3.png": 18}  # file -> person of the test split
DRIVER, CLIP_DRIVER = 12, 16
VIDEO_SIZE, PORTRAIT_SIZE = 256, 512
DRIVING_FRAMES, CLIP_FRAMES, ORBIT_FRAMES = 101, 61, 101

# What the driving person does: time in seconds, facial actions, gaze (to the subject's left, up).
SCRIPT = (
    (0.0, {}, (0, 0)),
    (0.5, {"mouthSmile": 0.9, "cheekSquint": 0.6, "eyeSquint": 0.2}, (0, 0)),
    (0.9, {"mouthSmile": 0.8, "jawOpen": 0.35, "mouthUpperUp": 0.5, "cheekSquint": 0.6}, (0, 0)),
    (1.2, {"browInnerUp": 0.9, "browOuterUp": 0.9, "eyeWide": 0.7, "jawOpen": 0.6}, (0, 0.2)),
    (1.6, {"jawOpen": 0.15, "mouthPucker": 0.9}, (-0.8, 0.0)),
    (1.9, {"jawOpen": 0.45, "mouthLowerDown": 0.4}, (-0.8, 0.0)),
    (2.1, {"mouthPress": 0.6, "mouthRollLower": 0.4}, (0.8, 0.1)),
    (2.3, {"jawOpen": 0.3, "mouthFunnel": 0.8}, (0.8, 0.1)),
    (2.6, {"browDown": 0.9, "noseSneer": 0.6, "mouthFrown": 0.5}, (0, -0.2)),
    (3.0, {"mouthSmileLeft": 0.9, "browOuterUpLeft": 0.8, "cheekSquintLeft": 0.5, "eyeBlinkRight": 0.9}, (0, 0)),
    (3.4, {"cheekPuff": 1.0, "mouthPress": 0.3}, (0, 0)),
    (3.75, {"tongueOut": 0.8, "jawOpen": 0.5}, (0.3, 0.2)),
    (4.1, {}, (0, 0)),
)  # fmt: skip


def performance(frames: int, seed: int, start: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The script with blinks and a swaying head -> coefficients [T, 52], angles [T, 3] radians, shift [T, 3] metres."""
    rng = np.random.default_rng([20261121, seed])
    seconds = start + np.arange(frames) / FPS
    times = np.array([time for time, _, _ in SCRIPT])
    poses = np.stack([_vector(shape, np.random.default_rng(i)) for i, (_, shape, _) in enumerate(SCRIPT)])
    looks = np.array([look for _, _, look in SCRIPT], float)

    def eased(values: np.ndarray, ease: float) -> np.ndarray:
        out = np.repeat(values[:1], frames, 0)
        for time, before, after in zip(times[1:], values[:-1], values[1:], strict=True):
            t = np.clip((seconds - time + ease) / ease, 0, 1)[:, None]
            out = out + t * t * (3 - 2 * t) * (after - before)
        return out

    coefficients, look = eased(poses, 0.22), eased(looks, 0.07)
    for side, sign in (("Left", 1), ("Right", -1)):
        for name, value in (
            ("Out", sign * look[:, 0]), ("In", -sign * look[:, 0]), ("Up", look[:, 1]), ("Down", -look[:, 1]),
        ):  # fmt: skip
            coefficients[:, ARKIT_INDEX[f"eyeLook{name}{side}"]] = np.maximum(value, 0)
        lids = ARKIT_INDEX["eyeBlink" + side]
        coefficients[:, lids] = np.maximum(coefficients[:, lids], blinks(np.random.default_rng(seed), seconds, 0.5))
    fade = np.clip(np.arange(frames) / 10, 0, 1)[:, None]  # the first frame looks straight ahead
    angles = fade * np.radians([16, 8, 6]) * np.tanh(wander(rng, seconds, 1.8, 3))
    return tidy(coefficients), angles, fade * 0.006 * np.tanh(wander(rng, seconds, 2.0, 3))


def shape_subset() -> tuple[np.ndarray, np.ndarray]:
    """Vertices [M] and faces [F, 3] (indices into them) of skin, mouth and eyes: what a tracked head mesh has."""
    basis = load_basis()
    kinds = [MATERIALS.index(name) for name in ("skin", "mouth", "eye_left", "eye_right")]
    rows, faces = np.unique(basis.faces[np.isin(basis.material, kinds)], return_inverse=True)
    return rows, faces.reshape(-1, 3).astype(np.int32)


def mean_head() -> dict[str, np.ndarray]:
    """Arrays of head.npz: vertices [V, 3] float16 metres, faces [F, 3] int32, weights [V] float16, pivot [3] float32.

    A pose is `v + w * (R @ (v - pivot) + pivot + t - v)`, as in HeadModel.move.
    """
    basis = load_basis()
    rows, faces = shape_subset()
    joints = dict(zip(JOINTS, basis.mean[basis.num_vertices :], strict=True))
    return {
        "vertices": basis.mean[rows].astype(np.float16),
        "faces": faces,
        "weights": basis.head_weight[rows].astype(np.float16),
        "pivot": (0.5 * (joints["neck03"] + joints["head"])).astype(np.float32),
    }


def front_camera(head: HeadModel, size: int, azimuth: float = 0.0, elevation: float = 0.0):
    """K [3, 3], c2w [4, 4] of a camera that frames this head."""
    return look_at(head, azimuth, elevation, 0.95, 1.0, np.zeros(2), size, size)


def save_npz(path: Path, **arrays: np.ndarray) -> None:
    temporary = path.with_name(path.stem + ".part.npz")
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, path)


def save_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_video(path: Path, frames: np.ndarray) -> None:
    with VideoWriter(path, frames.shape[2], frames.shape[1], Fraction(FPS)) as writer:
        for frame in frames:
            writer.write(frame)


def portrait(identity: Identity, size: int, smile: float) -> np.ndarray:
    """A near-frontal picture [size, size, 3] with a small pose."""
    head = identity.head()
    coefficients = np.stack([_vector({"mouthSmile": smile}, np.random.default_rng(0))]).astype(np.float32)
    K, c2w = front_camera(head, size, 0.06, 0.02)
    rotation = rotation_from_angles(-0.05, 0.02, 0.02)
    frames, _ = render_clip(
        identity, coefficients, rotation[None], np.zeros((1, 3)), K[None], c2w[None], height=size, width=size
    )
    return frames[0]


def write_arkit_csv(path: Path, coefficients: np.ndarray, angles: np.ndarray) -> None:
    """coefficients [T, 52], yaw/pitch/roll [T, 3] radians -> a recording in the layout of Live Link Face."""
    parts = ("HeadYaw", "HeadPitch", "HeadRoll", "LeftEyeYaw", "LeftEyePitch", "LeftEyeRoll")
    header = ["Timecode", "BlendshapeCount", *[name[0].upper() + name[1:] for name in ARKIT_NAMES], *parts]
    header += ["RightEyeYaw", "RightEyePitch", "RightEyeRoll"]
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for k, (row, angle) in enumerate(zip(coefficients, angles, strict=True)):
            value = {name: float(row[i]) for name, i in ARKIT_INDEX.items()}
            eyes = []
            for side, sign in (("Left", 1), ("Right", -1)):
                yaw = sign * 0.45 * (value[f"eyeLookOut{side}"] - value[f"eyeLookIn{side}"])
                eyes += [yaw, 0.31 * (value[f"eyeLookDown{side}"] - value[f"eyeLookUp{side}"]), 0.0]
            clock = f"10:15:{k // FPS:02d}:{k % FPS:02d}.000"
            writer.writerow([clock, 61, *[f"{x:.6f}" for x in (*row, *angle, *eyes)]])
    os.replace(temporary, path)


def orbit_transforms(head: HeadModel, frames: int, size: int) -> dict:
    """nerfstudio transforms.json of a camera that swings by 30 degrees; OpenGL matrices in canonical head space."""
    swing = np.radians(30) * np.sin(2 * np.pi * np.arange(frames) / 100)
    lift = np.radians(6) * np.sin(4 * np.pi * np.arange(frames) / 100)
    poses = [front_camera(head, size, a, e) for a, e in zip(swing, lift, strict=True)]
    K = poses[0][0]
    return {
        "camera_model": "OPENCV", "w": size, "h": size,
        "fl_x": round(K[0, 0], 4), "fl_y": round(K[1, 1], 4), "cx": round(K[0, 2], 4), "cy": round(K[1, 2], 4),
        "frames": [
            {
                "file_path": f"frames/{k:05d}.png",
                "transform_matrix": (c2w @ np.diag([1.0, -1.0, -1.0, 1.0])).round(7).tolist(),
            }
            for k, (_, c2w) in enumerate(poses)
        ],
    }  # fmt: skip


def make_inputs(out: Path) -> None:
    clip_folder = out / "driving_clip"
    clip_folder.mkdir(parents=True, exist_ok=True)
    for k, (name, person) in enumerate(PORTRAITS.items()):
        picture = portrait(Identity.sample(person, "test"), PORTRAIT_SIZE, (0.0, 0.35, 0.0)[k])
        temporary = out / (name + ".part")
        Image.fromarray(picture).save(temporary, format="PNG", optimize=True)
        os.replace(temporary, out / name)

    identity = Identity.sample(DRIVER, "test")
    coefficients, angles, shift = performance(DRIVING_FRAMES, 1)
    rotation = np.stack([rotation_from_angles(*a) for a in angles])
    K, c2w = (np.repeat(x[None], DRIVING_FRAMES, 0) for x in front_camera(identity.head(), VIDEO_SIZE))
    frames, _ = render_clip(identity, coefficients, rotation, shift, K, c2w, height=VIDEO_SIZE, width=VIDEO_SIZE)
    write_video(out / "driving.mp4", frames)
    write_arkit_csv(out / "arkit.csv", coefficients, angles)

    identity = Identity.sample(CLIP_DRIVER, "test")
    head = identity.head()
    coefficients, angles, shift = performance(CLIP_FRAMES, 2, start=1.0)
    rotation = np.stack([rotation_from_angles(*a) for a in angles])
    swing = np.radians(25) * np.sin(np.linspace(0, 2 * np.pi, CLIP_FRAMES))
    poses = [front_camera(head, VIDEO_SIZE, a, 0.1 * a) for a in swing]
    K, c2w = (np.stack(x) for x in zip(*poses, strict=True))
    frames, _ = render_clip(identity, coefficients, rotation, shift, K, c2w, height=VIDEO_SIZE, width=VIDEO_SIZE)
    write_video(clip_folder / "video.mp4", frames)
    rows, faces = shape_subset()
    vertices = np.stack([head.neutral(r, t)[rows] for r, t in zip(rotation, shift, strict=True)])
    save_npz(clip_folder / "mesh.npz", vertices=vertices.astype(np.float16), faces=faces)
    cameras = {
        "convention": "opencv", "width": VIDEO_SIZE, "height": VIDEO_SIZE,
        "K": K[0].round(5).tolist(), "frames": [{"c2w": pose.round(7).tolist()} for pose in c2w],
    }  # fmt: skip
    save_text(clip_folder / "cameras.json", json.dumps(cameras) + "\n")

    save_text(out / "camera_orbit.json", json.dumps(orbit_transforms(head, ORBIT_FRAMES, PORTRAIT_SIZE)) + "\n")
    save_npz(out / "head.npz", **mean_head())
    files = sorted(path for path in out.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size / 1024:8.0f} KiB  {path}")
    print(f"{sum(path.stat().st_size for path in files) / 2**20:8.2f} MiB in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("inputs"))
    make_inputs(parser.parse_args().out)


if __name__ == "__main__":
    main()
