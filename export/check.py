"""Every graph against torch: valid ONNX, and equal in ONNX Runtime on inputs that the exporter never saw."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from factorportrait.bundle import TensorSpec
from factorportrait.errors import UserError
from factorportrait.export.models.factorportrait import FactorPortrait
from factorportrait.export.stages import (
    EXAMPLE_TEXT,
    DiTRange,
    Examples,
    Stage,
    condition_inputs,
    dit_inputs,
    in_place_inputs,
)

# Frames and cached frames: the reference, a first chunk, a later one, a clip. None is the exporter's example.
DIT_CASES = ((1, 0), (2, 1), (2, 7), (4, 0))
# Frames, used slots and the first slot that is written: the reference, a first chunk, one amid a full ring, its last one.
IN_PLACE_CASES = ((1, 1, 0), (2, 3, 1), (2, 7, 3), (3, 7, 4))
SEED = 1234
MISTAKE = "this is a mistake in the exporter or in ONNX Runtime"
_NUMPY = {"float32": np.float32, "float16": np.float16, "int64": np.int64}


@dataclass(frozen=True)
class Threshold:
    """The error that is let pass, and why that one."""

    max_relative: float
    reason: str


@dataclass(frozen=True)
class GraphCheck:
    """Largest errors of a graph over all cases and outputs."""

    max_abs: float
    max_relative: float
    worst_output: str
    num_cases: int

    def to_dict(self) -> dict[str, float]:
        """What the manifest keeps."""
        return {"max_abs": self.max_abs, "max_relative": self.max_relative, "num_cases": self.num_cases}


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


def check_graph(
    path: Path, stage: Stage, outputs: Sequence[TensorSpec], cases: Sequence[dict[str, Tensor]], limit: Threshold
) -> GraphCheck:
    """Check a graph file as ONNX, then against its torch module on `cases`.

    Args:
        path: of the graph, its weights beside it.
        stage: the torch side.
        outputs: what the manifest says of the graph's outputs.
        cases: inputs by name.
        limit: the error that is let pass.

    Raises:
        UserError: the graph is no valid ONNX, an output has another type or size than said, or differs by more than `limit`.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(
            f"stage {stage.name}", expected="a valid ONNX graph", found=str(error), action=f"{MISTAKE}: report it"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = GraphCheck(0.0, 0.0, outputs[0].name, len(cases))
    for case in cases:
        with torch.no_grad():
            expected = stage.module(*(case[name] for name in stage.input_names))
        expected = [expected] if isinstance(expected, Tensor) else list(expected)
        feeds = {name: np.ascontiguousarray(case[name].numpy()) for name in stage.input_names}
        found = session.run(stage.output_names, feeds)
        for spec, a, b in zip(outputs, found, (tensor.numpy() for tensor in expected), strict=True):
            _check_spec(stage.name, spec, a, b)
            max_abs, max_relative = relative_error(a, b)
            if not max_relative <= limit.max_relative:
                sizes = ", ".join(f"{name} {list(case[name].shape)}" for name in stage.input_names[:2])
                raise UserError(
                    f"stage {stage.name}: {spec.name} differs from torch with {sizes}",
                    expected=f"a relative error of at most {limit.max_relative:.1e}", found=f"{max_relative:.1e}",
                    action=f"{MISTAKE}: report it with these numbers",
                )  # fmt: skip
            if max_relative >= worst.max_relative:
                worst = GraphCheck(max(max_abs, worst.max_abs), max_relative, spec.name, len(cases))
            elif max_abs > worst.max_abs:
                worst = GraphCheck(max_abs, worst.max_relative, worst.worst_output, len(cases))
    return worst


def _check_spec(stage: str, spec: TensorSpec, found: np.ndarray, expected: np.ndarray) -> None:
    fits = len(spec.shape) == found.ndim and all(
        isinstance(said, str) or said == size for said, size in zip(spec.shape, found.shape, strict=True)
    )
    if not fits or found.shape != expected.shape or found.dtype != _NUMPY[spec.dtype]:
        raise UserError(
            f"stage {stage}", expected=f"{spec.describe()}, as torch gives {list(expected.shape)}",
            found=f"{found.dtype} {list(found.shape)}", action=f"{MISTAKE}: report it",
        )  # fmt: skip


class Cases:
    """Inputs to check with: pictures, the latents that the VAE makes of them, and sizes other than the exporter's."""

    def __init__(self, model: FactorPortrait, seed: int = SEED):
        self.model, self.make = model, Examples(model, seed)
        self._latents: Tensor | None = None

    def of(self, stage: Stage) -> list[dict[str, Tensor]]:
        """The cases of a stage of `stages_of`, or of a range of blocks."""
        if isinstance(stage.module, DiTRange) and stage.name != "dit":
            return list(self._dit_range(stage))
        return list(getattr(self, f"_{stage.name}")())

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

    def _dit(self) -> Iterator[dict[str, Tensor]]:
        for frames, past in DIT_CASES:
            noise, conditions = self.latents(frames), self._conditions(frames)
            yield dit_inputs(self.model, frames, past, SEED + frames, noise, conditions)

    def _dit_inplace(self) -> Iterator[dict[str, Tensor]]:
        for frames, used, first in IN_PLACE_CASES:
            given = {"noise_latents": self.latents(frames), "conditions": self._conditions(frames)}
            yield in_place_inputs(self.model, frames, used, first, SEED + frames, **given)

    @torch.no_grad()
    def _dit_range(self, stage: Stage) -> Iterator[dict[str, Tensor]]:
        for inputs in self._dit():
            if stage.module.start:
                before = type(stage.module)(self.model.dit, 0, stage.module.start)
                inputs["hidden_states"] = before(*(inputs[name] for name in before.input_names))[0]
            yield inputs
