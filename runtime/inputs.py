"""What a user brings -> driving frames. Expression, pose and camera may come from three different places."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from factorportrait.bundle import Bundle
from factorportrait.errors import MediaError, UserError
from factorportrait.model_config import ModelConfig
from factorportrait.runtime.conditions import DrivingFrame
from factorportrait.runtime.media.camera import CameraPath, open_camera
from factorportrait.runtime.media.driving import DrivingClip, VideoSource, open_driving
from factorportrait.runtime.media.fit import Box, Fit, square_crop
from factorportrait.runtime.media.mesh import PosedHead, open_mesh
from factorportrait.runtime.media.normals import NormalRenderer, NormalVideo
from factorportrait.runtime.media.streams import Combined, Resampled, Stream

log = logging.getLogger(__name__)


def default_camera(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """The frontal camera of the config: K [3,3] in pixels of the output, c2w [4,4] OpenCV in canonical head space."""
    camera = config.camera
    focal = config.height / 2 / np.tan(np.radians(camera.fov_degrees) / 2)
    K = np.array([[focal, 0, config.width / 2], [0, focal, config.height / 2], [0, 0, 1.0]])
    c2w = np.diag([1.0, -1.0, -1.0, 1.0])  # looks along -z of head space at the face, y of the picture downwards
    c2w[:3, 3] = np.array(camera.target) + [0, 0, camera.distance]
    return K, c2w


@dataclass
class PoseTrack:
    """Where the head is: vertices per frame to be rendered, or normal maps that are rendered already.

    baked: (rate of the file, (height, width)) of the normal maps.
    """

    items: Stream
    faces: np.ndarray | None
    description: str
    baked: tuple[Fraction, tuple[int, int]] | None = None


@dataclass
class Driving:
    """All sources, walked together.

    Attributes:
        fps: exact output rate.
        num_frames: length where it is known.
        sound: file whose sound belongs to the expression; None where there is none, or where `freeze` holds the expression.
        notes: what was assumed, one line each; command lines print them.
    """

    fps: Fraction
    num_frames: int | None
    sound: Path | None
    notes: list[str]
    _frames: Callable[[], Iterator[DrivingFrame]]

    def __iter__(self) -> Iterator[DrivingFrame]:
        return self._frames()


def open_inputs(
    bundle: Bundle,
    driving: str | Path | None,
    *,
    expression_from: str | Path | None = None,
    pose_from: str | Path | None = None,
    camera: str | None = None,
    fps: Fraction | None = None,
    num_frames: int | None = None,
    driving_crop: Box | None = None,
    fit: str = "crop",
    control: str | Path | None = None,
) -> Driving:
    """Open the sources of a run.

    Args:
        driving: gives whatever the other arguments do not: expression, pose and camera. Without a pose the head is still.
        expression_from, pose_from: other sources for these two; `pose_from` has to have a pose.
        camera: preset or file; see `factorportrait.runtime.media.camera.open_camera`.
        fps: of the output; None takes the rate of the expression's source. Sources with another rate are resampled; a camera file
            named by `camera` has one camera per output frame.
        num_frames: at most so many.
        driving_crop: square of the driving picture that the expression encoder sees; None is the centred square.
        control: video that takes the place of rendered normal maps, for systems that were trained on other pictures of a pose.

    Raises:
        MediaError, UserError: a source cannot be used, or sources do not go together.
    """
    config, notes = bundle.config, []
    if control is not None and pose_from is not None:
        raise UserError(
            f"--control {control} with --pose-from {pose_from}", expected="one source of the pose", found="two",
            action="leave one of them out",
        )  # fmt: skip
    expression_path = expression_from if expression_from is not None else driving
    expression = _open(expression_path, fps)
    if expression is None or (expression.clip.video is None and expression.clip.coefficients is None):
        raise MediaError(
            "no expression to follow", expected="a video, frames or an ARKit .csv", found="none",
            action="give --driving or --expression-from",
        )  # fmt: skip
    if expression.clip.video is not None and expression.clip.coefficients is not None:
        table_name, video_name = expression.clip.coefficients.path.name, expression.clip.video.path.name
        sound = " and gives the sound" if expression.clip.sound is not None else ""
        notes.append(
            f"the expression comes from {table_name} of {expression.clip.path}; {video_name} beside it is only shown{sound}"
        )
    rate = fps or expression.own_fps or Fraction(config.fps).limit_denominator(1001)
    if fps is None and not 0.8 <= rate / Fraction(config.fps) <= 1.25:
        notes.append(
            f"the driving has {float(rate):.5g} frames a second, the model was trained at {config.fps:g}: "
            f"--fps {config.fps:g} resamples"
        )
    # Every source comes at the output's rate: a pose tracked at 25 frames a second goes with an expression filmed at 30.
    main = _open(driving, rate)
    pose_source = _open(pose_from, rate) or main or expression
    if control is not None or "pose" not in config.conditioning.follows:
        pose = _pictures_track(config, control, rate, fit)
    else:
        pose = _pose_track(bundle, pose_source, rate, fit, notes, explicit=pose_from is not None)
    path = _camera_path(config, camera, pose_source, main, pose, rate, fit, notes)
    return _combine(config, expression.clip, pose, path, rate, num_frames, driving_crop, notes)


@dataclass(frozen=True)
class _Source:
    """A driving path opened at the output's rate, and the rate that it has itself (None where nothing says)."""

    clip: DrivingClip
    own_fps: Fraction | None


def _open(path: str | Path | None, fps: Fraction | None) -> _Source | None:
    if path is None:
        return None
    clip = open_driving(path)
    return _Source(clip if fps in (None, clip.fps) else open_driving(path, fps), clip.fps)


def _pose_track(
    bundle: Bundle, source: _Source, fps: Fraction, fit: str, notes: list[str], explicit: bool
) -> PoseTrack:
    """The pose of a source. Without one: a still head with a note, or UserError where the source was `explicit`ly named."""
    config, clip = bundle.config, source.clip
    if clip.mesh is not None:
        mesh = open_mesh(clip.mesh)
        items = mesh if source.own_fps in (None, fps) else Resampled(mesh, mesh.num_frames, source.own_fps, fps)
        return PoseTrack(Stream("pose", items, items.num_frames), mesh.faces, f"mesh {clip.mesh}")
    if clip.normals is not None:
        video = NormalVideo(clip.normals, config.height, config.width, fps, fit)
        baked = VideoSource(clip.normals).fps, (video.height, video.width)
        return PoseTrack(Stream("pose", video, video.num_frames), None, f"normal maps {clip.normals}", baked)
    table = clip.coefficients
    has_angles = table is not None and table.head_rotation is not None
    if explicit and not has_angles:
        kind = "coefficients without head angles" if table is not None else "pictures only"
        raise UserError(
            f"--pose-from {clip.path} has no pose",
            expected="a mesh (.npz, .obj, a folder of .obj), a .csv with head angles, or a folder with mesh.npz, or with "
            "normals.mp4 and cameras.json",
            found=kind if table is not None or clip.video is not None else "a camera only",
            action="put a video of normal maps into a folder as normals.mp4 beside its cameras.json; "
            "leave --pose-from out for a still head",
        )  # fmt: skip
    if "head.npz" not in bundle.manifest.files:
        raise UserError(
            f"{clip.path} has no pose", expected="a mesh, normal maps, or a bundle with head.npz to pose", found="none",
            action="give --pose-from a folder with mesh.npz or normals.mp4",
        )  # fmt: skip
    head = PosedHead(bundle.file("head.npz"))
    if has_angles:
        rotations = _Mapped(table.head_rotation, head.vertices)
        return PoseTrack(Stream("pose", rotations, len(table.head_rotation)), head.faces, f"head angles of {clip.path}")
    notes.append(f"{clip.path} says nothing about the pose of the head: it stays still (--pose-from gives one)")
    return PoseTrack(Stream.constant("pose", head.vertices(np.eye(3))), head.faces, "a still head")


def _pictures_track(config: ModelConfig, control: str | Path | None, fps: Fraction, fit: str) -> PoseTrack:
    """The frames of a control video as they are, or nothing to see where a system does not follow a pose."""
    if "pose" not in config.conditioning.follows:
        if control is not None:
            raise UserError(
                f"--control {control}", expected="a system that follows such a video", found=config.system,
                action="leave it out",
            )  # fmt: skip
        black = np.zeros((config.height, config.width, 3), np.uint8)
        return PoseTrack(Stream.constant("pose", black), None, "not followed")
    video = VideoSource(control, fps)
    shape = Fit.between(video.height, video.width, config.height, config.width, fit)
    return PoseTrack(Stream("pose", _Fitted(video, shape), video.num_frames), None, f"control video {control}")


@dataclass
class _Fitted:
    """Frames of a video at the size of the output."""

    video: VideoSource
    shape: Fit

    def __iter__(self):
        return map(self.shape.apply, self.video)


@dataclass
class _Mapped:
    """`function` of each item, anew in every iteration; nothing is kept."""

    items: np.ndarray
    function: Callable

    def __iter__(self):
        return map(self.function, self.items)


def _camera_path(
    config: ModelConfig,
    camera: str | None,
    pose_source: _Source,
    main: _Source | None,
    pose: PoseTrack,
    fps: Fraction,
    fit: str,
    notes: list[str],
) -> CameraPath:
    """The camera that was asked for, else the one that goes with the pose or the driving, else a static frontal one."""
    own_fps, video_size = None, None
    if pose.baked is not None:
        if camera is not None:
            raise UserError(
                f"--camera {camera} with {pose.description}", expected="the camera that the normal maps were rendered with",
                found="another one", action="leave --camera out, or bring mesh.npz, which can be seen from anywhere",
            )  # fmt: skip
        camera, (own_fps, video_size) = pose_source.clip.cameras, pose.baked
    elif camera is None:
        with_camera = (source for source in (main, pose_source) if source is not None and source.clip.cameras)
        found = next(with_camera, None)
        camera, own_fps = (found.clip.cameras, found.own_fps) if found else ("static", None)
    path = open_camera(camera, config.height, config.width, *default_camera(config), fps, fit, video_size)
    if own_fps not in (None, fps):
        path = path.resampled(own_fps, fps)
    notes.append(f"pose: {pose.description}; camera: {path.name}")
    return path


def _combine(
    config: ModelConfig,
    expression: DrivingClip,
    pose: PoseTrack,
    path: CameraPath,
    fps: Fraction,
    num_frames: int | None,
    driving_crop: Box | None,
    notes: list[str],
) -> Driving:
    table, video = expression.coefficients, expression.video
    source = table if table is not None else video
    streams = [Stream("expression", source, expression.num_frames), pose.items, Stream("camera", path, end="hold")]
    if table is not None and video is not None:
        streams.append(Stream("picture", video, video.num_frames, end="hold"))
    combined = Combined(streams, num_frames)
    length = combined.num_frames
    renderer = NormalRenderer(config.height, config.width, supersample=2) if pose.faces is not None else None
    side = config.expression.image_size

    def frames() -> Iterator[DrivingFrame]:
        first: dict | None = None
        cache = _RenderCache(renderer, pose.faces)
        for items in combined:
            first = first or items
            seen = first if path.freeze else items
            K, c2w = items["camera"]
            normals = seen["pose"] if renderer is None else cache(seen["pose"], K, c2w)
            picture = seen["expression"] if table is None else seen.get("picture")
            image = None if picture is None else square_crop(picture, side, driving_crop)
            yield DrivingFrame(normals, K, c2w, image, None if table is None else seen["expression"])

    if (
        expression.num_frames is not None
        and length is not None
        and length < expression.num_frames
        and num_frames is None
    ):
        notes.append(f"the shortest source decides: {length} of {expression.num_frames} frames")
    if path.num_frames is not None and length is not None and path.num_frames < length:
        have = "1 camera" if path.num_frames == 1 else f"{path.num_frames} cameras"
        notes.append(f"{path.name} has {have} for {length} frames: the last one is held")
    if path.freeze and expression.sound is not None:
        notes.append(f"camera {path.name} holds the expression, so the sound of {expression.sound} is left out")
    return Driving(fps, length, None if path.freeze else expression.sound, notes, frames)


class _RenderCache:
    """Renders a normal map unless mesh and camera are those of the frame before."""

    def __init__(self, renderer: NormalRenderer | None, faces: np.ndarray | None):
        self._renderer, self._faces = renderer, faces
        self._key: tuple | None = None
        self._picture: np.ndarray | None = None

    def __call__(self, vertices: np.ndarray, K: np.ndarray, c2w: np.ndarray) -> np.ndarray:
        same = self._key is not None and vertices is self._key[0]
        if not (same and np.array_equal(K, self._key[1]) and np.array_equal(c2w, self._key[2])):
            self._picture = self._renderer(vertices, self._faces, K, c2w)
            self._key = (vertices, K, c2w)
        return self._picture
