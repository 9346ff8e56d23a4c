"""The fused embedding's CUDA kernels, compiled here by NVRTC, against the float64 oracle."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from factorportrait.runtime.kernel_embedding import FILE, KERNELS

sys.path.append(str(Path(__file__).parents[1] / "cpp_ext"))
from embedding_oracle import oracle_rays, oracle_tokens, pack_rays, portrait_cameras  # noqa: E402


@pytest.fixture(scope="module")
def kernels():
    """launch(name, grid, block, *arguments) on a stream, and the memory that goes with it."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    from factorportrait.engines.tensorrt.cuda import Device
    from factorportrait.engines.tensorrt.kernels import Kernels

    memory = Device()
    return Kernels(memory, FILE, KERNELS).launch, memory


@pytest.mark.parametrize("camera", [6, 24])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("dim", "height", "width"), [(70, 9, 35), (1536, 64, 64)])
def test_kernels_equal_the_oracle(kernels, camera, shared, dtype, dim, height, width):
    """Odd sizes, and the real width at 512 x 512. Relative error: 1e-5 in fp32, 1e-3 in fp16, whose rounding is 5e-4."""
    launch, memory = kernels
    rng = np.random.default_rng(camera)
    latents, slots, stride = 16, 3, np.float64(8.0)
    weight = rng.standard_normal((dim, camera + latents, 1, 2, 2)).astype(np.float32) * 0.1
    bias = rng.standard_normal(dim).astype(np.float32)
    pose = rng.standard_normal((latents, slots, height, width)).astype(np.float32)
    K, c2w = portrait_cameras(rng, 4 * slots, shared=shared, pixels=stride * width)
    per_slot, rays = camera // 6, 1 if shared else camera // 6
    tokens = (height // 2) * (width // 2)

    def upload(array):
        array = np.ascontiguousarray(array)
        buffer = memory.zeros(array.shape, str(array.dtype))
        memory.copy(array, buffer)
        return buffer

    K_on, c2w_on, bias_on, pose_on = (upload(array) for array in (K, c2w, bias, pose))
    camera_weight = upload(weight[:, :camera, 0].reshape(dim, camera, 4).transpose(2, 1, 0))
    latent_weight = upload(weight[:, camera:, 0].reshape(dim, -1).T)
    maps, folds = memory.zeros((slots, rays, 9), "float64"), memory.zeros((slots, camera, 3), "float64")
    bad, folded = memory.zeros((1,), "uint32"), memory.zeros((slots, rays * 12, dim), "float32")
    out = memory.zeros((slots * tokens, dim), dtype)
    i32, i64 = np.int32, np.int64
    launch(
        "embed_prepare_cameras", ((slots * per_slot + 3) // 4, 1, 1), (4, 1, 1), K_on.address, i32(len(K)), c2w_on.address,
        i32(len(c2w)), i32(slots), i32(per_slot), i32(rays), maps.address, folds.address, bad.address,
    )  # fmt: skip
    launch(
        "embed_fold_cameras", ((dim + 15) // 16, slots, 1), (16, 1, 1), camera_weight.address, folds.address, i32(4),
        i32(6 * per_slot), i32(rays), i32(dim), folded.address,
    )  # fmt: skip
    plane = height * width
    launch(
        f"embed_tokens_f{8 * np.dtype(dtype).itemsize}", ((dim + 63) // 64, (tokens + 63) // 64, slots), (16, 16, 1),
        pose_on.address, i64(plane * slots), i64(plane), i32(latents), latent_weight.address, maps.address, i32(rays),
        folded.address, bias_on.address, i32(2), i32(2), i32(width), i32(width // 2), i32(tokens), i32(dim), stride, out.address,
    )  # fmt: skip
    found, num_bad = np.empty((slots * tokens, dim), dtype), np.empty(1, np.uint32)
    memory.copy(out, found)
    memory.copy(bad, num_bad)
    assert num_bad[0] == 0
    planes = {"camera": pack_rays(oracle_rays(K, c2w, height, width, stride), slots, camera), "pose": pose.astype(np.float64)}
    expected = oracle_tokens(weight, bias, {"camera": camera, "pose": latents}, planes)
    limit = {"float32": 1e-5, "float16": 1e-3}[dtype]
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()
