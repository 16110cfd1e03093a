"""Denoise the frames of a noisy camera while they come: a photograph that is panned over, and then rests.

Two stages of FFDNet, one call of the network for each frame; while the picture rests, most frames need none.

Run: pydenoise weights ffdnet && python examples/stream_photograph.py [OUT.png]
"""

import math
import sys

import torch
from skimage import data

import pydenoise as pdn
from pydenoise.imaging import Picture, write_picture
from pydenoise.models import load_ffdnet
from pydenoise.models.weights import find_ffdnet

SIDE, MOVING, RESTING = 96, 24, 48
NOISE, SECOND = 25 / 255, 8 / 255  # of the camera, and what the second stage takes away

network = load_ffdnet(find_ffdnet())  # any callable (x, t, **conditioning)
photograph = torch.from_numpy(data.astronaut()).permute(2, 0, 1).float() / 255
places = [(20 + 4 * i, 160 + 3 * i) for i in range(MOVING)]
places += places[-1:] * RESTING
clean = torch.stack([photograph[:, y : y + SIDE, x : x + SIDE] for y, x in places])
generator = torch.Generator().manual_seed(0)
camera = (frame + NOISE * torch.randn(frame.shape, generator=generator) for frame in clean)


def decibels(picture: torch.Tensor, truth: torch.Tensor) -> float:
    return -10 * math.log10(float((picture - truth).square().mean()))


with pdn.samplers.Stream(
    lambda x, sigma: network(x, sigma.view(-1, 1, 1, 1)),
    pdn.samplers.NoiseSchedule.karras(sigma_min=0.01, sigma_max=1.0),  # times are standard deviations
    (3, SIDE, SIDE),
    timesteps=[NOISE, SECOND],
    prediction_type="sample",
    renoise="predicted",
    noisy_frames=True,  # the camera has made them so
    similarity=pdn.samplers.SimilarityFilter(threshold=0.9, max_skip=10, seed=0),
) as stream:
    results = list(stream.feed(camera))
    stats = stream.stats

quality = sum(decibels(result.sample, clean[result.number]) for result in results) / len(results)
print(f"{stats.frames} frames, {stats.evaluations} evaluations, {stats.throughput:.0f} frames/s")
print(f"latency {1e3 * stats.latency:.0f} ms; {-20 * math.log10(NOISE):.1f} dB before, {quality:.1f} dB after")
if len(sys.argv) > 1:
    shown = torch.cat([results[i].sample for i in (0, MOVING // 2, MOVING, len(results) - 1)], dim=2)
    pixels = (shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    write_picture(sys.argv[1], Picture(pixels.contiguous().numpy()))
    print(f"wrote {sys.argv[1]}")
