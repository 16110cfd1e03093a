"""Denoising a single picture without a clean one: Filter2Noise's denoiser, trained on the picture itself."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.nn.attention_guided_bilateral import AttentionGuidedBilateral, SigmaRegion, extend
from pydenoise.nn.filter2noise_loss import Filter2NoiseLoss


@dataclass
class SingleImageResult:
    """What came of one picture.

    ``image`` [C, H, W], not clipped, of the noisy picture's dtype and device. ``sigma_maps``: for each stage a tensor
    [rows, columns, 3] with (sigma_x, sigma_y, sigma_r): of patches, or of pixels where the user set regions.
    ``losses``: one number for each step.
    """

    image: Tensor
    model: AttentionGuidedBilateral
    sigma_maps: list[Tensor]
    losses: list[float]

    def plot_sigma_maps(self):
        """A matplotlib figure of the sigmas: a row for each stage, a column for each of the three."""
        from matplotlib.figure import Figure

        height, width = self.image.shape[-2:]
        figure = Figure(figsize=(10, 0.6 + 3 * len(self.sigma_maps) * height / width), layout="constrained")
        axes = figure.subplots(len(self.sigma_maps), 3, squeeze=False)
        titles = ("sigma x (pixels)", "sigma y (pixels)", "sigma r (value)")
        for stage, (row, sigma) in enumerate(zip(axes, self.sigma_maps, strict=True)):
            for place, (axis, title) in enumerate(zip(row, titles, strict=True)):
                shown = axis.imshow(sigma[..., place].cpu().numpy(), extent=(0, width, height, 0), cmap="viridis")
                axis.set_title(f"stage {stage}: {title}")
                figure.colorbar(shown, ax=axis)
        return figure


def train_on_image(
    noisy: Tensor,
    *,
    steps: int = 500,
    detail: float = 350.0,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    stages: int = 2,
    patch_size: int = 8,
    seed: int = 77,
    on_step: Callable[[int, float], object] | None = None,
) -> tuple[AttentionGuidedBilateral, list[float]]:
    """Train Filter2Noise's denoiser on ``noisy`` alone: (the model, in evaluation mode; the loss of each step).

    AdamW with one cycle of the learning rate over all steps. Torch's own random numbers are left as they were.

    Args:
        noisy: [C, H, W], floating point, values of about 0 to 1 (``detail`` and the first sigmas are meant for it). Any
            size: it is mirrored to sides that the halves of the loss can be patched from.
        steps: how often the picture is looked at.
        detail: weight of the loss's last term, see :class:`pydenoise.nn.Filter2NoiseLoss`.
        learning_rate: at the cycle's peak.
        stages, patch_size: see :class:`pydenoise.nn.AttentionGuidedBilateral`.
        seed: of the first parameters; nothing else is drawn.
        on_step: called with the number of steps done and the loss (which waits for the device).

    Raises:
        TypeError, ValueError: a bad argument; the message names it.

    Source: Sun et al., Filter2Noise: interpretable self-supervised single-image denoising for low-dose CT with
    attention-guided bilateral filtering (2025).
    """
    _check_image(noisy)
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps: expected an int >= 1, got {steps!r}")
    x = noisy.detach().float().unsqueeze(0)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = AttentionGuidedBilateral(x.shape[1], stages, patch_size)
    model, loss_of = model.to(x.device), Filter2NoiseLoss(detail).to(x.device)
    x = extend(x, math.lcm(2 * patch_size, 4))
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    losses = []
    with torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if on_step is not None:
                on_step(step + 1, losses[-1].item())
    return model.eval(), torch.stack(losses).tolist()


def denoise_single_image(
    noisy: Tensor,
    *,
    regions: Sequence[SigmaRegion] = (),
    crop: int = 512,
    tile: int = 512,
    **training,
) -> SingleImageResult:
    """Denoise one picture with nothing but itself: train Filter2Noise on it, then filter it.

    Args:
        noisy: [C, H, W], floating point, values of about 0 to 1; C = 1 (gray) and 3 (colour) share one set of weights.
        regions: the user's sigmas for parts of the picture, in place of the predicted ones; the training does not see
            them.
        crop: train on at most so many pixels a side, from the middle; 0: on the whole picture. A step's time grows with
            the square of what it is trained on.
        tile: when the whole picture is filtered, patches attend to those of the same square of so many pixels; 0: to
            all.
        training: further arguments of :func:`train_on_image`.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
    """
    _check_image(noisy)
    if type(crop) is not int or crop < 0:
        raise ValueError(f"crop: expected an int >= 0, got {crop!r}")
    part = noisy
    for axis in (1, 2):
        if crop and part.shape[axis] > crop:
            part = part.narrow(axis, (part.shape[axis] - crop) // 2, crop)
    model, losses = train_on_image(part, **training)
    with torch.no_grad():
        image, maps = model(noisy.float()[None], regions, tile=tile, return_sigma=True)
    return SingleImageResult(image[0].to(noisy.dtype), model, [sigma[0] for sigma in maps], losses)


def _check_image(noisy: object) -> None:
    if not isinstance(noisy, Tensor):
        raise TypeError(f"noisy: expected a torch.Tensor, got {type(noisy).__name__}")
    if not noisy.is_floating_point():
        raise TypeError(f"noisy: expected a floating-point tensor, got {noisy.dtype}")
    if noisy.dim() != 3 or 0 in noisy.shape:
        raise ValueError(f"noisy: expected [C, H, W], got shape {tuple(noisy.shape)}")
