"""Which engine is taken and what is said when it cannot be; machines are described, nothing pretends to be a GPU."""

from __future__ import annotations

import dataclasses

import pytest

from factorportrait.bundle import Bundle
from factorportrait.engines import choose as chooser
from factorportrait.engines.choose import NAMES, Obstacle, choose, obstacle, open_engine
from factorportrait.errors import UserError
from factorportrait.runtime.session import open_bundle

NO_GPU = Obstacle("an NVIDIA GPU and its driver", "no driver", "look at nvidia-smi")


@pytest.fixture
def bundle(tiny_bundle):
    opened = Bundle(tiny_bundle)
    opened.manifest = dataclasses.replace(opened.manifest, targets=("cpu", "cuda", "tensorrt"))
    return opened


@pytest.fixture
def machine(monkeypatch):
    """Say what stands against each engine on the machine."""

    def describe(**against):
        obstacles = {name: against.get(name.replace("-", "_")) for name in NAMES}
        monkeypatch.setattr(chooser, "_MACHINE", {name: (lambda found=found: found) for name, found in obstacles.items()})

    return describe


def test_the_best_engine_that_runs_is_taken(bundle, machine):
    machine()
    assert choose(bundle).name == choose(bundle, "auto").name == "tensorrt"
    machine(tensorrt=Obstacle("the package tensorrt", "none", "install it"))
    choice = choose(bundle)
    assert choice.name == "onnxruntime-cuda" and choice.reason == "tensorrt: none"
    machine(tensorrt=NO_GPU, onnxruntime_cuda=NO_GPU)
    choice = choose(bundle)
    assert choice.name == "onnxruntime-cpu" and choice.reason == "tensorrt: no driver; onnxruntime-cuda: no driver"


def test_the_bundle_decides_too(bundle, machine):
    machine()
    bundle.manifest = dataclasses.replace(bundle.manifest, targets=("cpu",))
    assert choose(bundle).name == "onnxruntime-cpu" and "tensorrt: one for cpu" in choose(bundle).reason
    with pytest.raises(UserError, match="a bundle for tensorrt; found one for cpu; .*fp-export CHECKPOINT .*--target tensorrt"):
        choose(bundle, "tensorrt")
    bundle.manifest = dataclasses.replace(bundle.manifest, targets=("tensorrt",))
    machine(tensorrt=NO_GPU)
    with pytest.raises(UserError, match="graphs for an engine that runs here .*tensorrt: no driver.*--target cpu"):
        choose(bundle)


def test_a_forced_engine_is_not_replaced(bundle, machine, tiny_bundle):
    machine(tensorrt=NO_GPU, onnxruntime_cuda=NO_GPU, torch=Obstacle("the package torch", "none", "pip install it"))
    for name, words in (("tensorrt", "no driver"), ("onnxruntime-cuda", "no driver"), ("torch", "pip install it")):
        with pytest.raises(UserError, match=f"--engine {name}; .*{words}"):
            choose(bundle, name)
        with pytest.raises(UserError, match=f"--engine {name}"):
            open_bundle(tiny_bundle, engine=name)
    with pytest.raises(UserError, match="--engine; expected auto or tensorrt, .*found cuda; choose one of these"):
        choose(bundle, "cuda")
    assert choose(bundle, "onnxruntime-cpu").reason == "asked for"


def test_torch_is_never_taken_by_itself(bundle, machine):
    machine(tensorrt=NO_GPU, onnxruntime_cuda=NO_GPU, onnxruntime_cpu=Obstacle("onnxruntime", "a broken one", "install it"))
    with pytest.raises(UserError, match="onnxruntime-cpu: a broken one"):
        choose(bundle)


def test_this_machine_is_described_as_it_is(bundle):
    """What runs opens, and what does not says why and what to do: on any machine."""
    for name in NAMES:
        against = obstacle(name)
        assert against is None or (against.expected and against.found and against.action)
    assert obstacle("onnxruntime-cpu") is None and obstacle("torch") is None  # the tests need both
    engine, reason = open_engine(bundle, "onnxruntime-cpu", threads=1)
    assert (engine.name, reason) == ("onnxruntime-cpu", "asked for")
