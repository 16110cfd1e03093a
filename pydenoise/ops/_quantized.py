"""Argument checks and calling conventions that the int8 ops share."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_tensor

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
# Products whose sum always fits an int32: of int8 codes, and of weights with codes less a zero point (-255..255).
MAX_ACCUMULATED = (2**31 - 1) // (128 * 128)
MAX_ACCUMULATED_AFFINE = (2**31 - 1) // (128 * 255)


def call(op: str, torch_op: Callable, args: tuple, backend: str) -> object:
    """Run ``args`` on the row that ``backend`` selects; through the torch op where a graph is being made."""
    first = args[0]
    if torch.compiler.is_compiling() or type(first) not in _PLAIN_TENSORS or first.is_meta:
        return torch_op(*args, backend)
    return registry.select(op, backend, args).run(*args)


def check_codes(name: str, value: object, like: Tensor | None = None) -> None:
    """``value`` is an int8 tensor, on the device of ``like``."""
    check_tensor(name, value)
    if value.dtype != torch.int8:
        raise TypeError(f"{name}: expected dtype torch.int8, got {value.dtype}")
    _check_device(name, value, like)


def check_floats(name: str, value: object) -> None:
    """``value`` is a tensor of a dtype that kernels take, or of float64."""
    check_tensor(name, value)
    if value.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")


def _check_device(name: str, value: Tensor, like: Tensor | None) -> None:
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} (that of input), got {value.device}")


def optional_vector(name: str, value: object, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """``value`` as contiguous float32 of ``shape`` on ``like``'s device; ``None`` stays."""
    if value is None:
        return None
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    _check_device(name, value, like)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    return value.detach().float().contiguous()


def residual_of(value: object, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """``value`` checked as a residual of the output's ``shape``."""
    if value is None:
        return None
    check_tensor("residual", value)
    if value.dtype not in FLOATS:
        raise TypeError(f"residual: expected float32, bfloat16 or float16, got {value.dtype}")
    _check_device("residual", value, like)
    if tuple(value.shape) != shape:
        raise ValueError(f"residual: expected the output's shape {shape}, got {tuple(value.shape)}")
    return value.detach()


def values_are_known(tensor: Tensor) -> bool:
    """Whether looking at the values costs no wait for a device, no graph break, and no refusal of a recording."""
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack():
        return False
    return tensor.device.type == "cpu" and type(tensor) in _PLAIN_TENSORS


def scale_of(name: str, value: object, like: Tensor, shapes: dict[str, tuple[int, ...]]) -> Tensor:
    """``value`` as a float32 scale on ``like``'s device: 0-d, or of one of ``shapes`` (name of the granularity: shape).

    A number or a tensor of one element means one scale for the tensor. Values are checked for CPU tensors outside
    ``torch.compile`` (elsewhere the check would have to wait for the device): positive and finite.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a positive finite number, got {value}")
        return torch.full((), value, dtype=torch.float32, device=like.device)
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point scale, got {value.dtype}")
    _check_device(name, value, like)
    scale = value.detach().to(torch.float32)
    if scale.dim() and tuple(scale.shape) not in shapes.values():
        if scale.numel() != 1:
            allowed = ", ".join(f"{shape} ({kind})" for kind, shape in shapes.items())
            raise ValueError(
                f"{name}: expected one value{', or ' if shapes else ''}{allowed}, got {tuple(scale.shape)}"
            )
        scale = scale.reshape(())
    if values_are_known(scale) and scale.numel():
        check_positive(name, scale)
    return scale


def check_positive(name: str, scale: Tensor) -> None:
    """Every value is positive and finite."""
    if not (scale.dim() == 0 and 0 < scale.item() < math.inf) and not ((scale > 0) & (scale < math.inf)).all():
        bad = scale[~((scale > 0) & (scale < math.inf))].flatten()[0].item()
        raise ValueError(f"{name}: expected positive finite values, got {bad}")


def zero_point_of(name: str, value: object, scale: Tensor) -> Tensor | None:
    """``value`` as an int32 tensor of ``scale``'s shape; ``None`` for the int 0, which means symmetric."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not -128 <= value <= 127:
            raise ValueError(f"{name}: expected an int from -128 to 127, got {value}")
        return None if value == 0 else torch.full_like(scale, value, dtype=torch.int32)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an int or an integer tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {value.dtype}")
    _check_device(name, value, scale)
    if value.shape != scale.shape:
        if value.numel() != 1 or scale.dim():
            raise ValueError(f"{name}: expected the scale's shape {tuple(scale.shape)}, got {tuple(value.shape)}")
        value = value.reshape(())
    if values_are_known(value) and value.numel():
        low, high = (v.item() for v in torch.aminmax(value))
        if low < -128 or high > 127:
            raise ValueError(f"{name}: expected values from -128 to 127, got {low if low < -128 else high}")
    return value.detach().to(torch.int32)


def output_scale_of(out_dtype: torch.dtype, out_scale: object, out_zero_point: object, like: Tensor) -> tuple:
    """(out_scale, out_zero_point) as 0-d tensors where the output is int8; else both ``None``."""
    if out_dtype not in OUT_DTYPES:
        names = ", ".join(str(dtype) for dtype in OUT_DTYPES)
        raise ValueError(f"out_dtype: expected one of {names}, got {out_dtype!r}")
    if out_dtype != torch.int8:
        if out_scale is not None:
            raise ValueError(f"out_scale: belongs to out_dtype=torch.int8, got it with {out_dtype}")
        if not (isinstance(out_zero_point, int) and out_zero_point == 0):
            raise ValueError(f"out_zero_point: belongs to out_dtype=torch.int8, got it with {out_dtype}")
        return None, None
    if out_scale is None:
        raise ValueError("out_scale: expected a scale, since out_dtype is torch.int8; got None")
    scale = scale_of("out_scale", out_scale, like, {})
    return scale, zero_point_of("out_zero_point", out_zero_point, scale)


def check_plain(out_dtype: torch.dtype, scale: Tensor, **fused: object) -> None:
    """Nothing is fused into raw accumulators, and they have one scale."""
    if out_dtype != torch.int32:
        return
    if scale.dim():
        raise ValueError("out_dtype: torch.int32 gives raw accumulators, which need one input_scale for the tensor")
    for name, value in fused.items():
        if value is not None and value != "none":
            raise ValueError(f"{name}: torch.int32 outputs are the raw accumulators, nothing can be fused into them")


def check_accumulation(terms: int, affine: bool = False) -> None:
    """The sum of ``terms`` products fits the int32 accumulators; ``affine``: the input has zero points."""
    most = MAX_ACCUMULATED_AFFINE if affine else MAX_ACCUMULATED
    if terms > most:
        with_points = " with zero points" if affine else ""
        raise ValueError(
            f"weight: {terms} products per output{with_points} may overflow the int32 accumulators; at most {most} fit"
        )


def never(*args) -> None:
    """``unsupported`` of the reference rows: they run anything."""
    return None
