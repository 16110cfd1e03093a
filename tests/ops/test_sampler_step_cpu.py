"""The prepared step of the CPU row: what it refuses, and outputs that lie elsewhere than in dense memory."""

import pytest
import torch

from pydenoise import _native, step_row
from pydenoise.ops import sampler_step

pytestmark = pytest.mark.skipif(not _native.extension().loaded, reason="pydenoise._C is not built")

SHAPE = (2, 3, 5, 7)


def table(**columns: float) -> torch.Tensor:
    rows = torch.zeros(2, step_row.WIDTH)
    rows[:, step_row.SLOT], rows[:, step_row.CLIP] = -1, torch.inf
    for name, value in columns.items():
        rows[:, getattr(step_row, name)] = value
    return rows


def bound(x: torch.Tensor, rows: torch.Tensor, **buffers) -> object:
    return sampler_step.bind(sampler_step.Buffers(x, rows, buffers.pop("out", x), **buffers), "cpu")


@pytest.mark.parametrize("place", ["slice", "transposed", "expanded", "permuted"])
def test_outputs_anywhere(place):
    """Dense samples are read where they lie, others are copied; the results are those of contiguous outputs."""
    torch.manual_seed(0)
    output = {
        "slice": torch.randn(2, 2, *SHAPE[1:])[:, 0],
        "transposed": torch.randn(2, 3, 7, 5).transpose(2, 3),
        "expanded": torch.randn(1, *SHAPE[1:]).expand(SHAPE),
        "permuted": torch.randn(SHAPE).contiguous(memory_format=torch.channels_last),
    }[place]
    unconditional = torch.randn(2, 2, *SHAPE[1:])[:, 1]
    x = torch.randn(SHAPE)
    wanted = x + (unconditional + 3 * (output - unconditional))
    assert bound(x, table(SAMPLE=1, OUTPUT=1, GUIDANCE=3)).run(output, unconditional, 1, 0) is True
    torch.testing.assert_close(x, wanted, rtol=0, atol=4e-6)


def test_learned_variance():
    torch.manual_seed(0)
    x, output = torch.zeros(SHAPE), torch.randn(2, 6, 5, 7)
    keys = torch.tensor([[1, 0], [1, 1]])
    rows = table(NOISE=1, LOG_SMALL=-1, LOG_LARGE=1)
    plain = sampler_step.sampler_step(x, None, table(NOISE=1), seed=keys, step=4, backend="reference")
    assert bound(x, rows, keys=keys, learned_variance=True).run(output, None, 0, 4)
    torch.testing.assert_close(x, plain * output[:, 3:].exp(), rtol=1e-5, atol=1e-5)


def test_the_step_s_low_bits_count():
    found = []
    for step in (3, 3 + 2**32, 2**62 + 3):
        x = torch.zeros(SHAPE)
        bound(x, table(NOISE=1), keys=torch.zeros(2, 2, dtype=torch.int64)).run(None, None, 0, step)
        found.append(x)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_large_tensors_without_python_s_lock():
    """Beyond the size from which other Python threads may run meanwhile, and from which stores pass the caches."""
    x, out = torch.ones(2, 3, 512, 512), torch.zeros(2, 3, 512, 512)
    kept, history = torch.zeros_like(x), torch.zeros(1, *x.shape)
    rows = table(SAMPLE=2, KEPT_OUT=3, M_OUTPUT=1, SLOT=0, INPUT_SCALE=0.5)
    step = bound(x, rows, out=out, kept=kept, history=history, model_input=(model_input := torch.empty_like(x)))
    assert step.run(torch.full_like(x, 5), None, 0, 0) is True
    assert (out == 2).all() and (kept == 6).all() and (history == 5).all() and (model_input == 1).all()


def test_empty():
    x = torch.zeros(0, 3, 4, 4)
    assert bound(x, table(SAMPLE=1)).run(torch.zeros_like(x), None, 0, 0) is True


def test_refusals():
    x = torch.zeros(SHAPE)
    step = bound(x, table(SAMPLE=1))
    with pytest.raises(ValueError, match="row: outside the table"):
        step.run(None, None, 2, 0)
    with pytest.raises(ValueError, match="output: expected a tensor"):
        step.run(None, x, 0, 0)
    with pytest.raises(TypeError, match=r"unconditional: expected dtype torch.float32 \(that of output\)"):
        step.run(x, x.half(), 0, 0)
    with pytest.raises(ValueError, match="unconditional: expected shape"):
        step.run(x, x[:1], 0, 0)
    with pytest.raises(ValueError, match="base: expected a contiguous tensor"):
        bound(x, table(), base=torch.zeros(2, 3, 7, 5).transpose(2, 3))
    with pytest.raises(TypeError, match=r"table: expected torch.float32, got torch.float64"):
        bound(x, table().double())
    with pytest.raises(ValueError, match="output: missing|output: expected a tensor"):
        bound(x, table(), learned_variance=True).run(None, None, 0, 0)
