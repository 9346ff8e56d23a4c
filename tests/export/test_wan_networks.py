"""Published Wan networks: names, shapes and counts at their real sizes without values, files of every layout at small ones."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from wan_models import (
    built,
    diffusers_transformer,
    diffusers_vae,
    embed_nothing,
    lazy,
    original_of,
    random_weights,
    small,
    with_noise,
)

from factorportrait.errors import CheckpointError
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.models.vae import VideoVAE
from factorportrait.export.weights import layouts
from factorportrait.export.weights.fill import compare
from factorportrait.export.weights.networks import (
    PUBLISHED,
    WAN21_VAE,
    WAN22_VAE,
    Network,
    build_vae,
    open_transformer,
    open_vae,
    rows_of,
    transformer_of,
    with_streams,
)
from factorportrait.export.weights.synthetic import diffusers_config, diffusers_vae_config
from factorportrait.model_config import DiTConfig, FusionConfig

VAES = {"Wan2.1": WAN21_VAE, "Wan2.2": WAN22_VAE}
# diffusers has no model of these.
FUN = ("Wan2.1-Fun-V1.1-1.3B-Control", "Wan2.1-Fun-V1.1-1.3B-Control-Camera")
# Billions, from the authors' tables and, for Animate, from diffusers' model; Fun: 1.3B with picture cross-attention and adapter.
COUNTS = {
    "Wan2.1-T2V-1.3B": 1.4190, "Wan2.1-T2V-14B": 14.2885, "Wan2.1-I2V-14B": 16.3949, "Wan2.2-TI2V-5B": 4.9998,
    "Self-Forcing-1.3B": 1.4190,
}  # fmt: skip


def on_meta(network: Network) -> WanDiT:
    with torch.device("meta"):
        return WanDiT(network.dit, network.fusion, 4, 4)


@functools.cache
def meta_weights(name: str) -> dict[str, torch.Tensor]:
    return on_meta(PUBLISHED[name]).state_dict()


# ---- real sizes, no values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    count = sum(tensor.numel() for tensor in meta_weights(name).values())
    if name in COUNTS:
        assert round(count / 1e9, 4) == COUNTS[name]
    elif name in FUN:
        # Over T2V-1.3B: a picture's keys and values in each block, its embedding, more input channels, and the adapter.
        dim, layers, image = 1536, 30, 1280
        extra = layers * (2 * (dim * dim + dim) + dim) + 2 * image + image * image + image + image * dim + dim + 2 * dim
        adapter = (
            (48 - 16) * dim * 4 + 16 * dim * 4 + dim
            if name == FUN[0]
            else (32 - 16) * dim * 4 + 24 * 64 * dim * 4 + dim + 2 * (dim * dim * 9 + dim)
        )
        assert count == sum(t.numel() for t in meta_weights("Wan2.1-T2V-1.3B").values()) + extra + adapter
    else:
        with torch.device("meta"):
            theirs = diffusers_transformer(PUBLISHED[name])
        assert count == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in FUN])
def test_every_name_and_shape_of_every_layout(name):
    network, ours = PUBLISHED[name], meta_weights(name)
    rows = rows_of(network)
    with torch.device("meta"):
        theirs = diffusers_transformer(network).state_dict()
    compare(ours, layouts.from_layout(theirs, rows, "diffusers"), name)
    compare(theirs, layouts.to_layout(ours, rows, "diffusers"), name)
    original = layouts.to_layout(ours, rows, "original")
    compare(ours, layouts.from_layout(original, rows, "original"), name)
    # What diffusers itself makes of the original names.
    compare(theirs, single_file_utils.convert_wan_transformer_to_diffusers(dict(original)), name)


@pytest.mark.parametrize("name", FUN)
def test_fun_has_the_names_of_its_release(name):
    ours = meta_weights(name)
    assert layouts.to_layout(ours, rows_of(PUBLISHED[name]), "original").keys() == ours.keys()
    base = meta_weights("Wan2.1-T2V-1.3B")
    extra = {key: tuple(ours[key].shape) for key in ours if key not in base and not key.startswith(("blocks", "img_emb"))}
    if name == FUN[0]:
        assert extra == {"ref_conv.weight": (1536, 16, 2, 2), "ref_conv.bias": (1536,)}
    else:
        shapes = {"conv": (1536, 1536, 2, 2)} | {f"residual_blocks.0.conv{i}": (1536, 1536, 3, 3) for i in (1, 2)}
        assert {key: shape for key, shape in extra.items() if key.endswith("weight")} == {
            f"control_adapter.{key}.weight": shape for key, shape in shapes.items()
        }


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_alone_say_the_structure(name):
    assert transformer_of(lazy(meta_weights(name)), name) == PUBLISHED[name]


@pytest.mark.parametrize("name", VAES)
def test_every_name_and_shape_of_the_vaes(name):
    config = VAES[name]
    with torch.device("meta"):
        ours, theirs = VideoVAE(config).state_dict(), diffusers_vae(config).state_dict()
    rows = layouts.vae(config)
    compare(ours, layouts.from_layout(theirs, rows, "diffusers"), name)
    compare(theirs, layouts.to_layout(ours, rows, "diffusers"), name)
    assert list(layouts.to_layout(ours, rows, "original")) == list(ours)
    assert round(sum(tensor.numel() for tensor in ours.values()) / 1e6, 2) == {"Wan2.1": 126.89, "Wan2.2": 704.69}[name]


# ---- small sizes, all values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PUBLISHED)
def test_layouts_round_trip_bit_exact(name, seed):
    network = small(name)
    rows = rows_of(network)
    original = layouts.to_layout(random_weights(network, seed), rows, "original")
    ours = layouts.from_layout(original, rows, "original")
    theirs = layouts.to_layout(ours, rows, "diffusers")
    again = layouts.to_layout(layouts.from_layout(theirs, rows, "diffusers"), rows, "original")
    assert list(again) == list(original)
    for key, tensor in original.items():
        assert torch.equal(again[key], tensor), key
    if network.dit.face:
        assert original["motion_encoder.enc.net_app.convs.1.conv1.1.bias"].shape == (1, 4, 1, 1)
        assert theirs["face_adapter.0.to_k.weight"].shape == (128, 128)


@pytest.mark.parametrize("form", ["original", "diffusers", "causal"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_files_of_every_layout_open(name, form, tmp_path):
    network = small(name)
    weights = random_weights(network)
    if form == "diffusers":
        if name in FUN:
            pytest.skip("diffusers has no such model")
        save_file(layouts.to_layout(weights, rows_of(network), form), tmp_path / "diffusion_pytorch_model.safetensors")
        arguments = diffusers_config(network) | {"_class_name": "Wan", "_diffusers_version": "0.42.1"}
        (tmp_path / "config.json").write_text(json.dumps(arguments))
    elif form == "original":
        original = {key: tensor.contiguous() for key, tensor in original_of(network, weights).items()}
        save_file(original, tmp_path / "diffusion_pytorch_model.safetensors")
        config = {
            "_class_name": "WanModel", "dim": 128, "ffn_dim": 64, "num_heads": 1, "num_layers": 2, "freq_dim": 32,
            "in_dim": network.fusion.in_channels, "out_dim": network.dit.out_channels, "eps": 1e-6, "text_len": 512,
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        original = {f"model.{key}": tensor for key, tensor in original_of(network, weights).items()}
        torch.save({"generator_ema": original}, tmp_path / "model.pt")
    opened = open_transformer(tmp_path)
    if form == "diffusers":
        network = Network(dataclasses.replace(network.dit, max_position=1024), network.fusion)
    assert opened.config == network
    assert opened.layout == ("diffusers" if form == "diffusers" else "original")
    assert ("inferred from shapes" in opened.notes[-1]) == (form == "causal")
    dit = built(opened)
    for key, tensor in weights.items():
        assert torch.equal(dit.state_dict()[key], tensor), key
    assert not dit.rope_time.is_meta


def test_our_own_config_says_the_structure(tmp_path):
    network = Network(
        DiTConfig(dim=48, ffn_dim=32, num_heads=2, num_layers=1, freq_dim=32, out_channels=4, eps=1e-5, max_position=9),
        FusionConfig(("pose", "noise", "camera", "reference"), latent_channels=4, rays="last"),
    )
    save_file(random_weights(network), tmp_path / "dit.safetensors")
    data = {"dit": dataclasses.asdict(network.dit), "fusion": dataclasses.asdict(network.fusion)}
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert open_transformer(tmp_path / "dit.safetensors").config == network


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("name", VAES)
def test_files_of_vaes_open(name, layout, tmp_path):
    config = dataclasses.replace(VAES[name], base_dim=8, decoder_base_dim=12)
    with torch.no_grad():
        weights = with_noise(VideoVAE(config), 3).state_dict()
    save_file(layouts.to_layout(weights, layouts.vae(config), layout), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="expected a published size"):
        open_vae(tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(diffusers_vae_config(config)))
    opened = open_vae(tmp_path / "vae.safetensors")
    assert (opened.config, opened.layout) == (config, layout)
    vae = build_vae(opened)
    assert all(torch.equal(vae.state_dict()[key], tensor) for key, tensor in weights.items())


def test_a_vae_with_a_block_missing(tmp_path):
    config = dataclasses.replace(WAN22_VAE, base_dim=8, decoder_base_dim=12)
    weights = with_noise(VideoVAE(config), 3).state_dict()
    gone = "encoder.downsamples.1.downsamples.1."
    save_file({key: tensor for key, tensor in weights.items() if not key.startswith(gone)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="encoder levels of one depth.*found 8, 8; 16; 32, 32; 32, 32"):
        open_vae(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("name", VAES)
def test_a_published_vae_needs_no_config(name, layout, tmp_path, monkeypatch):
    with torch.device("meta"):
        weights = layouts.to_layout(VideoVAE(VAES[name]).state_dict(), layouts.vae(VAES[name]), layout)
    # Shapes are all that is asked for: no gigabytes on the disk.
    from factorportrait.export.weights import networks
    from factorportrait.export.weights.files import Weights

    (tmp_path / "config.json").write_text('{"dim": 1536, "num_heads": 12}')  # the transformer's, as releases have it
    monkeypatch.setattr(networks, "open_weights", lambda path: Weights(lazy(weights), (tmp_path / "vae.pth",)))
    assert open_vae(tmp_path / "vae.pth").config == VAES[name]


# ---- what does not fit ---------------------------------------------------------------------------------------------------


@pytest.fixture
def t2v(tmp_path):
    network = small("Wan2.1-T2V-1.3B")
    save_file(random_weights(network), tmp_path / "dit.safetensors")
    config = {"dim": 128, "ffn_dim": 64, "num_heads": 1, "num_layers": 2, "in_dim": 16, "out_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def change(folder, **values):
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | values))


def refused(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        built(open_transformer(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "shapes"),
    [("dim", 256, "128"), ("ffn_dim", 65, "64"), ("num_layers", 3, "2"), ("in_dim", 36, "16"), ("out_dim", 48, "16"),
     ("cross_attn_norm", False, "True"), ("patch_size", [1, 4, 4], "(1, 2, 2)")],
)  # fmt: skip
def test_config_that_contradicts_the_shapes(t2v, key, value, shapes):
    change(t2v, **{key: value})
    message = refused(t2v)
    assert f"expected {shapes}, as the shapes of the weights say" in message and "take config and weights" in message


@pytest.mark.parametrize("key", ["dim", "eps", "num_heads"])
def test_config_with_a_value_of_another_kind(t2v, key):
    change(t2v, **{key: "many"})
    assert 'found "many"' in refused(t2v)


def test_config_that_is_none(t2v):
    (t2v / "config.json").write_text('{"_class_name": "UMT5"}')
    assert "found _class_name" in refused(t2v)
    for text in ("{", "[]"):
        (t2v / "config.json").write_text(text)
        assert "JSON" in refused(t2v)


def edit(folder, change):
    from safetensors.torch import load_file

    weights = load_file(folder / "dit.safetensors")
    change(weights)
    save_file(weights, folder / "dit.safetensors")


def test_unknown_weight_is_named_with_the_nearest(t2v):
    edit(t2v, lambda weights: weights.update({"blocks.0.self_attn.query.weight": weights.pop("blocks.0.self_attn.q.weight")}))
    assert "'blocks.0.self_attn.query.weight'; expected a name of the original Wan layout (nearest: blocks." in refused(t2v)


def test_missing_weight_is_named(t2v):
    edit(t2v, lambda weights: weights.pop("blocks.1.cross_attn.norm_k.weight"))
    assert "missing blocks.1.cross_attn.norm_k.weight" in refused(t2v)


def test_missing_weight_that_says_a_size(t2v):
    edit(t2v, lambda weights: weights.pop("blocks.0.ffn.0.weight"))
    assert "blocks.0.ffn.0.weight; expected the weight, which says a size; found none" in refused(t2v)


def test_missing_block(t2v):
    edit(t2v, lambda weights: [weights.pop(key) for key in list(weights) if key.startswith("blocks.0.")])
    assert "found none of number 0" in refused(t2v)


def test_slice_without_its_other_half():
    network = small("Wan2.2-Animate-14B")
    weights = layouts.to_layout(random_weights(network), rows_of(network), "diffusers")
    weights.pop("face_adapter.0.to_v.bias")
    with pytest.raises(CheckpointError, match="face_adapter.0.to_v.bias"):
        layouts.from_layout(weights, rows_of(network), "diffusers")


def test_unknown_number_of_heads(t2v):
    network = small("Wan2.1-T2V-1.3B", dim=96, num_heads=2)
    save_file(random_weights(network), t2v / "dit.safetensors")
    (t2v / "config.json").unlink()
    assert "found 96, which leaves the number of heads open; put its config.json beside the weights" in refused(t2v)


def test_unknown_input_channels(t2v):
    edit(t2v, lambda weights: weights.update({"patch_embedding.weight": torch.zeros(128, 23, 1, 2, 2)}))
    change(t2v, in_dim=23)
    assert "expected 16, 36, 32, 48 channels; found 23" in refused(t2v)


def test_another_network(t2v):
    save_file({"text_model.weight": torch.zeros(3)}, t2v / "dit.safetensors")
    assert "expected weights of a Wan transformer" in refused(t2v)
    with pytest.raises(CheckpointError, match="expected weights of a video VAE"):
        open_vae(t2v / "dit.safetensors")


def test_another_blur_is_no_release(tmp_path):
    network = small("Wan2.2-Animate-14B")
    original = original_of(network, random_weights(network))
    original["motion_encoder.enc.net_app.convs.1.skip.0.kernel"] = torch.ones(4, 4) / 16
    save_file({key: tensor.contiguous() for key, tensor in original.items()}, tmp_path / "dit.safetensors")
    with pytest.raises(CheckpointError, match="convs.1.skip.0.kernel; expected the filter 1, 3, 3, 1"):
        open_transformer(tmp_path)


# ---- a released backbone for FactorPortrait --------------------------------------------------------------------------------


@torch.no_grad()
def test_new_input_channels_change_nothing_at_first():
    source = small("Wan2.1-T2V-1.3B")
    target = FusionConfig()
    before = WanDiT(source.dit, source.fusion, 4, 4).eval()
    before.load_state_dict(random_weights(source))
    weights, declared = with_streams(lazy(before.state_dict()), source.fusion, target)
    assert declared.startswith("input channels initialised with zeros, untrained: reference (16), camera (24), pose (16)")
    after = WanDiT(source.dit, target, 4, 4).eval()
    after.load_state_dict({name: tensor.load() for name, tensor in weights.items()})
    generator = torch.Generator().manual_seed(0)
    noise, *streams = (torch.randn(1, n, 2, 4, 4, generator=generator) for n in (16, 16, 24, 16))
    temb, proj = after.embed_time(torch.full((1, 2), 500.0))
    rest = (torch.zeros(1, 2, 6, 128), temb, proj, torch.arange(2))
    text = after.embed_text(torch.randn(1, 3, 20, generator=generator))
    expected, _ = before(noise, embed_nothing(before, 1, 2), *rest, text_kv=text)
    found, _ = after(noise, after.embed_conditions(*streams), *rest, text_kv=text)
    assert torch.equal(found, expected)
