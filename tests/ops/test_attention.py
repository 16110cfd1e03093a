"""attention: bad arguments, and what explain says."""

import pytest
import torch

import pydenoise
from pydenoise import functional as PF

Q, K = torch.zeros(2, 5, 24), torch.zeros(2, 7, 24)

BAD = {
    "query: expected a torch.Tensor": ((None, K, K, 2), {}, TypeError),
    "query: expected a floating-point": ((Q.int(), K, K, 2), {}, TypeError),
    "query: expected [N, T, H * D]": ((Q[0], K, K, 2), {}, ValueError),
    "key: expected dtype": ((Q, K.bfloat16(), K, 2), {}, TypeError),
    "key: expected device": ((Q, K.to("meta"), K, 2), {}, ValueError),
    "key: expected [2, S, 24]": ((Q, K[:1], K, 2), {}, ValueError),
    "key: expected [2, S, 24] with S >= 1": ((Q, K[:, :0], K, 2), {}, ValueError),
    "value: expected [2, S, 24]": ((Q, K, K[..., :12], 2), {}, ValueError),
    "value: expected as many tokens": ((Q, K, K[:, :6], 2), {}, ValueError),
    "num_heads: expected an int": ((Q, K, K, 2.0), {}, TypeError),
    "num_heads: expected a positive divisor": ((Q, K, K, 5), {}, ValueError),
    "scale: expected a number": ((Q, K, K, 2), {"scale": "1"}, TypeError),
    "scale: expected a finite number": ((Q, K, K, 2), {"scale": float("nan")}, ValueError),
    "mask: expected a torch.Tensor": ((Q, K, K, 2), {"mask": True}, TypeError),
    "mask: expected a boolean or": ((Q, K, K, 2), {"mask": torch.ones(5, 7, dtype=torch.int32)}, TypeError),
    "mask: expected a shape": ((Q, K, K, 2), {"mask": torch.ones(5, 6)}, ValueError),
    "mask: expected a shape that broadcasts to (2, 2, 5, 7)": (
        (Q, K, K, 2),
        {"mask": torch.ones(1, 1, 1, 5, 7)},
        ValueError,
    ),
    "backend: expected": ((Q, K, K, 2), {"backend": "fast"}, ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    args, options, error = BAD[message]
    with pytest.raises(error) as caught:
        PF.attention(*args, **options)
    assert str(caught.value).startswith(message)


def test_explain(capsys):
    explanation = pydenoise.explain("attention", Q.double(), K.double(), K.double(), 2)
    assert explanation.chosen == "reference" and "float64" in capsys.readouterr().out


def test_float64_falls_back_with_a_reason():
    with pytest.raises(pydenoise.BackendUnavailable, match="float64"):
        PF.attention(Q.double(), K.double(), K.double(), 2, backend="cpu")
