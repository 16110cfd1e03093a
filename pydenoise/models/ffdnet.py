"""FFDNet: a denoiser that is told the noise level and works on the four half-resolution phases of the image.

Source: Zhang, Zuo and Zhang, "FFDNet: Toward a Fast and Flexible Solution for CNN-Based Image Denoising", IEEE TIP
2018. The published weights have their batch normalisations folded in: plain convolutions with ReLU between them, stored
as ``model.0.weight, model.0.bias, model.2.weight, ...`` (the ReLUs take the odd numbers). The class has these keys.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise.models.weights import WeightsError

SCALE = 2  # pixels are gathered in SCALE x SCALE phases
# The network for RGB expects independent noise in three channels, whose average has 1/sqrt(3) of the noise of each.
# Three equal channels carry the full noise in their average: it is the noise of a colour picture with sqrt(3) times the
# sigma. Measured on the middle of scikit-image's camera, sigma 25: 23.8 dB without the factor, 30.8 with 1.75, 30.2
# with 2.
GRAY_FACTOR = math.sqrt(3)


class FFDNet(nn.Module):
    """Denoise images of ``channels`` channels, given the standard deviation of the noise.

    Args:
        channels: image channels: 3 for the published colour network, 1 for gray.
        features: channels between the layers (96 colour, 64 gray).
        depth: number of 3x3 convolutions (12 colour, 15 gray).
    """

    def __init__(self, channels: int = 3, features: int = 96, depth: int = 12):
        super().__init__()
        for name, value, least in (("channels", channels, 1), ("features", features, 1), ("depth", depth, 2)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        self.channels, self.features, self.depth = channels, features, depth
        phases = SCALE * SCALE * channels
        widths = [phases + 1, *[features] * (depth - 1), phases]  # + 1: the noise map
        layers: list[nn.Module] = []
        for index in range(depth):
            layers.append(nn.Conv2d(widths[index], widths[index + 1], 3, padding=1))
            layers.append(nn.ReLU(inplace=True))
        self.model = nn.Sequential(*layers[:-1])

    @classmethod
    def gray(cls) -> "FFDNet":
        """The paper's network for gray images (no weights are published in a package we know of)."""
        return cls(channels=1, features=64, depth=15)

    @property
    def receptive_radius(self) -> int:
        """How many pixels beside an even-aligned block its result depends on: tiles overlapping by this are exact."""
        return SCALE * self.depth

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoise a batch.

        Args:
            x: [N, channels, H, W], values in [0, 1]; odd sizes are continued by repeating the last row or column.
            sigma: standard deviation of the noise in the units of ``x`` (25 / 255 for sigma = 25): [N, 1, 1, 1] or
                [1, 1, 1, 1]; dtype of ``x``.

        Returns:
            [N, channels, H, W], not clipped.
        """
        if isinstance(x, Tensor):  # not under torch.fx, where x is a stand-in without a shape
            self._check(x, sigma)
        height, width = x.shape[-2], x.shape[-1]
        padded = F.pad(x, (0, -width % SCALE, 0, -height % SCALE), mode="replicate")
        phases = F.pixel_unshuffle(padded, SCALE)
        level = sigma.expand(phases.shape[0], 1, phases.shape[2], phases.shape[3])
        y = self.model(torch.cat((phases, level), dim=1))
        return F.pixel_shuffle(y, SCALE)[..., :height, :width]

    def _check(self, x: Tensor, sigma: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x: expected [N, {self.channels}, H, W], got {list(x.shape)}")
        if not isinstance(sigma, Tensor):
            raise TypeError(f"sigma: expected a tensor of shape [N, 1, 1, 1], got {type(sigma).__name__}")
        if tuple(sigma.shape) not in {(x.shape[0], 1, 1, 1), (1, 1, 1, 1)}:
            raise ValueError(f"sigma: expected [{x.shape[0]}, 1, 1, 1] or [1, 1, 1, 1], got {list(sigma.shape)}")


def gray_through_colour(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor) -> Tensor:
    """Denoise gray images [N, 1, H, W] with a network for RGB: three equal channels, whose results are averaged.

    ``sigma``: of the gray images, [N, 1, 1, 1] or [1, 1, 1, 1].
    """
    return network(x.expand(-1, 3, -1, -1), sigma * GRAY_FACTOR).mean(dim=1, keepdim=True)


def load_ffdnet(path: str | Path) -> FFDNet:
    """Build the network that a checkpoint of the published key layout describes, with its weights, in eval mode.

    ``path``: a ``.pth`` file, read with ``weights_only=True``. Raises :class:`WeightsError` if it is missing, is no
    checkpoint, or holds another network.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file meets the unpickler as anything from EOFError to struct.error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{path}: not a torch checkpoint, or a damaged one ({reason[:120]})") from error
    return ffdnet_from_state_dict(state, str(path))


def ffdnet_from_state_dict(state: Mapping[str, Tensor], name: str = "state_dict") -> FFDNet:
    """The network whose sizes the tensors of ``state`` spell out. Raises :class:`WeightsError` for any other layout."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{name}: expected a dictionary of tensors, got {_describe(state)}")
    indices = sorted(int(match[1]) for key in state if (match := re.fullmatch(r"model\.(\d+)\.weight", key)))
    expected = {f"model.{2 * index}.{kind}" for index in range(len(indices)) for kind in ("weight", "bias")}
    if len(indices) < 2 or set(state) != expected:
        raise WeightsError(
            f"{name}: not an FFDNet checkpoint: expected the keys model.0.weight, model.0.bias, "
            f"model.2.weight, ..., got {_describe(state)}"
        )
    first, last = state["model.0.weight"], state[f"model.{indices[-1]}.weight"]
    phases = last.shape[0] if last.dim() else 0
    if first.dim() != 4 or phases == 0 or phases % (SCALE * SCALE):
        raise WeightsError(
            f"{name}: not an FFDNet checkpoint: first and last layer have the shapes "
            f"{list(first.shape)} and {list(last.shape)}"
        )
    model = FFDNet(phases // (SCALE * SCALE), first.shape[0], len(indices))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{name}: not an FFDNet checkpoint: {reason[:200]}") from error
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise WeightsError(f"{name}: holds values that are not finite")
    return model.eval()


def _describe(state: object) -> str:
    if not isinstance(state, Mapping):
        return type(state).__name__
    keys = [str(key) for key in state][:3]
    return f"{len(state)} keys: {', '.join(keys)}{', ...' if len(state) > 3 else ''}"
