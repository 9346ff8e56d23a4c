"""Every graph against torch in fp32: valid ONNX, and as close as its precision allows on inputs that the exporter never saw."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor

from factorportrait.bundle import TensorSpec
from factorportrait.errors import UserError
from factorportrait.export.activations import largest_activations
from factorportrait.export.models.factorportrait import FactorPortrait
from factorportrait.export.precision import HALF_MAX
from factorportrait.export.stages import (
    EXAMPLE_TEXT,
    DiTRange,
    Examples,
    Stage,
    condition_inputs,
    dit_inputs,
    in_place_inputs,
)
from factorportrait.export.variants import Variant

# Frames and cached frames: the reference, a first chunk, a later one, a clip. None is the exporter's example.
DIT_CASES = ((1, 0), (2, 1), (2, 7), (4, 0))
# Frames, used slots and the first slot that is written: the reference, a first chunk, one amid a full ring, its last one.
IN_PLACE_CASES = ((1, 1, 0), (2, 3, 1), (2, 7, 3), (3, 7, 4))
SEED = 1234
MISTAKE = "this is a mistake in the exporter or in ONNX Runtime"
_NUMPY = {"float32": np.float32, "float16": np.float16, "int64": np.int64}
_ORT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


@dataclass(frozen=True)
class Threshold:
    """What is let pass, and why that much.

    Attributes:
        max_relative: max|a-b| / max|b| of an output.
        max_angle: 1 - cosine between an output and torch's, which one odd element does not decide.
        min_headroom: largest number of fp16 / largest activation of the fp16 tensors inside; None where nothing is fp16.
    """

    max_relative: float
    max_angle: float
    reason: str
    min_headroom: float | None = None


@dataclass(frozen=True)
class GraphCheck:
    """Largest errors of a graph over all cases and outputs.

    Attributes:
        angle: 1 - cosine.
        headroom: largest number of fp16 / largest activation, at the longest context; None where it was not measured.
        hottest: the value inside the graph that decides the headroom.
    """

    max_abs: float
    max_relative: float
    worst_output: str
    num_cases: int
    angle: float = 0.0
    headroom: float | None = None
    hottest: str = ""

    def to_dict(self) -> dict[str, float]:
        """What the manifest keeps."""
        kept = {"max_abs": self.max_abs, "max_relative": self.max_relative, "angle": self.angle, "num_cases": self.num_cases}
        return kept if self.headroom is None else kept | {"headroom": self.headroom}

    def objection(self, limit: Threshold) -> tuple[str, str] | None:
        """What was expected and what was found, if this is not let pass."""
        if not np.isfinite(self.max_relative):
            return "finite numbers, as torch gives", f"NaN or infinite values in {self.worst_output}"
        if self.max_relative > limit.max_relative:
            return f"a relative error of at most {limit.max_relative:.1e}", f"{self.max_relative:.1e} in {self.worst_output}"
        if self.angle > limit.max_angle:
            return f"1 - cosine of at most {limit.max_angle:.1e}", f"{self.angle:.1e}"
        if limit.min_headroom and self.headroom is not None and not self.headroom >= limit.min_headroom:
            largest = HALF_MAX / self.headroom
            return f"activations below {HALF_MAX / limit.min_headroom:.0f} in fp16", f"{largest:.4g} in {self.hottest}"
        return None


def threshold(precision: str) -> Threshold:
    """The threshold of a precision, from thresholds.toml."""
    return Threshold(**tomllib.loads(Path(__file__).with_name("thresholds.toml").read_text(encoding="utf-8"))[precision])


def relative_error(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """max|a-b|, and max|a-b| / max|b|; infinite where a value is not finite or max|b| is 0 and a is not."""
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    max_abs = float(difference.max(initial=0.0))
    if not np.isfinite(found).all() or not np.isfinite(expected).all():
        return float("inf"), float("inf")
    if max_abs == 0.0:
        return 0.0, 0.0
    scale = float(np.abs(expected).max(initial=0.0))
    return max_abs, max_abs / scale if scale else float("inf")


def angle(found: np.ndarray, expected: np.ndarray) -> float:
    """1 - cosine between two arrays taken as vectors; 0 if both are zero."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms == 0.0:
        return 0.0 if np.array_equal(a, b) else 1.0
    return max(0.0, 1.0 - float(a @ b) / norms)


def check_graph(
    path: Path, stage: Stage, outputs: Sequence[TensorSpec], cases: Sequence[dict[str, Tensor]], half: Stage | None = None
) -> GraphCheck:
    """Check a graph file as ONNX, then compare it with its torch module on `cases`.

    Args:
        path: of the graph, its weights beside it.
        stage: the torch side, fp32 whatever the graph is. It gets the inputs as the graph's types round them.
        outputs: what the manifest says of the graph's outputs.
        cases: inputs by name.
        half: the module in half precision, which is compared too: ONNX Runtime's CPU kernels leave out much of the rounding
            that a GPU does, torch does it after every operator.

    Raises:
        UserError: the graph is no valid ONNX, or an output has another type or size than said.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(
            f"stage {stage.name}", expected="a valid ONNX graph", found=str(error), action=f"{MISTAKE}: report it"
        ) from error
    session = _session(path)
    types = {value.name: _ORT_TYPES[value.type] for value in session.get_inputs()}
    max_abs = worst = max_angle = 0.0
    worst_output = outputs[0].name
    for case in cases:
        feeds = {name: np.ascontiguousarray(case[name].numpy().astype(types[name])) for name in stage.input_names}
        expected = _run(stage, [torch.from_numpy(feeds[name]).to(case[name].dtype) for name in stage.input_names])
        judged = [session.run(stage.output_names, feeds)]
        for spec, a, b in zip(outputs, judged[0], expected, strict=True):
            _check_spec(stage.name, spec, a, b)
        if half is not None:
            judged.append(_run(half, [torch.from_numpy(feeds[name]) for name in half.input_names]))
        for found in judged:
            for spec, a, b in zip(outputs, found, expected, strict=True):
                absolute, relative = relative_error(a, b)
                max_abs = max(max_abs, absolute)
                if relative >= worst:
                    worst, worst_output = relative, spec.name
                if np.isfinite(relative):
                    max_angle = max(max_angle, angle(a, b))
    return GraphCheck(max_abs, worst, worst_output, len(cases), max_angle)


@torch.no_grad()
def _run(stage: Stage, args: Sequence[Tensor]) -> list[np.ndarray]:
    found = stage.module(*args)
    return [tensor.numpy() for tensor in ([found] if isinstance(found, Tensor) else found)]


def check_variant(path: Path, variant: Variant, outputs: Sequence[TensorSpec], cases: Cases, limit: Threshold) -> GraphCheck:
    """`check_graph` on the stage's cases and, where the limit asks for it, the room that fp16 leaves at the longest context."""
    stage = variant.stage
    check = check_graph(path, stage, outputs, cases.of(stage), variant.half)
    if limit.min_headroom is None:
        return check
    feeds = [{name: np.ascontiguousarray(case[name].numpy()) for name in stage.input_names} for case in cases.longest(stage)]
    sizes = largest_activations(path, feeds)
    if not sizes:
        return check
    # A NaN is the worst of all: it sorts nowhere.
    hottest = max(sizes, key=lambda name: np.nan_to_num(sizes[name], nan=np.inf))
    return dataclasses.replace(check, headroom=HALF_MAX / sizes[hottest] if sizes[hottest] else None, hottest=hottest)


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _check_spec(stage: str, spec: TensorSpec, found: np.ndarray, expected: np.ndarray) -> None:
    fits = len(spec.shape) == found.ndim and all(
        isinstance(said, str) or said == size for said, size in zip(spec.shape, found.shape, strict=True)
    )
    if not fits or found.shape != expected.shape or found.dtype != _NUMPY[spec.dtype]:
        raise UserError(
            f"stage {stage}", expected=f"{spec.describe()}, as torch gives {list(expected.shape)}",
            found=f"{found.dtype} {list(found.shape)}", action=f"{MISTAKE}: report it",
        )  # fmt: skip


def padded(stage: Stage, case: dict[str, Tensor]) -> dict[str, Tensor]:
    """A case whose caches are as large as the stage has them, zeros behind what is used."""
    capacity = getattr(stage.module, "capacity", None)
    if capacity is None:
        return case
    examples = zip(stage.input_names, stage.args, strict=True)
    rows = {name: example.shape[2] for name, example in examples if name.startswith("cache_")}
    return {
        name: F.pad(tensor, (0, 0, 0, rows[name] - tensor.shape[2])) if name in rows else tensor for name, tensor in case.items()
    }


class Cases:
    """Inputs to check with: pictures, the latents that the VAE makes of them, and sizes other than the exporter's."""

    def __init__(self, model: FactorPortrait, seed: int = SEED):
        self.model, self.make = model, Examples(model, seed)
        self._latents: Tensor | None = None

    def of(self, stage: Stage) -> list[dict[str, Tensor]]:
        """The cases of a stage of `stages_of`, or of a range of blocks."""
        if isinstance(stage.module, DiTRange) and stage.name != "dit":
            return list(self._dit_range(stage))
        if stage.name == "dit_inplace" and (capacity := stage.module.capacity) is not None:
            fitting = [sizes for sizes in IN_PLACE_CASES if sizes[1] <= capacity]
            return [padded(stage, case) for case in self._dit_inplace(fitting)] + self.longest(stage)
        return list(getattr(self, f"_{stage.name}")())

    def longest(self, stage: Stage) -> list[dict[str, Tensor]]:
        """The cases with the most frames and cached frames that a run can have; all cases where sizes are fixed or free."""
        generation = self.model.config.generation
        chunk, slots = generation.chunk_frames, 1 + generation.window_frames
        if stage.name == "dit":
            sizes = [(chunk, slots - chunk)] if "stream" in generation.modes else []
            sizes += [(1 + generation.max_clip_frames, 0)] if "clip" in generation.modes else []
            return list(self._dit(sizes))
        if stage.name == "dit_inplace":
            return [padded(stage, case) for case in self._dit_inplace([(chunk, slots, slots - chunk)])]
        return self.of(stage)

    def clip(self, frames: int) -> Tensor:
        """[1,3,T,H,W] in -1..1: one smooth picture that drifts into another, with noise."""
        config = self.model.config
        start, end = (self.make.pictures(1, 3, 1, config.height, config.width) for _ in range(2))
        share = torch.linspace(0, 1, frames).view(1, 1, -1, 1, 1)
        noise = 0.02 * self.make.normal(1, 3, frames, config.height, config.width)
        return (start * (1 - share) + end * share + noise).clamp(-1, 1)

    def latents(self, frames: int) -> Tensor:
        """[1,C,F,h,w] of the clip's VAE latents, some noise added, as a step of the sampler sees them."""
        if self._latents is None:
            with torch.no_grad():
                self._latents = self.model.vae.encode(self.clip(1 + self.model.config.vae.temporal_stride))
        clean = torch.cat([self._latents] * -(-frames // 2), dim=2)[:, :, :frames]
        return 0.6 * clean + 0.4 * self.make.normal(*clean.shape)

    @torch.no_grad()
    def _vae(self, direction: str, pieces: list[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The pieces of a clip with the caches that torch has before each."""
        name = {"encode": "frames", "decode": "latents"}[direction]
        _, caches = getattr(self.model.vae, f"{direction}_first")(pieces[0])
        for piece in pieces[1:]:
            yield {name: piece, **{f"cache_in.{i}": cache for i, cache in enumerate(caches)}}
            _, caches = getattr(self.model.vae, f"{direction}_steady")(piece, caches)

    def _vae_encode_first(self) -> Iterator[dict[str, Tensor]]:
        yield {"frames": self.clip(1)}
        yield {"frames": self.clip(1).flip(-1)}

    def _vae_encode_steady(self) -> Iterator[dict[str, Tensor]]:
        stride = self.model.config.vae.temporal_stride
        clip = self.clip(1 + 2 * stride)
        yield from self._vae("encode", [clip[:, :, :1], *clip[:, :, 1:].split(stride, dim=2)])

    def _vae_decode_first(self) -> Iterator[dict[str, Tensor]]:
        yield {"latents": self.latents(1)}
        yield {"latents": self.make.latents(1)}

    def _vae_decode_steady(self) -> Iterator[dict[str, Tensor]]:
        yield from self._vae("decode", list(self.latents(3).split(1, dim=2)))

    def _expression_encoder(self) -> Iterator[dict[str, Tensor]]:
        side = self.model.config.expression.image_size
        for batch in (1, 3):
            yield {"image": self.make.pictures(batch, 3, side, side)}

    def _arkit_encoder(self) -> Iterator[dict[str, Tensor]]:
        yield {"coefficients": torch.zeros_like(self.make.coefficients(1))}
        yield {"coefficients": self.make.coefficients(4)}

    @torch.no_grad()
    def _expression_controller(self) -> Iterator[dict[str, Tensor]]:
        controller = self.model.expression["controller"]
        for frames in (1, 4):
            codes = self.make.codes(frames)
            state = controller.initial_state(codes[:, 0])
            yield {"codes": codes, **{f"state_in.{i}": tensor for i, tensor in enumerate(state)}}

    def _condition_embed(self) -> Iterator[dict[str, Tensor]]:
        for frames in (1, 2, 4):
            yield self._conditions(frames)

    def _conditions(self, frames: int) -> dict[str, Tensor]:
        inputs = condition_inputs(self.model, frames, SEED + frames)
        for name in ("reference_latents", "pose_latents"):
            inputs[name] = torch.where(inputs[name] == 0, inputs[name], self.latents(frames))
        return inputs

    def _time_embed(self) -> Iterator[dict[str, Tensor]]:
        yield {"timesteps": torch.zeros(1, 1)}
        yield {"timesteps": torch.tensor([[1000.0, 999.0, 937.5, 500.0]])}

    def _text_embed(self) -> Iterator[dict[str, Tensor]]:
        yield {"text": self.make.normal(1, EXAMPLE_TEXT + 4, self.model.config.dit.text_dim)}

    def _dit(self, sizes: Sequence[tuple[int, int]] = DIT_CASES) -> Iterator[dict[str, Tensor]]:
        for frames, past in sizes:
            noise, conditions = self.latents(frames), self._conditions(frames)
            yield dit_inputs(self.model, frames, past, SEED + frames, noise, conditions)

    def _dit_inplace(self, sizes: Sequence[tuple[int, int, int]] = IN_PLACE_CASES) -> Iterator[dict[str, Tensor]]:
        for frames, used, first in sizes:
            given = {"noise_latents": self.latents(frames), "conditions": self._conditions(frames)}
            yield in_place_inputs(self.model, frames, used, first, SEED + frames, **given)

    @torch.no_grad()
    def _dit_range(self, stage: Stage) -> Iterator[dict[str, Tensor]]:
        for inputs in self._dit():
            if stage.module.start:
                before = type(stage.module)(self.model.dit, 0, stage.module.start)
                inputs["hidden_states"] = before(*(inputs[name] for name in before.input_names))[0]
            yield inputs
