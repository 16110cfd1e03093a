"""TimestepScales: the scales of all layers that have one per range of timesteps, switched in one place."""

import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pydenoise.nn._int8 import Int8Layer
from pydenoise.quantization import TimestepBuckets
from pydenoise.quantization.numbers import HIGH, LOW

PER_TIMESTEP = "per_timestep"


class TimestepScales(nn.Module):
    """The current scales and zero points of a model's "per_timestep" layers.

    Every such layer keeps its own table [buckets]. This module holds one flat buffer, whose 0-d views are what the
    layers' kernels read when they run; :meth:`select` copies the row of a timestep into it. The addresses never change,
    so a captured CUDA graph and a CPU recording serve every step. Make it a submodule of the model, and call
    :meth:`select` before the model's layers.

    Until the first :meth:`select`, and for a batch whose timesteps fall into several buckets, each layer gets the scale
    and zero point of the union of the ranges: never too narrow, but coarser.

    Args:
        model: the module that holds the layers, or the layers themselves.
        timesteps: the buckets of the tables.

    Raises:
        TypeError, ValueError: ``timesteps`` is no TimestepBuckets, or a layer's table has another number of buckets.
    """

    def __init__(self, model: nn.Module | Iterable[nn.Module], timesteps: TimestepBuckets):
        super().__init__()
        if not isinstance(timesteps, TimestepBuckets):
            raise TypeError(f"timesteps: expected TimestepBuckets, got {type(timesteps).__name__}")
        modules = model.modules() if isinstance(model, nn.Module) else model
        self.timesteps = timesteps
        # In a plain list: the layers belong to the model.
        self.__dict__["_layers"] = [module for module in modules if isinstance(module, Int8Layer)]
        self.__dict__["_current"] = None
        self._drop()
        self.training = False
        self._check_tables()

    def _drop(self) -> None:
        """Forget what :meth:`refresh` made, but for the memory of the current row: recordings read it."""
        self.__dict__.update(_timed=None, _tables=None, _edges=None)

    def _check_tables(self) -> None:
        for layer in self._layers:
            if layer.scheme.granularity == PER_TIMESTEP and layer.scheme.buckets != len(self.timesteps):
                raise ValueError(
                    f"timesteps: has {len(self.timesteps)} buckets, and the layer {layer} a table of "
                    f"{layer.scheme.buckets}"
                )

    # -------------------------------------------------------------------------------------------------- selecting

    @torch.no_grad()
    def select(self, timestep: Tensor | float) -> None:
        """Give every layer the scale of ``timestep``: a number, 0-d, or [N], one for each image of the batch.

        On a GPU nothing waits for the values. Raises ``ValueError`` for NaN in a number or a CPU tensor.
        """
        if self._is_stale():
            self.refresh()
        if not self._timed or (isinstance(timestep, Tensor) and timestep.numel() == 0):
            return
        scale, zero_point = self._current
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            rows = torch.bucketize(timestep.detach().to(self._edges.device).flatten().double(), self._edges, right=True)
        else:
            rows = self.timesteps(timestep).flatten().unique().to(scale.device)
        new_scale, new_zero_point = self._merged(rows)
        scale.copy_(new_scale)
        zero_point.copy_(new_zero_point)

    def _merged(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) [layers] that cover the buckets ``rows``: the row itself where they agree."""
        scale, zero_point, symmetric = self._tables
        scale, zero_point = scale.index_select(0, rows), zero_point.index_select(0, rows)  # no wait for a GPU's rows
        if len(rows) == 1:
            return scale[0], zero_point[0]
        same = (scale == scale[0]).all(0) & (zero_point == zero_point[0]).all(0)
        low = ((LOW - zero_point) * scale).amin(0).clamp(max=0)
        high = ((HIGH - zero_point) * scale).amax(0).clamp(min=0)
        union = (high - low) / (HIGH - LOW)
        shift = torch.round(LOW - low / union).clamp(LOW, HIGH).to(torch.int32)
        union = torch.where(symmetric, scale.amax(0), union)
        shift = torch.where(symmetric, torch.zeros_like(shift), shift)
        return torch.where(same, scale[0], union), torch.where(same, zero_point[0], shift)

    # ---------------------------------------------------------------------------------------------------- attaching

    def _is_stale(self) -> bool:
        """Whether a layer was moved, copied or loaded since :meth:`refresh`."""
        return self._timed is None or any(
            layer._slot is None and layer.scheme.granularity == PER_TIMESTEP for layer in self._layers
        )

    def refresh(self) -> None:
        """Read the layers' tables anew.

        :meth:`select` does so after a move, a copy or ``load_state_dict``; only changes made to a table in place need
        this call.
        """
        self._check_tables()
        timed = [layer for layer in self._layers if layer.scheme.granularity == PER_TIMESTEP]
        self._drop()
        self.__dict__["_timed"] = timed
        if not timed:
            return
        devices = {layer.input_scale.device for layer in timed}
        if len(devices) > 1:
            raise ValueError(f"layers: expected all on one device, got {', '.join(map(str, devices))}")
        with torch.inference_mode(False), torch.no_grad():
            scale = torch.stack([layer.input_scale.clone() for layer in timed], dim=1)
            points = [layer.input_zero_point for layer in timed]
            zero_point = torch.stack(
                [torch.zeros_like(scale[:, 0], dtype=torch.int32) if p is None else p.clone() for p in points], dim=1
            )
            symmetric = torch.tensor([p is None for p in points], device=scale.device)
            edges = torch.tensor(self.timesteps.edges, dtype=torch.float64, device=scale.device)
            self.__dict__.update(_tables=(scale, zero_point, symmetric), _edges=edges)
            everything = self._merged(torch.arange(len(self.timesteps), device=scale.device))
            current = self._current
            if current is None or current[0].shape != scale[0].shape or current[0].device != scale.device:
                current = self.__dict__["_current"] = tuple(values.clone() for values in everything)
            for row, values in zip(current, everything, strict=True):
                row.copy_(values)
            for index, layer in enumerate(timed):
                layer._slot = (current[0][index], None if points[index] is None else current[1][index])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_timed": None, "_tables": None, "_current": None, "_edges": None}

    # --------------------------------------------------------------------------------------------------- checkpoints

    def get_extra_state(self) -> Tensor:
        """The buckets' edges as JSON in a uint8 tensor; the tables are in the layers' own state."""
        text = json.dumps({"edges": self.timesteps.edges})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Take over a checkpoint's buckets."""
        self.timesteps = TimestepBuckets(tuple(json.loads(bytes(state.cpu().tolist()).decode())["edges"]))
        self._drop()

    def extra_repr(self) -> str:
        return f"{len(self.timesteps)} buckets"
