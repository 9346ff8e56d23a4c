"""Profiles hold every size that a session runs, and how far a build is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_bundles import CONTROLLER, DECODER, DIT, DIT_IN_PLACE, ENCODER

from factorportrait.bundle import StageSpec, TensorSpec
from factorportrait.engines.base import tensor_shape
from factorportrait.engines.tensorrt.builder import Job, Phases
from factorportrait.engines.tensorrt.plans import Options
from factorportrait.engines.tensorrt.profiles import profiles_of
from factorportrait.model_config import FusionConfig, ModelConfig, RayAdapterConfig


def holding(spec: StageSpec, config, **sizes: int) -> list[str]:
    """Names of the profiles that hold the sizes."""
    shapes = {tensor.name: tensor_shape(tensor, sizes) for tensor in spec.inputs}
    return [profile.name for profile in profiles_of(spec, config) if profile.holds(shapes)]


def test_the_transformer_has_a_profile_for_every_run(tiny_config):
    config = tiny_config  # chunk 2, window 5, clips of up to 9 latent frames
    assert holding(DIT, config, F=1, P=0) == ["stream", "clip"]  # the reference
    for past in (1, 3, 4):
        assert holding(DIT, config, F=2, P=past) == ["stream"]
    assert holding(DIT, config, F=1, P=5) == ["stream"]  # --chunk 1 looks back on one frame more
    assert holding(DIT, config, F=10, P=0) == ["clip"]
    assert holding(DIT, config, F=11, P=0) == holding(DIT, config, F=3, P=1) == holding(DIT, config, F=2, P=6) == []


def test_kernels_are_tuned_for_the_full_window(tiny_config):
    stream, clip = profiles_of(DIT, tiny_config)
    assert stream.shapes["past_k.0"] == ((1, 0, 4, 64), (1, 4, 4, 64), (1, 5, 4, 64))
    assert stream.shapes["noise_latents"] == ((1, 16, 1, 4, 4), (1, 16, 2, 4, 4), (1, 16, 2, 4, 4))
    assert clip.shapes["past_positions"] == ((0,), (0,), (0,))
    assert clip.shapes["positions"] == ((1,), (10,), (10,))


def test_modes_that_the_checkpoint_lacks_have_no_profile(tiny_config):
    for mode in ("stream", "clip"):
        config = replace(tiny_config, generation=replace(tiny_config.generation, modes=(mode,)))
        assert [profile.name for profile in profiles_of(DIT, config)] == [mode]


def test_the_cache_in_place(tiny_config):
    (profile,) = profiles_of(DIT_IN_PLACE, tiny_config)
    assert profile.shapes["key_positions"] == ((1,), (6,), (6,))  # the reference and a window of 5
    assert profile.shapes["cache_k.0"] == ((1, 1, 4, 64), (1, 1, 24, 64), (1, 1, 24, 64))
    assert "write_index" not in profile.shapes
    assert holding(DIT_IN_PLACE, tiny_config, F=1, S=1) == holding(DIT_IN_PLACE, tiny_config, F=2, S=6) == ["stream"]


def test_a_stream_without_a_sink_has_no_slot_for_it(tiny_config):
    """Self-Forcing sees its window and nothing in front of it: a slot more would cost memory in every block."""
    config = ModelConfig(
        system="self-forcing", height=32, width=32, fps=16.0, vae=tiny_config.vae, dit=replace(tiny_config.dit, text_dim=8),
        fusion=FusionConfig(streams=("noise",)), generation=replace(tiny_config.generation, modes=("stream",)),
    )  # fmt: skip
    (in_place,), (concat,) = profiles_of(DIT_IN_PLACE, config), profiles_of(DIT, config)
    assert in_place.shapes["key_positions"] == ((1,), (5,), (5,))
    assert concat.shapes["past_positions"] == ((0,), (3,), (4,))


def test_a_clip_is_as_long_as_its_system_asks_for(tiny_config):
    """Control-Camera has its portrait in the first frame, and no slot in front of it."""
    config = ModelConfig(
        system="wan-fun-camera", height=32, width=32, fps=16.0, vae=tiny_config.vae,
        dit=replace(tiny_config.dit, text_dim=8, image_dim=8, ray_adapter=RayAdapterConfig()),
        fusion=FusionConfig(streams=("noise", "image")), generation=replace(tiny_config.generation, modes=("clip",)),
    )  # fmt: skip
    (clip,) = profiles_of(DIT, config)
    assert clip.shapes["positions"] == ((1,), (9,), (9,))


def test_a_factor_of_a_size(tiny_config):
    (profile,) = profiles_of(CONTROLLER, tiny_config)
    assert profile.shapes == {"codes": ((1, 4, 16), (1, 8, 16), (1, 40, 16))}


def test_fixed_sizes_need_no_profile(tiny_config):
    assert profiles_of(DECODER, tiny_config) == []


def test_an_unknown_size_is_named(tiny_config):
    spec = replace(ENCODER, inputs=(TensorSpec("coefficients", "float32", ("Q", 52)),))
    with pytest.raises(ValueError, match="arkit_encoder: no range for the sizes Q"):
        profiles_of(spec, tiny_config)


def test_a_job_survives_its_way_to_the_process(tiny_config):
    profiles = tuple(profiles_of(DIT, tiny_config))
    job = Job("dit", "dit.onnx", "plan", "times", "log", profiles, Options(4, 10**9, True))
    again = Job.from_json(job.to_json())
    assert (again.stage, again.options, len(again.profiles)) == ("dit", job.options, 2)
    for sent, come in zip(profiles, again.profiles, strict=True):
        assert {name: tuple(map(tuple, shapes)) for name, shapes in come.shapes.items()} == sent.shapes


def test_progress_grows_with_steps_within_steps():
    phases = Phases()
    assert phases.fraction == 0
    phases.start("building", None, 4)
    phases.step("building", 0)
    assert phases.fraction == 1 / 4
    phases.start("timing", "building", 2)
    phases.step("timing", 0)
    assert phases.fraction == 1 / 4 + 1 / 8
    phases.finish("timing")
    assert phases.fraction == 1 / 4 + 1 / 8  # never back
    phases.step("building", 1)
    phases.step("building", 3)
    phases.step("never started", 3)
    assert phases.fraction == 1
