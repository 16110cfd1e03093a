"""Tokens and confidences from logits of a large vocabulary: against torch, and against the published sampling code.

    python bench/bench_token_confidence.py [--threads 1] [--rows 32] [--seconds 4]   # interleaved, with ratios
    pytest bench/bench_token_confidence.py --benchmark-only                          # one provider after the other

The floor is the logits read once, at the measured rate of reading memory. ``pydenoise bench attention`` has the plain
case (no noise, no guidance) beside the other parts of a masked-diffusion step.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import pydenoise.functional as PF
from pydenoise import _native
from pydenoise.benchmarks import measure

VOCABULARY = 126464  # LLaDA's


@dataclass(frozen=True)
class Case:
    """One call. ``peaked``: as a language model's, one token in some hundreds of thousands far above the others."""

    name: str
    dtype: torch.dtype
    temperature: float = 0.0
    guidance: float = 0.0
    peaked: bool = False

    def logits(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """(conditional, unconditional or None), [rows, VOCABULARY]."""
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            x = torch.randn(rows, VOCABULARY, generator=generator) * 2
            if self.peaked:
                x[:, :: VOCABULARY // 20] += 16
            return x.to(self.dtype)

        return draw(), draw() if self.guidance else None


CASES = (
    Case("greedy fp32", torch.float32),
    Case("greedy bf16", torch.bfloat16),
    Case("guided bf16", torch.bfloat16, guidance=1.5),
    Case("sampled fp32", torch.float32, temperature=1.0),
    Case("sampled bf16", torch.bfloat16, temperature=1.0),
    Case("sampled bf16, peaked", torch.bfloat16, temperature=1.0, peaked=True),
)


def ours(case: Case, c: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
    return PF.token_confidence(c, unconditional=u, guidance=case.guidance, temperature=case.temperature, seed=1)


def plain(case: Case, c: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax, argmax and gather in the logits' dtype; noise as float32 exponentials."""
    logits = c if u is None else u + (case.guidance + 1) * (c - u)
    noised = logits
    if case.temperature:
        noised = logits - case.temperature * torch.empty_like(logits, dtype=torch.float32).exponential_().log_()
    token = noised.argmax(-1)
    return token, logits.softmax(-1).gather(-1, token[:, None])[:, 0]


def published(case: Case, c: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
    """As the sampling code of LLaDA computes it: exp(l) / (-log u)^T in float64."""
    logits = c if u is None else u + (case.guidance + 1) * (c - u)
    noised = logits
    if case.temperature:
        wide = logits.double()
        noised = wide.exp() / (-torch.rand_like(wide).log()) ** case.temperature
    token = noised.argmax(-1)
    return token, logits.softmax(-1).gather(-1, token[:, None])[:, 0]


PROVIDERS: dict[str, Callable] = {"pydenoise": ours, "torch": plain, "published": published}


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("call", CASES, ids=lambda call: call.name)
def test_token_confidence(benchmark, request, call, name):
    c, u = call.logits(1 if request.config.getoption("--quick") else 32)
    benchmark.group = call.name
    benchmark(lambda: PROVIDERS[name](call, c, u))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rate = _native.extension().module.measure_peak("read", 0.5, options.threads)
    print(
        f"{options.rows} x {VOCABULARY} logits, {options.threads} threads, read at {rate / 1e9:.1f} GB/s; best, median"
    )
    for case in CASES:
        c, u = case.logits(options.rows)
        calls = {name: lambda run=run: run(case, c, u) for name, run in PROVIDERS.items()}  # noqa: B023
        if not case.temperature:
            del calls["published"]  # the same as torch
        timings = measure.interleave(calls, rounds=200, budget_seconds=options.seconds)
        floor = c.numel() * c.element_size() * (1 if u is None else 2) / rate
        best = {name: timing.minimum for name, timing in timings.items()}
        line = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in best.items())
        ratios = ", ".join(
            f"{ratio.of_minima:.1f}x ({ratio.median:.1f}x) {name}"
            for name in calls
            if name != "pydenoise" and (ratio := measure.paired_ratio(timings["pydenoise"], timings[name]))
        )
        print(f"{case.name:>22}: {line}; {ratios}; floor {1e3 * floor:.2f} ms ({floor / best['pydenoise']:.0%})")


if __name__ == "__main__":
    main()
