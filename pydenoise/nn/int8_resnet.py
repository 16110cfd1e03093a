"""Int8ResnetBlock: the residual block of diffusion U-Nets, convolutions in int8 with everything else fused into them.

``norm1 + activation + quantize -> conv1 (+ embedding) -> norm2 (+ FiLM) + activation + quantize -> conv2 (+ shortcut)``
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise.nn._blocks import (
    Int8Block,
    conv_layer,
    float_group_norm,
    group_normed,
    run_conv,
)
from pydenoise.nn._frozen import Norm
from pydenoise.nn._plans import Plans, ask
from pydenoise.nn.int8_conv2d import Int8Conv2d
from pydenoise.nn.resnet_spec import ResnetSpec, resnet_spec
from pydenoise.ops._arguments import check_choice
from pydenoise.reference.weighted_conv import activate


class Int8ResnetBlock(Int8Block):
    """A residual block of a diffusion U-Net that runs in int8; made by :meth:`from_float`.

    The norms are fused with the quantization of their results, the embedding, the residual and the nearest upsampling
    with the convolutions. A skip connection is read where it lies: nothing is concatenated. The shortcut stays in float
    unless its plan says otherwise; split along the skip connection, each half has scales of its own.
    """

    def __init__(self, spec: ResnetSpec, plans: Plans, skip_channels: int, shortcut_dtype: torch.dtype | None):
        super().__init__()
        conv1, conv2, shortcut = spec.names
        self.activation, self.embedding_activation = spec.activation, spec.embedding_activation
        self.film, self.resample, self.gain = spec.film, spec.resample, spec.gain
        self.in_channels, self.skip_channels = spec.conv1.in_channels, skip_channels
        self.norm1, self.norm2 = Norm.from_float(spec.norm1, "norm1"), Norm.from_float(spec.norm2, "norm2")
        self.conv1 = conv_layer(spec.conv1, plans, conv1, normed=spec.resample != "down")
        self.conv2 = conv_layer(spec.conv2, plans, conv2, gain=spec.gain, normed=True)
        self.time_emb_proj = _frozen_linear(spec.embedding)
        self.conv_shortcut = self.conv_shortcut_skip = None
        if spec.shortcut is None:
            return
        whole = self.in_channels
        kept = whole - skip_channels
        options = {"gain": spec.gain, "dtype": shortcut_dtype}
        first = (0, kept) if skip_channels else None
        self.conv_shortcut = conv_layer(spec.shortcut, plans, shortcut, channels=first, **options)
        if skip_channels:
            self.conv_shortcut_skip = conv_layer(spec.shortcut, plans, shortcut, channels=(kept, whole), **options)

    @classmethod
    def from_float(
        cls,
        block: nn.Module | ResnetSpec,
        plans: Plans = "per_pixel",
        *,
        skip_channels: int = 0,
        shortcut: str = "float",
        shortcut_dtype: torch.dtype | None = None,
    ) -> "Int8ResnetBlock":
        """The int8 block of a float one, which stays as it is.

        Args:
            block: diffusers' ``ResnetBlock2D``, OpenAI's ``ResBlock``, one of ``pydenoise.models``, or any other as a
                :class:`ResnetSpec`.
            plans: how each convolution is quantized: one scheme for all, a mapping from "conv1", "conv2" and
                "conv_shortcut", or a function; a "float" scheme keeps a layer in float.
            skip_channels: the last input channels, which :meth:`forward` then takes as ``skip``; 0 without one.
            shortcut: "float", or "plans" to ask ``plans`` for it as well.
            shortcut_dtype: of a float shortcut's weight, such as torch.bfloat16; ``None``: its own.

        Raises:
            TypeError, ValueError: a block of another kind, or a part of it that does not fit; the message names it.
        """
        spec = block if isinstance(block, ResnetSpec) else resnet_spec(block)
        check_choice("shortcut", shortcut, ("float", "plans"))
        if not 0 <= skip_channels < spec.conv1.in_channels:
            raise ValueError(f"skip_channels: expected 0 to {spec.conv1.in_channels - 1}, got {skip_channels}")
        if shortcut == "float":
            plans = _with_float(plans, spec.names[2])
        return cls(spec, plans, skip_channels, shortcut_dtype)

    # ------------------------------------------------------------------------------------------------- forward

    def project(self, temb: Tensor) -> Tensor | None:
        """The block's own embedding, [N, C_out] or [N, 2 C_out], of the time embedding ``temb`` [N, E]."""
        if self.time_emb_proj is None:
            return None
        linear, together = self.time_emb_proj, self.__dict__.get("_shared_projection")
        if together is not None:
            return together(linear, temb)
        return linear(activate(temb, self.embedding_activation).to(linear.weight.dtype)).float()

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None = None,
        skip: Tensor | None = None,
        *,
        embedding: Tensor | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            hidden_states: [N, C, H, W], float32, bfloat16 or float16; channels_last is fastest.
            temb: [N, E]. embedding: what :meth:`project` makes of it, if the caller has it already.
            skip: [N, skip_channels, H, W], read as if concatenated behind ``hidden_states``.

        Returns:
            [N, C_out, H', W'] in the input's dtype and channels_last memory.
        """
        self.check(hidden_states)
        hidden_states, skip = self._parts(hidden_states, skip)
        embedding = self._embedding(hidden_states, temb, embedding)
        dtype, up = hidden_states.dtype, 2 if self.resample == "up" else 1
        added, film = (None, embedding) if self.film else (embedding, None)
        x = self._first_input(hidden_states, skip)
        h = run_conv(self.conv1, x, dtype, channel_bias=added, upsample=up)
        h = group_normed(self.conv2, self.norm2, h, film=film, activation=self.activation)
        return run_conv(self.conv2, h, dtype, residual=self._residual(hidden_states, skip))

    def _embedding(self, hidden_states: Tensor, temb: Tensor | None, embedding: Tensor | None) -> Tensor | None:
        """``embedding``, or what :meth:`project` makes of ``temb``; ``None`` for blocks that have none."""
        linear, batch = self.time_emb_proj, hidden_states.shape[0]
        if linear is None:
            return None
        if embedding is None and temb is None:
            raise ValueError("temb: the block has a time embedding, got None")
        name, value, width = "temb", temb, linear.in_features
        if embedding is not None:
            name, value, width = "embedding", embedding, linear.out_features
        if tuple(value.shape) != (batch, width):
            raise ValueError(f"{name}: expected [{batch}, {width}], got {tuple(value.shape)}")
        return self.project(temb) if embedding is None else embedding

    def _parts(self, hidden_states: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``hidden_states`` and ``skip``, checked; an input that was concatenated already is taken apart."""
        expected = self.in_channels - self.skip_channels
        if skip is None:
            if hidden_states.shape[1] != self.in_channels:
                raise ValueError(f"hidden_states: expected {self.in_channels} channels, got {hidden_states.shape[1]}")
            if self.skip_channels:
                return hidden_states[:, :expected], hidden_states[:, expected:]
            return hidden_states, None
        if not self.skip_channels:
            raise ValueError("skip: the block was made without skip_channels")
        if hidden_states.shape[1] != expected:
            raise ValueError(f"hidden_states: expected {expected} channels, got {hidden_states.shape[1]}")
        if skip.dim() != 4 or skip.shape[1] != self.skip_channels:
            raise ValueError(f"skip: expected [N, {self.skip_channels}, H, W], got {tuple(skip.shape)}")
        return hidden_states, skip.to(hidden_states.dtype)

    def _first_input(self, hidden_states: Tensor, skip: Tensor | None):
        if self.resample != "down":
            return group_normed(self.conv1, self.norm1, hidden_states, skip=skip, activation=self.activation)
        return _halved(float_group_norm(self.norm1, hidden_states, skip=skip, activation=self.activation))

    def _residual(self, hidden_states: Tensor, skip: Tensor | None) -> Tensor:
        """The shortcut, in the dtype in which it is computed: what adds it takes any.

        A 1x1 convolution runs on the smaller image: before upsampling, after halving.
        """
        up = self.resample == "up"
        if self.resample == "down":
            hidden_states, skip = _halved(hidden_states), None if skip is None else _halved(skip)
        if self.conv_shortcut is None:
            result = hidden_states if skip is None else torch.cat([hidden_states, skip], dim=1)
            result = result if self.gain == 1.0 else result * self.gain
            return _doubled(result) if up else result
        if up and _is_wide(self.conv_shortcut):
            hidden_states, skip, up = _doubled(hidden_states), None if skip is None else _doubled(skip), False
        dtype = _dtype_of(self.conv_shortcut, hidden_states)
        result = run_conv(self.conv_shortcut, hidden_states, dtype)
        if skip is not None:
            result = run_conv(self.conv_shortcut_skip, skip, dtype, residual=result)
        return _doubled(result) if up else result

    def extra_repr(self) -> str:
        text = f"skip_channels={self.skip_channels}, activation={self.activation}"
        return text + (f", resample={self.resample}" if self.resample != "none" else "")


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2) if x.shape[0] else x.new_empty((0, x.shape[1], x.shape[2] // 2, x.shape[3] // 2))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _is_wide(conv: nn.Module) -> bool:
    """Whether it sees more than one pixel, so that upsampling before and after it are different things."""
    return tuple(conv.kernel_size) != (1, 1)


def _dtype_of(conv: nn.Module, input: Tensor) -> torch.dtype:
    """Of the result of ``conv`` without a cast."""
    return input.dtype if isinstance(conv, Int8Conv2d) else conv.weight.dtype


def _frozen_linear(linear: nn.Module | None) -> nn.Linear | None:
    if linear is None:
        return None
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"embedding: expected a torch.nn.Linear, got {type(linear).__name__}")
    result = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    result.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    if linear.bias is not None:
        result.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return result.eval()


def _with_float(plans: Plans, name: str) -> Plans:
    """``plans``, with the layer ``name`` in float."""
    return lambda request: "float" if request.names[0] == name else ask(plans, request)
