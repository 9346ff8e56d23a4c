"""The graphs of a released model one at a time: each is built with its own weights alone, read when its turn comes.

A transformer of fourteen billion weights never lies in memory: a range of its blocks does, in fp32, while its graph is written and
checked. What a graph is checked with is drawn, since computing it would take every block before it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from factorportrait.export.check import Cases
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.models.image_encoder import ImageEncoder
from factorportrait.export.models.taehv import TinyDecoder
from factorportrait.export.models.vae import VideoVAE
from factorportrait.export.models.vae_stages import vae_stages
from factorportrait.export.models.wan_stages import condition_stages, tiny_decoder_stages, wan_stage
from factorportrait.export.stages import (
    DIT_SHAPES,
    EXAMPLE_FRAMES,
    EXAMPLE_PAST,
    EXAMPLE_TEXT,
    ConditionStage,
    ContextStage,
    DiTRange,
    Examples,
    InPlaceDiT,
    Stage,
    condition_inputs,
    expression_stages,
    time_embed,
)
from factorportrait.export.weights.files import LazyTensor
from factorportrait.export.weights.fill import check_dtypes, checked, compare
from factorportrait.model_config import ModelConfig

# Blocks go into one graph up to this size in fp32: large enough for few graphs, small enough to export beside other programs.
GRAPH_BYTES = 2 * 2**30
# What blocks do not run: keys and values of text and picture are computed once, in stages of their own.
_CONTEXT = r"cross_attn\.(?:norm_)?[kv](?:_img)?\."
# Sizes that no exporter saw: the reference or a first frame, and a chunk with a past.
DRAWN_SIZES = ({"F": 1, "P": 0, "S": 1, "B": 1, "L": 3, "I": 2}, {"F": 2, "P": 3, "S": 4, "B": 3, "L": 9, "I": 5})
EXAMPLE_SIZES = {
    "F": EXAMPLE_FRAMES, "P": EXAMPLE_PAST, "S": EXAMPLE_PAST, "L": EXAMPLE_TEXT, "I": EXAMPLE_TEXT + 1, "B": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A graph to be: `build` makes its stage, with weights."""

    name: str
    build: Callable[[], Stage]


class LazyTransformer:
    """A transformer whose weights are read for the parts that ask for them.

    Args:
        tensors: every weight under our names.
        where: what errors call their source.

    Raises:
        CheckpointError: names, shapes or types do not fit the config.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, LazyTensor], where: str):
        self.tensors, self.where = tensors, where
        with torch.device("meta"):
            self._empty = WanDiT(config.dit, config.fusion, config.latent_height, config.latent_width)
        self._empty.requires_grad_(False).eval()
        compare(self._empty.state_dict(), tensors, where, "structure")
        check_dtypes(tensors, where)

    @property
    def num_blocks(self) -> int:
        return len(self._empty.blocks)

    def with_weights(self, *patterns: str) -> WanDiT:
        """The transformer in fp32 with those weights whose names match from their beginning; the others have no values."""
        dit = copy.deepcopy(self._empty)
        dit._build_rotary_tables()
        wanted = re.compile("|".join(patterns))
        for name in self.tensors:
            if wanted.match(name):
                owner, _, last = name.rpartition(".")
                tensor = checked(self.tensors[name].load(), name, self.where, torch.float32)
                setattr(dit.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
        return dit

    def bytes_of(self, pattern: str) -> int:
        """fp32 bytes of the weights whose names match as a whole."""
        sizes = (tensor.nbytes // tensor.dtype.itemsize for name, tensor in self.tensors.items() if re.fullmatch(pattern, name))
        return 4 * sum(sizes)


@dataclass
class ReleasedModel:
    """The networks of a released checkpoint: small ones in fp32, the transformer lazily.

    Attributes:
        expression: FactorPortrait's encoders and controller.
    """

    config: ModelConfig
    dit: LazyTransformer
    vae: VideoVAE
    expression: nn.ModuleDict | None = None
    image_encoder: ImageEncoder | None = None
    tiny_decoder: TinyDecoder | None = None


def block_ranges(dit: LazyTransformer, kind: str, blocks_per_graph: int | None = None) -> list[tuple[int, int]]:
    """Ranges of blocks that become a graph each.

    Args:
        kind: "dit", "text" or "image": what of the blocks the graph takes.
        blocks_per_graph: None for as many as stay below `GRAPH_BYTES`.
    """
    own = {
        "dit": rf"blocks\.0\.(?!{_CONTEXT}).+", "text": r"blocks\.0\.cross_attn\.(norm_)?[kv]\..+",
        "image": r"blocks\.0\.cross_attn\.(norm_)?[kv]_img\..+",
    }[kind]  # fmt: skip
    size = blocks_per_graph or max(1, GRAPH_BYTES // max(dit.bytes_of(own), 1))
    return [(start, min(start + size, dit.num_blocks)) for start in range(0, dit.num_blocks, size)]


def parts_of(model: ReleasedModel, blocks_per_graph: int | None = None) -> list[Part]:
    """Every graph of a released model, in the order of DESIGN.md's table; ranges are named STAGE_START_END."""
    config, dit = model.config, model.dit
    stages = vae_stages(model.vae, config.height, config.width)
    if model.tiny_decoder is not None:
        stages = stages[:2] + tiny_decoder_stages(model.tiny_decoder, config.height, config.width)
    if model.expression is not None:
        stages += expression_stages(config, model.expression, Examples(model))
    parts = [Part(stage.name, lambda stage=stage: stage) for stage in stages]
    if config.system == "factorportrait":
        parts.append(Part("condition_embed", partial(_condition_embed, model)))
    else:
        parts += [
            Part(name, partial(_condition_stage, model, name, weights))
            for name, weights in condition_stages(config.dit, config.fusion).items()
        ]
    parts.append(Part("time_embed", partial(_time_embed, model)))
    if model.image_encoder is not None:
        parts.append(Part("image_encoder", partial(_image_encoder, model)))
    for source, width in (("text", config.dit.text_dim), ("image", config.dit.image_dim)):
        if width is not None:
            for ends in block_ranges(dit, source, blocks_per_graph):
                build = partial(_context, model, source, width, *ends)
                parts.append(Part(_named(f"{source}_embed", ends, dit), build))
    kinds = ["dit"] + (["dit_inplace"] if "stream" in config.generation.modes else [])
    for kind in kinds:
        for ends in block_ranges(dit, "dit", blocks_per_graph):
            parts.append(Part(_named(kind, ends, dit), partial(transformer_stage, model, kind, *ends)))
    return parts


def transformer_stage(model: ReleasedModel, kind: str, start: int, end: int) -> Stage:
    """`dit` or `dit_inplace` of a range of blocks."""
    face = model.config.dit.face
    blocks = "|".join(str(block) for block in range(start, end))
    patterns = [rf"blocks\.({blocks})\.(?!{_CONTEXT})"]
    patterns += [r"patch_embedding\."] if start == 0 else []
    patterns += [r"head\."] if end == model.dit.num_blocks else []
    if face is not None:
        adapters = "|".join(str(block // face.block_interval) for block in range(start, end) if block % face.block_interval == 0)
        patterns += [rf"face_adapter\.fuser_blocks\.({adapters})\."] if adapters else []
    dit = model.dit.with_weights(*patterns)
    return _range_stage(model, kind, DiTRange(dit, start, end) if kind == "dit" else InPlaceDiT(dit, None, start, end))


def with_capacity(model: ReleasedModel, stage: Stage, capacity: int) -> Stage:
    """A stage `dit_inplace` with a cache of so many slots, for a back end that wants a fixed number; its weights are shared."""
    module = copy.copy(stage.module)
    module.capacity = capacity
    return _range_stage(model, "dit_inplace", module)


def _range_stage(model: ReleasedModel, kind: str, module: DiTRange | InPlaceDiT) -> Stage:
    config, capacity = model.config, getattr(module, "capacity", None)
    sizes = {name: dict(DIT_SHAPES.get(name.split(".")[0]) or {}) for name in module.input_names}
    if capacity is None:
        sizes |= {name: {2: f"{config.tokens_per_frame}*S"} for name in module.input_names if name.startswith("cache_")}
    shapes = {name: _shape(name, config, capacity) for name in module.input_names}
    drawn = draw(shapes, EXAMPLE_SIZES, Examples(model))
    return Stage(
        _named(kind, (module.start, module.end), model.dit), module.eval(), tuple(drawn.values()), module.input_names,
        module.output_names, sizes, opset=23 if kind == "dit" else 24,
    )  # fmt: skip


def _shape(name: str, config: ModelConfig, capacity: int | None) -> tuple[int | str, ...]:
    """Sizes of an input of the transformer, as DESIGN.md has them."""
    dit, tokens = config.dit, config.tokens_per_frame
    adapter = () if dit.face is None else ("F", dit.face.num_tokens + 1, dit.dim)
    rows = f"{tokens}*S" if capacity is None else capacity * tokens
    return {
        "noise_latents": (1, dit.out_channels, "F", config.latent_height, config.latent_width),
        "condition_tokens": (1, "F", tokens, dit.dim), "hidden_states": (1, "F", tokens, dit.dim),
        "expression_modulation": (1, "F", 6, dit.dim), "temb": (1, "F", dit.dim), "timestep_proj": (1, "F", 6, dit.dim),
        "positions": ("F",), "past_positions": ("P",), "key_positions": ("S",), "write_index": (1,),
        "past_k": (1, "P", tokens, dit.dim), "past_v": (1, "P", tokens, dit.dim), "cache_k": (1, 1, rows, dit.dim),
        "cache_v": (1, 1, rows, dit.dim), "text_k": (1, "L", dit.dim), "text_v": (1, "L", dit.dim),
        "image_k": (1, "I", dit.dim), "image_v": (1, "I", dit.dim), "face_k": (1, *adapter), "face_v": (1, *adapter),
    }[name.split(".")[0]]  # fmt: skip


def draw(shapes: Mapping[str, tuple[int | str, ...]], sizes: Mapping[str, int], make: Examples) -> dict[str, Tensor]:
    """Seeded inputs by name; positions and indices are those of a chunk behind its past."""

    def number(size: int | str) -> int:
        factor, _, name = str(size).rpartition("*")
        return size if isinstance(size, int) else sizes[name] * int(factor or 1)

    def one(name: str, shape: tuple[int, ...]) -> Tensor:
        frames, past = sizes.get("F", 0), sizes.get("P", 0)
        first = max(0, sizes.get("S", 0) - frames)
        integers = {
            "positions": torch.arange(frames) + (first if "key_positions" in shapes else past),
            "past_positions": torch.arange(past), "key_positions": torch.arange(sizes.get("S", 0)),
            "write_index": torch.tensor([first]),
        }  # fmt: skip
        if name in integers:
            return integers[name]
        if name in ("image", "frames") and len(shape) > 3:
            return make.pictures(*shape) if len(shape) == 4 else make.normal(*shape).clamp(-1, 1)
        if name == "timesteps":
            return make.timesteps(shape[1])
        # Modulations and rays are small beside what they change.
        scale = 0.3 if name in ("expression_modulation", "timestep_proj", "rays") else 1.0
        return scale * make.normal(*shape)

    return {name: one(name, tuple(map(number, shape))) for name, shape in shapes.items()}


class DrawnCases(Cases):
    """Inputs to check a released model's graphs with: the VAE's and the expression's as always, all others drawn."""

    def of(self, stage: Stage) -> list[dict[str, Tensor]]:
        """See `Cases.of`."""
        own = stage.name.startswith("vae_encode") or (stage.name.startswith("vae_decode") and self.model.tiny_decoder is None)
        if own or stage.name in ("expression_encoder", "arkit_encoder", "expression_controller", "time_embed"):
            return super().of(stage)
        return list(self._drawn(stage))

    def longest(self, stage: Stage) -> list[dict[str, Tensor]]:
        """The same cases: what a long context holds is for a run of the real weights to tell."""
        return self.of(stage)

    def _drawn(self, stage: Stage) -> Iterator[dict[str, Tensor]]:
        shapes = {
            name: tuple(
                (stage.dynamic_shapes or {}).get(name, {}).get(axis, size) for axis, size in enumerate(argument.shape)
            )
            for name, argument in zip(stage.input_names, stage.args, strict=True)
        }
        # A clip's face has slot 0 and a frame at least.
        more = 1 if stage.name == "face_embed" else 0
        for sizes in DRAWN_SIZES:
            yield draw(shapes, {**sizes, "F": sizes["F"] + more}, self.make)


def _named(stage: str, ends: tuple[int, int], dit: LazyTransformer) -> str:
    return stage if ends == (0, dit.num_blocks) else f"{stage}_{ends[0]}_{ends[1]}"


def _context(model: ReleasedModel, source: str, width: int, start: int, end: int) -> Stage:
    suffix, embedding = {"text": ("", r"text_embedding\."), "image": ("_img", r"img_emb\.")}[source]
    blocks = "|".join(str(block) for block in range(start, end))
    dit = model.dit.with_weights(embedding, rf"blocks\.({blocks})\.cross_attn\.(norm_)?[kv]{suffix}\.")
    names = [f"{source}_{part}.{i}" for i in range(start, end) for part in "kv"]
    given = Examples(model).normal(1, EXAMPLE_TEXT, width)
    symbol = {"text": "L", "image": "I"}[source]
    return Stage(
        _named(f"{source}_embed", (start, end), model.dit), ContextStage(dit, source, start, end).eval(), (given,), [source], names,
        {source: {1: symbol}},
    )  # fmt: skip


def _condition_embed(model: ReleasedModel) -> Stage:
    conditions = condition_inputs(model, EXAMPLE_FRAMES)
    module = ConditionStage(model.dit.with_weights(r"patch_embedding\.")).eval()
    return Stage(
        "condition_embed", module, tuple(conditions.values()), list(conditions), ["condition_tokens"],
        {name: {2: "F"} for name in conditions},
    )  # fmt: skip


def _condition_stage(model: ReleasedModel, name: str, weights: tuple[str, ...]) -> Stage:
    return wan_stage(model.dit.with_weights(*(re.escape(f"{part}.") for part in weights)), name)


def _time_embed(model: ReleasedModel) -> Stage:
    module = time_embed(model.dit.with_weights(r"time_embedding\.", r"time_projection\.")).eval()
    return Stage(
        "time_embed", module, (Examples(model).timesteps(EXAMPLE_FRAMES),), ["timesteps"], ["temb", "timestep_proj"],
        {"timesteps": {1: "F"}},
    )  # fmt: skip


def _image_encoder(model: ReleasedModel) -> Stage:
    picture = Examples(model).pictures(1, 3, model.config.height, model.config.width)
    return Stage("image_encoder", model.image_encoder.eval(), (picture,), ["image"], ["tokens"])
