"""Continue real source text with a masked-diffusion language model, with full attention and with SparseD.

Run: python examples/sparse_generation.py [--lengths 512 1024 2048 4096] [--weights FILE]

The model is the small one that ships with pydenoise (examples/train_masked_lm.py made it); the prompts are files of
Python's library that it was not trained on. The table, for growing lengths:

    density, recall   share of the blocks that SparseD keeps, and of the attention weights inside them
    same text         share of the new tokens that are the same in both texts (one that differs changes all later ones)
    same state        share of the masked tokens for which both predict the same, given the same tokens around
    ppl               perplexity of the new tokens under the model with full attention; real: of what was written there
    ms/step           median, of SparseD's sparse steps; all steps: how much faster the whole generation was
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

import pydenoise as pdn
from pydenoise.models import MaskedLM, load_masked_lm
from pydenoise.models.masked_lm import masked_nll
from pydenoise.models.text import load_corpus, tokens_of
from pydenoise.samplers.masked import Generation, SemiAutoregressive

COLUMNS = (
    ("tokens", 6), ("density", 7), ("recall", 6), ("same text", 9), ("same state", 10), ("ppl full", 8),
    ("ppl sparse", 10), ("ppl real", 8), ("full ms/step", 12), ("sparse ms/step", 14), ("all steps", 9),
)  # fmt: skip


@dataclass
class Run:
    """One generation."""

    result: Generation
    seconds: list[float]  # of each step

    @property
    def text(self) -> Tensor:
        """The generated tokens."""
        return self.result.generated[0]


def main() -> None:
    args = arguments()
    model, tokenizer = load_masked_lm(args.weights)
    model = model.to(getattr(torch, args.dtype))
    validation = tokens_of(load_corpus(args.text).validation, tokenizer)
    print(f"{args.new_tokens} new tokens in {args.steps} steps, blocks of {args.block_size}, skip {args.skip}, "
          f"select {args.select}, {args.dtype}, {torch.get_num_threads()} threads")  # fmt: skip
    print("  ".join(f"{name:>{width}}" for name, width in COLUMNS), flush=True)
    texts = []
    for length in args.lengths:
        if not args.new_tokens < length <= len(validation):
            raise SystemExit(f"--lengths: expected {args.new_tokens + 1} to {len(validation)} tokens, got {length}")
        real = validation[args.start :][:length] if args.start + length <= len(validation) else validation[-length:]
        prompt = real[: -args.new_tokens]
        cells, full, sparse = compare(model, prompt, real, args)
        print("  ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)), flush=True)
        texts.append((length, prompt, full, sparse))
    length, prompt, full, sparse = texts[-1]
    print(f"\nat {length} tokens, the end of the prompt:\n{tokenizer.decode(prompt[-60:])}")
    print(f"\nfull attention:\n{tokenizer.decode(full.text[:120])}\n\nSparseD:\n{tokenizer.decode(sparse.text[:120])}")


def compare(model: MaskedLM, prompt: Tensor, real: Tensor, args: argparse.Namespace) -> tuple[list[str], Run, Run]:
    """Generate twice and measure: (cells of the table, full attention's run, SparseD's run)."""
    with torch.inference_mode():
        model(real[None])  # memory is fetched before anything is timed
    full = generate(model, prompt, args, None)
    options = {"kind": "sdpa", "skip": args.skip, "select": args.select, "block_size": args.block_size}
    handle = pdn.attach_sparsed(model, **options)
    sparse = generate(model, prompt, args, handle)
    report = handle.report()
    same_state = agreement(model, handle, full.result, report.dense_steps, args)
    handle.detach()

    same_text = (full.text == sparse.text).float().mean().item()
    texts = (full.result.sequences[0], sparse.result.sequences[0], real)
    perplexities = [perplexity(model, text, len(prompt), args.samples) for text in texts]
    slow = statistics.median(full.seconds)
    fast = statistics.median(sparse.seconds[report.dense_steps :])
    cells = [str(len(real)), f"{report.density:.1%}", f"{report.recall:.1%}", f"{same_text:.1%}", f"{same_state:.1%}"]
    cells += [f"{value:.2f}" for value in perplexities] + [f"{slow * 1e3:.0f}", f"{fast * 1e3:.0f}"]
    return [*cells, f"{sum(full.seconds) / sum(sparse.seconds):.2f}x"], full, sparse


def generate(model: MaskedLM, prompt: Tensor, args: argparse.Namespace, sparsity) -> Run:
    """``sparsity``: the handle of SparseD, or ``None`` for the model as it is."""
    sampler = SemiAutoregressive(
        model, model.mask_token, gen_length=args.new_tokens, block_length=args.block_length, steps=args.steps,
        temperature=args.temperature, sparsity=sparsity,
    )  # fmt: skip
    times = [time.perf_counter()]
    result = sampler.generate(
        prompt, seed=args.seed, callback=lambda info: times.append(time.perf_counter()), return_trajectory=True
    )
    return Run(result, [after - before for before, after in zip(times, times[1:], strict=False)])


@torch.inference_mode()
def agreement(model: MaskedLM, handle, full: Generation, dense_steps: int, args: argparse.Namespace) -> float:
    """Of full attention's own states, in steps that SparseD computes sparsely: how often do both predict the same?

    Two texts drift apart once they differ anywhere; this looks at one step at a time. All masked positions count.
    """
    states = full.trajectory[:-1]
    later = range(dense_steps, len(states))
    chosen = {0, dense_steps - 1, *later[:: max(1, len(later) // args.states)]}
    same = total = 0
    for step in sorted(chosen):
        handle.begin_step(step, len(states), new_tokens=args.new_tokens)
        guess = model(states[step]).argmax(-1)
        if step in later:
            with handle.dense():
                expected = model(states[step]).argmax(-1)
            masked = states[step] == model.mask_token
            same, total = same + (guess == expected)[masked].sum().item(), total + masked.sum().item()
    return same / total


@torch.inference_mode()
def perplexity(model: MaskedLM, text: Tensor, start: int, samples: int) -> float:
    """Of the tokens from ``start`` on, given those before: a bound, with the same random masks for each text."""
    generator = torch.Generator().manual_seed(0)
    return math.exp(masked_nll(model, text.expand(samples, -1), start, generator=generator, batch=1).mean().item())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", help="a file of examples/train_masked_lm.py; default: the one that ships with pydenoise")
    add("--text", default="stdlib", help="where prompts come from: stdlib, bible, a file or a folder")
    add("--start", type=int, default=0, help="where in the held-out text the prompts start, in tokens")
    add("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="prompt and new tokens together")
    add("--new-tokens", type=int, default=128)
    add("--steps", type=int, default=64)
    add("--block-length", type=int, default=8, help="of the sampler: it fills in so many tokens before it goes on")
    add("--temperature", type=float, default=1.0, help="both runs get the same noise; 0: the likeliest tokens")
    add("--skip", type=float, default=0.2, help="share of the steps with full attention")
    add("--select", type=float, default=0.3, help="share of the blocks of keys that are kept")
    add("--block-size", type=int, default=64, choices=(16, 32, 64, 128), help="of the attention")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--samples", type=int, default=8, help="sets of masks for each perplexity")
    add("--states", type=int, default=8, help="steps at which predictions are compared")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if int(args.steps * args.skip) + 2 >= args.steps:
        parser.error(f"--steps: with --skip {args.skip}, all {args.steps} steps would be full; take more")
    return args


if __name__ == "__main__":
    main()
