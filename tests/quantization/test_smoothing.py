"""Smoothing, cross-layer equalisation and bias correction."""

import pytest
import torch
import torch.nn.functional as F

from pydenoise.quantization import bias_correction, cross_layer_factors, equalize, input_channel_amax, smoothing_factors


def test_channel_magnitudes_of_grouped_weights():
    weight = torch.arange(16.0).reshape(4, 2, 2, 1) - 8
    assert input_channel_amax(weight, 2).tolist() == [8.0, 6.0, 5.0, 7.0]
    assert input_channel_amax(torch.tensor([[1.0, -3.0], [-2.0, 0.5]])).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothing_is_the_papers_formula(alpha):
    x, w = torch.tensor([8.0, 0.5, 2.0]), torch.tensor([1.0, 0.25, 3.0])
    s = smoothing_factors(x, w, alpha)
    expected = x**alpha / w ** (1 - alpha)
    torch.testing.assert_close(s / s[0], expected / expected[0])
    torch.testing.assert_close(s.log().mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_dead_channels_keep_factor_one():
    s = smoothing_factors(torch.tensor([0.0, 4.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert s.tolist() == [1.0, 1.0, 1.0]
    assert smoothing_factors(torch.zeros(2), torch.zeros(2)).tolist() == [1.0, 1.0]
    s = smoothing_factors(torch.tensor([1e30, 1e-30]), torch.ones(2))
    assert s.tolist() == pytest.approx([1e3, 1e-3])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_equalised_layers_are_the_same_network(groups, activation):
    act = {"none": lambda x: x, "relu": F.relu, "leaky_relu": F.leaky_relu}[activation]
    w1, b1 = torch.randn(6, 4, 3, 3).double(), torch.randn(6).double()
    w1 *= torch.logspace(-2, 2, 6).double().reshape(-1, 1, 1, 1)
    w2, x = torch.randn(8, 6 // groups, 3, 3).double(), torch.randn(2, 4, 9, 9).double()
    factors = cross_layer_factors(w1, w2, groups=groups)
    v1, c1, v2 = equalize(w1, b1, w2, factors, groups=groups, activation=activation)
    before = F.conv2d(act(F.conv2d(x, w1, b1)), w2, groups=groups)
    after = F.conv2d(act(F.conv2d(x, v1, c1)), v2, groups=groups)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-10)
    r1, r2 = v1.abs().amax((1, 2, 3)), input_channel_amax(v2, groups)
    spread = r1 / r2
    assert spread.max() / spread.min() < 1.001, "both layers have the same range in every channel"
    assert v2.dtype == torch.float64 and v1.dtype == torch.float64


def test_linear_layers_equalise_too():
    w1, w2, x = torch.randn(5, 3).double(), torch.randn(2, 5).double(), torch.randn(4, 3).double()
    v1, none, v2 = equalize(w1, None, w2, torch.tensor([2.0, 0.5, 1.0, 4.0, 8.0]))
    assert none is None
    torch.testing.assert_close(F.relu(x @ v1.T) @ v2.T, F.relu(x @ w1.T) @ w2.T)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: smoothing_factors(torch.ones(2), torch.ones(3)), "input_amax"),
        (lambda: smoothing_factors(-torch.ones(2), torch.ones(2)), "input_amax"),
        (lambda: smoothing_factors(torch.ones(2), torch.full((2,), torch.nan)), "weight_amax"),
        (lambda: smoothing_factors(torch.ones(2), torch.ones(2), 1.2), "alpha"),
        (lambda: equalize(torch.ones(2, 2), None, torch.ones(2, 2), torch.ones(2), activation="silu"), "activation"),
        (lambda: equalize(torch.ones(2, 2), None, torch.ones(2, 2), torch.zeros(2)), "factors"),
        (lambda: equalize(torch.ones(2, 2), None, torch.ones(2, 3), torch.ones(2)), "factors"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=rf"^{name}:"):
        make()


@pytest.mark.parametrize("dim", [1, -1])
def test_bias_correction_is_the_mean_error(dim):
    shapes = [(2, 3, 5, 5), (1, 3, 2, 2)] if dim == 1 else [(2, 5, 3), (4, 3)]
    shift = torch.tensor([0.5, -1.0, 2.0])
    pairs = []
    for shape in shapes:
        y = torch.randn(shape)
        pairs.append((y, y - shift.reshape((-1, 1, 1) if dim == 1 else (-1,))))
    torch.testing.assert_close(bias_correction(pairs, dim), shift)


def test_bias_correction_needs_outputs():
    with pytest.raises(ValueError, match="^pairs:"):
        bias_correction([])
    with pytest.raises(ValueError, match="^pairs:"):
        bias_correction([(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 4))])
