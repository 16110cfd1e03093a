"""Inversion of a deterministic sampler: the start that leads to a given sample.

Sources: Song et al., "Denoising Diffusion Implicit Models", ICLR 2021 (inversion, to first order); Pan et al.,
"Effective Real Image Editing with Accelerated Iterative Diffusion Inversion", ICCV 2023 (every step inverted exactly,
as a fixed point). How often the model is called depends on the data, so the host drives it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise import step_row as C
from pydenoise.samplers._conditions import Conditions
from pydenoise.samplers._loop import CallState, Loop
from pydenoise.samplers.levels import check_count
from pydenoise.samplers.plan import Plan
from pydenoise.samplers.runtime import FLOATS, Sampler

_MEMORY = (C.BASE, *range(C.HISTORY, C.WIDTH))  # columns of solvers whose steps look back


@dataclass(frozen=True)
class FixedPoint:
    """``start`` [B, ...]: where the sampler must begin; ``calls``: of the model, for every step of the sampler."""

    start: Tensor
    calls: tuple[int, ...]


class FixedPointInversion:
    """Goes back through the steps of a sampler, each one inverted to a tolerance.

    A step x' = f(x) is solved for x by x <- x + (alpha / alpha') (x' - f(x)), begun at x', which converges where the
    step changes the prediction little; with more steps it converges sooner.

    Args:
        sampler: with a solver whose steps are functions of the sample alone (DDIM(), Euler()), without clipping.
        tolerance: an iteration that changes no sample by more than this share of its root mean square is the last.
        max_calls: of the model, for one step; more are an error.

    Raises:
        TypeError, ValueError: a bad argument, or a sampler that cannot be inverted so.
    """

    def __init__(self, sampler: Sampler, *, tolerance: float = 1e-6, max_calls: int = 100):
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler: expected a Sampler, got {type(sampler).__name__}")
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
            raise TypeError(f"tolerance: expected a number, got {type(tolerance).__name__}")
        if not 0 < tolerance < math.inf:
            raise ValueError(f"tolerance: expected a finite number above 0, got {tolerance}")
        self.sampler, self.tolerance, self.max_calls = sampler, float(tolerance), check_count("max_calls", max_calls)
        _check(sampler)
        self._table = _inverse(sampler.plan)
        if sampler.guidance is not None:
            self._table[:, C.GUIDANCE] = torch.tensor(sampler.guidance, dtype=torch.float64)

    def invert(
        self,
        sample: Tensor,
        *,
        conditioning: Mapping[str, object] | None = None,
        unconditional: Mapping[str, object] | None = None,
    ) -> FixedPoint:
        """The start that the sampler takes to ``sample`` [B, ...], conditioned as in ``Sampler.sample``.

        Raises:
            TypeError, ValueError: a bad argument, a bad result of the denoiser, or a step that does not converge; the
                message names it.
        """
        if not isinstance(sample, Tensor):
            raise TypeError(f"sample: expected a tensor, got {type(sample).__name__}")
        if sample.dtype not in FLOATS or sample.dim() < 1:
            raise ValueError(f"sample: expected a floating-point tensor [B, ...], got {sample.dtype} {sample.shape}")
        given = Conditions(conditioning, unconditional, sample, self.sampler.guidance is not None).part(slice(None))
        setting = self.sampler._setting
        exact = torch.float64 if sample.dtype == torch.float64 else torch.float32
        with torch.inference_mode():
            loop = Loop(setting, sample, False, False)
            table = self._table.to(sample.device, exact)
            x, calls = sample.contiguous(), []
            for call in reversed(range(self.sampler.plan.calls)):
                x, needed = self._step(loop, table, x, call, given)
                calls.append(needed)
        return FixedPoint(x.clone(), tuple(reversed(calls)))

    def _step(self, loop: Loop, table: Tensor, target: Tensor, call: int, given: Mapping) -> tuple[Tensor, int]:
        """(the sample before ``call`` that becomes ``target``, calls of the model)."""
        for observer in self.sampler.observers:
            observer.begin_step(call, self.sampler.plan.calls)
        x, changed = target, math.inf
        for needed in range(1, self.max_calls + 1):
            loop.restore(CallState(x), call, None)
            output, other = loop.split(self.sampler.denoiser(loop.input, loop.time_of(call), **given), call)
            new = PF.sampler_step(
                x, output, table, loop.rows[call], unconditional=other, base=target, backend=loop.setting.backend
            )
            changed = _share(new - x, new)
            x = new
            if changed <= self.tolerance:
                return x, needed
            if not math.isfinite(changed):
                break
        where = f"step {call} of {self.sampler.plan.calls} (time {self.sampler.times[call]:g})"
        raise ValueError(
            f"sampler: {where} cannot be inverted to tolerance {self.tolerance:g}: after {needed} calls of the model x "
            f"still changes by {changed:.3g}; more steps or less guidance make it easier"
        )


def _share(change: Tensor, x: Tensor) -> float:
    """The largest change of a sample, as a share of its root mean square."""
    if not x.numel():
        return 0.0
    size = x.flatten(1).float().square().mean(1).sqrt().clamp(min=1e-12) if x.dim() > 1 else x.float().abs()
    most = change.flatten(1).float().abs().amax(1) if x.dim() > 1 else change.float().abs()
    return float((most / size).max())


def _check(sampler: Sampler) -> None:
    plan, solver = sampler.plan, sampler.solver
    if plan.needs_noise:
        raise ValueError(f"sampler: {solver.name} adds noise, which nothing can take back; expected eta=0")
    if plan.start is not None or plan.predictions != 1 or bool((plan.table[:, list(_MEMORY)] != 0).any()):
        raise ValueError(
            f"sampler: a step of {solver.name} depends on more than the sample; expected a solver such as DDIM or Euler"
        )
    if sampler.conversion.limits:
        raise ValueError("sampler: clip and dynamic_threshold cannot be inverted")
    for observer in sampler.observers:
        if not hasattr(observer, "graph_key") or getattr(observer, "changes_sample", False):
            raise ValueError(f"observers: {type(observer).__name__} may not bear calls in another order")


def _inverse(plan: Plan) -> Tensor:
    """One row for every call: the next guess of x from the last one (sample), x' (base) and the output."""
    table = torch.zeros_like(plan.table)
    scales = [level.alpha for level in plan.levels]
    for call, row in enumerate(plan.table):
        on_x = row[C.SAMPLE] + row[C.M] * (row[C.M_SAMPLE] + row[C.M_X0] * row[C.X0_SAMPLE])
        on_output = row[C.OUTPUT] + row[C.M] * (row[C.M_OUTPUT] + row[C.M_X0] * row[C.X0_OUTPUT])
        after = scales[call + 1] if call + 1 < plan.calls else 1.0
        gain = scales[call] / after
        table[call, C.SAMPLE], table[call, C.BASE], table[call, C.OUTPUT] = 1 - gain * on_x, gain, -gain * on_output
    table[:, C.CLIP], table[:, C.SLOT] = math.inf, -1
    table[:, C.GUIDANCE] = table[:, C.INPUT_SCALE] = 1.0
    return table
