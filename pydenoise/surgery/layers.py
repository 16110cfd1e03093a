"""Which layers have a fused form, and, for each that has none, the reason as a sentence."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from pydenoise.nn.weighted_conv import WeightedConv1d, WeightedConv2d, WeightedConv3d
from pydenoise.reference.activations import LEAKY_SLOPES, leaky_relu_name

CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_WEIGHTED = {WeightedConv1d: 1, WeightedConv2d: 2, WeightedConv3d: 3}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = {nn.BatchNorm1d: (1,), nn.BatchNorm2d: (2,), nn.BatchNorm3d: (3,)}
_ACTIVATION_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu"}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}
_QUANTIZED_PACKAGES = ("torch.ao.nn.quantized", "torch.ao.nn.qat", "torch.ao.nn.intrinsic", "torchao.")
# Other activations that may meet a convolution, named in the report.
OTHER_ACTIVATIONS = (
    nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.ReLU6, nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Softplus, nn.GLU,
)  # fmt: skip


def weighted_dims(module: nn.Module) -> int | None:
    """Spatial dimensions of a ``pydenoise.nn.WeightedConvNd``, else ``None``."""
    return _WEIGHTED.get(type(module))


def conv_dims(module: nn.Module) -> int | None:
    """Spatial dimensions of a convolution that may have a fused form, else ``None``."""
    for kind, dims in CONVOLUTIONS.items():
        if isinstance(module, kind):
            return dims
    return weighted_dims(module)


def hooks_reason(module: nn.Module) -> str | None:
    """Why ``module`` cannot be taken apart: something is attached to it that only its own call runs."""
    if parametrize.is_parametrized(module):
        return "has parametrizations, which compute its parameters anew at every call"
    stores = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, store, None) for store in stores):
        return "has hooks, which a fused layer would not call"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return None


def why_conv_stays(module: nn.Module, precision: torch.dtype) -> str | None:
    """Why the convolution ``module`` has no fused form, or ``None``."""
    kind = next((k for k in CONVOLUTIONS if isinstance(module, k)), None)
    if any(type(module).__module__.startswith(package) for package in _QUANTIZED_PACKAGES):
        return "is quantized"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) or any(
        isinstance(p, nn.parameter.UninitializedTensorMixin) for p in module.parameters(recurse=False)
    ):
        return "is lazy: its shape is not known before the first call"
    reason = hooks_reason(module)
    if reason is not None:
        return reason
    twin = type(module)
    if kind is not None and (twin.forward is not kind.forward or twin._conv_forward is not kind._conv_forward):
        return f"is a {twin.__name__} with a forward of its own"
    weight = module.weight
    if type(weight) not in (nn.Parameter, torch.Tensor):
        return f"its weight is a {type(weight).__name__}"
    if weight.device.type == "meta":
        return "its weight is on the meta device"
    allowed = (torch.float32, precision)
    if weight.dtype not in allowed:
        names = " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in allowed))
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}; this precision takes {names}"
    if 0 in weight.shape:
        return f"its weight is empty, of shape {tuple(weight.shape)}"
    return None


def why_norm_stays(module: nn.Module, dims: int, channels: int) -> str | None:
    """Why ``module`` cannot be folded into a ``dims``-dimensional convolution of ``channels``, or ``None``."""
    if _NORMS.get(type(module)) != (dims,):
        return "is no batch normalisation of the convolution's rank"
    reason = hooks_reason(module)
    if reason is not None:
        return reason
    if module.training:
        return "is in training mode"
    if module.running_mean is None or module.running_var is None:
        return "normalises by the statistics of each batch (track_running_stats=False)"
    if module.num_features != channels:
        return f"has {module.num_features} features after {channels} channels"
    return None


def module_activation(module: nn.Module) -> str | None:
    """The epilogue activation that ``module`` is, else ``None``."""
    if hooks_reason(module) is not None:
        return None
    if type(module) is nn.GELU:
        return _GELU.get(module.approximate)
    if type(module) is nn.LeakyReLU:
        return leaky_relu_name(module.negative_slope)
    return _ACTIVATION_MODULES.get(type(module))


def function_activation(target: object, args: tuple, kwargs: dict) -> str | None:
    """The epilogue activation that the call ``target(x, *args, **kwargs)`` is, else ``None``; ``args`` without x."""
    if target in (torch.relu, torch.relu_, F.relu_, "relu", "relu_"):
        return "relu" if not args and not kwargs else None
    if target in (F.relu, F.silu):
        return target.__name__ if len(args) + len(kwargs) <= 1 and set(kwargs) <= {"inplace"} else None
    if target is F.gelu:
        if len(args) + len(kwargs) > 1 or not set(kwargs) <= {"approximate"}:
            return None
        return _GELU.get(args[0] if args else kwargs.get("approximate", "none"))
    if target in (F.leaky_relu, F.leaky_relu_):
        if len(args) + len(kwargs) > 2 or not set(kwargs) <= {"negative_slope", "inplace"}:
            return None
        return leaky_relu_name(args[0] if args else kwargs.get("negative_slope", 0.01))
    return None


def is_identity(module: nn.Module) -> bool:
    """Whether ``module`` returns its input unchanged (in eval mode, for dropout)."""
    if hooks_reason(module) is not None:
        return False
    dropouts = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    return type(module) is nn.Identity or (type(module) in dropouts and not module.training)


def why_kept(module: nn.Module) -> str:
    """The reason why a layer that is no convolution is kept as it is."""
    name = type(module).__name__
    if isinstance(module, _TRANSPOSED):
        return "a transposed convolution has no fused form"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.training:
            return "a batch normalisation in training mode is not folded"
        if module.running_mean is None:
            return "normalises by the statistics of each batch, which cannot be folded"
        return "a batch normalisation that does not directly follow a swapped convolution"
    if module_activation(module) is not None:
        return "an activation that does not directly follow a swapped convolution"
    if type(module) is nn.LeakyReLU:
        slopes = ", ".join(map(str, LEAKY_SLOPES.values()))
        return f"no fused form for LeakyReLU of slope {module.negative_slope}: the fused slopes are {slopes}"
    if isinstance(module, OTHER_ACTIVATIONS):
        return f"no fused form for {name}: the fused activations are ReLU, LeakyReLU, SiLU and GELU"
    return "no convolution: runs as it is"


def describe(module: nn.Module) -> str:
    """A short name of ``module`` for the report, with channels and kernel for convolutions."""
    name = type(module).__name__
    if hasattr(module, "kernel_size") and hasattr(module, "out_channels"):
        kernel = "x".join(map(str, module.kernel_size))
        return f"{name} {module.in_channels}->{module.out_channels}, {kernel}"
    return name
