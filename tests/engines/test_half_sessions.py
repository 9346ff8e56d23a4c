"""Sessions in half precision: buffers follow the types of the graphs, and the graphs made for TensorRT run in the same loop."""

from __future__ import annotations

import numpy as np
import pytest
from engine_sessions import latents_and_pictures

from factorportrait.bundle import Bundle
from factorportrait.engines.ort import OrtEngine
from factorportrait.engines.pytorch import TorchEngine
from factorportrait.runtime.session import OpenBundle

STREAM = {"mode": "stream", "chunk_frames": 2, "window_frames": 4, "steps": 2, "seed": 3}
# max|a-b| / max|b| of latents after two steps: rounding is 5e-4 in float16 and 4e-3 in bfloat16, and adds up over blocks and steps.
LIMITS = {"float16": 2e-2, "bfloat16": 1e-1}


@pytest.fixture(scope="module")
def half(tiny_fp16_bundle):
    return Bundle(tiny_fp16_bundle)


@pytest.fixture(scope="module")
def expected(tiny_bundle):
    bundle = Bundle(tiny_bundle)
    return latents_and_pictures(OpenBundle(bundle, OrtEngine(bundle, threads=1)), 29, cache="concat", **STREAM)[0]


def error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


class OrtEngineOfTensorRTGraphs(OrtEngine):
    """ONNX Runtime on the CPU with the graphs that are exported for TensorRT: checks those graphs and the loop, not TensorRT."""

    target = "tensorrt"


@pytest.mark.parametrize("engine", [OrtEngine, OrtEngineOfTensorRTGraphs])
@pytest.mark.parametrize("cache", ["inplace", "concat"])
def test_half_graphs_stream(half, expected, engine, cache):
    opened = OpenBundle(half, engine(half, threads=1))
    session = opened.session(cache=cache, **STREAM)
    memory = session._denoiser.cache._memory[0]
    assert {str(buffer.dtype) for buffer in memory.values()} == {"float16"}
    latents, _ = latents_and_pictures(opened, 29, session=session)
    assert 0 < error(latents, expected) <= LIMITS["float16"]


def test_the_cache_for_tensorrt_has_the_size_of_the_graph(half):
    """A window of two latent frames in a graph for five: the rest of the memory is there and is not attended to."""
    opened = OpenBundle(half, OrtEngineOfTensorRTGraphs(half, threads=1))
    narrow, right = {**STREAM, "window_frames": 2}, OpenBundle(half, OrtEngine(half, threads=1))
    session = opened.session(cache="inplace", **narrow)
    slots = {buffer.shape[1] for buffer in session._denoiser.cache._memory[0].values()}
    assert slots == {1 + half.config.generation.window_frames}
    (found, _), (expected, _) = (latents_and_pictures(each, 29, cache="inplace", **narrow) for each in (opened, right))
    assert error(found, expected) <= LIMITS["float16"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_in_half_precision(tiny_bundle, tiny_checkpoint, expected, dtype):
    bundle = Bundle(tiny_bundle)
    opened = OpenBundle(bundle, TorchEngine(bundle, tiny_checkpoint, device="cpu", dtype=dtype, threads=1))
    session = opened.session(cache="inplace", **STREAM)
    assert {str(buffer.dtype) for buffer in session._denoiser.cache._memory[0].values()} == {f"torch.{dtype}"}
    latents, _ = latents_and_pictures(opened, 29, session=session)
    assert 0 < error(latents, expected) <= LIMITS[dtype]
