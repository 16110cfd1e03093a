"""PNDM: golden trajectories of both public codes, orders of convergence, options, calls and memory, bad input."""

import sys
from pathlib import Path

import pytest
import torch

from pydenoise import step_row as C
from pydenoise.samplers.ddim import DDIM
from pydenoise.samplers.levels import NoiseSchedule
from pydenoise.samplers.plan import Conversion
from pydenoise.samplers.pndm import ADAMS_BASHFORTH, PNDM, VARIANTS, entered, transfer

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

EXACT = {"rtol": 0, "atol": 1e-12}  # rounding only: the schedules hold the public codes' float32 tables
PUBLIC = {"s": "S-PNDM", "f": "F-PNDM", "fon": "FON"}
CALLS = {"s": 1, "f": 9, "fon": 9, "plms": 1, "prk": 9}  # more than steps


@pytest.mark.parametrize("variant", PUBLIC)
def test_golden_of_the_public_code(variant):
    """Its tables are read one timestep further, by the transfer and so by the analytic model."""
    schedule = cv.public_schedule()
    got = cv.trajectory(
        PNDM(variant, index="repo", spacing="pndm"), on=schedule, level_of=lambda t: schedule.level(t + 1)
    )
    torch.testing.assert_close(got, cv.tensor(f"repo_pndm_{PUBLIC[variant]}_N10"), **EXACT)


@pytest.mark.parametrize("variant", ["plms", "prk"])
def test_golden_of_diffusers(variant):
    got = cv.trajectory(PNDM(variant), all_calls=True)
    torch.testing.assert_close(got, cv.tensor(f"df_pndm_{variant}_N10"), **EXACT)
    plan = PNDM(variant).plan(cv.schedule(), PNDM(variant).timesteps(cv.schedule(), 10), Conversion())
    assert list(plan.times) == cv.tensor(f"df_pndm_{variant}_N10_t").tolist()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("options", [
    {"steps_offset": 1}, {"steps_offset": 1, "set_alpha_to_one": True}, {"timestep_spacing": "trailing"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("steps", [5, 20])
def test_diffusers_options(skip, options, steps):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.PNDMScheduler(skip_prk_steps=skip, **options)
    ours = {"spacing" if name == "timestep_spacing" else name: value for name, value in options.items()}
    got = cv.trajectory(PNDM("plms" if skip else "prk", **ours), steps, all_calls=True)
    torch.testing.assert_close(got, cv.diffusers_trajectory(theirs, steps), **EXACT)


@pytest.mark.parametrize("skip", [True, False])
def test_an_odd_stride_as_diffusers(skip):
    """1000 // 9 = 111: the two halves of a Runge-Kutta step are rounded down on their own."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.PNDMScheduler(skip_prk_steps=skip)
    got = cv.trajectory(PNDM("plms" if skip else "prk"), 9, all_calls=True)
    torch.testing.assert_close(got, cv.diffusers_trajectory(theirs, 9), **EXACT)


@pytest.mark.parametrize("variant", ["plms", "prk"])
def test_diffusers_combines_outputs_of_v_prediction(variant):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.PNDMScheduler(
        skip_prk_steps=variant == "plms", prediction_type="v_prediction", set_alpha_to_one=True
    )
    wanted = cv.diffusers_trajectory(theirs, 10, prediction_type="v_prediction")
    options = {"prediction_type": "v_prediction", "all_calls": True}
    got = cv.trajectory(PNDM(variant, combine="output", set_alpha_to_one=True), **options)
    torch.testing.assert_close(got, wanted, **EXACT)
    other = cv.trajectory(PNDM(variant, set_alpha_to_one=True), **options)
    assert float((other[-1] - wanted[-1]).abs().max()) > 1e-4
    torch.testing.assert_close(other, cv.trajectory(PNDM(variant, set_alpha_to_one=True), all_calls=True), **EXACT)


@pytest.mark.parametrize("variant", ["s", "f", "plms", "prk"])
def test_epsilon_models_combine_the_same_either_way(variant):
    ours = (cv.trajectory(PNDM(variant, combine=combine)) for combine in ("epsilon", "output"))
    torch.testing.assert_close(*ours, **EXACT)


def test_half_steps():
    """ "f": real times, "prk": whole timesteps, "repo": real times whose level is the one below."""
    schedule, times = cv.schedule(), [99.0, 66.0, 33.0, 10.0, 0.0]
    assert PNDM("f").plan(schedule, times, Conversion()).times[1] == 82.5
    plan = PNDM("f", index="repo").plan(schedule, times, Conversion())
    assert plan.times[1] == 82.5 and plan.levels[1] == schedule.level(83) and plan.levels[0] == schedule.level(100)
    assert PNDM("prk").plan(schedule, times, Conversion()).times[1] == 82


@pytest.mark.parametrize("variant", VARIANTS)
def test_calls_ends_and_memory(variant):
    solver = PNDM(variant)
    plan = solver.plan(cv.schedule(), solver.timesteps(cv.schedule(), 12), Conversion())
    assert plan.calls == 12 + CALLS[variant] and sum(plan.ends) == 12 and plan.ends[-1]
    assert plan.slots == {"s": 1, "plms": 3}.get(variant, 5) and plan.uses_base and not plan.needs_noise
    assert int((plan.table[:, C.KEPT_SAMPLE] != 0).sum()) == (1 if variant in ("s", "plms") else 3)


@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
@pytest.mark.parametrize("variant", ["s", "f", "plms", "prk"])
def test_second_order(variant, kind):
    if variant == "prk" and kind != "vp":
        pytest.skip("counts timesteps")
    order = cv.order(cv.run_with(PNDM(variant, set_alpha_to_one=False)), kind=kind)
    assert 1.85 < order < 2.15


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_second_order_of_other_predictions(prediction_type):
    order = cv.order(cv.run_with(PNDM("s", set_alpha_to_one=False), prediction_type=prediction_type))
    assert 1.85 < order < 2.15


@pytest.mark.parametrize("model", ["gauss", "gmm"])
@pytest.mark.parametrize("steps, index", [(16, 1), (64, 3)])
def test_s_has_the_golden_errors(model, steps, index):
    grid = cv.uniform_grid(steps)
    run = cv.run_with(PNDM("s", set_alpha_to_one=False), model=cv.gaussian() if model == "gauss" else cv.mixture())
    result = run(grid, grid.times.flip(0)[:-1].tolist(), cv.start())
    error = float((result - cv.tensor(f"conv_{model}_0.8_0.05_ref")).abs().mean())
    assert error == pytest.approx(float(cv.tensor(f"conv_{model}_0.8_0.05_l_S-PNDM")[index]), rel=1e-8)


def test_fon_tends_to_ddim_at_every_timestep():
    """Its slope is a DDIM step by one timestep, so that is its limit; the limit of "f" is the differential equation."""
    whole = cv.trajectory(DDIM(), 1000)[-1]
    fon, f = ([float((cv.trajectory(PNDM(v), n)[-1] - whole).abs().mean()) for n in (20, 200)] for v in ("fon", "f"))
    assert fon[1] < fon[0] / 4 and fon[1] < f[1] / 3


def test_entered_in_the_middle():
    """Orders 1 to 4 from there on; a time that is there twice moves nothing at first."""
    schedule, times = cv.schedule(), [500.0, 400.0, 300.0, 200.0, 100.0]
    plan = entered(PNDM("plms"), schedule, times, Conversion())
    assert plan.times == tuple(times) and all(plan.ends)
    for step, weights in enumerate([*ADAMS_BASHFORTH, ADAMS_BASHFORTH[3]]):
        end = schedule.level(times[step + 1]) if step < 4 else schedule.first
        on_sample, on_epsilon = transfer(schedule.level(times[step]), end)
        values = plan.table[step]
        assert float(values[C.SAMPLE]) == on_sample and float(values[C.M]) == on_epsilon * weights[0]
        past = [float(values[C.HISTORY + (step - back) % 3]) for back in range(1, len(weights))]
        assert past == [on_epsilon * weight for weight in weights[1:]]
    twice = entered(PNDM("plms"), schedule, [500.0, *times], Conversion())
    assert twice.times == (500.0, *times) and twice.ends == (False, *plan.ends)
    assert twice.table[0, C.SAMPLE] == 1 and not bool(twice.table[0, C.BASE : C.NOISE + 1].any())
    assert torch.equal(twice.table[1:], plan.table)
    with pytest.raises(ValueError, match=r"begin_index: PNDM\(variant='f'\) has to run from its start"):
        entered(PNDM("f"), schedule, times, Conversion())


def test_paper_and_repo_differ_by_a_timestep():
    schedule = cv.schedule()
    times = PNDM("s").timesteps(schedule, 10)
    paper, repo = (PNDM("s", index=index).plan(schedule, times, Conversion()) for index in ("paper", "repo"))
    assert paper.levels[0] == schedule.level(900) and repo.levels[0] == schedule.level(901)
    assert PNDM("s").ends_clean and not PNDM("s", index="repo").ends_clean and not PNDM("plms").ends_clean
    assert PNDM("plms", set_alpha_to_one=True).ends_clean


def test_ends_clean_at_the_combined_x0():
    """A clean end has sigma 0: x' is x0 of the combined epsilon."""
    last = PNDM("s").plan(cv.schedule(), [500, 0], Conversion()).table[-1]
    level = cv.schedule().level(0)
    assert last[C.SAMPLE] == pytest.approx(1 / level.alpha)
    assert last[C.M] == pytest.approx(-1.5 * level.sigma / level.alpha)


def test_one_plms_step_is_ddim():
    got = cv.trajectory(PNDM("plms", spacing="trailing"), 1)
    wanted = cv.trajectory(DDIM(spacing="trailing", set_alpha_to_one=False), 1)
    torch.testing.assert_close(got, wanted, **EXACT)


def test_a_clip_changes_epsilon():
    """Wide: nothing; narrow: as a model whose x0 is clamped."""
    plain = cv.trajectory(PNDM("f"))
    torch.testing.assert_close(cv.trajectory(PNDM("f"), clip=100.0), plain, **EXACT)
    clipped = cv.trajectory(PNDM("f"), clip=0.4)

    class Clamped(cv.Analytic):
        def epsilon(self, x, level):
            return (x - level.alpha * cv.mixture().x0(x, level).clamp(-0.4, 0.4)) / level.sigma

    torch.testing.assert_close(clipped, cv.trajectory(PNDM("f"), model=Clamped()), rtol=0, atol=1e-9)
    assert float((clipped - plain).abs().max()) > 1e-2


SCHEDULE = cv.schedule()


@pytest.mark.parametrize("make, message", [
    (lambda: PNDM("rk"), "variant: expected one of s, f, fon, plms, prk, got 'rk'"),
    (lambda: PNDM(index="code"), "index: expected one of paper, repo, got 'code'"),
    (lambda: PNDM(combine="x0"), "combine: expected one of epsilon, output"),
    (lambda: PNDM("plms", index="repo"), "index: 'repo' belongs to the variants s, f and fon"),
    (lambda: PNDM("fon", combine="output"), "combine: 'output' belongs to"),
    (lambda: PNDM(spacing="even"), "spacing: expected one of"),
    (lambda: PNDM().timesteps(SCHEDULE, 0), "num_steps: expected at least 1"),
    (lambda: PNDM().timesteps(SCHEDULE, 1001), "num_steps: expected at most 1000"),
    (lambda: PNDM("f").plan(SCHEDULE, [9, 5, 1], Conversion()), r"num_steps: PNDM\(variant='f'\) needs at least 4"),
    (lambda: PNDM("s").plan(SCHEDULE, [9], Conversion()), r"num_steps: PNDM\(variant='s'\) needs at least 2"),
    (lambda: PNDM("s").plan(SCHEDULE, [5, 9], Conversion()), "timesteps: expected descending"),
    (lambda: PNDM("s", index="repo").plan(SCHEDULE, [999, 9], Conversion()), "timesteps: index='repo' reads one level"),
    (lambda: PNDM("s", index="repo").plan(NoiseSchedule.karras(), [9, 1], Conversion()), "index: 'repo' counts"),
    (lambda: PNDM("fon").plan(NoiseSchedule.karras(), [9, 5, 3, 1], Conversion()), "variant: 'fon' counts timesteps"),
    (lambda: PNDM("s").plan(SCHEDULE.zero_terminal_snr(), [999, 9], Conversion("v_prediction")), "alpha is 0"),
    (lambda: PNDM("s", combine="output").plan(SCHEDULE, [9, 1], Conversion(clip=1.0)), r"clip: PNDM\(combine='output'"),
    (lambda: PNDM("fon").plan(SCHEDULE, [9, 5, 3, 1], Conversion(clip=1.0)), r"clip: PNDM\(variant='fon'\)"),
])  # fmt: skip
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
