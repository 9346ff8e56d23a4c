"""The reader of expression and pose: what it says of true renders whose expression and pose are known."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("warp")
pytest.importorskip("skimage")
ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from factorportrait.arkit import ARKIT_NAMES  # noqa: E402
from factorportrait.benchmarks.quality import fit, metrics  # noqa: E402
from factorportrait.benchmarks.quality.cases import Clip, Motion, World, make_clip, render  # noqa: E402
from factorportrait.benchmarks.quality.measure import followed  # noqa: E402

SIZE = 96


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def clip(world) -> Clip:
    return make_clip(world, SimpleNamespace(height=SIZE, width=SIZE), "frontal", 5, seed=5, index=0)


@pytest.fixture(scope="module")
def still(clip) -> Motion:
    """One moment, neutral."""
    return clip.motion.select(slice(2, 3)).neutral()


@pytest.fixture(scope="module")
def reader(world, clip, still) -> fit.Fit:
    return fit.Fit(world, clip.identity, clip.scene, clip.size, [still])


def shown(world: World, clip: Clip, motion: Motion, **amounts: float) -> np.ndarray:
    coefficients = np.zeros((1, len(ARKIT_NAMES)), np.float32)
    for name, amount in amounts.items():
        coefficients[0, ARKIT_NAMES.index(name)] = amount
    return render(world, clip.identity, clip.scene, Motion(coefficients, *(getattr(motion, n) for n in FIXED)), clip.size)[0]


FIXED = ("rotation", "translation", "K", "c2w")


def test_rotation_of_a_vector():
    from scipy.linalg import expm

    x, y, z = vector = np.array([0.3, -0.8, 0.5])
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    assert np.allclose(fit.rotation_from_vector(vector), expm(cross), atol=1e-12)
    assert (fit.rotation_from_vector(np.zeros(3)) == np.eye(3)).all()


def test_soften_keeps_flat_pictures_and_halves_the_size():
    assert fit.soften(np.full((6, 8, 3), 77, np.uint8)).shape == (3, 4, 3)
    assert np.allclose(fit.soften(np.full((6, 8, 3), 77, np.uint8)), 77)


@pytest.mark.parametrize(
    ("amounts", "others"),
    [
        ({"eyeLookOutLeft": 0.8, "eyeLookInRight": 0.8}, ("eyeLookInLeft", "eyeLookOutRight")),
        ({"eyeBlinkLeft": 1.0}, ("eyeBlinkRight",)),
        ({"mouthSmileLeft": 1.0, "mouthSmileRight": 1.0}, ("mouthFrownLeft", "mouthFrownRight")),
        ({"jawLeft": 1.0}, ("jawRight",)),
    ],
)
def test_an_action_is_not_taken_for_its_opposite(world, clip, still, reader, amounts, others):
    found = reader(shown(world, clip, still, **amounts)).coefficients[0]
    right = [found[ARKIT_NAMES.index(name)] for name in amounts]
    wrong = [found[ARKIT_NAMES.index(name)] for name in others]
    assert min(right) > 0.25 and max(wrong) < 0.5 * min(right), (right, wrong)


def test_a_picture_that_says_nothing_is_not_read_as_right(world, clip, still, reader):
    """Flat grey: whatever is read, it is not the pose that was asked for."""
    found = reader(np.full((1, SIZE, SIZE, 3), 96, np.uint8))
    assert metrics.angles_deg(found.seen, still.seen_rotation)[0] > 2


def test_other_splits_show_the_same_view_of_the_head(clip):
    motion, before = clip.motion, clip.portrait_motion.select(np.zeros(len(clip.motion), int))
    by_camera, by_head = fit.other_splits(motion, before)
    for split in (by_camera, by_head):
        assert np.allclose(split.seen_rotation, motion.seen_rotation, atol=1e-6)
    assert np.allclose(by_camera.rotation, before.rotation) and np.allclose(by_head.c2w, before.c2w)


def test_a_neutral_face_reads_as_neutral_where_it_is(world, clip, still, reader):
    found = reader(shown(world, clip, still))
    assert found.coefficients.max() < 0.1
    assert metrics.angles_deg(found.seen, still.seen_rotation).max() < 1


@pytest.mark.parametrize("action", ["jawOpen", "mouthPucker", "browInnerUp"])
def test_an_action_is_read_and_grows_with_its_amount(world, clip, still, reader, action):
    none, half, full = (reader(shown(world, clip, still, **{action: amount})) for amount in (0.0, 0.5, 1.0))
    index = ARKIT_NAMES.index(action)
    amounts = [float(reading.coefficients[0, index]) for reading in (none, half, full)]
    assert amounts[0] < 0.05 and amounts[1] > 0.25 and amounts[2] > amounts[1] + 0.15
    assert full.coefficients[0].argmax() == index


def test_followed_counts_changes_alone():
    """Coefficients [T, 52]: what is always there is no following, half of the changes is half."""
    truth = np.zeros((3, 52))
    truth[:, 17] = 0, 0.5, 1
    spurious = np.zeros((3, 52))
    spurious[:, 5] = spurious[:, 17] = 0.6
    assert followed(truth, truth) == pytest.approx(1) and followed(truth / 2 + spurious, truth) == pytest.approx(0.5)
    assert followed(spurious, truth) == pytest.approx(0) and followed(truth, spurious) is None and followed(None, truth) is None


def test_readings_of_a_still_face_are_not_followed():
    """The reader is not the same twice: whether the truth changes is for the known coefficients to say."""
    noise = 0.1 * np.random.default_rng(0).standard_normal((2, 3, 52))
    moving = np.zeros((3, 52))
    moving[:, 17] = 0, 0.5, 1
    assert followed(noise[0], noise[1]) is not None
    assert followed(noise[0], noise[1], np.full((3, 52), 0.3)) is None
    assert followed(moving + noise[0] / 5, moving + noise[1] / 5, moving) == pytest.approx(1, abs=0.2)


def test_a_tint_is_no_expression(world, clip, still, reader):
    tinted = shown(world, clip, still) * np.array([0.9, 0.97, 0.85]) + np.array([6.0, 0.0, 12.0])
    found = reader(tinted.round().astype(np.uint8))
    assert found.coefficients.max() < 0.1 and metrics.angles_deg(found.seen, still.seen_rotation).max() < 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_head_elsewhere_is_read_where_it_is(world, clip, still, reader, axis):
    """4 degrees from the moment asked for."""
    values = np.zeros(fit.NUM_PARAMETERS)
    values[fit.HEAD] = np.radians(4.0) * np.eye(3)[axis]
    there = replace(still, rotation=fit.apart(still, values)[0][None])
    found = reader(shown(world, clip, there))
    assert metrics.angles_deg(there.seen_rotation, still.seen_rotation)[0] == pytest.approx(4)
    assert metrics.angles_deg(found.seen, there.seen_rotation)[0] < 1


@pytest.mark.parametrize("axis", [0, 1])
def test_turning_the_head_is_told_from_moving_the_camera(world, clip, still, axis):
    """The same view of the head: whichever was asked for, the picture decides, and a bust that turns is no turned head."""
    turned = replace(still, rotation=fit.rotation_from_vector(np.radians(15.0) * np.eye(3)[axis])[None] @ still.rotation)
    moved = fit.other_splits(turned, still)[0]
    for asked in (turned, moved):
        either = fit.Fit(world, clip.identity, clip.scene, clip.size, [asked, still, *fit.other_splits(asked, still)])
        for there in (turned, moved):
            found = either(shown(world, clip, there))
            assert metrics.angles_deg(found.seen, there.seen_rotation)[0] < 1.5
            assert metrics.angles_deg(found.head, there.rotation)[0] < 4
            assert metrics.angles_deg(found.camera, there.camera_rotation)[0] < 4


def test_a_picture_that_ignores_the_pose_is_read_where_it_is(world, clip, still):
    """The portrait's moment is a start of its own: 25 degrees away no fit from the asked moment would get there."""
    far = fit.rotation_from_vector(np.radians(25.0) * np.array([0.0, 1.0, 0.0])) @ still.rotation
    asked = Motion(still.coefficients, far, still.translation, still.K, still.c2w)
    reader = fit.Fit(world, clip.identity, clip.scene, clip.size, [asked], also=still)
    assert metrics.angles_deg(reader(shown(world, clip, still)).seen, still.seen_rotation)[0] < 0.5
    assert metrics.angles_deg(reader(shown(world, clip, asked)).seen, asked.seen_rotation)[0] < 0.5
