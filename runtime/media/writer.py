"""Frames out: a video file or a folder of pictures, written as they come, under the final name only when whole."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from factorportrait.errors import MediaError, UserError
from factorportrait.files import part_path, write_error
from factorportrait.runtime.media.driving import parse_fps
from factorportrait.runtime.media.fit import Fit

log = logging.getLogger(__name__)

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
# Sound that may go into a container as it is; anything else is encoded again (None: everything may).
COPIED_SOUND = {
    "mp4": ("aac", "mp3", "ac3", "alac", "opus"),
    "mov": ("aac", "mp3", "ac3", "alac", "pcm_s16le"),
    "matroska": None,
    "webm": ("opus", "vorbis"),
}
DEFAULT_QUALITY = 17


class VideoWriter:
    """Writes uint8 RGB frames [height,width,3] to `path` with flat memory; use it as a context manager.

    By the ending of `path`: .mp4 .m4v .mov .mkv (H.264, or MPEG-4 part 2 where PyAV lacks x264), .webm (VP9), or a
    folder of frame_000000.png when `path` ends with a slash or is a folder. Frame k lies at exactly k/fps. Odd widths
    and heights get one more column or row, a copy of the last, because 4:2:0 needs even sizes.

    While frames come they go into a hidden `.part` file beside `path` that is playable at any moment (fragmented mp4,
    or mkv, webm). `close()` copies its packets, without encoding again, into a plain file with the index in front
    and adds the sound; only that gets the final name. After KeyboardInterrupt what was rendered is kept under the final name as
    well; after any other exception under `<stem>.partial<suffix>`, and nothing else is left. A `UserError` that passes
    through says at its end what was kept; other exceptions, which say nothing to a user, leave that to the log.

    Sound: the first audio stream of `audio_from`, cut to the length of the video and kept at its place in time: copied
    where the container allows, otherwise AAC (.webm: Opus). The same frames give the same bytes.

    Attributes: path, num_frames so far, width, height as given, sound: "none", "copied" or "encoded" after `close`.

    Raises:
        MediaError: an ending that is not supported, a frame of another size, `audio_from` that cannot be read.
        UserError: the folder cannot be written, the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        width: int,
        height: int,
        fps: Fraction,
        audio_from: str | os.PathLike | None = None,
        quality: int = DEFAULT_QUALITY,
    ):
        text = os.fspath(path)
        self.path, self.width, self.height, self.fps = Path(path), width, height, parse_fps(fps)
        self.num_frames, self.sound = 0, "none"
        self._audio_from = Path(audio_from) if audio_from is not None else None
        self._as_folder = text.endswith(("/", os.sep)) or self.path.is_dir()
        self._container = None
        self._closed = False
        if not self._as_folder and self.path.suffix.lower() not in CONTAINERS:
            raise MediaError(
                f"output {text}",
                expected=f"a name ending in {', '.join(CONTAINERS)}, or / for a folder of pictures",
                found=repr(self.path.suffix),
                action="change --output",
            )
        if self._audio_from is not None and not self._as_folder:
            _check_sound(self._audio_from)
        self._part = part_path(self.path)
        try:
            if self._as_folder:
                if self.path.is_dir() and any(self.path.iterdir()):
                    raise MediaError(
                        f"output folder {text}",
                        expected="a new or empty folder",
                        found="files in it",
                        action="choose another --output",
                    )
                self._part.mkdir(parents=True)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # PyAV opens the file at the first packet; a folder that refuses should be known before rendering.
                self._part.touch()
                self._open(quality)
        except OSError as error:
            self._discard()
            raise write_error(self.path, error) from error

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        if self._closed:
            return
        target = self.path
        if not issubclass(kind, KeyboardInterrupt):
            target = self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")
        if self.num_frames == 0:
            self._closed = True
            self._discard()
            return
        try:
            self._finish(target)
        except (UserError, OSError) as second:
            outcome = f"what was rendered could not be kept: {second}"
        else:
            frames = "the first frame is" if self.num_frames == 1 else f"the first {self.num_frames} frames are"
            outcome = f"{frames} kept in {target}"
        if isinstance(error, UserError):
            # One line for one problem: the caller prints the error and nothing else.
            error.action = f"{error.action}; {outcome}" if error.action else outcome
            error.args = (" ".join(f"{error}; {outcome}".split()),)
            log.info("%s", outcome)
        else:
            log.warning("%s", outcome)

    def write(self, frame: np.ndarray) -> None:
        """Append one frame, uint8 RGB [height,width,3]."""
        if self._closed:
            raise ValueError("the writer is closed")
        if frame.shape != (self.height, self.width, 3) or frame.dtype != np.uint8:
            raise MediaError(
                f"frame {self.num_frames} for {self.path}",
                expected=f"uint8 [{self.height},{self.width},3]",
                found=f"{frame.dtype} {list(frame.shape)}",
                action="resize it first",
            )
        try:
            if self._as_folder:
                Image.fromarray(frame).save(self._part / f"frame_{self.num_frames:06d}.png", compress_level=3)
            else:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even(frame)), format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                picture.pts, picture.time_base = self.num_frames, 1 / self.fps
                self._mux(self._stream.encode(picture))
        except OSError as error:
            self._closed = True
            self._discard()
            raise write_error(self.path, error) from error
        self.num_frames += 1

    def close(self) -> None:
        """Finish the file and give it its name. UserError when nothing was written or the disk is full."""
        if not self._closed:
            self._finish(self.path)

    def _open(self, quality: int) -> None:
        suffix = self.path.suffix.lower()
        self._format = CONTAINERS[suffix]
        # Fragments: a file that is playable without the index that only close() could write.
        options = {"fflags": "+bitexact", "flush_packets": "1"}
        if self._format in ("mp4", "mov"):
            options["movflags"] = "frag_keyframe+empty_moov+default_base_moof"
        self._container = _open_output(self._part, self._format, options)
        codec, codec_options = _video_codec(self._format, quality)
        self._stream = self._container.add_stream(codec, rate=self.fps, options=codec_options)
        self._stream.width, self._stream.height = self.width + self.width % 2, self.height + self.height % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.time_base = 1 / self.fps
        context = self._stream.codec_context
        context.time_base = 1 / self.fps
        # No B-frames: frame 0 is at time 0 in every container, without edit lists. A key frame every two seconds.
        context.max_b_frames = 0
        context.gop_size = max(1, round(2 * self.fps))
        context.thread_count = 1
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 1, 1, 1

    def _mux(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            packet.duration = packet.duration or 1
            self._container.mux(packet)

    def _finish(self, target: Path) -> None:
        """Everything that was encoded -> `target`; the temporary files are removed in any case."""
        self._closed = True
        if self.num_frames == 0:
            self._discard()
            raise MediaError(
                f"output {self.path}", expected="at least one frame", found="none", action="check the inputs"
            )
        final = part_path(self.path)
        try:
            if self._as_folder:
                if target.is_dir():
                    target.rmdir()
                os.replace(self._part, target)
                return
            self._mux(self._stream.encode(None))
            container, self._container = self._container, None
            container.close()
            self._copy_whole(final)
            os.replace(final, target)
        except OSError as error:
            raise write_error(self.path, error) from error
        finally:
            final.unlink(missing_ok=True)
            self._discard()

    def _copy_whole(self, final: Path) -> None:
        """The packets of the part file, and the sound, in order of time, into a plain file with the index in front."""
        options = {"fflags": "+bitexact"}
        if self._format in ("mp4", "mov"):
            options["movflags"] = "+faststart"
        end = self.num_frames / self.fps
        with av.open(str(self._part)) as source, _open_output(final, self._format, options) as output:
            template = source.streams.video[0]
            video = output.add_stream_from_template(template)
            video.time_base = 1 / self.fps
            sound = None
            if self._audio_from is not None:
                sound = _Sound(self._audio_from, output, self._format, end)
                self.sound = sound.how
            index = 0
            for packet in source.demux(template):
                if not packet.size:
                    continue
                # Matroska rounds times to milliseconds; the place in the file is exact.
                packet.time_base = 1 / self.fps
                packet.pts = packet.dts = index
                packet.duration = 1
                packet.stream = video
                if sound is not None:
                    sound.write_until(index / self.fps)
                output.mux(packet)
                index += 1
            if sound is not None:
                sound.write_until(None)
                sound.close()

    def _discard(self) -> None:
        """Remove the temporary file or folder."""
        if self._container is not None:
            container, self._container = self._container, None
            try:
                container.close()
            except OSError:
                log.debug("closing %s failed", self._part)
        shutil.rmtree(self._part, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)


class _Sound:
    """The first audio stream of a file, on the clock of its video, cut at `end` seconds."""

    def __init__(self, path: Path, output: av.container.OutputContainer, container_format: str, end: Fraction):
        self._path, self._output, self._end = path, output, end
        self._input = av.open(str(path), metadata_errors="ignore")
        self._source = self._input.streams.audio[0]
        # The video of the driving file begins at its first frame, wherever that is on the file's clock.
        pictures = [s for s in self._input.streams.video if not s.disposition & Disposition.attached_pic]
        zero = [s.start_time * s.time_base for s in pictures[:1] if s.start_time is not None]
        self._zero = zero[0] if zero else Fraction(0)
        allowed = COPIED_SOUND[container_format]
        name = self._source.codec_context.name
        self._edit_lists = container_format in ("mp4", "mov")
        self.how = "copied" if allowed is None or _copy_name(name) in allowed else "encoded"
        if self.how == "copied":
            self._stream = output.add_stream_from_template(self._source)
            self._packets = self._copied()
        else:
            codec, rate = ("libopus", 48000) if container_format == "webm" else ("aac", self._source.codec_context.rate)
            layout = "mono" if self._source.codec_context.channels == 1 else "stereo"
            self._stream = output.add_stream(codec, rate=rate)
            self._stream.codec_context.layout = layout
            self._stream.codec_context.bit_rate = 96000 * (1 if layout == "mono" else 2)
            self._packets = self._encoded(rate, layout)
        self._next = None

    def write_until(self, time: Fraction | None) -> None:
        """Mux what begins before `time` in seconds; None: all that is left."""
        while True:
            if self._next is None:
                self._next = next(self._packets, None)
                if self._next is None:
                    return
            packet = self._next
            if time is not None and packet.dts is not None and packet.dts * packet.time_base > time:
                return
            self._output.mux(packet)
            self._next = None

    def close(self) -> None:
        self._input.close()

    def _copied(self):
        """Packets that end within the video, moved to its clock."""
        for packet in self._input.demux(self._source):
            if not packet.size or packet.pts is None:
                continue
            shift = round(self._zero / packet.time_base)
            packet.pts -= shift
            packet.dts = packet.pts
            start, length = packet.pts * packet.time_base, (packet.duration or 0) * packet.time_base
            if start + length > self._end:
                if start >= self._end:
                    return
                continue
            # MP4 hides a packet before 0 behind an edit list, and decoders warm up on it; Matroska would move everything.
            early = 2 * length if self._edit_lists else Fraction(1, 100)
            if start < -early:
                continue
            packet.stream = self._stream
            yield packet

    def _encoded(self, rate: int, layout: str):
        """Decode, put every sample at its place on the clock, cut at the end exactly, encode again."""
        context = self._stream.codec_context
        resampler = av.AudioResampler(
            format=context.format.name if context.format else "fltp", layout=layout, rate=rate
        )
        wanted = math.floor(self._end * rate)
        fifo = av.AudioFifo()
        position = 0

        def put(samples: np.ndarray) -> None:
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples), format=resampler.format.name, layout=layout
            )
            frame.sample_rate = rate
            fifo.write(frame)

        def encode(flush: bool):
            size = context.frame_size or 1024
            while fifo.samples >= size or (flush and fifo.samples):
                frame = fifo.read(size, partial=flush)
                frame.pts, frame.time_base = encode.written, Fraction(1, rate)
                encode.written += frame.samples
                yield from self._stream.encode(frame)

        encode.written = 0
        for frame in self._input.decode(self._source):
            start = None
            if frame.pts is not None:
                start = round((frame.pts * frame.time_base - self._zero) * rate)
            for piece in resampler.resample(frame):
                samples = piece.to_ndarray()
                planes = samples.shape[0]
                per_channel = 1 if resampler.format.is_planar else piece.layout.nb_channels
                at = position if start is None else start
                # Only real gaps and overlaps are repaired: containers round times.
                if abs(at - position) < rate // 10 and position > 0:
                    at = position
                if at > position:
                    missing = min(at, wanted) - position
                    if missing > 0:
                        put(np.zeros((planes, missing * per_channel), samples.dtype))
                        position += missing
                skip = max(0, position - at)
                keep = samples[:, skip * per_channel : (skip + max(0, wanted - position)) * per_channel]
                if keep.size:
                    put(keep)
                    position += keep.shape[1] // per_channel
                start = None
            yield from encode(flush=False)
            if position >= wanted:
                break
        yield from encode(flush=True)
        yield from self._stream.encode(None)


def _copy_name(codec: str) -> str:
    """Codec name without the decoder's dialect: mp3float is mp3."""
    return {"mp3float": "mp3", "libopus": "opus", "libvorbis": "vorbis", "aac_latm": "aac_latm"}.get(codec, codec)


def _check_sound(path: Path) -> None:
    """MediaError unless the file has an audio stream that can be read."""
    action = "choose another --audio, or leave it out"
    if not path.is_file():
        raise MediaError(f"sound {path}", expected="a file with sound", found="no such file", action=action)
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise MediaError(f"sound {path}", expected="an audio stream", found="none", action=action)
            if container.streams.audio[0].codec_context is None:
                raise MediaError(f"sound {path}", expected="a known codec", found="an unknown one", action=action)
            next(container.decode(container.streams.audio[0]), None)
    except (av.error.FFmpegError, OSError) as error:
        found = str(getattr(error, "strerror", error))
        raise MediaError(f"sound {path}", expected="sound that can be decoded", found=found, action=action) from error


def _open_output(path: Path, container_format: str, options: dict[str, str]) -> av.container.OutputContainer:
    """PyAV's errors for a path are OSErrors already."""
    return av.open(str(path), "w", format=container_format, container_options=options)


def _video_codec(container_format: str, quality: int) -> tuple[str, dict[str, str]]:
    """(encoder, options): one thread, so that the same frames give the same bytes on every machine."""
    if container_format == "webm":
        options = {"crf": str(quality + 8), "b": "0", "deadline": "good", "cpu-used": "5", "row-mt": "0"}
        return "libvpx-vp9", options | {"flags": "+bitexact"}
    try:
        av.codec.Codec("libx264", "w")
    except av.codec.codec.UnknownCodecError:
        log.warning("PyAV has no x264: writing MPEG-4 part 2 instead of H.264")
        return "mpeg4", {"qscale": "3", "flags": "+bitexact+qscale", "global_quality": str(3 * 118)}
    return "libx264", {"crf": str(quality), "preset": "veryfast", "threads": "1", "flags": "+bitexact"}


def even(frame: np.ndarray) -> np.ndarray:
    """[H,W,3] -> even height and width, the last row and column copied where one is missing."""
    height, width = frame.shape[:2]
    if height % 2 == 0 and width % 2 == 0:
        return frame
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def compose_side_by_side(reference: np.ndarray, driving: np.ndarray, output: np.ndarray) -> np.ndarray:
    """Three uint8 pictures [h,w,3] -> one [H,3*W,3], left to right without a gap, where `output` is [H,W,3].

    Every panel has the size of `output`. The other two are scaled until all of them is visible, never stretched, with
    black bars where their aspect ratio differs: a square face crop in a portrait format gets one above and one below.
    """
    height, width = output.shape[:2]
    panels = [
        Fit.between(part.shape[0], part.shape[1], height, width, "pad").apply(part) for part in (reference, driving)
    ]
    return np.concatenate([*panels, output], axis=1)


def contact_sheet(frames: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Frames [h,w,3] of one size -> one picture, row by row; missing ones at the end are black."""
    if not len(frames) or columns < 1:
        raise MediaError("contact sheet", expected="at least one frame and one column", action="check the arguments")
    height, width = frames[0].shape[:2]
    rows = -(-len(frames) // columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for index, frame in enumerate(frames):
        row, column = divmod(index, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = frame
    return sheet
