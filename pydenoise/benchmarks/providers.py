"""What a provider is: one way to compute a case, that either prepares a contender or says why it cannot."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# Largest error over the largest value that passes as "the same result". The float32 bound is the one that Winograd has;
# the int8 bound only tells a wrong network from a coarse one (the reports show the signal-to-noise ratio beside it).
RESULT_BOUNDS = {"fp32": 2e-5, "bf16": 3e-2, "int8": 0.25}


class Skip(Exception):
    """A provider does not take part in a case; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What all contenders of a run share."""

    threads: int
    device: str = "cpu"
    quick: bool = False


@dataclass
class Contender:
    """A prepared provider: ``run`` is the timed call.

    ``outputs`` makes a fresh call and returns its results by name, in torch's NCHW shapes, for the check against the
    float64 reference. ``sample``, if given, takes a time sample itself (in seconds) and is used in place of ``run``.
    ``memory`` is for a provider that is measured in bytes and not in time: it returns "peak_bytes" and what else there
    is to say about the measurement.
    """

    run: Callable[[], object] = lambda: None
    outputs: Callable[[], dict[str, Tensor]] | None = None
    sample: Callable[[], float] | None = None
    memory: Callable[[], dict] | None = None
    note: str = ""


@dataclass(frozen=True)
class Provider:
    """A column of the comparison. ``default`` is false for those that run only when they are named."""

    name: str
    label: str
    prepare: Callable[..., Contender] = field(repr=False)
    precision: str = "fp32"
    ours: bool = False
    default: bool = True


NO_PART = "no part of this case"  # why a provider skips it; the report leaves such lines out


def choose(providers: Sequence[Provider], names: Sequence[str] | None) -> list[Provider]:
    """The providers called ``names``, or the default ones. Raises ``ValueError`` with the known names."""
    if names is None:
        return [provider for provider in providers if provider.default]
    known = {provider.name: provider for provider in providers}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"provider: no provider named {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def require(module: str, package: str | None = None):
    """Import an optional module or skip the provider with the sentence that tells how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Skip(f"{package or module} is not installed ({error}); pip install {package or module}") from error


def cpu_only(setting: Setting) -> None:
    if setting.device != "cpu":
        raise Skip(f"runs on the CPU; this run is on {setting.device}")


def gpu_only(setting: Setting) -> None:
    if setting.device == "cpu":
        raise Skip("no GPU in this run" if torch.cuda.is_available() else "no NVIDIA GPU on this machine")


def images(value: Tensor) -> Tensor:
    """A detached float64 copy on the CPU, for the comparison of results."""
    return value.detach().to("cpu", torch.float64)


def contender_of(
    forward: Callable[[], Tensor], leaves: Mapping[str, Tensor] | None = None, grad: Tensor | None = None
) -> Contender:
    """``forward`` without gradients; with ``grad``, that of its result, forward and backward to the ``leaves``.

    The results are called "output" and "grad" with the leaf's name.
    """
    inputs = [] if grad is None else [leaf.requires_grad_(True) for leaf in leaves.values()]

    def run() -> tuple[Tensor, Sequence[Tensor]]:
        if grad is None:
            with torch.no_grad():
                return forward(), ()
        y = forward()
        return y, torch.autograd.grad(y, inputs, grad)

    def outputs() -> dict[str, Tensor]:
        y, grads = run()
        return {"output": images(y)} | {f"grad {k}": images(g) for k, g in zip(leaves or (), grads, strict=bool(grads))}

    return Contender(run, outputs)


def expected_of(contender: Contender) -> dict[str, list[tuple[tuple, Tensor]]]:
    """Its results as those that others are compared with."""
    return {name: [((), value)] for name, value in contender.outputs().items()}


@torch.no_grad()
def fill_zeros(module: nn.Module) -> nn.Module:
    """Small random numbers in parameters that begin at zero: else a block's parts would not show in its result."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=0.05)
    return module
