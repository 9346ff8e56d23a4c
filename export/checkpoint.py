"""A checkpoint: a folder with config.json, one safetensors file per network, and optionally head.npz and MODEL_CARD.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from factorportrait.checkpoint_files import CONFIG, PARTS, checkpoint_files, read_config, weight_file
from factorportrait.errors import UserError
from factorportrait.export.models.factorportrait import FactorPortrait
from factorportrait.export.weights.files import FLOATS, open_weights
from factorportrait.export.weights.fill import fill
from factorportrait.files import whole_folder


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
        weights = open_weights(path / weight_file(part))
        fill(getattr(model, part), weights.tensors, weights.where, dtype=torch.float32)
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
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected one of {FLOATS}, found {dtype}")
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
