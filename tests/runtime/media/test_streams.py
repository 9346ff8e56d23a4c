import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from media_files import one_line

from factorportrait.errors import MediaError
from factorportrait.runtime.media.streams import Combined, Stream


def stream(name, length, end="stop", known=True):
    return Stream(name, list(range(length)), length if known else None, end)


ends = st.sampled_from(["stop", "loop", "hold"])


@given(
    st.lists(st.tuples(st.integers(1, 6), ends, st.booleans()), min_size=1, max_size=4), st.none() | st.integers(1, 9)
)
def test_length_and_items(specs, limit):
    streams = [stream(str(i), n, end, known) for i, (n, end, known) in enumerate(specs)]
    stopping = [n for n, end, _ in specs if end == "stop"]
    if not stopping and limit is None:
        with pytest.raises(MediaError) as error:
            Combined(streams)
        one_line(error.value, "--frames")
        return
    combined = Combined(streams, limit)
    expected = min([*stopping, *([limit] if limit else [])])
    items = list(itertools.islice(combined, 100))
    assert len(items) == expected
    assert combined.num_frames in (None, expected)
    if all(known for _, end, known in specs if end == "stop"):
        assert combined.num_frames == expected
    for i, (n, end, _) in enumerate(specs):
        values = [item[str(i)] for item in items]
        assert values == [k % n if end == "loop" else min(k, n - 1) for k in range(expected)]


def test_constant_never_ends_and_streams_restart():
    combined = Combined({"a": stream("a", 3), "b": Stream.constant("b", "x")})
    for _ in range(2):
        assert list(combined) == [{"a": i, "b": "x"} for i in range(3)]


def test_refusals():
    with pytest.raises(MediaError) as error:
        Stream("pose", [], 0, "bounce")
    one_line(error.value, "pose", "stop, loop or hold")
    for end in ("stop", "loop", "hold"):
        with pytest.raises(MediaError) as error:
            list(Combined([Stream("pose", [], None, end)], 3))
        one_line(error.value, "pose is empty")
    with pytest.raises(MediaError) as error:
        Combined([stream("a", 1), stream("a", 2)])
    one_line(error.value, "same name")
    with pytest.raises(MediaError) as error:
        Combined([stream("a", 1)], 0)
    one_line(error.value, "1 or more")
