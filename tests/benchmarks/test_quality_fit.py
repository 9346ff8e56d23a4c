"""The reader of expression and pose: what it says of true renders whose expression and pose are known."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("warp")
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
    return fit.Fit(world, clip.identity, clip.scene, clip.size, still)


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


def test_a_neutral_face_reads_as_neutral_where_it_is(world, clip, still, reader):
    found = reader(shown(world, clip, still))
    assert found.coefficients.max() < 0.02
    assert metrics.angles_deg(found.seen, still.seen_rotation).max() < 0.2


@pytest.mark.parametrize("action", ["jawOpen", "mouthPucker", "browInnerUp"])
def test_an_action_is_read_and_grows_with_its_amount(world, clip, still, reader, action):
    none, half, full = (reader(shown(world, clip, still, **{action: amount})) for amount in (0.0, 0.5, 1.0))
    index = ARKIT_NAMES.index(action)
    amounts = [float(reading.coefficients[0, index]) for reading in (none, half, full)]
    assert amounts[0] < 0.05 and amounts[1] > 0.25 and amounts[2] > amounts[1] + 0.15
    assert full.coefficients[0].argmax() == index
    assert followed(none, full) < 0.05 and 0.3 < followed(half, full) < 0.85 and followed(full, full) == pytest.approx(1)


def test_a_tint_is_no_expression(world, clip, still, reader):
    tinted = shown(world, clip, still) * np.array([0.9, 0.97, 0.85]) + np.array([6.0, 0.0, 12.0])
    found = reader(tinted.round().astype(np.uint8))
    assert found.coefficients.max() < 0.1 and metrics.angles_deg(found.seen, still.seen_rotation).max() < 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_turned_head_is_read_as_pose_and_a_turned_camera_as_camera(world, clip, still, reader, axis):
    """From the moment asked for, a picture in which head or camera are 4 degrees elsewhere is read where it is."""
    vector = np.zeros(fit.NUM_PARAMETERS)
    turn = np.radians(4.0) * np.eye(3)[axis]
    for part, moved, kept in ((fit.HEAD, "head", "camera"), (fit.ORBIT, "camera", "head")):
        values = vector.copy()
        values[part] = turn
        rotation, c2w = fit.apart(still, values)
        there = Motion(still.coefficients, rotation[None], still.translation, still.K, c2w[None])
        found = reader(shown(world, clip, there))
        known = {"head": there.rotation, "camera": there.camera_rotation}
        before = {"head": still.rotation, "camera": still.camera_rotation}
        assert metrics.angles_deg(known[moved], before[moved])[0] == pytest.approx(4)
        # Which of the two has turned is told by the shoulders alone, at the lower edge of the picture.
        assert metrics.angles_deg(found.seen, there.seen_rotation)[0] < 0.4
        assert metrics.angles_deg(getattr(found, moved), known[moved])[0] < 1.6, moved
        assert metrics.angles_deg(getattr(found, kept), known[kept])[0] < 1.6, kept


def test_a_picture_that_ignores_the_pose_is_read_where_it_is(world, clip, still):
    """The portrait's moment is a start of its own: 25 degrees away no fit from the asked moment would get there."""
    far = fit.rotation_from_vector(np.radians(25.0) * np.array([0.0, 1.0, 0.0])) @ still.rotation
    asked = Motion(still.coefficients, far, still.translation, still.K, still.c2w)
    reader = fit.Fit(world, clip.identity, clip.scene, clip.size, asked, also=still)
    assert metrics.angles_deg(reader(shown(world, clip, still)).seen, still.seen_rotation)[0] < 0.5
    assert metrics.angles_deg(reader(shown(world, clip, asked)).seen, asked.seen_rotation)[0] < 0.5


def test_best_takes_the_smaller_cost_of_every_moment():
    one, two = (
        fit.Reading(np.full((2, 52), value), np.stack([np.eye(3)] * 2), np.stack([np.eye(3)] * 2), np.array(cost))
        for value, cost in ((1.0, [1.0, 5.0]), (2.0, [2.0, 3.0]))
    )
    best = fit.Reading.best([one, two])
    assert best.coefficients[:, 0].tolist() == [1, 2] and best.cost.tolist() == [1, 3]
