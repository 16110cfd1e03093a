"""The golden trajectories in float32, on every row of ``sampler_step`` that runs here."""

import sys
from pathlib import Path

import pytest
import torch

from pydenoise import step_row as C
from pydenoise.samplers.ddim import DDIM
from pydenoise.samplers.ddpm import DDPM
from pydenoise.samplers.pndm import PNDM
from pydenoise.samplers.runtime import Sampler
from pydenoise.testing import rows

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

BOUND = 2e-6  # of the largest number in the state
# Weights of Adams-Bashforth of order 4 add up to 6.7 in magnitude: rounding in the history counts as often.
MULTISTEP = 2 * BOUND
CASES = {
    "df_ddim_epsilon_N10": (DDIM(), BOUND),
    "df_ddim_v_prediction_N10": (DDIM(), BOUND),
    "df_ddim_sample_N10": (DDIM(), BOUND),
    "df_ddim_eta1_N10": (DDIM(eta=1.0), BOUND),
    "df_ddpm_fixed_small_N10": (DDPM("fixed_small"), BOUND),
    "df_ddpm_fixed_large_N10": (DDPM("fixed_large"), BOUND),
    "df_pndm_plms_N10": (PNDM("plms"), MULTISTEP),
    "df_pndm_prk_N10": (PNDM("prk"), MULTISTEP),
    "repo_pndm_S-PNDM_N10": (PNDM("s", index="repo"), BOUND),
    "repo_pndm_F-PNDM_N10": (PNDM("f", index="repo"), MULTISTEP),
    "repo_pndm_FON_N10": (PNDM("fon", index="repo"), MULTISTEP),
}


def _sampler(key, backend):
    """The model computes in float64 from the float32 sample: what is left is the solver's rounding."""
    schedule = cv.public_schedule() if key.startswith("repo") else cv.diffusers_schedule()
    level_of = (lambda t: schedule.level(t + 1)) if key.startswith("repo") else schedule
    prediction = next((p for p in ("v_prediction", "sample") if f"ddim_{p}" in key), "epsilon")
    exact = cv.mixture().denoiser(level_of, prediction)

    def denoiser(x, t):
        return exact(x.double(), t).to(x.dtype)

    return Sampler(denoiser, schedule, CASES[key][0], 10, prediction_type=prediction, backend=backend)


@pytest.mark.parametrize("variant", rows.variants("sampler_step"), ids=str)
@pytest.mark.parametrize("key", CASES)
def test_golden(variant, key):
    if variant.row.name in ("triton", "cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = rows.device_of(variant.row)
    with variant.active():
        sampler = _sampler(key, variant.row.name)
        needed = int((sampler.plan.table[:, C.NOISE] != 0).sum())
        noise = cv.tensor("an_noise").float()[:needed].to(device) if needed else None
        states = []
        x = cv.start().float().to(device)
        sampler.sample(x, noise=noise, callback=lambda info: states.append((info.ends, info.sample.cpu().double())))
    wanted = cv.tensor(key)[1:]
    got = torch.stack([state for ends, state in states if ends or len(states) == len(wanted)])
    error = (got - wanted).abs().flatten(1).amax(1) / wanted.abs().flatten(1).amax(1)
    assert float(error.max()) < CASES[key][1]
