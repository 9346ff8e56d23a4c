"""The trials of compare: a plant that lies in its stage alone, records that go on, and a summary that can fail."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from factorportrait.benchmarks import trials
from factorportrait.benchmarks.cases import resolve
from factorportrait.bundle import Bundle
from factorportrait.errors import UserError


def test_plant_is_a_share_of_its_stage_alone(monkeypatch):
    """By a clock that moves only when it is read, and by what the stage takes."""
    now = [0]

    def clock():
        now[0] += 10
        return now[0]

    monkeypatch.setattr(time, "perf_counter_ns", clock)
    timings = trials.SlowTimings("decode", 0.5)
    timings.spans = []
    for stage in ("pose", "decode"):
        with timings(stage):
            now[0] += 1000
    pose, decode = (span.end_ns - span.start_ns for span in timings.spans)
    # Reading the clock costs 10 each time.
    assert pose == pytest.approx(1000, abs=60) and decode == pytest.approx(1500, abs=60)


def test_one_trial_on_the_tiny_bundle(tiny_bundle):
    """Verdicts of every stage for both heads. Six pairs are too few for simultaneous intervals: nothing may alarm."""
    config = Bundle(tiny_bundle).config
    case = resolve(replace(trials.small_case(6), model=None, resolution=None, bundle=str(tiny_bundle), frames=29, steps=1), config)
    trial = trials.run_trial(case, tiny_bundle, "decode", 3.0)
    assert {"total", "steps", "pose", "decode", "other"} <= set(trial["planted"]) == set(trial["identical"])
    assert trial["planted"]["decode"]["change"] > 1 and trial["planted"]["decode"]["verdict"] == "inconclusive"
    assert trial["quiet"] and not trial["caught"]
    json.dumps(trial, allow_nan=False)


def test_record_goes_on_only_with_the_same_settings(tmp_path):
    path, found = tmp_path / "trials.json", [{"caught": True, "quiet": True}]
    assert trials.read_trials(path, {"pairs": 40}) == []
    trials.write_trials(path, {"pairs": 40}, found)
    assert trials.read_trials(path, {"pairs": 40}) == found
    for settings in ({"pairs": 20}, {}):
        with pytest.raises(UserError, match="another one"):
            trials.read_trials(path, settings)
    path.write_text("{")
    with pytest.raises(UserError, match="record"):
        trials.read_trials(path, {"pairs": 40})


@pytest.mark.parametrize(
    "caught, quiet, count, code", [(19, 20, 20, 0), (18, 20, 20, 1), (20, 18, 20, 1), (10, 10, 10, 1)]
)
def test_exit_code_says_whether_the_promise_is_kept(caught, quiet, count, code):
    done = [{"caught": i < caught, "quiet": i < quiet} for i in range(count)]
    assert trials.summary(done, 20) == code
