"""The fused embedding against float64 NumPy, on every instruction set of this machine and on the NumPy path."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from embedding_oracle import oracle_rays, oracle_tokens, pack_rays, portrait_cameras
from hypothesis import given, settings
from hypothesis import strategies as st

from factorportrait.errors import UserError
from factorportrait.runtime import embedding
from factorportrait.runtime.embedding import FusedEmbedding, implementations

TOLERANCE = 1e-5  # the bound for float32, relative to the largest value
HALF_TOLERANCE = 6e-4  # half a unit in the last place of float16 is 4.9e-4


def relative_error(found, expected) -> float:
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


def make(
    seed=0,
    *,
    dim=50,
    camera=24,
    latents=16,
    height=6,
    width=10,
    order=("reference", "noise", "camera", "pose"),
    **options,
):
    """A random patch embedding: (weight, bias, channels, FusedEmbedding)."""
    rng = np.random.default_rng(seed)
    counts = {"reference": latents, "noise": latents, "camera": camera, "pose": latents}
    channels = {name: counts[name] for name in order}
    weight = rng.standard_normal((dim, sum(channels.values()), 1, 2, 2)).astype(np.float32) * 0.1
    bias = rng.standard_normal(dim).astype(np.float32)
    return (
        weight,
        bias,
        channels,
        FusedEmbedding(weight, bias, channels=channels, latent_height=height, latent_width=width, **options),
    )


def expected_chunk(weight, bias, channels, K, c2w, pose, stride):
    planes = {"pose": pose.astype(np.float64)}
    if K is not None:
        rays = oracle_rays(K, c2w, *pose.shape[2:], stride)
        planes["camera"] = pack_rays(rays, pose.shape[1], channels["camera"])
    return oracle_tokens(weight, bias, channels, planes)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dim=st.integers(1, 130),
    latents=st.integers(1, 5),
    height=st.integers(2, 9),
    width=st.integers(2, 23),
    num_slots=st.integers(1, 4),
    camera=st.sampled_from([6, 24]),
    frames=st.sampled_from(["whole", "clip start", "last"]),
    shared=st.booleans(),
    stride=st.sampled_from([4, 8, 16]),
    num_threads=st.integers(1, 3),
    order=st.permutations(["reference", "noise", "camera", "pose"]),
    data=st.data(),
)
def test_chunk_is_the_convolution(
    seed, dim, latents, height, width, num_slots, camera, frames, shared, stride, num_threads, order, data
):
    name = data.draw(st.sampled_from(implementations()))
    weight, bias, channels, fused = make(
        seed, dim=dim, camera=camera, latents=latents, height=height, width=width, order=order,
        stride=stride, num_threads=num_threads, implementation=name,
    )  # fmt: skip
    rng = np.random.default_rng(seed + 1)
    count = {
        "whole": 4 * num_slots,
        "clip start": 4 * num_slots - 3,
        "last": num_slots if camera == 6 else 4 * num_slots,
    }[frames]
    K, c2w = portrait_cameras(rng, count, shared=shared, pixels=stride * width)
    pose = rng.standard_normal((latents, num_slots, height, width)).astype(np.float32)
    expected = expected_chunk(weight, bias, channels, K, c2w, pose, stride)
    assert relative_error(fused.embed_chunk(K, c2w, pose), expected) <= TOLERANCE
    assert relative_error(fused.embed_chunk(K, c2w, pose, dtype=np.float16), expected) <= HALF_TOLERANCE


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("dim", [1, 16, 47, 96, 1536])
def test_reference(name, dim):
    weight, bias, channels, fused = make(dim=dim, height=7, width=13, implementation=name)
    latents = np.random.default_rng(1).standard_normal((16, 7, 13)).astype(np.float32)
    expected = oracle_tokens(weight, bias, channels, {"reference": latents[:, None].astype(np.float64)})
    assert relative_error(fused.embed_reference(latents), expected) <= TOLERANCE
    np.testing.assert_array_equal(fused.embed_reference(None), np.tile(bias, (fused.tokens_per_frame, 1)))


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("camera", [6, 24])
def test_real_widths(name, camera):
    """512x512 and dim 1536: 5 slots are large enough to be written past the caches, 2 are not, and both are equal."""
    weight, bias, channels, fused = make(
        dim=1536, camera=camera, height=64, width=64, num_threads=2, implementation=name
    )
    rng = np.random.default_rng(3)
    K, c2w = portrait_cameras(rng, 4 * 5, shared=True, pixels=512)
    pose = rng.standard_normal((16, 5, 64, 64)).astype(np.float32)
    tokens = fused.embed_chunk(K, c2w, pose)
    rows = rng.integers(0, len(tokens), 40)
    planes = {"pose": pose.astype(np.float64)}
    inverse, directions = np.linalg.inv(K[0]), c2w[:, :3, :3]
    pixels = np.stack([*np.meshgrid((np.arange(64) + 0.5) * 8, (np.arange(64) + 0.5) * 8), np.ones((64, 64))])
    d = np.einsum("fij,jk,khw->fihw", directions, inverse, pixels)
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    rays = np.concatenate([np.cross(c2w[:, :3, 3, None, None], d, axis=1), d], axis=1)
    planes["camera"] = pack_rays(rays, 5, camera)
    expected = oracle_tokens(weight, bias, channels, planes)
    assert relative_error(tokens[rows], expected[rows]) <= TOLERANCE
    np.testing.assert_array_equal(fused.embed_chunk(K[:8], c2w[:8], pose[:, :2]), tokens[: 2 * 1024])


@pytest.mark.parametrize("name", implementations())
def test_dropped_conditions_are_zero_latents(name):
    weight, bias, channels, fused = make(implementation=name)
    rng = np.random.default_rng(2)
    K, c2w = portrait_cameras(rng, 8, shared=True, pixels=80)
    pose = rng.standard_normal((16, 2, 6, 10)).astype(np.float32)
    zero = np.zeros_like(pose)
    assert (
        relative_error(fused.embed_chunk(None, None, pose), expected_chunk(weight, bias, channels, None, None, pose, 8))
        <= TOLERANCE
    )
    dropped = fused.embed_chunk(K, c2w, None, num_slots=2)
    assert relative_error(dropped, expected_chunk(weight, bias, channels, K, c2w, zero, 8)) <= TOLERANCE
    np.testing.assert_array_equal(fused.embed_chunk(None, None, None, num_slots=2), np.tile(bias, (len(dropped), 1)))


@pytest.mark.parametrize("name", implementations())
def test_clip_is_reference_and_chunks(name):
    _, _, _, fused = make(implementation=name)
    rng = np.random.default_rng(4)
    K, c2w = portrait_cameras(rng, 9, shared=False, pixels=80)
    pose, reference = (
        rng.standard_normal((16, 3, 6, 10)).astype(np.float32),
        rng.standard_normal((16, 6, 10)).astype(np.float32),
    )
    clip = fused.embed_clip(reference, K, c2w, pose)
    tokens = fused.tokens_per_frame
    np.testing.assert_array_equal(clip[:tokens], fused.embed_reference(reference))
    np.testing.assert_array_equal(clip[tokens : 2 * tokens], fused.embed_chunk(K[:1], c2w[:1], pose[:, :1]))
    np.testing.assert_array_equal(clip[2 * tokens :], fused.embed_chunk(K[1:], c2w[1:], pose[:, 1:]))


@pytest.mark.parametrize("name", [name for name in implementations() if name != "numpy"])
def test_threads_are_bit_equal(name):
    rng = np.random.default_rng(5)
    K, c2w = portrait_cameras(rng, 12, shared=False, pixels=240)
    pose = rng.standard_normal((16, 3, 21, 30)).astype(np.float32)
    results = [
        make(dim=100, height=21, width=30, num_threads=n, implementation=name)[3].embed_chunk(K, c2w, pose)
        for n in (1, 2, 7)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("name", implementations())
def test_half_output_is_the_rounded_single(name):
    """Subnormal, overflowing and not finite values too."""
    weight, bias, channels, _ = make(dim=64)
    weight = np.zeros_like(weight)
    bias[:10] = [1e-8, 3e-8, 6e-8, 1e-5, -6.2e-5, 65504, 65519.99, 65520, -1e30, np.nan]
    bias[10:20] = [np.inf, -np.inf, 0.0, -0.0, 2049, 2051, 1 + 2**-11, 1 + 3 * 2**-11, 5.9604645e-08, 2.9802322e-08]
    fused = FusedEmbedding(weight, bias, channels=channels, latent_height=2, latent_width=2, implementation=name)
    with np.errstate(over="ignore"):
        expected = bias.astype(np.float16)
    np.testing.assert_array_equal(fused.embed_reference(None, dtype=np.float16)[0], expected)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_out_is_written_in_place_and_nothing_beside_it(name, dtype):
    _, _, _, fused = make(dim=51, implementation=name)
    latents = np.random.default_rng(6).standard_normal((16, 6, 10)).astype(np.float32)
    buffer = np.full((fused.tokens_per_frame + 2, 51), 7, dtype)
    out = buffer[1:-1]
    assert fused.embed_reference(latents, out=out) is out
    np.testing.assert_array_equal(out, fused.embed_reference(latents, dtype=dtype))
    assert (buffer[[0, -1]] == 7).all()


@pytest.mark.parametrize("name", implementations())
def test_latents_may_be_a_slice(name):
    _, _, _, fused = make(implementation=name)
    rng = np.random.default_rng(7)
    K, c2w = portrait_cameras(rng, 8, shared=True, pixels=80)
    pose = rng.standard_normal((20, 5, 6, 10)).astype(np.float32)
    whole = fused.embed_chunk(K, c2w, pose[2:18, 1:3].copy())
    np.testing.assert_array_equal(fused.embed_chunk(K, c2w, pose[2:18, 1:3]), whole)
    flipped = np.asfortranarray(pose[2:18, 1:3])
    np.testing.assert_array_equal(fused.embed_chunk(K, c2w, flipped), whole)


@pytest.mark.parametrize("name", implementations())
def test_dlpack(name):
    torch = pytest.importorskip("torch")
    weight, bias, channels, fused = make(implementation=name)
    rng = np.random.default_rng(8)
    K, c2w = portrait_cameras(rng, 8, shared=True, pixels=80)
    pose = rng.standard_normal((16, 2, 6, 10)).astype(np.float32)
    expected = fused.embed_chunk(K, c2w, pose)
    from_torch = FusedEmbedding(
        torch.from_numpy(weight),
        torch.from_numpy(bias),
        channels=channels,
        latent_height=6,
        latent_width=10,
        implementation=name,
    )
    out = torch.zeros(expected.shape)
    result = from_torch.embed_chunk(torch.from_numpy(K), torch.from_numpy(c2w), torch.from_numpy(pose), out=out)
    assert result is out
    np.testing.assert_array_equal(out.numpy(), expected)
    assert torch.from_dlpack(expected).data_ptr() == expected.ctypes.data
    with pytest.raises(ValueError, match="pose_latents: expected a tensor on the CPU without gradient"):
        from_torch.embed_chunk(K, c2w, torch.from_numpy(pose).requires_grad_())


def test_agrees_with_the_convolution_of_torch():
    torch = pytest.importorskip("torch")
    weight, bias, channels, fused = make(dim=96)
    rng = np.random.default_rng(9)
    K, c2w = portrait_cameras(rng, 8, shared=False, pixels=80)
    pose = rng.standard_normal((16, 2, 6, 10)).astype(np.float32)
    zero = np.zeros_like(pose)
    rays = pack_rays(oracle_rays(K, c2w, 6, 10, 8), 2, 24).astype(np.float32)
    stacked = torch.from_numpy(np.concatenate([zero, zero, rays, pose]))[None]
    tokens = torch.nn.functional.conv3d(stacked, torch.from_numpy(weight), torch.from_numpy(bias), stride=(1, 2, 2))
    expected = tokens[0].flatten(1).T.numpy()
    assert relative_error(fused.embed_chunk(K, c2w, pose), expected) <= TOLERANCE


def test_agrees_with_the_ray_maps_of_the_media_package():
    camera = pytest.importorskip("factorportrait.runtime.media.camera")
    K, c2w = portrait_cameras(np.random.default_rng(10), 3, shared=False, pixels=80)
    np.testing.assert_allclose(camera.ray_maps(K, c2w, 48, 80, 8), oracle_rays(K, c2w, 6, 10, 8), rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("scale", [2.0, 1 + 1e-5, -1.0])
def test_rays_are_unit_even_when_the_rotation_is_not(name, scale):
    weight, bias, channels, fused = make(implementation=name)
    rng = np.random.default_rng(11)
    K, c2w = portrait_cameras(rng, 4, shared=True, pixels=80)
    c2w[:, :3, :3] *= scale
    pose = rng.standard_normal((16, 1, 6, 10)).astype(np.float32)
    assert (
        relative_error(fused.embed_chunk(K, c2w, pose), expected_chunk(weight, bias, channels, K, c2w, pose, 8))
        <= TOLERANCE
    )


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("distance", [0.0, 1e-3, 30.0, 1000.0])
def test_camera_anywhere(name, distance):
    """Close to the origin, and so far away that the moments cancel in a sum of large numbers."""
    weight, bias, channels, fused = make(implementation=name)
    rng = np.random.default_rng(12)
    K, c2w = portrait_cameras(rng, 4, shared=True, pixels=80)
    c2w[:, :3, 3] = -distance * c2w[:, :3, 2]
    pose = rng.standard_normal((16, 1, 6, 10)).astype(np.float32)
    assert (
        relative_error(fused.embed_chunk(K, c2w, pose), expected_chunk(weight, bias, channels, K, c2w, pose, 8))
        <= TOLERANCE
    )


def bad_calls():
    K, c2w, pose = (
        np.tile(np.diag([80.0, 80, 1]), (8, 1, 1)),
        np.tile(np.eye(4), (8, 1, 1)),
        np.zeros((16, 2, 6, 10), np.float32),
    )

    def changed(array, index, value):
        array = array.copy()
        array[index] = value
        return array

    yield "K singular", (changed(K, (3, 0, 0), 0), c2w, pose), r"K\[3\]: expected an invertible matrix"
    yield "K NaN", (changed(K, (1, 0, 2), np.nan), c2w, pose), r"K\[1\]: expected an invertible matrix"
    yield "K infinite", (changed(K, (1, 0, 2), np.inf), c2w, pose), r"K\[1\]: expected an invertible matrix"
    yield "rotation singular", (K, changed(c2w, (2, 0, 0), 0), pose), r"c2w\[2\]: expected a rotation"
    yield "translation NaN", (K, changed(c2w, (2, 0, 3), np.nan), pose), r"c2w\[2\]: expected .*finite"
    yield "transposed", (K, changed(c2w, (2, 3, 0), 1), pose), r"c2w\[2\]: expected .*transposed"
    yield "frames", (K[:7], c2w[:7], pose), r"c2w: expected .* 5 or 8 for 2 slots, got float64 \[7, 4, 4\]"
    yield "K frames", (K[:5], c2w, pose), r"K: expected \[3, 3\], \[1, 3, 3\] or \[8, 3, 3\], got float64 \[5, 3, 3\]"
    yield "K dtype", (K.astype(int), c2w, pose), "K: expected float64 or float32, got int64"
    yield "K list", (K.tolist(), c2w, pose), "K: expected a NumPy array or an object with __dlpack__, got list"
    yield "c2w 3x4", (K, c2w[:, :3], pose), r"c2w: expected \[F, 4, 4\]"
    yield "K alone", (K, None, pose), "K, c2w: expected both or neither"
    yield (
        "pose dtype",
        (K, c2w, pose.astype(np.float64)),
        r"pose_latents: expected float32 \[16, 2, 6, 10\], got float64",
    )
    yield "pose size", (K, c2w, pose[..., :9]), r"pose_latents: expected .*got float32 \[16, 2, 6, 9\]"
    yield "no slots", (None, None, None), "num_slots: expected at least 1"


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("arguments, message", [pytest.param(a, m, id=i) for i, a, m in bad_calls()])
def test_bad_arguments_are_named(name, arguments, message):
    _, _, _, fused = make(implementation=name)
    with pytest.raises(ValueError, match=message):
        fused.embed_chunk(*arguments)


def test_bad_outputs_and_weights_are_named():
    weight, bias, channels, fused = make()
    latents = np.zeros((16, 6, 10), np.float32)
    for out in (np.zeros((15, 51), np.float32), np.zeros((15, 50), np.float64), np.zeros((50, 15), np.float32).T):
        with pytest.raises(ValueError, match="^out: expected"):
            fused.embed_reference(latents, out=out)
    read_only = np.zeros((15, 50), np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="^out: .*writeable"):
        fused.embed_reference(latents, out=read_only)
    with pytest.raises(ValueError, match="^dtype: expected float32 or float16, got float64"):
        fused.embed_reference(latents, dtype=np.float64)
    size = {"latent_height": 6, "latent_width": 10}
    with pytest.raises(ValueError, match=r"^weight: expected float32 \[D, C, 1, p, p\], got float64"):
        FusedEmbedding(weight.astype(np.float64), bias, channels=channels, **size)
    with pytest.raises(ValueError, match=r"^bias: expected float32 \[50\], got float32 \[49\]"):
        FusedEmbedding(weight, bias[1:], channels=channels, **size)
    with pytest.raises(ValueError, match="^channels: expected reference, noise, camera, pose with 72 in all"):
        FusedEmbedding(weight, bias, channels={**channels, "normals": 1}, **size)
    with pytest.raises(ValueError, match="^channels: expected 0, 6 or 24 for camera, got 23"):
        FusedEmbedding(weight, bias, channels={**channels, "camera": 23, "pose": 17}, **size)
    with pytest.raises(ValueError, match="^latent_height, latent_width, stride: expected at least one patch"):
        FusedEmbedding(weight, bias, channels=channels, latent_height=1, latent_width=10)
    with pytest.raises(ValueError, match="^implementation: expected one of auto, numpy"):
        FusedEmbedding(weight, bias, channels=channels, implementation="sse9", **size)


def test_environment_chooses_the_implementation(monkeypatch):
    monkeypatch.setenv(embedding.ENVIRONMENT, "numpy")
    assert make()[3].implementation == "numpy"
    assert (
        embedding.describe_implementation() == "NumPy, as asked for"
        or "not installed" in embedding.describe_implementation()
    )
    monkeypatch.setenv(embedding.ENVIRONMENT, "abacus")
    with pytest.raises(UserError, match=f"^{embedding.ENVIRONMENT}; expected auto or numpy"):
        embedding.implementation()
    with pytest.raises(ValueError, match="^implementation: expected one of auto, numpy"):
        embedding.implementation("abacus")


def test_works_without_the_extension():
    code = (
        "import sys; sys.modules['factorportrait._embed'] = None\n"
        "from factorportrait.runtime import embedding\n"
        "assert embedding.implementations() == ('numpy',)\n"
        "print(embedding.describe_implementation())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("NumPy; the C++ extension is not installed")


def test_another_thread_runs_meanwhile():
    """The GIL is released: a Python thread counts on while a call of some 100 ms runs."""
    if implementations() == ("numpy",):
        pytest.skip("the extension is not installed")
    _, _, _, fused = make(dim=1536, height=64, width=64, num_threads=1, implementation="portable")
    pose = np.zeros((16, 4, 64, 64), np.float32)
    done, count, interval = threading.Event(), 0, sys.getswitchinterval()
    worker = threading.Thread(target=lambda: (fused.embed_chunk(None, None, pose), done.set()))
    sys.setswitchinterval(1e-4)
    try:
        worker.start()
        while not done.wait(0.001):
            count += 1
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert count >= 3


@pytest.mark.skipif(implementations() == ("numpy",), reason="the extension is not installed")
def test_the_extension_refuses_what_does_not_fit():
    """Whoever calls it without the Python front gets an exception, never a read outside of an array."""
    from factorportrait import _embed

    weight, bias = np.zeros((5, 12, 2, 2), np.float32), np.zeros(5, np.float32)
    ranges = {
        "reference": (0, 2),
        "camera": (4, 6),
        "pose": (10, 2),
        "latent_height": 4,
        "latent_width": 4,
        "stride": 8,
    }
    core = _embed.FusedEmbedding(weight, bias, **ranges)
    K, c2w, pose, out = (
        np.eye(3)[None],
        np.eye(4)[None],
        np.zeros((2, 1, 4, 4), np.float32),
        np.zeros((4, 5), np.float32),
    )
    core.embed_chunk(K, c2w, pose, num_slots=1, out=out)
    calls = [
        (lambda: core.embed_chunk(K, c2w[0], pose, num_slots=1, out=out), "c2w: expected float64"),
        (lambda: core.embed_chunk(K, c2w, pose, num_slots=2, out=out), "pose_latents: expected"),
        (lambda: core.embed_chunk(K, np.tile(c2w, (3, 1, 1)), pose, num_slots=1, out=out), "c2w: expected 4 frames"),
        (lambda: core.embed_chunk(K, c2w, pose[..., ::-1], num_slots=1, out=out), "contiguous latent frames"),
        (lambda: core.embed_chunk(K, c2w, pose, num_slots=1, out=out[:3]), "out: expected"),
        (lambda: core.embed_chunk(K, c2w, pose, num_slots=1, out=out.astype(np.int16)), "out: expected"),
        (lambda: core.embed_reference(pose, out=out), "reference_latents: expected"),
        (lambda: _embed.FusedEmbedding(weight, bias[1:], **ranges), "bias: expected"),
        (
            lambda: _embed.FusedEmbedding(weight, bias, **{**ranges, "pose": (11, 2)}),
            "pose: channels 11 to 13 are outside",
        ),
        (lambda: _embed.FusedEmbedding(weight, bias, **{**ranges, "camera": (4, 5)}), "camera: expected 0, 6 or 24"),
        (lambda: _embed.FusedEmbedding(weight, bias, **{**ranges, "stride": float("nan")}), "stride"),
        (lambda: _embed.FusedEmbedding(weight, bias, **ranges, num_threads=-1), "num_threads"),
        (lambda: _embed.FusedEmbedding(weight, bias, **ranges, isa="mmx"), "isa: expected"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
