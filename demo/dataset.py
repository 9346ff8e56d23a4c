"""Render clips for training: python -m demo.dataset --out DIR --clips N --frames 29 --size 128 --seed S --split train.

A shard holds `CLIPS_PER_SHARD` clips in one .npz (deflate level 1): n clips, T frames, size x size pixels.

| array | shape, type |
|---|---|
| frames, normals | [n, T, H, W, 3] uint8 |
| twin_frames, twin_coefficients | the same clips with another performance: person, pose, camera and light are equal |
| portrait, portrait_normals | [n, H, W, 3] uint8 |
| coefficients | [n, T, 52] float32, order of demo.world.head.ARKIT_NAMES |
| rotation, translation | [n, T, 3, 3], [n, T, 3] float32: head pose about the neck pivot, metres |
| K, c2w | [n, T, 3, 3], [n, T, 4, 4] float64, OpenCV, canonical head space |
| face_boxes | [n, T, 3, 4] float32: left, top, right, bottom in pixels of both eyes and the mouth |
| portrait_coefficients, _rotation, _translation, _K, _c2w | the same without T |
| kind | [n] int8, index into demo.world.motion.KINDS |
| identity, scene | [n] JSON text: Identity.to_dict(), Scene.to_dict() |

Every clip has its own person. A run can be stopped and started again: finished shards are skipped. A higher --clips adds to the
folder; dataset.json says what it holds, and another run with other settings is refused.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # one thread per worker process: two that share the cores fight each other

import argparse  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import time  # noqa: E402
import zipfile  # noqa: E402
import zlib  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from demo.world.appearance import Appearance, Identity, Scene  # noqa: E402
from demo.world.head import MATERIALS, HeadModel  # noqa: E402
from demo.world.motion import KINDS, expressions, sample_clip, sample_portrait  # noqa: E402
from demo.world.render import Renderer  # noqa: E402
from factorportrait.command import run_command  # noqa: E402
from factorportrait.errors import UserError  # noqa: E402
from factorportrait.files import whole_file  # noqa: E402
from factorportrait.model_config import FRAMES_PER_LATENT  # noqa: E402

CLIPS_PER_SHARD = 16
SHORTEST_CLIP = 9  # frames that a crop for the decoder has (demo/train/vae.py)
CELL = 8  # pixels along one side of a latent cell, of which a picture is a whole number
SMALLEST_SIZE = 32  # of a picture; in less no face can be told from another
NOTE = "dataset.json"
SETTINGS = {"frames": int, "size": int, "seed": int, "split": str, "clips_per_shard": int}  # what it says
DAMAGED = (ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile)  # what reading a damaged shard raises
MOTION = ("coefficients", "rotation", "translation", "K", "c2w")
BOX_DENSITY = 8  # every eighth vertex is enough for a box
_SPLIT_CODES = {"train": 11, "val": 12, "test": 13}
_renderers: dict[tuple[int, int], Renderer] = {}


def renderer_for(height: int, width: int) -> Renderer:
    """One renderer per size and process."""
    if (height, width) not in _renderers:
        _renderers[height, width] = Renderer(height, width)
    return _renderers[height, width]


def render_clip(
    identity: Identity,
    coefficients: np.ndarray,
    head_rotation: np.ndarray,
    head_translation: np.ndarray,
    K: np.ndarray,
    c2w: np.ndarray,
    scene: Scene | None = None,
    height: int = 128,
    width: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """Any combination of a person, expressions [T, 52], head poses [T, 3, 3] + [T, 3] and cameras [T, 3, 3] + [T, 4, 4]
    -> frames and normal maps, both uint8 [T, H, W, 3]. Without a scene: studio light, black background."""
    head = identity.head()
    renderer = renderer_for(height, width)
    renderer.set_appearance(Appearance(identity, head, scene or Scene.studio()))
    pairs = [
        renderer.pair(head, *values)
        for values in zip(coefficients, head_rotation, head_translation, K, c2w, strict=True)
    ]
    return np.stack([rgb for rgb, _ in pairs]), np.stack([normal for _, normal in pairs])


def face_boxes(head: HeadModel, clip: dict[str, np.ndarray]) -> np.ndarray:
    """[T, 3, 4] left, top, right, bottom of the projected vertices of both eyes and of the mouth, in pixels."""
    inside = np.isin(head.basis.material, [MATERIALS.index("mouth"), MATERIALS.index("teeth")])
    groups = [rows[::BOX_DENSITY] for rows in (*head.basis.eye_rows, np.unique(head.faces[inside]))]
    boxes = []
    for coefficients, rotation, translation, K, c2w in zip(*(clip[name] for name in MOTION), strict=True):
        posed, camera = head.pose(coefficients, rotation, translation), np.linalg.inv(c2w)
        for rows in groups:
            points = (posed[rows] @ camera[:3, :3].T + camera[:3, 3]) @ K.T
            pixels = points[:, :2] / points[:, 2:]
            boxes.append([*pixels.min(0), *pixels.max(0)])
    return np.reshape(boxes, (-1, len(groups), 4)).astype(np.float32)


def make_twin(clip: dict[str, np.ndarray], split: str, seed: int, index: int) -> dict[str, np.ndarray]:
    """Another performance for the arrays of a clip: what differs between the two is expression and nothing else."""
    rng = np.random.default_rng([_SPLIT_CODES[split], seed, index, 1])
    count, height, width, _ = clip["frames"].shape
    coefficients = expressions(rng, count)
    if KINDS[int(clip["kind"])] == "orbit":
        coefficients = np.repeat(coefficients[rng.integers(count)][None], count, 0)
    identity, scene = (kind.from_dict(json.loads(str(clip[name]))) for kind, name in ((Identity, "identity"), (Scene, "scene")))
    head, renderer = identity.head(), renderer_for(height, width)
    renderer.set_appearance(Appearance(identity, head, scene))
    poses = zip(coefficients, clip["rotation"], clip["translation"], clip["K"], clip["c2w"], strict=True)
    frames = [renderer.picture(head, *values) for values in poses]
    return {"twin_frames": np.stack(frames), "twin_coefficients": coefficients}


def make_clip(split: str, seed: int, index: int, frames: int, size: int) -> dict[str, np.ndarray]:
    """Clip number `index` of a split -> the arrays of one clip (see the module's table, without n)."""
    rng = np.random.default_rng([_SPLIT_CODES[split], seed, index])
    identity = Identity.sample(seed * 1_000_000 + index, split)
    head, scene = identity.head(), Scene.sample(rng)
    clip = sample_clip(rng, head, frames, size, size)
    still = sample_portrait(rng, head, size, size)
    both = [np.concatenate([getattr(still, name), getattr(clip, name)]) for name in MOTION]
    rgb, normals = render_clip(identity, *both, scene=scene, height=size, width=size)
    out = {"frames": rgb[1:], "normals": normals[1:], "portrait": rgb[0], "portrait_normals": normals[0]}
    for name, values in zip(MOTION, both, strict=True):
        values = values.astype(np.float64 if name in ("K", "c2w") else np.float32)
        out[name], out["portrait_" + name] = values[1:], values[0]
    out["kind"] = np.int8(KINDS.index(clip.kind))
    out["identity"], out["scene"] = json.dumps(identity.to_dict()), json.dumps(scene.to_dict())
    out["face_boxes"] = face_boxes(head, out)
    return out | make_twin(out, split, seed, index)


def write_shard(path: Path, clips: list[dict[str, np.ndarray]]) -> None:
    """Stack clips and write them under a temporary name, then rename."""
    temporary = path.with_name(f"{path.name}.part.{os.getpid()}")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in clips[0]:
            with archive.open(name + ".npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.stack([clip[name] for clip in clips]), allow_pickle=False)
    os.replace(temporary, path)


def load_shard(path: Path | str) -> dict[str, np.ndarray]:
    """One shard as a dict of arrays.

    Raises:
        UserError: it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except DAMAGED as error:
        raise UserError(
            f"{path}", expected="a shard of demo.dataset", found="a damaged file",
            action="remove it and run python -m demo.dataset again",
        ) from error  # fmt: skip


def clips_in(path: Path) -> int:
    """How many clips a finished shard holds; none where it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return len(archive["kind"])
    except (OSError, *DAMAGED):
        return 0


def read_settings(folder: Path) -> dict[str, Any]:
    """What the clips of a folder were rendered with, see `SETTINGS`.

    Raises:
        UserError: the folder's dataset.json is missing or damaged.
    """
    note, expected = folder / NOTE, "what python -m demo.dataset writes"
    action = "render the clips into another folder with python -m demo.dataset"
    if not note.exists():
        first = f"run python -m demo.dataset --out {folder} first"
        raise UserError(f"no {note}", expected=expected, action=action if shard_paths(folder) else first)
    try:
        settings = json.loads(note.read_text(encoding="utf-8"))
        if {name: type(value) for name, value in settings.items()} != SETTINGS:
            raise ValueError(f"other names than {', '.join(SETTINGS)}")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{note}", expected=expected, found="a damaged file", action=action) from error
    return settings


def fits_latents(frames: int) -> bool:
    """Whether a clip of so many frames has whole latent frames, and enough of them."""
    return frames >= SHORTEST_CLIP and frames % FRAMES_PER_LATENT == 1


def shard_paths(folder: Path | str) -> list[Path]:
    """Finished shards of a folder, in order."""
    return sorted(Path(folder).glob("shard-*.npz"))


def iterate_clips(folder: Path | str) -> Iterator[dict[str, np.ndarray]]:
    """Clips of a folder one by one, each a dict without the leading axis n."""
    for path in shard_paths(folder):
        shard = load_shard(path)
        for i in range(len(shard["kind"])):
            yield {name: values[i] for name, values in shard.items()}


def _make_shard(job: tuple) -> tuple[int, float]:
    path, split, seed, start, count, frames, size = job
    began = time.perf_counter()
    write_shard(path, [make_clip(split, seed, start + i, frames, size) for i in range(count)])
    return count, time.perf_counter() - began


def render_dataset(
    out: Path, clips: int, frames: int = 29, size: int = 128, seed: int = 0, split: str = "train", workers: int = 1
) -> None:
    """Render the clips that are not there yet; prints a line per shard with rate and remaining time.

    Raises:
        UserError: `out` is a file, or holds other clips.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}", expected="a folder", found="a file", action="choose another --out")
    settings = {"frames": frames, "size": size, "seed": seed, "split": split, "clips_per_shard": CLIPS_PER_SHARD}
    if (out / NOTE).exists() or shard_paths(out):
        found = read_settings(out)
        if found != settings:
            raise UserError(
                f"--out {out}", expected=f"clips of {json.dumps(settings)}", found=json.dumps(found), action="choose another --out"
            )
    with whole_file(out / NOTE) as part:
        part.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    jobs = [
        (
            out / f"shard-{start // CLIPS_PER_SHARD:05d}.npz",
            split,
            seed,
            start,
            min(CLIPS_PER_SHARD, clips - start),
            frames,
            size,
        )
        for start in range(0, clips, CLIPS_PER_SHARD)
    ]
    # The last shard of an earlier run may be short of what this one wants.
    waiting = [job for job in jobs if clips_in(job[0]) < job[4]]
    print(
        f"{len(jobs) - len(waiting)} of {len(jobs)} shards are there; rendering {len(waiting)} with {workers} workers",
        flush=True,
    )
    if not waiting:
        return
    began, done, total = time.perf_counter(), 0, sum(job[4] for job in waiting)

    def report(count: int) -> None:
        nonlocal done
        done += count
        spent = time.perf_counter() - began
        rate = done * (frames + 1) / spent
        print(f"{done}/{total} clips  {rate:.0f} pairs/s  ETA {(total - done) * spent / done:.0f} s", flush=True)

    if workers <= 1:
        for job in waiting:
            report(_make_shard(job)[0])
        return
    render_clip(Identity.sample(0), *_one_frame())  # compile the kernels once, before the workers start
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for count, _ in pool.imap_unordered(_make_shard, waiting):
            report(count)


def _one_frame() -> tuple[np.ndarray, ...]:
    still = sample_portrait(np.random.default_rng(0), Identity.sample(0).head(), 128, 128)
    return still.coefficients, still.rotation, still.translation, still.K, still.c2w


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: UserError: a number that no data set can have."""
    action = "choose another number"
    for name, least in (("clips", 1), ("seed", 0), ("workers", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}", expected=f"{least} or more", found=str(getattr(args, name)), action=action)
    if not fits_latents(args.frames):
        expected = f"{FRAMES_PER_LATENT}n + 1, at least {SHORTEST_CLIP}, as latent frames want"
        raise UserError("--frames", expected=expected, found=str(args.frames), action=action)
    if args.size < SMALLEST_SIZE or args.size % CELL:
        expected = f"a multiple of {CELL}, at least {SMALLEST_SIZE}"
        raise UserError("--size", expected=expected, found=str(args.size), action=action)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, required=True)
    parser.add_argument(
        "--frames", type=int, default=29, help="frames per clip, 4n + 1, at least 9 (default 29)"
    )
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--split", choices=("train", "val", "test"), default="train")
    args = parser.parse_args()
    check_arguments(args)
    render_dataset(**vars(args))


if __name__ == "__main__":
    raise SystemExit(run_command("demo.dataset", main))
