"""Iterators that run ahead in threads of their own: order is kept, queues are bounded, errors come out where the items do."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from factorportrait.cores import usable_cores
from factorportrait.engines.base import Engine
from factorportrait.errors import UserError

Item = TypeVar("Item")

# none: everything in the caller's thread. media: the driving is read and rendered in a thread of its own, ahead of the engine,
# which stays in the caller's thread (CUDA graphs of ONNX Runtime belong to the thread that captured them); fp-run writes in another
# one. stages: encoder, denoiser and decoder have threads of their own as well.
OVERLAPS = ("none", "media", "stages")


def choose_overlap(kind: str, engine: Engine, mode: str = "stream") -> tuple[str, str]:
    """How much of a session runs at once, of `OVERLAPS`, and why.

    Args:
        kind: one of these, or "auto".
        mode: of the session; a clip is a single chunk, whose stages follow each other.

    Raises:
        UserError: another word, or "stages" on a device.
    """
    if kind not in ("auto", *OVERLAPS):
        raise UserError("--overlap", expected=f"auto, {', '.join(OVERLAPS)}", found=kind, action="leave it out to have it chosen")
    if engine.device == "cpu":
        if kind != "auto":
            return kind, "asked for"
        if mode == "clip":
            return "media", "a clip is one chunk"
        return ("media", "stages take turns with every core, files beside them") if usable_cores() > 1 else ("none", "one core")
    if kind == "stages":
        raise UserError(
            "--overlap stages", expected="an engine on the CPU", found=f"stages that share {engine.device} and one stream",
            action="use --overlap media",
        )  # fmt: skip
    return ("media", f"stages take turns on {engine.device}, files do not") if kind == "auto" else (kind, "asked for")


def default_threads(overlap: str, mode: str = "stream") -> int | None:
    """Threads of an operator on the CPU: None, every usable core, for stages that take turns; else half of the cores.

    Measured on two cores: two threads per operator are 1.7 times as fast as one; three stages of one thread each are faster still,
    and three of two threads each, slower, get in each other's way. That holds while the stages cost alike: where the denoiser is
    nearly everything, as with a light VAE, half of the cores make it slower by half, so "stages" has to be asked for.
    """
    if overlap == "stages" and mode == "stream":
        return max(1, usable_cores() // 2)
    return None


class Pipeline:
    """Iterators that feed each other, each in a thread of its own. Leaving the context stops all of them.

    >>> with Pipeline() as line:
    ...     read = line.ahead(driving, 4, "driving", wait=False)
    ...     for result in line.ahead(map(work, read), 1, "work"):
    ...         show(result)
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def ahead(self, items: Iterable[Item], size: int, name: str, *, wait: bool = True) -> Iterator[Item]:
        """The items in their order, made by a thread at most `size` ahead of whoever takes them.

        The thread starts with the first item asked for. What `items` raises is raised here, after the items before it. When the
        pipeline stops, the thread ends after the item that it works on, and closes `items`.

        Args:
            wait: leaving the pipeline waits for that. False for code that may stall: its thread ends when it goes on.
        """
        made: deque[Item] = deque()
        ended: list[BaseException | None] = []  # one entry when there are no more: what was raised, or None

        def put(item: Item) -> None:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(made) < size)
                self._check()
                made.append(item)
                self._changed.notify_all()

        def work() -> None:
            error: BaseException | None = None
            iterator = iter(())
            try:
                iterator = iter(items)
                for item in iterator:
                    put(item)
            except _Stopped:
                pass
            except BaseException as raised:  # carried to the thread that takes the items
                error = raised
            try:
                if (close := getattr(iterator, "close", None)) is not None:
                    close()
            except _Stopped:
                pass
            except BaseException as raised:
                error = error or raised
            with self._changed:
                ended.append(error)
                self._changed.notify_all()

        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        if wait:
            self._threads.append(thread)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or made or ended)
                self._check()
                if not made:
                    if ended[0] is not None:
                        raise ended[0]
                    return
                item = made.popleft()
                self._changed.notify_all()
            yield item

    def _check(self) -> None:
        if self._stopped:
            raise _Stopped


class Behind:
    """Calls a function on item after item in a thread, in their order, at most `size` behind whoever hands them over.

    What the function raises is raised by the next call, or when the context is left; items after it are let go. Leaving the context
    waits for all items, after an exception too: what was made is kept. Who is interrupted while waiting (a second Ctrl-C) waits for
    the item in work alone: once the context is left, nothing is called any more.

    >>> with Behind(writer.write, 8, "writer") as write:
    ...     write(picture)
    """

    def __init__(self, function: Callable[[Item], object], size: int, name: str):
        self._function, self._items = function, queue.Queue(size)
        self._error: BaseException | None = None
        self._dropping, self._ended = False, threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def __enter__(self) -> Behind:
        self._thread.start()
        return self

    def __call__(self, item: Item) -> None:
        self._raise()
        self._items.put(item)

    def __exit__(self, kind, *_) -> None:
        interrupt: BaseException | None = None
        while not self._ended.is_set():
            try:
                self._items.put(_END)  # once more where the interrupt came in its place; what is dropped makes room
                self._ended.wait()  # not `join`, which cannot be relied on again once it was interrupted
            except BaseException as raised:
                self._dropping, interrupt = True, raised
        if interrupt is not None:
            raise interrupt
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while (item := self._items.get()) is not _END:
            if self._dropping:
                continue
            try:
                self._function(item)
            except BaseException as error:  # carried to the thread that hands items over
                self._error, self._dropping = error, True
        self._ended.set()


_END = object()


class _Stopped(BaseException):
    """The pipeline ends: raised in its threads, wherever they wait."""
