"""Options of fp-export that concern quality, without an export."""

from __future__ import annotations

import argparse

import pytest

from factorportrait.errors import UserError
from factorportrait.export.quantize import cli
from factorportrait.shipped import shipped_checkpoint


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--force", action="store_true")
    cli.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "words"])
def test_a_budget_is_a_positive_number(value, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--max-quality-loss-db", value)
    assert caught.value.code == 2 and "max-quality-loss-db" in capsys.readouterr().err


def test_int8_of_a_foreign_checkpoint_needs_clips(tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match="--calibration DIR"):
        cli.export_int8(parse("--precision", "int8"), tiny_checkpoint, tmp_path / "out", ("cpu",), print)
    assert not (tmp_path / "out").exists()


def test_who_is_judged(tiny_checkpoint, capsys):
    demo = shipped_checkpoint()
    assert cli.judge_for(parse(), demo, ("cpu",)) is None
    assert cli.judge_for(parse("--precision", "fp16", "--skip-gate"), demo, ("cpu",)) is None
    assert capsys.readouterr().err == ""
    assert cli.judge_for(parse("--precision", "fp16"), demo, ("cpu", "tensorrt")) is not None
    for checkpoint, targets in ((demo, ("tensorrt",)), (tiny_checkpoint, ("cpu",))):
        assert cli.judge_for(parse("--precision", "fp16"), checkpoint, targets) is None
        assert "not judged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--precision", "fp32"], "fp32 loses nothing"),
        (["--precision", "fp8"], "fp8 can only be judged on hardware"),
        (["--precision", "int8", "--calibration", "clips"], "clips of --calibration have no true renders"),
        (["--precision", "fp16", "--skip-gate"], "--skip-gate"),
    ],
)
def test_a_budget_that_nothing_is_held_to(words, found):
    with pytest.raises(UserError, match=f"--max-quality-loss-db; .*found {found}"):
        cli.check_options(parse(*words, "--max-quality-loss-db", "0.1"))
    cli.check_options(parse(*words))
    cli.check_options(parse("--precision", "int8", "--max-quality-loss-db", "0.1"))
