"""The VAE against diffusers' AutoencoderKLWan, and its own forms against each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from wan_models import diffusers_vae

from factorportrait.config import VAEConfig, config_from_dict, config_to_dict
from factorportrait.errors import CheckpointError
from factorportrait.export.models.vae import VideoVAE
from factorportrait.export.models.vae_stages import vae_stages
from factorportrait.export.weights import layouts
from factorportrait.export.weights.networks import WAN22_VAE

WAN = VAEConfig(base_dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal_downsample=(False, True, True))
CONFIGS = {
    "wan": dataclasses.replace(WAN, base_dim=8),
    "demo": VAEConfig(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=4,
        dim_mult=(1, 2, 4),
        num_res_blocks=1,
        temporal_downsample=(True, True),
        patch_size=2,
        latents_mean=(0.1, -0.2, 0.3, -0.4),
        latents_std=(0.5, 1.5, 2.0, 0.8),
    ),
    "early_time": VAEConfig(
        base_dim=4, z_dim=6, dim_mult=(2, 1, 3), num_res_blocks=2, temporal_downsample=(True, False), in_channels=4
    ),
    # Wan 2.2's structure: the release but for its widths, another order of temporal levels, and widths that shrink.
    "wan22": dataclasses.replace(WAN22_VAE, base_dim=8, decoder_base_dim=12),
    "wan22_early_time": dataclasses.replace(
        WAN22_VAE, base_dim=8, decoder_base_dim=8, z_dim=5, dim_mult=(1, 2, 1), num_res_blocks=1, patch_size=None,
        temporal_downsample=(True, True), latents_mean=None, latents_std=None,
    ),
}  # fmt: skip
TOLERANCE = 1e-4  # relative to the largest value; the same sums in another order differ by about 1e-6
SIZE = (32, 48)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value; shapes must be equal."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def randomised(vae: nn.Module) -> nn.Module:
    """Random gammas and biases, so that a wrong order of layers shows, with outputs of order one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
        # Keep decoded frames inside -1..1: clamped values would hide differences.
        for name in ("decoder.head.2.weight", "decoder.head.2.bias"):
            vae.get_parameter(name).mul_(0.2)
    return vae.eval()


def clip(config: VAEConfig, num_groups: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (batch, config.in_channels, 1 + num_groups * config.temporal_stride, *SIZE)
    return torch.rand(shape, generator=generator) * 2 - 1


@pytest.fixture(scope="module", params=CONFIGS)
def vae(request) -> VideoVAE:
    return randomised(VideoVAE(CONFIGS[request.param]))


@torch.no_grad()
def test_equals_diffusers_frame_by_frame(vae):
    config = vae.config
    if config.temporal_stride != 4:
        pytest.skip("diffusers always takes 4 frames at a time")
    theirs = diffusers_vae(config)
    theirs.load_state_dict(layouts.to_layout(vae.state_dict(), layouts.vae(config), "diffusers"), strict=True)
    mean, std = vae.latents_mean[:, None], vae.latents_std[:, None]

    frames = clip(config, num_groups=5)
    expected = theirs.encode(frames).latent_dist
    latents, caches = vae.encode_first(frames[:, :, :1])
    assert difference(latents * std + mean, expected.mean[:, :, :1]) < TOLERANCE
    for group in range(5):
        start = 1 + 4 * group
        latents, caches = vae.encode_steady(frames[:, :, start : start + 4], caches)
        assert difference(latents * std + mean, expected.mean[:, :, 1 + group : 2 + group]) < TOLERANCE
    mean_found, logvar_found = vae.encode_moments(frames)
    assert difference(mean_found * std + mean, expected.mean) < TOLERANCE
    assert difference(logvar_found.clamp(-30, 20), expected.logvar) < TOLERANCE

    expected_frames = theirs.decode(expected.mean).sample
    assert expected_frames.abs().max() < 1
    normalised = (expected.mean - mean) / std
    decoded, caches = vae.decode_first(normalised[:, :, :1])
    assert difference(decoded, expected_frames[:, :, :1]) < TOLERANCE
    for group in range(5):
        start = 1 + 4 * group
        decoded, caches = vae.decode_steady(normalised[:, :, 1 + group : 2 + group], caches)
        assert difference(decoded, expected_frames[:, :, start : start + 4]) < TOLERANCE
    assert difference(vae.decode_whole(normalised), expected_frames) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("num_groups", [0, 1, 3])
def test_whole_clip_equals_streaming(vae, num_groups):
    frames = clip(vae.config, num_groups)
    latents = vae.encode(frames)
    assert latents.shape[2] == vae.config.num_latent_frames(frames.shape[2])
    assert difference(vae.encode_whole(frames), latents) < TOLERANCE
    assert difference(vae.decode_whole(latents, clamp=True), vae.decode(latents)) < TOLERANCE


@torch.no_grad()
def test_stacked_convolution_equals_conv3d(vae):
    frames = clip(vae.config, num_groups=2)
    latents = vae.encode(frames)
    expected = latents, vae.encode_whole(frames), vae.decode(latents), vae.decode_whole(latents)
    vae.set_conv_impl("conv3d")
    try:
        found = vae.encode(frames), vae.encode_whole(frames), vae.decode(latents), vae.decode_whole(latents)
    finally:
        vae.set_conv_impl("conv2d")
    for one, other in zip(found, expected, strict=True):
        assert difference(one, other) < TOLERANCE


@torch.no_grad()
def test_clips_of_a_batch_do_not_mix(vae):
    frames = clip(vae.config, num_groups=2)
    together = vae.encode(frames)
    for index in range(2):
        assert difference(vae.encode(frames[index : index + 1]), together[index : index + 1]) < TOLERANCE
    decoded = vae.decode_whole(together)
    assert difference(vae.decode_whole(together[1:]), decoded[1:]) < TOLERANCE


@torch.no_grad()
def test_cache_shapes_are_what_streaming_keeps(vae):
    frames = clip(vae.config, num_groups=1)
    shapes = vae.cache_shapes(*SIZE, batch=2)
    latents, encode_caches = vae.encode_first(frames[:, :, :1])
    _, decode_caches = vae.decode_first(latents)
    for direction, caches in (("encode", encode_caches), ("decode", decode_caches)):
        names = [f"cache.{index}" for index in range(len(caches))]
        assert shapes[direction].steady == {name: tuple(c.shape) for name, c in zip(names, caches, strict=True)}
        for name, cache in zip(names, caches, strict=True):
            assert name in shapes[direction].first or not cache.any()
    _, next_caches = vae.decode_steady(latents, decode_caches)
    assert [c.shape for c in next_caches] == [c.shape for c in decode_caches]


def test_gradients_reach_every_parameter(vae):
    frames = clip(vae.config, num_groups=2)
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = vae.encode_moments(frames)
        decoded = vae.decode_whole(mean)
    loss = (decoded.float() - frames[:, : vae.config.out_channels]).square().mean() + logvar.exp().mean()
    names, parameters = zip(*vae.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


def test_wan_2_1_has_its_names_and_size():
    with torch.device("meta"):
        vae = VideoVAE(WAN)
    state_dict = vae.state_dict()
    assert round(sum(value.numel() for value in state_dict.values()) / 1e6, 2) == 126.89
    assert state_dict["encoder.conv1.weight"].shape == (96, 3, 3, 3, 3)
    assert state_dict["encoder.downsamples.5.time_conv.weight"].shape == (192, 192, 3, 1, 1)
    assert state_dict["encoder.downsamples.3.shortcut.weight"].shape == (192, 96, 1, 1, 1)
    assert state_dict["encoder.middle.1.norm.gamma"].shape == (384, 1, 1)
    assert state_dict["encoder.head.2.weight"].shape == (32, 384, 3, 3, 3)
    assert state_dict["decoder.middle.2.residual.6.weight"].shape == (384, 384, 3, 3, 3)
    assert state_dict["decoder.upsamples.3.resample.1.weight"].shape == (192, 384, 3, 3)
    assert state_dict["decoder.upsamples.3.time_conv.weight"].shape == (768, 384, 3, 1, 1)
    assert state_dict["decoder.upsamples.4.shortcut.weight"].shape == (384, 192, 1, 1, 1)
    assert state_dict["decoder.head.0.gamma"].shape == (96, 1, 1, 1)
    shapes = vae.cache_shapes(64, 64)
    # Known from the published model: 32 caches while decoding, 30 after the first latent frame.
    assert (len(shapes["decode"].steady), len(shapes["decode"].first)) == (32, 30)
    assert WAN.spatial_stride == 8 and WAN.temporal_stride == 4 and WAN.latent_size(480, 832) == (60, 104)
    assert not vae.latents_mean.is_meta


def test_wan_2_2_has_its_names_and_size():
    with torch.device("meta"):
        vae = VideoVAE(WAN22_VAE)
    state_dict = vae.state_dict()
    assert round(sum(value.numel() for value in state_dict.values()) / 1e6, 2) == 704.69
    assert state_dict["encoder.downsamples.1.downsamples.2.time_conv.weight"].shape == (320, 320, 3, 1, 1)
    assert state_dict["decoder.upsamples.0.upsamples.3.resample.1.weight"].shape == (1024, 1024, 3, 3)
    assert state_dict["decoder.head.2.weight"].shape == (12, 256, 3, 3, 3)
    assert WAN22_VAE.spatial_stride == 16 and WAN22_VAE.temporal_stride == 4
    shapes = vae.cache_shapes(64, 64)
    # As Wan 2.1: the shortcuts of 2.2 keep nothing.
    assert (len(shapes["decode"].steady), len(shapes["decode"].first)) == (32, 30)


def test_key_names_round_trip(vae):
    state_dict = vae.state_dict()
    rows = layouts.vae(vae.config)
    theirs = layouts.to_layout(state_dict, rows, "diffusers")
    assert set(theirs).isdisjoint({key for key in state_dict if "residual" in key})
    back = layouts.from_layout(theirs, rows, "diffusers")
    assert list(back) == list(state_dict)
    assert all(back[key] is value for key, value in state_dict.items())


def test_unknown_keys_are_named(vae):
    for rename in (layouts.to_layout, layouts.from_layout):
        with pytest.raises(CheckpointError, match="decoder.tail.weight"):
            rename({"decoder.tail.weight": 0}, layouts.vae(vae.config), "diffusers")


def test_config_round_trips(vae):
    config = vae.config
    assert config_from_dict(VAEConfig, config_to_dict(config), "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bass_dim": 8}, "base_dim"),
        ({"temporal_downsample": [True]}, "one flag per step"),
        ({"latents_std": [1.0]}, "16 numbers"),
        ({"z_dim": 0}, "positive integer"),
        ({"dim_mult": 4}, "a list"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_dict(VAEConfig, config_to_dict(WAN) | change, "config.json: vae")


def test_missing_config_key_is_named():
    with pytest.raises(CheckpointError, match="missing z_dim"):
        config_from_dict(VAEConfig, {k: v for k, v in config_to_dict(WAN).items() if k != "z_dim"}, "config.json")


def test_attention_between_levels():
    config = dataclasses.replace(CONFIGS["demo"], attn_scales=(0.5,))
    vae = randomised(VideoVAE(config))
    assert "encoder.downsamples.3.to_qkv.weight" in vae.state_dict()
    assert "decoder.upsamples.1.to_qkv.weight" in vae.state_dict()
    with torch.no_grad():
        frames = clip(config, num_groups=2)
        assert difference(vae.encode_whole(frames), vae.encode(frames)) < TOLERANCE


def test_key_names_are_what_diffusers_makes_of_the_original():
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    state_dict = VideoVAE(CONFIGS["wan"]).state_dict()
    expected = utils.convert_wan_vae_to_diffusers(dict(state_dict))
    found = layouts.to_layout(state_dict, layouts.vae(CONFIGS["wan"]), "diffusers")
    assert set(found) == set(expected)
    assert all(value is expected[key] for key, value in found.items())


@torch.no_grad()
def test_half_precision_keeps_float32_outside():
    vae = randomised(VideoVAE(CONFIGS["demo"]))
    frames = clip(vae.config, num_groups=1)
    expected = vae.encode(frames)
    half = VideoVAE(vae.config).to(torch.bfloat16).eval()
    half.load_state_dict(vae.state_dict())
    latents = half.encode(frames)
    decoded, caches = half.decode_first(latents[:, :, :1])
    assert latents.dtype == decoded.dtype == torch.float32
    assert {cache.dtype for cache in caches} == {torch.bfloat16}
    # bfloat16 has 8 bits of mantissa, and a dozen layers add up.
    assert difference(latents, expected) < 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "conv_impl", "names"),
    [
        ("demo", "conv2d", ["vae_encode_first", "vae_encode_steady", "vae_decode_first", "vae_decode_steady"]),
        ("demo", "conv3d", ["vae_decode_steady"]),
        ("wan22_early_time", "conv2d", ["vae_encode_steady", "vae_decode_first"]),
    ],
)
def test_graphs_equal_torch(config, conv_impl, names, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    vae = randomised(VideoVAE(CONFIGS[config], conv_impl))
    stages = [stage for stage in vae_stages(vae, *SIZE) if stage.name in names]
    assert [stage.name for stage in stages] == names
    for stage in stages:
        path = tmp_path / f"{stage.name}.onnx"
        program = torch.onnx.export(
            stage.module,
            stage.args,
            input_names=stage.input_names,
            output_names=stage.output_names,
            dynamo=True,
            opset_version=23,
            verbose=False,
        )
        program.save(path)
        onnx.checker.check_model(path, full_check=True)
        generator = torch.Generator().manual_seed(5)
        args = [torch.randn(arg.shape, generator=generator) for arg in stage.args]
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [value.name for value in session.get_inputs()] == stage.input_names
        assert [value.name for value in session.get_outputs()] == stage.output_names
        inputs = {name: arg.numpy() for name, arg in zip(stage.input_names, args, strict=True)}
        expected = stage.module(*args)
        for found, value in zip(session.run(None, inputs), expected, strict=True):
            assert difference(torch.from_numpy(found), value) < TOLERANCE
