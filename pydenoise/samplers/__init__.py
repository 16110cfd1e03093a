"""Samplers: loops around any callable denoiser. They know no modules of this package, only its functional API.

``Sampler`` runs a solver (``DDIM()``, ``DPMSolverPP(2)``, ...) on a ``NoiseSchedule``; ``masked`` has the samplers of
masked-diffusion language models; ``adapters`` wrap models of other libraries; ``operators`` are those of inverse
problems. Names load on first use.
"""

import importlib
import sys
from types import ModuleType

_MODULES = ("adapters", "masked", "operators")
_NAMES = {
    "ConcatCondition": "fast_ddpm",
    "Control": "plan",
    "Conversion": "plan",
    "DDIM": "ddim",
    "DDPM": "ddpm",
    "DDSM": "ddsm",
    "DMCMC": "dmcmc",
    "DPMSolverPP": "dpm_solver",
    "DataConsistency": "data_consistency",
    "DenoisingGAN": "ddgan",
    "DiffusersScheduler": "diffusers_scheduler",
    "EVODiff": "evodiff",
    "EditFriendly": "edit_friendly",
    "Euler": "euler",
    "EulerAncestral": "euler",
    "FastDDPM": "fast_ddpm",
    "FixedPointInversion": "fixed_point",
    "Heun": "euler",
    "Inversion": "edit_friendly",
    "Level": "levels",
    "NoiseSchedule": "levels",
    "NoiseShift": "noise_shift",
    "OneMoreStep": "one_more_step",
    "OverlappedWindows": "windows",
    "PFODE": "pf_ode",
    "PNDM": "pndm",
    "Plan": "plan",
    "RDDM": "rddm",
    "REDDiff": "red_diff",
    "Resfusion": "resfusion",
    "SVDD": "svdd",
    "Sampler": "runtime",
    "ShiftedWindows": "windows",
    "SimilarityFilter": "stream_filter",
    "Slimmable": "slimmable",
    "Solver": "plan",
    "StepInfo": "runtime",
    "Strategy": "ddsm",
    "Stream": "stream",
    "StreamBatch": "stream_batch",
    "StreamFrame": "stream",
    "StreamStats": "stream",
    "TimeShift": "time_shift",
    "Trajectory": "runtime",
    "UDPM": "udpm",
    "UniPC": "unipc",
    "VectorTimes": "vector_times",
    "calibrate_noise_shift": "noise_shift",
    "fast_ddpm_loss": "fast_ddpm",
    "from_diffusers": "from_diffusers",
    "resfusion_schedule": "resfusion",
    "residual_schedule": "rddm",
    "residual_schedule_of": "rddm",
    "sandwich_backward": "ddsm",
    "search_strategy": "ddsm_search",
}


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"pydenoise.samplers.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(f"pydenoise.samplers.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pydenoise.samplers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})


class _Package(ModuleType):
    """This package's type: importing the submodule ``from_diffusers`` must not hide the function of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _NAMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
