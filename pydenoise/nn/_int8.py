"""What the int8 layers share: buffers that keep their dtype, the scheme, quantizing an input, checkpoints."""

import json
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pydenoise import functional as PF
from pydenoise.nn._frozen import Frozen, Norm
from pydenoise.nn._plans import definite_scheme
from pydenoise.ops import quantize as quantize_op
from pydenoise.ops._arguments import check_choice
from pydenoise.ops._quantized import FLOATS, call, check_accumulation, check_codes, scale_of, zero_point_of
from pydenoise.quantization import LayerPlan, Scheme
from pydenoise.reference.activations import ACTIVATIONS, INPUT_ACTIVATIONS

Codes = tuple[Tensor, Tensor, Tensor | int | None]  # int8 codes, scale, zero point (None or 0: symmetric)

FORMAT = 1  # of a layer's extra state; a checkpoint of a later one is refused
_STATE_KEY = "_extra_state"
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_OPTIONAL = {"bias": torch.float32, "input_scale": torch.float32, "input_zero_point": torch.int32,
             "channel_scale": torch.float32}  # fmt: skip


class Int8Layer(Frozen):
    """A convolution or linear layer with int8 weights; subclasses add geometry and the call of their op."""

    kind: str
    granularity: str  # of quantize_dynamic

    def _create(self, weight_shape: tuple[int, ...], channels: int, bias: bool, scheme: Scheme | str, device) -> None:
        """Buffers of zeros and ones for ``scheme``, to be loaded or filled."""
        self.scheme = definite_scheme(scheme).for_kind(self.kind)
        if self.scheme.is_float:
            raise ValueError("scheme: 'float' keeps a layer as it is; an int8 layer needs another scheme")
        self._channels = channels
        rows = weight_shape[0]
        check_accumulation(math.prod(weight_shape[1:]), affine=not self.scheme.symmetric)
        self.register_buffer("weight", torch.zeros(weight_shape, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(rows, device=device))
        self.register_buffer("bias", torch.zeros(rows, device=device) if bias else None)
        shape = (self.scheme.buckets,) if self.scheme.granularity == "per_timestep" else ()
        static = not self.scheme.is_dynamic
        self.register_buffer("input_scale", torch.ones(shape, device=device) if static else None)
        affine = static and not self.scheme.symmetric
        zero_point = torch.zeros(shape, dtype=torch.int32, device=device) if affine else None
        self.register_buffer("input_zero_point", zero_point)
        smooth = self.scheme.smooth is not None
        self.register_buffer("channel_scale", torch.ones(channels, device=device) if smooth else None)
        self._slot: tuple[Tensor, Tensor | None] | None = None
        self._packed: tuple | None = None

    def _fill(self, plan: LayerPlan, gain: float = 1.0) -> None:
        """Take over the numbers of ``plan``; outputs are multiplied by ``gain``."""
        device = self.weight.device
        codes = plan.weight.reshape(self.weight.shape)  # 1x1 convolutions may become linear layers
        bias = plan.bias if plan.bias is None else plan.bias.detach().float() * gain
        numbers = {
            "weight": codes if gain > 0 else (-codes.to(torch.int16)).clamp(max=127),
            "weight_scale": plan.weight_scale * abs(gain),
            "bias": bias,
            "input_scale": plan.input_scale,
            "input_zero_point": plan.input_zero_point,
            "channel_scale": plan.channel_scale,
        }
        for name, values in numbers.items():
            own = getattr(self, name)
            dtype = _OPTIONAL.get(name, self.weight_scale.dtype if own is None else own.dtype)
            if values is not None:
                values = values.detach().to(device, dtype).clone(memory_format=torch.contiguous_format)
            setattr(self, name, values)
        problem = self._bad_numbers()
        if problem is not None:
            raise ValueError(f"{plan.name or 'plan'}: {problem}")

    # ----------------------------------------------------------------------------------------- quantizing an input

    @property
    def input_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """(scale, zero point) of static schemes, 0-d tensors that kernels read when they run; ``None`` for symmetric.

        Dynamic schemes: (``None``, ``None``).

        Raises:
            RuntimeError: "per_timestep" without a selected timestep.
        """
        if self.input_scale is None:
            return None, None
        if self.scheme.granularity == "per_tensor":
            return self.input_scale, self.input_zero_point
        if self._slot is None:
            raise RuntimeError(
                f"{type(self).__name__}: has a scale per timestep; call TimestepScales.select(timestep) of the model "
                "before its layers"
            )
        return self._slot

    def quantize(self, input: Tensor, activation: str = "none") -> Codes:
        """Codes, scale and zero point of ``activation(input)`` under the layer's scheme, smoothed.

        Args:
            input: images [N, C, H, W] of convolutions, [..., C] of linear layers; float32, bfloat16 or float16.
            activation: as in :func:`pydenoise.functional.quantize`; "geglu" takes 2 C channels.
        """
        expected = self._channels * (2 if activation == "geglu" else 1)
        self._check_floats(input, expected)
        check_choice("activation", activation, INPUT_ACTIVATIONS)
        scale, zero_point = self.input_parameters
        input, ops = input.detach(), torch.ops.pydenoise
        if scale is not None:
            args = (input, scale, zero_point, activation, self.channel_scale)
            return call(quantize_op.QUANTIZE, ops.quantize, args, "auto"), scale, zero_point
        symmetric = self.scheme.symmetric
        args = (input, self.granularity, activation, self.channel_scale, symmetric)
        codes, scale, zero_point = call(quantize_op.DYNAMIC, ops.quantize_dynamic, args, "auto")
        return codes, scale, None if symmetric else zero_point

    def group_norm(
        self, norm: Norm, input: Tensor, *, skip: Tensor | None = None, film: Tensor | None = None,
        activation: str = "silu",
    ) -> Codes:  # fmt: skip
        """Codes, scale and zero point of ``activation(film(group_norm(input)))``, for images [N, C, H, W]."""
        return self._normalized(
            PF.group_norm_silu_quantize, input, norm.num_groups, norm.weight, norm.bias, norm.eps, skip=skip,
            film=film, activation=activation,
        )  # fmt: skip

    def layer_norm(self, norm: Norm, input: Tensor) -> Codes:
        """Codes, scale and zero point of ``layer_norm(input)`` over the last dim."""
        return self._normalized(PF.layer_norm_quantize, input, norm.weight, norm.bias, norm.eps)

    def _normalized(self, producer: Callable, *args, **options) -> Codes:
        scale, zero_point = self.input_parameters
        if scale is None:
            return producer(*args, channel_scale=self.channel_scale, **options)
        given = 0 if zero_point is None else zero_point
        codes = producer(*args, channel_scale=self.channel_scale, scale=scale, zero_point=given, **options)
        return codes, scale, zero_point

    def _check_floats(self, input: object, channels: int) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor or (codes, scale, zero_point), got {type(input).__name__}")
        if input.dtype == torch.int8:
            raise TypeError("input: int8 codes need their scale: pass (codes, scale, zero_point)")
        if input.dtype not in FLOATS:
            raise TypeError(f"input: expected float32, bfloat16 or float16, got {input.dtype}")
        if input.device != self.weight.device:
            raise ValueError(f"input: expected device {self.weight.device} (that of the weight), got {input.device}")
        self._check_shape(input, channels)

    def _check_shape(self, input: Tensor, channels: int) -> None:
        raise NotImplementedError

    def _input_codes(self, input: Tensor | Codes) -> tuple[Tensor, Tensor, Tensor | None]:
        """``input`` quantized, or the codes of a producer, as the ops' rows take them."""
        if not isinstance(input, tuple):
            return self.quantize(input)
        if len(input) != 3:
            raise ValueError(f"input: expected (codes, scale, zero_point), got a tuple of {len(input)}")
        codes, scale, zero_point = input
        check_codes("input", codes, self.weight)
        self._check_shape(codes, self._channels)
        own = self._slot or (self.input_scale, self.input_zero_point)
        if scale is own[0] and zero_point is own[1] and scale is not None and scale.dim() == 0:
            return codes, scale, zero_point
        if not isinstance(scale, Tensor) or scale.dim() == 0:
            scale = scale_of("scale of input", scale, codes, {})
        elif scale.dtype != torch.float32 or tuple(scale.shape) != self._position_shape(codes):
            expected = self._position_shape(codes)
            raise ValueError(
                f"scale of input: expected float32, one or {expected}, got {scale.dtype} {tuple(scale.shape)}"
            )
        if isinstance(zero_point, Tensor) and zero_point.dtype == torch.int32 and zero_point.shape == scale.shape:
            return codes, scale, zero_point  # of a producer: its values are what they should be
        zero_point = None if zero_point is None else zero_point_of("zero_point of input", zero_point, scale)
        return codes, scale, zero_point

    def _position_shape(self, codes: Tensor) -> tuple[int, ...]:
        """The shape of a scale per position."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------- packing

    def _packed_weight(self, pack: Callable[[Tensor], object]) -> object | None:
        """What ``pack`` made of the weight, kept as long as the weight stays as it is."""
        weight = self.weight
        packed = self._packed
        if packed is None or packed[0] is not weight or (packed[1] is not None and packed[1] != weight._version):
            version = None if weight.is_inference() else weight._version
            packed = self._packed = (weight, version, pack(weight))
        return packed[2]

    def _apply(self, fn, recurse=True):
        self._packed = self._slot = None  # they hold the memory of before
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": None, "_slot": None}

    # ----------------------------------------------------------------------------------------------- checkpoints

    def _description(self) -> dict:
        """What a checkpoint must agree with: geometry, by name."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """Format, kind, geometry and scheme as JSON in a uint8 tensor, which safetensors can hold."""
        about = {"format": FORMAT, "kind": self.kind, **self._description(), "scheme": self.scheme.to_dict()}
        return torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: ``_load_from_state_dict`` reads it before the buffers, whose shapes follow from it."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Takes over the checkpoint's scheme, and with it which buffers there are; the geometry must be the same."""
        state, weight = state_dict.get(prefix + _STATE_KEY), state_dict.get(prefix + "weight")
        problem = None if state is None else self._adopt(state, state_dict, prefix)
        if problem is None and weight is not None and weight.dtype != torch.int8:
            problem = f"weight: expected torch.int8, got {weight.dtype}: a checkpoint of the float model"
        if problem is not None:
            errors.append(f"{prefix.rstrip('.') or 'state_dict'}: {problem}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self._packed = self._slot = None
        problem = self._bad_numbers()
        if problem is not None:
            errors.append(prefix + problem)

    def _bad_numbers(self) -> str | None:
        """A sentence if a scale or zero point is none."""
        for name in ("weight_scale", "input_scale", "channel_scale"):
            values = getattr(self, name)
            if values is not None and not values.is_meta and not ((values > 0) & (values < math.inf)).all():
                return f"{name}: expected positive finite values"
        points = self.input_zero_point
        if points is not None and not points.is_meta and not ((points >= -128) & (points <= 127)).all():
            return "input_zero_point: expected values from -128 to 127"
        return None

    def _adopt(self, state: Tensor, state_dict: Mapping[str, Tensor], prefix: str) -> str | None:
        """Give the optional buffers the checkpoint's scheme and shapes; a sentence if it is of another layer."""
        try:
            about = json.loads(bytes(state.cpu().tolist()).decode())
            scheme = Scheme.from_dict(about["scheme"])
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            return f"its description cannot be read: {error}"
        if scheme.is_float:
            return "its scheme is 'float'"
        if about.get("format") != FORMAT:
            return f"of format {about.get('format')}; this version of pydenoise reads format {FORMAT}"
        own = json.loads(json.dumps({"kind": self.kind, **self._description()}))
        for key, value in own.items():
            if about.get(key) != value:
                return f"of another model: {key} is {value} here and {about.get(key)} in the checkpoint"
        shape = (scheme.buckets,) if scheme.granularity == "per_timestep" else ()
        shapes = {"bias": self.weight_scale.shape, "channel_scale": (self._channels,)}
        needed = {"input_scale": not scheme.is_dynamic,
                  "input_zero_point": not (scheme.is_dynamic or scheme.symmetric)}  # fmt: skip
        for name, dtype in _OPTIONAL.items():
            present = needed.get(name, prefix + name in state_dict)
            empty = torch.zeros(shapes.get(name, shape), dtype=dtype, device=self.weight.device) if present else None
            setattr(self, name, empty)
        self.scheme = scheme
        return None


def check_activation(activation: str) -> str:
    """An activation that convolutions and linear layers can fuse."""
    check_choice("activation", activation, ACTIVATIONS)
    return activation


def is_plain(tensor: Tensor) -> bool:
    """Whether packed weights can be used: no graph is being made and the tensor holds numbers."""
    return type(tensor) in _PLAIN_TENSORS and not tensor.is_meta and not torch.compiler.is_compiling()
