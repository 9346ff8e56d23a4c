"""A checkpoint: a folder with config.json, one safetensors file per network, and optionally head.npz and MODEL_CARD.md."""

from __future__ import annotations

import difflib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from factorportrait.checkpoint_files import CONFIG, PARTS, checkpoint_files, read_config, weight_file
from factorportrait.errors import CheckpointError, UserError
from factorportrait.export.models.factorportrait import FactorPortrait
from factorportrait.files import whole_folder

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def load_checkpoint(path: str | Path) -> FactorPortrait:
    """Build the model of a checkpoint in fp32, in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, or weights do not fit the config or are not finite.
    """
    path = Path(path)
    checkpoint_files(path)
    config = read_config(path)
    # Nothing is initialised only to be overwritten: shapes first, then the tensors of the files.
    with torch.device("meta"):
        model = FactorPortrait(config)
    for part in PARTS:
        _load_part(getattr(model, part), path / weight_file(part))
    model.dit._build_rotary_tables()
    unset = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if unset:
        raise RuntimeError(f"load_checkpoint left {', '.join(unset)} without values")
    return model.eval().requires_grad_(False)


def save_checkpoint(model: FactorPortrait, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config and weights; other files that the folder already has (head.npz, MODEL_CARD.md) stay.

    Args:
        dtype: of the weights on disk: float32, float16 or bfloat16.

    Raises:
        UserError: the place cannot be written.
    """
    path = Path(path)
    if dtype not in _FLOATS:
        raise ValueError(f"dtype: expected one of {_FLOATS}, found {dtype}")
    with whole_folder(path) as temporary:
        if path.is_dir():
            shutil.copytree(path, temporary, dirs_exist_ok=True)
        (temporary / CONFIG).write_text(json.dumps(model.config.to_dict(), indent=1) + "\n", encoding="utf-8")
        for part in PARTS:
            tensors = {
                name: tensor.detach().to("cpu", dtype).contiguous()
                for name, tensor in getattr(model, part).state_dict().items()
            }
            try:
                save_file(tensors, temporary / weight_file(part))
            except SafetensorError as error:
                # Its writer wraps what the system said, such as a full disk.
                raise UserError(
                    f"cannot write {path}", expected="a place to write to", found=str(error),
                    action="free some space, or choose another place",
                ) from error  # fmt: skip


def _load_part(module: nn.Module, file: Path) -> None:
    """Assign the tensors of a file to a module that was built on `meta`."""
    tensors = _read_tensors(file)
    expected = module.state_dict()
    _compare_names(file, expected, tensors)
    for name in expected:
        tensor = tensors[name]
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{file}: {name}", expected=f"shape {list(expected[name].shape)}", found=f"{list(tensor.shape)}",
                action=f"the weights do not belong to this {CONFIG}",
            )  # fmt: skip
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{file}: {name}", expected="float32, float16 or bfloat16", found=str(tensor.dtype),
                action="save it again in one of these",
            )  # fmt: skip
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{file}: {name}", expected="finite numbers",
                found=f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} are NaN or infinite",
                action="take an earlier checkpoint of the training",
            )  # fmt: skip
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}", expected="a whole safetensors file", found=f"{file.stat().st_size} bytes, {error}",
            action="copy it again",
        ) from error  # fmt: skip


def _compare_names(file: Path, expected: dict, found: dict) -> None:
    missing = [name for name in expected if name not in found]
    left_over = [name for name in found if name not in expected]
    if not missing and not left_over:
        return
    parts = []
    for title, names, others in (("missing", missing, left_over), ("left over", left_over, missing)):
        if not names:
            continue
        shown = []
        for name in names[:3]:
            near = difflib.get_close_matches(name, others, n=1)
            shown.append(f"{name} (nearest: {near[0]})" if near else name)
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        parts.append(f"{title} {', '.join(shown)}{more}")
    raise CheckpointError(
        f"{file}", expected=f"the {len(expected)} weights that {CONFIG} asks for", found=", ".join(parts),
        action=f"use the weights that belong to this {CONFIG}",
    )  # fmt: skip
