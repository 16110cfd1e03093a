"""Which values of a graph stay in bfloat16 between fused layers when a float32 model is accelerated with "bf16".

A fused layer's output stays in bfloat16 through operations that only move values or follow torch's promotion rules; any
other operation (a kept layer with float32 weights, say) gets its inputs back in the model's own dtype.
"""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

_MOVING_MODULES = (
    nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Flatten, nn.Unflatten, nn.Upsample,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh,
)  # fmt: skip
_MOVING = (
    F.pixel_shuffle, F.pixel_unshuffle, F.max_pool2d, F.avg_pool2d, F.interpolate, F.pad, F.relu, F.silu, F.gelu,
    F.leaky_relu, torch.relu, torch.sigmoid, torch.tanh, torch.flatten, torch.permute, torch.reshape, torch.clamp,
    torch.squeeze, torch.unsqueeze, operator.getitem, operator.neg, torch.neg, torch.narrow,
    "reshape", "view", "permute", "transpose", "flatten", "contiguous", "squeeze", "unsqueeze", "relu", "clamp",
    "narrow", "sigmoid", "tanh",
)  # fmt: skip
_PROMOTING = (
    operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul, torch.cat, torch.concat,
    "add", "sub", "mul",
)  # fmt: skip
# Nothing of these depends on the dtype of the tensor asked.
_METADATA = ("size", "dim", "numel", "ndimension")
_METADATA_ATTRIBUTES = ("shape", "ndim", "device", "is_cuda")


def reads_metadata(node: fx.Node) -> bool:
    """Whether ``node`` asks for a shape or the like."""
    if node.op == "call_method":
        return node.target in _METADATA
    return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA_ATTRIBUTES


def keeps_dtype(node: fx.Node, modules: dict[str, nn.Module], narrow: set[fx.Node]) -> bool:
    """Whether ``node``, some of whose inputs are in bfloat16 (those in ``narrow``), returns bfloat16 rightly."""
    inputs = [source for source in node.all_input_nodes if _is_tensor(source)]
    if not any(source in narrow for source in inputs):
        return False
    if node.op == "call_module":
        return isinstance(modules[node.target], _MOVING_MODULES) and len(inputs) == 1
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _PROMOTING:
        # Zero-dimensional tensors do not take part in promotion.
        return all(source in narrow for source in inputs if source.meta["tensor"].shape != ())
    return node.target in _MOVING and len(inputs) == 1


def promotes(node: fx.Node) -> bool:
    """Whether ``node`` accepts inputs of different dtypes and returns the wider one."""
    return node.op in ("call_function", "call_method") and node.target in _PROMOTING


def _is_tensor(node: fx.Node) -> bool:
    return node.meta.get("tensor") is not None
