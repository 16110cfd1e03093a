"""What modules need to keep something that was made of their parameters: may it be used, and is it still right?"""

import torch
from torch import Tensor, nn

_PLAIN_TENSORS = (Tensor, nn.Parameter)


class Fingerprint:
    """Tells whether a tensor still has the values it had. Its storage is kept alive, so its address is not used anew.

    Identity, address and version counter see every ordinary change; writes through ``tensor.data``, as helpers for
    moving averages do them, move no counter, and are seen through a sample of the values, where these are on the CPU
    (elsewhere looking at them would have to wait for the device).
    """

    __slots__ = ("tensor", "pointer", "version", "view", "sample")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.pointer, self.version = tensor, tensor.data_ptr(), tensor._version
        view = tensor.detach() if tensor.is_cpu else tensor.detach().new_empty(0)
        self.view = view if view.numel() <= 512 else view[:: max(1, view.shape[0] // 8), 0]
        self.sample = self.view.clone()

    def holds_for(self, tensor: Tensor) -> bool:
        return (
            tensor is self.tensor
            and tensor._version == self.version
            and tensor.data_ptr() == self.pointer
            and (self.view.numel() == 0 or torch.equal(self.view, self.sample))
        )


def untracked(*tensors: Tensor | None) -> bool:
    """Whether a call on these can go past autograd: plain tensors without gradients, no tracing, no functorch."""
    gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TENSORS or (gradients and tensor.requires_grad) or tensor.is_meta:
            return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())


def have_versions(*tensors: Tensor | None) -> bool:
    """Whether changes of these can be seen: tensors made in inference mode have no version counter."""
    return not any(tensor is not None and tensor.is_inference() for tensor in tensors)
