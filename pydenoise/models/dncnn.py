"""DnCNN: a plain stack of 3x3 convolutions that predicts the noise.

Source: Zhang, Zuo, Chen, Meng and Zhang, "Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image
Denoising", IEEE TIP 2017. Depth 17 and 64 features are the paper's network for a known noise level.
"""

import torch
from torch import Tensor, nn


class DnCNN(nn.Module):
    """``x - noise(x)`` with ``depth`` convolutions: Conv-ReLU, (Conv-BatchNorm-ReLU) x (depth - 2), Conv.

    Args:
        channels: image channels, 1 or 3.
        features: channels between the layers.
        depth: number of convolutions, at least 2.
        batch_norm: batch normalisation after the inner convolutions, as in the paper.
    """

    def __init__(self, channels: int = 1, features: int = 64, depth: int = 17, batch_norm: bool = True):
        super().__init__()
        if depth < 2:
            raise ValueError(f"depth: expected at least 2, got {depth}")
        layers: list[nn.Module] = [nn.Conv2d(channels, features, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers.append(nn.Conv2d(features, features, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(features))
            layers.append(nn.ReLU())
        layers.append(nn.Conv2d(features, channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():  # the paper's start: without it, 17 random layers fade to nothing
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Denoise ``x`` [N, channels, H, W], values in [0, 1]; the result has its shape."""
        return x - self.layers(x)

    @torch.no_grad()
    def randomize_statistics(self, seed: int = 0) -> "DnCNN":
        """Give the batch normalisations statistics that are not 0 and 1, as a trained network has."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                count = module.num_features
                module.running_mean.copy_(torch.randn(count, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(count, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(count, generator=generator) * 0.5 + 0.75)
                module.bias.copy_(torch.randn(count, generator=generator) * 0.1)
        return self
