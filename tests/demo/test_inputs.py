"""The shipped inputs open with the product's own readers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from factorportrait.runtime.media.camera import load_cameras
from factorportrait.runtime.media.driving import open_driving
from factorportrait.runtime.media.mesh import PosedHead, open_mesh


def test_all_files_are_small(inputs):
    files = [path for path in inputs.rglob("*") if path.is_file()]
    assert files and sum(path.stat().st_size for path in files) < 6 * 2**20
    assert (inputs / "head.npz").stat().st_size < 200 * 1024


@pytest.mark.parametrize("name", ["portrait.png", "portrait_2.png", "portrait_3.png"])
def test_portraits(inputs, name):
    picture = np.asarray(Image.open(inputs / name))
    assert picture.shape == (512, 512, 3) and picture.mean() > 20


def test_driving_video_and_arkit_recording_belong_together(inputs):
    video, table = open_driving(inputs / "driving.mp4"), open_driving(inputs / "arkit.csv")
    assert video.fps == table.fps == Fraction(25) and video.num_frames == table.num_frames == 101
    assert table.coefficients.num_clamped == 0 and table.coefficients.coefficients.max() > 0.8
    assert table.coefficients.head_rotation.shape == (101, 3, 3)


def test_driving_clip(inputs):
    clip = open_driving(inputs / "driving_clip")
    mesh, cameras = open_mesh(clip.mesh), load_cameras(clip.cameras, 64, 64)
    assert clip.num_frames == mesh.num_frames == len(cameras) == 61
    first = next(iter(mesh))
    assert 0.3 < np.ptp(first[:, 0]) < 0.8


def test_orbit_swings_about_the_face(inputs):
    cameras = load_cameras(inputs / "camera_orbit.json", 128, 128)
    azimuth = np.degrees(np.arctan2(cameras.c2w[:, 0, 3], cameras.c2w[:, 2, 3] - 0.02))
    assert len(cameras) == 101 and azimuth.max() > 29 and azimuth.min() < -29


def test_mean_head_follows_angles(inputs):
    head = PosedHead(inputs / "head.npz")
    rest, turned = (head.vertices(rotation) for rotation in (np.eye(3), np.diag([-1.0, 1.0, -1.0])))
    assert 0.3 < np.ptp(rest[:, 0]) < 0.8 and np.abs(rest - turned).max() > 0.1
    low = rest[:, 1] < -0.25
    assert low.any() and np.allclose(rest[low], turned[low], atol=1e-6)
