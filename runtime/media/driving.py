"""What drives the portrait: videos, frame folders, clip folders, and CSVs of ARKit coefficients. One frame at a time.

A source is iterated as often as you like; each iteration starts at the first frame and holds one frame in memory.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from factorportrait.arkit import ARKIT_NAMES
from factorportrait.errors import MediaError
from factorportrait.runtime.media.fit import natural_key
from factorportrait.runtime.media.portrait import open_image, read_image

log = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
COMMON_RATES = tuple(
    Fraction(*rate)
    for rate in (
        (24000, 1001),
        (24, 1),
        (25, 1),
        (30000, 1001),
        (30, 1),
        (48, 1),
        (50, 1),
        (60000, 1001),
        (60, 1),
        (120, 1),
    )
)
# Live Link Face records at 60 unless told otherwise; used when a recording is too short to show the rate.
LIVE_LINK_FPS = Fraction(60)


# What a rate may look like as text. Fraction also takes "1e999999999", and computes it.
RATE_TEXT = re.compile(r"\d{1,9}(\.\d{0,30})?|\.\d{1,30}|\d{1,9}/\d{1,9}", re.ASCII)


def parse_fps(value: Fraction | int | float | str) -> Fraction:
    """A frame rate, exactly: Fractions and "30000/1001" as they are; 29.97 and 23.976 become the NTSC rates they mean.

    Text from a command line belongs here as it is: `Fraction("29.97")` is 2997/100 and is taken at its word.
    MediaError when it is not a number above 0 and at most 1000.
    """
    expected = "a rate above 0, at most 1000, such as 25, 29.97 or 30000/1001"
    shown = repr(value if len(str(value)) <= 40 else f"{str(value)[:40]}...") if isinstance(value, str) else f"{value}"
    refusal = MediaError(f"frame rate {shown}", expected=expected, action="check --fps")
    if isinstance(value, str) and not RATE_TEXT.fullmatch(value.strip()):
        raise refusal
    try:
        exact = Fraction(value)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise refusal from error
    if not 0 < exact <= 1000:
        raise refusal
    nearest = min(COMMON_RATES, key=lambda rate: abs(rate - exact))
    written_short = not isinstance(value, Fraction) and "/" not in str(value)
    if (written_short or exact.denominator > 1001) and abs(nearest / exact - 1) < Fraction(1, 5000):
        return nearest
    rate = exact.limit_denominator(1001)
    if rate == 0:
        raise refusal
    return rate


@dataclass(frozen=True)
class DrivingClip:
    """What a driving path holds. Paths are opened by their own readers, which need the output size.

    coefficients: ARKit rows, the expression where they are there; video: frames for the expression encoder, or only
    to be shown where there are coefficients. mesh: for `open_mesh`; normals: for `NormalVideo`, always with cameras;
    cameras: for `open_camera`; sound: the file whose sound goes with it.
    fps: frame rate of the clip (of the video where there is one), None when nothing says (a frame folder, a mesh).
    num_frames: length of the expression; without one, of the normals; None for a mesh, whose reader knows.
    """

    path: Path
    fps: Fraction | None
    num_frames: int | None
    video: VideoSource | FrameFolder | None = None
    coefficients: ArkitTable | None = None
    mesh: Path | None = None
    normals: Path | None = None
    cameras: Path | None = None
    sound: Path | None = None


def open_driving(path: str | os.PathLike, fps: Fraction | None = None) -> DrivingClip:
    """A driving path of any kind -> DrivingClip.

    A video file; a .csv of Live Link Face; a mesh .npz or .obj; a folder of .obj files, one per frame (pictures beside
    them are taken for textures); a folder of pictures; or a clip folder with any of
        video.mp4 (or .mov .mkv .webm .avi, or a folder frames/)    expression, and the sound
        coefficients.csv                                            expression; wins over a video, which is then shown only
        mesh.npz, mesh.obj or mesh/*.obj                            pose
        normals.mp4 with cameras.json                               pose and camera, baked
        cameras.json or transforms.json                             camera

    fps: resample every source to this constant rate; None keeps the rate of the file.

    Raises:
        MediaError: nothing usable is there, or one of the files is damaged.
    """
    path = Path(path)
    fps = None if fps is None else parse_fps(fps)
    if path.is_dir():
        return _open_folder(path, fps)
    if not path.exists():
        raise MediaError(
            f"driving {path}",
            expected="a video, a .csv, a mesh (.npz, .obj) or a folder",
            found="no such file",
            action="check --driving",
        )
    if path.suffix.lower() == ".csv":
        table = read_arkit_csv(path, fps)
        return DrivingClip(path, table.fps, table.num_frames, coefficients=table)
    if path.suffix.lower() in (".npz", ".obj"):
        return DrivingClip(path, fps, None, mesh=path)
    video = VideoSource(path, fps)
    return DrivingClip(path, video.fps, video.num_frames, video=video, sound=path if video.has_sound else None)


def _open_folder(path: Path, fps: Fraction | None) -> DrivingClip:
    # Hidden files are not the user's: macOS puts ._m0.obj beside m0.obj on foreign disks.
    names = {entry.name.lower(): entry for entry in path.iterdir() if not entry.name.startswith(".")}

    def first(stem: str, suffixes: tuple[str, ...]) -> Path | None:
        return next((names[stem + suffix] for suffix in suffixes if stem + suffix in names), None)

    video_path, normals = first("video", VIDEO_SUFFIXES), first("normals", VIDEO_SUFFIXES)
    table_path = first("coefficients", (".csv",))
    mesh = first("mesh", (".npz", ".obj", ""))
    cameras = first("cameras", (".json",)) or first("transforms", (".json",))
    frames = names.get("frames")
    if not any((video_path, normals, table_path, mesh, frames, cameras)):
        if any(entry.suffix.lower() == ".obj" for entry in names.values()):
            return DrivingClip(path, fps, None, mesh=path)
        if any(entry.suffix.lower() in PICTURE_SUFFIXES for entry in names.values()):
            folder = FrameFolder(path, fps)
            return DrivingClip(path, fps, folder.num_frames, video=folder)
        found = ", ".join(sorted(names)[:4]) or "an empty folder"
        raise MediaError(
            f"driving folder {path}",
            expected="pictures, .obj files, or video.mp4, coefficients.csv, mesh.npz, mesh/, normals.mp4 with cameras.json",
            found=found,
            action="check --driving",
        )
    if normals and not cameras:
        raise MediaError(
            f"driving folder {path}: normals without a camera",
            expected="cameras.json beside normals.mp4, because a baked video carries its camera",
            action="write cameras.json, or bring mesh.npz instead",
        )
    video = VideoSource(video_path, fps) if video_path else FrameFolder(frames, fps) if frames else None
    table = read_arkit_csv(table_path, fps) if table_path else None
    rates = [source.fps for source in (video, table) if source is not None and source.fps is not None]
    baked = VideoSource(normals, fps) if not rates and normals else None
    if baked is not None:
        rates = [baked.fps]
    if table is not None and fps is None and table.fps != rates[0]:
        table = read_arkit_csv(table_path, rates[0])
    # The table decides the length even where it is longer than the video: the video is only shown then.
    length_from = next((source for source in (table, video, baked) if source is not None), None)
    return DrivingClip(
        path=path,
        fps=rates[0] if rates else fps,
        num_frames=None if length_from is None else length_from.num_frames,
        video=video,
        coefficients=table,
        mesh=mesh,
        normals=normals,
        cameras=cameras,
        sound=video_path if isinstance(video, VideoSource) and video.has_sound else None,
    )


class VideoSource:
    """Frames of a video file at a constant rate, upright: uint8 RGB [height,width,3].

    Rate: `fps` if given, otherwise the file's exact rational rate; a file of variable rate gets the common rate nearest
    to its average when that is within 2 %, else the average itself. Frames are resampled only when rate and file
    disagree: output frame k shows the last frame that is due at k/fps (sample and hold, nothing is blended).
    Rotation and mirroring of the display matrix are applied; pixels that are not square are made so.

    Attributes:
        fps: Fraction; num_frames: exact, from the packet table; height, width: upright pixels; has_sound: bool;
        is_constant: whether the file has a constant rate; start_s: time of the first frame in the file, Fraction.

    Raises:
        MediaError: no such file, not a video, sound only, no frames, cut short, damaged.
    """

    def __init__(self, path: str | os.PathLike, fps: Fraction | None = None):
        self.path = Path(path)
        fps = None if fps is None else parse_fps(fps)
        with self._open() as container:
            stream = self._stream(container)
            self.has_sound = any(s.codec_context is not None for s in container.streams.audio)
            times, ends, num_packets = self._packet_times(container, stream)
            self._check_whole(container, stream, num_packets, ends)
            if not times:
                raise self._error("has no frames", "at least one frame", "an empty video stream", "record it again")
            self._tick = float(stream.time_base)
            declared = [rate for rate in (stream.guessed_rate, stream.average_rate, stream.base_rate) if rate]
        # float64 seconds, only for comparisons; rates and counts below stay rational.
        self.start_s = times[0]
        # One for all frames: a frame's own would set up its scaler anew every time.
        self._reformatter = av.video.reformatter.VideoReformatter()
        seconds = np.array([float(time - times[0]) for time in times])
        rate = next((rate for rate in declared if self._fits(seconds, rate)), None)
        self.is_constant = rate is not None
        own_rate = rate or _average_rate(seconds, declared)
        self.fps = own_rate if fps is None else fps
        self._pass_through = self.is_constant and self.fps == own_rate
        if self._pass_through:
            self.num_frames = len(times)
        else:
            end_s = len(times) / own_rate if self.is_constant else ends[0] - times[0]
            end_s = max(end_s, times[-1] - times[0] + Fraction(1, 1000))
            self.num_frames = max(
                1, math.ceil((end_s - Fraction(self._tolerance(self.fps)).limit_denominator(10**6)) * self.fps)
            )
        self.height, self.width = next(self._decode(1)).shape[:2]

    def __len__(self) -> int:
        return self.num_frames

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._decode(self.num_frames)

    def _decode(self, count: int) -> Iterator[np.ndarray]:
        tolerance, fps = self._tolerance(self.fps), float(self.fps)
        start = float(self.start_s)
        with self._open() as container:
            stream = self._stream(container)
            stream.thread_type = "AUTO"
            held, picture, emitted, decoded = None, None, 0, 0
            decoder = container.decode(stream)
            while emitted < count:
                try:
                    frame = next(decoder, None)
                except av.error.FFmpegError as error:
                    raise self._error(
                        f"is damaged after frame {decoded}",
                        "frames that decode",
                        str(error.strerror),
                        "export it again",
                    ) from error
                if frame is None:
                    break
                decoded += 1
                if self._pass_through:
                    yield self._picture(frame, stream)
                    emitted += 1
                    continue
                due = frame.pts * float(frame.time_base) - start if frame.pts is not None else (decoded - 1) / fps
                while held is not None and emitted < count and emitted / fps + tolerance < due:
                    picture = self._picture(held, stream) if picture is None else picture
                    yield picture
                    emitted += 1
                held, picture = frame, None
            if decoded == 0:
                raise self._error("has no frames", "at least one frame", "none that decode", "record it again")
            if emitted < count and self._pass_through:
                raise self._error(
                    f"is damaged after frame {emitted}", f"{self.num_frames} frames", str(emitted), "export it again"
                )
            while emitted < count:
                picture = self._picture(held, stream) if picture is None else picture
                yield picture
                emitted += 1

    def _picture(self, frame: av.VideoFrame, stream: av.VideoStream) -> np.ndarray:
        """Decoded frame -> upright RGB uint8 [H,W,3] with square pixels."""
        aspect = stream.sample_aspect_ratio
        width = max(1, round(frame.width * aspect)) if aspect else frame.width
        # Untagged video is BT.601 in standard definition and BT.709 above, as players take it.
        bt709 = frame.colorspace == 1 or (frame.colorspace == 2 and frame.height >= 720)
        matrix = "ITU709" if bt709 else "ITU601" if frame.colorspace in (2, 5, 6) else None
        # For RGB the second matrix means nothing, but PyAV before 18 ignores the first when both are equal.
        other = "ITU601" if bt709 else "ITU709"
        image = self._reformatter.reformat(
            frame, width=width, format="rgb24", src_colorspace=matrix, dst_colorspace=other, interpolation="BICUBIC"
        ).to_ndarray()
        turn = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
        if turn is not None:
            image = _upright(image, np.frombuffer(bytes(turn), "<i4").reshape(3, 3), self._error)
        return np.ascontiguousarray(image)

    @contextlib.contextmanager
    def _open(self) -> Iterator[av.container.InputContainer]:
        if not self.path.is_file():
            found = "a folder" if self.path.is_dir() else "no such file"
            raise MediaError(f"video {self.path}", expected="a video file", found=found, action="check the path")
        try:
            container = av.open(str(self.path), metadata_errors="ignore")
        except (av.error.FFmpegError, OSError) as error:
            raise self._error(
                "is not readable as a video",
                "a whole mp4, mov, mkv, webm or avi file",
                str(getattr(error, "strerror", error)),
                "copy or export it again",
            ) from error
        with container:
            yield container

    def _stream(self, container: av.container.InputContainer) -> av.VideoStream:
        """The first video stream that is not a cover picture."""
        for stream in container.streams.video:
            if not stream.disposition & Disposition.attached_pic:
                if stream.codec_context is None:
                    raise self._error(
                        "has a codec that cannot be decoded", "e.g. H.264", "an unknown codec", "export as H.264"
                    )
                return stream
        if not container.streams.video and not container.streams.audio:
            raise self._error(
                "is not readable as a video", "a whole file", "neither pictures nor sound", "copy or export it again"
            )
        found = "sound only" if container.streams.audio else "no video stream"
        raise self._error("has no pictures", "a video stream", found, "choose a video file")

    def _packet_times(
        self, container: av.container.InputContainer, stream: av.VideoStream
    ) -> tuple[list[Fraction], tuple[Fraction, Fraction], int]:
        """(sorted times in seconds of shown frames, (end of the pictures, end of everything), number of packets)."""
        times, num_packets, picture_end, end = [], 0, Fraction(0), Fraction(0)
        rate = stream.guessed_rate or stream.average_rate or Fraction(25)
        try:
            for packet in container.demux():
                if not packet.size:
                    continue
                if packet.is_corrupt:
                    break
                own = packet.stream_index == stream.index
                num_packets += own
                time = packet.pts if packet.pts is not None else packet.dts
                length = (packet.duration or 0) * packet.time_base
                if own and time is None:
                    time, length = (num_packets - 1) / rate, 1 / rate
                elif time is not None:
                    time = time * packet.time_base
                else:
                    continue
                end = max(end, time + length)
                if own and not packet.is_discard:
                    times.append(time)
                    picture_end = max(picture_end, time + length)
        except av.error.FFmpegError as error:
            raise self._error(
                f"is damaged after frame {num_packets}", "a whole file", str(error.strerror), "copy it again"
            ) from error
        times.sort()
        return times, (picture_end, end), num_packets

    def _check_whole(
        self,
        container: av.container.InputContainer,
        stream: av.VideoStream,
        num_packets: int,
        ends: tuple[Fraction, Fraction],
    ) -> None:
        """Compare what is there with what the header promises."""
        if stream.frames and num_packets < stream.frames and "mp4" in container.format.name:
            raise self._error(
                "is cut short",
                f"{stream.frames} frames as its header says",
                str(num_packets),
                "copy or export it again",
            )
        if container.duration and "matroska" in container.format.name:
            promised = Fraction(container.duration, av.time_base)
            if ends[1] < promised - Fraction(1, 2):
                raise self._error(
                    "is cut short",
                    f"{float(promised):.1f} s as its header says",
                    f"{float(ends[1]):.1f} s",
                    "copy it again",
                )

    def _tolerance(self, rate: Fraction) -> float:
        """Seconds by which a time may be off because the container rounds to its ticks."""
        return min(1.01 * self._tick + 1e-9, 0.25 / float(rate))

    def _fits(self, seconds: np.ndarray, rate: Fraction) -> bool:
        """Whether times [n] are those of a constant rate."""
        return bool(np.abs(seconds - np.arange(len(seconds)) / float(rate)).max() <= self._tolerance(rate))

    def _error(self, what: str, expected: str, found: str, action: str) -> MediaError:
        return MediaError(f"video {self.path} {what}", expected=expected, found=found, action=action)


def _average_rate(seconds: np.ndarray, declared: list[Fraction]) -> Fraction:
    """A rate for a file of variable rate: the common rate within 2 % of the average, else the average."""
    if len(seconds) < 2 or seconds[-1] <= 0:
        return Fraction(declared[0]) if declared else Fraction(25)
    average = (len(seconds) - 1) / seconds[-1]
    nearest = min(COMMON_RATES, key=lambda rate: abs(float(rate) - average))
    if abs(float(nearest) / average - 1) <= 0.02:
        return nearest
    return Fraction(average).limit_denominator(1001)


def _upright(image: np.ndarray, matrix: np.ndarray, error) -> np.ndarray:
    """Apply a display matrix [3,3] in 16.16 fixed point to [H,W,3]: one of the eight turns and mirrors."""
    (a, b), (c, d) = matrix[0, :2] / 65536.0, matrix[1, :2] / 65536.0
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if max(straight, crossed) <= 0:
        return image
    if min(straight, crossed) > 0.02 * max(straight, crossed):
        raise error(
            "is turned by an odd angle",
            "a multiple of 90 degrees",
            f"matrix {a:g} {b:g} {c:g} {d:g}",
            "export it again",
        )
    if crossed > straight:
        # x' = c*y, y' = b*x
        image, a, d = image.swapaxes(0, 1), c, b
    if a < 0:
        image = image[:, ::-1]
    if d < 0:
        image = image[::-1]
    return image


class FrameFolder:
    """Pictures of a folder as frames, in natural order (frame2 before frame10), all of one size: uint8 RGB [H,W,3].

    Attributes:
        fps: as given, None otherwise; num_frames; height, width; has_sound: False.

    Raises:
        MediaError: no pictures, sizes that differ (naming the file), a file that is not a picture.
    """

    has_sound = False

    def __init__(self, path: str | os.PathLike, fps: Fraction | None = None):
        self.path = Path(path)
        self.fps = None if fps is None else parse_fps(fps)
        if not self.path.is_dir():
            raise MediaError(
                f"frame folder {path}", expected="a folder of pictures", found="no folder", action="check the path"
            )
        files = [entry for entry in self.path.iterdir() if entry.suffix.lower() in PICTURE_SUFFIXES]
        self.files = sorted((f for f in files if not f.name.startswith(".")), key=natural_key)
        if not self.files:
            raise MediaError(
                f"frame folder {path}", expected="png, jpg or webp files", found="none", action="check the path"
            )
        sizes = [self._size(file) for file in self.files]
        self.height, self.width = sizes[0]
        odd = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
        if odd is not None:
            raise MediaError(
                f"frame {self.files[odd]}",
                expected=f"{self.width}x{self.height} pixels like {self.files[0].name}",
                found=f"{sizes[odd][1]}x{sizes[odd][0]}",
                action="bring all frames to one size",
            )
        self.num_frames = len(self.files)

    def __len__(self) -> int:
        return self.num_frames

    def __iter__(self) -> Iterator[np.ndarray]:
        return (read_image(file) for file in self.files)

    @staticmethod
    def _size(file: Path) -> tuple[int, int]:
        """(height, width) upright, from the header."""
        with open_image(file) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)


@dataclass(frozen=True)
class ArkitTable:
    """Rows of a Live Link Face CSV at a constant rate. Iterating gives coefficients float32 [52].

    coefficients: float32 [T,52] in 0..1, in the order of ARKIT_NAMES.
    head_rotation: float64 [T,3,3], rotation of the head in canonical head space, None when the CSV has no head angles.
    fps: Fraction; num_clamped: how many values lay outside 0..1.
    """

    path: Path
    coefficients: np.ndarray
    head_rotation: np.ndarray | None
    fps: Fraction
    num_clamped: int

    @property
    def num_frames(self) -> int:
        return len(self.coefficients)

    def __len__(self) -> int:
        return len(self.coefficients)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.coefficients)


def head_rotation(yaw: np.ndarray, pitch: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """HeadYaw, HeadPitch, HeadRoll of Live Link Face, [T] in radians -> rotations [T,3,3] in canonical head space.

    R = Ry(yaw) Rx(pitch) Rz(roll), right-handed about +y up, +x to the subject's left, +z out of the face. A positive
    yaw turns the face to the subject's left, a positive pitch lowers the nose, a positive roll tilts the head to the
    subject's right shoulder. This follows from Unreal's ARKit plugin: it takes the face anchor (whose axes are ours) to
    Unreal axes (X = -z, Y = x, Z = y), reads an FRotator, and negates yaw and roll for a face that is not mirrored.
    A recording made with mirroring has the sign of yaw and roll, and left and right, exchanged.
    """
    yaw, pitch, roll = (np.asarray(angle, np.float64) for angle in (yaw, pitch, roll))
    return _turn(1, yaw) @ _turn(0, pitch) @ _turn(2, roll)


def _turn(axis: int, angles: np.ndarray) -> np.ndarray:
    """Right-handed rotation about x, y or z: [T] -> [T,3,3]."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    turn = np.zeros((len(angles), 3, 3))
    turn[:, axis, axis] = 1
    turn[:, i, i] = turn[:, j, j] = np.cos(angles)
    turn[:, j, i], turn[:, i, j] = np.sin(angles), -np.sin(angles)
    return turn


def read_arkit_csv(path: str | os.PathLike, fps: Fraction | None = None) -> ArkitTable:
    """A CSV of Live Link Face (or any with the 52 names, in any case and order) -> ArkitTable.

    Rate: the `Timecode` column counts frames within a second (`HH:MM:SS:FF.fff`), which gives the recording's rate once
    a second has passed; shorter recordings and files without timecode count as 60. With `fps`, or where frames were
    dropped, rows are resampled: frame k shows the last row due at k/fps, where a row may be half a frame late.
    Values outside 0..1 are clamped, counted and logged.

    Raises:
        MediaError: missing columns by name, cells that are no finite numbers (naming line and column), no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"CSV {path}", expected="a .csv file", found="no such file", action="check the path")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise MediaError(f"CSV {path}", expected="text in UTF-8", found=str(error), action="export it again") from error
    if len(rows) < 2:
        raise MediaError(
            f"CSV {path}", expected="a header and at least one row", found=f"{len(rows)} lines", action="record again"
        )
    header = [name.strip().lower() for name in rows[0]]
    columns = {name: index for index, name in reversed(list(enumerate(header)))}
    missing = [name for name in ARKIT_NAMES if name.lower() not in columns]
    if missing:
        near = difflib.get_close_matches(missing[0].lower(), [n for n in header if n not in _KNOWN_COLUMNS], 1)
        hint = f"; {missing[0]} is perhaps {rows[0][header.index(near[0])].strip()!r}" if near else ""
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise MediaError(
            f"CSV {path} has no column {shown}",
            expected="the 52 ARKit coefficients",
            found=f"{len(header)} columns{hint}",
            action="rename or add the columns",
        )
    values = _cells(path, rows, [columns[name.lower()] for name in ARKIT_NAMES])
    clamped = np.clip(values, 0, 1)
    num_clamped = int((np.abs(values - clamped) > 1e-6).sum())
    if num_clamped:
        log.warning("CSV %s: %d values outside 0..1 were clamped", path, num_clamped)
    rotation = None
    if all(name in columns for name in ("headyaw", "headpitch", "headroll")):
        angles = _cells(path, rows, [columns[name] for name in ("headyaw", "headpitch", "headroll")])
        if np.abs(angles).max() > 2 * math.pi:
            raise MediaError(
                f"CSV {path}: head angles",
                expected="radians",
                found=f"values up to {np.abs(angles).max():g}",
                action="convert degrees to radians",
            )
        rotation = head_rotation(*angles.T)
    if "timecode" in columns:
        rate, times = _timecodes(path, rows, columns["timecode"])
    else:
        rate, times = LIVE_LINK_FPS, [Fraction(i) / LIVE_LINK_FPS for i in range(len(rows) - 1)]
    target = rate if fps is None else parse_fps(fps)
    count = max(1, math.ceil((times[-1] + 1 / rate) * target - Fraction(1, 2)))
    due = (np.arange(count) + 0.5) / float(target)
    index = np.maximum(np.searchsorted([float(time) for time in times], due, side="right") - 1, 0)
    if target == rate and len(times) == count:
        index = np.arange(count)
    return ArkitTable(
        path,
        clamped[index].astype(np.float32),
        None if rotation is None else rotation[index],
        target,
        num_clamped,
    )


_KNOWN_COLUMNS = frozenset(name.lower() for name in ARKIT_NAMES)


def _cells(path: Path, rows: list[list[str]], columns: list[int]) -> np.ndarray:
    """The named columns as float64 [T,len(columns)], all finite."""
    values = np.empty((len(rows) - 1, len(columns)))
    for row_idx, row in enumerate(rows[1:]):
        for i, column in enumerate(columns):
            cell = row[column].strip() if column < len(row) else ""
            try:
                values[row_idx, i] = float(cell)
            except ValueError:
                values[row_idx, i] = math.nan
            if not math.isfinite(values[row_idx, i]):
                raise MediaError(
                    f"CSV {path}, row {row_idx + 1}, column {rows[0][column].strip()}",
                    expected="a finite number",
                    found=repr(cell) if cell else "nothing",
                    action="correct or remove the row",
                )
    return values


def _timecodes(path: Path, rows: list[list[str]], column: int) -> tuple[Fraction, list[Fraction]]:
    """(rate of the recording, times [T] in seconds from the first row)."""
    seconds, frames = [], []
    for row_idx, row in enumerate(rows[1:]):
        cell = row[column].strip() if column < len(row) else ""
        match = re.fullmatch(r"(\d+):(\d+):(\d+)[:;](\d+(?:\.\d+)?)", cell)
        if not match:
            raise MediaError(
                f"CSV {path}, row {row_idx + 1}, column Timecode",
                expected="HH:MM:SS:FF.fff",
                found=repr(cell),
                action="correct it, or remove the column to take 60 frames per second",
            )
        hours, minutes, whole = (int(part) for part in match.groups()[:3])
        seconds.append(hours * 3600 + minutes * 60 + whole)
        frames.append(Fraction(match[4]))
    rate = LIVE_LINK_FPS
    if seconds[-1] != seconds[0]:
        highest = math.floor(max(frames)) + 1
        rate = next((Fraction(r) for r in (24, 25, 30, 48, 50, 60, 100, 120) if r >= highest), Fraction(highest))
    times = [second + frame / rate for second, frame in zip(seconds, frames, strict=True)]
    for row_idx in range(1, len(times)):
        # A recording over midnight begins again at 0.
        if times[row_idx] < times[row_idx - 1] - 43200:
            times[row_idx:] = [time + 86400 for time in times[row_idx:]]
        if times[row_idx] < times[row_idx - 1]:
            raise MediaError(
                f"CSV {path}, row {row_idx + 1}, column Timecode",
                expected="time that goes forward",
                found=f"{rows[row_idx + 1][column].strip()} after {rows[row_idx][column].strip()}",
                action="sort the rows",
            )
    return rate, [time - times[0] for time in times]
