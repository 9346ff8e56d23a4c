"""Small graphs through TensorRT's parser and builder. Needs `import tensorrt`, no GPU where the build-only one is installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from plan_bundles import ENCODER, MACHINE, write_bundle

from factorportrait.bundle import Bundle, StageSpec, TensorSpec
from factorportrait.engines.tensorrt import machine
from factorportrait.engines.tensorrt.build import Progress, build_plans
from factorportrait.engines.tensorrt.plans import Options, PlanStore
from factorportrait.errors import UserError
from factorportrait.export.cli import main

tensorrt = pytest.importorskip("tensorrt", reason="no TensorRT here, so no graph is compiled", exc_type=ImportError)
HERE = replace(MACHINE, tensorrt=tensorrt.__version__)
OPSET = [helper.make_opsetid("", 23)]
REFUSED = StageSpec(
    "refused", "refused.onnx", (TensorSpec("x", "float32", (4, 4, 4)),), (TensorSpec("y", "float32", (4,)),)
)
FAST = Options(optimization_level=0)


def save(path: Path, nodes: list, inputs: dict, outputs: dict, weights: dict[str, np.ndarray], **options) -> None:
    sides = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    )
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, path.stem, *sides, initializer=tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=OPSET, ir_version=10), path, **options)


def save_encoder(folder: Path, **options) -> None:
    """Two layers: coefficients [B, 52] -> code [B, 16]."""
    generator = np.random.default_rng(0)
    weights = {
        "w0": generator.standard_normal((52, 128), np.float32), "w1": generator.standard_normal((128, 16), np.float32)
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["coefficients", "w0"], ["hidden"]), helper.make_node("Tanh", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "w1"], ["code"]),
    ]  # fmt: skip
    save(folder / ENCODER.file, nodes, {"coefficients": ["B", 52]}, {"code": ["B", 16]}, weights, **options)


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    save_encoder(tmp_path / "bundle")
    return Bundle(write_bundle(tmp_path / "bundle", (ENCODER,)))


@pytest.fixture
def store(tmp_path) -> PlanStore:
    return PlanStore(tmp_path / "plans")


def names(store: PlanStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_build_and_reuse(bundle, store):
    steps: list[Progress] = []
    lines: list[str] = []
    ((plan, built),) = build_plans(bundle, store, HERE, FAST, on_progress=steps.append, notice=lines.append)
    assert built and plan.bytes > 0 and lines == ["plan of arkit_encoder: no plan yet; building"]
    fractions = [step.fraction for step in steps]
    assert fractions == sorted(fractions) and 0 < fractions[-1] <= 1 and steps[-1].phase
    assert names(store) == [plan.folder.name, "build.lock", store.timing_cache(HERE).name]  # no log of a build that went well
    ((again, built),) = build_plans(bundle, store, HERE, FAST, notice=lines.append)
    assert not built and again == plan and len(lines) == 1


def test_weights_beside_the_graph(tmp_path, store):
    folder = tmp_path / "bundle"
    save_encoder(folder, save_as_external_data=True, location="shared.data", size_threshold=0)
    spec = replace(ENCODER, data=("shared.data",))
    assert (folder / "shared.data").stat().st_size > 20_000
    bundle = Bundle(write_bundle(folder, (spec,)))
    ((plan, _),) = build_plans(bundle, store, HERE, FAST)
    assert plan.bytes > 20_000
    (folder / "shared.data").unlink()
    with pytest.raises(UserError, match="arkit_encoder.onnx; expected a graph that TensorRT's parser takes"):
        build_plans(bundle, store, HERE, FAST, again=True)
    assert plan.file.exists()  # what was there stays


def test_a_graph_that_the_parser_refuses(tmp_path, store):
    nodes = [
        helper.make_node("Det", ["x"], ["first"], name="block_0_det"),
        helper.make_node("Det", ["x"], ["second"], name="block_1_det"),
        helper.make_node("Add", ["first", "second"], ["y"]),
    ]
    save(tmp_path / "bundle" / REFUSED.file, nodes, {"x": [4, 4, 4]}, {"y": [4]}, {})
    bundle = Bundle(write_bundle(tmp_path / "bundle", (REFUSED,)))
    with pytest.raises(UserError) as caught:
        build_plans(bundle, store, HERE, FAST)
    message = str(caught.value)
    assert "refused.onnx; expected a graph that TensorRT's parser takes; found Det block_0_det: " in message
    assert " and 1 more errors; " in message and "fp-export CHECKPOINT --target tensorrt" in message and "\n" not in message
    (log,) = store.folder.glob("refused-*.log")
    assert str(log) in message and "block_1_det" in log.read_text()
    assert store.plans() == []


def test_a_file_that_is_no_graph(bundle, store):
    (bundle.path / ENCODER.file).write_bytes(b"\x08no graph")
    with pytest.raises(UserError, match="expected a graph that TensorRT's parser takes"):
        build_plans(bundle, store, HERE, FAST)


def test_a_truncated_timing_cache_is_discarded(bundle, store):
    build_plans(bundle, store, HERE, FAST)
    cache = store.timing_cache(HERE)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:40])
    lines: list[str] = []
    ((_, built),) = build_plans(bundle, store, HERE, FAST, again=True, notice=lines.append)
    assert built and len(lines) == 2
    assert lines[1] == f"timing cache {cache} is truncated or no timing cache of this program; measuring again"
    assert cache.read_bytes()[32:] == whole[32:]


class Stop(Exception):
    """Stands for Ctrl-C."""


def test_an_interrupted_build_ends_its_process(bundle, store):
    def stop(progress: Progress) -> None:
        if progress.phase:
            raise Stop

    with pytest.raises(Stop):
        build_plans(bundle, store, HERE, FAST, on_progress=stop)
    assert store.plans() == [] and not [name for name in names(store) if "part" in name]
    ((_, built),) = build_plans(bundle, store, HERE, FAST)
    assert built


def test_the_command(bundle, store, monkeypatch, capsys):
    monkeypatch.setattr(machine, "probe", lambda what: HERE)
    command = ["build", str(bundle.path), "--plans", str(store.folder), "--optimization-level", "0", "--json"]
    assert main(command) == 0
    first, err = capsys.readouterr()
    report = json.loads(first)
    assert (report["gpu"], report["tensorrt"]) == (HERE.gpu, HERE.tensorrt)
    (entry,) = report["stages"]
    assert entry["built_now"] and Path(entry["file"]).stat().st_size == entry["bytes"]
    assert "plan of arkit_encoder: no plan yet; building" in err
    assert main(command) == 0
    assert not json.loads(capsys.readouterr().out)["stages"][0]["built_now"]
    assert main([*command[:-1], "--force"]) == 0
    assert "built" in capsys.readouterr().out
    assert main(["build", str(bundle.path), "--plans", str(store.folder), "--stage", "dit"]) == 2
    assert "expected a stage dit" in capsys.readouterr().err
