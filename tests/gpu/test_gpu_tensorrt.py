"""TensorRT on a GPU: each stage's plan against ONNX Runtime, and what goes wrong with plans, sizes and memory."""

from __future__ import annotations

import numpy as np
import pytest

from factorportrait.bundle import Bundle
from factorportrait.engines.base import allocate, run_once, tensor_shape
from factorportrait.engines.choose import obstacle
from factorportrait.errors import UserError

# Relative to the largest number, of one evaluation in fp16 against fp32.
LIMIT = 1e-2
SIZES = [{"B": 1, "N": 1, "F": 1, "P": 0}, {"B": 3, "N": 2, "F": 2, "P": 4}, {"B": 4, "N": 9, "F": 10, "P": 0}]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def open_tensorrt(tiny_fp16_bundle, plans):
    bundle = Bundle(tiny_fp16_bundle)
    if against := obstacle("tensorrt", bundle):
        pytest.skip(f"tensorrt needs {against.expected}, found: {against.found}")

    def opened(**options):
        from factorportrait.engines.tensorrt.engine import TensorRTEngine

        return TensorRTEngine(bundle, **{"plans": plans, **options})

    return opened


def drawn(spec, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a stage of these sizes."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for tensor in spec.inputs:
        shape = tensor_shape(tensor, sizes)
        if tensor.dtype == "int64":
            arrays[tensor.name] = np.arange(shape[0]) if tensor.name != "write_index" else np.zeros(1, np.int64)
        else:
            arrays[tensor.name] = generator.standard_normal(shape).astype(tensor.dtype)
    return arrays


def test_every_stage_equals_onnx_runtime(open_tensorrt, open_on):
    engine, reference = open_tensorrt(), open_on("onnxruntime-cpu").engine
    seen = []
    for name in engine.bundle.manifest.target_stages("tensorrt"):
        if name == "dit_inplace":
            continue  # its graphs for the CPU and for TensorRT take caches of other sizes; sessions compare it
        for sizes in SIZES:
            arrays = drawn(engine.load(name).spec, sizes)
            wide = {tensor.name: arrays[tensor.name].astype(tensor.dtype) for tensor in reference.load(name).spec.inputs}
            found, expected = run_once(engine, name, arrays), run_once(reference, name, wide)
            for output, right in expected.items():
                assert np.abs(found[output] - right).max() <= LIMIT * np.abs(right).max(), (name, sizes, output)
            seen.append(name)
    assert {"dit", "vae_decode_steady", "vae_encode_first", "expression_controller"} <= set(seen)


def test_plans_are_kept(open_tensorrt):
    lines: list[str] = []
    open_tensorrt().load("arkit_encoder")
    open_tensorrt(notice=lines.append).load("arkit_encoder")
    assert lines == []


def test_a_plan_that_does_not_load_is_built_again(open_tensorrt, tmp_path):
    engine = open_tensorrt(plans=tmp_path)
    engine.load("arkit_encoder")
    (file,) = tmp_path.glob("arkit_encoder-*/plan.engine")
    content = bytearray(file.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    file.write_bytes(content)
    lines: list[str] = []
    engine = open_tensorrt(plans=tmp_path, notice=lines.append)
    engine.load("arkit_encoder")
    assert "TensorRT does not load it" in lines[0] and lines[1].endswith("building")
    assert run_once(engine, "arkit_encoder", {"coefficients": np.zeros((1, 52), np.float32)})["code"].any()


def test_sizes_that_the_plan_was_not_built_for(open_tensorrt):
    engine = open_tensorrt()
    arrays = drawn(engine.load("dit").spec, {"F": 3, "P": 3})
    with pytest.raises(UserError, match="expected sizes that it was built for"):
        run_once(engine, "dit", arrays)


def test_a_cache_in_place_needs_one_memory(open_tensorrt):
    engine = open_tensorrt()
    runner = engine.load("dit_inplace")
    inputs, outputs = (allocate(engine, side, {"F": 2, "S": 3}) for side in (runner.spec.inputs, runner.spec.outputs))
    with pytest.raises(ValueError, match="must be bound to the memory of cache_k.0"):
        runner.bind(inputs, outputs)


@pytest.mark.parametrize("eager", [True, False])
def test_calls_share_scratch_memory(open_tensorrt, eager):
    """A captured call is right after another stage has made the scratch memory grow and has used it."""
    engine = open_tensorrt(eager=eager)
    arrays = {name: drawn(engine.load(name).spec, SIZES[0]) for name in ("arkit_encoder", "vae_decode_first")}
    inputs, calls, results = {}, {}, {}
    for name, given in arrays.items():
        spec = engine.load(name).spec
        inputs[name], results[name] = (allocate(engine, side, SIZES[0]) for side in (spec.inputs, spec.outputs))
        for tensor, array in given.items():
            engine.copy(array, inputs[name][tensor])
        calls[name] = engine.load(name).bind(inputs[name], results[name])
    answers = []
    for _ in range(4):
        for name in calls:
            calls[name]()
        code = engine.mirror(results["arkit_encoder"]["code"])
        engine.copy(results["arkit_encoder"]["code"], code)
        answers.append(code.copy())
    assert answers[0].any() and all(np.array_equal(answer, answers[0]) for answer in answers)


def test_a_version_compatible_plan_runs(open_tensorrt):
    from factorportrait.engines.tensorrt.plans import Options

    arrays = {"coefficients": np.full((1, 52), 0.5, np.float32)}
    found = run_once(open_tensorrt(options=Options(version_compatible=True)), "arkit_encoder", arrays)["code"]
    expected = run_once(open_tensorrt(), "arkit_encoder", arrays)["code"]
    assert np.abs(found - expected).max() <= LIMIT * np.abs(expected).max()
