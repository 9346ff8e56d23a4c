"""The light VAE: one latent frame at a time equals whole clips, nothing looks ahead or far back, its graphs are its functions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from factorportrait.config import PatchVAEConfig, VAEConfig, config_from_dict, config_to_dict
from factorportrait.errors import CheckpointError
from factorportrait.export.models.factorportrait import video_vae
from factorportrait.export.models.patch_vae import PatchVAE
from factorportrait.export.models.vae import VideoVAE
from factorportrait.export.models.vae_stages import vae_stages

CONFIG = PatchVAEConfig(
    z_dim=6, cell_size=4, cell_dim=8, cell_blocks=1, fine_dim=8, fine_blocks=1,
    latents_mean=(0.5,) * 6, latents_std=(1.5,) * 6,
)  # fmt: skip


def random_vae(seed: int = 0) -> PatchVAE:
    """Blocks begin as the identity: give every weight a value of its own."""
    torch.manual_seed(seed)
    vae = PatchVAE(CONFIG).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.normal_(0, 0.2)
    return vae


@pytest.fixture(scope="module")
def vae() -> PatchVAE:
    return random_vae()


def frames_of(groups: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 1 + 4 * groups, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("groups", [0, 1, 3])
@torch.no_grad()
def test_streaming_equals_whole_clips(vae, groups):
    frames = frames_of(groups)
    latents = vae.encode(frames)
    assert latents.shape == (2, 6, 1 + groups, 2, 3)
    assert torch.allclose(latents, vae.encode_whole(frames), atol=1e-6)
    decoded = vae.decode(latents)
    assert decoded.shape == frames.shape and decoded.abs().max() <= 1
    assert torch.allclose(decoded, vae.decode_whole(latents, clamp=True), atol=1e-6)


@torch.no_grad()
def test_a_frame_depends_on_its_own_latents_and_those_before(vae):
    latents = vae.encode(frames_of(4)) * 0.1
    changed = latents.clone()
    changed[:, :, 2] += 1
    moved = (vae.decode_whole(latents) - vae.decode_whole(changed)).abs().amax((0, 1, 3, 4)) > 0
    # Latent frame 2 shows frames 5 to 8, and is the past of 9 to 12.
    assert moved.nonzero().flatten().tolist() == list(range(5, 13))


@torch.no_grad()
def test_a_first_picture_is_one_that_stands_still(vae):
    picture = frames_of(0)
    still = vae.encode_steady(picture.expand(-1, -1, 4, -1, -1))[0]
    assert torch.equal(vae.encode_first(picture)[0], still)
    shown, caches = vae.decode_first(still)
    assert torch.allclose(shown, vae.decode_steady(still, caches)[0][:, :, -1:], atol=1e-6)


def test_a_clip_that_does_not_end_with_a_group(vae):
    with pytest.raises(CheckpointError, match="expected 1 \\+ n \\* 4 frames; found 4"):
        vae.encode_whole(frames_of(1)[:, :, :4])


def test_cache_shapes_are_those_of_the_caches(vae):
    shapes = vae.cache_shapes(8, 12)
    _, caches = vae.decode_first(vae.encode(frames_of(0, batch=1)))
    assert [tuple(cache.shape) for cache in caches] == list(shapes["decode"].steady.values()) == [(1, 6, 2, 3)]
    assert shapes["encode"].steady == {}


@pytest.mark.parametrize("index", range(4))
def test_graphs_equal_torch(vae, index, tmp_path):
    stage = vae_stages(vae, 8, 12)[index]
    path = tmp_path / "stage.onnx"
    torch.onnx.export(
        stage.module, stage.args, path, input_names=stage.input_names, output_names=stage.output_names, dynamo=True,
        external_data=False, verbose=False,
    )  # fmt: skip
    torch.manual_seed(2)
    args = [torch.rand_like(arg) for arg in stage.args]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.run(None, {name: arg.numpy() for name, arg in zip(stage.input_names, args, strict=True)})
    with torch.no_grad():
        wanted = stage.module(*args)
    assert len(given) == len(wanted) == len(stage.output_names)
    for ours, theirs in zip(given, wanted, strict=True):
        assert np.allclose(ours, theirs.numpy(), atol=1e-5)


def test_the_config_says_which_vae_it_is():
    wan = VAEConfig(base_dim=8, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True))
    kinds = PatchVAEConfig | VAEConfig
    from factorportrait.config import checked_value

    for config, kind in ((CONFIG, PatchVAE), (wan, VideoVAE)):
        assert checked_value(kinds, config_to_dict(config), "config.json: vae") == config
        assert isinstance(video_vae(config), kind)
    assert (CONFIG.spatial_stride, CONFIG.temporal_stride) == (4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"cell_size": 5}, "even number"), ({"z_dim": 0}, "positive"), ({"latents_std": (1.0,)}, "6 numbers")],
)
def test_bad_configs(change, message):
    with pytest.raises(CheckpointError, match=message):
        replace(CONFIG, **change)
    with pytest.raises(CheckpointError, match=message):
        config_from_dict(PatchVAEConfig, config_to_dict(CONFIG) | change, "config.json: vae")
