"""Downsampling and upsampling by gated Haar wavelets: blocks that choose, per sample, which frequencies they pass on.

Source: Yang, Zhou, Feng, Wang, "Diffusion Probabilistic Model Made Slim" (CVPR 2023).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pydenoise.ops import wavelet_gate as op
from pydenoise.ops._arguments import check_choice, check_tensor, int_tuple

Prepare = Callable[[Tensor, Tensor], tuple]  # checks input and gate, and makes the op's arguments of them


class WaveletGates(nn.Module):
    """The network that makes gates of means: ``sigmoid(output(relu(hidden([pooled, temb]))))``; 0.5 to begin with.

    Args:
        channels: of the means.
        groups: numbers of gates for each band.
        temb_dim: length of the time embedding, 0: none.
        hidden: width of the inner layer.
    """

    def __init__(self, channels: int, groups: int, temb_dim: int, hidden: int, device=None, dtype=None) -> None:
        super().__init__()
        self.groups = groups
        self.hidden = nn.Linear(channels + temb_dim, hidden, device=device, dtype=dtype)
        self.output = nn.Linear(hidden, op.BANDS * groups, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the first layer anew and set the last one to zero."""
        self.hidden.reset_parameters()
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, pooled: Tensor, temb: Tensor | None = None) -> Tensor:
        """``pooled`` [B, channels], ``temb`` [B, temb_dim]; returns [B, 4], or [B, 4, groups] if groups > 1."""
        features = pooled if temb is None else torch.cat([pooled, temb.to(pooled.dtype)], 1)
        gates = self.output(self.hidden(features).relu()).sigmoid()
        return gates if self.groups == 1 else gates.unflatten(1, (op.BANDS, self.groups))


class _WaveletGated(nn.Module):
    """What both blocks share; ``bands`` is how many bands the input's channels hold."""

    bands: int

    def __init__(
        self,
        channels: int,
        *,
        per_channel: bool = False,
        temb_dim: int | None = None,
        hidden: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        (self.channels,) = int_tuple("channels", channels, 1, minimum=1)
        if self.channels % self.bands:
            raise ValueError(f"channels: expected a multiple of {self.bands}, those of the bands, got {channels}")
        (hidden,) = int_tuple("hidden", max(self.channels // 2, 1) if hidden is None else hidden, 1, minimum=1)
        self.temb_dim = None if temb_dim is None else int_tuple("temb_dim", temb_dim, 1, minimum=1)[0]
        self.out_channels = self.channels // self.bands
        groups = self.out_channels if per_channel else 1
        self.gates = WaveletGates(self.channels, groups, self.temb_dim or 0, hidden, device, dtype)

    def _check(self, input: Tensor, temb: Tensor | None) -> None:
        check_tensor("input", input)
        if input.dim() != 4 or input.shape[1] != self.channels:
            raise ValueError(f"input: expected [B, {self.channels}, H, W], got shape {tuple(input.shape)}")
        if temb is not None:
            check_tensor("temb", temb)
        wanted = None if self.temb_dim is None else (input.shape[0], self.temb_dim)
        got = None if temb is None else tuple(temb.shape)
        if wanted != got:
            raise ValueError(f"temb: expected {wanted and f'shape {wanted}'}, got {got}")

    def _gated(self, input: Tensor, temb: Tensor | None, prepare: Prepare) -> Tensor:
        self._check(input, temb)
        if torch.is_grad_enabled() and input.requires_grad and _may_join(input):
            own = {name: p for name, p in self.gates.named_parameters() if p.requires_grad}
            return _Joined.apply(self.gates, list(own), prepare, input, temb, *own.values())
        return op.run(prepare(input, self.gates(op.wavelet_gate_pool(input), temb)))

    def extra_repr(self) -> str:
        kind = "a gate per band" if self.gates.groups == 1 else "a gate per band and channel"
        return f"{self.channels}, {kind}" + ("" if self.temb_dim is None else f", temb_dim={self.temb_dim}")


def _may_join(input: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return type(input) in (Tensor, nn.Parameter) and not torch.is_autocast_enabled(input.device.type)


class _Joined(torch.autograd.Function):
    """Mean, gates and wavelets as one node, so that the gradient of the input is written once.

    As nodes of their own, the gradient of the mean would be spread over the image and added in another pass. Here that
    of the gates comes first, then that of their network, and last the input's, with the mean's added on the way.
    """

    @staticmethod
    def forward(ctx, gates: WaveletGates, names: list[str], prepare: Prepare, input, temb, *parameters) -> Tensor:
        pooled = op.wavelet_gate_pool(input)
        gate = gates(pooled, temb)
        args = prepare(input, gate)
        ctx.gates, ctx.names, ctx.prepare, ctx.options = gates, names, prepare, args[2:]
        ctx.save_for_backward(input, temb, pooled, gate, *parameters)
        return op.run(args)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        input, temb, pooled, gate, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]

        def gates(pooled: Tensor, temb: Tensor | None) -> Tensor:
            return functional_call(ctx.gates, dict(zip(ctx.names, parameters, strict=True)), (pooled, temb))

        if torch.is_grad_enabled():  # a graph of the gradients is wanted
            output = op.run(ctx.prepare(input, gates(op.wavelet_gate_pool(input), temb)))
            return None, None, None, *_gradients(output, [input, temb, *parameters], wanted, grad)
        _, of_gate = op.gradients(grad, input, gate, None, *ctx.options, [False, True], "auto")
        with torch.enable_grad():
            pooled = pooled.detach().requires_grad_()
            own = None if temb is None else temb.detach().requires_grad_(wanted[1])
            again = gates(pooled, own)
        of_pooled, *others = _gradients(again, [pooled, own, *parameters], (True, *wanted[1:]), of_gate)
        of_input, _ = op.gradients(grad, input, gate, of_pooled, *ctx.options, [True, False], "auto")
        return None, None, None, of_input, *others


def _gradients(output: Tensor, inputs: Sequence[Tensor | None], wanted: Sequence[bool], grad: Tensor) -> list:
    """Gradients of ``inputs``, ``None`` for those that are not wanted."""
    chosen = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(output, chosen, grad, create_graph=torch.is_grad_enabled()))
    return [next(found) if want else None for want in wanted]


class WaveletGateDown(_WaveletGated):
    """Half the resolution: the four Haar bands of the input, added up with gates that the input itself determines.

    The gates come from the mean over the pixels (:class:`WaveletGates`), the rest is
    :func:`pydenoise.functional.wavelet_gate_down`. All gates are 0.5 to begin with, which gives the upper left pixels.

    Args:
        channels: C of the input [B, C, H, W]; the result is [B, C, ceil(H / 2), ceil(W / 2)].
        odd: "replicate" takes a last row or column without partner twice, "refuse" raises ``ValueError``.
        per_channel: a gate for each band and channel, instead of one for each band.
        temb_dim: length of a time embedding that the gates depend on too; ``None``: none.
        hidden: width of the gates' inner layer; ``None``: half of ``channels``.

    Raises ``TypeError`` or ``ValueError`` for bad arguments, naming them.
    """

    bands = 1

    def __init__(
        self, channels: int, *, odd: str = "replicate", per_channel: bool = False, temb_dim: int | None = None,
        hidden: int | None = None, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        check_choice("odd", odd, op.ODD)
        super().__init__(
            channels, per_channel=per_channel, temb_dim=temb_dim, hidden=hidden, device=device, dtype=dtype
        )
        self.odd = odd

    def forward(self, input: Tensor, temb: Tensor | None = None) -> Tensor:
        """``input`` [B, channels, H, W]; ``temb`` [B, temb_dim], if the block was made for one."""
        return self._gated(input, temb, lambda x, gate: op.prepare_down(x, gate, odd=self.odd))


class WaveletGateUp(_WaveletGated):
    """Double the resolution: the channels of the input are the four Haar bands of the result, each times its gate.

    Gates as in :class:`WaveletGateDown`, then :func:`pydenoise.functional.wavelet_gate_up`.

    Args:
        channels: of the input [B, channels, h, w], a multiple of 4; the result is [B, channels / 4, 2 h, 2 w].
        per_channel, temb_dim, hidden: as for :class:`WaveletGateDown`.
    """

    bands = op.BANDS

    def forward(self, input: Tensor, temb: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """``input`` [B, channels, h, w]; ``temb`` [B, temb_dim]; ``size``: (H, W) of the result, where one is odd."""
        return self._gated(input, temb, lambda x, gate: op.prepare_up(x, gate, size=size))
