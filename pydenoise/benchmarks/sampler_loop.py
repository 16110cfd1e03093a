"""Providers of the ``sampler`` suite's whole runs: ``Sampler.sample`` beside the loop of a pipeline of diffusers."""

import copy
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from pydenoise import functional as PF
from pydenoise.benchmarks import sampler_peers
from pydenoise.benchmarks.cases import Case
from pydenoise.benchmarks.convolution import Expected
from pydenoise.benchmarks.providers import Contender, Provider, Setting, Skip, cpu_only, images, require
from pydenoise.benchmarks.sampler_cases import SCHEDULE, SOLVERS, LoopBench, is_random
from pydenoise.samplers import Sampler

Model = Callable[[Tensor, Tensor], Tensor]
NO_PART = "no part of this case"
SEED = 5


def _of_case(case: Case, setting: Setting) -> LoopBench:
    if not isinstance(case, LoopBench):
        raise Skip(NO_PART)
    cpu_only(setting)
    return case


def _start(case: LoopBench) -> Tensor:
    return torch.randn(case.shape, generator=torch.Generator().manual_seed(0))


def _model(case: LoopBench, dtype: torch.dtype = torch.float32) -> Model:
    """The denoiser: from x [B, ...] and times [B] or one for all to the noise."""
    if case.model == "trivial":
        output = torch.randn(case.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return lambda x, t: output
    network = _network(case.model)
    if dtype != torch.float32:
        network = copy.deepcopy(network).to(dtype)
    if case.model == "digits":
        return network
    return lambda x, t: network(x, t, return_dict=False)[0]


@lru_cache
def _network(name: str) -> nn.Module:
    if name == "digits":
        from pydenoise.models.digits import load_digits

        return load_digits().requires_grad_(False)
    UNet2DModel = require("diffusers").UNet2DModel
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
    return network.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ ours


def _sampler(case: LoopBench, dtype: torch.dtype = torch.float32, backend: str = "auto") -> Sampler:
    return Sampler(_model(case, dtype), SCHEDULE, SOLVERS[case.solver], case.steps, backend=backend)


def _ours(case: Case, setting: Setting) -> Contender:
    case = _of_case(case, setting)
    sampler, start = _sampler(case), _start(case)
    seed = SEED if is_random(case.solver) else None

    def run() -> Tensor:
        return sampler.sample(start, seed=seed)

    return Contender(run, lambda: {"sample": images(run())})


def _bare(case: Case, setting: Setting) -> Contender:
    """The calls of model and prepared step alone, on the buffers that a run needs."""
    case = _of_case(case, setting)
    if not case.bare:
        raise Skip(NO_PART)
    plan, model, start = case.plan, _model(case), _start(case)
    x, base = start.clone(), start.clone() if plan.uses_base else None
    keys = torch.stack([torch.full((len(x),), SEED), torch.arange(len(x))], 1) if plan.needs_noise else None
    history = start.new_zeros(plan.slots, *x.shape) if plan.slots else None
    buffers = PF.StepBuffers(x, plan.table.float(), x, base=base, kept=base, history=history, keys=keys)
    step = PF.bind_sampler_step(buffers).run
    times = torch.tensor(plan.times)[:, None].expand(-1, len(x)).contiguous().unbind()

    def run() -> None:
        x.copy_(start)
        with torch.inference_mode():
            for call, t in enumerate(times):
                step(model(x, t), None, call, call + 1)

    return Contender(run)


OURS = (Provider("ours-sampler", "ours", _ours, ours=True),)


# ------------------------------------------------------------------------------------------------------- diffusers


def diffusers_loop(case: LoopBench) -> Contender:
    """The loop of a pipeline, without its progress bar."""
    run = sampler_peers.run_loop(case, _model(case), _start(case))
    return Contender(run, None if is_random(case.solver) else lambda: {"sample": images(run())})


PEERS = (
    Provider("bare", "model and step alone", _bare),
    Provider("diffusers-loop", "diffusers", lambda case, setting: diffusers_loop(_of_case(case, setting))),
)


# ------------------------------------------------------------------------------------------------------- reference


def expected_results(case: LoopBench) -> Expected:
    """The same run in float64, model and all, on the reference of the op."""
    sampler = _sampler(case, torch.float64, "reference")
    x = sampler.sample(_start(case).double(), seed=SEED if is_random(case.solver) else None)
    return {"sample": [((Ellipsis,), x)]}
