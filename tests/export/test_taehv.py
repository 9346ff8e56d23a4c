"""The tiny decoder: its names and shapes as the public layout has them, streamed as whole, against its description in plain torch.

The authors' code and weights are no package, so neither is run here.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import difference
from safetensors.torch import save_file
from wan_models import with_noise

from factorportrait.errors import CheckpointError
from factorportrait.export.models.taehv import TinyDecoder, TinyDecoderConfig, open_tiny_decoder

TOLERANCE = 1e-4
CONFIGS = {
    "taew2_1": TinyDecoderConfig(widths=(12, 8, 6, 4)),
    "taew2_2": TinyDecoderConfig(z_dim=48, patch_size=2, widths=(8, 8, 4, 4)),
}


def described(weights: dict[str, torch.Tensor], latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Frames 0..1 [B,T,3,H,W] of latents [B,F,z,h,w], all frames at once, layer by layer of the published list."""
    def conv(x, name):
        weight = weights[f"{name}.weight"]
        return F.conv2d(x.flatten(0, 1), weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2).unflatten(
            0, x.shape[:2]
        )

    x = conv(3 * torch.tanh(latents / 3), "decoder.1").relu()
    place = 3
    for grow in (1, 2, 2):
        for _ in range(3):
            before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
            y = torch.cat([x, before], dim=2)
            for layer in (0, 2, 4):
                y = conv(y.relu() if layer else y, f"decoder.{place}.conv.{layer}")
            x = (x + y).relu()
            place += 1
        x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        x = conv(x, f"decoder.{place + 1}.conv").unflatten(2, (grow, -1)).flatten(1, 2)
        x = conv(x, f"decoder.{place + 2}")
        place += 3
    x = conv(x.relu(), "decoder.22")
    return torch.nn.PixelShuffle(patch)(x).clamp(0, 1)[:, 3:]


@pytest.fixture(params=CONFIGS)
def decoder(request) -> TinyDecoder:
    return with_noise(TinyDecoder(CONFIGS[request.param]), 1).eval()


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_streams_as_described(decoder, batch):
    generator = torch.Generator().manual_seed(0)
    latents = 2 * torch.randn(batch, decoder.config.z_dim, 6, 2, 3, generator=generator)
    expected = described(decoder.state_dict(), latents.transpose(1, 2), decoder.config.patch_size).transpose(1, 2) * 2 - 1
    assert expected.shape[2] == 21 and 0.1 < (expected.abs() < 1).float().mean()
    assert difference(decoder.decode_whole(latents), expected) <= TOLERANCE
    frames, caches = decoder.decode_first(latents[:, :, :1])
    assert difference(frames, expected[:, :, :1]) <= TOLERANCE
    for chunk in range(5):
        frames, caches = decoder.decode_steady(latents[:, :, 1 + chunk : 2 + chunk], caches)
        assert difference(frames, expected[:, :, 1 + 4 * chunk : 5 + 4 * chunk]) <= TOLERANCE


@torch.no_grad()
def test_caches_have_the_shapes_that_are_told(decoder):
    stride = decoder.config.spatial_stride
    shapes = decoder.cache_shapes(2 * stride, 3 * stride)["decode"]
    _, caches = decoder.decode_first(torch.zeros(1, decoder.config.z_dim, 1, 2, 3))
    assert shapes.steady == {f"cache.{i}": tuple(cache.shape) for i, cache in enumerate(caches)}
    assert len(caches) == 9 and shapes.first == shapes.steady
    _, after = decoder.decode_steady(torch.zeros(1, decoder.config.z_dim, 1, 2, 3), caches)
    assert [cache.shape for cache in after] == [cache.shape for cache in caches]


def test_names_and_sizes_of_the_public_layout():
    with torch.device("meta"):
        weights = TinyDecoder(TinyDecoderConfig()).state_dict()
    assert {name: tuple(weights[name].shape) for name in weights if "decoder.3." in name and "weight" in name} == {
        "decoder.3.conv.0.weight": (256, 512, 3, 3), "decoder.3.conv.2.weight": (256, 256, 3, 3),
        "decoder.3.conv.4.weight": (256, 256, 3, 3),
    }  # fmt: skip
    others = {1: (256, 16), 8: (128, 256), 14: (64, 128), 20: (64, 64), 22: (3, 64)}
    for place, shape in others.items():
        assert weights[f"decoder.{place}.weight"].shape == (*shape, 3, 3)
    growths = {place: tuple(weights[f"decoder.{place}.conv.weight"].shape[:2]) for place in (7, 13, 19)}
    assert growths == {7: (256, 256), 13: (256, 128), 19: (128, 64)}
    assert {name for name in weights if name.endswith("bias")} == {
        *(f"decoder.{place}.bias" for place in (1, 22)),
        *(f"decoder.{place}.conv.{layer}.bias" for place in (3, 4, 5, 9, 10, 11, 15, 16, 17) for layer in (0, 2, 4)),
    }


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_files_open_without_their_encoder(decoder, form, tmp_path):
    weights = decoder.state_dict()
    # A first growth of two frames, of which a decoder that does not grow there takes the later.
    grown = torch.cat([torch.zeros_like(weights["decoder.7.conv.weight"]), weights["decoder.7.conv.weight"]])
    file = tmp_path / f"tiny.{form}"
    content = weights | {"encoder.0.weight": torch.zeros(64, 3, 3, 3), "decoder.7.conv.weight": grown}
    (torch.save if form == "pth" else save_file)(content, file)
    opened = open_tiny_decoder(file)
    assert opened.config == decoder.config
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in weights.items())


def test_what_is_no_tiny_decoder(decoder, tmp_path):
    save_file({"decoder.conv1.weight": torch.zeros(2)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="expected a tiny decoder, which has decoder.1.weight; found decoder.conv1.weight"):
        open_tiny_decoder(tmp_path / "vae.safetensors")
    weights = decoder.state_dict()
    weights.pop("decoder.4.conv.2.bias")
    save_file(weights, tmp_path / "tiny.safetensors")
    with pytest.raises(CheckpointError, match="missing decoder.4.conv.2.bias"):
        open_tiny_decoder(tmp_path / "tiny.safetensors")
