"""One step of a sampler, fused: argument checks, the torch op, prepared steps for loops, and the backend rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise import step_row
from pydenoise.ops import registry
from pydenoise.ops._arguments import check_tensor
from pydenoise.ops._quantized import FLOATS, call, never, values_are_known
from pydenoise.ops.registry import Backend
from pydenoise.reference import sampler_step as reference

OP = "sampler_step"
STATISTICS = ("none", "moments", "dots")
MOST_COPIES = 3  # of the next model input

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "sampler_step(Tensor sample, Tensor? output, Tensor? unconditional, Tensor? base, Tensor(a!)? history, "
    "Tensor? noise, Tensor? threshold, Tensor table, Tensor rows, Tensor? keys, Tensor step, bool learned_variance, "
    "str statistics, Tensor(b!) out, Tensor(c!)? kept, Tensor(d!)? preview, Tensor(e!)? model_input, "
    "Tensor(f!)? faults, str backend) -> Tensor"
)


def sampler_step(
    sample: Tensor,
    output: Tensor | None,
    table: Tensor,
    rows: int | Tensor = 0,
    *,
    unconditional: Tensor | None = None,
    base: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    threshold: Tensor | None = None,
    learned_variance: bool = False,
    statistics: str = "none",
    out: Tensor | None = None,
    kept: Tensor | None = None,
    preview: Tensor | None = None,
    model_input: Tensor | None = None,
    faults: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One launch for all that a diffusion sampler does between two calls of its model.

    Guidance, conversion of the model's output, clipping, the write into the history, the linear combination, noise and
    the next model input, each as a row of ``table`` says; ``pydenoise/step_row.py`` has the columns and the formulas.
    A coefficient of exactly 0 leaves its tensor unread. Arithmetic is in float32.

    Args:
        sample: x, [B, ...]: float32, bfloat16 or float16; float64 runs on the reference.
        output: what the model returned, [B, ...] of any of these dtypes; [B, 2 C, ...] with ``learned_variance``;
            ``None`` where no model was called.
        table: float32 [R, 32], the coefficients; float64 for a float64 sample.
        rows: which row: an int, or int64 whose shape broadcasts to the leading dims of ``sample``: [B] a row for each
            sample, [B, C] for each sample and channel, [B, 1, F] for each frame of [B, C, F, ...].
        unconditional: as ``output``: the model without its condition; GUIDANCE is diffusers' guidance scale.
        base: as ``sample``: a second tensor the update may begin from.
        history: [K, B, ...] of the sample's dtype, K <= 6: outputs that were kept. Slot SLOT is overwritten.
        noise: as ``sample``: z from outside.
        seed: an int, samples then being numbered 0, 1, 2, ...; or int64 [B, 2], the seed and number of every sample, so
            that a sample keeps its noise whatever it is batched with. Philox4x32-10 by (seed, number, step, place): the
            same words on every backend. ``None`` without ``noise``: a table (on the CPU) with NOISE is refused.
        step: int or int64 [1]: other steps have other noise; the low 32 bits count.
        threshold: float32 [B]: x0 is clamped to [-t, t] and divided by t (dynamic thresholding) instead of clipped.
        learned_variance: the second half of the output's channels are v, in [-1, 1], between two log variances.
        statistics: "moments": sums of x' and its square for every group (those of ``rows``, at least one per sample);
            "dots": of m * m and m * history[k] (as it was).
        out: receives x'; may be ``sample``. Default: a new tensor.
        kept: receives the row's second combination, where one of its coefficients is not 0; may be ``base``.
        preview: receives x0, the predicted clean sample.
        model_input: [R B, ...] with R from 1 to 3, of any of the dtypes: receives INPUT_SCALE x', R times.
        faults: int32 [1]: becomes the step's number, if that is lower, where x' or m is not finite.
        backend: "auto" or one of "cpu", "triton", "cuda", "reference".

    Returns:
        x', or (x', float64 [groups, 2 or 1 + K]) with ``statistics``. No gradients.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    Source: the linear samplers of Song et al., https://arxiv.org/abs/2010.02502, Liu et al.,
    https://arxiv.org/abs/2202.09778, and Lu et al., https://arxiv.org/abs/2211.01095; Salmon et al. (2011) for Philox.
    """
    args = prepare(
        sample, output, table, rows, unconditional=unconditional, base=base, history=history, noise=noise, seed=seed,
        step=step, threshold=threshold, learned_variance=learned_variance, statistics=statistics, out=out, kept=kept,
        preview=preview, model_input=model_input, faults=faults,
    )  # fmt: skip
    sums = call(OP, torch.ops.pydenoise.sampler_step, args, backend)
    result = args[13]
    if out is not None and result is not out:
        result = out.copy_(result)
    return result if statistics == "none" else (result, sums)


def prepare(sample, output, table, rows=0, *, unconditional=None, base=None, history=None, noise=None, seed=None,
            step=0, threshold=None, learned_variance=False, statistics="none", out=None, kept=None, preview=None,
            model_input=None, faults=None) -> tuple:  # fmt: skip
    """Check everything and return the positional arguments of the rows."""
    check_tensor("sample", sample)
    if sample.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"sample: expected float32, bfloat16, float16 or float64, got {sample.dtype}")
    if sample.dim() < 1:
        raise ValueError("sample: expected [B, ...], got a 0-d tensor")
    if statistics not in STATISTICS:
        raise ValueError(f"statistics: expected one of {', '.join(STATISTICS)}, got {statistics!r}")
    tensors = {"sample": sample, "output": output, "unconditional": unconditional, "base": base, "noise": noise}
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors.values()):
        name = next(n for n, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad)
        raise ValueError(f"{name}: sampler_step has no gradients; call it under torch.no_grad()")
    table = _table_of(table, sample)
    rows = _rows_of(rows, sample, table)
    output = output_of("output", output, sample, learned_variance)
    unconditional = output_of("unconditional", unconditional, sample, learned_variance)
    if unconditional is not None and output is None:
        raise ValueError("unconditional: given without output")
    if learned_variance and output is None:
        raise ValueError("learned_variance: needs an output")
    base, noise = _like("base", base, sample), _like("noise", noise, sample)
    history = _history_of(history, sample)
    threshold = _threshold_of(threshold, sample)
    keys, step = keys_of(seed, sample), step_of(step, sample)
    if noise is None and keys is None and values_are_known(table) and bool((table[:, step_row.NOISE] != 0).any()):
        raise ValueError("seed: the table has noise: expected a seed, or noise")
    out = torch.empty_like(sample, memory_format=torch.contiguous_format) if out is None else _like("out", out, sample)
    for name, target in (("kept", kept), ("preview", preview)):
        written_like(name, target, sample)
    _model_input(model_input, sample)
    if faults is not None and (faults.dtype != torch.int32 or faults.shape != (1,) or faults.device != sample.device):
        raise ValueError(f"faults: expected int32 [1] on {sample.device}, got {faults.dtype} {tuple(faults.shape)}")
    return (sample.contiguous(), output, unconditional, base, history, noise, threshold, table, rows, keys, step,
            bool(learned_variance), statistics, out, kept, preview, model_input, faults)  # fmt: skip


def _table_of(table: object, sample: Tensor) -> Tensor:
    check_tensor("table", table)
    wanted = torch.float64 if sample.dtype == torch.float64 else torch.float32
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"table: expected {wanted}, got {table.dtype}")
    if table.dim() != 2 or table.shape[1] != step_row.WIDTH or table.shape[0] < 1:
        raise ValueError(f"table: expected [R, {step_row.WIDTH}] with R >= 1, got {tuple(table.shape)}")
    _same_device("table", table, sample)
    return table.to(wanted).contiguous()


def _same_device(name: str, value: Tensor, sample: Tensor) -> None:
    if value.device != sample.device:
        raise ValueError(f"{name}: expected device {sample.device} (that of sample), got {value.device}")


def _rows_of(rows: object, sample: Tensor, table: Tensor) -> Tensor:
    """int64 [G], contiguous, on the sample's device."""
    if not isinstance(rows, Tensor):
        if isinstance(rows, bool) or not hasattr(rows, "__index__"):
            raise TypeError(f"rows: expected an int or an int64 tensor, got {type(rows).__name__}")
        if not 0 <= int(rows) < table.shape[0]:
            raise ValueError(f"rows: expected a row from 0 to {table.shape[0] - 1}, got {int(rows)}")
        return torch.full((1,), int(rows), dtype=torch.int64, device=sample.device)
    if rows.dtype != torch.int64:
        raise TypeError(f"rows: expected dtype torch.int64, got {rows.dtype}")
    _same_device("rows", rows, sample)
    if rows.numel() and values_are_known(rows):
        low, high = (v.item() for v in torch.aminmax(rows))
        if low < 0 or high >= table.shape[0]:
            raise ValueError(f"rows: expected rows from 0 to {table.shape[0] - 1}, got {low if low < 0 else high}")
    if rows.numel() == 1 and rows.dim() <= 1:
        return rows.reshape(1)
    leading = tuple(sample.shape[: rows.dim()])
    if rows.dim() > sample.dim() or any(r not in (1, s) for r, s in zip(rows.shape, leading, strict=False)):
        raise ValueError(f"rows: {tuple(rows.shape)} does not broadcast to the leading dims of {tuple(sample.shape)}")
    return rows.expand(leading).reshape(-1).contiguous()


def output_of(name: str, value: object, sample: Tensor, learned_variance: bool) -> Tensor | None:
    """A model's output checked against the sample; copied only where a sample of it is not dense."""
    if value is None:
        return None
    check_tensor(name, value)
    if value.dtype not in FLOATS and not (value.dtype == torch.float64 and sample.dtype == torch.float64):
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {value.dtype}")
    if sample.dtype == torch.float64:
        value = value.double()
    _same_device(name, value, sample)
    shape = list(sample.shape)
    if learned_variance:
        if len(shape) < 2:
            raise ValueError("learned_variance: needs a sample [B, C, ...]")
        shape[1] *= 2
    if list(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    dense = value.is_contiguous() or (value.shape[0] > 0 and value[0].is_contiguous() and value.stride(0) >= 0)
    return value if dense else value.contiguous()


def _like(name: str, value: object, sample: Tensor) -> Tensor | None:
    if value is None:
        return None
    check_tensor(name, value)
    _same_device(name, value, sample)
    if value.dtype != sample.dtype:
        raise TypeError(f"{name}: expected dtype {sample.dtype} (that of sample), got {value.dtype}")
    if value.shape != sample.shape:
        raise ValueError(f"{name}: expected shape {tuple(sample.shape)}, got {tuple(value.shape)}")
    return value.contiguous()


def written_like(name: str, value: object, sample: Tensor) -> None:
    """A tensor that is written: as ``sample``, and contiguous, since a copy would not be seen."""
    if value is not None and _like(name, value, sample) is not value:
        raise ValueError(f"{name}: expected a contiguous tensor")


def _history_of(history: object, sample: Tensor) -> Tensor | None:
    if history is None:
        return None
    check_tensor("history", history)
    _same_device("history", history, sample)
    if history.dtype != sample.dtype:
        raise TypeError(f"history: expected dtype {sample.dtype} (that of sample), got {history.dtype}")
    if history.dim() != sample.dim() + 1 or history.shape[1:] != sample.shape or history.shape[0] > step_row.SLOTS:
        wanted = ", ".join(map(str, sample.shape))
        raise ValueError(f"history: expected [K <= {step_row.SLOTS}, {wanted}], got {tuple(history.shape)}")
    if not history.is_contiguous():
        raise ValueError("history: expected a contiguous tensor")
    return history


def _threshold_of(threshold: object, sample: Tensor) -> Tensor | None:
    if threshold is None:
        return None
    check_tensor("threshold", threshold)
    _same_device("threshold", threshold, sample)
    if threshold.shape != sample.shape[:1]:
        raise ValueError(f"threshold: expected shape ({sample.shape[0]},), got {tuple(threshold.shape)}")
    return threshold.to(torch.float64 if sample.dtype == torch.float64 else torch.float32).contiguous()


def keys_of(seed: object, sample: Tensor) -> Tensor | None:
    """int64 [B, 2]: seed and number of every sample."""
    if seed is None:
        return None
    batch = sample.shape[0]
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or tuple(seed.shape) != (batch, 2):
            raise ValueError(f"seed: expected int64 [{batch}, 2], got {seed.dtype} {tuple(seed.shape)}")
        _same_device("seed", seed, sample)
        return seed.contiguous()
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed: expected an int or int64 [B, 2], got {type(seed).__name__}")
    value = int(seed)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"seed: expected an int of 64 bits, got {value}")
    numbers = torch.arange(batch, device=sample.device)
    return torch.stack([torch.full_like(numbers, value - 2**64 if value >= 2**63 else value), numbers], 1)


def step_of(step: object, sample: Tensor) -> Tensor:
    """int64 [1] on the sample's device."""
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.numel() != 1:
            raise ValueError(f"step: expected an int or int64 [1], got {step.dtype} {tuple(step.shape)}")
        _same_device("step", step, sample)
        return step.reshape(1)
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise TypeError(f"step: expected an int or int64 [1], got {type(step).__name__}")
    if not 0 <= int(step) < 2**63:
        raise ValueError(f"step: expected an int from 0, got {int(step)}")
    return torch.full((1,), int(step), dtype=torch.int64, device=sample.device)


def _model_input(value: object, sample: Tensor) -> None:
    if value is None:
        return
    check_tensor("model_input", value)
    _same_device("model_input", value, sample)
    if value.dtype not in FLOATS and not (value.dtype == torch.float64 and sample.dtype == torch.float64):
        raise TypeError(f"model_input: expected float32, bfloat16 or float16, got {value.dtype}")
    batches = [copies * sample.shape[0] for copies in range(1, MOST_COPIES + 1)]
    if value.shape[1:] != sample.shape[1:] or value.dim() != sample.dim() or value.shape[0] not in batches:
        wanted = f"{tuple(sample.shape)} with 1 to {MOST_COPIES} times the batch"
        raise ValueError(f"model_input: expected {wanted}, got {tuple(value.shape)}")
    if not value.is_contiguous():
        raise ValueError("model_input: expected a contiguous tensor")


# ------------------------------------------------------------------------------------------------ torch op, fake kernel


def empty_statistics(sample: Tensor, rows: Tensor, history: Tensor | None, statistics: str) -> Tensor:
    """Uninitialised sums: float64 [groups, count]."""
    if statistics == "none":
        return sample.new_empty(0, 0, dtype=torch.float64)
    count = 2 if statistics == "moments" else 1 + (0 if history is None else history.shape[0])
    return sample.new_empty(max(rows.shape[0], sample.shape[0]), count, dtype=torch.float64)


@torch.library.impl(_library, "sampler_step", "CompositeExplicitAutograd")
def _run(*args):
    *args, backend = args
    return registry.select(OP, backend, tuple(args)).run(*args)


@torch.library.register_fake("pydenoise::sampler_step", lib=_library)
def _fake(sample, output, unconditional, base, history, noise, threshold, table, rows, keys, step, learned_variance,
          statistics, out, kept, preview, model_input, faults, backend):  # fmt: skip
    return empty_statistics(sample, rows, history, statistics)


# ------------------------------------------------------------------------------------------------------- prepared steps


@dataclass(frozen=True)
class Buffers:
    """The static tensors of a loop, each as the argument of the same name of ``sampler_step``, already prepared."""

    sample: Tensor
    table: Tensor
    out: Tensor
    base: Tensor | None = None
    history: Tensor | None = None
    keys: Tensor | None = None
    kept: Tensor | None = None
    preview: Tensor | None = None
    model_input: Tensor | None = None
    learned_variance: bool = False


class Bound:
    """A step on static buffers: ``run`` takes what changes from call to call. Any backend; see ``bind``."""

    def __init__(self, row: Backend, buffers: Buffers):
        self._row, self._buffers = row, buffers

    def run(self, output: Tensor | None, unconditional: Tensor | None, row: int, step: int) -> bool:
        """Row ``row`` of the table for everything; whether x' and m are finite."""
        b = self._buffers
        faults = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=b.sample.device)
        rows, number = (torch.full((1,), n, dtype=torch.int64, device=b.sample.device) for n in (row, step))
        output = output_of("output", output, b.sample, b.learned_variance)
        unconditional = output_of("unconditional", unconditional, b.sample, b.learned_variance)
        self._row.run(b.sample, output, unconditional, b.base, b.history, None, None, b.table, rows, b.keys, number,
                      b.learned_variance, "none", b.out, b.kept, b.preview, b.model_input, faults)  # fmt: skip
        return int(faults) == 2**31 - 1


class Launcher:
    """``sampler_step`` on static buffers with rows, statistics and tables that change from call to call.

    The buffers were checked where they were made, so a call checks what comes from outside: the model's output and
    given noise. ``rows`` (int64 [1], [B], [B, C], ...), ``step`` (int64 [1]) and ``table`` (as the buffers' own) are
    contiguous tensors on the buffers' device.
    """

    def __init__(self, buffers: Buffers, faults: Tensor | None = None, backend: str = "auto"):
        self._buffers, self._faults, self._backend = buffers, faults, backend
        self._rows: dict[tuple, Backend] = {}  # by what a backend's choice depends on and a call can change

    def __call__(
        self, output: Tensor | None, unconditional: Tensor | None, rows: Tensor, step: Tensor, *,
        table: Tensor | None = None, noise: Tensor | None = None, threshold: Tensor | None = None,
        statistics: str = "none", sample: Tensor | None = None, out: Tensor | None = None,
        preview: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The statistics, float64 [groups, count]; [0, 0] for "none".

        ``sample``, ``out`` and ``preview`` stand in for the buffers, and are contiguous tensors like them.
        """
        b = self._buffers
        sample, out = b.sample if sample is None else sample, b.out if out is None else out
        preview = b.preview if preview is None else preview
        output = output_of("output", output, b.sample, b.learned_variance)
        unconditional = output_of("unconditional", unconditional, b.sample, b.learned_variance)
        flat = rows if rows.dim() == 1 else rows.expand(b.sample.shape[: rows.dim()]).reshape(-1)
        args = (
            sample, output, unconditional, b.base, b.history, _like("noise", noise, b.sample), threshold,
            b.table if table is None else table, flat, b.keys if noise is None else None, step,
            b.learned_variance and output is not None, statistics, out, b.kept, preview, b.model_input,
            self._faults,
        )  # fmt: skip
        kind = (flat.shape[0], *(None if t is None else t.dtype for t in (output, unconditional)))
        row = self._rows.get(kind)
        if row is None:
            row = self._rows[kind] = registry.select(OP, self._backend, args)
        return row.run(*args)


def bind(buffers: Buffers, backend: str = "auto") -> Bound:
    """A prepared step for loops on a CPU; raises what ``sampler_step`` raises for a backend that cannot run."""
    b = buffers
    args = prepare(
        b.sample, None, b.table, base=b.base, history=b.history, seed=b.keys, out=b.out, kept=b.kept, preview=b.preview,
        model_input=b.model_input,
    )  # fmt: skip
    row = registry.select(OP, backend, args)
    return _BINDERS.get(row.name, Bound)(row, buffers)


_BINDERS: dict[str, Callable[[Backend, Buffers], Bound]] = {}

# --------------------------------------------------------------------------------------------------------- backend rows

registry.register(Backend(OP, "reference", 0, never, reference.sampler_step, "the fallback: always last"))

from pydenoise.ops._rows import sampler_step_cpu, sampler_step_cuda, sampler_step_triton  # noqa: E402

for _module in (sampler_step_cpu, sampler_step_cuda, sampler_step_triton):  # with ROWS and perhaps BINDERS
    for _row in _module.ROWS:
        registry.register(_row)
    _BINDERS.update(getattr(_module, "BINDERS", {}))
