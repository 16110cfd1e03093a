"""Data consistency: a denoiser whose predicted clean samples agree with a measurement.

Source: Wang, Yu and Zhang, "Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model", ICLR 2023; for
magnetic resonance images it is the data-consistency layer of Schlemper et al., 2017, in every step of a sampler.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pydenoise.samplers._level_table import LevelTable, over_samples
from pydenoise.samplers.levels import NoiseSchedule
from pydenoise.samplers.operators import LinearOperator, check_operator
from pydenoise.samplers.plan import Conversion


class DataConsistency:
    """``denoiser`` with x0 replaced by x0 + weight H^+ (y - H x0), for any ``Sampler`` on the same schedule.

    Call it as ``denoiser(x, t, measurement=y, **conditioning)``: in a sampler, ``conditioning={"measurement": y}``, one
    for each sample or one for all; with guidance in ``unconditional`` too. With weight 1 and an exact pseudo-inverse a
    sampler that ends at a clean sample returns one with H x = H H^+ y. For a noisy y a lower weight takes less of it
    over. A ``clip`` of the sampler is applied afterwards.

    Args:
        denoiser: ``denoiser(x, t, **conditioning) -> output`` like x.
        schedule: that of the sampler; not "residual".
        operator: H, of the samples themselves.
        prediction_type: what the denoiser returns, and so this one; give the sampler the same.
        weight: from 0 (the denoiser alone) to 1.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        schedule: NoiseSchedule,
        operator: LinearOperator,
        *,
        prediction_type: str = "epsilon",
        weight: float = 1.0,
    ):
        if not callable(denoiser):
            raise TypeError(f"denoiser: expected a callable, got {type(denoiser).__name__}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule: expected a NoiseSchedule, got {type(schedule).__name__}")
        if schedule.kind == "residual":
            raise ValueError("schedule: solvers of kind 'residual' know the measurement themselves")
        conversion = Conversion(prediction_type)
        if prediction_type == "epsilon" and schedule.last.alpha == 0:
            raise ValueError("prediction_type: 'epsilon' says nothing of x0 at this schedule's last level, pure noise")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"weight: expected a number, got {type(weight).__name__}")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight: expected a number from 0 to 1, got {weight}")
        self.denoiser, self.schedule, self.operator = denoiser, schedule, check_operator(operator)
        self.prediction_type, self.weight = conversion.prediction_type, float(weight)
        self._levels = LevelTable(schedule)

    def __call__(self, x: Tensor, t: Tensor | float, *, measurement: Tensor, **conditioning: object) -> Tensor:
        """The denoiser's output for x [B, ...] at the times t ([B], one, or a number), corrected."""
        if not isinstance(measurement, Tensor):
            raise TypeError(f"measurement: expected a tensor, got {type(measurement).__name__}")
        if measurement.dim() < 1 or measurement.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"measurement: expected {x.shape[0]} or 1 of them, got {tuple(measurement.shape)}")
        output = self.denoiser(x, t, **conditioning)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            raise ValueError(f"denoiser: expected shape {tuple(x.shape)}, got {getattr(output, 'shape', output)}")
        times = torch.as_tensor(t, device=x.device).reshape(-1).expand(x.shape[0])
        on_sample, on_output = self._x0(*self._levels(times))
        x0 = over_samples(on_sample, x) * x + over_samples(on_output, x) * output.to(x.dtype)
        image = self.operator(x0)
        if measurement.shape[1:] != image.shape[1:]:
            raise ValueError(f"measurement: expected [B, *{tuple(image.shape[1:])}], got {tuple(measurement.shape)}")
        change = self.operator.pinv(measurement.to(image.dtype) - image)
        # At a level without noise x is x0 whatever the output is, and nothing can be changed.
        gain = torch.where(on_output == 0, 0.0, self.weight / torch.where(on_output == 0, 1.0, on_output))
        return output + (over_samples(gain, x) * change).to(output.dtype)

    def _x0(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of x0 on (x, output): ``Conversion.x0`` of tensors."""
        if self.prediction_type == "epsilon":
            return 1 / alpha, -sigma / alpha
        if self.prediction_type == "sample":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.prediction_type == "v_prediction":
            norm = alpha**2 + sigma**2
            return alpha / norm, -sigma / norm
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
