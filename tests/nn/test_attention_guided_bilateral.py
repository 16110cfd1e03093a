"""Filter2Noise's denoiser and its loss: golden data, any size, several channels, regions, bad arguments."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pydenoise import functional as PF
from pydenoise import nn as pdn
from pydenoise.nn import filter2noise_loss as parts
from pydenoise.nn.attention_guided_bilateral import extend

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "blocks_bilateral.npz")
pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name])


def predicting(sigma: tuple[float, float, float], **options) -> pdn.AttentionGuidedBilateral:
    """A module whose stages all predict ``sigma`` everywhere."""
    model = pdn.AttentionGuidedBilateral(**options)
    for predictor in model.predictors:
        torch.nn.init.zeros_(predictor.sigma_proj.weight)
        wanted = torch.tensor(sigma)
        predictor.sigma_proj.bias.data = wanted + torch.log(-torch.expm1(-wanted))
    return model


# --------------------------------------------------------------------------------------------------------- the loss


def test_golden_parts():
    first, second = parts.diagonal_means(golden("els_in"))
    torch.testing.assert_close(first, golden("down1"), rtol=0, atol=1e-12)
    torch.testing.assert_close(second, golden("down2"), rtol=0, atol=1e-12)
    assert torch.equal(parts.shuffle_nearest(golden("els_in")), golden("els_out"))
    torch.testing.assert_close(parts.difference_of_gaussians(), golden("dog"), rtol=0, atol=1e-8)


def test_golden_loss():
    loss = pdn.Filter2NoiseLoss()(lambda x: x, golden("loss_in"))
    torch.testing.assert_close(loss, golden("loss_identity").float().reshape(()), rtol=2e-6, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_halves_and_shuffle_by_hand(channels):
    x = torch.rand(2, channels, 6, 8)
    first, second = parts.diagonal_means(x)
    mixed = parts.shuffle_nearest(x)
    order = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for b, i, j in np.ndindex(2, 3, 4):
        block = x[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(channels, 4)
        torch.testing.assert_close(first[b, :, i, j], (block[:, 1] + block[:, 2]) / 2)
        torch.testing.assert_close(second[b, :, i, j], (block[:, 0] + block[:, 3]) / 2)
        m, n = min(order, key=lambda pair: (block[:, pair[0]] - block[:, pair[1]]).square().sum())
        block = block.clone()
        block[:, [m, n]] = block[:, [n, m]]
        assert torch.equal(mixed[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(channels, 4), block)


def test_ties_are_decided_by_order():
    x = torch.tensor([[1.0, 2.0], [2.0, 1.0]])[None, None]  # 0 and 3 are alike, 1 and 2 too: the first pair moves
    assert torch.equal(parts.shuffle_nearest(x), x)
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])[None, None]  # every step of 1: pixels 0 and 1
    assert torch.equal(parts.shuffle_nearest(x)[0, 0], torch.tensor([[1.0, 0.0], [2.0, 3.0]]))


def test_a_loss_over_equal_channels_is_that_of_one():
    x, model = torch.rand(1, 1, 16, 16), predicting((1.0, 1.0, 0.2))
    three = copy.deepcopy(model)
    loss = pdn.Filter2NoiseLoss()
    alone = loss(lambda t: model(t), x)
    together = loss(lambda t: torch.cat([three(c) for c in t.split(1, 1)], 1), x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(alone, together)


def test_loss_without_detail_is_cheaper_and_smaller():
    x = torch.rand(1, 3, 16, 16)
    blur = lambda t: F.avg_pool2d(t, 3, 1, 1)  # noqa: E731
    assert pdn.Filter2NoiseLoss(0)(blur, x) < pdn.Filter2NoiseLoss(350)(blur, x)


@pytest.mark.parametrize("size", [(6, 6), (15, 16)])
def test_loss_refuses_odd_halves(size):
    with pytest.raises(ValueError, match="even H and W"):
        pdn.Filter2NoiseLoss()(lambda x: x, torch.rand(1, 1, *size))


@pytest.mark.parametrize("detail", [-1, float("nan"), "much"])
def test_bad_detail(detail):
    with pytest.raises(ValueError, match="detail: expected"):
        pdn.Filter2NoiseLoss(detail)


# -------------------------------------------------------------------------------------------------------- the module


def test_golden_predictor():
    x = golden("pred_x")
    predictor = pdn.SigmaPredictor(x.shape[1]).to(x.dtype)
    names = [name.removeprefix("pred_sd_") for name in GOLDEN.files if name.startswith("pred_sd_")]
    predictor.load_state_dict({name: golden(f"pred_sd_{name}").to(x.dtype) for name in names})
    torch.testing.assert_close(predictor(x).reshape(-1), golden("pred_out").to(x.dtype).reshape(-1), rtol=0, atol=2e-6)


def test_parameters_and_state_dict():
    model = pdn.AttentionGuidedBilateral()
    assert sum(p.numel() for p in model.parameters()) == 3638
    keys = list(model.state_dict())
    assert keys[0] == "predictors.0.query.weight" and keys[-1] == "predictors.1.sigma_proj.bias" and len(keys) == 32
    again = pdn.AttentionGuidedBilateral()
    again.load_state_dict(model.state_dict())
    x = torch.rand(1, 1, 24, 16)
    assert torch.equal(again(x), model(x))
    assert "patch_size=8" in repr(model)


@pytest.mark.parametrize("size", [(16, 24), (17, 30), (5, 3), (1, 1), (8, 41)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size(size, channels):
    model, x = pdn.AttentionGuidedBilateral(channels), torch.rand(2, channels, *size, requires_grad=True)
    y, maps = model(x, return_sigma=True)
    assert y.shape == x.shape
    assert [tuple(s.shape) for s in maps] == [(2, -(-size[0] // 8), -(-size[1] // 8), 3)] * 2
    assert all((s > 0).all() and (s <= 6.000001).all() for s in maps)
    grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    assert all(g.isfinite().all() for g in grads)


def test_extension_is_a_mirror():
    x = torch.arange(5.0)[None, None, None].expand(1, 1, 2, 5)
    assert extend(x, 4)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert extend(x, 4).shape == (1, 1, 4, 8) and extend(x[..., :4], 2).shape == (1, 1, 2, 4)


def test_an_image_does_not_depend_on_its_batch():
    model, x = pdn.AttentionGuidedBilateral(), torch.rand(3, 1, 16, 16)
    x[1] *= 5
    together = model(x)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-6)


def test_regions():
    model, x = predicting((1.0, 1.0, 0.3)), torch.rand(1, 1, 24, 40)
    plain, maps = model(x, return_sigma=True)
    torch.testing.assert_close(maps[0], torch.tensor([1.0, 1.0, 0.3]).expand(1, 3, 5, 3), rtol=1e-4, atol=1e-5)
    sharp = pdn.SigmaRegion((4, 15), (10, 33), 1e-3, 1e-3)
    y, maps = model(x, [sharp], return_sigma=True)
    assert torch.equal(y[:, :, 4:15, 10:33], x[:, :, 4:15, 10:33]), "the user's sigmas leave the rectangle as it is"
    assert not torch.equal(y, x) and torch.equal(y[:, :, 20:], plain[:, :, 20:])
    assert maps[0].shape == (1, 24, 40, 3) and maps[0][0, 4, 10, 0] == maps[1][0, 14, 32, 1] == 1e-3
    assert maps[0][0, 4, 10, 2] == maps[0][0, 3, 10, 2], "sigma_r is the predicted one"
    _, maps = model(x, [pdn.SigmaRegion((0, 1), (0, 1), sigma_r=2.0, stage=1)], return_sigma=True)
    assert maps[0][0, 0, 0, 2] < 1 and maps[1][0, 0, 0, 2] == 2
    _, maps = model(x, [sharp, pdn.SigmaRegion((0, 24), (0, 40), sigma_x=2.0)], return_sigma=True)
    assert (maps[0][..., 0] == 2).all() and maps[0][0, 5, 12, 1] == 1e-3, "the later region is above"


def test_odd_sizes_with_regions():
    model, x = predicting((1.0, 1.0, 0.3)), torch.rand(1, 1, 13, 11)
    y, maps = model(x, [pdn.SigmaRegion((0, 13), (0, 11), 1e-3, 1e-3)], return_sigma=True)
    assert torch.equal(y, x) and maps[0].shape == (1, 13, 11, 3)


def test_a_wide_region_changes_nothing_elsewhere():
    model, x = predicting((1.5, 1.5, 0.3), stages=1), torch.rand(1, 1, 40, 40, requires_grad=True)
    plain = model(x)
    y = model(x, [pdn.SigmaRegion((10, 20), (12, 30), sigma_x=9.0)])
    outside = torch.ones(40, 40, dtype=torch.bool)
    outside[10:20, 12:30] = False
    assert torch.equal(y[..., outside], plain[..., outside])
    sigma = torch.tensor([9.0, 1.5, 0.3]).expand(1, 1, 1, 3)
    wide = PF.adaptive_bilateral_filter(x, sigma)
    torch.testing.assert_close(y[:, :, 10:20, 12:30], wide[:, :, 10:20, 12:30], rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_tiles_of_attention():
    """Each square by itself predicts what it predicts alone; the filter goes over the whole."""
    model, x = pdn.AttentionGuidedBilateral(stages=1), torch.rand(2, 1, 40, 29)
    y, maps = model(x, tile=16, return_sigma=True)
    assert y.shape == x.shape and maps[0].shape == (2, 5, 4, 3)
    corner = model.predictors[0](extend(x, 8)[:, :, 16:32, 16:32])
    torch.testing.assert_close(maps[0][:, 2:4, 2:4], corner)
    torch.testing.assert_close(model(x, tile=64), model(x))


def test_deepcopy_and_double():
    model = copy.deepcopy(pdn.AttentionGuidedBilateral()).double()
    x = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    assert model(x).dtype == torch.float64


REGION = {"rows": (0, 4), "columns": (0, 4), "sigma_r": 1.0}
BAD = {
    "stages: expected an int >= 1": lambda: pdn.AttentionGuidedBilateral(stages=0),
    "channels: expected an int, got float": lambda: pdn.AttentionGuidedBilateral(1.0),
    "largest: expected": lambda: pdn.AttentionGuidedBilateral(largest=200),
    "radius: expected": lambda: pdn.AttentionGuidedBilateral(radius="image"),
    "x: expected a torch.Tensor": lambda: pdn.AttentionGuidedBilateral()([1]),
    "x: expected a floating-point": lambda: pdn.AttentionGuidedBilateral()(torch.ones(1, 1, 8, 8, dtype=torch.uint8)),
    r"x: expected \[B, 1, H, W\]": lambda: pdn.AttentionGuidedBilateral()(torch.rand(1, 3, 8, 8)),
    "expected one of them at least": lambda: pdn.SigmaRegion((0, 4), (0, 4)),
    "tile: expected a multiple of 8": lambda: pdn.AttentionGuidedBilateral()(torch.rand(1, 1, 8, 8), tile=12),
    "rows: expected 0 <= begin < end": lambda: pdn.SigmaRegion((4, 4), (0, 1)),
    r"columns: expected \(begin, end\) of ints": lambda: pdn.SigmaRegion((0, 4), [0, 1]),
    "sigma_x: expected a positive": lambda: pdn.SigmaRegion(**REGION, sigma_x=0),
    "sigma_y: expected a positive finite number, at most 127,": lambda: pdn.SigmaRegion(**REGION, sigma_y=200),
    "sigma_r: expected a positive": lambda: pdn.SigmaRegion((0, 4), (0, 4), sigma_r=float("nan")),
    "stage: expected": lambda: pdn.SigmaRegion(**REGION, stage=-1),
    "end outside 3 x 8": lambda: pdn.AttentionGuidedBilateral()(torch.rand(1, 1, 3, 8), [pdn.SigmaRegion(**REGION)]),
    "no stage 2; they are 0 to 1": lambda: pdn.AttentionGuidedBilateral()(
        torch.rand(1, 1, 8, 8), [pdn.SigmaRegion(**REGION, stage=2)]
    ),
    "regions: expected SigmaRegion": lambda: pdn.AttentionGuidedBilateral()(torch.rand(1, 1, 8, 8), [(0, 1)]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
