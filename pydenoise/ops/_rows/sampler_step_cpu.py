"""CPU row of sampler_step, and its prepared step for loops: the C++ kernels of ``pydenoise._C``."""

import torch
from torch import Tensor

from pydenoise import _native
from pydenoise.ops._rows._cpu import FLOATS, unsupported, unsupported_floats
from pydenoise.ops.registry import Backend

_STATISTICS = {"none": 0, "moments": 1, "dots": 2}
_DTYPES = {dtype: number for number, dtype in enumerate(FLOATS)}  # as csrc/sampler_step/params.h numbers them


def _unsupported(sample: Tensor, output: Tensor | None, unconditional: Tensor | None, *args: object) -> str | None:
    if unconditional is not None and unconditional.dtype != output.dtype:
        return f"output is {output.dtype}, unconditional {unconditional.dtype}: they have to be of one dtype"
    return unsupported_floats(sample)


def _sampler_step(
    sample, output, unconditional, base, history, noise, threshold, table, rows, keys, step, learned_variance,
    statistics, out, kept, preview, model_input, faults,
):  # fmt: skip
    return torch.ops.pydenoise.sampler_step_cpu.default(
        sample, output, unconditional, base, history, noise, threshold, table, rows, keys, step, learned_variance,
        _STATISTICS[statistics], out, kept, preview, model_input, faults,
    )  # fmt: skip


class _Bound:
    """A prepared step: the compiled module keeps the addresses, this object the tensors that they belong to.

    ``run`` costs a microsecond or two beside the kernel. What it does not recognise goes through the op's checks.
    """

    __slots__ = ("_buffers", "_dtypes", "_shape", "_size", "_step")

    def __init__(self, row: Backend, buffers):
        self._buffers = b = buffers
        static = ("sample", "table", "out", "base", "history", "keys", "kept", "preview", "model_input")
        tensors = {name: getattr(b, name) for name in static}
        for name, tensor in tensors.items():
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, since a copy would not follow it")
            if tensor is not None and (reason := unsupported(tensor)) is not None:
                raise ValueError(f"{name}: {reason}")
        if b.table.dtype != torch.float32:
            raise TypeError(f"table: expected torch.float32, got {b.table.dtype}")
        self._shape, self._dtypes = b.sample.shape, _DTYPES
        if b.learned_variance:
            self._shape = torch.Size((self._shape[0], 2 * self._shape[1], *self._shape[2:]))
        self._size = self._shape[1:].numel()
        batch = b.sample.shape[0]
        fields = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
        fields |= {"state": _DTYPES[b.sample.dtype], "batch": batch, "size": b.sample.shape[1:].numel()}
        fields |= {"slots": 0 if b.history is None else b.history.shape[0], "table_rows": b.table.shape[0]}
        fields |= {"learned_variance": int(b.learned_variance), "input_dtype": 0, "copies": 0}
        if b.model_input is not None and batch > 0:
            fields |= {"input_dtype": _DTYPES[b.model_input.dtype], "copies": b.model_input.shape[0] // batch}
        self._step = _native.extension().module.SamplerStep(fields).run

    def run(self, output: Tensor | None, unconditional: Tensor | None, row: int, step: int) -> bool:
        """Row ``row`` of the table for everything; whether x' and m are finite."""
        if output is None:
            if unconditional is not None or self._buffers.learned_variance:
                raise ValueError("output: expected a tensor, since unconditional or learned_variance needs it")
            return self._step(0, 0, 0, 0, 0, row, step)
        dtype = self._dtypes.get(output.dtype)
        if dtype is None or output.shape != self._shape or not output.is_cpu or not output.is_contiguous():
            return self._run_checked(output, unconditional, row, step)
        if unconditional is None:
            return self._step(output.data_ptr(), self._size, 0, 0, dtype, row, step)
        if (
            unconditional.dtype != output.dtype
            or unconditional.shape != self._shape
            or not unconditional.is_cpu
            or not unconditional.is_contiguous()
        ):
            return self._run_checked(output, unconditional, row, step)
        return self._step(output.data_ptr(), self._size, unconditional.data_ptr(), self._size, dtype, row, step)

    def _run_checked(self, output: Tensor, unconditional: Tensor | None, row: int, step: int) -> bool:
        """With the op's own checks, and copies of what is not dense."""
        from pydenoise.ops.sampler_step import output_of

        b = self._buffers
        output = output_of("output", output, b.sample, b.learned_variance)
        unconditional = output_of("unconditional", unconditional, b.sample, b.learned_variance)
        dtype = _DTYPES[output.dtype]
        if unconditional is None:
            return self._step(output.data_ptr(), output.stride(0), 0, 0, dtype, row, step)
        if unconditional.dtype != output.dtype:
            raise TypeError(f"unconditional: expected dtype {output.dtype} (that of output), got {unconditional.dtype}")
        other = unconditional.data_ptr(), unconditional.stride(0)
        return self._step(output.data_ptr(), output.stride(0), *other, dtype, row, step)


ROWS = (Backend("sampler_step", "cpu", 100, _unsupported, _sampler_step, "bench/notes-samplers.md"),)
BINDERS = {"cpu": _Bound}
