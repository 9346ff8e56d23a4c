"""Small real media, made on the fly."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def ramp_frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Flat grey frames whose brightness tells their index: uint8 [H,W,3]."""
    return [np.full((height, width, 3), 20 + 8 * i % 220, np.uint8) for i in range(count)]


def index_of(frame: np.ndarray) -> int:
    """The index that `ramp_frames` wrote, up to 26 frames."""
    return round((float(frame.mean()) - 20) / 8)


def write_video(
    path: Path,
    frames: list[np.ndarray],
    fps: Fraction = Fraction(25),
    *,
    times: list[float] | None = None,
    rotation: int | None = None,
    sound_s: float = 0.0,
    sound_codec: str = "aac",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
) -> Path:
    """Encode frames; `times` in seconds makes a variable rate, `sound_s` adds a 440 Hz tone with a click at 0.5 s."""
    with av.open(str(path), "w", container_options=options or {}) as container:
        video = container.add_stream(codec, rate=fps, options={"crf": "10"} if codec == "libx264" else {})
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuv420p"
        if times is not None:
            video.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            video.set_display_rotation(rotation)
        audio = container.add_stream(sound_codec, rate=48000) if sound_s else None
        if audio is not None:
            audio.layout = "mono"
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[index] * 1000), Fraction(1, 1000)
            else:
                frame.pts, frame.time_base = index, 1 / fps
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            count = round(sound_s * 48000)
            tone = (0.1 * np.sin(2 * np.pi * 440 * np.arange(count) / 48000)).astype(np.float32)
            tone[24000:24100] = 0.9
            format_name = audio.codec_context.format.name if audio.codec_context.format else "fltp"
            for start in range(0, count, 960):
                piece = tone[None, start : start + 960]
                if format_name.startswith("s16"):
                    piece = (piece * 32767).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format=format_name, layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def read_sound(path: Path) -> tuple[np.ndarray, int, float]:
    """(mono samples, rate, time of the first sample in seconds)."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        pieces, start = [], None
        for frame in container.decode(stream):
            start = float(frame.pts * frame.time_base) if start is None else start
            array = frame.to_ndarray().astype(np.float32)
            pieces.append(array[0] if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels)[:, 0])
            if frame.format.name.startswith("s16"):
                pieces[-1] = pieces[-1] / 32768
        return np.concatenate(pieces), stream.codec_context.rate, start or 0.0


def one_line(error: BaseException, *words: str) -> None:
    """The message is a single line and says these words."""
    text = str(error)
    assert "\n" not in text and len(text) > 20
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


def sphere(rings: int = 64, segments: int = 96, radius: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """(vertices float32 [V,3], faces int32 [F,3]) wound counter-clockwise seen from outside."""
    theta, phi = np.meshgrid(np.linspace(0, np.pi, rings), np.arange(segments) * 2 * np.pi / segments, indexing="ij")
    vertices = radius * np.stack([np.sin(theta) * np.sin(phi), np.cos(theta), np.sin(theta) * np.cos(phi)], -1)
    row, column = np.meshgrid(np.arange(rings - 1), np.arange(segments), indexing="ij")
    a, b = row * segments + column, row * segments + (column + 1) % segments
    faces = np.stack([np.stack([a, a + segments, b], -1), np.stack([b, a + segments, b + segments], -1)], -2)
    return vertices.reshape(-1, 3).astype(np.float32), faces.reshape(-1, 3).astype(np.int32)


def write_obj_sequence(folder: Path, count: int) -> Path:
    """`count` spheres m0.obj, m1.obj, ... that move by 1 cm to the subject's left per frame."""
    folder.mkdir(parents=True, exist_ok=True)
    vertices, faces = sphere(12, 16)
    corners = "".join(f"f {a} {b} {c}\n" for a, b, c in faces + 1)
    for index in range(count):
        points = "".join(f"v {x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in vertices + [0.01 * index, 0, 0])
        (folder / f"m{index}.obj").write_text(points + corners)
    return folder


def frontal(distance: float = 0.6) -> np.ndarray:
    """c2w [4,4] of a camera on the +z axis that looks at the origin."""
    c2w = np.diag([1.0, -1.0, -1.0, 1.0])
    c2w[2, 3] = distance
    return c2w
