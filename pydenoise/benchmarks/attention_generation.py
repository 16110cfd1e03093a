"""Providers of the ``attention`` suite for whole generations: the same model and sampler with and without SparseD."""

import time
from collections.abc import Callable

import torch
from torch import nn

from pydenoise.benchmarks.attention_cases import GenerationBench, named
from pydenoise.benchmarks.attention_inputs import DTYPES
from pydenoise.benchmarks.cases import Case
from pydenoise.benchmarks.providers import NO_PART, Contender, Provider, Setting, Skip
from pydenoise.ops.registry import BackendUnavailable

PRECISIONS = ("fp32", "bf16")
BLOCKS = 4


def build_model(case: GenerationBench, setting: Setting) -> nn.Module:
    """The case's model with random weights, its last projections too, which an untrained one has at zero."""
    from pydenoise.models.masked_lm import MaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MaskedLM(case.vocabulary, case.width, case.layers, case.heads, hidden=2 * case.width)
        for weight in model.parameters():
            if weight.dim() > 1 and not weight.any():
                nn.init.normal_(weight, std=case.width**-0.5)
    return model.to(setting.device, DTYPES[case.precision]).eval()


def make_generation(case: GenerationBench, setting: Setting, sparsed: bool) -> tuple[Callable[[int], object], object]:
    """(a call that generates a sequence of a length, the handle of SparseD or ``None``)."""
    from pydenoise.samplers.masked import SemiAutoregressive
    from pydenoise.surgery.sparsed import attach_sparsed

    model = build_model(case, setting)
    handle = None
    if sparsed:
        backend = "cpu" if setting.device == "cpu" else "auto"
        options = {"select": case.select, "block_size": case.block_size, "backend": backend}
        handle = attach_sparsed(model, kind="sdpa", **options)

    def generate(length: int) -> object:
        prompt = torch.randint(case.vocabulary, (1, length // 2), generator=torch.Generator().manual_seed(1))
        new = length - prompt.shape[1]
        sampler = SemiAutoregressive(
            model, model.mask_token, gen_length=new, block_length=new // BLOCKS, steps=case.steps, sparsity=handle
        )
        return sampler.generate(prompt.to(setting.device), seed=0)

    return generate, handle


def _generation(precision: str, sparsed: bool):
    def prepare(case: Case, setting: Setting) -> Contender:
        if not isinstance(case, GenerationBench) or case.precision != precision:
            raise Skip(NO_PART)
        generate, handle = make_generation(case, setting, sparsed)
        try:
            generate(min(case.length, 2 * case.block_size))  # what is loaded or allocated once
        except BackendUnavailable as error:
            raise Skip(str(error)) from error
        if handle is not None and not any(entry.sparse_calls for entry in handle.report().layers):
            raise RuntimeError(f"SparseD took no sparse step: {handle.report()}")

        def sample() -> float:
            start = time.perf_counter()
            generate(case.length)
            seconds = time.perf_counter() - start
            if handle is not None:
                contender.note = str(handle.report())
            return seconds

        contender = Contender(lambda: generate(case.length), sample=sample)
        return contender

    return prepare


def _providers(name: str, label: str, sparsed: bool) -> list[Provider]:
    endings = {"fp32": "", "bf16": " bf16"}
    return [
        Provider(*named((name,), p), label + endings[p], _generation(p, sparsed), p, ours=sparsed) for p in PRECISIONS
    ]


OURS = tuple(_providers("ours-generation", "SparseD", True))
PEERS = tuple(_providers("dense-generation", "dense", False))
