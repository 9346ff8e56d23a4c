"""fp-export verify: real inputs, every graph, known errors, and bundles that were broken on purpose."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from factorportrait.bundle import MANIFEST
from factorportrait.export.cli import main
from factorportrait.export.verify import compare
from factorportrait.files import sha256_file


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A user's cache of its own, with the inputs that the first test records."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "factorportrait" / "verify"


def change_weight(bundle, stage, change, folder):
    """A copy of the bundle with one weight of a graph changed, and digests that say so."""
    path = folder / "changed"
    shutil.copytree(bundle, path)
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    name = manifest["stages"][stage]["file"]
    model = onnx.load(path / name)
    (weight,) = sorted(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))[-1:]
    weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight).copy()), weight.name))
    onnx.save(model, path / name)
    manifest["files"][name] = {"sha256": sha256_file(path / name), "bytes": (path / name).stat().st_size}
    (path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return path


def test_every_graph_of_a_good_bundle_passes(tiny_bundle, tiny_checkpoint, cache, tmp_path, capsys):
    arguments = ["verify", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--engine", "onnxruntime-cpu"]
    assert main([*arguments, "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    stages = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))["stages"]
    assert [each["stage"] for each in report["comparisons"]] == list(stages)
    assert report["passed"] and report["reference"] == "torch" and report["precision"] == "fp32"
    for each in report["comparisons"]:
        assert each["passed"] and each["num_cases"] >= 1 and each["num_not_finite"] == 0
        assert 0 <= each["max_relative"] <= 1e-4 and each["cosine"] > 1 - 1e-8
    dit = next(each for each in report["comparisons"] if each["stage"] == "dit_inplace")
    assert dit["num_cases"] == 3 and dit["max_abs"] > 0 and dit["psnr_db"] > 80
    (recorded,) = cache.glob("*.npz")
    before = recorded.stat().st_mtime_ns
    assert main([*arguments, "--stage", "arkit_encoder"]) == 0
    assert recorded.stat().st_mtime_ns == before  # the inputs are not recorded again
    assert "arkit_encoder" in capsys.readouterr().out


def test_half_precision_passes_with_larger_errors(tiny_fp16_bundle, tiny_checkpoint, tiny_bundle, cache, tmp_path):
    """Against torch and against the fp32 bundle: the same verdict, on the inputs that were recorded for fp32."""
    for reference in (["--checkpoint", str(tiny_checkpoint)], ["--reference", str(tiny_bundle)]):
        file = tmp_path / "report.json"
        assert main(["verify", str(tiny_fp16_bundle), *reference, "--engine", "onnxruntime-cpu", "--json", str(file)]) == 0
        report = json.loads(file.read_text(encoding="utf-8"))
        dit = next(each for each in report["comparisons"] if each["stage"] == "dit_inplace")
        assert report["precision"] == "fp16" and 1e-5 < dit["max_relative"] <= 1e-2 and 40 < dit["psnr_db"] < 120
    assert len(list(cache.glob("*.npz"))) == 1


@pytest.mark.parametrize(("change", "not_finite"), [(lambda w: w * 1.01, False), (lambda w: np.full_like(w, np.nan), True)])
def test_a_broken_weight_fails(tiny_bundle, tiny_checkpoint, cache, tmp_path, capsys, change, not_finite):
    path = change_weight(tiny_bundle, "arkit_encoder", change, tmp_path)
    arguments = ["verify", str(path), "--checkpoint", str(tiny_checkpoint), "--engine", "onnxruntime-cpu"]
    stages = ["--stage", "arkit_encoder", "--stage", "time_embed"]
    assert main([*arguments, *stages, "--json", str(tmp_path / "report.json")]) == 1
    assert "onnxruntime-cpu: arkit_encoder: code exceeds what fp32 is allowed" in capsys.readouterr().out
    broken, good = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["comparisons"]
    assert broken["passed"] is False and (broken["num_not_finite"] > 0) == not_finite and good["passed"] is True


def test_bad_input(tiny_bundle, tiny_checkpoint, tmp_path, capsys):
    known = ["--checkpoint", str(tiny_checkpoint)]
    for arguments, words in (
        ([str(tiny_bundle), *known, "--stage", "dot"], "--stage dot; expected one of"),
        ([str(tiny_bundle), *known, "--engine", "cuda"], "--engine; expected auto or tensorrt"),
        ([str(tmp_path)], "expected a manifest.json in it"),
        ([str(tiny_bundle), "--reference", str(tmp_path / "none")], "expected a folder made by fp-export"),
        ([str(tiny_bundle), "--checkpoint", str(tmp_path / "none")], "checkpoint"),
    ):
        assert main(["verify", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_errors_are_what_they_are_called():
    right = np.array([0.0, 1.0, 2.0, -2.0])
    found = right + np.array([0.0, 0.02, 0.0, 0.0])
    limit = {"max_relative": 0.02, "max_angle": 1e-3}
    result = compare("engine", "stage", [({"x": found}, {"x": right}), ({"x": right}, {"x": right})], limit)
    assert result.max_abs == pytest.approx(0.02) and result.max_relative == pytest.approx(0.01)
    assert result.psnr_db == pytest.approx(20 * np.log10(4 / 0.01))  # range 4, root mean square of 0.02, 0, 0, 0
    assert result.cosine == pytest.approx(9.02 / np.sqrt(9 * (8 + 1.02**2)))
    assert result.passed and result.num_cases == 2
    assert compare("engine", "stage", [({"x": found}, {"x": right})], {**limit, "max_relative": 0.009}).passed is False
    assert compare("engine", "stage", [({"x": found}, {"x": right})], {**limit, "max_angle": 1e-9}).passed is False
    equal = compare("engine", "stage", [({"x": right}, {"x": right})], {"max_relative": 0.0, "max_angle": 0.0})
    assert equal.psnr_db == np.inf and equal.cosine == 1 and equal.passed
    found[0] = np.nan
    assert compare("engine", "stage", [({"x": found}, {"x": right})], limit).passed is False
