"""waifu2x "cunet": two U-Nets in a row, with squeeze-and-excitation; the second one corrects the first one's result.

Source: the network upcunet/cunet of nagadomi's waifu2x, whose weights for denoising (noise levels 0 to 3) ship as ncnn
models. Its convolutions have no padding: a picture loses ``MARGIN`` pixels on every side.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise.models.ncnn import Layer, read_ncnn
from pydenoise.models.weights import WeightsError

MARGIN = 28
ALIGN = 4  # two halvings
SLOPE = 0.1
# What the graph of the published files has beside the layers with weights.
CROPS = [4, 4, 16, 20]
SUMS = 4


def crop(x: Tensor, margin: int) -> Tensor:
    """``x`` [N, C, H, W] without ``margin`` pixels on every side."""
    return x[..., margin:-margin, margin:-margin]


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride), nn.LeakyReLU(SLOPE)]


def _double_conv(inputs: int, middle: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*_conv(inputs, middle), *_conv(middle, outputs))


def _down(channels: int) -> nn.Sequential:
    return nn.Sequential(*_conv(channels, channels, 2, 2))


def _up(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(channels, channels, 2, 2), nn.LeakyReLU(SLOPE))


def _tail(channels: int) -> nn.Sequential:
    return nn.Sequential(*_conv(64, 64), nn.Conv2d(64, channels, 3))


class SqueezeExcite(nn.Module):
    """Scale every channel by a number in (0, 1) that depends on the means of all channels (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class UNet1(nn.Module):
    """One halving; the result is 8 pixels smaller on every side."""

    def __init__(self, channels: int):
        super().__init__()
        self.head = _double_conv(channels, 32, 64)
        self.down = _down(64)
        self.body = _double_conv(64, 128, 64)
        self.excite = SqueezeExcite(64, 8)
        self.up = _up(64)
        self.tail = _tail(channels)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.head(x)
        coarse = self.up(self.excite(self.body(self.down(fine))))
        return self.tail(crop(fine, 4) + coarse)


class UNet2(nn.Module):
    """Two halvings; the result is 20 pixels smaller on every side."""

    def __init__(self, channels: int):
        super().__init__()
        self.head = _double_conv(channels, 32, 64)
        self.down1 = _down(64)
        self.body1 = _double_conv(64, 64, 128)
        self.excite1 = SqueezeExcite(128, 16)
        self.down2 = _down(128)
        self.body2 = _double_conv(128, 256, 128)
        self.excite2 = SqueezeExcite(128, 16)
        self.up2 = _up(128)
        self.body3 = _double_conv(128, 64, 64)
        self.excite3 = SqueezeExcite(64, 8)
        self.up1 = _up(64)
        self.tail = _tail(channels)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.head(x)
        middle = self.excite1(self.body1(self.down1(fine)))
        coarse = self.up2(self.excite2(self.body2(self.down2(middle))))
        middle = self.up1(self.excite3(self.body3(crop(middle, 4) + coarse)))
        return self.tail(crop(fine, 16) + middle)


class CUNet(nn.Module):
    """Denoise pictures of ``channels`` channels (3: RGB). :meth:`denoise` is for pictures, calling it for padded ones.

    The modules stand in the order of the published files' layers.
    """

    def __init__(self, channels: int = 3):
        super().__init__()
        self.channels = channels
        self.unet1 = UNet1(channels)
        self.unet2 = UNet2(channels)

    @classmethod
    def from_ncnn(cls, param: str | Path, weights: str | Path) -> "CUNet":
        """The published network in eval mode, of an ncnn graph (``.param``) and its weights (``.bin``).

        Raises :class:`WeightsError` if a file is missing or damaged, or holds another network.
        """
        model = cls()
        _load(model, read_ncnn(param, weights), str(param))
        return model.eval()

    def forward(self, x: Tensor) -> Tensor:
        """The network itself: [N, channels, H, W], H and W multiples of 4 and at least 60, values in [0, 1].

        Returns [N, channels, H - 56, W - 56], not clipped.
        """
        if isinstance(x, Tensor):  # not under torch.fx, where x is a stand-in without a shape
            self._check(x)
        first = self.unet1(x)
        return crop(first, 20) + self.unet2(first)

    def denoise(self, x: Tensor, network: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Denoise whole pictures.

        Args:
            x: [N, channels, H, W], values in [0, 1], any size; the border pixels are repeated around it.
            network: what runs instead of this module, such as an accelerated copy of it.

        Returns:
            [N, channels, H, W], not clipped.
        """
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"x: expected [N, {self.channels}, H, W] and at least one pixel, got {list(x.shape)}")
        height, width = x.shape[-2:]
        sides = (MARGIN, MARGIN + -width % ALIGN, MARGIN, MARGIN + -height % ALIGN)
        y = (network or self)(F.pad(x, sides, mode="replicate"))
        return y[..., :height, :width]

    def _check(self, x: Tensor) -> None:
        least = 2 * MARGIN + ALIGN
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x: expected [N, {self.channels}, H, W], got {list(x.shape)}")
        if any(size % ALIGN or size < least for size in x.shape[2:]):
            raise ValueError(
                f"x: expected height and width to be multiples of {ALIGN} and at least {least}, got "
                f"{list(x.shape[2:])}; CUNet.denoise takes pictures of any size"
            )


# ----------------------------------------------------------------------------------------------------------- weights

_KINDS = {nn.Conv2d: ("Convolution", "InnerProduct"), nn.ConvTranspose2d: ("Deconvolution",)}
_ACTIVATIONS = {nn.ReLU: 1, nn.LeakyReLU: 2, nn.Sigmoid: 4}  # ncnn's option 9; 0 is none


@torch.no_grad()
def _load(model: CUNet, layers: list[Layer], name: str) -> None:
    """Copy the weights of ``layers`` into ``model``, whose convolutions stand in the same order."""
    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    following = [*leaves[1:], None]
    convs = [(conv, after) for conv, after in zip(leaves, following, strict=True) if type(conv) in _KINDS]
    weighted = [layer for layer in layers if layer.weight is not None]
    crops = [layer.options.get(0) for layer in layers if layer.kind == "Crop"]
    sums = sum(layer.kind == "Eltwise" for layer in layers)
    if len(weighted) != len(convs) or crops != CROPS or sums != SUMS:
        raise WeightsError(
            f"{name}: not waifu2x cunet for denoising: {len(weighted)} layers have weights (expected {len(convs)}), "
            f"the crops are {crops} (expected {CROPS}), {sums} layers add (expected {SUMS})"
        )
    for (conv, after), layer in zip(convs, weighted, strict=True):
        expected, got = _expected(conv, _ACTIVATIONS.get(type(after), 0)), _facts(layer)
        if layer.kind not in _KINDS[type(conv)] or got != expected:
            raise WeightsError(
                f"{name}: not waifu2x cunet for denoising: {layer.kind} {layer.name} has {got}, expected {expected}"
            )
        weight, bias = torch.from_numpy(layer.weight), torch.from_numpy(layer.bias)
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise WeightsError(f"{name}: {layer.name} holds values that are not finite")
        shape = conv.weight.shape
        if isinstance(conv, nn.ConvTranspose2d):  # ncnn has the output channels first here too
            weight = weight.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        conv.weight.copy_(weight.reshape(shape))
        conv.bias.copy_(bias)


def _expected(conv: nn.Conv2d | nn.ConvTranspose2d, activation: int) -> dict[str, int]:
    return {
        "outputs": conv.out_channels,
        "kernel": conv.kernel_size[0],
        "stride": conv.stride[0],
        "weights": conv.weight.numel(),
        "biases": conv.bias.numel(),
        "activation": activation,
    }


def _facts(layer: Layer) -> dict[str, int]:
    dense = layer.kind == "InnerProduct"  # its options 1 and 2 have other meanings
    return {
        "outputs": layer.options[0],
        "kernel": 1 if dense else layer.options.get(1),
        "stride": 1 if dense else layer.options.get(3, 1),
        "weights": layer.weight.size,
        "biases": 0 if layer.bias is None else layer.bias.size,
        "activation": layer.options.get(9, 0),
    }
