"""A released checkpoint as people download it: found, opened without being read, and fitted to one of our systems.

What is in the folder decides: the original release (diffusion_pytorch_model*.safetensors beside Wan2.1_VAE.pth), diffusers
(transformer/, vae/, text_encoder/, image_encoder/), or one file of a causal training (generator_ema). Sizes come from the shapes,
and systems.toml says how it is sampled.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from factorportrait.checkpoint_files import CONFIG, HEAD
from factorportrait.config import VAEConfig, config_from_dict
from factorportrait.errors import CheckpointError, UserError
from factorportrait.export.weights.files import INDEX_SUFFIX, SUFFIXES, LazyTensor, open_weights
from factorportrait.export.weights.lora import merge_lora
from factorportrait.export.weights.networks import Network, Opened, open_transformer, open_vae, with_streams
from factorportrait.model_config import STREAMS, DiTConfig, FusionConfig, GenerationConfig, ModelConfig
from factorportrait.systems import SYSTEMS

# Files of other networks that releases keep beside the transformer's.
_BESIDE = re.compile(r"(vae|models_t5|models_clip|taew|taehv|text_encoder|image_encoder)", re.IGNORECASE)
_VAE = re.compile(r"vae", re.IGNORECASE)
# The encoders of an original release; the tokenizer is a folder.
_TEXT_FILE, _PICTURE_FILE, _TOKENIZER = "models_t5", "models_clip", "google/umt5-xxl"
# Names of the two experts of Wan2.2's A14B, each for a part of the steps.
_EXPERT = re.compile(r"(high|low)_noise", re.IGNORECASE)
_PARTS = ("image_dim", "reference_channels", "pose_channels", "face", "ray_adapter")


@dataclass(frozen=True)
class Recipe:
    """How a backbone is exported and sampled; see systems.toml.

    Attributes:
        prompt: the authors' default.
        negative_prompt: what their guidance leads away from; None where they sample without guidance.
    """

    name: str
    system: str
    dim: int
    size: tuple[int, int]
    fps: float
    generation: GenerationConfig
    source: str
    example: str
    causal: bool = False
    prompt: str = ""
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Options:
    """What a user adds to a checkpoint.

    Attributes:
        system: of `SYSTEMS`; None lets the weights decide.
        size: (height, width) in pixels; None for the recipe's.
        vae, decoder: files or folders of a VAE and of a tiny decoder in the place of the VAE's.
        loras: files and their scales, merged in this order.
        image_encoder: folder of a CLIP picture encoder as `transformers` saves it, or the file of an original release.
        prompt, negative: files of a prompt's embeddings, and of what guidance leads away from.
        blocks_per_graph: None lets their size decide.
    """

    system: str | None = None
    size: tuple[int, int] | None = None
    vae: Path | None = None
    decoder: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    image_encoder: Path | None = None
    prompt: Path | None = None
    negative: Path | None = None
    blocks_per_graph: int | None = None


@dataclass(frozen=True)
class TextEncoder:
    """A folder text_encoder or a file models_t5*, and the folder of its tokenizer."""

    weights: Path
    tokenizer: Path


@dataclass(frozen=True)
class Released:
    """A checkpoint that is ready to be exported; no weight has been read.

    Attributes:
        tensors: of the transformer, under our names and with our streams.
        image_encoder: folder or file of CLIP's picture encoder, where the transformer looks at one and there is one.
        files: everything that the export depends on.
        notes: what was decided, for the user to see and for the manifest.
    """

    config: ModelConfig
    recipe: Recipe
    tensors: Mapping[str, LazyTensor]
    where: str
    vae: Opened
    options: Options
    image_encoder: Path | None
    text_encoder: TextEncoder | None
    files: tuple[Path, ...]
    notes: tuple[str, ...]


@cache
def recipes() -> tuple[Recipe, ...]:
    """The table of systems.toml."""
    table = tomllib.loads(Path(__file__).with_name("systems.toml").read_text(encoding="utf-8"))
    return tuple(config_from_dict(Recipe, entry, f"systems.toml: {entry.get('name')}") for entry in table["recipe"])


def open_released(path: Path, options: Options) -> Released:
    """Open a released checkpoint.

    Args:
        path: its folder, or the file of its transformer.

    Raises:
        CheckpointError: a file is missing or damaged, or nothing here can run what it holds.
        UserError: options that do not go with it.
    """
    transformer = open_transformer(_transformer_of(path))
    notes = [*transformer.notes]
    for file, scale in options.loras:
        transformer = merge_lora(transformer, open_weights(file), scale)
    notes += transformer.notes[len(notes) :]
    network = transformer.config
    recipe = _recipe(network, options.system, transformer.causal, transformer.where)
    if options.image_encoder is not None and network.dit.image_dim is None:
        raise UserError(
            f"--image-encoder {options.image_encoder}", expected="a transformer that looks at a picture's embeddings", found="none",
            action="leave it out",
        )  # fmt: skip
    vae = open_vae(options.vae or _vae_of(path))
    notes += [f"VAE: {note}" for note in vae.notes]
    tensors, fusion = transformer.tensors, network.fusion
    if recipe.system == "factorportrait" and set(fusion.streams) != set(STREAMS):
        wanted = FusionConfig(streams=STREAMS, latent_channels=vae.config.z_dim)
        tensors, declared = with_streams(tensors, fusion, wanted)
        fusion = wanted
        notes += [declared, "expression encoder, ARKit map and controller: drawn, untrained; the controller's last layer is zero"]
    text = _text_encoder_of(path)
    config = _config(recipe, network.dit, fusion, vae.config, options.size)
    notes.append(f"system {recipe.system}, as {recipe.name}: {recipe.source}")
    if recipe.generation.guidance_scale != 1:
        config, note = _with_guidance(config, options.negative is not None or (text is not None and options.prompt is None))
        notes.append(note)
    picture = (options.image_encoder or _image_encoder_of(path)) if network.dit.image_dim is not None else None
    return Released(
        config, recipe, tensors, transformer.where, vae, options, picture, text,
        _files(path, options, picture, text), tuple(notes),
    )  # fmt: skip


def _recipe(network: Network, system: str | None, causal: bool, where: str) -> Recipe:
    """The recipe of a transformer, or of the system that was asked for."""
    parts = {name for name in _PARTS if getattr(network.dit, name) is not None}
    streams = set(network.fusion.streams)
    fitting = [name for name, known in SYSTEMS.items() if known.parts == parts and set(known.streams) == streams]
    if streams == {"noise"} and not parts:
        # Of a backbone without conditions FactorPortrait is made; what a causal training gave is run as it is.
        fitting = ["self-forcing", "factorportrait"] if causal else ["factorportrait", "self-forcing"]
    if not fitting:
        has = ", ".join((*network.fusion.streams, *sorted(parts)))
        raise CheckpointError(
            where, expected="a transformer of " + ", ".join(dict.fromkeys(recipe.name for recipe in recipes())),
            found=f"one that takes {has}", action="export one of these: no system here gives it its conditions",
        )  # fmt: skip
    if system is not None and system not in fitting:
        raise UserError(
            f"--system {system}", expected=" or ".join(fitting) + ", as the weights' inputs say", found=repr(system),
            action="leave --system out, or take another checkpoint",
        )  # fmt: skip
    own = [recipe for recipe in recipes() if recipe.system == (system or fitting[0])]
    return min(own, key=lambda recipe: (recipe.causal != causal, abs(recipe.dim - network.dit.dim)))


def _config(recipe: Recipe, dit: DiTConfig, fusion: FusionConfig, vae: VAEConfig, size: tuple[int, int] | None) -> ModelConfig:
    height, width = size or recipe.size
    return ModelConfig(
        system=recipe.system, name=recipe.name, height=height, width=width, fps=recipe.fps, vae=vae, dit=dit, fusion=fusion,
        generation=recipe.generation,
    )  # fmt: skip


def _with_guidance(config: ModelConfig, has_negative: bool) -> tuple[ModelConfig, str]:
    """A config with its recipe's guidance, or without it where there is no negative prompt to lead away from."""
    scale = f"{config.generation.guidance_scale:g}"
    if has_negative:
        return config, f"guidance: {scale} away from the negative prompt, as its authors sample (fp-run --guidance 1: none)"
    without = replace(config, generation=replace(config.generation, guidance_scale=1.0))
    return without, f"guidance: none, though its authors sample with {scale}: that takes --negative-embeddings FILE"


def _transformer_of(path: Path) -> Path:
    experts = [name for name in ("transformer_2", "high_noise_model", "low_noise_model") if (path / name).is_dir()]
    if path.name.startswith("transformer") and (path.resolve().parent / "transformer_2").is_dir():
        experts = ["transformer_2"]
    own = path.resolve()
    if experts or _EXPERT.search(own.name) or _EXPERT.search(own.parent.name):
        # Wan2.2's A14B: one expert alone would give pictures, and wrong ones.
        raise CheckpointError(
            f"checkpoint {path}", expected="one transformer that denoises every step",
            found=f"one of two: {experts[0] if experts else own.name} denoises some of them",
            action="export a release with one: no system here changes networks between steps",
        )  # fmt: skip
    if path.is_dir() and (path / "transformer").is_dir():
        return path / "transformer"
    return (path.is_dir() and _transformer_file(path)) or path


def _transformer_file(path: Path) -> Path | None:
    """The transformer's file or index in a folder of the original release; None where it is not plain which."""
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if indices:
        return indices[0] if len(indices) == 1 else None
    files = [file for suffix in SUFFIXES for file in sorted(path.glob(f"*{suffix}")) if not _BESIDE.search(file.name)]
    return files[0] if len(files) == 1 else None


def _vae_of(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    if (folder / "vae").is_dir():
        return folder / "vae"
    found = [file for suffix in SUFFIXES for file in sorted(folder.glob(f"*{suffix}")) if _VAE.search(file.name)]
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        f"checkpoint {path}", expected="the VAE's weights: a folder vae, or one file with VAE in its name",
        found=", ".join(file.name for file in found) or "none", action="name it with --vae, such as --vae Wan2.1_VAE.pth",
    )  # fmt: skip


def _text_encoder_of(path: Path) -> TextEncoder | None:
    """The text encoder of a release's folder, where weights and tokenizer are both there."""
    folders = TextEncoder(path / "text_encoder", path / "tokenizer")
    if folders.weights.is_dir() and folders.tokenizer.is_dir():
        return folders
    file, tokenizer = _encoder_file(path, _TEXT_FILE), path / _TOKENIZER
    return TextEncoder(file, tokenizer) if file is not None and tokenizer.is_dir() else None


def _image_encoder_of(path: Path) -> Path | None:
    folder = path / "image_encoder"
    return folder if folder.is_dir() else _encoder_file(path, _PICTURE_FILE)


def _encoder_file(path: Path, start: str) -> Path | None:
    """The one file of weights in a folder that begins so; None where there is none."""
    found = sorted(file for file in path.glob(f"{start}*") if file.suffix in SUFFIXES) if path.is_dir() else []
    if len(found) > 1:
        raise CheckpointError(
            f"checkpoint {path}", expected=f"one file {start}*", found=", ".join(file.name for file in found),
            action="leave the release's own there",
        )  # fmt: skip
    return found[0] if found else None


def _files(path: Path, options: Options, picture: Path | None, text: TextEncoder | None) -> tuple[Path, ...]:
    """What is digested: every file of weights and every config that was, or will be, read."""
    places = [_transformer_of(path), options.vae or _vae_of(path), *(file for file, _ in options.loras)]
    places += [place for place in (options.decoder, options.prompt, options.negative, picture) if place is not None]
    places += [text.weights, text.tokenizer] if text is not None and options.prompt is None else []
    places += [path / HEAD] if (path / HEAD).is_file() else []
    files: list[Path] = []
    for place in places:
        if place.name.endswith(INDEX_SUFFIX):
            files += [place, *open_weights(place).files]
        elif place.is_dir():
            files += sorted(file for file in place.iterdir() if file.is_file())
        else:
            files.append(place)
        config = place.parent / CONFIG
        files += [config] if place.is_file() and config.is_file() else []
    return tuple(dict.fromkeys(files))


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE` -> file and scale.

    Raises:
        UserError: a scale that is not finite.
    """
    file, colon, after = text.rpartition(":")
    try:
        scale = float(after) if colon else None
    except ValueError:
        scale = None  # a colon of the path
    if scale is None:
        return Path(text), 1.0
    if not math.isfinite(scale):
        raise UserError(f"--lora {text}", expected="a finite scale", found=after, action="choose one such as 0.8")
    return Path(file), scale


def parse_size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` -> (height, width).

    Raises:
        UserError: not of this form.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise UserError("--size", expected="WIDTHxHEIGHT in pixels, such as 832x480", found=text, action="correct it")
    return int(match[2]), int(match[1])

