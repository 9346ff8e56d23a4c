"""A video as the two pictures of the README: an animation and a strip of frames.

python -m demo.make_pictures out/demo.mp4 --animation docs/demo.webp --strip docs/demo.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from factorportrait.command import run_command
from factorportrait.files import whole_file
from factorportrait.runtime.media.driving import VideoSource
from factorportrait.runtime.media.writer import contact_sheet


def write_animation(frames: list[np.ndarray], fps: float, path: Path) -> None:
    """frames uint8 [H,W,3] -> an animated WebP that repeats for ever."""
    pictures = [Image.fromarray(frame) for frame in frames]
    with whole_file(path) as part:
        pictures[0].save(
            part, format="WEBP", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, quality=80
        )  # fmt: skip


def write_strip(frames: list[np.ndarray], count: int, path: Path) -> None:
    """`count` frames at even distances, one below the other, as a PNG."""
    chosen = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, count)]
    with whole_file(path) as part:
        Image.fromarray(contact_sheet(chosen, 2)).save(part, format="PNG", optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("--animation", type=Path, required=True)
    parser.add_argument("--strip", type=Path, required=True)
    arguments = parser.parse_args()
    video = VideoSource(arguments.video)
    frames = list(video)
    write_animation(frames, float(video.fps), arguments.animation)
    write_strip(frames, 8, arguments.strip)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("make_pictures", main))
