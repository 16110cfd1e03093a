"""The denoiser's inputs along DDIM trajectories, checked where DDIM is exact: one point of data, one Gaussian."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pydenoise.quantization import NormalTimesteps, UniformTimesteps, calibrate, trajectory_batches

BETAS = torch.linspace(1e-4, 0.02, 1000).double()
TABLE = (1 - BETAS).cumprod(0)
POINT = torch.tensor([0.5, -0.25, 1.0])


def coefficients(t, x):
    a = TABLE[t].sqrt().reshape(-1, *[1] * (x.dim() - 1))
    return a, (1 - a * a).sqrt()


def predict(kind, x, t, **_):
    """The exact prediction where all data is POINT (broadcast over the last dimension)."""
    a, s = coefficients(t, x)
    noise = (x.double() - a * POINT) / s
    return {"epsilon": noise, "v_prediction": a * noise - s * POINT, "sample": POINT.expand_as(x)}[kind].float()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_states_lie_on_the_trajectory(kind):
    """From x_T, DDIM goes through a_t x0 + s_t noise with the same noise at every t."""
    generator = torch.Generator().manual_seed(0)
    batches = list(
        trajectory_batches(
            lambda x, t: predict(kind, x, t),
            (4, 3),
            betas=BETAS,
            timesteps=UniformTimesteps(),
            num_steps=50,
            num_samples=12,
            per_trajectory=3,
            prediction_type=kind,
            generator=generator,
        )  # fmt: skip
    )
    assert [len(batch.args[0]) for batch in batches] == [4, 4, 4]
    noises = []
    for batch in batches:
        x, t = batch.args
        assert t.dtype == torch.int64 and (t % 20 == 0).all()
        a, s = coefficients(t, x)
        noises.append((x - a * POINT) / s)
    torch.testing.assert_close(noises[0], noises[1], rtol=1e-3, atol=2e-3)  # small s at t = 0 magnifies rounding
    torch.testing.assert_close(noises[0], noises[2], rtol=1e-3, atol=2e-3)


def test_timesteps_are_the_models_own():
    """The denoiser is called with training timesteps of the grid, each state comes with the one it was called with."""
    seen = {}

    def denoiser(x, t):
        for row, time in zip(x, t, strict=True):
            seen[tuple(row.tolist())] = int(time)
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(int(t[0])))

    batches = list(
        trajectory_batches(
            denoiser, (8, 3), alphas_cumprod=TABLE, num_steps=250, num_samples=8, timesteps=NormalTimesteps(0.6, 0.1)
        )
    )
    assert set(seen.values()) <= set(range(0, 1000, 4))
    later = [b for b in zip(*batches[0].args, strict=True) if tuple(b[0].tolist()) in seen]
    assert all(seen[tuple(x.tolist())] == int(t) for x, t in later)
    assert 400 < batches[0].args[1].double().mean() < 800


def test_drawn_timesteps_become_the_nearest_of_the_grid():
    fixed = SimpleNamespace(sample=lambda n, generator: torch.tensor([0, 9, 11, 999])[:n])
    (batch,) = trajectory_batches(lambda x, t: x, (4, 2), betas=BETAS, timesteps=fixed, num_steps=50, num_samples=4)
    assert batch.args[1].tolist() == [0, 0, 20, 980]


def test_rounds_and_conditioning():
    """Tensors with a row for each trajectory are split with x; the last batch has what is left."""
    calls = []

    def denoiser(x, t, label, scale):
        assert len(label) == len(x) and scale.shape == (1,)
        calls.append(len(x))
        return x * 0.1

    def conditioning(number):
        return {"label": torch.arange(4) + 10 * number, "scale": torch.ones(1)}

    batches = list(
        trajectory_batches(denoiser, (4, 2), betas=BETAS, num_steps=10, num_samples=10, conditioning=conditioning)
    )
    assert [batch.kwargs["label"].tolist() for batch in batches] == [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21]]
    assert [len(batch.args[0]) for batch in batches] == [4, 4, 2]
    assert max(calls) == 4


def test_the_walk_ends_where_nothing_is_wanted():
    times = []

    def denoiser(x, t):
        times.append((int(t[0]), len(x)))
        return x * 0

    fixed = SimpleNamespace(sample=lambda n, generator: torch.tensor([500, 900]))
    list(trajectory_batches(denoiser, (2, 2), betas=BETAS, timesteps=fixed, num_steps=10, num_samples=2))
    assert times == [(900, 1), (800, 1), (700, 1), (600, 1)]


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y, None), lambda y: SimpleNamespace(sample=y)])
def test_outputs_in_every_form(wrap):
    (batch,) = trajectory_batches(
        lambda x, t: wrap(torch.cat((x * 0, x), 1)), (2, 3, 4, 4), betas=BETAS, num_steps=5, num_samples=2
    )
    assert batch.args[0].shape == (2, 3, 4, 4)


def test_calibration_along_trajectories():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, timestep):
            assert x.dtype == torch.bfloat16
            return self.conv(x)

    model = Net().eval().to(torch.bfloat16)
    batches = trajectory_batches(model, (4, 3, 8, 8), betas=BETAS, num_steps=20, num_samples=16, per_trajectory=2)
    calibration = calibrate(model, batches)
    assert calibration.batches == 4 and calibration.layers["conv"].counts.sum() == 16
    assert calibration.layers["conv"].calls == 4, "the walk itself is not observed"


def test_same_seed_same_batches():
    draw = lambda: [  # noqa: E731
        b.args
        for b in trajectory_batches(
            lambda x, t: x * 0.5, (3, 2), betas=BETAS, num_steps=10, num_samples=6,
            generator=torch.Generator().manual_seed(7),
        )
    ]  # fmt: skip
    for (x, t), (y, u) in zip(draw(), draw(), strict=True):
        assert torch.equal(x, y) and torch.equal(t, u)


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"betas": None}, ValueError, "alphas_cumprod, betas"),
        ({"alphas_cumprod": TABLE}, ValueError, "alphas_cumprod, betas"),
        ({"betas": torch.ones(4)}, ValueError, "betas"),
        ({"timesteps": UniformTimesteps(500)}, ValueError, "timesteps"),
        ({"prediction_type": "noise"}, ValueError, "prediction_type"),
        ({"num_steps": 1001}, ValueError, "num_steps"),
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"per_trajectory": 0}, ValueError, "per_trajectory"),
        ({"shape": (0, 3)}, ValueError, "shape"),
        ({"denoiser": lambda x, t: x[:, :1]}, ValueError, "denoiser"),
        ({"denoiser": lambda x, t: None}, TypeError, "denoiser"),
        ({"denoiser": lambda x, t: x * torch.nan}, ValueError, "denoiser"),
    ],
)
def test_bad_arguments_are_named(changes, error, name):
    options = {"denoiser": lambda x, t: x, "shape": (2, 3), "betas": BETAS, "num_steps": 10, "num_samples": 4}
    options["timesteps"] = UniformTimesteps()
    with pytest.raises(error, match=rf"^{name}:"):
        list(trajectory_batches(**(options | changes)))
