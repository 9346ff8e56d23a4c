"""One picture size into another, never stretched, and the same move applied to camera intrinsics."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from factorportrait.errors import MediaError

FITS = ("crop", "pad")


@dataclass(frozen=True)
class Box:
    """A part of a picture in pixels: left edge, top edge, width, height."""

    x: float
    y: float
    width: float
    height: float


def crop_box(text: str) -> Box:
    """`"x,y,w,h"` in pixels of the file -> Box. MediaError when it is not four numbers or is empty."""
    parts = re.split(r"[,\s]+", text.strip())
    try:
        x, y, width, height = (float(part) for part in parts)
    except ValueError as error:
        raise MediaError(
            f"crop {text!r}", expected="four numbers x,y,w,h in pixels", action="e.g. 420,60,600,600"
        ) from error
    if not np.isfinite([x, y, width, height]).all() or width < 1 or height < 1 or x < 0 or y < 0:
        raise MediaError(
            f"crop {text!r}", expected="x, y of 0 or more and w, h of 1 or more", action="e.g. 420,60,600,600"
        )
    return Box(x, y, width, height)


@dataclass(frozen=True)
class Fit:
    """`output = (source - (left, top)) * scale + (x, y)`, the same scale in both directions, black where nothing lands.

    crop: scaled so that the output is covered; the surplus is cut: half on either side, `anchor_y` of it at the top.
    pad: scaled so that everything is visible, black bars of equal width; up to one output pixel is cut at the edges so
    that bars begin at whole pixels without stretching.
    """

    scale: float
    left: float
    top: float
    x: int
    y: int
    content_width: int
    content_height: int
    width: int
    height: int

    @classmethod
    def between(
        cls,
        source_height: int,
        source_width: int,
        height: int,
        width: int,
        fit: str = "crop",
        anchor_y: float = 0.5,
        box: Box | None = None,
    ) -> Fit:
        """How a source (or the `box` in it) goes into height x width pixels. MediaError: unknown fit, box outside."""
        if fit not in FITS:
            raise MediaError(f"fit {fit!r}", expected="crop or pad", action="use --fit crop or --fit pad")
        box = check_box(box, source_height, source_width)
        if fit == "crop":
            scale = max(width / box.width, height / box.height)
            inner_width, inner_height = width, height
        else:
            scale = min(width / box.width, height / box.height)
            inner_width = min(width, max(1, int(box.width * scale + 1e-6)))
            inner_height = min(height, max(1, int(box.height * scale + 1e-6)))
        left = box.x + max(0.0, box.width - inner_width / scale) / 2
        top = box.y + max(0.0, box.height - inner_height / scale) * (anchor_y if fit == "crop" else 0.5)
        return cls(
            scale, left, top, (width - inner_width) // 2, (height - inner_height) // 2,
            inner_width, inner_height, width, height,
        )  # fmt: skip

    def apply(self, image: np.ndarray) -> np.ndarray:
        """uint8 [h,w,3] of the source size -> uint8 [height,width,3], antialiased (bicubic over the covered area)."""
        source_height, source_width = image.shape[:2]
        right = min(source_width, self.left + self.content_width / self.scale)
        bottom = min(source_height, self.top + self.content_height / self.scale)
        inner = _resample(image, self.content_height, self.content_width, (self.left, self.top, right, bottom))
        if inner.shape[:2] == (self.height, self.width):
            return inner
        output = np.zeros((self.height, self.width, 3), np.uint8)
        output[self.y : self.y + self.content_height, self.x : self.x + self.content_width] = inner
        return output

    def intrinsics(self, K: np.ndarray) -> np.ndarray:
        """K [...,3,3] in pixels of the source -> of the output. Off-centre principal points stay off centre."""
        move = np.array(
            [
                [self.scale, 0, self.x - self.left * self.scale],
                [0, self.scale, self.y - self.top * self.scale],
                [0, 0, 1],
            ]
        )
        return move @ np.asarray(K, np.float64)


def check_box(box: Box | None, height: int, width: int) -> Box:
    """The box, or the whole picture. MediaError when it reaches outside."""
    if box is None:
        return Box(0, 0, width, height)
    if box.x + box.width > width or box.y + box.height > height:
        raise MediaError(
            f"crop {box.x:g},{box.y:g},{box.width:g},{box.height:g}",
            expected=f"a box inside the picture of {width}x{height} pixels",
            action="give x,y,w,h in pixels of the file",
        )
    return box


def resize(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """uint8 [H,W,3] -> [size,size,3], or [height,width,3] for a pair, antialiased. The caller keeps the aspect."""
    height, width = (size, size) if isinstance(size, int) else size
    return _resample(image, height, width, (0, 0, image.shape[1], image.shape[0]))


def square_crop(image: np.ndarray, size: int, box: Box | None = None) -> np.ndarray:
    """uint8 [H,W,3] -> [size,size,3]: the largest centred square of the frame or `box`, for the expression encoder."""
    return Fit.between(image.shape[0], image.shape[1], size, size, box=box).apply(image)


def _resample(image: np.ndarray, height: int, width: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """The part `box` (left, top, right, bottom) of uint8 [h,w,3] as [height,width,3]."""
    if box == (0, 0, width, height) and image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box))


def natural_key(path: str | Path) -> list:
    """Sort key under which frame2 comes before frame10."""
    return [
        (1, int(part), "") if part.isdecimal() else (0, 0, part.lower()) for part in re.split(r"(\d+)", Path(path).name)
    ]
