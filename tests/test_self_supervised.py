"""Training on a single picture: what comes out, that it denoises, tiles, regions, bad arguments."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pydenoise import self_supervised as ss
from pydenoise.nn import SigmaRegion

GOLDEN = np.load(Path(__file__).parent / "data" / "blocks_bilateral.npz")


def phantom() -> tuple[torch.Tensor, torch.Tensor]:
    """(clean, noisy) [1, 128, 128]: rings and bars, noise of 0.05."""
    return tuple(torch.from_numpy(GOLDEN[f"phantom_{name}"]).float()[None] for name in ("clean", "noisy"))


def psnr(image: torch.Tensor, clean: torch.Tensor) -> float:
    return -10 * math.log10((image.clamp(0, 1) - clean).square().mean().item())


def test_it_denoises_and_reports_its_steps():
    clean, noisy = (t[:, 32:96, 32:96].contiguous() for t in phantom())
    seen = []
    result = ss.denoise_single_image(noisy, steps=40, on_step=lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == list(range(1, 41))
    assert [loss for _, loss in seen] == pytest.approx(result.losses)
    assert psnr(result.image, clean) > psnr(noisy, clean) + 3
    assert min(result.losses[-5:]) < result.losses[0]
    assert result.image.shape == noisy.shape and result.image.dtype == noisy.dtype
    assert [tuple(s.shape) for s in result.sigma_maps] == [(8, 8, 3)] * 2
    assert not result.model.training


@pytest.mark.slow
def test_the_phantom_reaches_the_published_quality():
    """300 steps with lambda 350 and seed 77 of the public code: 26.12 to 36.47 dB."""
    clean, noisy = phantom()
    result = ss.denoise_single_image(noisy, steps=300, detail=350.0, seed=77)
    assert psnr(noisy, clean) == pytest.approx(26.12, abs=0.01)
    assert psnr(result.image, clean) == pytest.approx(36.5, abs=0.3)


@pytest.mark.parametrize("shape", [(1, 21, 37), (3, 16, 9)])
def test_any_size_and_colour(shape):
    noisy = torch.rand(shape)
    result = ss.denoise_single_image(noisy, steps=2, stages=1)
    assert result.image.shape == shape and len(result.losses) == 2
    assert [tuple(s.shape) for s in result.sigma_maps] == [(-(-shape[1] // 8), -(-shape[2] // 8), 3)]


def test_seeds_and_the_global_generator():
    noisy = torch.rand(1, 16, 16)
    before = torch.random.get_rng_state()
    first = ss.denoise_single_image(noisy, steps=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(ss.denoise_single_image(noisy, steps=3).image, first.image)
    assert not torch.equal(ss.denoise_single_image(noisy, steps=3, seed=78).image, first.image)


def test_trains_inside_inference_and_no_grad():
    noisy = torch.rand(1, 16, 16)
    with torch.no_grad():
        assert len(ss.denoise_single_image(noisy, steps=2).losses) == 2


def test_crop_is_what_training_sees(monkeypatch):
    seen = []
    train = ss.train_on_image
    monkeypatch.setattr(ss, "train_on_image", lambda x, **rest: seen.append(x) or train(x, **rest))
    noisy = torch.rand(1, 40, 64)
    result = ss.denoise_single_image(noisy, steps=1, crop=32)
    assert torch.equal(seen[0], noisy[:, 4:36, 16:48]) and result.image.shape == noisy.shape


def test_regions_override_the_result():
    noisy = torch.rand(1, 32, 32)
    keep = SigmaRegion((3, 20), (5, 31), 1e-3, 1e-3)
    result = ss.denoise_single_image(noisy, steps=1, regions=[keep])
    assert torch.equal(result.image[:, 3:20, 5:31], noisy[:, 3:20, 5:31])
    assert not torch.equal(result.image[:, 21:], noisy[:, 21:])
    assert result.sigma_maps[0].shape == (32, 32, 3) and (result.sigma_maps[1][3:20, 5:31, :2] == 1e-3).all()


def test_plot():
    pytest.importorskip("matplotlib")
    result = ss.denoise_single_image(torch.rand(1, 16, 24), steps=1)
    figure = result.plot_sigma_maps()
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == "stage 0: sigma x (pixels)" and "stage 1: sigma r (value)" in titles


NOISY = torch.rand(1, 16, 16)
BAD = {
    "noisy: expected a torch.Tensor": lambda: ss.denoise_single_image([1.0]),
    "noisy: expected a floating-point": lambda: ss.denoise_single_image(NOISY.int()),
    r"noisy: expected \[C, H, W\]": lambda: ss.denoise_single_image(NOISY[None]),
    "steps: expected an int >= 1": lambda: ss.denoise_single_image(NOISY, steps=0),
    "detail: expected": lambda: ss.denoise_single_image(NOISY, steps=1, detail=-1.0),
    "stages: expected": lambda: ss.denoise_single_image(NOISY, steps=1, stages=0),
    "crop: expected": lambda: ss.denoise_single_image(NOISY, crop=-8),
    "tile: expected a multiple of 8": lambda: ss.denoise_single_image(NOISY, steps=1, tile=20),
    "end outside 16 x 16": lambda: ss.denoise_single_image(
        NOISY, steps=1, regions=[SigmaRegion((0, 17), (0, 1), sigma_r=1.0)]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
