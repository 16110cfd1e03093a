"""Learnable spacings: find where the echoes of a picture come from.

A picture is the sum of shifted copies of another one. A layer with as many components as there are copies learns their
strengths and their places, and says them in plain numbers, which a dense kernel of 17 x 17 weights would not.

Run: python examples/dcls.py
"""

import torch
import torch.nn.functional as F

import pydenoise as pdn

ECHOES = {(-5, 2): 0.8, (3, -4): 0.5, (1, 6): -0.6}  # (down, right): strength
SIZE = 17


def pictures(count: int, size: int = 32) -> torch.Tensor:
    """Smooth random pictures, [count, 1, size, size]."""
    coarse = torch.randn(count, 1, size // 3, size // 3)
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)


def true_kernel() -> torch.Tensor:
    kernel = torch.zeros(1, 1, SIZE, SIZE)
    for (down, right), strength in ECHOES.items():
        kernel[0, 0, SIZE // 2 + down, SIZE // 2 + right] = strength
    return kernel


def main() -> None:
    torch.manual_seed(0)
    kernel = true_kernel()
    layer = pdn.nn.DclsConv2d(1, 1, len(ECHOES), padding=SIZE // 2, dilated_kernel_size=SIZE, bias=False)
    with torch.no_grad():
        layer.P.normal_(0, 2)
        layer.SIG.fill_(3.0)  # broad at first: a component feels what lies around it
    places = {"params": [layer.P, layer.SIG], "lr": 0.1}
    optimizer = torch.optim.Adam([{"params": [layer.weight], "lr": 0.03}, places])
    for step in range(451):
        x = pictures(8)
        loss = F.mse_loss(layer(x), F.conv2d(x, kernel, padding=SIZE // 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.clamp_parameters()
        if step % 150 == 0:
            print(f"step {step:3d}: loss {loss.item():.5f}")
    print("learned (down, right): strength        true")
    found = sorted(zip(layer.P[:, 0, 0].t().tolist(), layer.weight[0, 0].tolist(), strict=True))
    for ((down, right), strength), (place, true) in zip(found, sorted(ECHOES.items()), strict=True):
        print(f"({down:5.2f}, {right:5.2f}): {strength:5.2f}            {place}: {true}")


if __name__ == "__main__":
    main()
