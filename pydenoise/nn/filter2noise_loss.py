"""Filter2Noise's loss: what a denoiser must fulfil on a single noisy picture, without a clean one."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Pairs of the pixels of a 2 x 2 block (number 2 row + column) in the order in which ties are decided.
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def diagonal_means(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of [B, C, H, W] with even H and W: means along the diagonals of 2 x 2 blocks, channel by channel.

    The first has top right and bottom left, the second top left and bottom right; both are [B, C, H / 2, W / 2].
    """
    _check_even(x)
    a, b, c, d = _phases(x)
    return (b + c) / 2, (a + d) / 2


def shuffle_nearest(x: Tensor) -> Tensor:
    """``x`` [B, C, H, W], even H and W, with the two most alike pixels of every 2 x 2 block exchanged ("ELS").

    Alike: of least squared distance over the channels; of several such pairs the first in the order (0, 1), (0, 2),
    (0, 3), (1, 2), (1, 3), (2, 3), where 2 row + column numbers a pixel.
    """
    _check_even(x)
    pixels = torch.stack(_phases(x))  # [4, B, C, H / 2, W / 2]
    with torch.no_grad():
        distances = torch.stack([(pixels[i] - pixels[j]).square().sum(1) for i, j in _PAIRS])
        order = torch.arange(4, device=x.device).expand(len(_PAIRS), 4).clone()
        for place, (i, j) in enumerate(_PAIRS):
            order[place, i], order[place, j] = j, i
        source = order[distances.argmin(0)].movedim(-1, 0).unsqueeze(2).expand_as(pixels)
    a, b, c, d = pixels.gather(0, source).unbind()
    top, bottom = torch.stack([a, b], -1).flatten(-2), torch.stack([c, d], -1).flatten(-2)
    return torch.stack([top, bottom], -2).flatten(-3, -2)


def _phases(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]


def _check_even(x: Tensor) -> None:
    if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x: expected [B, C, H, W] with even H and W, got shape {tuple(x.shape)}")


def difference_of_gaussians(size: int = 7, narrow: float = 9.0, wide: float = 10.0) -> Tensor:
    """The kernel [size, size]: a Gaussian less a wider one, each of sum 1 (widths in pixels); its own sum is 0."""
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    squares = place[:, None].square() + place[None].square()
    gaussians = [(-squares / (2 * width**2)).exp() for width in (narrow, wide)]
    return (gaussians[0] / gaussians[0].sum() - gaussians[1] / gaussians[1].sum()).float()


class Filter2NoiseLoss(nn.Module):
    """The loss of a denoiser f on noisy pictures alone.

    With the halves D_1 x and D_2 x (:func:`diagonal_means`), S their shuffle (:func:`shuffle_nearest`),
    a_i = f(S D_i x), Y = f(x), b_i = D_i Y and mean absolute differences:
    ``|a_1 - a_2| / 3 + (|a_1 - b_1| + |a_2 - b_2|) / 3 + |b_1 - b_2| / 3 + detail | |DoG x| - |DoG Y| |``,
    where DoG is a 7 x 7 difference of Gaussians, channel by channel, with zeros around the picture.

    Args:
        detail: the weight of the last term, which keeps detail; the DoG's values are small, hence the large number.

    ``forward(denoiser, x)``: x is [B, C, H, W] with even H and W. The denoiser is called twice: on both halves in one
    batch (so let it treat pictures by themselves), and on x.

    Source: Sun et al., Filter2Noise (2025). Its public code mixes the channels of the halves where there are several;
    this one does not. With one channel the two agree.
    """

    def __init__(self, detail: float = 350.0):
        super().__init__()
        if not (isinstance(detail, (int, float)) and 0 <= detail < math.inf):
            raise ValueError(f"detail: expected a finite number >= 0, got {detail!r}")
        self.detail = detail
        self.register_buffer("kernel", difference_of_gaussians(), persistent=False)

    def forward(self, denoiser: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        first, second = diagonal_means(x)
        shuffled = torch.cat([shuffle_nearest(first), shuffle_nearest(second)])
        a_1, a_2 = denoiser(shuffled).chunk(2)
        y = denoiser(x)
        b_1, b_2 = diagonal_means(y)
        alike = F.l1_loss(a_1, a_2) + F.l1_loss(a_1, b_1) + F.l1_loss(a_2, b_2) + F.l1_loss(b_1, b_2)
        loss = alike / 3
        if self.detail:
            loss = loss + self.detail * F.l1_loss(self._details(y), self._details(x))
        return loss

    def _details(self, x: Tensor) -> Tensor:
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=x.shape[1]).abs()

    def extra_repr(self) -> str:
        return f"detail={self.detail:g}"
