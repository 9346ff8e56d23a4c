import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import frontal, one_line

from factorportrait.errors import MediaError
from factorportrait.runtime.media.camera import (
    c2w_from_opengl,
    load_cameras,
    open_camera,
    ray_maps,
)

K0 = np.array([[128.0, 0, 32], [0, 128, 32], [0, 0, 1]])


def random_pose(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    if np.linalg.det(q) < 0:
        q[:, 0] *= -1
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = q, rng.normal(size=3)
    return pose


def own_file(path, frames, **extra):
    data = {"convention": "opencv", "width": 64, "height": 64, "K": K0.tolist(), "frames": frames} | extra
    path.write_text(json.dumps(data))
    return path


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(20, 300), st.floats(-40, 100), st.floats(-40, 100))
def test_rays_meet_the_points_that_project_there(seed, focal, cx, cy):
    """A point at any depth along a cell's ray projects to the cell's centre, found without the ray code."""
    c2w = random_pose(seed)
    K = np.array([[focal, 0, cx], [0, 1.1 * focal, cy], [0, 0, 1]])
    rays = ray_maps(K[None], c2w[None], 64, 48, 8).astype(np.float64)
    assert rays.shape == (1, 6, 8, 6)
    moment, direction = rays[0, :3], rays[0, 3:]
    assert np.abs(np.linalg.norm(direction, axis=0) - 1).max() < 1e-6
    assert np.abs((moment * direction).sum(axis=0)).max() < 1e-5
    for row, column, depth in ((0, 0, 1.0), (7, 5, 3.0), (3, 2, 0.2)):
        d, m = direction[:, row, column], moment[:, row, column]
        point = np.cross(d, m) + d * (d @ c2w[:3, 3] + depth)  # d x m is the foot of the ray
        camera = np.linalg.inv(c2w) @ [*point, 1]
        pixel = K @ camera[:3]
        assert camera[2] > 0
        assert pixel[:2] / pixel[2] == pytest.approx([(column + 0.5) * 8, (row + 0.5) * 8], abs=2e-2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-2, 2))
def test_moving_along_a_ray_keeps_its_line(seed, step):
    c2w = random_pose(seed)
    rays = ray_maps(K0[None], c2w[None], 64, 64, 8)[0, :, 3, 5].astype(np.float64)
    moved = c2w.copy()
    moved[:3, 3] += step * rays[3:]
    assert ray_maps(K0[None], moved[None], 64, 64, 8)[0, :, 3, 5] == pytest.approx(rays, abs=1e-5)


def test_ray_through_an_off_centre_principal_point_is_the_optical_axis():
    K = K0.copy()
    K[:2, 2] = 20, 44  # centres of cells 2 and 5
    ray = ray_maps(K[None], frontal(0.5)[None], 64, 64, 8)[0, :, 5, 2]
    assert ray == pytest.approx([0, 0, 0, 0, 0, -1], abs=1e-6)
    with pytest.raises(ValueError):
        ray_maps(K[None], frontal()[None], 60, 64, 8)


def test_opengl_and_opencv_of_one_camera_agree(tmp_path):
    opengl = np.eye(4)
    opengl[2, 3] = 0.6  # looks along its -z, at the origin, y up
    assert c2w_from_opengl(opengl) == pytest.approx(frontal(0.6))
    frames = [{"file_path": f"f{i}.png", "transform_matrix": opengl.tolist(), "fl_x": 100 + i} for i in (10, 2)]
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps({"w": 128, "h": 128, "cx": 70, "fl_y": 100, "frames": frames}))
    cameras = load_cameras(path, 64, 64)
    assert cameras.c2w == pytest.approx(np.stack([frontal(0.6)] * 2))
    # f2 before f10; halved for an output of half the size; the principal point stays off centre
    assert cameras.K[:, 0, 0].tolist() == [51.0, 55.0]
    assert cameras.K[0, :2, 2].tolist() == [35.0, 32.0]


def test_camera_angle_and_crop(tmp_path):
    path = tmp_path / "t.json"
    frames = [{"transform_matrix": np.eye(4).tolist()}]
    path.write_text(json.dumps({"camera_angle_x": np.pi / 2, "frames": frames}))
    assert load_cameras(path, 64, 64).K[0].ravel().tolist() == pytest.approx([32, 0, 32, 0, 32, 32, 0, 0, 1])
    path.write_text(json.dumps({"camera_angle_x": np.pi / 2, "w": 200, "h": 100, "frames": frames}))
    # 200x100 cropped to its centre 100x100, then scaled by 0.64
    assert load_cameras(path, 64, 64).K[0].ravel().tolist() == pytest.approx([64, 0, 32, 0, 64, 32, 0, 0, 1])
    assert load_cameras(path, 64, 64, "pad").K[0, 0, 0] == pytest.approx(32)


def test_own_file_is_held_and_cut(tmp_path):
    poses = [frontal(0.5).tolist(), frontal(0.7).tolist()]
    path = own_file(tmp_path / "c.json", [{"c2w": poses[0]}, {"c2w": poses[1], "fx": 9}])
    camera = open_camera(path, 64, 64, K0, frontal(), Fraction(25))
    assert camera.num_frames == 2 and not camera.freeze
    assert camera.cameras(1, 3).c2w[:, 2, 3].tolist() == [0.7] * 3
    assert len(camera.cameras(0, 1)) == 1
    assert load_cameras(path, 64, 64).select(0, 4).c2w[:, 2, 3].tolist() == [0.5, 0.7, 0.7, 0.7]


def test_presets():
    def at(spec, start, count):
        return open_camera(spec, 64, 64, K0, frontal(0.6), Fraction(24)).cameras(start, count)

    assert at("static", 7, 2).c2w == pytest.approx(np.stack([frontal(0.6)] * 2))
    orbit = at("orbit:±30", 0, 97).c2w
    assert orbit[0] == pytest.approx(frontal(0.6)) and orbit[96] == pytest.approx(frontal(0.6), abs=1e-12)
    assert orbit[24, :3, 3] == pytest.approx([0.3, 0, 0.6 * np.cos(np.pi / 6)])  # a quarter of 4 s
    assert np.linalg.norm(orbit[:, :3, 3], axis=1) == pytest.approx(np.full(97, 0.6))
    # it keeps looking at the origin
    assert np.cross(orbit[:, :3, 2], orbit[:, :3, 3]) == pytest.approx(np.zeros((97, 3)), abs=1e-12)
    for same in ("orbit", "orbit:30", "orbit:+-30", "orbit:30,period=4", "orbit,period=4", "freeze"):
        assert at(same, 0, 97).c2w == pytest.approx(orbit)
    assert at("orbit:30,period=8", 48, 1).c2w[0] == pytest.approx(orbit[24])
    assert at("dolly:0.5", 48, 1).c2w[0, 2, 3] == pytest.approx(0.3)
    assert open_camera("freeze:20", 64, 64, K0, frontal(), Fraction(24)).freeze
    path = open_camera("orbit", 64, 64, K0, frontal(), Fraction(24))
    K, c2w = next(iter(path))
    assert path.num_frames is None and K.shape == (3, 3) and c2w == pytest.approx(frontal())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("orbti:30", "did you mean orbit"),
        ("orbit:x", "orbit:30,period=6"),
        ("orbit:30,speed=2", "speed"),
        ("orbit:30,period=0", "period"),
        ("orbit:999", "degrees"),
        ("static:3", "static"),
        ("dolly:0", "times"),
        ("missing.json", "no such file"),
    ],
)
def test_wrong_specs(spec, words):
    with pytest.raises(MediaError) as error:
        open_camera(spec, 64, 64, K0, frontal(), Fraction(24))
    one_line(error.value, words)


def broken(index, change):
    frames = [{"c2w": frontal().tolist()} for _ in range(3)]
    matrix = np.array(frames[index]["c2w"])
    change(matrix)
    frames[index]["c2w"] = matrix.tolist()
    return frames


@pytest.mark.parametrize(
    ("frames", "extra", "words"),
    [
        (broken(1, lambda m: m.__setitem__((0, 3), np.nan)), {}, ["frame 1", "NaN"]),
        (broken(2, lambda m: m.__setitem__((slice(0, 3), 0), 0)), {}, ["frame 2", "singular"]),
        (broken(0, lambda m: m.__imul__(np.diag([2, 2, 2, 1]))), {}, ["frame 0", "scale or shear"]),
        (broken(0, lambda m: m.__setitem__((0, 1), 0.2)), {}, ["frame 0", "scale or shear"]),
        (broken(1, lambda m: m.__setitem__((0, 0), -1)), {}, ["frame 1", "mirrored"]),
        (broken(1, lambda m: m.__setitem__((3, 0), 5)), {}, ["frame 1", "last row"]),
        ([{"c2w": [[1, 2], [3, 4]]}], {}, ["frame 0", "4x4"]),
        ([{"c2w": "x"}], {}, ["frame 0", "4x4"]),
        ([{}], {}, ["frame 0", "c2w"]),
        ([], {}, ["at least one camera"]),
        ([{"c2w": frontal().tolist()}], {"convention": "opengl"}, ["opengl"]),
        ([{"c2w": frontal().tolist()}], {"width": None}, ["frame 0", "width and height"]),
        ([{"c2w": frontal().tolist()}], {"K": [[-5, 0, 1], [0, 5, 1], [0, 0, 1]]}, ["frame 0", "focal length"]),
        ([{"c2w": frontal().tolist()}], {"K": [[1e-5, 0, 1], [0, 5, 1], [0, 0, 1]]}, ["frame 0", "focal length", "1 pixel"]),
        ([{"c2w": frontal().tolist()}], {"K": [[5, 1, 1], [0, 5, 1], [0, 0, 1]]}, ["frame 0", "K"]),
        ([{"transform_matrix": np.eye(4).tolist()}], {"K": None, "w": "x"}, ["frame 0"]),
        ([{"transform_matrix": np.eye(4).tolist()}], {"camera_model": "OPENCV_FISHEYE"}, ["pinhole"]),
    ],
)
def test_wrong_camera_files(tmp_path, frames, extra, words):
    path = own_file(tmp_path / "c.json", frames, **extra)
    with pytest.raises(MediaError) as error:
        load_cameras(path, 64, 64)
    one_line(error.value, str(path), *words)


@pytest.mark.parametrize("key", ["c2w", "transform_matrix"])
def test_what_rounding_left_in_the_last_row_is_taken_away(tmp_path, key):
    """Who computes with cameras asks for 0 0 0 1 exactly."""
    matrix = frontal()
    matrix[3] = [1e-4, -5e-5, 2e-6, 1.0005]
    path = own_file(tmp_path / "c.json", [{key: matrix.tolist()}])
    assert np.array_equal(load_cameras(path, 64, 64).c2w[0, 3], [0, 0, 0, 1])


def test_files_that_are_no_cameras(tmp_path):
    path = tmp_path / "c.json"
    for text, words in (("{", "JSON"), ("[1]", "object"), ("{}", "frames")):
        path.write_text(text)
        with pytest.raises(MediaError) as error:
            load_cameras(path, 64, 64)
        one_line(error.value, words)


def test_cameras_of_a_video_have_its_aspect_ratio(tmp_path):
    """The video may have been scaled, and made even, after the cameras were written; a crop or a stretch is another camera."""
    K = [[100, 0, 50.5], [0, 100, 33.5], [0, 0, 1]]
    path = own_file(tmp_path / "c.json", [{"c2w": frontal().tolist()}], width=101, height=67, K=K)
    for video_size in ((67, 101), (68, 102), (134, 202)):
        assert len(load_cameras(path, 64, 64, video_size=video_size)) == 1
        assert len(open_camera(path, 64, 64, np.eye(3), frontal(), 25, video_size=video_size).cameras(0, 3)) == 3
    for video_size in ((67, 67), (101, 67), (67, 106)):
        with pytest.raises(MediaError) as error:
            load_cameras(path, 64, 64, video_size=video_size)
        one_line(error.value, "c.json, frame 0", "aspect ratio", f"{video_size[1]}x{video_size[0]}", "found 101x67")


def test_cameras_without_a_size_take_that_of_the_video(tmp_path):
    path = tmp_path / "transforms.json"
    frame = {"transform_matrix": np.eye(4).tolist()}
    path.write_text(json.dumps({"camera_angle_x": np.pi / 2, "frames": [frame]}))
    # 200x100 at 90 degrees has a focal length of 100; cropped to 64x64 the height decides.
    K = load_cameras(path, 64, 64, video_size=(100, 200)).K[0]
    assert K[0].tolist() == pytest.approx([64, 0, 32])


def test_resampled_path_knows_its_length(tmp_path):
    path = own_file(tmp_path / "c.json", [{"c2w": frontal().tolist()}] * 10)
    camera = open_camera(path, 64, 64, np.eye(3), frontal(), Fraction(50))
    assert camera.resampled(Fraction(25), Fraction(50)).num_frames == 20
    assert camera.resampled(Fraction(25), Fraction(12)).num_frames == 5
