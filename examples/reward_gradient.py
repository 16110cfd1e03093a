"""Search for starting noise whose digits are mirror images of themselves, by the gradient of a reward.

The gradient goes through all steps of the sampler; memory holds a few states, however many steps there are.

Run: python examples/reward_gradient.py [iterations]
"""

import sys

import torch

import pydenoise as pdn
from pydenoise.models import load_digits

iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 30
model = load_digits().requires_grad_(False)
labels = torch.tensor([0, 1, 3, 5, 8])
sampler = pdn.samplers.Sampler(model, pdn.samplers.NoiseSchedule.linear(), pdn.samplers.DPMSolverPP(order=2), 10)


def reward(images: torch.Tensor) -> torch.Tensor:
    """Minus the mean square of what an image differs from its mirror image by, for each image."""
    return -(images - images.flip(-1)).square().mean((1, 2, 3))


noise = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
optimizer = torch.optim.Adam([noise], lr=0.05)
rewards = []
for _ in range(iterations):
    # Noise of another length than usual would be seen by nobody but this network.
    x = noise * (noise[0].numel() ** 0.5 / noise.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    images = sampler.sample(x, conditioning={"labels": labels}, differentiable="checkpoint")
    each = reward(images)
    rewards.append(each.detach())
    optimizer.zero_grad()
    (-each.sum()).backward()
    optimizer.step()

for label, first, last in zip(labels.tolist(), rewards[0].tolist(), rewards[-1].tolist(), strict=True):
    print(f"digit {label}: reward {first:.3f} -> {last:.3f}")
ink = " .:-=+*#%@"
for row in images.detach()[:, 0].permute(1, 0, 2):
    darkness = row.clamp(-1, 1).add(1).mul(len(ink) / 2).clamp(max=len(ink) - 1).int()
    print("   ".join("".join(2 * ink[value] for value in line) for line in darkness.tolist()))
