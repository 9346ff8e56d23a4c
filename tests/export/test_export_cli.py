"""fp-export: bundles appear whole or not at all, and errors are one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from safetensors.torch import load_file, save_file

from factorportrait import shipped
from factorportrait.bundle import PRECISIONS, SCHEMA, TARGETS, Bundle
from factorportrait.errors import CheckpointError
from factorportrait.export import build, cli, graphs, stages, variants
from factorportrait.files import whole_folder

FAST = ("arkit_encoder", "time_embed")
HEAD = {
    "vertices": np.zeros((4, 3), np.float16), "faces": np.array([[0, 1, 2], [1, 2, 3]]),
    "weights": np.array([0, 0.5, 1, 1], np.float16), "pivot": np.zeros(3, np.float32),
}  # fmt: skip


@pytest.fixture
def two_stages(monkeypatch):
    """Only the two smallest graphs; the whole list is exported for `tiny_bundle`."""
    real = stages.stages_of
    monkeypatch.setattr(stages, "stages_of", lambda model: [stage for stage in real(model) if stage.name in FAST])


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def refused(capsys, *arguments, code: int = 2) -> str:
    assert cli.main([str(argument) for argument in arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fp-export: error: ")
    return lines[0]


def exported(capsys, *arguments) -> dict:
    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_bundle_then_up_to_date_then_changed(two_stages, copy, tmp_path, capsys):
    output = tmp_path / "bundle"
    assert cli.main([str(copy), "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "time_embed" in text and "2 graphs" in text and str(output) in text
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()}

    assert exported(capsys, copy, "--output", output)["up_to_date"] is True
    assert cli.main([str(copy), "--output", str(output)]) == 0
    assert "up to date" in capsys.readouterr().out
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()} == before

    # The same bytes when forced; other bytes for another checkpoint.
    report = exported(capsys, copy, "--output", output, "--force")
    assert report["up_to_date"] is False and report["stages"].keys() == set(FAST)
    for name, (content, _) in before.items():
        if name != "manifest.json":
            assert (output / name).read_bytes() == content, name
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"fps": 25.0}))
    np.savez(copy / "head.npz", **HEAD)
    assert exported(capsys, copy, "--output", output)["up_to_date"] is False
    bundle = Bundle(output)
    bundle.verify()
    assert bundle.config.fps == 25.0
    assert (output / "head.npz").read_bytes() == (copy / "head.npz").read_bytes()

    # A damaged bundle is made again, and one with another byte of the right size too.
    whole = (output / "time_embed.onnx").read_bytes()
    (output / "time_embed.onnx").unlink()
    assert exported(capsys, copy, "--output", output)["up_to_date"] is False
    Bundle(output).verify()
    (output / "time_embed.onnx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert exported(capsys, copy, "--output", output)["up_to_date"] is False
    assert (output / "time_embed.onnx").read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "bundle"}


def test_weights_in_second_files(two_stages, tiny_checkpoint, tmp_path):
    build.build_bundle(tiny_checkpoint, tmp_path / "bundle", external=True)
    bundle = Bundle(tmp_path / "bundle")
    assert bundle.stage("time_embed").data == ("time_embed.fp32.data",)
    bundle.verify()


def test_unknown_precision(tiny_checkpoint, capsys):
    assert build.OFFERED.keys() == set(PRECISIONS)
    line = refused(capsys, tiny_checkpoint, "--precision", "fp23")
    assert "expected fp32 or fp16" in line and "found 'fp23'" in line


@pytest.mark.parametrize("target, found", [("gpu", "gpu"), ("cpu,cudaa", "cudaa"), ("", "nothing"), ("cpu,", "nothing")])
def test_unknown_target(tiny_checkpoint, tmp_path, capsys, target, found):
    line = refused(capsys, tiny_checkpoint, f"--target={target}", "--output", tmp_path / "bundle")
    assert f"expected some of cpu, cuda, tensorrt; found {found}" in line


@pytest.mark.parametrize(("precision", "target"), [("int8", "cuda"), ("fp8", "cpu"), ("fp8", "cuda")])
def test_a_target_that_a_precision_is_not_for(tiny_checkpoint, tmp_path, capsys, precision, target):
    """Refused with the reason."""
    line = refused(capsys, tiny_checkpoint, "--precision", precision, "--target", target, "--output", tmp_path / "bundle")
    assert f"found {target}; {build.REASONS[precision, target]}" in line


def test_eight_bit_weights_are_stored_once(two_stages, tiny_checkpoint, tmp_path, capsys):
    """The graph for the CPU is fp32 and that of GPUs fp16; the integers are the same."""
    report = exported(capsys, tiny_checkpoint, "--precision", "int8-weights", "--skip-gate", "--output", tmp_path / "bundle")
    assert report["precision"] == "int8-weights" and report["target_bytes"].keys() == set(TARGETS)
    assert all(0 < check["max_relative"] < 0.15 and check["num_cases"] for check in report["stages"].values())
    bundle = Bundle(tmp_path / "bundle")
    bundle.verify()
    own, shared = bundle.stage("arkit_encoder", "tensorrt"), bundle.stage("arkit_encoder")
    assert own.file != shared.file and "arkit_encoder.int8.data" in (set(own.data) & set(shared.data))
    # A byte for each weight, and padding.
    assert bundle.manifest.files["arkit_encoder.int8.data"].bytes < 1.1 * (52 * 64 + 2 * 64 * 64 + 64 * 16) + 4096


def test_fp8_through_the_command(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    real = stages.stages_of
    monkeypatch.setattr(stages, "stages_of", lambda model: [stage for stage in real(model) if stage.name == "dit"])
    assert cli.main([str(tiny_checkpoint), "--precision", "fp8", "--output", str(tmp_path / "bundle")]) == 0
    assert "fp8 on tensorrt: compiles" in capsys.readouterr().out
    bundle = Bundle(tmp_path / "bundle")
    assert bundle.manifest.targets == ("tensorrt",)
    check = bundle.stage("dit").check
    assert 1e-3 < check["max_relative"] < 0.3 and check["headroom"] > 2 and check["num_cases"] > 0
    # Without a GPU there is nothing to verify it with, and that is said for every engine.
    monkeypatch.setattr("factorportrait.engines.choose.find_gpu", lambda: "no driver")
    line = refused(capsys, "verify", tmp_path / "bundle", "--checkpoint", tiny_checkpoint)
    assert "graphs for an engine that runs here" in line and "onnxruntime-cpu: one for tensorrt" in line


def test_targets(two_stages, tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "bundle"
    assert exported(capsys, tiny_checkpoint, "--target", "tensorrt,cpu", "--output", output)["target_bytes"].keys() == {
        "cpu", "tensorrt",
    }  # fmt: skip
    assert Bundle(output).manifest.targets == ("cpu", "tensorrt")
    assert exported(capsys, tiny_checkpoint, "--target", "cpu,tensorrt", "--output", output)["up_to_date"] is True
    assert exported(capsys, tiny_checkpoint, "--target", "all", "--output", output)["up_to_date"] is False
    assert Bundle(output).manifest.targets == TARGETS
    # Another precision is another bundle, in the same place or not.
    assert exported(capsys, tiny_checkpoint, "--precision", "fp16", "--output", output)["precision"] == "fp16"
    assert Bundle(output).manifest.precision == "fp16"


def test_a_weight_that_is_no_number(two_stages, copy, tmp_path, capsys):
    """One line, and the older bundle is left as it was."""
    output = tmp_path / "bundle"
    exported(capsys, copy, "--output", output)
    before = (output / "manifest.json").read_bytes()
    weights = load_file(copy / "dit.safetensors")
    weights["time_projection.1.bias"][5] = float("nan")
    save_file(weights, copy / "dit.safetensors")
    for precision in ("fp32", "fp16"):
        line = refused(capsys, copy, "--precision", precision, "--skip-gate", "--output", output)
        assert "time_projection.1.bias" in line and "found 1 of 384 are NaN or infinite" in line, line
    assert (output / "manifest.json").read_bytes() == before
    Bundle(output).verify()


def test_a_graph_that_gives_no_number(two_stages, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    """As an overflow on the way would."""
    real = graphs.write_graph

    def broken(model, *arguments):
        for name, value in model.graph.initializers.items():
            if name.endswith("layers.4.bias"):
                value.const_value = onnx_ir.tensor(np.full(value.shape, np.nan, value.const_value.dtype.numpy()), name=name)
        return real(model, *arguments)

    monkeypatch.setattr(graphs, "write_graph", broken)
    line = refused(capsys, tiny_checkpoint, "--precision", "fp16", "--skip-gate", "--output", tmp_path / "bundle")
    assert "stage arkit_encoder differs from torch in fp16; expected finite numbers, as torch gives; found NaN" in line
    assert list(tmp_path.iterdir()) == []


def test_fp16_says_what_it_is_for(two_stages, tiny_checkpoint, tmp_path, capsys):
    bundle = str(tmp_path / "b")
    for arguments in ([str(tiny_checkpoint), "--precision", "fp16", "--skip-gate", "--output", bundle], ["inspect", bundle]):
        assert cli.main(arguments) == 0
        assert "fp16 on cpu: half the size and no faster" in capsys.readouterr().out
    report = exported(capsys, tiny_checkpoint, "--precision", "fp16", "--target", "cuda", "--skip-gate", "--output", bundle)
    assert report["target_bytes"].keys() == {"cuda"}
    assert cli.main(["inspect", str(tmp_path / "b")]) == 0
    assert "no faster" not in capsys.readouterr().out


def test_no_checkpoint_there(tmp_path, capsys):
    assert "found nothing" in refused(capsys, tmp_path / "none", "--output", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint_leaves_nothing(copy, tmp_path, capsys):
    (copy / "dit.safetensors").write_bytes(b"")
    refused(capsys, copy, "--output", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("content", [b"", b"PK", b"text"])
def test_damaged_head(copy, tmp_path, capsys, content):
    (copy / "head.npz").write_bytes(content)
    assert "head.npz; expected a whole .npz" in refused(capsys, copy, "--output", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("vertices", None, "found no vertices"),
        ("weights", None, "found no weights"),
        ("vertices", np.zeros((4, 2)), "vertices; expected finite numbers [V, 3]; found float64 [4, 2]"),
        ("vertices", np.full((4, 3), np.nan), "vertices; expected finite numbers"),
        ("faces", np.array([[0, 1, 4]]), "faces; expected integers [F, 3] from 0 to 3; found int64 [1, 3] from 0 to 4"),
        ("faces", np.array([[0, 1, -1]]), "found int64 [1, 3] from -1 to 1"),
        ("faces", np.zeros((2, 3)), "faces; expected integers"),
        ("faces", np.zeros((0, 3), np.int32), "faces; expected integers"),
        ("weights", np.array([0, 0, 0, 1.5]), "weights; expected [4] numbers from 0 to 1; found float64 [4] from 0 to 1.5"),
        ("weights", np.zeros(3), "weights; expected [4] numbers"),
        ("pivot", np.zeros((1, 3)), "pivot; expected 3 finite numbers; found float64 [1, 3]"),
        ("pivot", np.array(["a", "b", "c"]), "pivot; expected 3 finite numbers; found <U1 [3]"),
    ],
)
def test_head_that_cannot_be_posed(tmp_path, name, value, words):
    arrays = {key: array for key, array in (HEAD | {name: value}).items() if array is not None}
    np.savez(tmp_path / "head.npz", **arrays)
    with pytest.raises(CheckpointError) as caught:
        build.check_head(tmp_path / "head.npz")
    assert words in str(caught.value) and caught.value.action
    np.savez(tmp_path / "head.npz", **HEAD)
    build.check_head(tmp_path / "head.npz")


def test_a_graph_that_differs_is_an_error(two_stages, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    real = graphs.export_stage

    def wrong(stage):
        model = real(stage)
        if stage.name == "time_embed":
            name, value = next((name, value) for name, value in model.graph.initializers.items() if name.endswith("bias"))
            value.const_value = onnx_ir.tensor(value.const_value.numpy() + 0.01, name=name)
        return model

    monkeypatch.setattr(variants, "export_stage", wrong)
    line = refused(capsys, tiny_checkpoint, "--output", tmp_path / "bundle")
    assert "stage time_embed" in line and "expected a relative error of at most 1.0e-04; found" in line
    assert list(tmp_path.iterdir()) == []
    assert cli.main([str(tiny_checkpoint), "--output", str(tmp_path / "bundle")]) == 2
    rows = [row.split() for row in capsys.readouterr().out.splitlines() if row]
    assert [row[0] for row in rows if row[-1] == "refused"] == ["time_embed"]
    assert [row[0] for row in rows if row[-1] == "passed"] == ["arkit_encoder"]


def test_full_disk(two_stages, tiny_checkpoint, tiny_bundle, tmp_path, capsys, monkeypatch):
    """Nothing under a new name, and an older bundle stays whole."""

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(graphs.ir, "save", full)
    line = refused(capsys, tiny_checkpoint, "--output", tmp_path / "bundle")
    assert "the disk is full" in line and "--output" in line
    assert list(tmp_path.iterdir()) == []
    older = shutil.copytree(tiny_bundle, tmp_path / "older")
    assert "the disk is full" in refused(capsys, tiny_checkpoint, "--output", older, "--force")
    Bundle(older).verify()
    assert list(tmp_path.iterdir()) == [older]


def test_output_in_the_way(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "found a file" in refused(capsys, tiny_checkpoint, "--output", tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    line = refused(capsys, tiny_checkpoint, "--output", tmp_path / "folder", "--force")
    assert "an older bundle; found a folder with other files" in line
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("output", [".", "..", "", "../here", "/"])
def test_output_where_the_user_is(tiny_checkpoint, tmp_path, capsys, monkeypatch, output):
    """The folder is replaced as a whole; a shell in it would be left in a folder that is gone."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main([str(tiny_checkpoint), f"--output={output}"]) == 2
    line = capsys.readouterr().err.strip()
    assert "expected a folder of its own" in line and "--output bundle" in line and "\n" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_output_that_cannot_be_written(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(capsys, tiny_checkpoint, "--output", tmp_path / "file" / "bundle")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "no permission" in refused(capsys, tiny_checkpoint, "--output", tmp_path / "locked" / "bundle")


def test_without_the_exporter(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "WRITERS", ("a-package-that-is-not-installed",))
    line = refused(capsys, tiny_checkpoint, "--output", tmp_path / "bundle")
    assert 'pip install "factorportrait[export]"' in line and 'in a checkout: pip install -e ".[export]"' in line


def test_default_checkpoint_and_output(two_stages, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (cli, shipped):
        monkeypatch.setattr(module, "shipped_checkpoint", lambda: tiny_checkpoint)
    assert exported(capsys)["bundle"] == str(tmp_path / "cache" / "factorportrait" / "bundles" / "demo-fp32")
    Bundle(shipped.default_bundle_path("demo", "fp32")).verify()
    assert exported(capsys, tiny_checkpoint)["bundle"].endswith("demo-fp32")
    # Another folder called demo has a bundle of its own, and a third one too.
    others = [shutil.copytree(tiny_checkpoint, tmp_path / name / "demo") for name in ("one", "two")]
    places = {shipped.default_bundle_path("demo", "fp32"), *(cli._default_output(other, "fp32") for other in others)}
    assert len(places) == 3 and all(place.name.startswith("demo-") for place in places)
    monkeypatch.chdir(tmp_path / "one")
    assert cli._default_output(Path("demo"), "fp32") == cli._default_output(others[0], "fp32")
    # Relative paths are to be ignored, says the specification.
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert shipped.cache_folder() == tmp_path / "home" / ".cache" / "factorportrait"


def test_no_shipped_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "package" / "shipped.py"))
    assert "the shipped demo" in refused(capsys)
    # A package of that name that is not ours.
    (tmp_path / "demo" / "sub").mkdir(parents=True)
    assert "demo with inputs or checkpoint; found none" in refused(capsys)
    (tmp_path / "demo" / "inputs").mkdir()
    assert "name a checkpoint folder" in refused(capsys)


def test_the_demo_bundle_is_the_shipped_checkpoints(copy, tiny_bundle, tmp_path, monkeypatch):
    def none():
        raise CheckpointError("the shipped demo checkpoint", action="name another")

    monkeypatch.setattr(shipped, "shipped_checkpoint", lambda: copy)
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    assert shipped.demo_bundle_is_current(bundle)
    assert not shipped.demo_bundle_is_current(tmp_path / "none")
    # Made from an older demo: one file changed, one came.
    np.savez(copy / "head.npz", **HEAD)
    assert not shipped.demo_bundle_is_current(bundle)
    (copy / "head.npz").unlink()
    assert shipped.demo_bundle_is_current(bundle)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config + "\n")
    assert not shipped.demo_bundle_is_current(bundle)
    (copy / "config.json").write_text(config)
    (bundle / "dit.onnx").unlink()
    assert not shipped.demo_bundle_is_current(bundle)
    monkeypatch.setattr(shipped, "shipped_checkpoint", none)
    assert not shipped.demo_bundle_is_current(tiny_bundle)


def test_kill_leaves_no_half_bundle(tiny_checkpoint, tmp_path):
    output = tmp_path / "bundle"
    command = [sys.executable, "-m", "factorportrait.export.cli", str(tiny_checkpoint), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob(".bundle.*/*.onnx")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() and len(list(tmp_path.glob(".bundle.*"))) == 1
    # The next export of that bundle clears up, even one that fails.
    with pytest.raises(KeyError), whole_folder(output):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_inspect_needs_no_torch(tiny_bundle):
    code = f"""
import sys
sys.modules["torch"] = sys.modules["onnx"] = None  # importing them raises
from factorportrait.export import cli
code = cli.main(["inspect", {str(tiny_bundle)!r}, "--verify"])
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("factorportrait tiny, fp32", "32 x 32 px", "digests match", "torch 2", "dit", "arkit_encoder"):
        assert word in done.stdout


def test_inspect_json(tiny_bundle, capsys):
    data = exported(capsys, "inspect", tiny_bundle)
    assert data["schema"] == SCHEMA and data["verified"] is False
    assert data["target_bytes"].keys() == set(data["targets"]) and data["target_bytes"]["cpu"] > 1000
    assert data["stages"]["dit"]["inputs"][0] == {
        "name": "noise_latents", "dtype": "float32", "shape": [1, 16, "F", 4, 4]
    }  # fmt: skip


def test_inspect_a_damaged_bundle(tiny_bundle, tmp_path, capsys):
    damaged = shutil.copytree(tiny_bundle, tmp_path / "damaged")
    content = bytearray((damaged / "dit.onnx").read_bytes())
    content[-1] ^= 1
    (damaged / "dit.onnx").write_bytes(content)
    assert cli.main(["inspect", str(damaged)]) == 0
    capsys.readouterr()
    assert "expected sha256" in refused(capsys, "inspect", damaged, "--verify")
    assert "found nothing" in refused(capsys, "inspect", tmp_path / "none")
