"""The buffers of a run and the calls of its model, on a CPU or one after the other on a device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise import step_row as C
from pydenoise.samplers._graph import Graphs
from pydenoise.samplers._noise import START_CALL, degraded_start
from pydenoise.samplers.plan import Control, Plan, Run

NO_FAULT = 2**31 - 1


@dataclass(frozen=True)
class Setting:
    """What a sampler is, without its denoiser: all that its buffers depend on."""

    plan: Plan
    times: tuple[float, ...]
    guidance: tuple[float, ...] | None
    first_input_scale: float
    quantile: float | None  # of dynamic thresholding
    most: float
    model_dtype: torch.dtype | None
    kind: str
    check_finite: bool
    learned_variance: bool  # the model's output has twice the channels
    backend: str


@dataclass(frozen=True)
class State:
    """What an observer that ``changes_sample`` is given for a run: the buffers, which it may write to before and while
    the model runs, and what is done with them.

    Args:
        sample: x [B, ...], the state itself.
        input: what the model is called with; may be ``sample``.
        keys: int64 [B, 2], of noise.
        table: the rows with guidance, on the sample's device.
        input_scales: what x is multiplied by to be the model's input, for each call.
    """

    run: Run
    sample: Tensor
    input: Tensor
    keys: Tensor
    table: Tensor
    input_scales: tuple[float, ...]
    backend: str


@dataclass
class CallState:
    """What a call of the model begins with, or the gradients with respect to it.

    Args:
        sample: [B, ...].
        base: the saved sample [B, ...], for solvers that have one.
        history: [slots, B, ...], for solvers that have one.
    """

    sample: Tensor
    base: Tensor | None = None
    history: Tensor | None = None

    def map(self, function) -> "CallState":
        """``function`` of each tensor."""
        return CallState(*(None if t is None else function(t) for t in (self.sample, self.base, self.history)))


class Loop:
    """Static tensors for samples like ``x``, and the step between two calls of the model."""

    def __init__(self, setting: Setting, x: Tensor, noisy: bool, preview: bool):
        plan = setting.plan
        self.setting, self.device = setting, x.device
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        table = plan.table.clone()
        if setting.guidance is not None:
            table[:, C.GUIDANCE] = torch.tensor(setting.guidance, dtype=torch.float64)
        self.table = table.to(exact).to(x.device)
        self.sample = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.history = self.sample.new_zeros(plan.slots, *x.shape) if plan.slots else None
        self.base = torch.empty_like(self.sample) if plan.uses_base else None
        self.preview = torch.empty_like(self.sample) if preview else None
        self.keys = torch.empty(x.shape[0], 2, dtype=torch.int64, device=x.device) if noisy else None
        self.copies = 1 if setting.guidance is None else 2
        self.model_input = self._model_input(x)
        self.input = self.sample if self.model_input is None else self.model_input
        self._output_shape = self.input.shape
        if (setting.learned_variance or plan.predictions == 2) and x.dim() > 1:
            batch, channels, *rest = self.input.shape
            self._output_shape = torch.Size((batch, 2 * channels, *rest))
        self.times = self._times(x)
        self._time_rows = self.times.unbind(0)
        numbers = torch.arange(plan.calls + 1, device=x.device)
        self.rows, self.steps = numbers[:-1].split(1), numbers[1:].split(1)
        self.faults = torch.full((1,), NO_FAULT, dtype=torch.int32, device=x.device)
        self._threshold = _Threshold(setting, self) if setting.quantile is not None else None
        buffers = self._buffers()
        prepared = x.device.type == "cpu" and self._threshold is None
        self.bound = PF.bind_sampler_step(buffers, setting.backend) if prepared else None
        self._launch = PF.StepLauncher(buffers, self.faults, setting.backend)
        self._graphs = Graphs(self)

    def _model_input(self, x: Tensor) -> Tensor | None:
        setting = self.setting
        scaled = setting.first_input_scale != 1 or bool((setting.plan.table[:, C.INPUT_SCALE] != 1).any())
        dtype = setting.model_dtype or x.dtype
        if self.copies == 1 and not scaled and dtype == x.dtype:
            return None
        return torch.empty((self.copies * x.shape[0], *x.shape[1:]), dtype=dtype, device=x.device)

    def _times(self, x: Tensor) -> Tensor:
        """[calls, batch of the model]; whole numbers of a discrete schedule as int64."""
        times = torch.tensor(self.setting.times, dtype=torch.float64)
        whole = self.setting.kind in ("vp", "residual") and bool((times == times.round()).all())
        dtype = torch.int64 if whole else torch.float64 if x.dtype == torch.float64 else torch.float32
        return times.to(dtype).to(x.device)[:, None].expand(-1, self.copies * x.shape[0]).contiguous()

    def _buffers(self) -> PF.StepBuffers:
        return PF.StepBuffers(
            self.sample, self.table, self.sample, base=self.base, history=self.history, keys=self.keys, kept=self.base,
            preview=self.preview, model_input=self.model_input, learned_variance=self.setting.plan.learned_variance,
        )  # fmt: skip

    def begin(self, x: Tensor, keys: Tensor | None, noise: Mapping[int, Tensor] | None = None) -> None:
        """Everything as before the first call; a restoration's start from the degraded ``x``."""
        self.sample.copy_(x)
        if self.base is not None:
            self.base.copy_(x)
        if self.history is not None:
            self.history.zero_()
        if self.keys is not None:
            self.keys.copy_(keys)
        start = self.setting.plan.start
        if start is not None:
            given = None if noise is None else noise[START_CALL]
            degraded_start(self.base, start, self.keys, given, self.sample, self.setting.backend)
        self._fill_input(self.sample, 0)
        self.faults.fill_(NO_FAULT)

    def _fill_input(self, x: Tensor, call: int) -> None:
        if self.model_input is not None:
            parts = self.model_input.view(self.copies, *x.shape)
            parts.copy_((x * self.input_scale(call)).expand(parts.shape))

    def input_scale(self, call: int) -> float:
        """What the sample is multiplied by to be the model's input at ``call``."""
        return float(self.setting.plan.table[call - 1, C.INPUT_SCALE]) if call else self.setting.first_input_scale

    def time_of(self, call: int) -> Tensor:
        """The times that the model is told at ``call``."""
        return self._time_rows[call]

    def snapshot(self) -> CallState:
        """A copy of what the next call begins with."""
        return CallState(self.sample, self.base, self.history).map(Tensor.clone)

    def restore(self, state: CallState, call: int, keys: Tensor | None) -> None:
        """Everything as ``snapshot`` found it before ``call``."""
        own = (self.sample, self.base, self.history, self.keys)
        for buffer, kept in zip(own, (state.sample, state.base, state.history, keys), strict=True):
            if buffer is not None:
                buffer.copy_(kept)
        self._fill_input(state.sample, call)
        self.faults.fill_(NO_FAULT)

    def state(self, run: Run) -> State:
        """What an observer that ``changes_sample`` is given."""
        setting = self.setting
        scales = (setting.first_input_scale, *setting.plan.table[:-1, C.INPUT_SCALE].tolist())
        return State(run, self.sample, self.input, self.keys, self.table, scales, setting.backend)

    def graph_of(self, wanted: bool | None, observers: Sequence, control: Control | None, noise) -> bool:
        """Whether the calls run as a captured graph; raises where that is asked for and cannot be."""
        reason = None
        if self.device.type != "cuda":
            reason = f"the sample is on {self.device.type}"
        elif control is not None:
            reason = "this solver's coefficients depend on the data of each step"
        elif noise is not None:
            reason = "noise is given from outside"
        elif any(getattr(observer, "changes_sample", False) for observer in observers):
            reason = "an observer changes the sample"
        elif not all(hasattr(observer, "graph_key") for observer in observers):
            reason = "an observer has no graph_key"
        if wanted and reason is not None:
            raise ValueError(f"graph: no CUDA graph, because {reason}")
        return reason is None and wanted is not False

    def run(
        self,
        denoiser: Callable[..., Tensor],
        conditions: Mapping[str, object],
        noise: Mapping[int, Tensor] | None,
        control: Control,
        observers: Sequence,
        after: Callable[[int], None],
        graphed: bool,
        part: range | None = None,
    ) -> None:
        """Every call, or those of ``part``; ``after`` is called with its number."""
        calls = self.setting.plan.calls
        step = self._graphs.step(denoiser, conditions, observers) if graphed else None
        plain = type(control) is Control and noise is None and self.bound is not None
        for call in range(calls) if part is None else part:
            for observer in observers:
                observer.begin_step(call, calls)
            if step is not None:
                step(call)
                after(call)
                continue
            given = control.time(call)
            t = self._time_rows[call] if given is None else self._own_times(given)
            output, other = self.split(denoiser(self.input, t, **conditions), call)
            if plain:
                finite = self.bound.run(output, other, call, call + 1)
            else:
                control.apply(call, self.launcher(call, output, other, noise))
                finite = self.device.type != "cpu" or int(self.faults) == NO_FAULT
            if not finite and self.setting.check_finite:
                raise ValueError(self._fault(call))
            after(call)
        if self.device.type != "cpu" and self.setting.check_finite and (bad := int(self.faults)) != NO_FAULT:
            raise ValueError(self._fault(bad - 1))

    def _fault(self, call: int) -> str:
        where = f"call {call} of {self.setting.plan.calls} (time {self.setting.times[call]:g})"
        return f"denoiser: the sample is not finite after {where}: it returned NaN, infinity or too large numbers"

    def _own_times(self, t: Tensor) -> Tensor:
        t = t.to(self.times.dtype)
        return t if self.copies == 1 else torch.cat([t] * self.copies)

    def split(self, output: Tensor, call: int) -> tuple[Tensor, Tensor | None]:
        """(conditional, unconditional or None) halves of the model's output, checked."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"denoiser: expected a tensor at call {call}, got {type(output).__name__}; pydenoise.samplers.adapters "
                "has wrappers"
            )
        if output.shape != self._output_shape:
            wanted, got = tuple(self._output_shape), tuple(output.shape)
            raise ValueError(f"denoiser: expected shape {wanted} at call {call}, got {got}")
        if not output.is_floating_point():
            raise TypeError(f"denoiser: expected a floating-point tensor at call {call}, got {output.dtype}")
        if output.dtype == torch.float64 and self.sample.dtype != torch.float64:
            raise TypeError(f"denoiser: float64 at call {call} for a sample of {self.sample.dtype}")
        if self.setting.learned_variance and not self.setting.plan.learned_variance:
            output = output[:, : self.input.shape[1]]
        if self.setting.plan.predictions == 2:
            first, second = output.chunk(2, 1)
            return first, second
        if self.copies == 1:
            return output, None
        batch = self.sample.shape[0]
        return output[batch:], output[:batch]

    def launcher(self, call: int, output: Tensor, other: Tensor | None, noise) -> Callable[..., Tensor]:
        z = None if noise is None else noise.get(call)

        given = (output, other)

        def launch(rows=None, table=None, output=True, statistics="none", noise=None, out=None) -> Tensor:
            rows = self.rows[call] if rows is None else rows
            if table is not None and output and self.setting.guidance is not None:
                table = table.clone()
                table[:, C.GUIDANCE] = self.setting.guidance[call]
            both = given if output else (None, None)
            given_noise = z if noise is None else noise
            return self.launch(rows, self.steps[call], *both, table, given_noise, statistics, out)

        return launch

    def launch(self, rows, step, output, other, table=None, noise=None, statistics="none", out=None) -> Tensor | None:
        """One ``sampler_step`` on the buffers; nothing here waits for a device."""
        threshold = None
        if self._threshold is not None and output is not None:
            threshold = self._threshold(table, rows, step, output, other)
        return self._launch(
            output, other, rows, step, table=table, noise=noise, threshold=threshold, statistics=statistics, out=out
        )


class _Threshold:
    """Dynamic thresholding: the quantile of |x0| in every sample (Saharia et al., 2022, section 2.3)."""

    def __init__(self, setting: Setting, loop: Loop):
        self._loop, self._quantile, self._most = loop, setting.quantile, setting.most
        self._table = self._of(loop.table)
        self._x0, self._nothing = torch.empty_like(loop.sample), torch.empty_like(loop.sample)

    @staticmethod
    def _of(table: Tensor) -> Tensor:
        """Rows that compute x0 and nothing else."""
        own = torch.zeros_like(table)
        for column in (C.GUIDANCE, C.X0_SAMPLE, C.X0_OUTPUT, C.CLIP):
            own[:, column] = table[:, column]
        own[:, C.SLOT] = -1
        return own

    def __call__(
        self, table: Tensor | None, rows: Tensor, step: Tensor, output: Tensor, other: Tensor | None
    ) -> Tensor:
        loop, own = self._loop, self._table if table is None else self._of(table)
        PF.sampler_step(
            loop.sample, output, own, rows, unconditional=other, step=step, out=self._nothing,
            learned_variance=loop.setting.plan.learned_variance, preview=self._x0, backend=loop.setting.backend,
        )  # fmt: skip
        exact = torch.float64 if loop.sample.dtype == torch.float64 else torch.float32
        values = self._x0.flatten(1).abs().to(exact).sort(1).values
        place = self._quantile * (values.shape[1] - 1)
        low = int(place)
        high = min(low + 1, values.shape[1] - 1)
        return torch.lerp(values[:, low], values[:, high], place - low).clamp(1.0, self._most)
