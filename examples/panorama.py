"""A panorama of hills that closes into a ring, from a denoiser that knows 16 x 16 pixels only.

Run: python examples/panorama.py

The denoiser needs no training: for normal data the best prediction of the noise is a matrix, made of the covariance of
a patch. Any network takes its place.
"""

import torch

import pydenoise as pdn

SIDE, WIDTH = 16, 96  # pixels of a window's sides, and round the panorama
schedule = pdn.samplers.NoiseSchedule.linear()
alphas_cumprod = schedule.alphas_cumprod.float()

points = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float()
distance = torch.cdist(points, points)
variances, directions = torch.linalg.eigh((-((distance / 5) ** 2) / 2).exp())  # hills are some 5 pixels wide


def denoiser(x, t):
    """The noise in patches x [N, 1, 16, 16]."""
    alpha, sigma = alphas_cumprod[t, None].sqrt(), (1 - alphas_cumprod[t, None]).sqrt()
    along = x.flatten(1) @ directions
    return (sigma * along / (alpha**2 * variances.clamp(min=0) + sigma**2) @ directions.T).view_as(x)


def roughness(picture):
    """Mean step between neighbouring columns."""
    return (picture[..., 1:] - picture[..., :-1]).abs().mean()


def sample(windows, observers=()):
    """[16, 96], by DPM-Solver++ in 25 calls."""
    solver = pdn.samplers.DPMSolverPP(order=2)
    run = pdn.samplers.Sampler(windows, schedule, solver, num_steps=25, observers=observers)
    return run.sample(shape=(1, 1, SIDE, WIDTH), seed=0)[0, 0]


overlapped = sample(pdn.samplers.OverlappedWindows(denoiser, (SIDE, SIDE), overlap=8, wrap=(-1,)))
moving = pdn.samplers.ShiftedWindows(denoiser, (SIDE, SIDE), shifts=8, wrap=(-1,))
for name, picture in (("overlapped windows", overlapped), ("shifted windows, half the work", sample(moving, [moving]))):
    ends = picture[:, [-1, 0]]
    print(f"{name}: {roughness(picture):.2f} from column to column, {roughness(ends):.2f} where the ends meet")

ink = " .:-=+*#%@"
for row in torch.cat([overlapped, overlapped[:, :8]], 1)[::2]:  # the beginning once more: the hills go on
    height = row.add(2.5).mul(len(ink) / 5).clamp(0, len(ink) - 1).int()
    print("".join(ink[value] for value in height.tolist()))
