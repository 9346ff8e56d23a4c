"""In steady state the loop allocates no arrays: latents, guidance, noise, keys and values all lie in memory of the first chunk."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from helpers import TINY

from factorportrait.bundle import StageSpec
from factorportrait.engines.ort import OrtEngine
from factorportrait.model_config import ModelConfig
from factorportrait.runtime.loop import ChunkConditions, Denoiser
from factorportrait.runtime.schedule import NoiseSource, constant_guidance, flow_schedule
from factorportrait.runtime.timing import Timings

LARGE_BYTES = 64 * 1024


class GraphsOnly:
    """As much of a bundle as an engine asks for."""

    def __init__(self, folder, specs):
        self.folder, self.specs = folder, specs

    def stage(self, name, target=None):
        return self.specs[name]

    def file(self, name):
        return self.folder / name


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A narrow transformer on large latents: a chunk's are 256 KiB, its keys 128 KiB per block."""
    from factorportrait.export.graphs import export_stage, tensor_specs, write_graph
    from factorportrait.export.models.factorportrait import FactorPortrait
    from factorportrait.export.stages import stages_of

    config = {**TINY, "height": 352, "width": 352, "vae": {**TINY["vae"], "base_dim": 4, "dim_mult": [1, 1, 1]}}
    config["dit"] = {**TINY["dit"], "dim": 32, "ffn_dim": 32, "num_layers": 1}
    config = ModelConfig.from_dict(config)
    folder, specs = tmp_path_factory.mktemp("large"), {}
    for stage in stages_of(FactorPortrait(config).eval().requires_grad_(False)):
        if stage.name in ("time_embed", "dit", "dit_inplace"):
            graph = export_stage(stage)
            file, *_ = write_graph(graph, folder, stage.name)
            inputs, outputs = tensor_specs(graph.graph.inputs), tensor_specs(graph.graph.outputs)
            specs[stage.name] = StageSpec(stage.name, file, inputs, outputs)
    return config, OrtEngine(GraphsOnly(folder, specs), threads=1)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("solver", ["euler", "renoise"])
def test_no_large_array_per_chunk(large, in_place, solver):
    """Two steps with guidance, a step with fresh noise, and the commit; measured once the window is full."""
    config, engine = large
    steps, guidance = 2, constant_guidance({"all": 2.0}, 2)
    denoiser = Denoiser(
        engine, flow_schedule(steps, 1.0, solver), guidance,
        NoiseSource(0, (16, config.latent_height, config.latent_width)), mode="stream", chunk_frames=2, window_frames=4,
        timings=Timings(), in_place=in_place,
    )  # fmt: skip
    denoiser.set_reference(*denoiser.condition_buffers(1))
    tokens, modulation = denoiser.condition_buffers(2)
    assert tokens[0].nbytes > LARGE_BYTES
    peaks = []
    tracemalloc.start()
    try:
        for i in range(6):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            latents = denoiser.generate(ChunkConditions(2 * i, tokens, modulation))
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    latents = latents.fetch()
    assert latents.nbytes > LARGE_BYTES and np.isfinite(latents).all()
    assert max(peaks[3:]) < LARGE_BYTES, peaks


def test_the_measure_sees_arrays():
    """A check of the check: tracemalloc counts what NumPy allocates."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = np.ones(LARGE_BYTES, np.uint8)
        assert tracemalloc.get_traced_memory()[1] - before >= kept.nbytes
    finally:
        tracemalloc.stop()
