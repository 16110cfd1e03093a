"""Providers of the ``attention`` suite, and its float64 reference.

Results are checked on some heads and some blocks of queries: the whole reference would take longer than the bench.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise.benchmarks import attention_generation, attention_memory, attention_pattern, attention_peers
from pydenoise.benchmarks.attention_cases import AttentionBench, MemoryBench, PatternBench
from pydenoise.benchmarks.attention_inputs import draw, mask_of, of_ours
from pydenoise.benchmarks.cases import Case
from pydenoise.benchmarks.convolution import Expected
from pydenoise.benchmarks.providers import NO_PART, RESULT_BOUNDS, Contender, Provider, Setting, Skip, cpu_only, images

PRECISIONS = ("fp32", "bf16", "fp16")
BOUNDS = RESULT_BOUNDS | {"fp16": 5e-3}


def _of_case(case: Case, precision: str) -> AttentionBench:
    if not isinstance(case, AttentionBench) or case.precision != precision:
        raise Skip(NO_PART)
    return case


def _contender(case: AttentionBench, call: Callable[..., Tensor], tensors: tuple[Tensor, ...], what: str) -> Contender:
    """``what``: "output" or "dense", the name under which the reference has this result."""
    query, key, value, grad = tensors
    if not case.training:

        def run() -> Tensor:
            with torch.inference_mode():
                return call(query, key, value)

        return Contender(run, lambda: {what: images(run())})
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]

    def step() -> tuple[Tensor, ...]:
        y = call(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad)

    names = [what, *(f"{what} d {name}" for name in ("query", "key", "value"))]
    return Contender(step, lambda: dict(zip(names, map(images, step()), strict=True)))


# ------------------------------------------------------------------------------------------------------------ ours


def _ours(backend: str, precision: str, layout: str = "heads", qk_dtype: str | None = None):
    """The functional; ``qk_dtype`` "int8" takes bfloat16 tensors."""

    def prepare(case: Case, setting: Setting) -> Contender:
        case = _of_case(case, precision)
        if qk_dtype is not None and case.training:
            raise Skip("int8 scores have no gradients")
        mask, tensors = mask_of(case, setting), draw(case, setting, precision, layout)
        call = partial(PF.block_sparse_attention, qk_dtype=qk_dtype, backend=backend)
        contender = _contender(case, lambda *qkv: call(*qkv[:3], mask), tensors, "output")
        return of_ours(contender, setting, backend)

    return prepare


# ----------------------------------------------------------------------------------------------------------- torch


def _sdpa(precision: str, layout: str):
    def prepare(case: Case, setting: Setting) -> Contender:
        if isinstance(case, PatternBench) and case.precision == precision and layout == "heads":
            query, key, value, _ = draw(case, setting, precision, layout)
            return attention_pattern.contender(lambda: attention_peers.sdpa(query, key, value))
        case = _of_case(case, precision)
        if layout == "projection" and (case.density < 1 or case.rounds is not None) and not setting.quick:
            raise Skip("dense attention does not depend on the density: this layout takes part at density 1, to 8k")
        return _contender(case, attention_peers.sdpa, draw(case, setting, precision, layout), "dense")

    return prepare


def _sdpa_masked(precision: str):
    def prepare(case: Case, setting: Setting) -> Contender:
        case = _of_case(case, precision)
        call = attention_peers.sdpa_masked(mask_of(case, setting))
        return _contender(case, call, draw(case, setting, precision, "heads"), "output")

    return prepare


def _flex(precision: str):
    def prepare(case: Case, setting: Setting) -> Contender:
        case = _of_case(case, precision)
        tensors = draw(case, setting, precision, "heads")
        call = attention_peers.flex(case, setting, mask_of(case, setting), tensors[:3])
        return _contender(case, call, tensors, "output")

    return prepare


# ---------------------------------------------------------------------------------------------------------- memory


def _memory(case: Case, setting: Setting) -> Contender:
    if not isinstance(case, MemoryBench):
        raise Skip(NO_PART)
    cpu_only(setting)
    return Contender(memory=lambda: attention_memory.measure_in_child(case, setting.threads, "cpu"))


def _in_all_precisions(
    name: str, label: str, make: Callable, ours: bool = False, default: bool = True
) -> list[Provider]:
    """``make(precision)`` for each; float32 goes without saying in names and labels."""
    providers = []
    for precision in PRECISIONS:
        ending = "" if precision == "fp32" else precision
        names = f"{name}-{ending}".rstrip("-"), f"{label} {ending}".rstrip()
        providers.append(Provider(*names, make(precision), precision, ours, default))
    return providers


PROVIDERS = (
    *_in_all_precisions("ours-cpu", "ours cpu", lambda p: _ours("cpu", p), ours=True),
    Provider("ours-cpu-int8", "ours cpu, int8 QK", _ours("cpu", "bf16", qk_dtype="int8"), "int8", ours=True),
    *_in_all_precisions(
        "ours-cpu-projection", "ours cpu, projection", lambda p: _ours("cpu", p, "projection"), ours=True, default=False
    ),
    *_in_all_precisions("ours-triton", "ours triton", lambda p: _ours("triton", p), ours=True),
    Provider("ours-triton-int8", "ours triton, int8 QK", _ours("triton", "bf16", qk_dtype="int8"), "int8", ours=True),
    *_in_all_precisions("ours-cuda", "ours cuda", lambda p: _ours("cuda", p), ours=True),
    Provider("ours-cuda-int8", "ours cuda, int8 QK", _ours("cuda", "bf16", qk_dtype="int8"), "int8", ours=True),
    *attention_pattern.OURS,
    *attention_generation.OURS,
    Provider("ours-memory", "ours cpu", _memory, ours=True),
    *_in_all_precisions("sdpa", "SDPA", lambda p: _sdpa(p, "heads")),
    *_in_all_precisions("sdpa-projection", "SDPA, projection", lambda p: _sdpa(p, "projection")),
    *_in_all_precisions("sdpa-masked", "SDPA, token mask", _sdpa_masked, default=False),
    *_in_all_precisions("flex", "FlexAttention", _flex),
    *attention_pattern.PEERS,
    *attention_generation.PEERS,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- reference


def expected_results(case: Case, setting: Setting) -> Expected:
    """The float64 results, sparse ("output") and dense, of the first and last head; forward only of some rows."""
    if not isinstance(case, AttentionBench):
        return attention_pattern.expected_results(case, setting)
    query, key, value, grad = (tensor.double() for tensor in draw(case, Setting(setting.threads), "fp32", "heads"))
    kept, results = case.kept_blocks(), {}
    for head in dict.fromkeys((0, case.heads - 1)):
        tensors = [tensor[0, head] for tensor in (query, key, value, grad)]
        blocks = {"output": kept[0, head], "dense": torch.ones_like(kept[0, head])}
        for what, mine in blocks.items():
            for name, part in _reference(case, *tensors, mine):
                index = (0, head, part[0])
                results.setdefault(f"{what}{name}", []).append((index, part[1]))
    return results


def _reference(case: AttentionBench, query, key, value, grad, kept: Tensor):
    """(suffix of the result's name, (slice of tokens, values)) of one head."""
    size, scale, n = case.block_size, case.head_size**-0.5, kept.shape[0]
    rows = range(n) if case.training else dict.fromkeys((0, n // 2, n - 1))
    grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for row in rows:
        tokens = slice(row * size, min((row + 1) * size, case.length))
        keys = kept[row].repeat_interleave(size)[: case.length].nonzero()[:, 0]
        mine, theirs, values = query[tokens], key[keys], value[keys]
        if not len(keys):
            yield "", (tokens, torch.zeros_like(mine))
            continue
        weights = torch.softmax(mine @ theirs.mT * scale, -1)
        output = weights @ values
        yield "", (tokens, output)
        if case.training:
            g = grad[tokens]
            error = weights * (g @ values.mT - (g * output).sum(-1, keepdim=True)) * scale
            grads[0][tokens] = error @ theirs
            grads[1].index_add_(0, keys, error.mT @ mine)
            grads[2].index_add_(0, keys, weights.mT @ g)
    if case.training:
        for name, values in zip(("query", "key", "value"), grads, strict=True):
            yield f" d {name}", (slice(None), values)
