"""The graphs of public Wan models' conditions: their names, and ONNX Runtime against torch at other sizes than the traced ones."""

from __future__ import annotations

import pytest
import torch
from helpers import difference
from wan_models import random_weights, small, with_noise

from factorportrait.export.graphs import export_stage, write_graph
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.models.taehv import TinyDecoder, TinyDecoderConfig
from factorportrait.export.models.wan_stages import tiny_decoder_stages, wan_stages
from factorportrait.export.weights.networks import PUBLISHED

TOLERANCE = 1e-4
NAMES = {
    "Wan2.1-T2V-1.3B": [],
    "Wan2.1-I2V-14B": ["stream_embed", "image_embed"],
    "Wan2.1-Fun-V1.1-1.3B-Control": ["stream_embed", "image_embed", "reference_embed"],
    "Wan2.1-Fun-V1.1-1.3B-Control-Camera": ["stream_embed", "image_embed", "ray_embed"],
    "Wan2.2-Animate-14B": ["stream_embed", "image_embed", "pose_embed", "motion_encoder", "face_embed"],
}


def model(name: str) -> WanDiT:
    network = small(name)
    dit = WanDiT(network.dit, network.fusion, 4, 6).eval().requires_grad_(False)
    dit.load_state_dict(random_weights(network))
    return dit


@pytest.mark.parametrize("name", NAMES)
def test_each_has_what_its_config_asks_for(name):
    stages = wan_stages(model(name), face_frames=9)
    assert [stage.name for stage in stages] == NAMES[name]
    for stage in stages:
        outputs = stage.module(*stage.args)
        assert len(stage.args) == len(stage.input_names)
        assert (1 if isinstance(outputs, torch.Tensor) else len(outputs)) == len(stage.output_names)
        for tensor in [outputs] if isinstance(outputs, torch.Tensor) else outputs:
            # All of them are added to, or looked up by, tokens of the transformer's width; a code is not.
            assert stage.name == "motion_encoder" or tensor.shape[-1] == PUBLISHED[name].dit.head_dim


def test_clip_lengths_that_the_aggregator_halves_twice():
    with pytest.raises(ValueError, match="expected 1 . a multiple of 4, found 76"):
        wan_stages(model("Wan2.2-Animate-14B"), face_frames=76)


def assert_graph_equals_torch(stage, arguments, folder):
    import onnxruntime

    file, *_ = write_graph(export_stage(stage), folder, stage.name)
    session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == stage.output_names
    found = session.run(None, {name: value.numpy() for name, value in zip(stage.input_names, arguments, strict=True)})
    expected = stage.module(*arguments)
    for one, other in zip(found, [expected] if isinstance(expected, torch.Tensor) else expected, strict=True):
        assert difference(torch.from_numpy(one), other) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "stage", "axis"),
    [("Wan2.1-Fun-V1.1-1.3B-Control", "stream_embed", 2), ("Wan2.1-Fun-V1.1-1.3B-Control-Camera", "ray_embed", 2),
     ("Wan2.2-Animate-14B", "image_embed", 1),
     ("Wan2.2-Animate-14B", "motion_encoder", 0), ("Wan2.2-Animate-14B", "face_embed", None)],
)  # fmt: skip
def test_graphs_equal_torch_at_other_sizes(name, stage, axis, tmp_path):
    (chosen,) = (found for found in wan_stages(model(name), face_frames=9) if found.name == stage)
    generator = torch.Generator().manual_seed(0)
    arguments = []
    for argument in chosen.args:
        shape = list(argument.shape)
        if axis is not None:
            shape[axis] = 1
        arguments.append(torch.randn(shape, generator=generator))
    assert_graph_equals_torch(chosen, arguments, tmp_path)


@torch.no_grad()
def test_tiny_decoder_takes_the_place_of_the_vae_s(tmp_path):
    decoder = with_noise(TinyDecoder(TinyDecoderConfig(widths=(12, 8, 6, 4))), 1).eval()
    first, steady = tiny_decoder_stages(decoder, 16, 24)
    assert (first.name, steady.name) == ("vae_decode_first", "vae_decode_steady")
    latents = torch.randn(1, 16, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    frames, *caches = first.module(latents)
    assert frames.shape == (1, 3, 1, 16, 24) and steady.module(latents, *caches)[0].shape == (1, 3, 4, 16, 24)
    assert_graph_equals_torch(first, [latents], tmp_path)
    assert_graph_equals_torch(steady, [latents * 0.5, *caches], tmp_path)
