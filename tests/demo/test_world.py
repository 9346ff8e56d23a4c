"""Head model, motion and renderer of the demo world."""

from __future__ import annotations

import numpy as np
import pytest

from factorportrait.arkit import ARKIT_NAMES as PRODUCT_NAMES


def _front(head, size=64):
    from demo.world.motion import look_at

    K, c2w = look_at(head, 0.0, 0.0, 0.95, 1.0, np.zeros(2), size, size)
    return K[None], c2w[None]


def _render(identity, head, size=64, **actions):
    from demo.dataset import render_clip
    from demo.world.head import ARKIT_INDEX

    coefficients = np.zeros((1, 52), np.float32)
    for name, value in actions.items():
        coefficients[0, ARKIT_INDEX[name]] = value
    frames, normals = render_clip(
        identity, coefficients, np.eye(3)[None], np.zeros((1, 3)), *_front(head, size), height=size, width=size
    )
    return frames[0], normals[0]


def _pixel(point, K, c2w):
    """A point [3] of head space -> (row, column)."""
    camera = c2w[:3, :3].T @ (point - c2w[:3, 3])
    x, y, _ = K @ (camera / camera[2])
    return int(y), int(x)


def test_arkit_names_are_the_products_52():
    from demo.world.head import ARKIT_NAMES

    assert len(ARKIT_NAMES) == len(set(ARKIT_NAMES)) == 52
    assert tuple(ARKIT_NAMES) == tuple(PRODUCT_NAMES)


def test_head_is_in_metres_and_in_canonical_head_space(head):
    extent = np.ptp(head.rest, axis=0)
    assert 0.35 < extent[0] < 0.75 and 0.4 < extent[1] < 0.7  # head with shoulders
    assert 0.11 < head.hairline[1] - head.chin[1] < 0.26
    assert np.abs(head.rest[head.basis.ears].mean(0)).max() < 1e-5  # origin between the ears
    assert head.chin[2] > 0.04  # the face looks along +z
    assert head.eye_centres[0][0] > 0.02 and head.eye_centres[1][0] < -0.02  # +x is the subject's left


@pytest.mark.parametrize("index", range(52))
def test_every_action_moves_the_face(head, index):
    moved = np.linalg.norm(head.expression(np.eye(52, dtype=np.float32)[index]) - head.rest, axis=1)
    assert moved.max() > 0.001 and moved.max() < 0.08


def test_eyes_turn_to_the_subjects_left(head):
    from demo.world.head import ARKIT_INDEX

    coefficients = np.zeros(52, np.float32)
    coefficients[[ARKIT_INDEX["eyeLookOutLeft"], ARKIT_INDEX["eyeLookInRight"]]] = 1
    for side in ("Left", "Right"):
        axis = head.gaze(coefficients, side) @ [0, 0, 1]
        assert axis[0] > 0.3 and abs(axis[1]) < 1e-6


def test_head_pose_turns_the_skull_and_leaves_the_shoulders(head):
    from demo.world.head import rotation_from_angles

    posed = head.neutral(rotation_from_angles(0.5, 0, 0), np.array([0, 0, 0.01]))
    still = head.basis.head_weight == 0
    assert still.any() and np.allclose(posed[still], head.rest[still], atol=1e-7)
    nose = head.rest[:, 2].argmax()
    assert posed[nose, 0] > 0.03  # yaw turns the nose to the subject's left


def test_normal_of_the_forehead_faces_the_camera(identity, head):
    _, normals = _render(identity, head)
    K, c2w = _front(head)
    row, column = _pixel(0.5 * (head.hairline + head.eye_centres[0] * [0, 1, 1]), K[0], c2w[0])
    assert np.abs(normals[row, column].astype(int) - [128, 128, 255]).max() < 40
    assert (normals[:4, :4] == 0).all()  # background


def test_normals_are_unit_vectors_with_x_right_and_y_up(identity, head):
    _, normals = _render(identity, head, 96)
    inside = (normals > 0).any(2)
    vectors = normals[inside] / 127.5 - 1.0
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 0.02
    assert (vectors[:, 2] > -0.3).all()
    columns = np.nonzero(inside)[1]
    assert vectors[columns > 70, 0].mean() > 0.2 and vectors[columns < 26, 0].mean() < -0.2
    rows = np.nonzero(inside)[0]
    assert vectors[rows < 12, 1].mean() > 0.2


def test_normals_agree_with_the_products_renderer(identity, head):
    from demo.make_inputs import shape_subset
    from demo.world.head import rotation_from_angles
    from demo.world.render import Renderer
    from factorportrait.runtime.media.normals import NormalRenderer

    K, c2w = _front(head, 96)
    posed = head.neutral(rotation_from_angles(0.4, 0.1, 0.1), np.zeros(3))
    rows, faces = shape_subset()
    theirs = NormalRenderer(96, 96)(posed[rows], faces, K[0], c2w[0]).astype(int)
    difference = np.abs(Renderer(96, 96).normals(posed, K[0], c2w[0]) - theirs).max(2)
    assert (difference > 8).mean() < 0.005


def test_open_jaw_changes_the_mouth_and_not_the_forehead(identity, head):
    still, shape = _render(identity, head)
    open_mouth, same_shape = _render(identity, head, jawOpen=1.0)
    assert np.array_equal(shape, same_shape)  # normal maps show the neutral face
    change = np.abs(still.astype(int) - open_mouth).max(2)
    K, c2w = _front(head)
    row, column = _pixel(head.chin + [0, 0.035, 0], K[0], c2w[0])
    assert change[row - 3 : row + 4, column - 3 : column + 4].mean() > 20
    row, column = _pixel(head.hairline, K[0], c2w[0])
    assert change[: row + 4].max() == 0


def test_gaze_changes_the_eyes(identity, head):
    still, _ = _render(identity, head, 128)
    aside, _ = _render(identity, head, 128, eyeLookOutLeft=1.0)
    K, c2w = _front(head, 128)
    change = np.abs(still.astype(int) - aside).max(2)
    row, column = _pixel(head.eye_centres[0] + [0, 0, 0.015], K[0], c2w[0])
    assert change[row - 3 : row + 4, column - 6 : column + 7].max() > 60


def test_expressions_use_all_52_actions_and_stay_in_range():
    from demo.world.motion import expressions

    most = np.zeros(52)
    for seed in range(120):
        values = expressions(np.random.default_rng(seed), 29)
        assert values.shape == (29, 52) and values.min() >= 0 and values.max() <= 1
        most = np.maximum(most, values.max(0))
    assert most.min() > 0.5


def test_head_poses_stay_within_their_limits():
    from demo.world.motion import head_poses

    for seed in range(40):
        rotation, translation = head_poses(np.random.default_rng(seed), 29)
        assert np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-6)
        yaw = np.degrees(np.arctan2(rotation[:, 0, 2], rotation[:, 2, 2]))
        assert np.abs(yaw).max() <= 35.01 and np.abs(translation).max() <= 0.015


@pytest.mark.parametrize("kind", ["frontal", "novel", "orbit", "all"])
def test_kinds_of_clip(head, kind):
    from demo.world.motion import sample_clip

    clip = sample_clip(np.random.default_rng(1), head, 9, 64, 64, kind)
    camera_moves = np.ptp(clip.c2w, axis=0).max() > 1e-6
    face_moves = np.ptp(clip.coefficients, axis=0).max() > 1e-3 and np.ptp(clip.rotation, axis=0).max() > 1e-4
    assert camera_moves == (kind in ("orbit", "all")) and face_moves == (kind != "orbit")
    assert np.allclose(np.linalg.det(clip.c2w[:, :3, :3]), 1)
