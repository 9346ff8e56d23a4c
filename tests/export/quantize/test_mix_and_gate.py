"""What each layer costs, which stay in float for a budget, and the gate that judges the result."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from factorportrait.bundle import Bundle
from factorportrait.errors import UserError
from factorportrait.export.cli import main
from factorportrait.export.quantize import build, gate
from factorportrait.export.quantize.bundles import write_trial
from factorportrait.export.quantize.gate import (
    GateFailed,
    GateResult,
    Judge,
    Limits,
    Row,
    gate_table,
    load_limits,
    psnr,
)
from factorportrait.export.quantize.insert import INT8, LayerRecipe
from factorportrait.export.quantize.mix import choose_mix, ranked
from factorportrait.export.quantize.recipe import Activation, Recipe, load_rules, rule_of, smooth_factors
from factorportrait.export.quantize.sensitivity import Cost, costs_table, groups_of, measure_costs

LIMITS = Limits(35, 0.3, "")


def result(psnr_db, limits=LIMITS):
    return GateResult("int8", limits, (Row("clip", "clip", psnr_db, None, None),))


def toy_recipe(count=12):
    return Recipe({f"dit/layer{i}": LayerRecipe(INT8, 1.0) for i in range(count)}, {f"dit/layer{i}": 10 for i in range(count)})


def toy_costs(recipe):
    return [Cost(name, (name,), 1.0 / (1 + i), 10) for i, name in enumerate(recipe.layers)]


@pytest.mark.parametrize("needed", [0, 1, 5, 12])
def test_as_few_layers_as_it_takes_stay_in_float(needed):
    recipe, tried = toy_recipe(), []

    def evaluate(candidate):
        tried.append(12 - len(candidate.candidates))
        return result(40.0 if 12 - len(candidate.candidates) >= needed else 20.0)

    mix = choose_mix(recipe, toy_costs(recipe), evaluate, lambda count, figures: None)
    assert mix.result.passed and len(mix.in_float) == needed
    assert mix.in_float == tuple(f"dit/layer{i}" for i in range(needed))
    assert len(tried) <= 7


def test_a_budget_that_cannot_be_met_gives_the_best_figures():
    recipe = toy_recipe()
    mix = choose_mix(
        recipe, toy_costs(recipe), lambda candidate: result(30.0 - len(candidate.candidates)), lambda count, figures: None
    )
    assert not mix.result.passed and mix.result.psnr_db == pytest.approx(30.0)


def test_order_follows_the_share_of_the_videos_error():
    costs = [Cost("vae/a", (), 4.0, 10), Cost("vae/b", (), 1.0, 10), Cost("dit/c", (), 100.0, 10)]
    assert [cost.group for cost in ranked(costs, {"vae": 1.0, "dit": 0.1})] == ["vae/a", "vae/b", "dit/c"]


def test_every_group_is_measured_and_the_worst_comes_first(graphs, recorded, recipe):
    costs = measure_costs(graphs, recorded, recipe)
    assert {cost.group for cost in costs} == set(groups_of(recipe))
    errors = [cost.error for cost in costs]
    assert errors == sorted(errors, reverse=True) and 0 < errors[-1] and errors[0] < 0.1
    qkv = next(cost for cost in costs if cost.group.endswith("blocks.0.self_attn.qkv"))
    assert len(qkv.layers) == 3
    assert costs_table(costs).row_count == min(20, len(costs))


def test_equal_bundles_pass_and_figures_are_of_the_videos(fp32, clips):
    found = Judge(fp32, clips, threads=1).compare(fp32, LIMITS)
    assert found.passed and found.psnr_db == 100.0 and found.loss_db == 0.0
    assert len(found.rows) == len(clips) * len(fp32.config.generation.modes)
    assert [row.reference_db is None for row in found.rows] == [False, False, True, True]
    assert gate_table(found).row_count == len(found.rows) + 1


def test_psnr_by_hand():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(black, black + 5) == pytest.approx(10 * np.log10(255**2 / 25))


def test_the_gate_closes(recipe):
    assert not result(34.9).passed and not result(float("nan")).passed
    lost = GateResult("int8", LIMITS, (Row("clip", "clip", 40.0, 21.0, 20.6),))
    assert lost.loss_db == pytest.approx(0.4) and not lost.passed
    assert "0.40 dB lost" in str(GateFailed(lost, "do something"))
    assert load_limits("int8", 0.05).max_loss_db == 0.05
    with pytest.raises(UserError, match="gates.toml"):
        load_limits("fp32")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A user's cache, with what the first export measures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def export(cache, fp32, clips, tiny_fp16_bundle, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """fp-export --precision int8 of the tiny model, on clips that need no renderer -> exit code, stdout, stderr."""
    floats = {"fp32": fp32, "fp16": Bundle(tiny_fp16_bundle)}
    monkeypatch.setattr(build, "float_bundle", lambda checkpoint, precision, *_: floats[precision])
    monkeypatch.setattr(build, "calibration_clips", lambda bundle, folder: clips)
    monkeypatch.setattr(build, "gate_clips", lambda bundle, folder: clips[:1])

    def run(limits: Limits, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(build, "load_limits", lambda precision, budget: limits)
        command = [str(tiny_checkpoint), "--precision", "int8", "--calibration", "clips", "--output", str(tmp_path / "int8")]
        return (main([*command, *options]), *capsys.readouterr())

    return run


def test_an_export_from_samples_to_gate(export, tmp_path, monkeypatch):
    code, out, _ = export(Limits(20.0, 5.0, ""), "--json")
    assert code == 0
    report, bundle = json.loads(out.splitlines()[-1]), Bundle(tmp_path / "int8")
    bundle.verify()
    manifest = bundle.manifest
    assert manifest.precision == "int8" and manifest.targets == ("cpu", "tensorrt")
    assert report["gate"] == manifest.provenance["gate"] and report["gate"]["passed"] and report["gate"]["psnr_db"] > 20
    assert report["quantization"]["mix"]["psnr_db"] > 20
    # Every graph that the clips run was compared, the one with a cache of fixed size and the one for coefficients too; the tiny
    # model's window is no multiple of its chunk, so no run of it has the cache in place.
    not_run = {name for name, check in report["stages"].items() if not check["num_cases"]}
    assert not_run == {"dit_inplace", "dit_inplace.tensorrt"} and len(report["stages"]) == 22
    assert all(check["angle"] < 1e-2 for check in report["stages"].values())
    assert report["stages"]["dit.tensorrt"]["headroom"] > 10 and "headroom" not in report["stages"]["dit"]
    # Both targets hold the same integers, once.
    for stage in ("dit", "vae_decode_steady", "time_embed"):
        both = [next(file for file in bundle.stage(stage, target).data if ".int8." in file) for target in manifest.targets]
        assert both[0] == both[1]
    # The sensitivity report is a table for people: every group, and what became of it.
    with open(tmp_path / "int8" / "sensitivity.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == [cost["group"] for cost in report["sensitivity"]] and len(rows) > 20
    losses = [float(row["signal_to_error_db"]) for row in rows]
    assert losses == sorted(losses) and {row["mode"] for row in rows} <= {"int8", "weights"}
    assert json.loads(export(Limits(20.0, 5.0, ""), "--json")[1].splitlines()[-1])["up_to_date"] is True

    # An impossible budget: what was measured for the other one serves this one, the report is named, the older bundle stays.
    kept = (tmp_path / "int8" / "manifest.json").read_bytes()
    monkeypatch.setattr(build, "_measure", None)
    code, out, err = export(Limits(99.0, 0.0, ""), "--force")
    assert code == 2 and "missed" in out and err.count("quality of the int8 bundle; expected 99 dB or more") == 1
    report = Path(err.rsplit("costs is in ", 1)[1].strip())
    assert report.read_text(encoding="utf-8").startswith("group,signal_to_error_db,weights,mode")
    assert (tmp_path / "int8" / "manifest.json").read_bytes() == kept


def test_a_mix_that_passed_is_judged_on_other_clips(export, monkeypatch, tmp_path):
    real = build.Judge.compare

    def worse_at_last(self, bundle, limits):
        found = real(self, bundle, limits)
        return found if bundle.path.name == "trial" else replace(found, rows=tuple(replace(row, psnr_db=1.0) for row in found.rows))

    monkeypatch.setattr(build.Judge, "compare", worse_at_last)
    code, out, err = export(Limits(20.0, 5.0, ""))
    assert code == 2 and "missed" in out and "found 1.0 dB" in err and not (tmp_path / "int8").exists()


def test_a_graph_that_is_far_off_is_refused_with_a_table(export, monkeypatch, tmp_path):
    """As wrong scales would make it."""
    real = build.int8_graph

    def wrong(stage, model, *arguments):
        model = real(stage, model, *arguments)
        if stage == "arkit_encoder":
            for name, value in model.graph.initializers.items():
                if name.endswith(".scale"):
                    value.const_value = ir.tensor(value.const_value.numpy() * 1000, name=name)
        return model

    monkeypatch.setattr(build, "int8_graph", wrong)
    code, out, err = export(Limits(20.0, 5.0, ""))
    assert code == 2 and "arkit_encoder" in err and not (tmp_path / "int8").exists()
    refused = [line.split()[0] for line in out.splitlines() if line.rstrip().endswith("refused")]
    assert refused == ["arkit_encoder", "arkit_encoder.tensorrt"]


def test_an_impossible_budget_is_exit_code_2_and_a_table(fp32, clips, recipe, tmp_path, monkeypatch, capsys):
    trial = write_trial(fp32, recipe, tmp_path / "trial")
    monkeypatch.setattr(gate, "gate_clips", lambda bundle, folder: clips[:1])
    monkeypatch.setattr(gate, "load_limits", lambda precision: Limits(99.0, 0.0, ""))
    assert gate.main([str(fp32.path), str(trial.path), "--threads", "1", "--json"]) == 2
    figures = json.loads(capsys.readouterr().out)
    assert figures["passed"] is False and len(figures["clips"]) == 2 and figures["psnr_db"] < 99


def test_half_precision_as_a_gpu_rounds_it(fp32, clips, tiny_fp16_bundle, tiny_checkpoint, monkeypatch, capsys):
    """ONNX Runtime's CPU kernels leave out rounding that PyTorch does after every operator."""
    monkeypatch.setattr(gate, "gate_clips", lambda bundle, folder: clips[:1])
    command, found = [str(fp32.path), str(tiny_fp16_bundle), "--threads", "1", "--json"], []
    for engine in ([], ["--engine", "torch", "--checkpoint", str(tiny_checkpoint)]):
        assert gate.main([*command, *engine]) == 0
        found.append(json.loads(capsys.readouterr().out)["psnr_db"])
    assert 45 < found[1] <= found[0] + 3 and found[0] != found[1]


def test_scales_clip_what_is_rare():
    activation = Activation()
    values = np.random.default_rng(0).normal(size=(4096, 8)).astype(np.float32)
    values[0, 0] = 40.0
    activation.add(values, "Conv")
    assert 3 / 127 < activation.scale() < 40 / 127
    activation = Activation()
    activation.add(np.zeros((4, 4), np.float32), "MatMul")
    assert activation.scale() == 1.0


def test_smoothing_moves_the_outlier_into_the_weights():
    largest, weights = np.array([1.0, 1.0, 100.0, 1.0]), np.ones((4, 3))
    factors = smooth_factors(largest, [weights], 0.8)
    assert factors.argmax() == 2 and (largest / factors).max() / (largest / factors).min() == pytest.approx(100**0.2, rel=1e-3)


def test_the_table_knows_first_and_last_blocks_of_large_models():
    rules = load_rules()
    assert all(rule.reason for rule in rules)
    for name, blocks, mode in (
        ("dit/dit.blocks.0.ffn.0", 30, "weights"), ("dit/dit.blocks.29.ffn.0", 30, "weights"),
        ("dit/dit.blocks.1.ffn.0", 30, "int8"), ("dit/dit.blocks.0.ffn.0", 8, "int8"), ("dit/dit.head.head", 8, "float"),
        ("vae_decode/vae.decoder.head.2", 8, "float"), ("nobody/knows", 8, "float"),
    ):  # fmt: skip
        assert rule_of(name, blocks, rules).mode == mode, name
