"""``Sampler.sample(differentiable=...)``: what is refused, and which engine runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.samplers._adjoint import Adjoint, last_step
from pydenoise.samplers._checkpoint import Checkpoint
from pydenoise.samplers._differentiable import Gradient, Model
from pydenoise.samplers._loop import Loop
from pydenoise.samplers.levels import check_count
from pydenoise.samplers.plan import Control

WAYS = ("checkpoint", "adjoint")
CHECKPOINTS = 16


@dataclass(frozen=True)
class Way:
    """How a run is differentiated. ``checkpoints``: stored states, for "checkpoint"."""

    name: str
    checkpoints: int

    def run(
        self, sampler, loop: Loop, control: Control | None, x: Tensor, keys: Tensor | None,
        conditions: Mapping[str, object], noise: Mapping[int, Tensor] | None, after: Callable[[int], None],
    ) -> Tensor:  # fmt: skip
        """A sample with gradients."""
        if control is not None:
            raise ValueError(
                f"differentiable: the coefficients of {sampler.solver.name} depend on the data of each step, which "
                f"{self.name!r} cannot differentiate; expected a solver whose rows are fixed, such as DDIM"
            )
        model = Model(sampler.denoiser, conditions, x.device)
        if self.name == "adjoint":
            engine, zs = Adjoint(loop, model, sampler.observers, sampler.conversion), []
        else:
            engine = Checkpoint(loop, model, sampler.observers, keys, noise, self.checkpoints)
            zs = [] if noise is None else list(noise.values())
        result = engine.forward(x, after)
        return Gradient.apply(engine, result, x, *zs, *model.given, *model.parameters)


def way_of(sampler, name: str | None, checkpoints: int | None, trajectory: bool) -> Way | None:
    """The way that these arguments of ``sample`` ask for; ``None``: no gradients."""
    if name is None:
        if checkpoints is not None:
            raise ValueError("checkpoints: given without differentiable='checkpoint'")
        return None
    if name not in WAYS:
        raise ValueError(f"differentiable: expected {' or '.join(map(repr, WAYS))} or None, got {name!r}")
    if checkpoints is not None and name != "checkpoint":
        raise ValueError(f"checkpoints: {name!r} stores no states")
    slots = CHECKPOINTS if checkpoints is None else check_count("checkpoints", checkpoints)
    if trajectory:
        raise ValueError("return_trajectory: only the sample itself is differentiable")
    _check_sampler(sampler, name)
    return Way(name, slots) if torch.is_grad_enabled() else None


def _check_sampler(sampler, name: str) -> None:
    solver, plan = sampler.solver, sampler.plan
    for observer in sampler.observers:
        if not hasattr(observer, "graph_key") or getattr(observer, "changes_sample", False):
            raise ValueError(
                f"differentiable: calls are repeated in another order, which {type(observer).__name__} may not bear; "
                "observers need a graph_key"
            )
    if sampler._graph:
        raise ValueError("graph: no CUDA graph, because the run is differentiable")
    if name == "checkpoint":
        return
    if plan.start is not None or plan.predictions != 1:
        raise ValueError(f"differentiable: {solver.name} solves another equation than 'adjoint'; use 'checkpoint'")
    if plan.needs_noise:
        raise ValueError(f"differentiable: 'adjoint' needs a solver without noise, {solver!r} adds some")
    if sampler.conversion.limits:
        raise ValueError("differentiable: 'adjoint' needs a smooth equation, without clip or dynamic_threshold")
    if sampler._options["epsilon_scale"] is not None:
        raise ValueError("differentiable: 'adjoint' does not know epsilon_scale; use 'checkpoint'")
    last_step(plan, sampler.conversion)
