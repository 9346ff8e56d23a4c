"""The reference picture: any common picture file -> one RGB array of the model's size."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from factorportrait.errors import MediaError
from factorportrait.runtime.media.fit import Box, Fit

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MIN_SIDE_PX = 64
MAX_PIXELS = 100_000_000


def load_portrait(
    path: str | os.PathLike,
    height: int,
    width: int,
    fit: str = "crop",
    box: Box | None = None,
    anchor_y: float = 1 / 3,
) -> np.ndarray:
    """A png, jpg, webp or bmp of any size -> uint8 RGB [height,width,3], never stretched.

    fit "crop": scaled until the shorter side fits, then cut: half of the surplus on either side, a third of it at the
    top and two thirds at the bottom (`anchor_y`), because faces sit high in portraits. fit "pad": everything is kept,
    with black bars. `box` takes that part of the upright picture first. EXIF orientation is applied, transparency is
    laid on black, of an animation the first frame is taken, 16 bits become 8.

    Raises:
        MediaError: not a picture, cut short, shorter side (of the box) under 64 pixels, more than 100 megapixels.
    """
    image = read_image(path)
    shorter = min(image.shape[:2]) if box is None else min(box.width, box.height)
    if shorter < MIN_SIDE_PX:
        raise MediaError(
            f"portrait {path} is too small",
            expected=f"at least {MIN_SIDE_PX} pixels on the shorter side",
            found=f"{shorter:g} of a picture of {image.shape[1]}x{image.shape[0]}",
            action="choose a larger picture" if box is None else "choose a larger crop",
        )
    return Fit.between(image.shape[0], image.shape[1], height, width, fit, anchor_y, box).apply(image)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A picture file -> uint8 RGB [H,W,3] upright, in its own size. MediaError when it is not a whole picture."""
    with open_image(path) as image:
        try:
            image = ImageOps.exif_transpose(image)
            image.load()
            return np.ascontiguousarray(_to_rgb(image))
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise MediaError(
                f"picture {path} cannot be decoded",
                expected="a whole picture",
                found=str(error),
                action="copy or export the file again",
            ) from error


def open_image(path: str | os.PathLike) -> Image.Image:
    """Open a picture and read its header only. MediaError when it is missing, of an unknown kind, or huge."""
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise MediaError(f"picture {path}", expected="a png, jpg or webp file", found=found, action="check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(path, "far more") from error
    except (UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise MediaError(
            f"picture {path} is not readable as a picture",
            expected="the content of a png, jpg, webp or bmp file",
            found=f"{path.stat().st_size} bytes of something else",
            action="export it as png or jpg",
        ) from error
    except OSError as error:
        raise MediaError(f"picture {path} cannot be read", found=str(error), action="check the file") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise _too_large(path, f"{image.width}x{image.height}")
    return image


def _too_large(path: Path, found: str) -> MediaError:
    return MediaError(
        f"picture {path} is too large",
        expected=f"at most {MAX_PIXELS // 1_000_000} megapixels",
        found=found,
        action="scale it down first",
    )


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Any Pillow mode -> uint8 [H,W,3]; transparency laid on black."""
    if image.mode.startswith("I"):
        # 16-bit grey: 65535 is white. Pillow's own conversion would clip at 255.
        grey = np.asarray(image).astype(np.float64) / 257.0
        return np.repeat(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))
