"""Denoising of hyperspectral cubes [bands, H, W]: noise and subspace estimation, low-rank and sparse restoration.

A cube of many bands holds few spectra: its signal lies in a subspace of a few dimensions, and only there is there
something to denoise. ``hysime`` finds the noise of every band and the subspace; ``fasthyde``, ``fasthyin`` (with
missing samples) and ``l1hymixde`` (with outliers) denoise its components by any denoiser of gray images; ``hyres`` and
``hyminor`` need no denoiser and no parameter.
"""

from pydenoise.hyperspectral.anscombe import anscombe, inverse_anscombe
from pydenoise.hyperspectral.denoisers import FFDNetDenoiser, WaveletDenoiser
from pydenoise.hyperspectral.fasthyde import FastHyDe, fasthyde
from pydenoise.hyperspectral.fasthyin import fasthyin
from pydenoise.hyperspectral.hyminor import hyminor
from pydenoise.hyperspectral.hyres import hyres
from pydenoise.hyperspectral.hysime import BandNoise, Subspace, hysime, regression_noise
from pydenoise.hyperspectral.l1hymixde import l1hymixde
from pydenoise.hyperspectral.moments import BandMoments
from pydenoise.hyperspectral.streaming import denoise_tiles, moments_of

__all__ = [
    "BandMoments",
    "BandNoise",
    "FFDNetDenoiser",
    "FastHyDe",
    "Subspace",
    "WaveletDenoiser",
    "anscombe",
    "denoise_tiles",
    "fasthyde",
    "fasthyin",
    "hyminor",
    "hyres",
    "hysime",
    "inverse_anscombe",
    "l1hymixde",
    "moments_of",
    "regression_noise",
]
