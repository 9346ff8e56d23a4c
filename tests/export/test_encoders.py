"""Text and picture encoders of both kinds of release: the authors' files give what `transformers` gives with the same weights."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import difference
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel
from wan_models import lazy, with_noise

from factorportrait.errors import CheckpointError
from factorportrait.export import parts
from factorportrait.export.graphs import export_stage, write_graph
from factorportrait.export.weights import encoders, layouts
from factorportrait.export.weights.encoders import (
    CLIP_MEAN,
    CLIP_STD,
    open_image_encoder,
    original_names,
    prompt_embeddings,
)
from factorportrait.export.weights.files import Weights
from factorportrait.export.weights.released import Options, open_released
from factorportrait.export.weights.synthetic import write_release

CLIP_WIDTH = 160  # two heads
MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """An original release; its tokenizer serves the text encoders here."""
    folder = tmp_path_factory.mktemp("fun") / "checkpoint"
    write_release("fun-control", folder, tiny=True, layers=1)
    return folder


@pytest.fixture(scope="module")
def umt5():
    config = UMT5Config(
        vocab_size=98, d_model=24, d_kv=6, d_ff=20, num_layers=2, num_heads=3, relative_attention_num_buckets=10,
        decoder_start_token_id=0,
    )  # fmt: skip
    return with_noise(UMT5EncoderModel(config), 0).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def clip():
    config = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=42, patch_size=14,
        hidden_act="gelu",
    )  # fmt: skip
    return with_noise(CLIPVisionModel(config), 1).eval()


def original_text(umt5):
    return original_names(umt5.encoder.state_dict(), layouts.TEXT_ENCODER)


def original_picture(clip):
    names = original_names(clip.state_dict(), layouts.IMAGE_ENCODER)
    return names | {"visual.head": torch.zeros(3, 3), "textual.norm.weight": torch.zeros(2), "log_scale": torch.zeros([])}


def text_of(weights: dict[str, torch.Tensor], ids: torch.Tensor, heads: int) -> torch.Tensor:
    """UMT5's encoder (Chung et al. 2023) in the authors' names, written out: ids [L] -> [L,D]."""

    def normed(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[f"{name}.weight"]

    x = weights["token_embedding.weight"][ids]
    offset = torch.arange(len(ids))[None] - torch.arange(len(ids))[:, None]  # of a key from its query
    # Half of the buckets lie behind, half in front; half of these are single steps, and the others grow up to 128.
    half = weights["blocks.0.pos_embedding.embedding.weight"].shape[0] // 2
    exact, distance = half // 2, offset.abs()
    far = exact + ((distance.clamp(min=1) / exact).log() / math.log(128 / exact) * (half - exact)).long()
    bucket = (offset > 0) * half + torch.where(distance < exact, distance, far.clamp(max=half - 1))
    for block in (f"blocks.{index}" for index in range(2)):
        y = normed(x, f"{block}.norm1")
        q, k, v = ((y @ weights[f"{block}.attn.{part}.weight"].T).unflatten(-1, (heads, -1)).transpose(0, 1) for part in "qkv")
        bias = weights[f"{block}.pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        seen = ((q @ k.transpose(1, 2) + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + seen @ weights[f"{block}.attn.o.weight"].T
        y = normed(x, f"{block}.norm2")
        gate = F.gelu(y @ weights[f"{block}.ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ weights[f"{block}.ffn.fc1.weight"].T)) @ weights[f"{block}.ffn.fc2.weight"].T
    return normed(x, "norm")


@torch.no_grad()
def test_a_text_file_means_what_its_names_say(umt5, tmp_path):
    torch.save(original_text(umt5), tmp_path / "models_t5.pth")
    encoder = encoders._text_encoder(encoders.import_transformers("the test"), tmp_path / "models_t5.pth").float()
    ids = torch.randint(98, (40,), generator=torch.Generator().manual_seed(2))
    weights = {name: value.float() for name, value in original_text(umt5).items()}
    expected = text_of(weights, ids, heads=3)
    assert difference(encoder(input_ids=ids[None]).last_hidden_state[0], expected) <= 1e-5


def picture_of(weights: dict[str, torch.Tensor], picture: torch.Tensor, blocks: int) -> torch.Tensor:
    """CLIP's picture encoder in the authors' names, written out up to its last but one block: [1,3,S,S] -> [L,D]."""

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def normed(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    patches = F.conv2d(picture, weights["visual.patch_embedding.weight"], stride=14)[0].flatten(1).T
    x = torch.cat([weights["visual.cls_embedding"][0], patches]) + weights["visual.pos_embedding"][0]
    x = normed(x, "visual.pre_norm")
    for block in (f"visual.transformer.{index}" for index in range(blocks)):
        qkv = linear(normed(x, f"{block}.norm1"), f"{block}.attn.to_qkv").unflatten(-1, (3, 2, -1))
        q, k, v = qkv.permute(1, 2, 0, 3)
        seen = (q @ k.transpose(1, 2) * k.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + linear(seen.transpose(0, 1).flatten(1), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(normed(x, f"{block}.norm2"), f"{block}.mlp.0")), f"{block}.mlp.2")
    return x


@torch.no_grad()
def test_a_picture_file_means_what_its_names_say(clip, tmp_path):
    torch.save(original_picture(clip), tmp_path / "models_clip.pth")
    encoder = open_image_encoder(tmp_path / "models_clip.pth", CLIP_WIDTH)
    picture = torch.rand(1, 3, 42, 42, generator=torch.Generator().manual_seed(3))
    colours = (picture - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    expected = picture_of(original_picture(clip), colours, blocks=2)
    assert difference(encoder(2 * picture - 1)[0], expected) <= 1e-5


# Published sizes, and parameters in millions: UMT5-XXL's encoder, and ViT-H/14 (632.1) without the 1280 x 1024 of its head.
PUBLISHED = {
    "text": (
        UMT5Config(
            vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, decoder_start_token_id=0
        ),
        242, 5680.9,
    ),
    "picture": (
        CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224, patch_size=14,
            hidden_act="gelu",
        ),
        391, 630.8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_published_sizes_are_read_from_the_shapes(kind, monkeypatch):
    config, num_weights, millions = PUBLISHED[kind]
    with torch.device("meta"):
        model = UMT5EncoderModel(config).encoder if kind == "text" else CLIPVisionModel(config)
    weights = original_names(model.state_dict(), layouts.TEXT_ENCODER if kind == "text" else layouts.IMAGE_ENCODER)
    filled = []
    monkeypatch.setattr(encoders, "open_weights", lambda file: Weights(lazy(weights), (file,)))
    monkeypatch.setattr(encoders, "fill", lambda module, tensors, *rest, **options: filled.append(tensors))
    read = encoders._text_encoder if kind == "text" else encoders._clip
    found = read(encoders.import_transformers("the test"), Path("models.pth")).config
    names = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "vocab_size", "relative_attention_num_buckets")
    if kind == "picture":
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    assert [getattr(found, name) for name in names] == [getattr(config, name) for name in names]
    assert len(weights) == num_weights
    assert sum(tensor.numel() for tensor in weights.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in filled[0].items()
    }


def test_text_of_both_releases_is_the_same(umt5, release, tmp_path):
    umt5.save_pretrained(tmp_path / "text_encoder")
    torch.save(original_text(umt5), tmp_path / "models_t5.pth")
    tokenizer, prompts = release / "google" / "umt5-xxl", ["", "a  face,\nturning"]
    ours, theirs = (prompt_embeddings(tmp_path / name, tokenizer, prompts) for name in ("models_t5.pth", "text_encoder"))
    assert [len(rows) for rows in ours] == [1, len("a face, turning") + 1]
    for found, expected in zip(ours, theirs, strict=True):
        assert expected.std() > 0.1
        assert (found == expected).all()


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not list what is mapped")
def test_the_text_encoder_stays_pages_of_its_file(umt5, tmp_path):
    file = tmp_path / "models_t5.pth"
    torch.save(original_text(umt5), file)
    encoder = encoders._text_encoder(encoders.import_transformers("the test"), file)
    lines = (line.split() for line in MAPS.read_text().splitlines() if line.endswith(str(file)))
    pages = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    for name, tensor in encoder.named_parameters():
        assert any(start <= tensor.data_ptr() < end for start, end in pages), name


@torch.no_grad()
def test_pictures_are_transformers_and_stretched_as_wan_does_it(clip, tmp_path):
    clip.save_pretrained(tmp_path / "image_encoder")
    torch.save(original_picture(clip), tmp_path / "models_clip.pth")
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # The whole picture on the square, bicubic, not cropped to its middle.
    square = (F.interpolate(picture, (42, 42), mode="bicubic", align_corners=False) + 1) / 2
    square = (square - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    expected = clip(square, output_hidden_states=True).hidden_states[-2]
    for name in ("models_clip.pth", "image_encoder"):
        found = open_image_encoder(tmp_path / name, CLIP_WIDTH)(picture)
        assert found.shape == (1, 10, CLIP_WIDTH)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match=f"expected tokens of width 80; found {CLIP_WIDTH}"):
        open_image_encoder(tmp_path / "models_clip.pth", 80)


GONE = {
    "a weight": ("blocks.1.ffn.fc1.weight", "blocks.1.ffn.fc9.weight", "missing blocks.1.ffn.fc1.weight .nearest: blocks.1.ffn"),
    "what says a size": ("token_embedding.weight", None, "with token_embedding.weight of 2 axes"),
    "too much": (None, "decoder.norm.weight", "left over decoder.norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", GONE)
def test_what_a_text_encoder_lacks_is_named(case, umt5, release, tmp_path):
    gone, added, words = GONE[case]
    weights = original_text(umt5)
    value = weights.pop(gone) if gone else torch.zeros(2)
    torch.save(weights | ({added: value} if added else {}), tmp_path / "models_t5.pth")
    with pytest.raises(CheckpointError, match=words):
        prompt_embeddings(tmp_path / "models_t5.pth", release / "google" / "umt5-xxl", [""])


def test_what_a_picture_encoder_lacks_is_named(clip, tmp_path):
    weights = original_picture(clip)
    block = "visual.transformer.2.attn"
    weights[f"{block}.qkv.weight"] = weights.pop(f"{block}.to_qkv.weight")
    torch.save(weights, tmp_path / "models_clip.pth")
    with pytest.raises(CheckpointError, match=f"missing {block}.to_qkv.weight .*left over {block}.qkv.weight"):
        open_image_encoder(tmp_path / "models_clip.pth", CLIP_WIDTH)
    weights = original_picture(clip) | {"visual.pos_embedding": torch.zeros(1, 17, CLIP_WIDTH - 1)}
    torch.save(weights, tmp_path / "models_clip.pth")
    with pytest.raises(CheckpointError, match=r"visual.pos_embedding; expected shape \[1, 17, 160\]; found \[1, 17, 159\]"):
        open_image_encoder(tmp_path / "models_clip.pth", CLIP_WIDTH)


def test_original_releases_bring_their_encoders(release):
    found = open_released(release, Options(size=(64, 64)))
    assert found.image_encoder == release / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    assert found.text_encoder.weights == release / "models_t5_umt5-xxl-enc-bf16.pth"
    assert {found.image_encoder, found.text_encoder.weights} <= set(found.files)
    assert any(file.parent == release / "google" / "umt5-xxl" for file in found.files)
    (release / "models_t5_other.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"expected one file models_t5\*"):
        open_released(release, Options(size=(64, 64)))
    (release / "models_t5_other.safetensors").unlink()


@torch.no_grad()
def test_the_graph_stretches_a_portrait_of_any_shape(clip, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    clip.save_pretrained(tmp_path / "image_encoder")
    encoder = open_image_encoder(tmp_path / "image_encoder", CLIP_WIDTH)
    model = SimpleNamespace(config=SimpleNamespace(height=64, width=96), image_encoder=encoder)
    stage = parts._image_encoder(model)
    file, *_ = write_graph(export_stage(stage), tmp_path, stage.name)
    session = onnxruntime.InferenceSession(tmp_path / file, providers=["CPUExecutionProvider"])
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    (found,) = session.run(None, {"image": picture.numpy()})
    assert difference(torch.from_numpy(found), encoder(picture)) <= 1e-5
