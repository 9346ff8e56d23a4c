"""Every test here needs an NVIDIA GPU, and says what is missing where it is skipped. See benchmarks/gpu.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from factorportrait.engines.choose import obstacle
from factorportrait.engines.tensorrt.machine import find_gpu

HERE = Path(__file__).parent
GPU = find_gpu()


def pytest_collection_modifyitems(items):
    """Marks the tests of this folder, and skips them without a GPU."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if isinstance(GPU, str):
                item.add_marker(pytest.mark.skip(reason=f"no NVIDIA GPU: {GPU}"))


@pytest.fixture(scope="session")
def open_on(tiny_bundle, tiny_fp16_bundle, tiny_checkpoint, tmp_path_factory):
    """(engine, precision, eager) -> an open bundle, or skip with what is missing."""
    from factorportrait.bundle import Bundle
    from factorportrait.runtime.session import OpenBundle

    plans, kept = tmp_path_factory.mktemp("plans"), {}

    def make(name: str, precision: str, eager: bool):
        bundle = Bundle({"fp32": tiny_bundle, "fp16": tiny_fp16_bundle}[precision])
        if against := obstacle(name, bundle):
            pytest.skip(f"{name} needs {against.expected}, found: {against.found}")
        if name == "onnxruntime-cpu":
            from factorportrait.engines.ort import OrtEngine

            engine = OrtEngine(bundle, eager=eager)
        elif name == "onnxruntime-cuda":
            from factorportrait.engines.ort_cuda import OrtCudaEngine

            engine = OrtCudaEngine(bundle, graphs=not eager)
        elif name == "tensorrt":
            from factorportrait.engines.tensorrt.engine import TensorRTEngine

            engine = TensorRTEngine(bundle, eager=eager, plans=plans)
        else:
            import torch

            from factorportrait.engines.pytorch import TorchEngine

            if not torch.cuda.is_available():
                pytest.skip("this torch has no CUDA")
            engine = TorchEngine(bundle, tiny_checkpoint, device="cuda:0", eager=eager)
        return OpenBundle(bundle, engine)

    def opened(name: str, precision: str = "fp32", eager: bool = True):
        key = name, precision, eager
        if key not in kept:
            kept[key] = make(*key)
        return kept[key]

    return opened
