"""A plan's rows applied one by one to samples that somebody else's loop holds, as a diffusers pipeline does."""

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise.samplers._loop import NO_FAULT, Loop, Setting
from pydenoise.samplers._output_pool import OutputPool
from pydenoise.samplers.levels import NoiseSchedule
from pydenoise.samplers.plan import Control, Conversion, Plan, Run, Solver

# Bytes of a sample. Below, a prepared step on static buffers and two copies cost less than the checks of the op, on a
# CPU; above, the step reads and writes the caller's tensors.
STATIC_BELOW = 256 * 1024
LOOPS = 4  # sets of buffers that are kept


class Stepper:
    """The steps of one plan. Samples come from outside and every result is a tensor of its own."""

    def __init__(
        self,
        plan: Plan,
        schedule: NoiseSchedule,
        solver: Solver,
        conversion: Conversion,
        *,
        quantile: float | None = None,
        most: float = 1.0,
        backend: str = "auto",
    ):
        if plan.start is not None or plan.predictions != 1:
            raise ValueError(
                f"solver: {solver.name} begins at a degraded sample or has a model with two predictions, which "
                "pipelines of diffusers do not know; use pydenoise.samplers.Sampler"
            )
        self.plan, self.schedule, self.solver, self.conversion = plan, schedule, solver, conversion
        self._setting = Setting(
            plan=plan, times=plan.times, guidance=None, first_input_scale=1.0, quantile=quantile, most=most,
            model_dtype=None, kind=schedule.kind, check_finite=True, learned_variance=plan.learned_variance,
            backend=backend,
        )  # fmt: skip
        self._pool, self._loops = OutputPool(), {}
        self._loop: Loop | None = None

    @property
    def controlled(self) -> bool:
        """Whether the solver may have more to it than its table."""
        return type(self.solver).control is not Solver.control

    def set_keys(self, keys: Tensor) -> None:
        """The keys of generated noise from here on."""
        self._loop.keys.copy_(keys)

    def begin(self, sample: Tensor, keys: Tensor | None, preview: bool) -> None:
        """Forget the last run; ``keys`` [B, 2] are those of generated noise."""
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        run = Run(self.plan, self.schedule, self.conversion, sample.shape, dtype, sample.device)
        control = self.solver.control(run)
        if control is not None and type(control).time is not Control.time:
            raise ValueError(
                f"solver: {self.solver.name} chooses the times that the model is told from the samples, which a "
                "pipeline of diffusers does not let it do; use pydenoise.samplers.Sampler"
            )
        several = control is not None or self._setting.quantile is not None  # launches a step, on the same buffers
        self._loop = loop = self._loop_for(sample, keys is not None, preview or several)
        loop.begin(sample, keys)
        self._launch = PF.StepLauncher(
            PF.StepBuffers(
                loop.sample, loop.table, loop.sample, base=loop.base, history=loop.history, keys=loop.keys,
                kept=loop.base, learned_variance=self.plan.learned_variance,
            ),
            loop.faults, self._setting.backend,
        )  # fmt: skip
        small = sample.device.type == "cpu" and sample.numel() * sample.element_size() < STATIC_BELOW
        self._static, self._control = several or small, control or Control()
        self._plain = small and not several

    def _loop_for(self, sample: Tensor, noisy: bool, preview: bool) -> Loop:
        key = (sample.shape, sample.dtype, sample.device, noisy, preview, torch.get_num_threads())
        loop = self._loops.pop(key, None)
        if loop is None:
            while len(self._loops) >= LOOPS:
                self._loops.pop(next(iter(self._loops)))
            with torch.inference_mode(False):  # buffers that later runs may write to, inside of it or not
                loop = Loop(self._setting, sample, noisy, preview)
        self._loops[key] = loop
        return loop

    def step(self, call: int, output: Tensor, sample: Tensor, noise: Tensor | None, preview: bool):
        """(x', x0 or None) of row ``call``; ``noise`` instead of generated noise."""
        self._check(output, sample)
        static = self._static and not (preview and self._loop.preview is None)
        out, x0, finite = (self._on_buffers if static else self._on_tensors)(call, output, sample, noise, preview)
        if not finite:
            raise ValueError(
                f"model_output: the sample is not finite after step {call} of {self.plan.calls} "
                f"(time {self.plan.times[call]:g}): it holds NaN, infinity or too large numbers"
            )
        return out, x0

    def _check(self, output: Tensor, sample: Tensor) -> None:
        own = self._loop.sample
        if sample.shape != own.shape or sample.dtype != own.dtype or sample.device != own.device:
            raise ValueError(
                f"sample: expected {own.dtype} {tuple(own.shape)} on {own.device}, as in the run's first step, got "
                f"{sample.dtype} {tuple(sample.shape)} on {sample.device}"
            )
        shape = own.shape
        if self.plan.learned_variance:
            shape = torch.Size((shape[0], 2 * shape[1], *shape[2:]))
        if output.shape != shape:
            raise ValueError(f"model_output: expected shape {tuple(shape)}, got {tuple(output.shape)}")

    def _on_buffers(self, call: int, output: Tensor, sample: Tensor, noise: Tensor | None, preview: bool):
        loop = self._loop
        loop.sample.copy_(sample)
        if self._plain and noise is None:
            finite = loop.bound.run(output, None, call, call + 1)
        else:
            self._control.apply(call, loop.launcher(call, output, None, None if noise is None else {call: noise}))
            finite = self._finite()
        return self._pool.copy(loop.sample), self._pool.copy(loop.preview) if preview else None, finite

    def _on_tensors(self, call: int, output: Tensor, sample: Tensor, noise: Tensor | None, preview: bool):
        loop, out = self._loop, self._pool.take(sample)
        x0 = self._pool.take(sample) if preview else None
        self._launch(
            output, None, loop.rows[call], loop.steps[call], noise=noise, sample=sample.contiguous(), out=out,
            preview=x0,
        )  # fmt: skip
        return out, x0, self._finite()

    def _finite(self) -> bool:
        """Whether all was, on a CPU; a device is not waited for."""
        return self._loop.device.type != "cpu" or int(self._loop.faults) == NO_FAULT
