"""Embeddings of prompts and pictures in files: [tokens, width] as .npy, or as the only or named tensor of a .safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from factorportrait.errors import UserError

NAMES = ("embeddings", "prompt_embeds", "context", "image_embeds")


def read_embeddings(path: str | Path, width: int, max_tokens: int | None, option: str) -> np.ndarray:
    """float32 [tokens, width] of a file; a leading axis of length 1 is taken away.

    Args:
        max_tokens: that the model looks at; None for any number.
        option: how the user named the file, for the errors.

    Raises:
        UserError: missing, damaged, of another width, longer, or not finite.
    """
    path = Path(path)
    what, expected = f"{option} {path}", f"an array [tokens, {width}] in a .npy or .safetensors file"
    if not path.is_file():
        raise UserError(what, expected=expected, found="no such file", action="correct the path")
    try:
        array = np.load(path, allow_pickle=False) if path.suffix == ".npy" else _read_safetensors(path, what)
        array = np.asarray(array, np.float32)
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise UserError(what, expected=expected, found=str(error) or "another file", action="save it again") from error
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2 or array.shape[1] != width or not len(array):
        raise UserError(what, expected=expected, found=str(list(array.shape)), action="take the encoder of this checkpoint")
    if max_tokens is not None and len(array) > max_tokens:
        raise UserError(what, expected=f"at most {max_tokens} tokens", found=str(len(array)), action="shorten the prompt")
    if not np.isfinite(array).all():
        raise UserError(what, expected="finite numbers", found="NaN or infinity", action="compute it again")
    return array


def _read_safetensors(path: Path, what: str) -> np.ndarray:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise UserError(
            what, expected="a .npy file, or the package safetensors", found="no such package",
            action="pip install safetensors, or save the array with numpy.save",
        ) from error  # fmt: skip
    try:
        arrays = load_file(path)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{error} (float32 and float16 are read)") from error
    named = [name for name in NAMES if name in arrays]
    if len(arrays) != 1 and not named:
        raise ValueError(f"tensors {', '.join(list(arrays)[:5])}, and none is called {' or '.join(NAMES)}")
    return arrays[named[0] if named else next(iter(arrays))]
