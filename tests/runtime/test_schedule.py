"""Schedules as tables, step by step against diffusers over whole trajectories."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from factorportrait.model_config import SOLVERS
from factorportrait.runtime import solvers
from factorportrait.runtime.schedule import Schedule, flow_schedule

TOLERANCE = 1e-4  # relative; diffusers computes its coefficients in float32
STEPS = (1, 2, 3, 4, 8, 14, 15, 20, 50)
SHIFTS = (1.0, 3.0, 5.0, 8.0)


def network(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """A velocity that depends on sample and time, and curves."""
    return torch.sin(1.7 * x + timestep / 300) + 0.4 * x.roll(1, 0) - 0.3 * (timestep / 1000) ** 2


def start() -> torch.Tensor:
    return torch.randn(64, 1, generator=torch.Generator().manual_seed(0))


def with_table(schedule: Schedule, noise=None) -> list[np.ndarray]:
    """Samples after each step, as the loop computes them but in float64."""
    x, history, samples = start().double(), [], []
    for step in range(schedule.num_steps):
        history.insert(0, network(x, schedule.timesteps[step]))
        x = schedule.sample[step] * x + sum(c * v for c, v in zip(schedule.outputs[step], history, strict=False))
        if schedule.noise[step]:
            x = x + schedule.noise[step] * noise[step]
        samples.append(x.numpy())
    return samples


def with_diffusers(scheduler, **options) -> list[np.ndarray]:
    x, samples = start(), []
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, float(timestep)), timestep, x, return_dict=False, **options)[0]
        samples.append(x.double().numpy())
    return samples


def assert_same(schedule, scheduler, found, expected):
    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps.double().numpy(), rtol=1e-6, atol=0)
    assert len(found) == len(expected)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max(), step


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_unipc_is_diffusers(steps, shift):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    schedule = flow_schedule(steps, shift, "unipc")
    assert_same(schedule, scheduler, with_table(schedule), with_diffusers(scheduler))


@pytest.mark.parametrize("steps", [3, 4, 8, 20])
def test_unipc_of_order_3_is_diffusers(steps):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=3
    )
    scheduler.set_timesteps(steps)
    sigmas = solvers.unipc_sigmas(steps, 3.0)
    table = solvers.unipc(solvers.as_float32(sigmas), order=3)
    schedule = Schedule(np.trunc(1000 * sigmas[:-1]), np.ones(steps), table, np.zeros(steps))
    assert_same(schedule, scheduler, with_table(schedule), with_diffusers(scheduler))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_dpm_solver_is_diffusers(steps, shift):
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    schedule = flow_schedule(steps, shift, "dpm++")
    assert_same(schedule, scheduler, with_table(schedule), with_diffusers(scheduler))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_euler_is_diffusers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    schedule = flow_schedule(steps, shift, "flow-match")
    assert_same(schedule, scheduler, with_table(schedule), with_diffusers(scheduler))
    # As the authors of Wan space the levels themselves.
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    schedule = flow_schedule(steps, shift)
    assert_same(schedule, scheduler, with_table(schedule), with_diffusers(scheduler))


@pytest.mark.parametrize("mu", [0.5, 1.15, 2.0])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_euler_with_dynamic_shift_is_diffusers(steps, mu):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(steps, mu=mu)
    schedule = flow_schedule(steps, 1.0, sigmas=solvers.dynamic_sigmas(steps, mu))
    assert_same(schedule, scheduler, with_table(schedule), with_diffusers(scheduler))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_renoise_is_diffusers_stochastic_sampling(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    schedule = flow_schedule(steps, 5.0, "renoise")
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(start().shape, generator=generator) for _ in range(steps)]
    found = with_table(schedule, noise)
    assert_same(schedule, scheduler, found, with_diffusers(scheduler, generator=torch.Generator().manual_seed(5)))


def test_self_forcing_s_four_steps():
    # Its list 1000, 750, 500, 250 is read from a table of 1000 levels that are shifted by 5.
    schedule = flow_schedule(4, 5.0, "renoise")
    np.testing.assert_allclose(schedule.timesteps, [1000, 937.5, 2500 / 3, 625])
    assert schedule.outputs.shape == (4, 1) and schedule.noise[-1] == 0


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "renoise"])
def test_a_constant_velocity_is_integrated_exactly(solver, steps, shift):
    schedule = flow_schedule(steps, shift, solver)
    first = {"dpm++": solvers.dpm_sigmas, "unipc": solvers.unipc_sigmas}.get(solver, solvers.wan_sigmas)(steps, shift)[0]
    assert np.isfinite(schedule.outputs).all() and schedule.outputs.dtype == np.float64
    assert not np.triu(schedule.outputs, 1).any() and (schedule.sample == 1).all()
    assert abs(schedule.outputs.sum() + first) < 1e-7
    assert np.abs(schedule.outputs).max() <= 2.5  # nothing is built from large numbers that cancel


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_order_2_errs_less_than_euler(solver):
    def end(name, steps):
        return with_table(flow_schedule(steps, 3.0, name, solvers.dpm_sigmas(steps, 3.0)))[-1]

    exact = end("euler", 4000)
    assert np.abs(end(solver, 20) - exact).max() < np.abs(end("euler", 20) - exact).max()


def test_what_is_no_schedule():
    with pytest.raises(ValueError, match="solver: expected one of euler, flow-match, renoise, unipc, dpm"):
        flow_schedule(4, 1.0, "heun")
    with pytest.raises(ValueError, match="sigmas: expected 5"):
        flow_schedule(4, 1.0, sigmas=np.linspace(1, 0, 4))


def test_the_config_knows_every_solver():
    for solver in SOLVERS:
        assert flow_schedule(3, 2.0, solver).num_steps == 3
