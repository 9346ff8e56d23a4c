"""Sources with different clocks are walked together in time, not by their frame numbers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from factorportrait.bundle import Bundle
from factorportrait.errors import UserError
from factorportrait.runtime.inputs import default_camera, open_inputs
from factorportrait.runtime.media.camera import load_cameras
from factorportrait.runtime.media.streams import Resampled, source_index
from factorportrait.runtime.session import open_bundle


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle(tiny_bundle)


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
