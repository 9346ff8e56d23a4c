"""Files of weights: every form that a download comes in, every way in which it is damaged, and the memory that reading takes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from factorportrait.errors import CheckpointError
from factorportrait.export.weights.files import LazyTensor, open_weights
from factorportrait.export.weights.fill import fill, summary


def some_weights(dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {"head.weight": (3, 5)} | {f"blocks.{i}.ffn.weight": (4, 6) for i in range(3)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    names = list(weights)
    places = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def refused(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_weights(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_holds(path, weights):
    opened = open_weights(path)
    assert set(opened.tensors) == set(weights)
    for name, tensor in weights.items():
        lazy = opened.tensors[name]
        assert (lazy.shape, lazy.dtype, lazy.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert torch.equal(lazy.load(), tensor)
    return opened


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_form_holds_the_same(tmp_path, dtype):
    weights = some_weights(dtype)
    (tmp_path / "single").mkdir()
    (tmp_path / "sharded").mkdir()
    save_file(weights, tmp_path / "single" / "model.safetensors")
    index = write_shards(tmp_path / "sharded", weights)
    torch.save(weights, tmp_path / "new.pt")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in (tmp_path / "single", tmp_path / "single" / "model.safetensors", index, index.parent):
        assert_holds(path, weights)
    for path in (tmp_path / "new.pt", tmp_path / "old.pth"):
        assert_holds(path, weights)
    assert open_weights(index).files == tuple(sorted(index.parent.glob("*.safetensors")))


def test_a_release_folder_with_other_networks_beside(tmp_path):
    weights = some_weights()
    torch.save({"other": torch.zeros(2)}, tmp_path / "Wan2.1_VAE.pth")
    torch.save({"other": torch.zeros(2)}, tmp_path / "models_t5.pth")
    assert "found 2 of them; name the file itself" in refused(tmp_path)
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_holds(tmp_path, weights)


@pytest.mark.parametrize("prefix", ["model.", "model.diffusion_model.", "model._fsdp_wrapped_module.", "_orig_mod."])
def test_a_causal_checkpoint_loses_its_wrappers(tmp_path, prefix):
    weights = some_weights()
    other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    wrapped = {
        "generator": {prefix + name: tensor for name, tensor in other.items()},
        "generator_ema": {prefix + name: tensor for name, tensor in weights.items()},
        "critic": {}, "step": 600,
    }  # fmt: skip
    torch.save(wrapped, tmp_path / "model.pt")
    opened = assert_holds(tmp_path / "model.pt", weights)
    assert opened.notes[0] == "model.pt: weights of generator_ema (not generator)"


def test_names_that_share_no_prefix_stay(tmp_path):
    weights = some_weights() | {"model.blocks.0.weight": torch.zeros(2)}
    save_file(weights, tmp_path / "a.safetensors")
    assert_holds(tmp_path / "a.safetensors", weights)


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"head.weight": Evil()}, "evil.pt", _use_new_zipfile_serialization=zipped)
    message = refused(tmp_path / "evil.pt")
    assert "expected a file of torch.save with tensors alone; found a pickle that calls posix.system, which was not run" in message
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    assert "was not run" in refused(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file(tmp_path, suffix, share):
    file = tmp_path / f"model{suffix}"
    (torch.save if suffix == ".pt" else save_file)(some_weights(), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert file.name in refused(file)


def test_no_file_of_torch_at_all(tmp_path):
    (tmp_path / "text.pt").write_text("version https://git-lfs")
    assert "text.pt; expected a file of torch.save with tensors alone; found something else, which was not run" in refused(
        tmp_path / "text.pt"
    )


def test_shards_without_their_index(tmp_path):
    index = write_shards(tmp_path, some_weights())
    index.unlink()
    assert "found 2 of them; copy the shards' index, *.safetensors.index.json, too" in refused(tmp_path)


def test_truncated_shard_is_named(tmp_path):
    index = write_shards(tmp_path, some_weights())
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard.name}; expected a whole safetensors file" in refused(index)


def test_missing_shard_is_named(tmp_path):
    index = write_shards(tmp_path, some_weights())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "expected its shard model-00002-of-00002.safetensors beside it; found none; copy all of its 2 shards" in refused(
        index
    )


@pytest.mark.parametrize("shard", ["../model-00001-of-00002.safetensors", "/etc/passwd"])
def test_shards_lie_beside_their_index(tmp_path, shard):
    (tmp_path / "inside").mkdir()
    index = write_shards(tmp_path / "inside", some_weights())
    data = json.loads(index.read_text())
    data["weight_map"] = dict.fromkeys(data["weight_map"], shard)
    index.write_text(json.dumps(data))
    assert "beside it; found none" in refused(index)


def test_index_and_shards_must_agree(tmp_path):
    index = write_shards(tmp_path, some_weights())
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"tail.weight": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors lacks tail.weight" in refused(index)
    places.pop("head.weight")
    index.write_text(json.dumps({"weight_map": places}))
    assert "has beyond it head.weight" in refused(index)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert "weight_map" in refused(index)


def test_places_that_hold_no_weights(tmp_path):
    assert "found nothing" in refused(tmp_path / "none")
    assert "expected one file of weights" in refused(tmp_path)
    for name in ("transformer", "vae"):
        (tmp_path / name).mkdir()
        save_file(some_weights(), tmp_path / name / "model.safetensors")
    assert "name one of its folders: transformer, vae" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert "found .txt" in refused(tmp_path / "notes.txt")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "state.pt")
    assert "found epoch, lr" in refused(tmp_path / "state.pt")
    torch.save({"a.weight": torch.zeros(2, dtype=torch.int32)}, tmp_path / "ints.pt")
    assert "a.weight; expected float32, float16 or bfloat16; found torch.int32" in refused(tmp_path / "ints.pt")


# ---- into a network ----------------------------------------------------------------------------------------------------


def small_network() -> nn.Module:
    with torch.device("meta"):
        blocks = nn.ModuleList(nn.ModuleDict({"ffn": nn.Linear(6, 4, bias=False)}) for _ in range(3))
        return nn.ModuleDict({"head": nn.Linear(5, 3, bias=False), "blocks": blocks})


def filled(weights, **options) -> nn.Module:
    network = small_network()
    fill(network, {name: LazyTensor.of(tensor) for name, tensor in weights.items()}, "weights", **options)
    return network


def fill_refused(weights) -> str:
    with pytest.raises(CheckpointError) as caught:
        filled(weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_types_are_kept_unless_asked():
    weights = some_weights()
    kept, cast = filled(weights), filled(weights, dtype=torch.float32)
    for name, tensor in weights.items():
        assert torch.equal(kept.get_parameter(name), tensor) and kept.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(cast.get_parameter(name), tensor.float())


def test_release_with_single_matrices_in_float32_is_whole():
    weights = some_weights()
    weights["head.weight"] = weights["head.weight"].float()
    assert filled(weights)["head"].weight.dtype == torch.float32


def test_half_of_the_blocks_in_another_type():
    weights = some_weights()
    weights["blocks.2.ffn.weight"] = weights["blocks.2.ffn.weight"].float()
    assert "found blocks.0.ffn.weight in bfloat16, blocks.2.ffn.weight in float32" in fill_refused(weights)


def test_all_that_differs_is_named():
    weights = some_weights()
    weights["heads.weight"] = weights.pop("head.weight")
    weights["blocks.3.ffn.weight"] = weights["blocks.2.ffn.weight"]
    message = fill_refused(weights)
    assert "missing head.weight (nearest: heads.weight)" in message
    assert "left over heads.weight (nearest: head.weight), blocks.3.ffn.weight" in message


def test_wrong_shapes_are_named_with_both():
    weights = some_weights()
    for i in range(2):
        weights[f"blocks.{i}.ffn.weight"] = weights[f"blocks.{i}.ffn.weight"].T.contiguous()
    assert "blocks.0.ffn.weight; expected shape [4, 6]; found [6, 4]; so do 1 more: blocks.1.ffn.weight" in fill_refused(weights)


def test_nothing_is_read_before_all_names_fit():
    weights = {name: LazyTensor.of(tensor) for name, tensor in some_weights().items()}
    touched = []
    lazy = {
        name: LazyTensor(value.shape, value.dtype, lambda name=name: touched.append(name)) for name, value in weights.items()
    }
    lazy.pop("head.weight")
    with pytest.raises(CheckpointError, match="missing head.weight"):
        fill(small_network(), lazy, "weights")
    assert not touched


def test_summary_counts():
    weights = some_weights() | {"norm": torch.zeros(7)}
    text = summary({name: LazyTensor.of(tensor) for name, tensor in weights.items()})
    assert text.startswith("5 weights (4 bfloat16, 1 float32)")


MEMORY = """
import sys, torch
from torch import nn
from factorportrait.export.weights.files import open_weights
from factorportrait.export.weights.fill import fill

def anonymous_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

path, dtype = sys.argv[1], getattr(torch, sys.argv[2], None)
torch.set_num_threads(1)
with torch.device("meta"):
    network = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(16))
# One pass through the code with a small tensor, so that what a first call allocates is not counted.
fill(nn.ModuleList([nn.Linear(8, 8, bias=False)]), {"0.weight": next(iter(open_weights(path).tensors.values())).__class__.of(
    torch.zeros(8, 8))}, "warm")
before, most = anonymous_kib(), 0
def look(name):
    global most
    most = max(most, anonymous_kib() - before)
weights = open_weights(path)
fill(network, weights.tensors, weights.where, dtype=dtype, on_tensor=look)
look("")
print(most * 1024, weights.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("form", "dtype", "share"),
    # Kept as it is: next to nothing. Cast to a type twice as large: that copy alone, never the source beside it.
    [("safetensors", "None", 0.1), ("index", "None", 0.1), ("pt", "None", 0.1), ("index", "float32", 2.1)],
)
def test_weights_lie_in_memory_once(tmp_path, form, dtype, share):
    weights = {f"{i}.weight": torch.full((2048, 2048), 0.5 + i, dtype=torch.bfloat16) for i in range(16)}
    if form == "index":
        path = write_shards(tmp_path, weights)
    elif form == "pt":
        path = tmp_path / "model.pt"
        torch.save({"generator_ema": {f"model.{name}": tensor for name, tensor in weights.items()}}, path)
    else:
        path = tmp_path / "model.safetensors"
        save_file(weights, path)
    done = subprocess.run([sys.executable, "-c", MEMORY, path, dtype], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    most, size = map(int, done.stdout.split())
    assert size == 16 * 2048 * 2048 * 2
    assert most < share * size
    if dtype == "float32":
        assert most > 1.9 * size  # the measurement sees what is there
