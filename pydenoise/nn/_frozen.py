"""Modules of constants for inference: base of the int8 layers, and the norms in front of them."""

import torch
from torch import Tensor, nn


def refuse_training(module: nn.Module) -> None:
    """Int8 modules have no gradients: a call in training mode is an error, not a silent detour."""
    if module.training:
        raise RuntimeError(f"{type(module).__name__}: runs in evaluation mode only; call model.eval() first")


class Frozen(nn.Module):
    """A module of constants for inference: its float32 buffers stay float32 under ``.half()`` or ``.to(dtype)``, so a
    model cast to half precision keeps its statistics."""

    def __init__(self):
        super().__init__()
        self.training = False

    def _apply(self, fn, recurse=True):
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype:
                moved = tensor.to(moved.device)
            return moved.contiguous()  # channels_last weights could not be saved as safetensors

        return super()._apply(keep, recurse)


class Norm(Frozen):
    """Weight, bias and eps of a GroupNorm or LayerNorm whose computation is fused into a producer of int8."""

    def __init__(self, channels: int, num_groups: int = 1, eps: float = 1e-5, affine: bool = True, device=None):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.register_buffer("weight", torch.ones(channels, device=device) if affine else None)
        self.register_buffer("bias", torch.zeros(channels, device=device) if affine else None)

    @classmethod
    def from_float(cls, norm: nn.Module, name: str) -> "Norm":
        """Of a torch.nn.GroupNorm or LayerNorm over one dim, or a module with the same attributes."""
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1:
            channels, groups = norm.normalized_shape[0], 1
        elif isinstance(norm, nn.GroupNorm) or hasattr(norm, "num_groups"):
            groups = norm.num_groups
            channels = weight.shape[0] if weight is not None else norm.num_channels
        else:
            raise TypeError(f"{name}: expected a GroupNorm or LayerNorm over one dim, got {type(norm).__name__}")
        device = weight.device if weight is not None else None
        result = cls(channels, groups, norm.eps, affine=weight is not None, device=device)
        with torch.no_grad():
            if weight is not None:
                result.weight.copy_(weight)
            if bias is not None:
                result.bias.copy_(bias)
        return result

    def extra_repr(self) -> str:
        return f"groups={self.num_groups}, eps={self.eps:g}"
