"""What the machine can do at best: matrix products by data type, and copying. Measured, not looked up.

Products run in the libraries that the rows use: ONNX Runtime for fp32 and int8, PyTorch for fp32 and bf16; the faster one counts.
The result is an upper bound for a stage only as far as these libraries' products are the fastest of this machine.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import numpy as np

from factorportrait.benchmarks.schema import Limits

SIDE, QUICK_SIDE = 1536, 768
COPY_BYTES, QUICK_COPY_BYTES = 512 * 2**20, 192 * 2**20
ROUNDS, QUICK_ROUNDS = 7, 3
GPU_SIDE = 8192


def measure_limits(threads: int, quick: bool = False) -> Limits:
    """Limits of the CPU with so many threads. Run it in a process of its own: thread pools stay."""
    side, rounds = (QUICK_SIDE, QUICK_ROUNDS) if quick else (SIDE, ROUNDS)
    rates: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, make in PRODUCTS:
        kind = name.split()[0]
        try:
            product = make(side, threads)
        except Exception as error:  # whatever a library says when it has no kernel
            missing.setdefault(kind, f"{name}: {_first_line(error)}")
            continue
        rates[kind] = max(rates.get(kind, 0.0), 2 * side**3 / best_seconds(product, rounds))
    missing = {kind: reason for kind, reason in missing.items() if kind not in rates}
    return Limits("cpu", threads, rates, _copy_rate(QUICK_COPY_BYTES if quick else COPY_BYTES, threads, rounds), missing)


def best_seconds(function: Callable[[], object], rounds: int, wait: Callable[[], object] = lambda: None) -> float:
    """The shortest of `rounds` runs after one for warming up: what disturbs a run only makes it longer."""
    function()
    wait()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter_ns()
        function()
        wait()
        best = min(best, 1e-9 * (time.perf_counter_ns() - start))
    return best


def _torch_product(dtype: str):
    def make(side: int, threads: int) -> Callable[[], object]:
        import torch

        torch.set_num_threads(threads)
        left, right = (torch.randn(side, side).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(left)
        return lambda: torch.mm(left, right, out=out)

    return make


def _ort_product(op: str, dtype: type):
    def make(side: int, threads: int) -> Callable[[], object]:
        import onnx
        from onnx import TensorProto, helper

        from factorportrait.engines.ort import session_options

        rng = np.random.default_rng(0)
        if dtype is np.float32:
            left, right = (rng.standard_normal((side, side), np.float32) for _ in range(2))
        else:
            # Weights signed, activations unsigned: the form that x86 has instructions for.
            left, right = rng.integers(0, 255, (side, side), np.uint8), rng.integers(-127, 127, (side, side), np.int8)
        kind = TensorProto.FLOAT if dtype is np.float32 else TensorProto.UINT8
        result = TensorProto.FLOAT if dtype is np.float32 else TensorProto.INT32
        graph = helper.make_graph(
            [helper.make_node(op, ["x", "w"], ["y"])], "product", [helper.make_tensor_value_info("x", kind, [side, side])],
            [helper.make_tensor_value_info("y", result, [side, side])], [onnx.numpy_helper.from_array(right, "w")],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        import onnxruntime

        session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
        )
        return lambda: session.run(None, {"x": left})

    return make


PRODUCTS = (
    ("fp32 in ONNX Runtime", _ort_product("MatMul", np.float32)),
    ("fp32 in PyTorch", _torch_product("float32")),
    ("bf16 in PyTorch", _torch_product("bfloat16")),
    ("int8 in ONNX Runtime", _ort_product("MatMulInteger", np.int8)),
)


def _copy_rate(num_bytes: int, threads: int, rounds: int) -> float:
    """Bytes read and written a second."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
        source, target = torch.ones(num_bytes // 4), torch.zeros(num_bytes // 4)
        return 2 * num_bytes / best_seconds(lambda: target.copy_(source), rounds)
    source, target = np.ones(num_bytes // 4, np.float32), np.zeros(num_bytes // 4, np.float32)
    return 2 * num_bytes / best_seconds(lambda: np.copyto(target, source), rounds)


def measure_gpu_limits(quick: bool = False) -> Limits | None:
    """Limits of the first GPU by PyTorch; None where PyTorch sees none."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    rounds, side, wait = QUICK_ROUNDS if quick else ROUNDS, GPU_SIDE, torch.cuda.synchronize
    rates, missing = {}, {}
    torch.backends.cuda.matmul.allow_tf32 = False
    for kind, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        left, right = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
        rates[kind] = 2 * side**3 / best_seconds(lambda a=left, b=right: a @ b, rounds, wait)
    try:
        left, right = (torch.randint(-127, 127, (side, side), dtype=torch.int8, device="cuda") for _ in range(2))
        rates["int8"] = 2 * side**3 / best_seconds(lambda: torch._int_mm(left, right.t()), rounds, wait)
    except RuntimeError as error:
        missing["int8"] = _first_line(error)
    source, target = (torch.zeros(2**28, device="cuda") for _ in range(2))
    copy = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), rounds, wait)
    return Limits(torch.cuda.get_device_name(), 0, rates, copy, missing)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
