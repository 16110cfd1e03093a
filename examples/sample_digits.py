"""Sample handwritten digits with a solver of your choice around any denoiser.

Run: python examples/sample_digits.py
"""

import torch

import pydenoise as pdn
from pydenoise.models import load_digits

model = load_digits()  # any callable (x, t, **conditioning) -> predicted noise
labels = torch.arange(10)
sampler = pdn.samplers.Sampler(
    model,
    pdn.samplers.NoiseSchedule.linear(),  # the levels that the model was trained on
    pdn.samplers.DPMSolverPP(order=2),  # or DDIM(), UniPC(), PNDM(), EVODiff(), ...
    num_steps=10,
    guidance_scale=2.0,
)
images = sampler.sample(
    shape=(10, 1, 8, 8),
    seed=0,
    conditioning={"labels": labels},
    unconditional={"labels": torch.full_like(labels, model.null_class)},
)

ink = " .:-=+*#%@"
for digits in images.split(5):  # five beside each other
    for row in digits[:, 0].permute(1, 0, 2):
        darkness = row.clamp(-1, 1).add(1).mul(len(ink) / 2).clamp(max=len(ink) - 1).int()
        print("   ".join("".join(2 * ink[value] for value in line) for line in darkness.tolist()))
    print()
