"""Weighted convolution in a small denoiser: train it with a density of its own, then fold it into plain torch.

Run: python examples/weighted_conv.py
"""

import torch
from torch import nn

import pydenoise as pdn


class Denoiser(nn.Module):
    """Predicts the noise in a gray image; 7x7 kernels with a trainable density per layer."""

    def __init__(self, channels: int = 16, layers: int = 4):
        super().__init__()
        widths = [1, *[channels] * (layers - 1), 1]
        options = {"padding": 3, "density": (0.25, 0.5, 0.9), "trainable_density": True, "init": "matched"}
        self.convs = nn.ModuleList(
            pdn.nn.WeightedConv2d(a, b, 7, **options) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        x = noisy
        for conv in self.convs[:-1]:
            x = torch.relu(conv(x))
        return noisy - self.convs[-1](x)


def stripes(count: int, size: int = 40) -> torch.Tensor:
    """Random gratings, [count, 1, size, size], values in [0, 1]."""
    axis = torch.linspace(0, 1, size)
    angle, frequency, phase = torch.rand(3, count, 1, 1)
    angle, frequency = angle * torch.pi, 5 + 20 * frequency
    wave = torch.cos(angle) * axis[:, None] + torch.sin(angle) * axis
    return (0.5 + 0.5 * torch.sin(frequency * wave + 6 * phase)).unsqueeze(1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * torch.log10((a - b).square().mean()).item()


def main() -> None:
    torch.manual_seed(0)
    model, sigma = Denoiser(), 0.2
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(101):
        clean = stripes(8)
        loss = (model(clean + sigma * torch.randn_like(clean)) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step:3d}: loss {loss.item():.4f}")

    model.eval()
    clean = stripes(4)
    noisy = clean + sigma * torch.randn_like(clean)
    with torch.no_grad():
        denoised = model(noisy)
    print(f"PSNR {psnr(noisy, clean):.2f} dB -> {psnr(denoised, clean):.2f} dB")
    print("density of the second layer, outermost first:", [round(c, 3) for c in model.convs[1].coefficients.tolist()])

    # Plain torch again, for export or another runtime: the density is multiplied into the weights.
    for index, conv in enumerate(model.convs):
        model.convs[index] = conv.fold()
    with torch.no_grad():
        difference = (model(noisy) - denoised).abs().max().item()
    print(f"folded into {type(model.convs[0]).__name__}; largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
