"""Weighted convolution modules: torch.nn.Conv1d/2d/3d with a density over the kernel positions.

Source: Cammarasana and Patane, "Optimal Weighted Convolution for Classification and Denoising" (2025).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pydenoise import densities
from pydenoise.nn._fingerprint import Fingerprint, have_versions, untracked
from pydenoise.nn._kept_in_eval import KeptInEval
from pydenoise.ops import weighted_conv as op
from pydenoise.ops._arguments import check_choice, int_tuple
from pydenoise.reference.weighted_conv import effective_weight

INITS = ("torch", "fan_out", "matched")
_TWINS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FUNCTIONS: dict[int, Callable[..., Tensor]] = {
    1: op.weighted_conv1d,
    2: op.weighted_conv2d,
    3: op.weighted_conv3d,
}


class _Start(NamedTuple):
    """The density that a module starts with: a dense one, or coefficients to be trained; neither means ones."""

    dense: Tensor | None = None
    coefficients: Tensor | None = None


def _start_density(density, kernel: tuple[int, ...], trainable: bool) -> _Start:
    """Checked values of the ``density`` argument of the modules, on the CPU and apart from what was passed in."""
    if density is None or (isinstance(density, int | float) and density == 1):
        if not trainable or max(kernel) == 1:
            return _Start()
        densities.refuse_even(kernel)
        density = [torch.ones(extent // 2, dtype=torch.float64) for extent in kernel]
        density = density[0] if len(set(kernel)) == 1 else density
    elif not isinstance(density, Tensor) and hasattr(density, "__array__"):
        density = torch.as_tensor(density)
    if isinstance(density, Tensor):
        if density.is_meta:
            raise ValueError("density: expected a tensor with values, got one on the meta device")
        density = density.detach().cpu().clone()
        if tuple(density.shape) == kernel:
            if not density.is_floating_point():
                raise TypeError(f"density: expected a floating-point tensor, got {density.dtype}")
            op.check_finite_density(density)
            return _Start(dense=density)
    lists = [half.detach().cpu() for half in densities.axis_coefficients(density, kernel)]
    if not any(half.numel() for half in lists):
        return _Start()
    if trainable:
        return _Start(coefficients=torch.cat(lists) if densities.is_per_axis(density) else lists[0].clone())
    return _Start(dense=densities.outer_product(lists))


class _Cache(NamedTuple):
    """The weight as the inference path wants it, and what it was made from."""

    key: tuple
    weight: Fingerprint
    density: Fingerprint | None
    packed: op.PackedWeight | None
    folded: Tensor | None  # weight * density, where no backend packs
    padding: tuple[int, ...]  # (low, high) per axis

    def holds_for(self, key: tuple, weight: Tensor, density: Tensor | None) -> bool:
        if self.key != key or not self.weight.holds_for(weight) or (density is None) != (self.density is None):
            return False
        return density is None or self.density.holds_for(density)


def _may_cache(input: Tensor, weight: Tensor, density: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a call may use a weight packed by an earlier one: plain CPU tensors, no gradients, no tracing."""
    if not untracked(input, weight, density, bias) or not have_versions(weight, density):
        return False
    on_cpu = all(tensor.is_cpu for tensor in (input, weight, density, bias) if tensor is not None)
    return on_cpu and input.layout is torch.strided


class _WeightedConvNd(KeptInEval, _ConvNd):
    """What the three modules share; ``dims`` is the number of spatial axes."""

    dims: int
    init = "torch"
    density: Tensor | None
    coefficients: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        density: Tensor | Sequence | float | None = None,
        trainable_density: bool = False,
        init: str = "torch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dims = self.dims
        kernel_size = int_tuple("kernel_size", kernel_size, dims, minimum=1)
        stride = int_tuple("stride", stride, dims, minimum=1)
        dilation = int_tuple("dilation", dilation, dims, minimum=1)
        if not isinstance(padding, str):
            padding = int_tuple("padding", padding, dims, minimum=0)
        check_choice("init", init, INITS)
        start = _start_density(density, kernel_size, trainable_density)
        if init == "matched" and start.dense is not None and not start.dense.any():
            raise ValueError("density: init='matched' cannot give the weights a scale where the density is all zeros")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, False, (0,) * dims, groups, bias,
            padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        self.trainable_density = trainable_density
        self._start = start
        self._cache: _Cache | None = None
        self._register_density(start)
        self.init = init
        if init != "torch":
            self.reset_parameters()

    def _register_density(self, start: "_Start") -> None:
        def place(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.weight.device, self.weight.dtype, copy=True)

        dense, coefficients = map(place, start)
        if self.trainable_density and dense is not None:
            self.register_parameter("density", nn.Parameter(dense))
        else:
            self.register_buffer("density", dense)
        self.register_parameter("coefficients", None if coefficients is None else nn.Parameter(coefficients))

    # ------------------------------------------------------------------------------------------------ parameters

    def reset_parameters(self) -> None:
        """Draw weight and bias anew as ``init`` says, and set the density to the values given to the constructor."""
        if self.init == "fan_out":
            nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
            if self.bias is not None:
                nn.init.zeros_(self.bias)
        else:
            super().reset_parameters()
        if "_start" not in self.__dict__:  # called by the constructor of the base class
            return
        with torch.no_grad():
            for tensor, start in ((self.density, self._start.dense), (self.coefficients, self._start.coefficients)):
                if tensor is not None:
                    tensor.copy_(start)
            density = self.density_function()
            if self.init == "matched" and density is not None:
                self.weight.div_(density.square().mean().sqrt())

    def density_function(self) -> Tensor | None:
        """The density, [*kernel_size]; ``None`` where it is all ones. Differentiable in what is trained."""
        if self.coefficients is None:
            return self.density
        halves = [extent // 2 for extent in self.kernel_size]
        if self.coefficients.numel() == sum(halves) and self.dims > 1:
            lists = self.coefficients.split(halves)
        else:
            lists = [self.coefficients] * self.dims
        return densities.outer_product(lists)

    def effective_weight(self) -> Tensor:
        """``weight * density``, the weight of the plain convolution that computes the same values; differentiable."""
        return effective_weight(self.weight, self.density_function())

    # --------------------------------------------------------------------------------------------------- forward

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input`` [N, C_in, *size] (or without N); see :func:`pydenoise.functional.weighted_conv2d`."""
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        if not (self.training or torch.compiler.is_compiling()):
            y = self._forward_cached(input, padding)
            if y is not None:
                return y
        density = self.density_function()
        return self._convolve(input, self.weight, density, self.bias, padding)

    def _convolve(self, input, weight, density, bias, padding) -> Tensor:
        return _FUNCTIONS[self.dims](input, weight, density, bias, self.stride, padding, self.dilation, self.groups)

    def _forward_cached(self, input: Tensor, padding: int | str | tuple[int, ...]) -> Tensor | None:
        """The result through the packed weight, or ``None`` where it cannot be used: see :meth:`_may_cache`."""
        weight, bias = self.weight, self.bias
        density = self.density if self.coefficients is None else self.coefficients
        if not _may_cache(input, weight, density, bias):
            return None
        dtype = weight.dtype
        if torch.is_autocast_enabled("cpu"):
            if torch.float64 in (dtype, input.dtype):  # which autocast leaves alone
                return None
            dtype = torch.get_autocast_dtype("cpu")
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        algorithm = op.algorithm_by_precision()
        key = (dtype, algorithm, self.kernel_size, self.stride, padding, self.dilation, self.groups)
        cache = self._cache
        if cache is None or not cache.holds_for(key, weight, density):
            cache = self._cache = self._make_cache(key, weight, density)
        if cache.packed is None:
            return self._convolve(input, cache.folded, None, bias, padding)
        if not (bias is None or bias.dtype == dtype):
            return None
        if input.dim() == self.dims + 1:
            return op.weighted_conv_packed(input[None], cache.packed, bias, None, cache.padding, "none")[0]
        return op.weighted_conv_packed(input, cache.packed, bias, None, cache.padding, "none")

    def _make_cache(self, key: tuple, weight: Tensor, source: Tensor | None) -> _Cache:
        dtype, algorithm, kernel, stride, padding, dilation, groups = key
        fingerprints = Fingerprint(weight), None if source is None else Fingerprint(source)
        with torch.no_grad():
            density = self.density_function()
            if density is not None:
                op.check_finite_density(density)
                density = density.to(dtype)
            packed = op.pack(weight.to(dtype), density, stride, dilation, groups, algorithm)
            folded = effective_weight(weight.to(dtype), density) if packed is None else None
        return _Cache(key, *fingerprints, packed, folded, op.explicit_padding(padding, kernel, stride, dilation))

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Also takes the keys of the published classes: alfa and Phi, or den."""
        target = "density" if self.coefficients is None else "coefficients"
        source = "Phi" if self.coefficients is None else "den"
        if getattr(self, target) is not None and prefix + source in state_dict:
            state_dict.setdefault(prefix + target, state_dict.pop(prefix + source))
            state_dict.pop(prefix + "alfa", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        if self.coefficients is not None:
            return super().extra_repr() + ", density=trainable coefficients"
        if self.density is None:
            return super().extra_repr()
        return super().extra_repr() + f", density={'trainable' if self.trainable_density else 'fixed'}"

    # ------------------------------------------------------------------------------------------------ conversions

    @classmethod
    def from_float(
        cls, conv: nn.Module, density: Tensor | Sequence | float | None = 1, *, trainable_density: bool = False
    ) -> "_WeightedConvNd":
        """A weighted convolution with the weight, bias and geometry of ``conv``, copied; ``conv`` stays as it is.

        ``density=1`` computes what ``conv`` computes. Any other density multiplies the weights that ``conv`` has.

        Args:
            conv: the torch.nn convolution of the same number of axes.
            density, trainable_density: as in the constructor.

        Raises:
            TypeError: ``conv`` is no such convolution, or a subclass that computes something else.
        """
        twin = _TWINS[cls.dims]
        expected, came = f"conv: expected a torch.nn.{twin.__name__}", type(conv)
        if not isinstance(conv, twin):
            raise TypeError(f"{expected}, got {came.__name__}")
        if came.forward is not twin.forward or came._conv_forward is not twin._conv_forward:
            raise TypeError(f"{expected}, got {came.__name__} with a forward of its own")
        if torch.nn.parameter.is_lazy(conv.weight):
            raise TypeError(f"{expected} with weights, got a lazy one that has seen no input")
        module = cls(
            **_geometry(conv),
            density=density,
            trainable_density=trainable_density,
            device="meta",
            dtype=conv.weight.dtype,
        )
        _copy_parameters(conv, module, conv.weight)
        module._register_density(module._start)
        return module

    def fold(self) -> nn.Module:
        """The plain torch.nn convolution with the density multiplied into its weight, for export and other runtimes."""
        conv = _TWINS[self.dims](**_geometry(self), device="meta", dtype=self.weight.dtype)
        with torch.no_grad():
            _copy_parameters(self, conv, self.effective_weight())
        return conv

    @classmethod
    def from_reference_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        padding: int | str | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        prefix: str = "",
    ) -> "_WeightedConvNd":
        """A layer from the checkpoint of one published layer (``wConv1d/2d/3d`` of weightedConvolution2.0).

        Args:
            state_dict: has ``weight``, perhaps ``bias``, and ``Phi`` (fixed density, beside ``alfa``) or ``den``
                (trainable).
            padding, stride, dilation, groups: the layer's geometry, which checkpoints do not hold. The published
                classes pad by 1 unless told otherwise, torch's by 0: say which.
            prefix: what stands before the names in ``state_dict``, as in ``"features.0."``.

        A whole network needs no such call: modules built with a density take the published keys in ``load_state_dict``.

        Raises:
            ValueError: a key is missing or a shape does not fit.
        """
        weight, bias, dense, coefficients = (state_dict.get(prefix + key) for key in ("weight", "bias", "Phi", "den"))
        if weight is None or (dense is None) == (coefficients is None):
            found = sorted(key for key in state_dict if key.startswith(prefix))
            raise ValueError(f"state_dict: expected {prefix}weight and either {prefix}Phi or {prefix}den, got {found}")
        kernel = tuple(weight.shape[2:])
        if len(kernel) != cls.dims:
            raise ValueError(
                f"state_dict: expected {prefix}weight with {cls.dims} kernel axes, got shape {tuple(weight.shape)}"
            )
        if dense is not None and tuple(dense.shape) != kernel:
            raise ValueError(
                f"state_dict: expected {prefix}Phi of the kernel's shape {kernel}, got {tuple(dense.shape)}"
            )
        module = cls(
            weight.shape[1] * groups,
            weight.shape[0],
            kernel,
            stride,
            padding,
            dilation,
            groups,
            bias is not None,
            density=coefficients if dense is None else dense,
            trainable_density=dense is None,
            device="meta",
            dtype=weight.dtype,
        )
        module.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())
        module._register_density(module._start)
        return module


def _geometry(conv: _ConvNd) -> dict:
    """The constructor arguments that torch's convolutions and ours share."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}


def _copy_parameters(source: nn.Module, target: nn.Module, weight: Tensor) -> None:
    """Give ``target`` copies of ``weight`` and of ``source``'s bias, and its mode."""

    def copy(tensor: Tensor, like: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.detach().clone(), requires_grad=like.requires_grad)

    target.weight = copy(weight, source.weight)
    if source.bias is not None:
        target.bias = copy(source.bias, source.bias)
    target.train(source.training)


_DOC = """{dims}-D weighted convolution: ``torch.nn.{twin}``, its weight times a density over the kernel positions.

    All arguments up to ``padding_mode``, the attributes, ``weight`` and ``bias`` are those of ``torch.nn.{twin}``; with
    ``density=None`` so are the state_dict and the values that ``init="torch"`` draws.

    Args:
        density: ``None`` or 1 for ones; coefficients, outermost first, for all axes or one list per axis, as in
            :func:`pydenoise.density`; or a dense tensor of shape ``kernel_size``, the only form that even sizes take.
        trainable_density: train the density: its coefficients (parameter ``coefficients``, the lists of all axes one
            after the other) or, if it was given dense, all of it (parameter ``density``). Otherwise it is the buffer
            ``density``. Trainable coefficients start at 1 where ``density`` is ``None``.
        init: "torch" draws weight and bias as ``torch.nn.{twin}`` does; "fan_out" as the published code does (weight
            normal with ReLU's gain over fan out, bias zero); "matched" draws as "torch" and divides the weight by the
            density's root mean square, so that the effective weights ``weight * density`` have torch's scale.

    In evaluation mode and without gradients, ``weight * density`` is packed for the kernel once and kept until a
    parameter changes. It is no part of the state_dict, of pickles or of copies. One change goes unseen: a write to a
    few elements through ``weight.data`` or NumPy; ``module.train(); module.eval()`` then drops the packed weight.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.

    Source: Cammarasana and Patane, "Optimal Weighted Convolution for Classification and Denoising" (2025).
    """


class WeightedConv1d(_WeightedConvNd):
    dims = 1
    __doc__ = _DOC.format(dims=1, twin="Conv1d")


class WeightedConv2d(_WeightedConvNd):
    dims = 2
    __doc__ = _DOC.format(dims=2, twin="Conv2d")


class WeightedConv3d(_WeightedConvNd):
    dims = 3
    __doc__ = _DOC.format(dims=3, twin="Conv3d")
