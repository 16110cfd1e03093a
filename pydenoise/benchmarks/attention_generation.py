"""Providers of the ``attention`` suite for whole generations: the same model and sampler with and without SparseD."""

import time
from collections.abc import Callable

import torch
from torch import nn

from pydenoise.benchmarks.attention_cases import GenerationBench, named
from pydenoise.benchmarks.attention_inputs import DTYPES, NO_PART
from pydenoise.benchmarks.cases import Case
from pydenoise.benchmarks.providers import Contender, Provider, Setting, Skip
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


def make_generation(case: GenerationBench, setting: Setting, sparsed: bool) -> Callable[[], object]:
    """A call that generates; with ``sparsed``, in a model that has SparseD attached."""
    from pydenoise.samplers.masked import SemiAutoregressive
    from pydenoise.surgery.sparsed import attach_sparsed

    model = build_model(case, setting)
    prompt = torch.randint(case.vocabulary, (1, case.length // 2), generator=torch.Generator().manual_seed(1))
    new = case.length - prompt.shape[1]
    handle = None
    if sparsed:
        backend = "cpu" if setting.device == "cpu" else "auto"
        options = {"select": case.select, "block_size": case.block_size, "backend": backend}
        handle = attach_sparsed(model, kind="sdpa", **options)
    sampler = SemiAutoregressive(
        model, model.mask_token, gen_length=new, block_length=new // BLOCKS, steps=case.steps, sparsity=handle
    )

    def generate() -> object:
        result = sampler.generate(prompt.to(setting.device), seed=0)
        if handle is not None and not all(entry.sparse_calls for entry in handle.report().layers):
            raise RuntimeError(f"SparseD took no sparse step: {handle.report()}")
        return result

    generate.handle = handle
    return generate


def _generation(precision: str, sparsed: bool):
    def prepare(case: Case, setting: Setting) -> Contender:
        if not isinstance(case, GenerationBench) or case.precision != precision:
            raise Skip(NO_PART)
        generate = make_generation(case, setting, sparsed)
        try:
            generate()  # what is loaded or allocated once, and the report
        except BackendUnavailable as error:
            raise Skip(str(error)) from error

        def sample() -> float:
            start = time.perf_counter()
            generate()
            return time.perf_counter() - start

        return Contender(generate, sample=sample, note=str(generate.handle.report()) if sparsed else "")

    return prepare


def _providers(name: str, label: str, sparsed: bool) -> list[Provider]:
    endings = {"fp32": "", "bf16": " bf16"}
    return [
        Provider(*named((name,), p), label + endings[p], _generation(p, sparsed), p, ours=sparsed) for p in PRECISIONS
    ]


OURS = tuple(_providers("ours-generation", "SparseD", True))
PEERS = tuple(_providers("dense-generation", "dense", False))
