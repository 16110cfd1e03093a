"""The columns of a coefficient row: everything that ``sampler_step`` does to a group of elements.

With sample x, model output c (and u, the unconditional one), base, history slots h_j and noise z:

    y    = u + GUIDANCE (c - u)
    x0   = clamp(X0_SAMPLE x + X0_OUTPUT y, -CLIP, CLIP)
    m    = M_SAMPLE x + M_OUTPUT y + M_X0 x0                                  -> slot SLOT of the history
    x'   = SAMPLE x + BASE base + OUTPUT y + M m + sum HISTORY_j h_j + std z  -> out, and INPUT_SCALE x' -> model_input
    kept = KEPT_SAMPLE x + KEPT_BASE base + KEPT_M m + KEPT_OUT x' + sum KEPT_HISTORY_j h_j

A coefficient of exactly 0 leaves its tensor unread. ``std`` is NOISE, times exp(LOG_SMALL + (v + 1) / 2 (LOG_LARGE -
LOG_SMALL)) where the model gives v. The CPU and CUDA kernels have the same numbers in csrc/sampler_step/params.h, the
Triton kernels in kernels/sampler_step.py; a test compares them.
"""

GUIDANCE = 0
X0_SAMPLE, X0_OUTPUT, CLIP = 1, 2, 3
M_SAMPLE, M_OUTPUT, M_X0, SLOT = 4, 5, 6, 7
SAMPLE, BASE, OUTPUT, M = 8, 9, 10, 11
NOISE, LOG_SMALL, LOG_LARGE = 12, 13, 14
INPUT_SCALE = 15
HISTORY = 16
KEPT_SAMPLE, KEPT_BASE, KEPT_M, KEPT_OUT = 22, 23, 24, 25
KEPT_HISTORY = 26
SLOTS = 6
WIDTH = 32
