"""fp-export verify on int8 graphs, whose caches have channels last on the CPU."""

from __future__ import annotations

import json

import pytest

from factorportrait.export.cli import main
from factorportrait.export.quantize.bundles import write_trial


@pytest.fixture(scope="module")
def int8(fp32, recipe, tmp_path_factory):
    return write_trial(fp32, recipe, tmp_path_factory.mktemp("int8") / "bundle")


@pytest.mark.parametrize("reference", ["bundle", "torch"])
def test_every_graph_is_compared(int8, fp32, tiny_checkpoint, tmp_path, monkeypatch, reference):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    against = ["--reference", str(fp32.path)] if reference == "bundle" else ["--checkpoint", str(tiny_checkpoint)]
    report = tmp_path / "report.json"
    assert main(["verify", str(int8.path), *against, "--engine", "onnxruntime-cpu", "--json", str(report)]) == 0
    comparisons = {each["stage"]: each for each in json.loads(report.read_text(encoding="utf-8"))["comparisons"]}
    assert list(comparisons) == list(int8.manifest.stages)
    for stage in ("dit", "dit_inplace", "vae_encode_steady", "vae_decode_steady"):
        assert 1e-4 < comparisons[stage]["max_relative"] < 1.0 and 20 < comparisons[stage]["psnr_db"] < 80
