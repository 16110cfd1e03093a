"""Schedulers of diffusers in our terms: the same samples, and no option ignored."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pydenoise import step_row
from pydenoise.samplers import DPMSolverPP, Sampler, from_diffusers

sys.path.insert(0, str(Path(__file__).parent))
from diffusers_cases import DETERMINISTIC, STOCHASTIC, learned, model, name_of, pipeline  # noqa: E402

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array__:DeprecationWarning")

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STEPS = 9


def scheduler_of(name, options):
    return getattr(diffusers, f"{name}Scheduler")(**options)


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", DETERMINISTIC, ids=name_of)
def test_deterministic(case):
    name, options, tolerance = case
    scheduler = scheduler_of(name, options)
    expected = pipeline(scheduler, STEPS, X)
    found = from_diffusers(scheduler)
    sampler = found.sampler(model, STEPS)
    assert difference(sampler.sample(X * found.initial_scale(STEPS)), expected) < tolerance
    told = torch.tensor(sampler.times, dtype=torch.float64)
    # Where the spacing is of sigmas, times are found in float32 there.
    torch.testing.assert_close(told, scheduler.timesteps.double(), rtol=0, atol=0.01)


@pytest.mark.parametrize("case", STOCHASTIC, ids=name_of)
def test_stochastic(case):
    name, options, tolerance = case
    scheduler = scheduler_of(name, options)
    predict = learned if options.get("variance_type") == "learned_range" else model
    expected = pipeline(scheduler, STEPS, X, predict, generator=torch.Generator().manual_seed(1))
    found = from_diffusers(scheduler)
    sampler = found.sampler(predict, STEPS)
    generator = torch.Generator().manual_seed(1)
    count = int((sampler.plan.table[:, step_row.NOISE] != 0).sum())  # calls with noise: all but the last, or all
    noise = [torch.randn(X.shape, generator=generator) for _ in range(count)]
    assert difference(sampler.sample(X * found.initial_scale(STEPS), noise=noise), expected) < tolerance


def test_dynamic_shifting():
    scheduler = scheduler_of("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True})
    scheduler.set_timesteps(STEPS, mu=0.7)
    times, told = from_diffusers(scheduler).times(STEPS, mu=0.7)
    torch.testing.assert_close(torch.tensor(told), scheduler.timesteps, rtol=1e-5, atol=1e-3)
    with pytest.raises(ValueError, match="^mu: use_dynamic_shifting needs it"):
        from_diffusers(scheduler).times(STEPS)
    with pytest.raises(ValueError, match="^mu: only with use_dynamic_shifting"):
        from_diffusers(scheduler_of("DDIM", {})).times(STEPS, mu=0.7)


@pytest.mark.parametrize("form", ["scheduler", "config", "JSON"])
def test_what_is_read(form, tmp_path):
    scheduler = scheduler_of("DPMSolverMultistep", {"solver_order": 3, "beta_end": 0.03})
    scheduler.save_pretrained(tmp_path)
    forms = {"scheduler": scheduler, "config": scheduler.config}
    forms["JSON"] = json.loads((tmp_path / "scheduler_config.json").read_text())
    found = from_diffusers(forms[form])
    assert found.solver == DPMSolverPP(3, spacing="linspace")
    assert found.settings.beta_end == 0.03 and found.options == {"prediction_type": "epsilon"}


def test_options_of_the_sampler_take_precedence():
    found = from_diffusers(scheduler_of("DDIM", {}))
    assert isinstance(found.sampler(model, 4), Sampler) and found.sampler(model, 4).conversion.clip == 1
    assert found.sampler(model, 4, clip=0.5).conversion.clip == 0.5


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "DDPM",
            {"variance_type": "learned"},
            "variance_type: 'learned' of DDPMScheduler has no counterpart here; supp",
        ),
        ("DDPM", {"beta_schedule": "laplace"}, "beta_schedule: "),
        ("PNDM", {"timestep_spacing": "trailing"}, "timestep_spacing: 'trailing' of PNDMScheduler"),
        ("DPMSolverMultistep", {"use_beta_sigmas": True}, "use_beta_sigmas: True of DPMSolverMultistepScheduler"),
        ("DPMSolverMultistep", {"lambda_min_clipped": -5.1}, "lambda_min_clipped: -5.1"),
        ("DPMSolverMultistep", {"variance_type": "learned_range"}, "variance_type: "),
        ("DPMSolverMultistep", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "algorithm_type: "),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order: 3"),
        ("UniPCMultistep", {"predict_x0": False}, "predict_x0: False of UniPCMultistepScheduler"),
        ("UniPCMultistep", {"disable_corrector": [0]}, r"disable_corrector: \[0\]"),
        ("EulerDiscrete", {"interpolation_type": "log_linear"}, "interpolation_type: 'log_linear'"),
        ("EulerDiscrete", {"timestep_type": "continuous"}, "timestep_type: 'continuous'"),
        ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, "stochastic_sampling: True"),
        ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, "invert_sigmas: True"),
    ],
)
def test_options_without_a_counterpart_are_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        from_diffusers(scheduler_of(name, options))


def test_an_option_of_a_later_version_is_refused_unless_at_its_default():
    class DDIMScheduler(diffusers.DDIMScheduler):
        def __init__(self, surprise=0, clip_sample=True, **options):
            super().__init__(clip_sample=clip_sample, **options)
            self.register_to_config(surprise=surprise)

    with pytest.raises(ValueError, match="^surprise: 1 of DDIMScheduler"):
        from_diffusers(DDIMScheduler(surprise=1))


@pytest.mark.parametrize(
    "scheduler, error, message",
    [
        (torch.nn.Identity(), TypeError, "scheduler: expected a scheduler of diffusers, got Identity"),
        ({"_class_name": "LMSDiscreteScheduler"}, ValueError, "scheduler: expected one of DDIMScheduler.*got LMSDisc"),
        ({"num_train_timesteps": 10}, ValueError, "scheduler: a configuration without _class_name"),
    ],
)
def test_what_is_no_known_scheduler(scheduler, error, message):
    with pytest.raises(error, match=f"^{message}"):
        from_diffusers(scheduler)
