"""Expression, pose and camera from different sources, walked together frame by frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from factorportrait.errors import MediaError

ENDS = ("stop", "loop", "hold")


@dataclass(frozen=True)
class Stream:
    """One item per output frame. `items` is started anew by every `iter()`; at most one item is kept.

    end: what happens after the last item: `stop` ends the clip, `loop` begins again, `hold` repeats the last item.
    num_items: the length where it is known.
    """

    name: str
    items: Iterable[Any]
    num_items: int | None = None
    end: str = "stop"

    def __post_init__(self) -> None:
        if self.end not in ENDS:
            raise MediaError(
                f"what {self.name} does at its end is {self.end!r}",
                expected="stop, loop or hold",
                action="choose one of them",
            )

    @classmethod
    def constant(cls, name: str, item: Any) -> Stream:
        """The same item for every frame; never ends the clip."""
        return cls(name, (item,), 1, "hold")

    def __iter__(self) -> Iterator[Any]:
        while True:
            item = empty = object()
            for item in self.items:
                yield item
            if item is empty:
                raise MediaError(f"{self.name} is empty", expected="at least one frame", action="check the file")
            if self.end == "stop":
                return
            while self.end == "hold":
                yield item


def source_index(index: int, source_fps: Fraction | None, fps: Fraction) -> int:
    """Which item of a source with its own rate is due at output frame `index`: the last one not later than index/fps."""
    return index if source_fps is None else math.floor(index * source_fps / fps)


@dataclass(frozen=True)
class Resampled:
    """Items of a source with rate `source_fps`, at rate `fps`; for files that know no time of their own, such as meshes."""

    items: Iterable[Any]
    num_items: int
    source_fps: Fraction
    fps: Fraction

    @property
    def num_frames(self) -> int:
        """Output frames before the last item has had its time."""
        return max(1, math.ceil(self.num_items * self.fps / self.source_fps))

    def __iter__(self) -> Iterator[Any]:
        due = 0
        for position, item in enumerate(self.items):
            while due < self.num_frames and source_index(due, self.source_fps, self.fps) == position:
                yield item
                due += 1


@dataclass(frozen=True)
class Combined:
    """Items of all streams, frame by frame: `{stream name: item}`.

    The shortest stream that stops decides the length, together with `limit` when that is given; streams that loop or
    hold never do. MediaError when nothing would end it, or when a stream is empty.
    """

    streams: tuple[Stream, ...]
    limit: int | None = None

    def __init__(self, streams: Iterable[Stream] | Mapping[str, Stream], limit: int | None = None):
        streams = tuple(streams.values() if isinstance(streams, Mapping) else streams)
        object.__setattr__(self, "streams", streams)
        object.__setattr__(self, "limit", limit)
        names = [stream.name for stream in streams]
        if len(set(names)) != len(names):
            raise MediaError("two streams have the same name", found=", ".join(names), action="name each of them once")
        if limit is not None and limit < 1:
            raise MediaError("number of frames", expected="1 or more", found=str(limit), action="check --frames")
        if limit is None and all(stream.end != "stop" for stream in streams):
            raise MediaError(
                "nothing says how long the clip is",
                found="only sources that loop, hold or never end",
                action="give --frames, or let one source decide the length",
            )

    @property
    def num_frames(self) -> int | None:
        """The length, or None while a stream of unknown length could end earlier."""
        stopping = [stream.num_items for stream in self.streams if stream.end == "stop"]
        if None in stopping:
            return None
        return min([n for n in (*stopping, self.limit) if n is not None])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        iterators = {stream.name: iter(stream) for stream in self.streams}
        frame_idx = 0
        while self.limit is None or frame_idx < self.limit:
            items = {}
            for name, iterator in iterators.items():
                try:
                    items[name] = next(iterator)
                except StopIteration:
                    return
            yield items
            frame_idx += 1
