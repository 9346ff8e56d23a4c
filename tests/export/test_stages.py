"""The list of stages, and ranges of blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import difference, randomise

from factorportrait.export.models.factorportrait import FactorPortrait
from factorportrait.export.stages import DiTRange, dit_inputs, dit_stage, stages_of

TABLE = {
    "vae_encode_first", "vae_encode_steady", "vae_decode_first", "vae_decode_steady", "expression_encoder", "arkit_encoder",
    "expression_controller", "condition_embed", "time_embed", "dit", "dit_inplace",
}  # fmt: skip


def run(stage, inputs=None):
    args = stage.args if inputs is None else tuple(inputs[name] for name in stage.input_names)
    with torch.no_grad():
        out = stage.module(*args)
    out = out if isinstance(out, tuple) else (out,)
    return dict(zip(stage.output_names, out, strict=True))


@pytest.fixture(scope="module")
def text_model(tiny_config):
    """With the options of Wan's own checkpoints, and three blocks."""
    dit = dataclasses.replace(tiny_config.dit, text_dim=24, cross_attn_norm=True, num_layers=3)
    model = FactorPortrait(dataclasses.replace(tiny_config, dit=dit)).eval().requires_grad_(False)
    randomise(model, seed=3)
    return model


def test_every_row_of_the_table(tiny_model):
    stages = {stage.name: stage for stage in stages_of(tiny_model)}
    assert stages.keys() == TABLE
    for stage in stages.values():
        assert len(stage.args) == len(stage.input_names)
        for name, tensor in run(stage).items():
            assert tensor.isfinite().all(), (stage.name, name)
        # The first output tells inputs apart; VAE examples are zeros, as nothing is learned from their values.
        first = run(stage)[stage.output_names[0]]
        assert first.std() > 0.01, stage.name


def test_examples_are_the_same_each_time(tiny_model):
    for one, two in zip(stages_of(tiny_model), stages_of(tiny_model), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.args, two.args, strict=True)), one.name


@pytest.mark.parametrize("frames, past", [(3, 5), (1, 0), (2, 0)])
@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
def test_ranges_of_blocks_equal_the_whole(text_model, cuts, frames, past):
    inputs = dit_inputs(text_model, frames, past, seed=5)
    whole = run(dit_stage(text_model), inputs)
    edges = [0, *cuts, 3]
    given, found = dict(inputs), {}
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        stage = dit_stage(text_model, start, end)
        assert ("hidden_states" in stage.input_names) == (start > 0)
        out = run(stage, given)
        assert ("hidden_states" in out) == (end < 3)
        given["hidden_states"] = out.pop("hidden_states", None)
        found |= out
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor), name


def test_stage_equals_the_model(tiny_model):
    inputs = dit_inputs(tiny_model, 2, 3)
    past = [(inputs[f"past_k.{i}"], inputs[f"past_v.{i}"]) for i in range(2)]
    with torch.no_grad():
        velocity, kept = tiny_model.dit(
            *(inputs[name] for name in (
                "noise_latents", "condition_tokens", "expression_modulation", "temb", "timestep_proj", "positions",
                "past_positions",
            )),
            past_kv=past,
        )  # fmt: skip
    found = run(dit_stage(tiny_model), inputs)
    assert difference(found["velocity"], velocity) == 0
    assert all(torch.equal(found[f"new_k.{i}"], k) and torch.equal(found[f"new_v.{i}"], v) for i, (k, v) in enumerate(kept))


@pytest.mark.parametrize("start, end", [(0, 0), (1, 1), (2, 1), (-1, 2), (0, 9)])
def test_range_outside_of_the_blocks(tiny_model, start, end):
    with pytest.raises(ValueError, match="0 <= start < end <= 2"):
        DiTRange(tiny_model.dit, start, end)
