"""The graphs of public Wan models' conditions: their names, what they compute, and ONNX Runtime against torch at other sizes."""

from __future__ import annotations

import pytest
import torch
from helpers import difference
from wan_models import embed_face, embed_reference, random_weights, small, with_noise

from factorportrait.export.graphs import export_stage, write_graph
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.models.taehv import TinyDecoder, TinyDecoderConfig
from factorportrait.export.models.wan_stages import condition_stages, tiny_decoder_stages, wan_stage
from factorportrait.export.weights.networks import PUBLISHED

TOLERANCE = 1e-4
NAMES = {
    "Wan2.1-T2V-1.3B": [],
    "Wan2.1-I2V-14B": ["condition_embed"],
    "Wan2.1-Fun-V1.1-1.3B-Control": ["condition_embed", "reference_embed"],
    "Wan2.1-Fun-V1.1-1.3B-Control-Camera": ["condition_embed"],
    "Wan2.2-Animate-14B": ["condition_embed", "reference_embed", "motion_encoder", "face_embed"],
}


def model(name: str) -> WanDiT:
    network = small(name)
    dit = WanDiT(network.dit, network.fusion, 4, 6).eval().requires_grad_(False)
    dit.load_state_dict(random_weights(network))
    return dit


@pytest.mark.parametrize("name", NAMES)
def test_each_has_what_its_config_asks_for(name):
    dit = model(name)
    stages = condition_stages(dit.config, dit.fusion)
    assert list(stages) == NAMES[name]
    for stage in (wan_stage(dit, name) for name in stages):
        outputs = stage.module(*stage.args)
        assert len(stage.args) == len(stage.input_names)
        assert (1 if isinstance(outputs, torch.Tensor) else len(outputs)) == len(stage.output_names)
        for tensor in [outputs] if isinstance(outputs, torch.Tensor) else outputs:
            # All of them are added to, or looked up by, tokens of the transformer's width; a code is not.
            assert stage.name == "motion_encoder" or tensor.shape[-1] == PUBLISHED[name].dit.head_dim


def test_a_stage_that_a_config_does_not_have():
    with pytest.raises(ValueError, match="expected a stage of condition_embed, reference_embed, found face_embed"):
        wan_stage(model("Wan2.1-Fun-V1.1-1.3B-Control"), "face_embed")


@torch.no_grad()
def test_tokens_are_the_sum_that_diffusers_tests_are_made_with():
    """`test_wan_vs_diffusers.py` compares with the single embeddings; the graphs hold their sums."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    animate = model("Wan2.2-Animate-14B")
    mask, image, pose = draw(1, 4, 3, 4, 6), draw(1, 16, 3, 4, 6), draw(1, 16, 3, 4, 6)
    streams = animate.embed_streams({"mask": mask, "image": image})
    found = wan_stage(animate, "condition_embed").module(mask, image, pose)
    assert difference(found, streams + animate.embed_pose(pose)) <= 1e-6
    assert torch.equal(wan_stage(animate, "reference_embed").module(mask, image), streams)
    codes = draw(1, 9, 14)  # of 1 + 2 * 4 frames
    groups = torch.cat([draw(1, 4, 14), codes[:, :1].expand(-1, 4, -1), codes[:, 1:]], dim=1)
    found = wan_stage(animate, "face_embed").module(groups)
    expected = [tensor for pair in embed_face(animate, codes) for tensor in pair]
    assert len(found) == len(expected) and all(difference(a, b) <= 1e-6 for a, b in zip(found, expected, strict=True))

    control = model("Wan2.1-Fun-V1.1-1.3B-Control")
    reference = draw(1, 16, 1, 4, 6)
    assert difference(wan_stage(control, "reference_embed").module(reference), embed_reference(control, reference)) <= 1e-6
    camera = model("Wan2.1-Fun-V1.1-1.3B-Control-Camera")
    image, rays = draw(1, 16, 2, 4, 6), draw(1, 24, 2, 32, 48)
    expected = camera.embed_streams({"image": image}) + camera.control_adapter(rays)
    assert torch.equal(wan_stage(camera, "condition_embed").module(image, rays), expected)


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
    [("Wan2.1-Fun-V1.1-1.3B-Control", "reference_embed", None), ("Wan2.1-Fun-V1.1-1.3B-Control-Camera", "condition_embed", 2),
     ("Wan2.2-Animate-14B", "condition_embed", 2),
     ("Wan2.2-Animate-14B", "motion_encoder", 0), ("Wan2.2-Animate-14B", "face_embed", 1)],
)  # fmt: skip
def test_graphs_equal_torch_at_other_sizes(name, stage, axis, tmp_path):
    chosen = wan_stage(model(name), stage)
    generator = torch.Generator().manual_seed(0)
    arguments = []
    for argument in chosen.args:
        shape = list(argument.shape)
        if axis is not None:
            shape[axis] = 8 if stage == "face_embed" else 1
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
