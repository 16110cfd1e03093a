"""DCLS in the ``blocks`` suite: construction of kernels, and whole layers beside plain convolutions of equal size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pydenoise import functional as PF
from pydenoise.benchmarks.cases import Bar, Case
from pydenoise.benchmarks.convolution import Expected
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.benchmarks.providers import NO_PART, Contender, Provider, Setting, Skip, contender_of, cpu_only

OURS, NAIVE, SEPARABLE = "dcls", "dcls-naive", "dcls-separable"
PLAIN, TORCH = "dcls-plain-conv", "dcls-torch-conv"
SPREAD = 0.27
FACTOR_FLOPS = 20.0  # of one exponential, its argument included


@dataclass(frozen=True)
class DclsBench(Case):
    """Gaussian components in square kernels of a depthwise layer; without a picture, the construction alone.

    ``training``: forward and backward. ``kept``: evaluation, where the kernel is constructed once.
    """

    channels: int = 96
    components: int = 34
    kernel: int = 17
    picture: tuple[int, int] | None = None  # batch, height and width
    training: bool = False
    kept: bool = False

    def flops(self) -> float:
        """Forward: factors, then a product for each component and tap, and the convolution. Backward: twice that."""
        axes = 2 * self.kernel
        once = self.channels * self.components * (FACTOR_FLOPS * axes + 2.0 * self.kernel**2)
        if self.kept:
            once = 0.0
        if self.picture is not None:
            batch, size = self.picture
            once += 2.0 * batch * self.channels * size**2 * self.kernel**2
        return once * (3 if self.training else 1)

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        return self.flops() / peaks.flops(precision)

    def describe(self) -> dict:
        return super().describe() | {
            "channels": self.channels,
            "components": self.components,
            "kernel": self.kernel,
            "picture": self.picture,
            "training": self.training,
            "flops": self.flops(),
        }


def dcls_cases(quick: bool = False) -> list[DclsBench]:
    """The cases of DCLS; ``quick``: tiny ones."""
    return list(_quick() if quick else _cases())


_BUILT = (Bar((NAIVE,), speedup=80.0, subjects=(OURS,)),)
_LAYER = (Bar((PLAIN,), speedup=1 / 1.05, subjects=(OURS,)),)


def _cases() -> Iterator[DclsBench]:
    for channels in (96, 384):
        name, why = f"{channels} channels, 34 in 17²", "the published layer of ConvNeXt-dcls"
        yield DclsBench(name, "construct", why, _BUILT, channels=channels)
        yield DclsBench(f"{name}, training", "construct", why, _BUILT, channels=channels, training=True)
    for channels, size in ((96, 56), (384, 14)):
        name = f"{channels} channels, 8×{size}²"
        shape = {"channels": channels, "picture": (8, size)}
        yield DclsBench(f"{name}, forward", "layer", "the kernel is made in every call", _LAYER, **shape)
        yield DclsBench(f"{name}, training", "layer", "forward and backward", _LAYER, **shape, training=True)
        yield DclsBench(f"{name}, evaluation", "layer", "the kernel is made once", _LAYER, **shape, kept=True)


def _quick() -> Iterator[DclsBench]:
    tiny = {"channels": 4, "components": 3, "kernel": 5}
    yield DclsBench("tiny", "construct", "does it run", _BUILT, **tiny)
    yield DclsBench("tiny, training", "construct", "does it run", _BUILT, **tiny, training=True)
    yield DclsBench("tiny, forward", "layer", "does it run", _LAYER, **tiny, picture=(2, 9))
    yield DclsBench("tiny, training", "layer", "does it run", _LAYER, **tiny, picture=(2, 9), training=True)
    yield DclsBench("tiny, evaluation", "layer", "does it run", _LAYER, **tiny, picture=(2, 9), kept=True)


# ---------------------------------------------------------------------------------------------------------- problems


def parameters(case: DclsBench, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """weight, P, SIG, and what the case needs besides, drawn in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape, half = (case.channels, 1, case.components), case.kernel // 2
    found = {"weight": draw(*shape), "P": (draw(2, *shape) * half / 2).clamp(-half, half), "SIG": draw(2, *shape) * 0.3}
    if case.picture is None:
        found["grad"] = draw(case.channels, 1, case.kernel, case.kernel)
    else:
        batch, size = case.picture
        found["bias"] = draw(case.channels)
        found["input"], found["grad"] = draw(batch, case.channels, size, size), draw(batch, case.channels, size, size)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def naive_kernel(weight: Tensor, P: Tensor, SIG: Tensor, size: int) -> Tensor:
    """Plain torch, tap by tap: tensors of [taps, axes, O, I, C] for distances, exponents and products."""
    row = torch.arange(size, dtype=weight.dtype, device=weight.device)
    taps = torch.stack(torch.meshgrid(row, row, indexing="ij")).flatten(1).t()  # [taps, axes]
    distances = taps[:, :, None, None, None] - (P + size // 2)
    values = torch.exp(-0.5 * (distances / (SIG.abs() + SPREAD)) ** 2).prod(1)
    values = values / (values.sum(0) + 1e-7)
    return (values * weight).sum(-1).permute(1, 2, 0).reshape(*weight.shape[:2], size, size)


def _separable(weight: Tensor, P: Tensor, SIG: Tensor, size: int) -> Tensor:
    """Factors of each axis, joined by torch's batched matrix product."""
    from pydenoise.reference import dcls_kernel as reference

    return reference.dcls_kernel(
        weight, P, SIG, (size, size), (0, 1), (size // 2,) * 2, gauss=True, normalized=True, spread=SPREAD
    )  # fmt: skip


def _ours(weight: Tensor, P: Tensor, SIG: Tensor, size: int) -> Tensor:
    return PF.dcls_kernel(weight, P, SIG, size)


# --------------------------------------------------------------------------------------------------------- contenders


def _case_of(case: Case, setting: Setting) -> DclsBench:
    if not isinstance(case, DclsBench):
        raise Skip(NO_PART)
    cpu_only(setting)
    return case


def _construction(case: DclsBench, construct: Callable[..., Tensor]) -> Contender:
    tensors = parameters(case)
    leaves = {name: tensors[name] for name in ("weight", "P", "SIG")}
    return contender_of(lambda: construct(*leaves.values(), case.kernel), leaves, _grad(case, tensors))


def _grad(case: DclsBench, tensors: dict[str, Tensor]) -> Tensor | None:
    return tensors["grad"] if case.training else None


def _image(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _our_layer(case: DclsBench) -> Contender:
    from pydenoise.nn import DclsConv2d

    tensors = parameters(case)
    layer = DclsConv2d(case.channels, case.channels, case.components, 1, case.kernel // 2, case.kernel, case.channels)
    layer.load_state_dict({name: tensors[name] for name in ("weight", "P", "SIG", "bias")})
    layer.train(not case.kept)
    x = _image(tensors["input"])
    leaves = {"input": x, **dict(layer.named_parameters())}
    return contender_of(lambda: layer(x), leaves, _image(tensors["grad"]) if case.training else None)


def _ours_of(case: Case, setting: Setting) -> Contender:
    case = _case_of(case, setting)
    return _construction(case, _ours) if case.picture is None else _our_layer(case)


def _other_construction(construct: Callable[..., Tensor]):
    """Of another construction, and of a layer that has it in front of torch's convolution, as it is published."""

    def prepare(case: Case, setting: Setting) -> Contender:
        case = _case_of(case, setting)
        if case.picture is None:
            return _construction(case, construct)
        if case.kept:
            raise Skip("keeps no kernel")
        tensors = parameters(case)
        leaves = {name: tensors[name] for name in ("input", "weight", "P", "SIG", "bias")}

        def forward() -> Tensor:
            kernel = construct(leaves["weight"], leaves["P"], leaves["SIG"], case.kernel)
            return F.conv2d(leaves["input"], kernel, leaves["bias"], 1, case.kernel // 2, 1, case.channels)

        return contender_of(forward, leaves, _grad(case, tensors))

    return prepare


def _plain(convolution: Callable[..., Tensor]):
    """The convolution alone, with a kernel that is there."""

    def prepare(case: Case, setting: Setting) -> Contender:
        case = _case_of(case, setting)
        if case.picture is None:
            raise Skip(NO_PART)
        tensors = parameters(case)
        kernel = _ours(tensors["weight"], tensors["P"], tensors["SIG"], case.kernel)
        leaves = {"input": _image(tensors["input"]), "kernel": kernel, "bias": tensors["bias"]}

        def forward() -> Tensor:
            return convolution(*leaves.values(), case.kernel // 2, case.channels)

        contender = contender_of(forward, leaves, _image(tensors["grad"]) if case.training else None)
        everything = contender.outputs
        contender.outputs = lambda: {k: v for k, v in everything().items() if k != "grad kernel"}
        return contender

    return prepare


def _our_module(x: Tensor, kernel: Tensor, bias: Tensor, padding: int, groups: int) -> Tensor:
    return PF.weighted_conv2d(x, kernel, None, bias, 1, padding, 1, groups)


def _torch_convolution(x: Tensor, kernel: Tensor, bias: Tensor, padding: int, groups: int) -> Tensor:
    return F.conv2d(x, kernel, bias, 1, padding, 1, groups)


PROVIDERS = (
    Provider(OURS, "ours", _ours_of, ours=True),
    Provider(NAIVE, "naive torch", _other_construction(naive_kernel)),
    Provider(SEPARABLE, "separable torch", _other_construction(_separable)),
    Provider(PLAIN, "our plain convolution", _plain(_our_module)),
    Provider(TORCH, "torch's, channels_last", _plain(_torch_convolution)),
)


# ----------------------------------------------------------------------------------------------------------- reference


def expected_results(case: Case, setting: Setting) -> Expected:
    """The float64 results of torch, tap by tap."""
    if not isinstance(case, DclsBench):
        return {}
    tensors = parameters(case)
    names = ["weight", "P", "SIG"] if case.picture is None else ["input", "weight", "P", "SIG", "bias"]
    leaves = {name: tensors[name].double().requires_grad_(case.training) for name in names}
    y = naive_kernel(leaves["weight"], leaves["P"], leaves["SIG"], case.kernel)
    if case.picture is not None:
        y = F.conv2d(leaves["input"], y, leaves["bias"], 1, case.kernel // 2, 1, case.channels)
    results = {"output": [((), y.detach())]}
    if case.training:
        grads = torch.autograd.grad(y, list(leaves.values()), tensors["grad"].double())
        results |= {f"grad {name}": [((), grad)] for name, grad in zip(names, grads, strict=True)}
    return results
