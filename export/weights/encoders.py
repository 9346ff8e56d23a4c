"""The encoders of a released checkpoint that a deployment needs once: a prompt's text, and the portrait for CLIP.

Both become `transformers`' own models, from the disk alone: nothing is downloaded. diffusers' releases hold them as folders that
`transformers` wrote; the authors' hold a file each, `models_t5*.pth` and `models_clip*.pth`, whose names layouts.py translates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from factorportrait.errors import CheckpointError, UserError
from factorportrait.export.weights import layouts
from factorportrait.export.weights.files import LazyTensor, open_weights
from factorportrait.export.weights.fill import compare, fill
from factorportrait.model_config import TEXT_TOKENS

if TYPE_CHECKING:
    from factorportrait.export.models.image_encoder import ImageEncoder

# Colours of the pictures that OpenAI's CLIP and its successors were trained with.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_HEAD_DIM = 80  # of ViT-H/14; the shapes do not say it
# What the authors' file of CLIP holds beside its picture encoder: the text's, and what compares the two.
CLIP_BESIDE = ("textual.", "visual.head", "log_scale")
INSTALL_HINT = 'pip install "factorportrait[encoders]" (in a checkout: pip install -e ".[encoders]")'


@torch.no_grad()
def prompt_embeddings(weights: Path, tokenizer: Path, prompts: Sequence[str]) -> list[np.ndarray]:
    """Embeddings float32 [tokens, text_dim] of each prompt, its end included and padding not.

    Args:
        weights: folder of a UMT5EncoderModel as `transformers` saves it, or the authors' file.
        tokenizer: its folder.

    Raises:
        UserError: transformers is not installed.
        CheckpointError: it cannot read one of them, or weights are missing or left over.
    """
    transformers = import_transformers("a prompt's embeddings")
    try:
        words = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unreadable(tokenizer, "a tokenizer", error) from error
    encoder = (_text_encoder if weights.is_file() else _text_encoder_folder)(transformers, weights)
    found = []
    for prompt in prompts:
        tokens = words(
            " ".join(prompt.split()), max_length=TEXT_TOKENS, truncation=True, add_special_tokens=True, return_tensors="pt"
        )
        hidden = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        found.append(hidden[0].float().numpy())
    return found


def _text_encoder_folder(transformers: ModuleType, folder: Path) -> nn.Module:
    try:
        # The precision that Wan was trained with, and half the memory of 5.7 billion weights in fp32.
        return transformers.UMT5EncoderModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.bfloat16, low_cpu_mem_usage=True
        ).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unreadable(folder, "a UMT5 encoder", error) from error


def _text_encoder(transformers: ModuleType, file: Path) -> nn.Module:
    """UMT5's encoder of the authors' file, in bfloat16: pages of the file where that is its type."""
    opened = open_weights(file)
    sizes = {"token_embedding.weight": 2} | {
        f"blocks.0.{name}.weight": 2 for name in ("attn.q", "ffn.fc1", "pos_embedding.embedding")
    }
    (vocabulary, width), (inner, _), (hidden, _), (buckets, heads) = _shapes(opened.tensors, opened.where, sizes)
    config = transformers.UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=inner // heads, d_ff=hidden, num_heads=heads,
        num_layers=_count(opened.tensors, "blocks."), relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        encoder = transformers.UMT5EncoderModel(config).encoder
    _fill(encoder, opened.tensors, layouts.TEXT_ENCODER, opened.where, torch.bfloat16, "a UMT5 encoder")
    return encoder.eval().requires_grad_(False)


def open_image_encoder(path: Path, image_dim: int) -> ImageEncoder:
    """A CLIP picture encoder, in fp32 and evaluation mode.

    Args:
        path: folder of a CLIPVisionModel as `transformers` saves it, or the authors' file.
        image_dim: width that the transformer wants.

    Raises:
        UserError: transformers is not installed.
        CheckpointError: it cannot be read, the width is another, or weights are missing or left over.
    """
    from factorportrait.export.models.image_encoder import ImageEncoder

    clip = (_clip if path.is_file() else _clip_folder)(import_transformers("the picture encoder"), path)
    width = clip.config.hidden_size
    if width != image_dim:
        raise CheckpointError(
            f"{path}", expected=f"tokens of width {image_dim}", found=str(width), action="take this checkpoint's picture encoder"
        )
    mean, std = CLIP_MEAN, CLIP_STD
    colours = path / "preprocessor_config.json"
    if not colours.is_file():
        colours = path.parent / "image_processor" / "preprocessor_config.json"
    if colours.is_file():
        data = json.loads(colours.read_text(encoding="utf-8"))
        mean, std = tuple(data.get("image_mean", mean)), tuple(data.get("image_std", std))
    return ImageEncoder(clip.eval().requires_grad_(False), mean, std)


def image_encoder_bytes(path: Path) -> int:
    """fp32 bytes of a picture encoder's weights."""
    own = (tensor for name, tensor in open_weights(path).tensors.items() if not name.startswith(CLIP_BESIDE))
    return 4 * sum(math.prod(tensor.shape) for tensor in own)


def _clip_folder(transformers: ModuleType, folder: Path) -> nn.Module:
    try:
        return transformers.CLIPVisionModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unreadable(folder, "a CLIP picture encoder", error) from error


def _clip(transformers: ModuleType, file: Path) -> nn.Module:
    """CLIP's picture encoder of the authors' file, in fp32."""
    opened = open_weights(file)
    tensors = {name: tensor for name, tensor in opened.tensors.items() if not name.startswith(CLIP_BESIDE)}
    sizes = {"visual.patch_embedding.weight": 4, "visual.pos_embedding": 3, "visual.transformer.0.mlp.0.weight": 2}
    (width, _, patch, _), (_, num_tokens, _), (hidden, _) = _shapes(tensors, opened.where, sizes)
    config = transformers.CLIPVisionConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=_count(tensors, "visual.transformer."),
        num_attention_heads=max(width // CLIP_HEAD_DIM, 1), image_size=math.isqrt(num_tokens - 1) * patch, patch_size=patch,
        hidden_act="gelu", attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        clip = transformers.CLIPVisionModel(config)
    # Some versions of transformers have the network one level deeper.
    own = getattr(clip, "vision_model", clip)
    _fill(own, tensors, layouts.IMAGE_ENCODER, opened.where, torch.float32, "a CLIP picture encoder")
    own.embeddings.position_ids = torch.arange(num_tokens)[None]  # no weight, and so still without values
    return clip


def original_names(weights: Mapping[str, Any], rows: Sequence[layouts.Row]) -> dict[str, Any]:
    """Weights of one of `transformers`' encoders under the authors' names and in their shapes."""
    found = layouts.from_layout(weights, rows, "diffusers")
    return {name: value.reshape(_SHAPES[name](value.shape)) if name in _SHAPES else value for name, value in found.items()}


# The authors keep these two with axes of length 1 in front.
_SHAPES = {"visual.cls_embedding": lambda shape: (1, 1, *shape), "visual.pos_embedding": lambda shape: (1, *shape)}


def _fill(
    module: nn.Module, tensors: Mapping[str, LazyTensor], rows: Sequence[layouts.Row], where: str, dtype: torch.dtype, what: str
) -> None:
    """Fill a module of `transformers` from the authors' file; what is missing or left over is said in the file's names."""
    expected = module.state_dict()
    compare(original_names(expected, rows), tensors, where, what)
    theirs = layouts.to_layout(tensors, rows, "diffusers")
    fill(module, {name: theirs[name].reshape(*expected[name].shape) for name in expected}, where, dtype=dtype, config=what)


def _shapes(tensors: Mapping[str, LazyTensor], where: str, ranks: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Shapes of the weights by which a network's sizes are known, of so many axes each."""
    for name, rank in ranks.items():
        found = ", ".join(list(tensors)[:3]) or "nothing" if name not in tensors else str(list(tensors[name].shape))
        if name not in tensors or len(tensors[name].shape) != rank:
            raise CheckpointError(
                where, expected=f"an encoder's file of a Wan release, with {name} of {rank} axes", found=found,
                action="copy the release's file again",
            )  # fmt: skip
    return [tensors[name].shape for name in ranks]


def _count(tensors: Mapping[str, LazyTensor], prefix: str) -> int:
    """Blocks by their numbers."""
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix))


def import_transformers(what: str) -> ModuleType:
    """The package, silent. Raises UserError where it is not installed; what: it is needed for."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(what, expected="the package transformers", found="none", action=INSTALL_HINT) from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _unreadable(path: Path, expected: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}", expected=f"{expected} that transformers reads", found=str(error).strip().splitlines()[0][:200],
        action="copy the whole folder, or give the embeddings as a file",
    )  # fmt: skip
