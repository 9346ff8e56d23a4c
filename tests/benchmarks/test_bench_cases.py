"""Cases as data: the shipped files, what is refused and how, curves, and what a bundle fills in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from factorportrait.benchmarks import cases
from factorportrait.benchmarks.cases import (
    Case,
    frames_until_steady,
    load_cases,
    materialise,
    model_config,
    resolve,
    shipped_names,
)
from factorportrait.benchmarks.peers import PEERS
from factorportrait.bundle import Bundle
from factorportrait.checkpoint_files import read_config
from factorportrait.errors import CheckpointError, UserError
from factorportrait.shipped import shipped_checkpoint


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "cases.toml"
    path.write_text(text)
    return str(path)


def test_every_shipped_case_can_be_read_and_names_peers_that_exist():
    cases = load_cases(shipped_names())
    assert {"smallest", "demo", "wan-1.3b-2blocks", "wan-1.3b-512"} <= {case.name for case in cases}
    for case in cases:
        assert case.bundle or model_config(case)
        assert set(case.peers) <= set(PEERS), case.name
    curves = {sweep.axis for case in cases for _, sweep in case.points() if sweep}
    assert curves == {"frames", "resolution", "window", "steps", "threads"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[case]]\nname = "a"\nstesp = 2', ["unknown key 'stesp'", "did you mean 'steps'"]),
        ('[[case]]\nname = "a"\nsteps = "two"', ["steps", "an integer"]),
        ('[[case]]\nname = "a"\nsteps = 0', ["steps", "more than 0"]),
        ('[[case]]\nsteps = 2', ["missing name"]),
        ('[[case]]\nname = "a"\nprecision = "fp23"', ["precision", "did you mean fp32"]),
        ('[[case]]\nname = "a"\nmode = "streem"', ["mode", "did you mean stream"]),
        ('[[case]]\nname = "a"\ncache = "in_place"', ["cache", "did you mean inplace"]),
        ('[[case]]\nname = "a"\nmodel = "tiny"\nbundle = "b"', ["bundle and model"]),
        ('[[case]]\nname = "a"\nblocks = 2', ["blocks", "a model"]),
        ('[[case]]\nname = "a"\n[case.sweep]\nstep = [1]', ["sweep", "did you mean steps"]),
        ('[[case]]\nname = "a"\n[case.sweep]\nsteps = [1]\nwindow = [2]', ["sweep", "one list"]),
        ('[[case]]\nname = "a"\nrepetitions = 9\nmax_repetitions = 3', ["repetitions <= max_repetitions"]),
        ('[[case]]\nname = "a"\n[[case]]\nname = "a"', ["a twice"]),
        ('[[cases]]\nname = "a"', ["[[case]]", "'cases'"]),
        ("", ["[[case]]"]),
        ("name =", ["TOML"]),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        load_cases([written(tmp_path, text)])
    for word in words:
        assert word in str(error.value)
    assert "config.json" not in str(error.value)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="did you mean smallest"):
        load_cases(["smalest"])


def test_cases_without_a_source_take_the_command_lines(tmp_path, tiny_bundle):
    file = written(tmp_path, '[[case]]\nname = "a"\n[[case]]\nname = "b"\nmodel = "tiny"')
    found = load_cases([file], str(tiny_bundle))
    assert [(case.bundle, case.model) for case in found] == [(str(tiny_bundle), None), (None, "tiny")]
    assert [case.precision for case in found] == ["fp32", "fp32"]
    assert load_cases([file])[0].bundle == "demo"
    with pytest.raises(UserError, match="fp-export"):
        load_cases([file], str(tmp_path / "none"))


def test_a_curve_is_one_case_per_point():
    points = Case("c", bundle="b", sweep={"steps": (1, 4)}).points()
    assert [(case.name, case.steps, sweep.curve, sweep.axis, sweep.value) for case, sweep in points] == [
        ("c:steps=1", 1, "c", "steps", 1.0), ("c:steps=4", 4, "c", "steps", 4.0),
    ]  # fmt: skip
    case = Case("c", bundle="b")
    assert case.points() == [(case, None)]


def test_a_report_says_nothing_of_where_files_lie():
    config = Case("c", bundle="/home/somebody/portrait-fp32").to_config()
    assert config["bundle"] == "portrait-fp32" and "max_seconds" not in config and "peers" not in config


def test_a_bundle_fills_in_what_the_case_leaves_open(tiny_bundle):
    config = Bundle(tiny_bundle).config
    case = resolve(Case("c", bundle=str(tiny_bundle), frames=25), config)
    assert (case.mode, case.steps, case.chunk, case.window, case.target_fps) == ("stream", 4, 2, 5, 24.0)
    assert case.threads >= 1 and case.resolution == 32
    # Window 5, chunk 2: two chunks fill the ring of 3; the third, frames 13 to 20 after 5 and 8, is steady.
    assert frames_until_steady(case) == 21
    with pytest.raises(UserError, match="21 or more"):
        resolve(Case("c", bundle="b", frames=20), config)
    with pytest.raises(UserError, match="at most 33"):
        resolve(Case("c", bundle="b", mode="clip", frames=34), config)


def test_a_bundle_that_does_not_fit_the_case_is_refused(tiny_bundle, tmp_path):
    case = Case("c", bundle=str(tiny_bundle))
    assert materialise(case) == tiny_bundle
    assert materialise(replace(case, resolution=32)) == tiny_bundle
    with pytest.raises(UserError, match="32 x 32"):
        materialise(replace(case, resolution=64))
    with pytest.raises(UserError, match="--precision fp16"):
        materialise(replace(case, precision="fp16"))
    with pytest.raises(UserError, match="fp-export"):
        materialise(replace(case, bundle=str(tmp_path / "none")))


def test_shapes_of_models():
    case = Case("c", model="wan-1.3b", blocks=2, resolution=128)
    config = model_config(case)
    assert (config.dit.num_layers, config.dit.dim, config.height, config.vae.spatial_stride) == (2, 1536, 128, 8)
    with pytest.raises(UserError, match="did you mean wan-1.3b"):
        model_config(replace(case, model="wan-1.3"))
    with pytest.raises(UserError, match="multiples of 16"):
        model_config(replace(case, resolution=100))


def test_the_demo_at_another_size_is_exported_from_its_own_weights(monkeypatch, tmp_path):
    exported = []
    monkeypatch.setattr(cases, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cases, "_export", lambda *arguments: exported.append(arguments))
    folder = materialise(Case("c", bundle="demo", resolution=64, precision="fp32"))
    ((checkpoint, output, precision),) = exported
    assert (output, precision) == (folder, "fp32") and checkpoint.parent == folder.parent
    config, shipped = read_config(checkpoint), read_config(shipped_checkpoint())
    assert (config.height, config.width) == (64, 64) and config.dit == shipped.dit
    assert (checkpoint / "dit.safetensors").read_bytes() == (shipped_checkpoint() / "dit.safetensors").read_bytes()


def test_shipped_cases_of_the_demo_fit_the_demo(monkeypatch):
    """Every point of every curve; on a machine with cores enough."""
    monkeypatch.setattr(cases, "allowed_cpus", lambda: set(range(64)))
    config = read_config(shipped_checkpoint())
    found = [case for case in load_cases(["demo", "demo-int8", "demo-scaling", "pareto"]) if cases.is_demo(case)]
    points = [point for case in found for point, _ in case.points()]
    assert len(points) > 20
    for point in points:
        sized = replace(config, height=point.resolution or config.height, width=point.resolution or config.width)
        resolve(point, sized)


def test_more_threads_than_cores_are_refused(tiny_bundle):
    with pytest.raises(UserError, match="threads; expected at most"):
        resolve(Case("c", bundle=str(tiny_bundle), threads=4096), Bundle(tiny_bundle).config)


def test_an_export_that_fails_says_why(tmp_path):
    with pytest.raises(cases.ExportFailed, match="expected fp-export to make it; found .*no-such-checkpoint"):
        cases._export(tmp_path / "no-such-checkpoint", tmp_path / "out", "fp32")


def test_numbers_that_no_case_can_have():
    with pytest.raises(CheckpointError, match="interval"):
        Case("c", interval=0.0)
