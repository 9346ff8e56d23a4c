"""The CUDA kernels compile for every architecture without a GPU, and their arithmetic, on the CPU, is the oracle's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
from embedding_oracle import oracle_rays, oracle_tokens, pack_rays, portrait_cameras
from emulated_cuda import compiled

from factorportrait.engines.base import host_sum
from factorportrait.kernels import source_path

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
KERNELS = {
    "embed.cu": ("embed_prepare_cameras", "embed_fold_cameras", "embed_tokens_f32", "embed_tokens_f16"),
    "sum.cu": ("weighted_sum",),
}


@pytest.mark.parametrize("file", KERNELS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles(architecture, file):
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    source = source_path(file)
    options = core.ProgramOptions(arch=f"sm_{architecture}", include_path=str(source.parent), std="c++17")
    try:
        program = core.Program(source.read_text(encoding="utf-8"), "c++", options)
    except Exception as error:  # the loader of NVRTC raises types of its own
        if "nvrtc" not in str(error).lower():
            raise
        pytest.skip(f"NVRTC is not installed: {error}")
    code = program.compile("cubin").code
    assert code[:4] == b"\x7fELF"
    assert all(name.encode() in code for name in KERNELS[file])


def test_nvcc_compiles(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [
        nvcc,
        "-cubin",
        "-arch=sm_90",
        "-std=c++17",
        "-o",
        str(tmp_path / "embed.cubin"),
        str(source_path("embed.cu")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


DRIVER = """
#include "cuda_on_cpu.h"
#include "embed.cu"
#include "sum.cu"
extern "C" void add(const float* const* sources, const float* weights, int count, float* target, long long size,
                    long long period, long long skipped) {
  launch({static_cast<unsigned>((size + 31) / 32), 1, 1}, {32, 1, 1},
         [=] { weighted_sum(sources, weights, count, target, size, period, skipped); });
}
extern "C" void embed(const double* K, int num_k, const double* c2w, int frames, int slots, int per_slot, int rays,
                      double* maps, double* folds, unsigned* bad, const float* camera_weight, float* folded,
                      const float* latents, int channels, const float* latent_weight, const float* bias, int height,
                      int width, int dim, double stride, float* out) {
  const unsigned s = slots, rows = height / 2, columns = width / 2, tokens = rows * columns;
  const long long plane = static_cast<long long>(height) * width;
  launch({(s * per_slot + 3) / 4, 1, 1}, {4, 1, 1},
         [=] { embed_prepare_cameras(K, num_k, c2w, frames, slots, per_slot, rays, maps, folds, bad); });
  launch({(dim + 15u) / 16, s, 1}, {16, 1, 1},
         [=] { embed_fold_cameras(camera_weight, folds, 4, 6 * per_slot, rays, dim, folded); });
  launch({(dim + 63u) / 64, (tokens + 63) / 64, s}, {16, 16, 1}, [=] {
    embed_tokens_f32(latents, plane * slots, plane, channels, latent_weight, maps, rays, folded, bias, 2, 2, width,
                     columns, tokens, dim, stride, out);
  });
}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return compiled(DRIVER, tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("weights", [(0.3,), (1.0, -0.7), (0.1, 0.2, 0.7)])
def test_sums_equal_numpy(emulated, weights, first):
    """To the bit, the target being the first term: [B, C, F, h, w], of which the first slots stay."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 3, 4, 5, 7)).astype(np.float32) for _ in weights]
    expected = arrays[0].copy()
    host_sum(expected, [(expected, weights[0]), *zip(arrays[1:], weights[1:], strict=True)], np.empty_like(expected), first)()
    sources, factors = np.array([array.ctypes.data for array in arrays], np.uint64), np.array(weights, np.float32)
    i64 = ctypes.c_longlong
    emulated.add(
        ctypes.c_void_p(sources.ctypes.data), ctypes.c_void_p(factors.ctypes.data), len(weights),
        ctypes.c_void_p(arrays[0].ctypes.data), i64(arrays[0].size), i64(4 * 5 * 7), i64(first * 5 * 7),
    )  # fmt: skip
    assert np.array_equal(arrays[0], expected)


@pytest.mark.parametrize("camera", [6, 24])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("clip_start", [True, False])
def test_arithmetic(emulated, camera, shared, clip_start):
    rng = np.random.default_rng(camera)
    dim, latents, height, width, slots, stride = 70, 5, 9, 35, 2, 8.0
    channels = {"camera": camera, "pose": latents}
    weight = rng.standard_normal((dim, camera + latents, 1, 2, 2)).astype(np.float32) * 0.1
    bias = rng.standard_normal(dim).astype(np.float32)
    pose = rng.standard_normal((latents, slots, height, width)).astype(np.float32)
    K, c2w = portrait_cameras(rng, 4 * slots - 3 * clip_start, shared=shared, pixels=stride * width)
    per_slot, rays = camera // 6, 1 if shared else camera // 6
    maps, folds, bad = np.empty((slots, rays, 9)), np.empty((slots, camera, 3)), np.zeros(1, np.uint32)
    camera_weight = np.ascontiguousarray(weight[:, :camera, 0].reshape(dim, camera, 4).transpose(2, 1, 0))
    latent_weight = np.ascontiguousarray(weight[:, camera:, 0].reshape(dim, -1).T)
    folded = np.empty((slots, rays * 12, dim), np.float32)
    tokens = (height // 2) * (width // 2)
    out = np.full((slots * tokens, dim), np.nan, np.float32)

    def pointer(array):
        return ctypes.c_void_p(array.ctypes.data)

    emulated.embed(
        pointer(K), len(K), pointer(c2w), len(c2w), slots, per_slot, rays, pointer(maps), pointer(folds), pointer(bad),
        pointer(camera_weight), pointer(folded), pointer(pose), latents, pointer(latent_weight), pointer(bias),
        height, width, dim, ctypes.c_double(stride), pointer(out),
    )  # fmt: skip
    assert bad[0] == 0
    planes = {
        "camera": pack_rays(oracle_rays(K, c2w, height, width, stride), slots, camera),
        "pose": pose.astype(np.float64),
    }
    expected = oracle_tokens(weight, bias, channels, planes)
    assert np.abs(out - expected).max() <= 1e-5 * np.abs(expected).max()
