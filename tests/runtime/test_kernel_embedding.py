"""The fused embedding's CUDA kernels in the loop: on a device that is emulated on the CPU, against the graph."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from emulated_cuda import compiled
from test_conditions import make_builder, random_groups
from test_whole_chunks import ReplayingEngine, latents_and_pictures

from factorportrait.bundle import Bundle
from factorportrait.engines.ort import OrtEngine
from factorportrait.runtime import conditions, embedding, kernel_embedding
from factorportrait.runtime.kernel_embedding import FILE, KERNELS, KernelEmbedding
from factorportrait.runtime.session import OpenBundle, open_bundle

DRIVER = """
#include "cuda_on_cpu.h"
#include "embed.cu"
#define GRID const unsigned* grid, const unsigned* block
#define RUN(call) launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, [=] { call; })
extern "C" void run_embed_prepare_cameras(GRID, const double* K, int num_k, const double* c2w, int frames, int slots,
                                          int per_slot, int rays, double* maps, double* folds, unsigned* bad) {
  RUN(embed_prepare_cameras(K, num_k, c2w, frames, slots, per_slot, rays, maps, folds, bad));
}
extern "C" void run_embed_fold_cameras(GRID, const float* weight, const double* folds, int cells, int channels,
                                       int rays, int dim, float* folded) {
  RUN(embed_fold_cameras(weight, folds, cells, channels, rays, dim, folded));
}
extern "C" void run_embed_tokens_f32(GRID, const float* latents, long long channel_stride, long long slot_stride,
                                     int channels, const float* weight, const double* maps, int rays,
                                     const float* folded, const float* bias, int patch_height, int patch_width,
                                     int width, int columns, int tokens, int dim, double stride, float* out) {
  RUN(embed_tokens_f32(latents, channel_stride, slot_stride, channels, weight, maps, rays, folded, bias, patch_height,
                       patch_width, width, columns, tokens, dim, stride, out));
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(DRIVER, tmp_path_factory.mktemp("kernels"))


class EmulatedDevice(ReplayingEngine):
    """A device apart from the host, with graphs, whose kernels run on the CPU; a kernel sees the memory it is given, no more."""

    device = "emulated"

    def __init__(self, engine, library):
        super().__init__(engine)
        self._library = library

    def kernels(self, file, names):
        assert (file, tuple(names)) == (FILE, KERNELS)
        return self

    def launch(self, name, grid, block, *arguments):
        kinds = {np.int32: ctypes.c_int, np.int64: ctypes.c_longlong, np.float64: ctypes.c_double}
        buffers = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        assert not {id(buffer) for buffer in buffers} & self.hosts.keys(), "the host's memory in a kernel"
        assert all(buffer.flags.c_contiguous for buffer in buffers)
        given = [(ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)]
        for argument in arguments:
            is_buffer = isinstance(argument, np.ndarray)
            given.append(ctypes.c_void_p(argument.ctypes.data) if is_buffer else kinds[type(argument)](argument))
        self.runs[name, self._tape is not None] += 1
        self.put(lambda: getattr(self._library, f"run_{name}")(*given))


@pytest.fixture
def emulated(tiny_bundle, library):
    bundle = Bundle(tiny_bundle)
    return OpenBundle(bundle, EmulatedDevice(OrtEngine(bundle, threads=1), library))


@pytest.fixture(scope="module")
def opened(tiny_bundle):
    return open_bundle(tiny_bundle, threads=1)


@pytest.mark.parametrize("mode", ["stream", "clip"])
@pytest.mark.parametrize("guidance", ["1", "2", "pose=2,camera=0.5", "reference=1.5,expression=2"])
@pytest.mark.parametrize("slots", ["first", "all"])
def test_tokens_equal_the_graph(opened, emulated, guidance, mode, slots):
    """Of two portraits and their chunks, every factor dropped in turn."""
    config = replace(opened.config, fusion=replace(opened.config.fusion, reference_slots=slots))
    rng, found = np.random.default_rng(1), []
    portraits = [rng.standard_normal((1, config.vae.z_dim, 1, config.latent_height, config.latent_width)) for _ in range(2)]
    for bundle, kind in ((opened, "graph"), (emulated, "fused")):
        builder = make_builder(bundle, kind, guidance, mode)
        builder.config = config
        assert isinstance(builder._fused, KernelEmbedding) == (kind == "fused")
        tokens = []
        for portrait in portraits:
            builder.reset()
            reference, _ = builder.reference(portrait.astype(np.float32))
            tokens += [one.copy() for one in reference]
            for first, size in ((0, 3), (3, 2)):
                chunk = builder.chunk(random_groups(bundle, 5)[first : first + size], first)
                if chunk.compute is not None:
                    chunk.compute()
                tokens += [one.copy() for one in chunk.tokens]
        found.append(tokens)
    for wanted, got in zip(*found, strict=True):
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    # A check of the check: portraits matter to the frames only where they hold them.
    half, sets = len(found[0]) // 2, len(builder.guidance.dropped)
    assert np.array_equal(found[0][half - sets][:, -1], found[0][-sets][:, -1]) == (slots == "first")


@pytest.mark.parametrize("rays", ["packed", "last"])
@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("dropped", [(), ("camera",), ("pose",), ("reference",), ("reference", "pose", "camera")])
def test_tokens_equal_the_extension(emulated, rays, patch, dropped):
    """Weights of every kind of config, against the host's embedding of the same groups; frames hold the portrait too."""
    config = emulated.config
    fusion = replace(config.fusion, rays=rays, reference_slots="all", streams=("camera", "pose", "noise", "reference"))
    config = replace(config, dit=replace(config.dit, patch_size=patch), fusion=fusion)
    rng = np.random.default_rng(2)
    weight, bias = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((70, fusion.in_channels, *patch), (70,))
    )
    host = embedding.FusedEmbedding(
        weight, bias, channels={name: fusion.channels(name) for name in fusion.streams}, latent_height=config.latent_height,
        latent_width=config.latent_width, stride=config.vae.spatial_stride,
    )  # fmt: skip
    engine, groups = emulated.engine, random_groups(emulated, 3)
    portrait = rng.standard_normal((1, config.vae.z_dim, 1, config.latent_height, config.latent_width)).astype(np.float32)
    tokens = engine.zeros((1, 3, host.tokens_per_frame, 70), "float32")
    device = KernelEmbedding(config, engine, engine, weight, bias)
    embedder = kernel_embedding.KernelEmbedder(device, [frozenset(dropped)], [tokens], with_reference=True, with_frames=True)
    embedder.set_reference(portrait)
    embedder.load(groups)
    embedder.compute()
    K, c2w = (np.concatenate([getattr(group, name) for group in groups]) for name in ("K", "c2w"))
    pose = np.concatenate([group.pose_latents.fetch()[0] for group in groups], axis=1)
    cameras = (None, None) if "camera" in dropped else (K, c2w)
    expected = host.embed_chunk(*cameras, None if "pose" in dropped else pose, num_slots=3).reshape(tokens.shape)
    if "reference" not in dropped:
        expected = expected + host.embed_reference(portrait[0, :, 0]) - host.embed_reference(None)
    assert np.abs(tokens - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("options", [{"mode": "stream", "chunk_frames": 2, "window_frames": 4}, {"mode": "clip"}], ids=str)
@pytest.mark.parametrize("guidance", ["1", "1.5"])
def test_sessions_equal_the_graph(opened, emulated, options, guidance):
    """Recorded with the steps, and replayed with other cameras, poses and another portrait."""
    options = {**options, "guidance": guidance, "steps": 2, "seed": 3}
    sessions = [opened.session(embedding="graph", **options), emulated.session(embedding="fused", **options)]
    assert sessions[1].embedding == "fused" and sessions[1].embedding_reason == "CUDA kernels on emulated"
    for portrait in (1, 2, 3):
        (expected, pictures), (latents, found) = (
            latents_and_pictures(bundle, 29, session=session, portrait_seed=portrait)
            for bundle, session in zip((opened, emulated), sessions, strict=True)
        )
        assert np.abs(latents - expected).max() <= 1e-4 * np.abs(expected).max()
        assert np.abs(found.astype(int) - pictures).max() <= 1
    runs = emulated.engine.runs
    assert runs["embed_tokens_f32", True] and runs["embed_prepare_cameras", True]
    assert not any(name == "condition_embed" for name, _ in runs)


def test_a_camera_without_rays_is_refused(emulated):
    builder, groups = make_builder(emulated, "fused"), random_groups(emulated, 2)
    groups[1].c2w[2, :3, :3] = 0
    with pytest.raises(ValueError, match=r"c2w\[6\]: expected a rotation"):
        builder.chunk(groups, 0)
    # Its determinant is not 0 in floating point, and the kernel refuses it.
    groups[1].c2w[2, :3, :3] = np.outer([1.0, 2, 3], [1, 0.3, 0.7]) + np.outer([0.1, 0.7, 0.2], [0.9, 0.1, 0.3])
    with pytest.raises(ValueError, match="expected a rotation"):
        builder.chunk(groups, 0)
    groups[1].c2w[:] = groups[0].c2w
    groups[0].c2w[1, 0, 3] = np.nan
    with pytest.raises(ValueError, match=r"c2w\[1\]: expected finite"):
        builder.chunk(groups, 0)


def test_half_tokens_have_their_kernel(emulated, monkeypatch):
    """By the dtype of what the transformer reads; what it computes is checked where there is a GPU."""
    launched = []
    monkeypatch.setattr(EmulatedDevice, "launch", lambda self, name, *arguments: launched.append(name))
    engine, config, arrays = emulated.engine, emulated.config, emulated.bundle.constants()
    embedded = kernel_embedding.open_kernel_embedding(config, engine, arrays["embed_weight"], arrays["embed_bias"])
    tokens = engine.zeros((1, 1, config.tokens_per_frame, config.dit.dim), "float16")
    kernel_embedding.KernelEmbedder(embedded, [frozenset()], [tokens], with_reference=True, with_frames=False).compute()
    assert launched == ["embed_tokens_f16"]


def test_where_no_kernel_runs_the_host_embeds(emulated, monkeypatch):
    monkeypatch.setattr(EmulatedDevice, "kernels", lambda *_: None)
    builder = make_builder(emulated, "fused")
    assert isinstance(builder._fused, embedding.FusedEmbedding)
    builder.reference(np.zeros((1, emulated.config.vae.z_dim, 1, 4, 4), np.float32))
    assert isinstance(builder._slots(1, is_reference=True).embedder, conditions.FusedEmbedder)
