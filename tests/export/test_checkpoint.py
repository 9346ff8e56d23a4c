"""Checkpoint folders: there and back, and every way in which they can be wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from factorportrait.errors import CheckpointError, UserError
from factorportrait.export.checkpoint import load_checkpoint, save_checkpoint
from factorportrait.export.stages import dit_inputs, dit_stage


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def edit_config(folder, **changes):
    file = folder / "config.json"
    data = json.loads(file.read_text())
    for place, value in changes.items():
        part, _, key = place.rpartition("__")
        (data[part] if part else data)[key] = value
    file.write_text(json.dumps(data))


def edit_weights(folder, part, change):
    file = folder / f"{part}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refused(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_there_and_back(tiny_model, tiny_checkpoint):
    loaded = load_checkpoint(tiny_checkpoint)
    assert loaded.config == tiny_model.config
    assert not loaded.training
    # Buffers too: rotary tables and the VAE's statistics are in no file.
    for kind in ("named_parameters", "named_buffers"):
        expected, found = dict(getattr(tiny_model, kind)()), dict(getattr(loaded, kind)())
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    stage, inputs = dit_stage(loaded), dit_inputs(tiny_model, 2, 3)
    with torch.no_grad():
        found = stage.module(*(inputs[name] for name in stage.input_names))[0]
        expected = dit_stage(tiny_model).module(*(inputs[name] for name in stage.input_names))[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk(tiny_model, tmp_path, dtype):
    save_checkpoint(tiny_model, tmp_path / "half", dtype)
    loaded = load_checkpoint(tmp_path / "half")
    for name, parameter in tiny_model.named_parameters():
        found = loaded.get_parameter(name)
        assert found.dtype == torch.float32
        assert torch.equal(found, parameter.to(dtype).float()), name


def test_saving_again_keeps_other_files(tiny_model, copy):
    (copy / "MODEL_CARD.md").write_text("a card")
    save_checkpoint(tiny_model, copy)
    assert (copy / "MODEL_CARD.md").read_text() == "a card"
    load_checkpoint(copy)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_same_weights_same_bytes(tiny_model, tiny_checkpoint, tmp_path):
    save_checkpoint(tiny_model, tmp_path / "again")
    for file in tiny_checkpoint.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_saving_where_a_file_is_in_the_way(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_checkpoint(tiny_model, tmp_path / "file" / "checkpoint")


def test_no_folder(tmp_path):
    assert "found nothing" in refused(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "found a file" in refused(tmp_path / "file")


@pytest.mark.parametrize("name", ["config.json", "dit.safetensors"])
def test_missing_file(copy, name):
    (copy / name).unlink()
    assert f"expected a file {name}" in refused(copy)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(copy, share):
    file = copy / "vae.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    message = refused(copy)
    assert "vae.safetensors" in message and "whole safetensors file" in message


def test_config_is_no_json(copy):
    (copy / "config.json").write_text("{")
    assert "expected JSON" in refused(copy)


def test_unknown_key_names_the_near_miss(copy):
    edit_config(copy, dit__num_head=2)
    message = refused(copy)
    assert "unknown key 'num_head'" in message and "did you mean 'num_heads'" in message


def test_renamed_weight_names_both(copy):
    def rename(tensors):
        tensors["blocks.0.self_attn.query.weight"] = tensors.pop("blocks.0.self_attn.q.weight")

    edit_weights(copy, "dit", rename)
    message = refused(copy)
    assert "missing blocks.0.self_attn.q.weight (nearest: blocks.0.self_attn.query.weight)" in message
    assert "left over blocks.0.self_attn.query.weight (nearest: blocks.0.self_attn.q.weight)" in message


def test_other_depth(copy):
    edit_config(copy, dit__num_layers=3)
    message = refused(copy)
    assert "missing blocks.2." in message and "more" in message


def test_other_width(copy):
    edit_config(copy, dit__ffn_dim=256)
    message = refused(copy)
    assert "blocks.0.ffn.0.weight" in message and "expected shape [256, 64]; found [128, 64]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(copy, value):
    def damage(tensors):
        tensors["head.head.bias"][3] = value

    edit_weights(copy, "dit", damage)
    assert "head.head.bias; expected finite numbers; found 1 of 64" in refused(copy)


def test_integer_weights(copy):
    def damage(tensors):
        tensors["head.head.bias"] = tensors["head.head.bias"].to(torch.int8)

    edit_weights(copy, "dit", damage)
    assert "head.head.bias; expected float32, float16 or bfloat16; found I8" in refused(copy)
