"""Checkpoints of this package's own networks: one safetensors file, all but the weights as JSON in its metadata."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pydenoise.models.weights import WeightsError

Network = TypeVar("Network", bound=nn.Module)


def write_checkpoint(
    path: str | Path, kind: str, model: nn.Module, metadata: Mapping[str, object], dtype: torch.dtype
) -> None:
    """``kind`` says what the file holds; ``metadata``: what JSON can hold; ``dtype``: that of the numbers."""
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
    save_file(state, str(path), {"format": kind} | {name: json.dumps(value) for name, value in metadata.items()})


def read_checkpoint(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """The weights in float32 and the metadata; :class:`WeightsError` if there is no undamaged file of this kind."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}
        if metadata.pop("format", None) != kind:
            raise WeightsError(f"{path}: the metadata do not say that it is a {kind}")
        return state, {name: json.loads(value) for name, value in metadata.items()}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not a safetensors file, or a damaged one ({error})") from error


def load_checkpoint(path: str | Path, kind: str, make: Callable[[dict], Network]) -> tuple[Network, dict]:
    """The network that ``make`` builds from the metadata, with the file's weights, in eval mode; and the metadata."""
    state, metadata = read_checkpoint(path, kind)
    if not all(value.isfinite().all() for value in state.values()):
        raise WeightsError(f"{path}: holds values that are not finite")
    try:
        model = make(metadata)
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{path}: the weights do not fit their sizes: {' '.join(str(error).split())[:300]}"
        ) from error
    return model.eval(), metadata
