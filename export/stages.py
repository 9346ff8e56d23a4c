"""The stages of a system: the functions that become graphs, with names, example inputs and symbolic sizes.

The batch is fixed to 1 but for the two encoders: the sets of guidance have a cache each and run one after another, and
`RotaryEmbedding` wants its tables once per item of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorportrait.arkit import ARKIT_NAMES
from factorportrait.export.models.dit import CacheInPlace, Rotary
from factorportrait.model_config import FRAMES_PER_LATENT, ModelConfig

if TYPE_CHECKING:
    from factorportrait.export.models.dit import Block, WanDiT
    from factorportrait.export.models.expression import ExpressionController
    from factorportrait.export.models.factorportrait import FactorPortrait

OPSET = 23
# Sizes of the example inputs. Not 0 or 1: the exporter takes those for constants.
EXAMPLE_BATCH, EXAMPLE_FRAMES, EXAMPLE_PAST, EXAMPLE_TEXT = 2, 3, 5, 7


@dataclass
class Stage:
    """One graph to be.

    Args:
        module: called with `args` in order; returns a tensor or a flat tuple of tensors.
        dynamic_shapes: per input a dict axis -> name of the symbolic size, or None.
        opset: of ONNX; `TensorScatter` came with 24.
    """

    name: str
    module: nn.Module
    args: tuple[Tensor, ...]
    input_names: list[str]
    output_names: list[str]
    dynamic_shapes: dict | None = None
    opset: int = OPSET


class Call(nn.Module):
    """A method of a module as a module of its own, for the exporter."""

    def __init__(self, module: nn.Module, method: Callable):
        super().__init__()
        self.module = module
        self.method = method.__name__

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the method returns."""
        return getattr(self.module, self.method)(*args)


class ControllerStage(nn.Module):
    """codes [B,4N,E], the state's tensors -> expression_modulation [B,N,6,D], the next state's tensors."""

    def __init__(self, controller: ExpressionController):
        super().__init__()
        self.controller = controller

    def forward(self, codes: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        modulation, state = self.controller(codes, list(state))
        return (modulation, *state)


class ConditionStage(nn.Module):
    """reference_latents, pose_latents [B,C,F,h,w], rays [B,6 or 24,F,h,w] -> condition_tokens [B,F,T,D]."""

    def __init__(self, dit: WanDiT):
        super().__init__()
        self.dit = only(dit, "patch_embedding")

    def forward(self, reference_latents: Tensor, pose_latents: Tensor, rays: Tensor) -> Tensor:
        """See the class."""
        return self.dit.embed_conditions(reference_latents, rays, pose_latents)


class ContextStage(nn.Module):
    """Embeddings of a prompt or a picture [B,L,width] -> keys and values [B,L,D] of cross-attention, blocks `start` up to `end`."""

    def __init__(self, dit: WanDiT, source: str, start: int = 0, end: int | None = None):
        super().__init__()
        keys = {"text": ("k", "v", "norm_k"), "image": ("k_img", "v_img", "norm_k_img")}[source]
        self.source = {"text": "text_embedding", "image": "img_emb"}[source]
        setattr(self, self.source, getattr(dit, self.source))
        blocks = dit.blocks[start:end]
        self.attentions = nn.ModuleList(
            nn.ModuleDict({name: getattr(block.cross_attn, key) for name, key in zip(("k", "v", "norm_k"), keys, strict=True)})
            for block in blocks
        )

    def forward(self, given: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        embedding = getattr(self, self.source)
        context = embedding(given.to(next(embedding.parameters()).dtype))
        out = []
        for attention in self.attentions:
            x = context.to(attention["k"].weight.dtype)
            out += [attention["norm_k"](attention["k"](x)), attention["v"](x)]
        return tuple(out)


def only(module: nn.Module, *names: str) -> nn.Module:
    """The same module with some of its parts alone, their parameters shared: a graph of it takes no other weights."""
    part = copy.copy(module)
    part._modules = {name: child for name, child in module._modules.items() if name in names}
    return part


def range_of(dit: WanDiT, start: int, end: int) -> WanDiT:
    """The transformer with what blocks `start` up to `end` run; blocks keep their numbers, the others are empty.

    The first range embeds the noise, the last one has the head. Keys and values of text and picture come from other stages.
    """
    ends = [name for name, has in (("patch_embedding", start == 0), ("head", end == len(dit.blocks))) if has]
    part = only(dit, "blocks", "face_adapter", *ends)
    part.blocks = nn.ModuleList(
        _without_context(block) if start <= i < end else nn.Identity() for i, block in enumerate(dit.blocks)
    )
    if dit.config.face is not None:
        interval = dit.config.face.block_interval
        adapters = enumerate(dit.face_adapter["fuser_blocks"])
        kept = nn.ModuleList(adapter if start <= i * interval < end else nn.Identity() for i, adapter in adapters)
        part.face_adapter = nn.ModuleDict({"fuser_blocks": kept})
    return part


def _without_context(block: Block) -> Block:
    if "cross_attn" not in block._modules:
        return block
    part = only(block, *block._modules)
    part.cross_attn = only(block.cross_attn, "q", "norm_q", "o")
    return part


class _Blocks(nn.Module):
    """What both forms of a range of blocks share: checks, names, and what cross-attention and face adapters look up."""

    def __init__(self, dit: WanDiT, start: int, end: int):
        super().__init__()
        if not 0 <= start < end <= len(dit.blocks):
            raise ValueError(f"blocks: expected 0 <= start < end <= {len(dit.blocks)}, found {start} and {end}")
        self.dit, self.start, self.end = range_of(dit, start, end), start, end
        self.first, self.last = start == 0, end == len(dit.blocks)

    def _leading(self) -> list[str]:
        names = ["noise_latents", "condition_tokens"] if self.first else ["hidden_states"]
        return names + ["expression_modulation"] + (["temb"] if self.last else []) + ["timestep_proj"]

    def _looked_up(self) -> list[str]:
        config, names = self.dit.config, []
        names += self._per_block("text_{}.{}") if config.text_dim is not None else []
        names += self._per_block("image_{}.{}") if config.image_dim is not None else []
        return names + [f"face_{part}.{adapter}" for adapter in self._adapters() for part in "kv"]

    def _adapters(self) -> list[int]:
        face, blocks = self.dit.config.face, range(self.start, self.end)
        return [] if face is None else [block // face.block_interval for block in blocks if block % face.block_interval == 0]

    def _per_block(self, name: str) -> list[str]:
        return [name.format(part, block) for block in range(self.start, self.end) for part in "kv"]

    def _run(self, given: dict[str, Tensor], rotary: Rotary, past: list | None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """All blocks on the named inputs, up to the velocity where this is the last range."""
        dit, blocks = self.dit, range(self.start, self.end)
        text_kv, image_kv = (
            [(given[f"{source}_k.{block}"], given[f"{source}_v.{block}"]) for block in blocks]
            if f"{source}_k.{self.start}" in given
            else None
            for source in ("text", "image")
        )
        face_kv = {i: (given[f"face_k.{i}"], given[f"face_v.{i}"]) for i in self._adapters()}
        x = dit.embed_noise(given["noise_latents"]) + given["condition_tokens"] if self.first else given["hidden_states"]
        modulation = given["timestep_proj"].float() + given["expression_modulation"].float()
        x, new_kv = dit.run_blocks(
            dit.blocks[self.start : self.end], x, modulation, rotary, past, text_kv, None, image_kv,
            dit.adapters_of(self.start, self.end, face_kv or None),
        )  # fmt: skip
        return (dit.unpatchify(dit.head(x, given["temb"])) if self.last else x), new_kv


class DiTRange(_Blocks):
    """Blocks `start` up to `end` of the transformer: the first range embeds the noise, the last one has the head.

    Inputs and outputs by name: `input_names` and `output_names`; blocks keep their number in the whole.
    """

    @property
    def input_names(self) -> list[str]:
        """In the order of `forward`."""
        return [*self._leading(), "positions", "past_positions", *self._per_block("past_{}.{}"), *self._looked_up()]

    @property
    def output_names(self) -> list[str]:
        """In the order that `forward` returns."""
        return ["velocity" if self.last else "hidden_states", *self._per_block("new_{}.{}")]

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        """Shapes as in DESIGN.md, `hidden_states` [B,F,T,D]."""
        given = dict(zip(self.input_names, args, strict=True))
        past_kv = [(given[f"past_k.{block}"], given[f"past_v.{block}"]) for block in range(self.start, self.end)]
        rotary = self.dit.rotary_pair(given["positions"], given["past_positions"])
        x, new_kv = self._run(given, rotary, past_kv)
        return (x, *(tensor for pair in new_kv for tensor in pair))


class InPlaceDiT(_Blocks):
    """Blocks on a cache that they update: `cache_k_out.i` is `cache_k.i` with the chunk's keys in its slots.

    Whoever runs it binds both to one memory, so nothing is copied. Queries see all S slots of `key_positions`, without a mask.

    Args:
        capacity: slots of the cache; None for S, so that the part in use is bound. TensorRT compiles only a fixed number.
        start, end: the first block and the one after the last; None for all that follow.
    """

    def __init__(self, dit: WanDiT, capacity: int | None = None, start: int = 0, end: int | None = None):
        super().__init__(dit, start, len(dit.blocks) if end is None else end)
        self.capacity = capacity
        self.mutate = False  # torch writes into the cache given

    @property
    def input_names(self) -> list[str]:
        """In the order of `forward`."""
        names = [*self._leading(), "positions", "key_positions", "write_index", *self._per_block("cache_{}.{}")]
        return names + self._looked_up()

    @property
    def output_names(self) -> list[str]:
        """In the order that `forward` returns."""
        return ["velocity" if self.last else "hidden_states", *self._per_block("cache_{}_out.{}")]

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        """Shapes as in DESIGN.md; a cache is [1,1,S*T,D], `key_positions` [S], `write_index` [1] counts slots."""
        given = dict(zip(self.input_names, args, strict=True))
        dit, blocks = self.dit, range(self.start, self.end)
        tokens = given["condition_tokens" if self.first else "hidden_states"].shape[2]
        row = given["write_index"] * tokens
        num_rows = None if self.capacity is None else given["key_positions"].shape[0] * tokens
        caches = [
            CacheInPlace(given[f"cache_k.{block}"], given[f"cache_v.{block}"], row, num_rows, self.mutate) for block in blocks
        ]
        rotary = Rotary(dit.rotary(given["positions"]), dit.rotary(given["key_positions"]))
        x, _ = self._run(given, rotary, caches)
        return (x, *(memory for cache in caches for memory in (cache.k, cache.v)))


class Examples:
    """Seeded inputs that look like real ones: smooth pictures, latents of order one, sparse coefficients."""

    def __init__(self, model: FactorPortrait, seed: int = 0):
        self.model, self.config = model, model.config
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Independent normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def pictures(self, *shape: int) -> Tensor:
        """[..., 3, H, W] in -1..1: smooth colours and a little noise."""
        *leading, height, width = shape
        coarse = torch.randn((1, torch.Size(leading).numel(), 5, 5), generator=self.generator)
        smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).reshape(shape)
        return (0.4 * smooth + 0.05 * self.normal(*shape)).clamp(-1, 1)

    def latents(self, frames: int) -> Tensor:
        """[1,C,F,h,w]."""
        return self.normal(1, self.config.vae.z_dim, frames, self.config.latent_height, self.config.latent_width)

    def rays(self, frames: int) -> Tensor:
        """[1,6 or 24,F,h,w]: moments and unit directions."""
        shape = (1, self.config.fusion.ray_channels // 6, 3, frames, self.config.latent_height, self.config.latent_width)
        directions = F.normalize(self.normal(*shape) * 0.2 + torch.tensor([0.0, 0.0, -1.0]).view(3, 1, 1, 1), dim=2)
        return torch.cat([0.9 * self.normal(*shape) * 0.2, directions], dim=2).flatten(1, 2)

    def coefficients(self, batch: int) -> Tensor:
        """[B,52] in 0..1, most of them 0."""
        return (self.normal(batch, len(ARKIT_NAMES)) * 0.4 - 0.2).clamp(0, 1)

    def timesteps(self, frames: int) -> Tensor:
        """[1,F] in 0..1000."""
        return (torch.rand((1, frames), generator=self.generator) * 1000).round()

    def codes(self, frames: int) -> Tensor:
        """[1,4F,E], slowly changing."""
        steps = self.normal(1, FRAMES_PER_LATENT * frames, self.config.expression.code_dim)
        return steps.cumsum(1) / (1 + torch.arange(steps.shape[1])).sqrt()[:, None]


def condition_inputs(model: FactorPortrait, frames: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of `condition_embed` for F slots: the first has the reference, the others pose and rays, and the reference where it
    stands in all slots."""
    make = Examples(model, seed)
    reference, pose, rays = make.latents(frames), make.latents(frames), make.rays(frames)
    if frames > 1:
        pose[:, :, :1], rays[:, :, :1] = 0, 0
        reference[:, :, 1:] = reference[:, :, :1] if model.config.fusion.reference_slots == "all" else 0
    return {"reference_latents": reference, "pose_latents": pose, "rays": rays}


def dit_inputs(
    model: FactorPortrait,
    frames: int,
    past: int,
    seed: int = 0,
    noise_latents: Tensor | None = None,
    conditions: dict[str, Tensor] | None = None,
    draw_past: bool = False,
) -> dict[str, Tensor]:
    """Inputs of `dit` for F latent frames that see P cached ones, made by the networks that feed it.

    Args:
        model: in fp32 on the CPU.
        frames, past: F and P.
        seed: of everything that is drawn.
        noise_latents: [1,C,F,h,w]; None draws them.
        conditions: inputs of `condition_embed` for F latent frames; None draws them.
        draw_past: draw the cached keys and values too. Computing them takes as long as a step, minutes for a large model.
    """
    make = Examples(model, seed)
    dit, controller, config = model.dit, model.expression["controller"], model.config.dit
    with torch.no_grad():
        temb, timestep_proj = dit.embed_time(make.timesteps(frames))
        codes = make.codes(frames)
        modulation, _ = controller(codes, controller.initial_state(codes[:, 0]))
        tokens = ConditionStage(dit)(**(conditions or condition_inputs(model, frames, seed)))
        inputs = {
            "noise_latents": make.latents(frames) if noise_latents is None else noise_latents,
            "condition_tokens": tokens,
            "expression_modulation": modulation,
            "temb": temb,
            "timestep_proj": timestep_proj,
            "positions": torch.arange(past, past + frames),
            "past_positions": torch.arange(past),
        }
        text_kv = None
        if config.text_dim is not None:
            text_kv = dit.embed_text(make.normal(1, EXAMPLE_TEXT, config.text_dim))
        kept = _drawn_past(model, make, past) if draw_past else _computed_past(model, make, past, seed, text_kv)
    for prefix, pairs in (("past", kept), ("text", text_kv)):
        for i, (k, v) in enumerate(pairs or []):
            length = past if prefix == "past" else k.shape[1]
            inputs[f"{prefix}_k.{i}"], inputs[f"{prefix}_v.{i}"] = k[:, :length], v[:, :length]
    return inputs


def _computed_past(
    model: FactorPortrait, make: Examples, past: int, seed: int, text_kv: list[tuple[Tensor, Tensor]] | None
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that the blocks would have kept of P earlier frames."""
    dit, controller, earlier = model.dit, model.expression["controller"], max(past, 1)
    old = make.codes(earlier)
    old_temb, old_proj = dit.embed_time(torch.zeros(1, earlier))
    _, kept = dit(
        make.latents(earlier), ConditionStage(dit)(**condition_inputs(model, earlier, seed + 1)),
        controller(old, controller.initial_state(old[:, 0]))[0], old_temb, old_proj,
        torch.arange(earlier), text_kv=text_kv,
    )  # fmt: skip
    return kept


def _drawn_past(model: FactorPortrait, make: Examples, past: int) -> list[tuple[Tensor, Tensor]]:
    shape = (1, past, model.config.tokens_per_frame, model.config.dit.dim)
    return [(make.normal(*shape), make.normal(*shape)) for _ in model.dit.blocks]


def in_place_inputs(model: FactorPortrait, frames: int, used: int, first: int, seed: int = 0, **given) -> dict[str, Tensor]:
    """Inputs of `dit_inplace` for F latent frames that are written from slot `first` on and see S used ones.

    Args:
        given: further arguments of `dit_inputs`.
    """
    inputs = dit_inputs(model, frames, used, seed, **given)
    order = torch.arange(used)
    # Positions of a ring that has turned: the frames behind the chunk are the oldest ones.
    order[1:] = 1 + (order[1:] - first - frames) % max(used - 1, 1)
    inputs |= {"key_positions": order, "positions": order[first : first + frames].clone(), "write_index": torch.tensor([first])}
    del inputs["past_positions"]
    for name in [name for name in inputs if name.startswith("past_")]:
        inputs[name.replace("past", "cache")] = inputs.pop(name).flatten(1, 2).unsqueeze(1)
    return inputs


# Symbolic sizes of the transformer's inputs: axis -> name.
DIT_SHAPES = {
    "noise_latents": {2: "F"},
    "condition_tokens": {1: "F"},
    "hidden_states": {1: "F"},
    "expression_modulation": {1: "F"},
    "temb": {1: "F"},
    "timestep_proj": {1: "F"},
    "positions": {0: "F"},
    "past_positions": {0: "P"},
    "key_positions": {0: "S"},
    "past_k": {1: "P"},
    "past_v": {1: "P"},
    "text_k": {1: "L"},
    "text_v": {1: "L"},
    "image_k": {1: "I"},
    "image_v": {1: "I"},
    "face_k": {1: "F"},
    "face_v": {1: "F"},
}


def dit_stage(model: FactorPortrait, start: int = 0, end: int | None = None) -> Stage:
    """The transformer, or a range of its blocks: the output `hidden_states` of one range is the input of the next.

    Args:
        start, end: the first block and the one after the last; None for all that follow.
    """
    end = len(model.dit.blocks) if end is None else end
    module = DiTRange(model.dit, start, end).eval()
    inputs = dit_inputs(model, EXAMPLE_FRAMES, EXAMPLE_PAST, draw_past=True)
    if start:
        before = DiTRange(model.dit, 0, start)
        with torch.no_grad():
            inputs["hidden_states"] = before(*(inputs[name] for name in before.input_names))[0]
    whole = module.first and module.last
    return Stage(
        name="dit" if whole else f"dit_{start}_{end}",
        module=module,
        args=tuple(inputs[name] for name in module.input_names),
        input_names=module.input_names,
        output_names=module.output_names,
        dynamic_shapes={name: DIT_SHAPES[name.split(".")[0]] for name in module.input_names},
    )


def in_place_stage(model: FactorPortrait, capacity: int | None = None) -> Stage:
    """The transformer on a cache that it updates in place.

    Args:
        capacity: slots of the cache, the reference among them, for a back end that wants a fixed number; None for as many as used.
    """
    module = InPlaceDiT(model.dit, capacity).eval()
    inputs = in_place_inputs(model, EXAMPLE_FRAMES, EXAMPLE_PAST, 1, draw_past=True)
    shapes = {name: DIT_SHAPES.get(name.split(".")[0]) for name in module.input_names}
    rows = model.config.tokens_per_frame
    for name in module.input_names:
        if not name.startswith("cache_"):
            continue
        if capacity is None:
            shapes[name] = {2: f"{rows}*S"}
        else:
            inputs[name] = F.pad(inputs[name], (0, 0, 0, capacity * rows - inputs[name].shape[2]))
    args = tuple(inputs[name] for name in module.input_names)
    return Stage("dit_inplace", module, args, module.input_names, module.output_names, shapes, opset=24)


def expression_stages(config: ModelConfig, networks: nn.ModuleDict, make: Examples) -> list[Stage]:
    """Pictures and coefficients -> codes -> modulation."""
    encoder, controller = networks["encoder"], networks["controller"]
    states = [make.normal(1, *shape) for shape in controller.state_shapes()]
    side = config.expression.image_size
    return [
        Stage(
            "expression_encoder", Call(encoder, encoder.forward), (make.pictures(EXAMPLE_BATCH, 3, side, side),),
            ["image"], ["code"], {"image": {0: "B"}},
        ),
        Stage(
            "arkit_encoder", networks["arkit"], (make.coefficients(EXAMPLE_BATCH),),
            ["coefficients"], ["code"], {"coefficients": {0: "B"}},
        ),
        Stage(
            "expression_controller", ControllerStage(controller), (make.codes(EXAMPLE_FRAMES), *states),
            ["codes", *(f"state_in.{i}" for i in range(len(states)))],
            ["expression_modulation", *(f"state_out.{i}" for i in range(len(states)))],
            {"codes": {1: "4*N"}},
        ),
    ]  # fmt: skip


def time_embed(dit: WanDiT) -> nn.Module:
    """timesteps [B,F] -> temb, timestep_proj."""
    part = only(dit, "time_embedding", "time_projection")
    return Call(part, part.embed_time)


def stages_of(model: FactorPortrait) -> list[Stage]:
    """Every row of DESIGN.md's stage table, in its order; a checkpoint with text has `text_embed` in addition."""
    # Here, because that module imports this one.
    from factorportrait.export.models.vae_stages import vae_stages

    config, make, dit = model.config, Examples(model), model.dit
    conditions = condition_inputs(model, EXAMPLE_FRAMES)
    stages = vae_stages(model.vae, config.height, config.width) + expression_stages(config, model.expression, make)
    stages += [
        Stage(
            "condition_embed", ConditionStage(dit), tuple(conditions.values()),
            list(conditions), ["condition_tokens"], {name: {2: "F"} for name in conditions},
        ),
        Stage(
            "time_embed", time_embed(dit), (make.timesteps(EXAMPLE_FRAMES),),
            ["timesteps"], ["temb", "timestep_proj"], {"timesteps": {1: "F"}},
        ),
    ]  # fmt: skip
    if config.dit.text_dim is not None:
        names = [f"text_{part}.{i}" for i in range(config.dit.num_layers) for part in "kv"]
        text = make.normal(1, EXAMPLE_TEXT, config.dit.text_dim)
        stages.append(Stage("text_embed", ContextStage(dit, "text"), (text,), ["text"], names, {"text": {1: "L"}}))
    stages.append(dit_stage(model))
    if "stream" in config.generation.modes:
        stages.append(in_place_stage(model))
    for stage in stages:
        stage.module.eval()
    return stages
