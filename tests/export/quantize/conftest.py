"""Samples and a recipe of the tiny bundle, made once per session."""

from __future__ import annotations

import pytest
from tiny_clips import tiny_clip

from factorportrait.bundle import Bundle


@pytest.fixture(scope="session")
def fp32(tiny_bundle) -> Bundle:
    """The tiny model's bundle."""
    return Bundle(tiny_bundle)


@pytest.fixture(scope="session")
def clips(fp32):
    """Two clips, one with a truth."""
    return [tiny_clip(fp32.config, seed=0, truth=True), tiny_clip(fp32.config, seed=10)]


@pytest.fixture(scope="session")
def samples(fp32, clips, tmp_path_factory):
    """Recorded with the fp32 pipeline."""
    from factorportrait.export.quantize.samples import RecordSettings, record_samples

    return record_samples(fp32, clips, tmp_path_factory.mktemp("samples"), RecordSettings(per_stage=8), threads=1)


@pytest.fixture(scope="session")
def graphs(fp32):
    """Stage -> file of its fp32 graph."""
    return {name: fp32.file(spec.file) for name, spec in fp32.manifest.target_stages("cpu").items()}


@pytest.fixture(scope="session")
def recorded(samples, graphs):
    """Stage -> samples; none for stages that these clips do not run."""
    return {stage: samples.of(stage) for stage in graphs}


@pytest.fixture(scope="session")
def recipe(graphs, recorded, fp32):
    """What layers.toml makes of the tiny model."""
    from factorportrait.export.quantize.recipe import make_recipe, observe

    return make_recipe(graphs, observe(graphs, recorded), fp32.config.dit.num_layers)
