"""Spans: off by default, so that a stream without end keeps no list of them; on, every run of a stage in order."""

from __future__ import annotations

import pytest

from factorportrait.runtime.timing import Timings


def test_spans_are_kept_only_where_somebody_takes_them():
    timings = Timings()
    with timings("pose"):
        pass
    assert timings.spans is None and timings.calls["pose"] == 1
    timings.spans = []
    for stage in ("step", "step", "commit"):
        with timings(stage):
            pass
    assert [span.stage for span in timings.spans] == ["step", "step", "commit"]
    times = [time for span in timings.spans for time in (span.start_ns, span.end_ns)]
    assert times == sorted(times)
    assert timings.seconds["step"] == pytest.approx(1e-9 * sum(s.end_ns - s.start_ns for s in timings.spans[:2]))


def test_a_stage_that_fails_is_counted():
    timings = Timings()
    timings.spans = []
    with pytest.raises(ValueError), timings("decode"):
        raise ValueError
    assert timings.calls["decode"] == 1 and len(timings.spans) == 1


def test_a_device_is_waited_for_inside_the_stage():
    timings, waited = Timings(), []
    timings.spans = []
    timings.wait = lambda: waited.append(len(timings.spans))
    for stage in ("pose", "decode"):
        with timings(stage):
            pass
    assert waited == [0, 1], "before the span of the stage ends"
