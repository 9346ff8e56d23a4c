"""Sources with different clocks are walked together in time, not by their frame numbers."""

from __future__ import annotations

import ast
import csv
import json
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import factorportrait.runtime.inputs
from factorportrait.bundle import Bundle
from factorportrait.errors import MediaError, UserError
from factorportrait.runtime.inputs import default_camera, open_inputs
from factorportrait.runtime.media.camera import load_cameras
from factorportrait.runtime.media.driving import VideoSource, read_arkit_csv
from factorportrait.runtime.media.fit import square_crop
from factorportrait.runtime.media.normals import NormalVideo
from factorportrait.runtime.media.streams import Resampled, source_index
from factorportrait.runtime.session import open_bundle

sys.path.insert(0, str(Path(__file__).parent / "media"))
from media_files import frontal, one_line, ramp_frames, write_obj_sequence, write_video  # noqa: E402


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle(tiny_bundle)


@pytest.fixture(scope="module")
def bundle_with_head(bundle, inputs):
    """What `open_inputs` asks of a bundle that can pose a neutral head."""
    files = {**bundle.manifest.files, "head.npz": None}
    return SimpleNamespace(config=bundle.config, manifest=SimpleNamespace(files=files), file=lambda name: inputs / name)


def test_defaults_of_a_clip_folder(bundle, inputs):
    driving = open_inputs(bundle, inputs / "driving_clip")
    assert driving.fps == 25 and driving.num_frames == 61
    cameras = load_cameras(inputs / "driving_clip" / "cameras.json", 32, 32)
    frames = list(driving)
    assert len(frames) == 61
    assert np.array_equal(np.stack([frame.c2w for frame in frames]), cameras.c2w)
    assert np.array_equal(np.stack([frame.K for frame in frames]), cameras.K)


@pytest.mark.parametrize(("fps", "expected"), [(Fraction(50), 122), (Fraction(25, 2), 31)])
def test_mesh_and_cameras_follow_the_resampled_video(bundle, inputs, fps, expected):
    plain = list(open_inputs(bundle, inputs / "driving_clip"))
    resampled = open_inputs(bundle, inputs / "driving_clip", fps=fps)
    frames = list(resampled)
    assert resampled.num_frames == len(frames) == expected
    for index, frame in enumerate(frames):
        source = plain[source_index(index, Fraction(25), fps)]
        for name in ("normals", "image", "c2w"):
            assert np.array_equal(getattr(frame, name), getattr(source, name)), (index, name)


def test_pose_at_another_rate_than_the_expression(bundle, inputs):
    """The table has its own rate; the clip's pose and cameras are brought to it."""
    driving = open_inputs(bundle, inputs / "arkit.csv", pose_from=inputs / "driving_clip", fps=Fraction(50))
    frames = list(driving)
    plain = list(open_inputs(bundle, inputs / "driving_clip"))
    assert all(frame.coefficients.shape == (52,) for frame in frames)
    assert np.array_equal(frames[20].normals, plain[10].normals)


def test_frames_limit(bundle, inputs):
    assert len(list(open_inputs(bundle, inputs / "driving_clip", num_frames=5))) == 5


def test_iterating_twice_gives_the_same(bundle, inputs):
    driving = open_inputs(bundle, inputs / "driving_clip", num_frames=3)
    for first, second in zip(driving, driving, strict=True):
        assert np.array_equal(first.normals, second.normals) and np.array_equal(first.image, second.image)


def test_no_expression(bundle, inputs):
    with pytest.raises(UserError, match="no expression to follow"):
        open_inputs(bundle, inputs / "driving_clip" / "mesh.npz")


@pytest.mark.parametrize(
    ("count", "source", "target"), [(5, 25, 50), (7, 30, 25), (4, 24, 24), (1, 60, 25), (9, 30000, 1001)]
)
def test_resampled_items_are_those_due(count, source, target):
    resampled = Resampled(list(range(count)), count, Fraction(source), Fraction(target))
    items = list(resampled)
    assert len(items) == resampled.num_frames
    assert items == [source_index(i, Fraction(source), Fraction(target)) for i in range(len(items))]


def test_default_camera_sees_the_head_upright(bundle):
    """A point above the head's origin lies in the upper half of the picture, one to the subject's left in the right half."""
    K, c2w = default_camera(bundle.config)
    for point, row, column in (((0, 0.05, 0), "upper", "centre"), ((0.05, 0, 0), "centre", "right")):
        camera = np.linalg.inv(c2w) @ np.array([*point, 1.0])
        x, y, _ = K @ camera[:3] / camera[2]
        assert (y < 15.9) == (row == "upper") and (x > 16.1) == (column == "right")


def test_a_session_takes_what_open_inputs_gives(tiny_bundle, inputs):
    opened = open_bundle(tiny_bundle, threads=1)
    session = opened.session(steps=1)
    session.set_reference(np.zeros((32, 32, 3), np.uint8))
    assert len(list(session.frames(open_inputs(opened.bundle, inputs / "driving_clip", num_frames=6)))) == 6


def test_an_obj_sequence_is_a_pose(bundle, inputs, tmp_path):
    """Numbered .obj files, one per output frame; a single one is a pose that lasts one frame."""
    objs = write_obj_sequence(tmp_path / "objs", 4)
    driving = open_inputs(bundle, inputs / "driving_clip", pose_from=objs, camera="static")
    frames = list(driving)
    assert driving.num_frames == len(frames) == 4
    columns = [np.flatnonzero(frame.normals.max(axis=(0, 2))) for frame in frames]
    assert all(len(c) for c in columns)
    means = [
        frame.normals.max(-1).astype(float).sum(0) @ np.arange(32) / frame.normals.max(-1).sum() for frame in frames
    ]
    assert np.all(np.diff(means) > 0)  # it moves to the right of the picture
    single = open_inputs(bundle, inputs / "driving_clip", pose_from=objs / "m0.obj", camera="static")
    (frame,) = single
    assert np.array_equal(frame.normals, frames[0].normals)
    assert any("m0.obj" in note for note in single.notes)


def baked_clip(folder, size=(64, 64), camera_size=(64, 64), count=5):
    """normals.mp4 of a ramp of directions, with cameras.json that belong to it; sizes are (height, width)."""
    folder.mkdir()
    frames = []
    for index in range(count):
        angle = 0.1 * index
        normal = (np.array([np.sin(angle), 0, np.cos(angle)]) + 1) / 2 * 255
        frames.append(np.broadcast_to(normal.round().astype(np.uint8), (*size, 3)).copy())
    write_video(folder / "normals.mp4", frames)
    height, width = camera_size
    K = [[2.0 * height, 0, width / 2], [0, 2.0 * height, height / 2], [0, 0, 1]]
    poses = [{"c2w": frontal(0.5 + 0.01 * index).tolist()} for index in range(count)]
    data = {"convention": "opencv", "width": width, "height": height, "K": K, "frames": poses}
    (folder / "cameras.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("camera_size", [(64, 64), (256, 256)])
def test_baked_normals_and_their_cameras(bundle, inputs, tmp_path, camera_size):
    """The maps come through as they are, each with its own camera; the video may have been scaled since."""
    clip = baked_clip(tmp_path / "clip", camera_size=camera_size)
    driving = open_inputs(bundle, inputs / "driving_clip" / "video.mp4", pose_from=clip)
    frames = list(driving)
    assert driving.num_frames == len(frames) == 5 and driving.fps == 25
    expected = list(NormalVideo(clip / "normals.mp4", 32, 32))
    for index, frame in enumerate(frames):
        assert np.array_equal(frame.normals, expected[index]) and frame.image is not None
        assert frame.c2w[2, 3] == pytest.approx(0.5 + 0.01 * index)
        assert frame.K == pytest.approx(np.array([[64.0, 0, 16], [0, 64, 16], [0, 0, 1]]))
    assert any("normal maps" in note and "cameras.json" in note for note in driving.notes)
    resampled = list(open_inputs(bundle, inputs / "driving_clip" / "video.mp4", pose_from=clip, fps=Fraction(50)))
    assert len(resampled) == 10
    assert [frame.c2w[2, 3] for frame in resampled] == pytest.approx([0.5 + 0.01 * (i // 2) for i in range(10)])
    with pytest.raises(UserError, match="--camera orbit with normal maps"):
        open_inputs(bundle, inputs / "driving_clip" / "video.mp4", pose_from=clip, camera="orbit")


def test_baked_normals_of_another_aspect_ratio_than_their_cameras(bundle, inputs, tmp_path):
    clip = baked_clip(tmp_path / "clip", size=(64, 96), camera_size=(64, 64))
    with pytest.raises(MediaError) as error:
        open_inputs(bundle, inputs / "driving_clip", pose_from=clip)
    one_line(error.value, "cameras.json", "aspect ratio", "96x64", "64x64")


def test_coefficients_beside_a_video_win(bundle_with_head, inputs, tmp_path):
    """The table is exact: it drives and decides the length, even past the video's end. The video gives sound and picture."""
    clip = tmp_path / "clip"
    clip.mkdir()
    shutil.copy(inputs / "arkit.csv", clip / "coefficients.csv")
    write_video(clip / "video.mp4", ramp_frames(6), sound_s=0.3)
    driving = open_inputs(bundle_with_head, clip)
    frames = list(driving)
    table = read_arkit_csv(clip / "coefficients.csv", Fraction(25))
    assert driving.num_frames == len(frames) == table.num_frames > 6
    assert driving.fps == 25 and driving.sound == clip / "video.mp4"
    assert np.array_equal(np.stack([frame.coefficients for frame in frames]), table.coefficients)
    pictures = [
        square_crop(picture, bundle_with_head.config.expression.image_size)
        for picture in VideoSource(clip / "video.mp4")
    ]
    shown = [pictures[min(index, 5)] for index in range(len(frames))]
    assert all(np.array_equal(frame.image, picture) for frame, picture in zip(frames, shown, strict=True))
    (note,) = [note for note in driving.notes if "coefficients.csv" in note and "video.mp4" in note]
    assert "expression" in note and "sound" in note
    assert not any("decides" in note for note in driving.notes)


def write_csv_without_angles(source, target):
    rows = list(csv.reader(source.open(newline="")))
    keep = [i for i, name in enumerate(rows[0]) if name not in ("HeadYaw", "HeadPitch", "HeadRoll")]
    with target.open("w", newline="") as file:
        csv.writer(file).writerows([[row[i] for i in keep] for row in rows])
    return target


def test_an_explicit_pose_without_a_pose_is_refused(bundle, inputs, tmp_path):
    lone = shutil.copy(baked_clip(tmp_path / "clip") / "normals.mp4", tmp_path / "normals.mp4")
    table = write_csv_without_angles(inputs / "arkit.csv", tmp_path / "a.csv")
    cameras = tmp_path / "cameras"
    cameras.mkdir()
    shutil.copy(inputs / "driving_clip" / "cameras.json", cameras)
    for source, found in ((lone, "pictures only"), (table, "without head angles"), (cameras, "a camera only")):
        with pytest.raises(UserError) as error:
            open_inputs(bundle, inputs / "driving_clip", pose_from=source)
        one_line(error.value, f"--pose-from {source} has no pose", "mesh.npz", "normals.mp4", "cameras.json", found)


def test_a_driving_without_a_pose_is_a_still_head(bundle_with_head, tmp_path):
    driving = open_inputs(bundle_with_head, write_video(tmp_path / "v.mp4", ramp_frames(3)))
    assert len(list(driving)) == 3 and any("stays still" in note for note in driving.notes)


def test_a_camera_file_that_ends_early_is_noted(bundle, inputs, tmp_path):
    data = json.loads((inputs / "driving_clip" / "cameras.json").read_text())
    path = tmp_path / "short.json"
    path.write_text(json.dumps(data | {"frames": data["frames"][:4]}))
    driving = open_inputs(bundle, inputs / "driving_clip", camera=str(path))
    assert any("short.json has 4 cameras for 61 frames" in note and "held" in note for note in driving.notes)
    whole = open_inputs(bundle, inputs / "driving_clip", camera=str(path), num_frames=4)
    assert not any("held" in note for note in whole.notes)
    # The clip's own cameras are resampled with it: 61 at 25 are enough for the 122 at 50 frames a second.
    assert not any("held" in note for note in open_inputs(bundle, inputs / "driving_clip", fps=Fraction(50)).notes)


def test_freeze_says_that_it_drops_the_sound(bundle, inputs, tmp_path):
    video = write_video(tmp_path / "v.mp4", ramp_frames(5), sound_s=0.2)
    frozen = open_inputs(bundle, video, pose_from=inputs / "driving_clip", camera="freeze")
    assert frozen.sound is None and any("freeze" in note and "sound" in note for note in frozen.notes)
    moving = open_inputs(bundle, video, pose_from=inputs / "driving_clip", camera="orbit")
    assert moving.sound == video and not any("sound" in note for note in moving.notes)
    silent = write_video(tmp_path / "silent.mp4", ramp_frames(5))
    notes = open_inputs(bundle, silent, pose_from=inputs / "driving_clip", camera="freeze").notes
    assert not any("sound" in note for note in notes)


def test_every_refusal_says_what_to_do():
    """Of all UserError and MediaError that reading inputs and writing outputs can raise."""
    inputs_file = Path(factorportrait.runtime.inputs.__file__)
    lacking, seen = [], 0
    for path in (inputs_file, *sorted((inputs_file.parent / "media").glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in (
                "UserError",
                "MediaError",
            ):
                continue
            seen += 1
            actions = [keyword.value for keyword in node.keywords if keyword.arg == "action"]
            if not actions or (isinstance(actions[0], ast.Constant) and not str(actions[0].value).strip()):
                lacking.append(f"{path.name}:{node.lineno}")
    assert seen > 50 and lacking == []
