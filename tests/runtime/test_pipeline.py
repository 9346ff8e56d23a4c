"""Stages at the same time: the same pictures in the same order, bounded memory, faults that come out, threads that end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from engine_sessions import drifting_pictures, driving

from factorportrait.errors import UserError
from factorportrait.runtime import pipeline
from factorportrait.runtime import session as runtime_session
from factorportrait.runtime.pipeline import Behind, Pipeline, choose_overlap, default_threads
from factorportrait.runtime.session import open_bundle

OVERLAPPED = ["media", "stages"]
PATIENCE_S = 60  # how long a test waits for something that takes milliseconds


@pytest.fixture(scope="module")
def opened(tiny_bundle):
    return open_bundle(tiny_bundle, threads=1)


def begun(opened, **options):
    """A session with a portrait: chunks of 2 latent frames, 5 and then 8 pictures."""
    options = {"mode": "stream", "chunk_frames": 2, "window_frames": 4, "steps": 1} | options
    session = opened.session(**options)
    session.set_reference(drifting_pictures(1, opened.config.height, opened.config.width, 9)[0])
    return session


def test_what_is_written_behind():
    """Order, the bound, errors at the next call or at the end, and nothing after one."""
    seen, go_on = [], threading.Semaphore(0)

    def slow(item):
        go_on.acquire()
        if item == 6:
            raise OSError("disk full")
        seen.append(item)

    with pytest.raises(OSError, match="disk full"), Behind(slow, 2, "behind") as write:
        for item in range(3):
            write(item)
        blocked = threading.Thread(target=write, args=(3,))
        blocked.start()
        blocked.join(0.05)
        assert blocked.is_alive()  # one in work, two wait
        go_on.release(100)
        blocked.join()
        for item in range(4, 8):
            write(item)
        time.sleep(0.05)
        write(8)
    assert seen == [0, 1, 2, 3, 4, 5]
    with pytest.raises(KeyboardInterrupt), Behind(seen.append, 2, "behind") as write:
        write("kept")
        raise KeyboardInterrupt
    assert seen[-1] == "kept"


@pytest.mark.parametrize("where", ["put", "wait"])
@pytest.mark.parametrize("times", [1, 3])
def test_an_interrupt_of_the_last_wait(where, times):
    """Ctrl-C while the end is handed over or waited for: the item in work is waited for, those behind it are dropped."""
    seen, began, go_on = [], threading.Event(), threading.Event()

    def slow(item):
        began.set()
        assert go_on.wait(PATIENCE_S)
        seen.append(item)

    behind = Behind(slow, 8, "behind")
    waiter = behind._items if where == "put" else behind._ended
    wait, interrupts = getattr(waiter, where), []

    def interrupted(*arguments):
        if where == "put" and isinstance(arguments[0], int):
            return wait(*arguments)
        if len(interrupts) < times:
            interrupts.append(KeyboardInterrupt())
            raise interrupts[-1]
        go_on.set()
        return wait(*arguments)

    setattr(waiter, where, interrupted)
    with pytest.raises(KeyboardInterrupt), behind as write:
        for item in range(4):
            write(item)
        assert began.wait(PATIENCE_S)
    left = list(seen)
    go_on.set()
    behind._thread.join(PATIENCE_S)
    assert len(interrupts) == times and left == seen == [0] and not behind._thread.is_alive()


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()} & {"driving", "encoder", "denoiser", "decoder"}


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


@pytest.mark.parametrize("mode", ["stream", "clip"])
@pytest.mark.parametrize("overlap", OVERLAPPED)
def test_pictures_do_not_depend_on_the_overlap(opened, mode, overlap):
    frames = driving(opened.config, 31)
    alone = np.stack(list(begun(opened, mode=mode).frames(frames)))
    session = begun(opened, mode=mode, overlap=overlap)
    for _ in range(2):  # and again: nothing of the clip before is left
        assert np.array_equal(np.stack(list(session.frames(iter(frames)))), alone)
        wait_until(lambda: not threads())
        assert session.timings.first_frame_s > 0
        session.set_reference(drifting_pictures(1, opened.config.height, opened.config.width, 9)[0])
    assert session.timings.num_frames == 62


def test_stages_run_at_the_same_time(opened):
    """The encoder is at the next chunk before the decoder has given this one: it waits for that here."""
    session, ahead = begun(opened, overlap="stages"), threading.Event()
    encode, decode = session._encode, session._decode

    def watched_encode(frame):
        if session._num_pushed > 5:
            ahead.set()
        encode(frame)

    def watched_decode(*arguments):
        assert ahead.wait(PATIENCE_S)
        return decode(*arguments)

    session._encode, session._decode = watched_encode, watched_decode
    assert len(list(session.frames(driving(opened.config, 13)))) == 13


@pytest.mark.parametrize("overlap", OVERLAPPED)
def test_a_source_that_ends_early_or_raises(opened, overlap):
    """What was complete comes out, then the source's own error; a source without frames gives no pictures."""

    def broken(count):
        yield from driving(opened.config, count)
        raise OSError("the camera was unplugged")

    whole = list(begun(opened).frames(driving(opened.config, 13)))
    for count, expected in ((0, 0), (3, 0), (5, 5), (14, 13)):
        session, pictures = begun(opened, overlap=overlap), []
        with pytest.raises(OSError, match="unplugged"):
            for picture in session.frames(broken(count)):
                pictures.append(picture)
        assert len(pictures) == expected and all(map(np.array_equal, pictures, whole))
        wait_until(lambda: not threads())
    assert list(begun(opened, overlap=overlap).frames([])) == []
    assert len(list(begun(opened, overlap=overlap).frames(driving(opened.config, 3)))) == 3


@pytest.mark.parametrize("stage", ["_encode", "_generate", "_decode"])
@pytest.mark.parametrize("overlap", OVERLAPPED)
def test_errors_of_a_stage_reach_the_caller(opened, overlap, stage):
    session, calls = begun(opened, overlap=overlap), []
    inner = getattr(session, stage)

    def failing(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise UserError(stage, expected="memory", found="none", action="use a smaller model")
        return inner(*arguments)

    setattr(session, stage, failing)
    with pytest.raises(UserError, match=f"{stage}; expected memory"):
        list(session.frames(driving(opened.config, 31)))
    wait_until(lambda: not threads())


@pytest.mark.parametrize("overlap", OVERLAPPED)
def test_a_source_that_stalls(opened, overlap):
    """Chunks that are complete come out meanwhile; who leaves then does not wait for it."""
    go_on, stalled = threading.Event(), threading.Event()

    def stalling():
        yield from driving(opened.config, 7)
        stalled.set()
        go_on.wait()

    session = begun(opened, overlap=overlap)
    pictures = session.frames(stalling())
    assert len([next(pictures) for _ in range(5)]) == 5
    assert stalled.wait(PATIENCE_S)
    pictures.close()
    assert threads() == {"driving"}
    # The session can be used at once, and the stalled source has no part in it any more.
    session.set_reference(drifting_pictures(1, opened.config.height, opened.config.width, 9)[0])
    assert len(list(session.frames(driving(opened.config, 5)))) == 5
    go_on.set()
    wait_until(lambda: not threads())


@pytest.mark.parametrize("overlap", OVERLAPPED)
def test_a_slow_decoder_holds_the_others_back(opened, overlap):
    """Driving frames that were taken but not shown stay few however far ahead the source could be."""
    session, taken, given, most = begun(opened, overlap=overlap), 0, 0, 0
    release = threading.Semaphore(0)
    decode = session._decode

    def slow(*arguments):
        release.acquire()
        return decode(*arguments)

    def counted():
        nonlocal taken
        for frame in driving(opened.config, 101):
            taken += 1
            yield frame

    session._decode = slow
    chunks = session.chunks(counted())
    while given < 101:
        release.release()
        given += len(next(chunks))
        before = -1
        while before != taken:  # until the source waits
            before = taken
            time.sleep(0.02)
        most = max(most, taken - given)
    # Chunks: one done and one in work at the decoder, the same at the denoiser, at the encoder and at the source.
    assert 8 < most <= 8 * 7, most


@pytest.mark.parametrize("stage", ["_encode", "_generate", "_decode"])
def test_leaving_during_any_stage_stops_all_threads(opened, stage):
    """Closing the iterator while a stage is in the middle of its item: it ends that item, and nothing else runs on."""
    session, inside, go_on, calls = begun(opened, overlap="stages"), threading.Event(), threading.Event(), []
    inner = getattr(session, stage)

    def held(*arguments):
        calls.append(1)
        if len(calls) == 8 or stage != "_encode" and len(calls) == 2:
            inside.set()
            assert go_on.wait(PATIENCE_S)
        return inner(*arguments)

    setattr(session, stage, held)
    chunks = session.chunks(driving(opened.config, 101))
    next(chunks)
    assert inside.wait(PATIENCE_S)
    threading.Timer(0.05, go_on.set).start()
    chunks.close()
    wait_until(lambda: not threads())
    ended = len(calls)
    time.sleep(0.05)
    assert len(calls) == ended < 101
    setattr(session, stage, inner)
    session.set_reference(drifting_pictures(1, opened.config.height, opened.config.width, 9)[0])
    assert np.array_equal(
        np.stack(list(session.frames(driving(opened.config, 13)))), np.stack(list(begun(opened).frames(driving(opened.config, 13))))
    )


INTERRUPTED = """
import sys, threading
sys.path.insert(0, sys.argv[2])
from engine_sessions import drifting_pictures, driving
from factorportrait.command import run_command
from factorportrait.runtime.session import open_bundle

def run():
    opened = open_bundle(sys.argv[1], threads=1)
    session = opened.session(mode="stream", steps=1, overlap="stages")
    session.set_reference(drifting_pictures(1, 32, 32, 9)[0])
    def endless():
        while True:
            yield from driving(opened.config, 8)
    try:
        for i, picture in enumerate(session.frames(endless())):
            if i == 20:
                print("ready", flush=True)
    finally:
        print("left", sorted(t.name for t in threading.enumerate() if t.name in ("encoder", "denoiser", "decoder")), flush=True)

sys.exit(run_command("test", run))
"""


def test_ctrl_c_ends_every_thread(tiny_bundle):
    command = [sys.executable, "-c", INTERRUPTED, str(tiny_bundle), os.path.dirname(os.path.dirname(__file__))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 130 and out == "left []\n" and err == "test: interrupted\n"


def test_two_sessions_at_once(opened):
    """Two overlapped sessions of one engine, each drawn by a thread of its own."""
    frames, found = driving(opened.config, 31), {}

    def draw(seed):
        found[seed] = np.stack(list(begun(opened, seed=seed, overlap="stages").frames(frames)))

    workers = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in (1, 2):
        assert np.array_equal(found[seed], np.stack(list(begun(opened, seed=seed).frames(frames))))
    assert not np.array_equal(found[1], found[2])


@pytest.mark.parametrize("overlap", ["none", "stages"])
@pytest.mark.parametrize(
    ("chunk", "window", "cache"), [(1, 4, "auto"), (2, 4, "auto"), (3, 3, "auto"), (3, 5, "auto"), (2, 4, "concat")]
)
def test_a_quick_start_begins_with_one_latent_frame(opened, overlap, chunk, window, cache):
    """Chunks of 1, then what is missing to a whole one, then whole ones; in both caches."""
    options = {"chunk_frames": chunk, "window_frames": window, "cache": cache}
    session = begun(opened, overlap=overlap, quick_start=True, **options)
    sizes = [len(pictures) for pictures in session.chunks(driving(opened.config, 41))]
    expected = {1: [1] + [4] * 10, 2: [1, 4] + [8] * 4 + [4], 3: [1, 8] + [12] * 2 + [8]}[chunk]
    assert sizes == expected
    assert sum(sizes) == 41


@pytest.mark.parametrize(("chunk", "window"), [(2, 4), (2, 2), (3, 3)])
def test_a_quick_start_does_not_depend_on_the_cache(opened, chunk, window):
    """Also where the window is one chunk: the second, shorter one sees the first, and whole ones see the portrait alone."""
    options = {"chunk_frames": chunk, "window_frames": window, "quick_start": True}
    frames = driving(opened.config, 41)
    inplace, concat = (
        np.stack(list(begun(opened, cache=cache, **options).frames(frames))).astype(int) for cache in ("inplace", "concat")
    )
    assert np.abs(inplace - concat).max() <= 1
    later = np.stack(list(begun(opened, chunk_frames=chunk, window_frames=window).frames(frames)))
    assert np.abs(inplace - later).max() > 1  # a check of the check: another start, other pictures


class Clock:
    """In the place of the module time: it goes on only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on(self, seconds: float, function=lambda: None):
        def timed(*arguments):
            self.now += seconds
            return function(*arguments)

        return timed


@pytest.mark.parametrize("overlap", ["none", *OVERLAPPED])
def test_what_a_chunk_took(opened, overlap, monkeypatch):
    """The session's own time is that of its stages: not the driving's, which is waited for, and not the caller's."""
    clock = Clock()
    monkeypatch.setattr(runtime_session, "time", clock)
    session = begun(opened, overlap=overlap)
    for stage, seconds in (("_encode", 1), ("_generate", 10), ("_decode", 100)):
        setattr(session, stage, clock.on(seconds, getattr(session, stage)))
    waits = clock.on(1000)

    def slow(driving):
        for frame in driving:
            waits()
            yield frame

    # Everything in this thread: what a queue would be waited for comes when it is asked for.
    monkeypatch.setattr(Pipeline, "ahead", lambda self, items, *_, **__: iter(items))
    for _ in session.chunks(slow(driving(opened.config, 13))):
        clock.now += 10_000
    busy, wall, num_frames = zip(*session.timings._chunks, strict=True)
    assert num_frames == (5, 8)
    assert wall == (5 * 1001 + 110, 10_000 + 8 * 1001 + 110)
    assert busy == ((None, None) if overlap == "stages" else (5 * 1 + 110, 8 * 1 + 110))
    summary = session.timings.summary()
    assert summary["time_to_first_frame_ms"] == 1000 * (5 * 1001 + 110)
    assert summary["generate_ms_p50"] == (None if overlap == "stages" else pytest.approx(1000 * 118 / 8))
    assert session.timings.busy_s == (None if overlap == "stages" else 115 + 118)


def test_every_portrait_has_its_own_time_to_the_first_frame(opened, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runtime_session, "time", clock)
    session, portrait = begun(opened), drifting_pictures(1, opened.config.height, opened.config.width, 9)[0]
    for seconds in (3.0, 2.0):
        session.set_reference(portrait)
        assert session.timings.first_frame_s is None
        clock.now += seconds
        list(session.frames(driving(opened.config, 5)))
        assert session.timings.first_frame_s == seconds


def test_choice(opened, monkeypatch):
    class Device:
        device = "cuda:0"

    monkeypatch.setattr(pipeline, "usable_cores", lambda: 1)
    assert choose_overlap("auto", opened.engine) == ("none", "one core") and default_threads("stages") == 1
    monkeypatch.setattr(pipeline, "usable_cores", lambda: 4)
    assert choose_overlap("auto", opened.engine)[0] == choose_overlap("auto", opened.engine, "clip")[0] == "media"
    assert choose_overlap("auto", Device())[0] == "media" and choose_overlap("stages", opened.engine)[0] == "stages"
    assert default_threads("auto") is default_threads("none") is None and default_threads("stages") == 2
    assert choose_overlap("none", Device()) == ("none", "asked for")
    with pytest.raises(UserError, match="--overlap stages; expected an engine on the CPU"):
        choose_overlap("stages", Device())
    with pytest.raises(UserError, match="--overlap; expected auto, none, media, stages"):
        opened.session(overlap="everything")


def test_a_pipeline_alone():
    """Order, the bound, and errors of a source that is no generator."""
    made = []

    def count():
        for i in range(100):
            made.append(i)
            yield i

    with Pipeline() as line:
        taken = line.ahead(count(), 3, "count")
        for i in range(50):
            assert next(taken) == i
            assert len(made) <= i + 1 + 3 + 1  # in hand, waiting, in work
    with Pipeline() as line, pytest.raises(TypeError, match="not iterable"):
        next(line.ahead(7, 1, "seven"))
