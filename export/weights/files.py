"""Files of weights, opened without being read: names, shapes and types now, values one by one when asked for.

safetensors and new .pt files are mapped into memory: a tensor is the file's own pages, which the system may drop and read again,
so that a 14B model never lies in memory twice. A pickle is opened with torch's `weights_only` alone, which runs no code.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from factorportrait.errors import CheckpointError

INDEX_SUFFIX = ".safetensors.index.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
# The network's file where other networks' files lie beside it.
USUAL_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
# What a training's pickle keeps beside each other, the best to deploy first.
CONTAINERS = ("generator_ema", "ema", "generator", "state_dict", "model", "module")
# What wrappers of a training put around or into names.
PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "model.", "module.", "generator.", "transformer.")
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when `load` is called, and not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor] = field(repr=False, compare=False)

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def chunk(self, num: int, axis: int = 0) -> list[LazyTensor]:
        """Equal slices along an axis."""
        shape = (*self.shape[:axis], self.shape[axis] // num, *self.shape[axis + 1 :])
        return [LazyTensor(shape, self.dtype, lambda i=i: self.load().chunk(num, axis)[i]) for i in range(num)]

    def reshape(self, *shape: int) -> LazyTensor:
        """The same values in another shape."""
        known = torch.empty(self.shape, device="meta").reshape(shape).shape
        return LazyTensor(tuple(known), self.dtype, lambda: self.load().reshape(shape))

    @staticmethod
    def join(parts: list[LazyTensor]) -> LazyTensor:
        """Along axis 0."""
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([part.load() for part in parts]))


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and where they come from.

    Attributes:
        notes: what was decided on the way, for the user to see.
        containers: what of a training's pickle they were taken from, such as generator_ema.
    """

    tensors: Mapping[str, LazyTensor]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The files, as errors name them."""
        first = str(self.files[0])
        return first if len(self.files) == 1 else f"{first} and {len(self.files) - 1} more"

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_weights(path: str | Path) -> Weights:
    """Open a file, an index of shards, or a folder with one of them.

    Args:
        path: .safetensors, .safetensors.index.json, .pt, .pth, .bin or .ckpt, or a folder with one network's files.

    Raises:
        CheckpointError: nothing is there, a file or shard is missing or damaged, an index and its shards disagree, or a pickle
            holds more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}", expected="a file of weights or a folder with one", found="nothing", action="correct the path"
        )
    if path.name.endswith(INDEX_SUFFIX):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return _unwrapped(_open_safetensors(path), (path,))
    if path.suffix in PICKLES:
        return _open_pickle(path)
    raise CheckpointError(
        f"{path}", expected=f"one of {', '.join(SUFFIXES)} or *{INDEX_SUFFIX}", found=path.suffix or "no suffix",
        action="name a file of weights",
    )  # fmt: skip


def _open_folder(path: Path) -> Weights:
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    files = [file for suffix in SUFFIXES for file in sorted(path.glob(f"*{suffix}"))]
    if len(indices) == 1:
        return _open_index(indices[0])
    usual = [path / name for name in USUAL_NAMES if (path / name).is_file()]
    for alone in (usual, files):
        if len(alone) == 1 and not indices:
            return open_weights(alone[0])
    inside = sorted(file.parent.name for suffix in SUFFIXES for file in path.glob(f"*/*{suffix}"))
    found = f"{len(files)} of them" if files else "none"
    hint = "name the file itself"
    if any(re.search(r"-\d+-of-\d+\.", file.name) for file in files):
        hint = f"copy the shards' index, *{INDEX_SUFFIX}, too"
    elif inside and not files:
        hint = f"name one of its folders: {', '.join(dict.fromkeys(inside))}"
    raise CheckpointError(f"{path}", expected="one file of weights, or one index of shards", found=found, action=hint)


def _open_index(path: Path) -> Weights:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        places = index["weight_map"]
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
            raise ValueError("weight_map is no object of file names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}", expected='JSON with "weight_map"', found=str(error), action="copy the index again"
        ) from error
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).name != shard or not (path.parent / shard).is_file():
            raise CheckpointError(
                f"{path}", expected=f"its shard {shard} beside it", found="none",
                action=f"copy all of its {len(shards)} shards",
            )  # fmt: skip
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        inside = _open_safetensors(path.parent / shard)
        listed = {name for name, place in places.items() if place == shard}
        for title, names in (("lacks", listed - set(inside)), ("has beyond it", set(inside) - listed)):
            if names:
                raise CheckpointError(
                    f"{path}", expected="an index of what the shards hold", found=f"{shard} {title} {_some(sorted(names))}",
                    action="take index and shards of one download",
                )  # fmt: skip
        tensors |= inside
    return _unwrapped(tensors, tuple(path.parent / shard for shard in shards))


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        opened = safe_open(path, framework="pt")
        tensors = {}
        for name in opened.keys():
            view = opened.get_slice(name)
            dtype = DTYPES.get(view.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{path}: {name}", expected="float32, float16 or bfloat16", found=view.get_dtype(),
                    action="save it again in one of these",
                )  # fmt: skip
            tensors[name] = LazyTensor(tuple(view.get_shape()), dtype, lambda name=name: opened.get_tensor(name))
        return tensors
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}", expected="a whole safetensors file", found=f"{path.stat().st_size} bytes, {error}",
            action="copy it again",
        ) from error  # fmt: skip


def _open_pickle(path: Path) -> Weights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)|Unsupported (?:class|global) (\S+)|to allow (\S+)", str(error))
        found = f"a pickle that calls {next(filter(None, name.groups()))}" if name else "something else"
        raise CheckpointError(
            f"{path}", expected="a file of torch.save with tensors alone", found=f"{found}, which was not run",
            action="copy it again, or save the weights as safetensors where they come from",
        ) from error  # fmt: skip
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}", expected="a whole file of torch.save",
            found=f"{path.stat().st_size} bytes, {str(error).partition('. ')[0] or type(error).__name__}",
            action="copy it again",
        ) from error  # fmt: skip
    notes, containers = [], []
    for _ in range(2):
        if not isinstance(content, Mapping) or any(isinstance(value, Tensor) for value in content.values()):
            break
        names = [name for name in CONTAINERS if isinstance(content.get(name), Mapping)]
        if not names:
            break
        others = f" (not {', '.join(names[1:])})" if names[1:] else ""
        notes.append(f"{path.name}: weights of {names[0]}{others}")
        containers.append(names[0])
        content = content[names[0]]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        found = f"{', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path}", expected=f"tensors by name, or one of {', '.join(CONTAINERS)}", found=found or "nothing",
            action="save the network's state_dict",
        )  # fmt: skip
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{path}: {name}", expected="float32, float16 or bfloat16", found=str(tensor.dtype),
                action="save it again in one of these",
            )  # fmt: skip
    return _unwrapped({name: LazyTensor.of(tensor) for name, tensor in tensors.items()}, (path,), tuple(notes), tuple(containers))


def _unwrapped(
    tensors: dict[str, LazyTensor], files: tuple[Path, ...], notes: tuple[str, ...] = (), containers: tuple[str, ...] = ()
) -> Weights:
    """Take away what a training's wrappers added to the names: a prefix that all of them share, and words inside."""
    names = {name: name for name in tensors}
    for word in WRAPPERS:
        names = {name: short.replace(word, "") for name, short in names.items()}
    taken = []
    while prefix := next((p for p in PREFIXES if names and all(short.startswith(p) for short in names.values())), None):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
        taken.append(prefix)
    if taken:
        notes = (*notes, f"names without {''.join(taken)}")
    if len(set(names.values())) < len(names):
        raise CheckpointError(
            f"{files[0]}", expected="each weight once", found="names that differ in their wrappers alone",
            action="save the network without its training wrappers",
        )  # fmt: skip
    return Weights({short: tensors[name] for name, short in names.items()}, files, notes, containers)


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
