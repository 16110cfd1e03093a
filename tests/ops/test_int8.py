"""Bad arguments of the int8 ops: an error that names the argument, before any kernel runs."""

import pytest
import torch

import pydenoise as pdn
from pydenoise import functional as PF

CODES = torch.zeros(2, 8, 5, 6, dtype=torch.int8)
WEIGHT = torch.zeros(4, 8, 3, 3, dtype=torch.int8)
TOKENS, MATRIX = torch.zeros(3, 8, dtype=torch.int8), torch.zeros(4, 8, dtype=torch.int8)
IMAGE = torch.zeros(2, 8, 5, 6)
PIXELS = torch.ones(2, 1, 5, 6)


def conv(x=CODES, w=WEIGHT, s=0.1, ws=0.1, **options):
    return PF.int8_conv2d(x, w, s, ws, **options)


def linear(x=TOKENS, w=MATRIX, s=0.1, ws=0.1, **options):
    return PF.int8_linear(x, w, s, ws, **options)


def norm(x=IMAGE, groups=4, *args, **options):
    return PF.group_norm_silu_quantize(x, groups, *args, **options)


NAN, INFINITE = float("nan"), float("inf")
BAD = [
    # scales and zero points
    *[(lambda s=s: conv(s=s), ValueError, "input_scale") for s in (0.0, -1.0, NAN, INFINITE)],
    *[(lambda s=s: conv(s=torch.tensor(s)), ValueError, "input_scale") for s in (0.0, -1.0, NAN)],
    *[(lambda s=s: conv(ws=torch.full((4,), s)), ValueError, "weight_scale") for s in (0.0, NAN)],
    (lambda: conv(ws=torch.ones(5)), ValueError, "weight_scale"),
    (lambda: conv(s=torch.ones(2, 1, 5, 5)), ValueError, "input_scale"),
    (lambda: conv(s=torch.ones(2, 1, 5, 6).neg()), ValueError, "input_scale"),
    (lambda: conv(s="0.1"), TypeError, "input_scale"),
    (lambda: conv(s=torch.tensor(1)), TypeError, "input_scale"),
    *[(lambda z=z: conv(input_zero_point=z), ValueError, "input_zero_point") for z in (-129, 128)],
    (lambda: conv(input_zero_point=torch.tensor(300)), ValueError, "input_zero_point"),
    (lambda: conv(input_zero_point=1.5), TypeError, "input_zero_point"),
    (lambda: conv(input_zero_point=torch.tensor(1.0)), TypeError, "input_zero_point"),
    (lambda: conv(s=PIXELS, input_zero_point=torch.tensor(1)), ValueError, "input_zero_point"),
    (lambda: conv(out_dtype=torch.int8), ValueError, "out_scale"),
    (lambda: conv(out_dtype=torch.int8, out_scale=0.0), ValueError, "out_scale"),
    (lambda: conv(out_scale=0.1), ValueError, "out_scale"),
    (lambda: conv(out_zero_point=3), ValueError, "out_zero_point"),
    (lambda: conv(out_dtype=torch.float64), ValueError, "out_dtype"),
    # what cannot be fused into accumulators
    (lambda: conv(out_dtype=torch.int32, bias=torch.zeros(4)), ValueError, "bias"),
    (lambda: conv(out_dtype=torch.int32, activation="relu"), ValueError, "activation"),
    (lambda: conv(out_dtype=torch.int32, s=PIXELS), ValueError, "out_dtype"),
    (lambda: linear(out_dtype=torch.int32, residual=torch.zeros(3, 4)), ValueError, "residual"),
    # shapes, dtypes, options
    (lambda: conv(x=IMAGE), TypeError, "input"),
    (lambda: conv(x=CODES[0]), ValueError, "input"),
    (lambda: conv(x=CODES[:, :5]), ValueError, "input"),
    (lambda: conv(w=WEIGHT.float()), TypeError, "weight"),
    (lambda: conv(w=WEIGHT[:0]), ValueError, "weight"),
    (lambda: conv(groups=3), ValueError, "groups"),
    (lambda: conv(groups=1.0), TypeError, "groups"),
    (lambda: conv(upsample=3), ValueError, "upsample"),
    (lambda: conv(stride=0), ValueError, "stride"),
    (lambda: conv(padding=-1), ValueError, "padding"),
    (lambda: conv(padding=((0, 1), (0, 1, 2))), ValueError, "padding"),
    (lambda: conv(dilation=4), ValueError, "input"),
    (lambda: conv(activation="swish"), ValueError, "activation"),
    (lambda: conv(bias=torch.zeros(3)), ValueError, "bias"),
    (lambda: conv(channel_bias=torch.zeros(1, 4)), ValueError, "channel_bias"),
    (lambda: conv(film=torch.zeros(2, 4)), ValueError, "film"),
    (lambda: conv(residual=torch.zeros(2, 4, 5, 6)), ValueError, "residual"),
    (lambda: conv(residual=torch.zeros(2, 4, 3, 4).double()), TypeError, "residual"),
    (lambda: conv(backend="gpu"), ValueError, "backend"),
    (lambda: linear(x=TOKENS[:, :4]), ValueError, "input"),
    (lambda: linear(s=torch.ones(3)), ValueError, "input_scale"),
    # accumulators that could overflow
    (lambda: linear(torch.zeros(1, 131072, dtype=torch.int8), torch.zeros(1, 131072, dtype=torch.int8)), ValueError,
     "weight"),
    (lambda: linear(torch.zeros(1, 65794, dtype=torch.int8), torch.zeros(1, 65794, dtype=torch.int8),
                    input_zero_point=1), ValueError, "weight"),
    # producers
    (lambda: PF.quantize(IMAGE, torch.ones(8)), ValueError, "scale"),
    (lambda: PF.quantize(CODES, 0.1), TypeError, "input"),
    (lambda: PF.quantize(IMAGE, 0.1, activation="tanh"), ValueError, "activation"),
    (lambda: PF.quantize(IMAGE[:, :3], 0.1, activation="geglu"), ValueError, "input"),
    (lambda: PF.quantize(IMAGE, 0.1, channel_scale=torch.ones(6)), ValueError, "channel_scale"),
    (lambda: PF.quantize(torch.tensor(1.0), 0.1), ValueError, "input"),
    (lambda: PF.quantize_dynamic(IMAGE[0], granularity="pixel"), ValueError, "input"),
    (lambda: PF.quantize_dynamic(IMAGE, granularity="row"), ValueError, "granularity"),
    (lambda: PF.quantize_dynamic(IMAGE, symmetric=1), TypeError, "symmetric"),
    (lambda: PF.dequantize(IMAGE, 0.1), TypeError, "input"),
    (lambda: PF.dequantize(CODES, 0.1, dtype=torch.int8), ValueError, "dtype"),
    (lambda: norm(groups=3), ValueError, "num_groups"),
    (lambda: norm(groups=2.0), TypeError, "num_groups"),
    (lambda: norm(x=IMAGE[0]), ValueError, "input"),
    (lambda: norm(x=CODES), TypeError, "input"),
    (lambda: norm(skip=IMAGE[:1]), ValueError, "skip"),
    (lambda: norm(skip=IMAGE.double()), TypeError, "skip"),
    (lambda: norm(weight=torch.ones(4)), ValueError, "weight"),
    (lambda: norm(film=torch.ones(2, 8)), ValueError, "film"),
    (lambda: norm(eps=-1.0), ValueError, "eps"),
    (lambda: norm(eps="small"), TypeError, "eps"),
    (lambda: norm(zero_point=3), ValueError, "zero_point"),
    (lambda: norm(scale=-0.1), ValueError, "scale"),
    (lambda: PF.layer_norm_quantize(torch.ones(4)), ValueError, "input"),
    (lambda: PF.layer_norm_quantize(torch.ones(3, 4), film=torch.ones(3, 4)), ValueError, "film"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_arguments(call, error, name):
    with pytest.raises(error, match=rf"^{name}: "):
        call()


def test_a_named_backend_that_cannot_run():
    with pytest.raises(pdn.BackendUnavailable, match="cuda"):
        conv(backend="cuda")


def test_accumulators_at_their_limits():
    """The most products that are allowed, all at their largest: exact."""
    for terms, zero_point, code in ((131071, 0, -128), (65793, 127, -128)):
        x = torch.full((1, terms), code, dtype=torch.int8)
        w = torch.full((1, terms), -128, dtype=torch.int8)
        acc = PF.int8_linear(x, w, 1.0, 1.0, input_zero_point=zero_point, out_dtype=torch.int32)
        assert acc.item() == terms * 128 * (128 + zero_point)


def test_padding_forms_agree():
    x, w = (torch.randint(-128, 128, shape).to(torch.int8) for shape in ((1, 8, 5, 6), (4, 8, 3, 3)))
    expected = conv(x, w, padding=1, input_zero_point=5)
    for padding in ((1, 1), ((1, 1), (1, 1)), "same", [[1, 1], [1, 1]]):
        assert torch.equal(conv(x, w, padding=padding, input_zero_point=5), expected)


def test_nothing_carries_gradients():
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    codes, scale, zero_point = norm(x)
    y = conv(codes, s=scale, input_zero_point=zero_point, residual=None)
    assert not y.requires_grad and not codes.requires_grad and not scale.requires_grad


def test_compiled_graphs_hold_the_ops():
    def step(x):
        codes, scale, zero_point = norm(x)
        return conv(codes, WEIGHT + 1, s=scale, input_zero_point=zero_point, padding=1)

    x = torch.randn(1, 8, 6, 6)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
