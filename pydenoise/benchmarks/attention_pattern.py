"""Providers of the ``attention`` suite for what surrounds attention: the pattern's cost, and tokens from logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise.benchmarks.attention_cases import ConfidenceBench, PatternBench, named
from pydenoise.benchmarks.attention_inputs import DTYPES, draw, of_ours
from pydenoise.benchmarks.cases import Case
from pydenoise.benchmarks.convolution import Expected
from pydenoise.benchmarks.providers import NO_PART, Contender, Provider, Setting, Skip, images
from pydenoise.block_mask import BlockMask
from pydenoise.ops.block_importance import first_generated_block
from pydenoise.ops.registry import BackendUnavailable
from pydenoise.reference.block_importance import block_importance
from pydenoise.reference.sparsed_block_mask import sparsed_block_mask

PRECISIONS = ("fp32", "bf16")


def contender(call: Callable[[], object], outputs: Callable[[object], dict[str, Tensor]] | None = None) -> Contender:
    """``outputs`` makes tensors of a result, for the check."""

    def run() -> object:
        with torch.inference_mode():
            return call()

    return Contender(run, None if outputs is None else lambda: outputs(run()))


def _of_case(case: Case, kind: type, precision: str):
    if not isinstance(case, kind) or case.precision != precision:
        raise Skip(NO_PART)
    return case


def _backend(setting: Setting) -> str:
    return "cpu" if setting.device == "cpu" else "auto"


# ----------------------------------------------------------------------------------------------------------- pattern


def _log_sum_exps(case: PatternBench, setting: Setting, query: Tensor, key: Tensor) -> Tensor:
    """Of a dense pass, as its kernel gives them."""
    full = BlockMask.full(case.block_size, case.length, case.length, device=setting.device)
    return PF.block_sparse_attention(query, key, key, full, return_lse=True, backend=_backend(setting))[1]


def _importance(precision: str, with_lse: bool):
    def prepare(case: Case, setting: Setting) -> Contender:
        case = _of_case(case, PatternBench, precision)
        call = _prepared(PF.block_importance, case, setting, with_lse, case.block_size)
        results = lambda pair: dict(zip(("over_all", "over_generated"), map(images, pair), strict=True))  # noqa: E731
        return of_ours(contender(call, results), setting, _backend(setting))

    return prepare


def _mask(precision: str, with_lse: bool):
    def prepare(case: Case, setting: Setting) -> Contender:
        case = _of_case(case, PatternBench, precision)
        call = _prepared(PF.sparsed_block_mask, case, setting, with_lse, block_size=case.block_size, select=case.select)
        return of_ours(
            contender(call, lambda mask: {"mass": _mass(case, mask.to_dense().cpu())}), setting, _backend(setting)
        )

    return prepare


def _prepared(
    op: Callable, case: PatternBench, setting: Setting, with_lse: bool, *args, **rest
) -> Callable[[], object]:
    query, key, _, _ = draw(case, setting, case.precision, "heads")
    backend = _backend(setting)
    lse = None
    if with_lse:
        try:
            with torch.inference_mode():
                lse = _log_sum_exps(case, setting, query, key)
        except BackendUnavailable as error:
            raise Skip(str(error)) from error
    return lambda: op(query, key, *args, new_tokens=case.new_tokens, lse=lse, backend=backend, **rest)


def _sampled(case: PatternBench) -> list[tuple[int, int]]:
    """(head, row of blocks) where results are checked."""
    n = -(-case.length // case.block_size)
    return [(h, row) for h in dict.fromkeys((0, case.heads - 1)) for row in dict.fromkeys((0, n // 2, n - 1))]


def _reference(case: PatternBench) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Both importances, [columns], at the sampled places."""
    query, key, _, _ = (tensor.double() for tensor in draw(case, Setting(1), "fp32", "heads"))
    first = first_generated_block(case.length, case.new_tokens, case.block_size)
    results = {}
    for head, row in _sampled(case):
        tokens = slice(row * case.block_size, (row + 1) * case.block_size)
        mine, theirs = query[:, head : head + 1, tokens], key[:, head : head + 1]
        pair = block_importance(mine, theirs, case.block_size, first, case.head_size**-0.5, None, None)
        results[head, row] = tuple(values[0, 0, 0] for values in pair)
    return results


def _mass(case: PatternBench, kept: Tensor) -> Tensor:
    """The attention that the kept blocks hold at the sampled places, by the reference: near ties may go either way."""
    places = _reference(case)
    return torch.stack([over_all[kept[0, head, row]].sum() for (head, row), (over_all, _) in places.items()])


# -------------------------------------------------------------------------------------------------------- confidence


def _logits(case: ConfidenceBench, setting: Setting) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(case.rows, case.vocabulary, generator=generator) * 3
    return logits.to(setting.device, DTYPES[case.precision])


def _ours_confidence(precision: str):
    def prepare(case: Case, setting: Setting) -> Contender:
        logits = _logits(_of_case(case, ConfidenceBench, precision), setting)
        backend = _backend(setting)
        call = lambda: PF.token_confidence(logits, backend=backend)  # noqa: E731
        return of_ours(contender(call, lambda pair: {"confidence": images(pair[1])}), setting, _backend(setting))

    return prepare


def _torch_confidence(precision: str):
    """The largest logit and the log-sum-exp, in float32: no softmax is stored."""

    def prepare(case: Case, setting: Setting) -> Contender:
        logits = _logits(_of_case(case, ConfidenceBench, precision), setting)

        def call() -> tuple[Tensor, Tensor]:
            largest, token = logits.max(-1)
            return token, (largest.float() - torch.logsumexp(logits.float(), -1)).exp()

        return contender(call, lambda pair: {"confidence": images(pair[1])})

    return prepare


def _published_confidence(precision: str):
    """As the public code of LLaDA has it: the argmax, a softmax of everything, and its value there."""

    def prepare(case: Case, setting: Setting) -> Contender:
        logits = _logits(_of_case(case, ConfidenceBench, precision), setting)

        def call() -> tuple[Tensor, Tensor]:
            token = logits.argmax(-1)
            return token, torch.softmax(logits, -1).gather(-1, token[:, None])[:, 0]

        return contender(call, lambda pair: {"confidence": images(pair[1])})

    return prepare


# --------------------------------------------------------------------------------------------------------- together


def expected_results(case: Case, setting: Setting) -> Expected:
    """The float64 results at the sampled places."""
    if isinstance(case, ConfidenceBench):
        logits = _logits(case, Setting(1)).double()
        return {"confidence": [((Ellipsis,), torch.softmax(logits, -1).amax(-1))]}
    places = _reference(case)
    results = {"over_all": [], "over_generated": []}
    mass = []
    for (head, row), pair in places.items():
        for name, values in zip(results, pair, strict=True):
            results[name].append(((0, head, row), values))
        mass.append(pair[0][sparsed_block_mask(*(v[None] for v in pair), case.select, "reference")[0]].sum())
    return results | {"mass": [((Ellipsis,), torch.stack(mass))]}


def _providers(name: str, label: str, make: Callable, ours: bool = False) -> list[Provider]:
    endings = {"fp32": "", "bf16": " bf16"}
    return [Provider(*named((name,), p), label + endings[p], make(p), p, ours) for p in PRECISIONS]


OURS = (
    *_providers("ours-importance", "importance", lambda p: _importance(p, False), ours=True),
    *_providers("ours-importance-lse", "importance, lse known", lambda p: _importance(p, True), ours=True),
    *_providers("ours-pattern", "mask", lambda p: _mask(p, False), ours=True),
    *_providers("ours-pattern-lse", "mask, lse known", lambda p: _mask(p, True), ours=True),
    *_providers("ours-confidence", "ours", _ours_confidence, ours=True),
)
PEERS = (
    *_providers("torch-confidence", "torch", _torch_confidence),
    *_providers("published-confidence", "published", _published_confidence),
)
