"""Cameras per frame and their rays. Inside: OpenCV (x right, y down, z forward) in canonical head space, metres."""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from factorportrait.errors import MediaError
from factorportrait.runtime.media.fit import Fit, natural_key
from factorportrait.runtime.media.streams import source_index

log = logging.getLogger(__name__)

# Of a rotation written with 5 digits or more.
RIGID_TOLERANCE = 1e-3
ASPECT_TOLERANCE = 0.02
DEFAULT_ORBIT_DEGREES = 30.0
DEFAULT_DOLLY_FACTOR = 0.8
DEFAULT_PERIOD_S = 4.0
PRESETS = ("static", "orbit", "dolly", "freeze")


@dataclass(frozen=True)
class Cameras:
    """T cameras: `K` [T,3,3] in pixels of the output (centres at +0.5), `c2w` [T,4,4] OpenCV in head space; float64."""

    K: np.ndarray
    c2w: np.ndarray

    def __len__(self) -> int:
        return len(self.c2w)

    def select(self, start: int, count: int) -> Cameras:
        """Cameras start..start+count-1; past the end the last camera is held."""
        index = np.minimum(np.arange(start, start + count), len(self) - 1)
        return Cameras(self.K[index], self.c2w[index])


@dataclass(frozen=True)
class CameraPath:
    """A camera for every frame index, without end: files hold their last camera and are cut where the clip ends.

    freeze: pose and expression hold their first frame while the camera moves.
    num_frames: for how many output frames the file has cameras; None for presets.
    """

    name: str
    at: Callable[[np.ndarray], Cameras]
    freeze: bool = False
    num_frames: int | None = None

    def resampled(self, source_fps: Fraction, fps: Fraction) -> CameraPath:
        """The path of a file with one camera per frame at `source_fps`, at the output's rate `fps`."""

        def at(index: np.ndarray) -> Cameras:
            return self.at(np.array([source_index(int(i), source_fps, fps) for i in index], np.int64))

        count = None if self.num_frames is None else max(1, math.ceil(self.num_frames * fps / source_fps))
        return replace(self, at=at, num_frames=count)

    def cameras(self, start: int, count: int) -> Cameras:
        """Cameras [count] of frames start..start+count-1."""
        return self.at(np.arange(start, start + count))

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(K [3,3], c2w [4,4]) of frame 0, 1, ...; endless."""
        index = 0
        while True:
            cameras = self.cameras(index, 1)
            yield cameras.K[0], cameras.c2w[0]
            index += 1


def open_camera(
    spec: str | os.PathLike,
    height: int,
    width: int,
    default_K: np.ndarray,
    default_c2w: np.ndarray,
    fps: Fraction,
    fit: str = "crop",
    video_size: tuple[int, int] | None = None,
) -> CameraPath:
    """A preset or a camera file -> CameraPath in pixels of height x width.

    static             the default camera
    orbit[:30]         swings by +-30 degrees about the vertical axis through the head's origin, starting at the default
                       camera, as a sine; `orbit:±30` and `orbit:+-30` are the same
    dolly[:0.8]        moves towards the origin to 0.8 of the distance and back
    freeze[:30]        an orbit during which pose and expression hold their first frame
    `,period=6` after any of them is the time of one swing in seconds, 4 unless said.

    Args:
        default_K, default_c2w: [3,3] in pixels of the output and [4,4], from the bundle.
        fps: frame rate of the output; presets move in seconds.
        video_size: see `load_cameras`.

    Raises:
        MediaError: an unknown preset, a missing file, or anything that `load_cameras` refuses.
    """
    text = str(spec)
    name, _, rest = text.partition(":")
    name, _, options = name.partition(",")
    looks_like_file = Path(text).suffix.lower() == ".json" or os.sep in text or Path(text).exists()
    if name not in PRESETS or Path(text).is_file():
        if not looks_like_file:
            near = difflib.get_close_matches(name, PRESETS, 1)
            raise MediaError(
                f"camera {text!r}",
                expected="static, orbit:30, dolly:0.8, freeze:30 or a .json file",
                action=f"did you mean {near[0]}?" if near else "check --camera",
            )
        cameras = load_cameras(text, height, width, fit, video_size)
        last = len(cameras) - 1

        def hold(index: np.ndarray) -> Cameras:
            index = np.minimum(index, last)
            return Cameras(cameras.K[index], cameras.c2w[index])

        return CameraPath(text, hold, num_frames=len(cameras))
    amount, period_s = _preset_numbers(text, name, f"{rest},{options}")
    K = np.asarray(default_K, np.float64).reshape(3, 3)
    c2w = np.asarray(default_c2w, np.float64).reshape(4, 4)
    return CameraPath(text, _preset(name, amount, period_s, K, c2w, Fraction(fps)), freeze=name == "freeze")


def _preset_numbers(text: str, name: str, rest: str) -> tuple[float, float]:
    """(amount, period in seconds) of `orbit:30,period=6`."""
    amount = DEFAULT_DOLLY_FACTOR if name == "dolly" else DEFAULT_ORBIT_DEGREES
    period_s = DEFAULT_PERIOD_S
    for part in (part.strip() for part in rest.split(",")):
        key, has_value, value = part.partition("=")
        try:
            if not part:
                continue
            if has_value and key.strip() != "period":
                raise ValueError(f"unknown option {key.strip()!r}")
            if has_value:
                period_s = float(value)
            elif name == "static":
                raise ValueError("static takes no number")
            else:
                amount = float(part.replace("+-", "").lstrip("±").removesuffix("deg").removesuffix("°"))
        except ValueError as error:
            raise MediaError(
                f"camera {text!r}",
                expected="e.g. orbit:30,period=6 or dolly:0.8",
                found=str(error),
                action="check --camera",
            ) from error
    low, high, unit = (0.2, 5.0, "times the distance") if name == "dolly" else (-180.0, 180.0, "degrees")
    if not low <= amount <= high or not (period_s > 0 and math.isfinite(period_s)):
        raise MediaError(
            f"camera {text!r}",
            expected=f"{low:g} to {high:g} {unit}, and a period above 0 seconds",
            found=f"{amount:g} and {period_s:g} s",
            action="check --camera",
        )
    return amount, period_s


def _preset(
    name: str, amount: float, period_s: float, K: np.ndarray, c2w: np.ndarray, fps: Fraction
) -> Callable[[np.ndarray], Cameras]:
    """Frame indices [T] -> Cameras of a preset."""

    def at(index: np.ndarray) -> Cameras:
        index = np.asarray(index)
        phase = 2 * np.pi * (index / float(fps)) / period_s
        poses = np.repeat(c2w[None], len(index), axis=0)
        if name in ("orbit", "freeze"):
            poses = _rotations_y(np.deg2rad(amount) * np.sin(phase)) @ poses
        elif name == "dolly":
            poses[:, :3, 3] *= (1 + (amount - 1) * (1 - np.cos(phase)) / 2)[:, None]
        return Cameras(np.repeat(K[None], len(index), axis=0), poses)

    return at


def _rotations_y(angles: np.ndarray) -> np.ndarray:
    """Angles [T] in radians -> [T,4,4]; a positive angle carries the camera to +x, the subject's left."""
    turn = np.repeat(np.eye(4)[None], len(angles), axis=0)
    turn[:, 0, 0], turn[:, 0, 2] = np.cos(angles), np.sin(angles)
    turn[:, 2, 0], turn[:, 2, 2] = -np.sin(angles), np.cos(angles)
    return turn


def load_cameras(
    path: str | os.PathLike,
    height: int,
    width: int,
    fit: str = "crop",
    video_size: tuple[int, int] | None = None,
) -> Cameras:
    """A camera file -> Cameras for an output of height x width.

    Two formats. Ours:
        {"convention": "opencv", "width": 512, "height": 512, "K": [[fx,0,cx],[0,fy,cy],[0,0,1]],
         "frames": [{"c2w": 4x4}, {"c2w": 4x4, "K": 3x3}, ...]}
    with fx, fy, cx, cy instead of K if you like, shared or per frame, in the order of the frames. And nerfstudio's
    transforms.json: OpenGL `transform_matrix`, fl_x, fl_y, cx, cy, w, h shared or per frame, or camera_angle_x; its
    frames are sorted naturally by `file_path` as nerfstudio does. The world of both must be canonical head space.

    Intrinsics are in pixels of the file's width x height and are moved like a frame of that size (see `Fit`): one scale
    for both directions, the centre cut or padded, so an off-centre principal point stays where it was in the picture.
    Without a size in a file that has only camera_angle_x, the size of the video or else of the output is taken.

    video_size: (height, width) of the video that was rendered with these cameras. It may have been scaled since, so
    only the aspect ratio has to be the file's.

    Raises:
        MediaError: naming the frame index: NaN, a matrix that is singular, mirrored, scaled or sheared, a focal length
            that is not positive, a missing key, another aspect ratio than that of `video_size`.
    """
    path = Path(path)
    data = _read_json(path)
    frames = data.get("frames")
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise MediaError(
            f"camera file {path}",
            expected='a list "frames" with at least one camera',
            action="see load_cameras for the format",
        )
    nerfstudio = "transform_matrix" in frames[0]
    if nerfstudio:
        _check_nerfstudio(path, data)
        if all(isinstance(frame.get("file_path"), str) for frame in frames):
            frames = sorted(frames, key=lambda frame: natural_key(frame["file_path"]))
    elif data.get("convention") != "opencv":
        raise MediaError(
            f"camera file {path}",
            expected='"convention": "opencv", or a nerfstudio transforms.json with transform_matrix',
            found=f'"convention": {json.dumps(data.get("convention"))}',
            action="convert the matrices to OpenCV camera-to-world and say so",
        )
    Ks, poses = [], []
    for frame_idx, frame in enumerate(frames):
        where = f"camera file {path}, frame {frame_idx}"
        c2w = _matrix(where, frame, "transform_matrix" if nerfstudio else "c2w", 4)
        poses.append(c2w_from_opengl(c2w) if nerfstudio else c2w)
        check_pose(where, poses[-1])
        poses[-1][3] = 0, 0, 0, 1  # exactly: what takes cameras has no tolerance for what rounding left in a file
        K, size = _intrinsics(where, data, frame, nerfstudio, *(video_size or (height, width)))
        check_intrinsics(where, K)
        _check_aspect(where, size, video_size)
        Ks.append(Fit.between(size[0], size[1], height, width, fit).intrinsics(K))
    return Cameras(np.stack(Ks), np.stack(poses))


def c2w_from_opengl(c2w: np.ndarray) -> np.ndarray:
    """[...,4,4] with camera axes x right, y up, z backward -> x right, y down, z forward. The world does not change."""
    return np.asarray(c2w, np.float64) @ np.diag([1.0, -1.0, -1.0, 1.0])


def check_pose(where: str, c2w: np.ndarray) -> None:
    """MediaError unless c2w [4,4] is a rotation and a translation."""
    rotation = c2w[:3, :3]
    action = "write a camera-to-world matrix with a pure rotation, row by row"
    if not np.isfinite(c2w).all():
        raise MediaError(
            f"{where}: camera matrix", expected="numbers", found="NaN or infinity", action="check the file"
        )
    if np.abs(c2w[3] - [0, 0, 0, 1]).max() > RIGID_TOLERANCE:
        raise MediaError(
            f"{where}: camera matrix",
            expected="a last row of 0 0 0 1",
            found=" ".join(f"{x:g}" for x in c2w[3]),
            action=action,
        )
    determinant = np.linalg.det(rotation)
    if abs(determinant) < 1e-9:
        raise MediaError(
            f"{where}: camera matrix", expected="an invertible matrix", found="a singular one", action=action
        )
    if determinant < 0:
        raise MediaError(
            f"{where}: camera matrix", expected="a right-handed camera", found="a mirrored one", action=action
        )
    if np.abs(rotation.T @ rotation - np.eye(3)).max() > RIGID_TOLERANCE:
        raise MediaError(f"{where}: camera matrix", expected="a rigid move", found="scale or shear", action=action)


def check_intrinsics(where: str, K: np.ndarray) -> None:
    """MediaError unless K [3,3] is finite, upper triangular without skew, and has focal lengths of a pixel or more."""
    if not np.isfinite(K).all():
        raise MediaError(f"{where}: K", expected="numbers", found="NaN or infinity", action="check the file")
    if K[0, 0] < 1 or K[1, 1] < 1:
        raise MediaError(
            f"{where}: focal length",
            expected="1 pixel or more",
            found=f"{K[0, 0]:g}, {K[1, 1]:g}",
            action="turn signs belong into the camera matrix",
        )
    if np.abs([K[0, 1], K[1, 0], K[2, 0], K[2, 1], K[2, 2] - 1]).max() > 1e-6:
        raise MediaError(
            f"{where}: K", expected="[[fx,0,cx],[0,fy,cy],[0,0,1]]", found="other entries", action="check the file"
        )


def check_cameras(K: np.ndarray, c2w: np.ndarray) -> None:
    """Every pixel has a ray; the same checks as in rays.h. K [F, 3, 3], c2w [F, 4, 4].

    Raises:
        ValueError: a camera has none; it names the first.
    """
    for name, matrices in (("K", K), ("c2w", c2w[:, :3, :3])):
        sizes = np.abs(matrices).max((1, 2))
        with np.errstate(all="ignore"):
            good = np.isfinite(matrices).all((1, 2)) & (np.abs(np.linalg.det(matrices)) > 1e-14 * sizes**3)
        if not good.all():
            what = (
                "an invertible matrix of finite numbers; no ray goes through a pixel" if name == "K" else "a rotation"
            )
            raise ValueError(f"{name}[{int(np.argmin(good))}]: expected {what}")
    good = np.isfinite(c2w).all((1, 2)) & (np.abs(c2w[:, 3] - [0, 0, 0, 1]).sum(1) <= 1e-9)
    if not good.all():
        raise ValueError(
            f"c2w[{int(np.argmin(good))}]: expected finite numbers and a last row of 0 0 0 1; is it transposed?"
        )


def ray_maps(K: np.ndarray, c2w: np.ndarray, height: int, width: int, stride: int = 8) -> np.ndarray:
    """Plücker rays `[o x d, d]` with unit d through the centre of every latent cell, in head space.

    K [T,3,3] in pixels of height x width, c2w [T,4,4] OpenCV -> float32 [T,6,height/stride,width/stride].
    Computed in float64. ValueError when the size is not a multiple of the stride.
    """
    if height % stride or width % stride:
        raise ValueError(f"{height}x{width} is not a multiple of the stride {stride}")
    K, c2w = np.asarray(K, np.float64), np.asarray(c2w, np.float64)
    y, x = np.meshgrid(
        (np.arange(height // stride) + 0.5) * stride, (np.arange(width // stride) + 0.5) * stride, indexing="ij"
    )
    pixels = np.stack([x, y, np.ones_like(x)])  # [3,h,w]
    directions = np.einsum("tij,jhw->tihw", c2w[:, :3, :3] @ np.linalg.inv(K), pixels)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    origins = np.broadcast_to(c2w[:, :3, 3, None, None], directions.shape)
    moments = np.cross(origins, directions, axis=1)
    return np.concatenate([moments, directions], axis=1).astype(np.float32)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise MediaError(f"camera file {path}", expected="a .json file", found="no such file", action="check --camera")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise MediaError(f"camera file {path}", expected="JSON", found=str(error), action="check the file") from error
    if not isinstance(data, dict):
        raise MediaError(
            f"camera file {path}", expected="a JSON object", found=type(data).__name__, action="check the file"
        )
    return data


def _check_aspect(where: str, size: tuple[int, int], video_size: tuple[int, int] | None) -> None:
    """MediaError when the cameras of a file of `size` (height, width) cannot be those of a video of `video_size`."""
    if video_size is None:
        return
    aspect, video_aspect = size[1] / size[0], video_size[1] / video_size[0]
    # Codecs need even sizes: 101x67 comes as 102x68.
    if abs(aspect / video_aspect - 1) > ASPECT_TOLERANCE:
        raise MediaError(
            f"{where}: aspect ratio",
            expected=f"that of the video it was rendered with, {video_size[1]}x{video_size[0]}",
            found=f"{size[1]}x{size[0]}",
            action="write the size that the focal length refers to, or render the video again",
        )


def _check_nerfstudio(path: Path, data: dict) -> None:
    model = str(data.get("camera_model", "OPENCV")).upper()
    if model not in ("OPENCV", "PINHOLE", "PERSPECTIVE", "SIMPLE_PINHOLE"):
        raise MediaError(
            f"camera file {path}", expected="a pinhole camera model", found=model, action="undistort the pictures first"
        )
    distorted = [key for key in ("k1", "k2", "k3", "k4", "p1", "p2") if data.get(key)]
    if distorted:
        log.warning("camera file %s: lens distortion (%s) is not used", path, ", ".join(distorted))


def _matrix(where: str, frame: dict, key: str, size: int) -> np.ndarray:
    try:
        matrix = np.array(frame[key], np.float64)
    except KeyError as error:
        raise MediaError(
            f"{where}: no {key!r}", expected=f"a {size}x{size} matrix", found=", ".join(frame), action="check the file"
        ) from error
    except (TypeError, ValueError) as error:
        raise MediaError(
            f"{where}: {key}", expected=f"{size}x{size} numbers", found=str(error), action="check the file"
        ) from error
    if matrix.shape != (size, size):
        raise MediaError(
            f"{where}: {key}",
            expected=f"{size}x{size} numbers",
            found=f"shape {list(matrix.shape)}",
            action="check the file",
        )
    return matrix


def _intrinsics(
    where: str, data: dict, frame: dict, nerfstudio: bool, height: int, width: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """(K [3,3] in pixels of the file, (height, width) of the file); keys of the frame win over shared ones."""

    def number(*keys: str) -> float | None:
        for source in (frame, data):
            for key in keys:
                if source.get(key) is not None:
                    try:
                        return float(source[key])
                    except (TypeError, ValueError) as error:
                        raise MediaError(
                            f"{where}: {key}",
                            expected="a number",
                            found=repr(source[key])[:40],
                            action="check the file",
                        ) from error
        return None

    file_width, file_height = number("w", "width"), number("h", "height")
    focal_x, focal_y = number("fl_x", "fx"), number("fl_y", "fy")
    angle_x, angle_y = number("camera_angle_x"), number("camera_angle_y")
    K = next((_matrix(where, source, "K", 3) for source in (frame, data) if "K" in source), None)
    if file_width is None or file_height is None:
        if K is not None or focal_x is not None or angle_x is None:
            size = "w and h" if nerfstudio else "width and height"
            raise MediaError(
                f"{where}: no size",
                expected=f"{size} in pixels that the focal length refers to",
                action="add them to the file",
            )
        file_width, file_height = width, height
    if not (file_width >= 1 and file_height >= 1 and math.isfinite(file_width) and math.isfinite(file_height)):
        raise MediaError(
            f"{where}: size",
            expected="1 pixel or more",
            found=f"{file_width:g}x{file_height:g}",
            action="check the file",
        )
    size = (int(file_height), int(file_width))
    if K is not None:
        return K, size
    if focal_x is None:
        if angle_x is None or not 0 < angle_x < math.pi:
            raise MediaError(
                f"{where}: no focal length",
                expected="fl_x, or camera_angle_x between 0 and pi" if nerfstudio else "K, or fx, fy, cx, cy",
                found="none" if angle_x is None else f"camera_angle_x {angle_x:g}",
                action="add it to the file",
            )
        focal_x = 0.5 * file_width / math.tan(angle_x / 2)
        if focal_y is None and angle_y is not None and 0 < angle_y < math.pi:
            focal_y = 0.5 * file_height / math.tan(angle_y / 2)
    focal_y = focal_x if focal_y is None else focal_y
    centre_x, centre_y = number("cx"), number("cy")
    centre_x = file_width / 2 if centre_x is None else centre_x
    centre_y = file_height / 2 if centre_y is None else centre_y
    return np.array([[focal_x, 0, centre_x], [0, focal_y, centre_y], [0, 0, 1.0]]), size
