"""The encoders of a released checkpoint that a deployment needs once: a prompt's text, and the portrait for CLIP.

Both are `transformers`' own models in its layout, opened from the folder alone: nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from factorportrait.errors import CheckpointError, UserError
from factorportrait.model_config import TEXT_TOKENS

if TYPE_CHECKING:
    from factorportrait.export.models.image_encoder import ImageEncoder

# Colours of the pictures that OpenAI's CLIP and its successors were trained with.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
INSTALL_HINT = 'pip install "factorportrait[encoders]" (in a checkout: pip install -e ".[encoders]")'


@torch.no_grad()
def prompt_embeddings(folder: Path, prompt: str = "") -> np.ndarray:
    """Embeddings float32 [tokens, text_dim] of a prompt, its end included and padding not.

    Args:
        folder: with text_encoder/ and tokenizer/, as diffusers' releases of Wan have them.

    Raises:
        UserError: transformers is not installed.
        CheckpointError: it cannot read the folder.
    """
    transformers = _transformers("a prompt's embeddings")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        # The precision that Wan was trained with, and half the memory of 5.7 billion weights in fp32.
        encoder = transformers.UMT5EncoderModel.from_pretrained(
            folder / "text_encoder", local_files_only=True, dtype=torch.bfloat16, low_cpu_mem_usage=True
        ).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unreadable(folder / "text_encoder", "a UMT5 encoder and its tokenizer", error) from error
    tokens = tokenizer(
        " ".join(prompt.split()), max_length=TEXT_TOKENS, truncation=True, add_special_tokens=True, return_tensors="pt"
    )
    hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return hidden[0].float().numpy()


def open_image_encoder(folder: Path, image_dim: int) -> ImageEncoder:
    """A CLIP picture encoder, in fp32 and evaluation mode.

    Args:
        folder: of a CLIPVisionModel as `transformers` saves it.
        image_dim: width that the transformer wants.

    Raises:
        UserError: transformers is not installed.
        CheckpointError: it cannot read the folder, or the width is another.
    """
    from factorportrait.export.models.image_encoder import ImageEncoder

    transformers = _transformers("the picture encoder")
    try:
        clip = transformers.CLIPVisionModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unreadable(folder, "a CLIP picture encoder", error) from error
    width = clip.config.hidden_size
    if width != image_dim:
        raise CheckpointError(
            f"{folder}", expected=f"tokens of width {image_dim}", found=str(width), action="take this checkpoint's picture encoder"
        )
    mean, std = CLIP_MEAN, CLIP_STD
    colours = folder / "preprocessor_config.json"
    if not colours.is_file():
        colours = folder.parent / "image_processor" / "preprocessor_config.json"
    if colours.is_file():
        data = json.loads(colours.read_text(encoding="utf-8"))
        mean, std = tuple(data.get("image_mean", mean)), tuple(data.get("image_std", std))
    return ImageEncoder(clip.eval().requires_grad_(False), mean, std)


def _transformers(what: str):
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
