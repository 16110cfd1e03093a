"""Make a convolutional denoiser faster: accelerate it, look at the report, use it like the original.

Run: python examples/accelerate.py [fp32|bf16]
"""

import sys

import torch
from torch import nn

import pydenoise as pdn


class DnCNN(nn.Module):
    """A residual denoiser (Zhang et al., 2017): it predicts the noise, which is then subtracted."""

    def __init__(self, depth: int = 17, width: int = 64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.body(x)


def main() -> None:
    precision = sys.argv[1] if len(sys.argv) > 1 else "fp32"
    torch.manual_seed(0)
    model = DnCNN().eval()  # load your weights here
    fast, report = pdn.accelerate(model, torch.rand(1, 3, 128, 128), precision)
    print(report)

    with torch.inference_mode():
        picture = torch.rand(2, 3, 96, 160)  # any size, any batch
        difference = (fast(picture) - model(picture)).abs().max().item()
    print(f"\nlargest difference on two other pictures: {difference:.1e}")


if __name__ == "__main__":
    main()
