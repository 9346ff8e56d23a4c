"""What fp-export asks about released checkpoints, and how it shows what it found in one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from factorportrait.errors import UserError
from factorportrait.systems import SYSTEMS

if TYPE_CHECKING:
    from factorportrait.export.weights.released import Options

# Options of `add_arguments` by their names in the namespace.
NAMES = (
    "system", "size", "vae", "decoder", "lora", "image_encoder", "prompt_embeddings", "negative_embeddings", "blocks_per_graph",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that only a released checkpoint has."""
    group = parser.add_argument_group("released checkpoints (Wan and its family), see the README's table")
    group.add_argument("--system", metavar="NAME", help=f"{', '.join(SYSTEMS)} (default: what the weights take)")
    group.add_argument("--size", metavar="WxH", help="pixels of the pictures, such as 832x480 (default: the release's)")
    group.add_argument("--lora", metavar="FILE[:SCALE]", action="append", default=[], help="merge a LoRA; may be repeated")
    group.add_argument("--vae", type=Path, metavar="FILE", help="the VAE's weights, where they do not lie in the checkpoint")
    group.add_argument("--decoder", type=Path, metavar="FILE", help="a tiny decoder (TAEHV) in the place of the VAE's")
    group.add_argument(
        "--image-encoder", type=Path, metavar="PATH", help="CLIP picture encoder: a folder of transformers, or models_clip*.pth"
    )
    group.add_argument(
        "--prompt-embeddings", type=Path, metavar="FILE",
        help="default prompt [tokens, width] as .safetensors or .npy (default: the release's, by its text encoder)",
    )  # fmt: skip
    group.add_argument(
        "--negative-embeddings", type=Path, metavar="FILE", help="what guidance leads away from, as --prompt-embeddings"
    )
    group.add_argument(
        "--blocks-per-graph", type=int, metavar="N", help="blocks of the transformer in one graph (default: by their size)"
    )


def options_of(arguments: argparse.Namespace) -> Options:
    """What was asked for.

    Raises:
        UserError: a value that is none, a path with nothing there, or an option that has no meaning here.
    """
    from factorportrait.export.weights.released import Options, parse_lora, parse_size

    if arguments.blocks_per_graph is not None and arguments.blocks_per_graph < 1:
        raise UserError(
            "--blocks-per-graph", expected="1 or more", found=str(arguments.blocks_per_graph), action="choose another number"
        )
    for name in ("vae", "decoder", "image_encoder", "prompt_embeddings", "negative_embeddings"):
        place = getattr(arguments, name)
        if place is not None and not place.exists():
            option = f"--{name.replace('_', '-')} {place}"
            raise UserError(option, expected="a file or folder", found="nothing", action="correct the path")
    for name in ("max_quality_loss_db", "calibration"):
        if getattr(arguments, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')}", expected="a checkpoint of FactorPortrait, whose videos are judged",
                found=f"{arguments.checkpoint}, a released one, which is not", action="leave it out",
            )  # fmt: skip
    return Options(
        system=arguments.system, size=None if arguments.size is None else parse_size(arguments.size), vae=arguments.vae,
        decoder=arguments.decoder, loras=tuple(map(parse_lora, arguments.lora)), image_encoder=arguments.image_encoder,
        prompt=arguments.prompt_embeddings, negative=arguments.negative_embeddings, blocks_per_graph=arguments.blocks_per_graph,
    )  # fmt: skip


def check_unused(arguments: argparse.Namespace) -> None:
    """Raises UserError if an option of released checkpoints was given with another one."""
    given = [name for name in NAMES if getattr(arguments, name) not in (None, [])]
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')}", expected="a released checkpoint, such as a folder of Wan2.1-T2V-1.3B",
            found=f"{arguments.checkpoint or 'the shipped demo'}", action="leave it out, or name such a checkpoint",
        )  # fmt: skip
