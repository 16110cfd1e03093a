"""The launcher of ``sampler_step``: the op on static buffers, with rows and statistics that change."""

import pytest
import torch

from pydenoise import functional as PF
from pydenoise import step_row as C

SHAPE = (2, 3, 4, 8)


def table() -> torch.Tensor:
    rows = torch.zeros(24, C.WIDTH)
    rows[:, C.CLIP], rows[:, C.SLOT] = float("inf"), -1
    rows[:, C.GUIDANCE], rows[:, C.SAMPLE] = 2.0, torch.linspace(0.5, 1.5, 24)
    rows[:, C.OUTPUT], rows[:, C.NOISE] = torch.linspace(-1, 1, 24), torch.linspace(0.1, 1, 24)
    return rows


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(SHAPE)


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([3]),
        torch.tensor([3, 5]),
        torch.arange(6).view(2, 3),
        torch.arange(8).view(2, 1, 4),
    ],
    ids=lambda rows: str(tuple(rows.shape)),
)
@pytest.mark.parametrize("statistics", ["none", "moments"])
def test_is_the_op(x, rows, statistics):
    keys, step, given = torch.tensor([[1, 0], [1, 1]]), torch.tensor([7]), torch.randn(SHAPE)
    for dtype in (torch.float32, torch.bfloat16):  # what the model returns can change from call to call
        output, other = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)
        for noise in (None, given):
            buffer = x.clone()
            launch = PF.StepLauncher(PF.StepBuffers(buffer, table(), buffer, keys=keys))
            sums = launch(output, other, rows, step, noise=noise, statistics=statistics)
            expected = PF.sampler_step(
                x, output, table(), rows, unconditional=other, seed=keys if noise is None else None, noise=noise,
                step=step, statistics=statistics,
            )  # fmt: skip
            if statistics == "moments":
                assert torch.equal(sums, expected[1])
            assert torch.equal(buffer, expected if statistics == "none" else expected[0])


def test_own_table_and_faults(x):
    buffer, faults = x.clone(), torch.full((1,), 2**31 - 1, dtype=torch.int32)
    launch = PF.StepLauncher(PF.StepBuffers(buffer, table(), buffer), faults)
    plain = torch.zeros(1, C.WIDTH)
    plain[:, C.SAMPLE], plain[:, C.SLOT] = 2.0, -1
    launch(None, None, torch.tensor([0]), torch.tensor([4]), table=plain)
    assert torch.equal(buffer, 2 * x) and int(faults) == 2**31 - 1
    buffer[0, 0, 0, 0] = float("nan")
    launch(None, None, torch.tensor([0]), torch.tensor([5]), table=plain)
    assert int(faults) == 5


def test_what_comes_from_outside_is_checked(x):
    launch = PF.StepLauncher(PF.StepBuffers(x, table(), x))
    rows, step = torch.tensor([0]), torch.tensor([0])
    with pytest.raises(ValueError, match="output"):
        launch(torch.zeros(1, 3, 4, 8), None, rows, step)
    with pytest.raises(TypeError, match="noise"):
        launch(torch.zeros(SHAPE), None, rows, step, noise=torch.zeros(SHAPE, dtype=torch.float64))
    with pytest.raises(ValueError, match="backend"):
        PF.StepLauncher(PF.StepBuffers(x, table(), x), backend="gpu")(None, None, rows, step)
