"""Train a tokenizer and a masked-diffusion language model on real text, in minutes on two cores.

Run: python examples/train_masked_lm.py OUT.safetensors [--text stdlib|bible|FILE|FOLDER]

Windows grow while it trains, so that the model is at home in long texts too. The table at the end is a bound on the
perplexity of held-out text. The model that pydenoise.models.load_masked_lm() gives was made by this.
"""

import argparse
import json
import math
import platform
import shlex
import sys
import time
import warnings

import torch
from rich.progress import Progress
from torch import Tensor

from pydenoise.models import MaskedLM
from pydenoise.models.bpe import BPE
from pydenoise.models.masked_lm import masked_nll, save_masked_lm
from pydenoise.models.text import load_corpus, tokens_of

WINDOWS = (
    (0.45, 256),
    (0.7, 512),
    (0.88, 1024),
    (1.0, 2048),
)  # (until this share of the steps, tokens in a window)
WARMUP, DECAY = 0.03, 0.5  # shares of the steps at the start and at the end
PRINT_EVERY = 50


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # norms: float32 weights
    corpus = load_corpus(args.text)
    tokenizer = BPE.learn(corpus.training, args.vocabulary)
    training, validation = (tokens_of(texts, tokenizer) for texts in (corpus.training, corpus.validation))
    characters = sum(map(len, corpus.validation)) / len(validation)  # in a token
    model = MaskedLM(tokenizer.vocabulary, args.width, args.layers, args.heads, args.hidden)
    print(f"{corpus.name}: {len(training) / 1e6:.2f} + {len(validation) / 1e6:.2f} million tokens of {characters:.2f} "
          f"characters (training + validation); {parameters(model) / 1e6:.2f} million parameters")  # fmt: skip

    start = time.perf_counter()
    train(model, training, args)
    minutes = (time.perf_counter() - start) / 60
    print(f"trained in {minutes:.1f} minutes")

    table = {length: validate(model, validation, length, args.validation) for length in args.lengths}
    for length, nll in table.items():
        each = math.exp(nll / characters)
        print(f"windows of {length:4d}: perplexity {math.exp(nll):.2f} a token, {each:.3f} a character")
    notes = {
        "command": shlex.join(["python", *sys.argv]),
        "arguments": vars(args),
        "minutes": round(minutes, 1),
        "characters_per_token": round(characters, 3),
        "perplexity_per_token": {length: round(math.exp(nll), 3) for length, nll in table.items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    save_masked_lm(model, tokenizer, args.out, notes=notes, dtype=torch.bfloat16)
    print(f"wrote {args.out}: {json.dumps(model.config)}")


def train(model: MaskedLM, tokens: Tensor, args: argparse.Namespace) -> None:
    """Matrices inside the layers by Muon, the rest by AdamW; multiplications in bfloat16 unless ``--float32``."""
    inside = [weight for weight in model.layers.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in inside)]
    muon = torch.optim.Muon(inside, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    shown = 0.0
    with Progress() as progress:
        task = progress.add_task("training", total=args.steps)
        for step in range(args.steps):
            length = next(size for share, size in WINDOWS if step < share * args.steps)
            batch = random_windows(tokens, max(1, args.batch // length), min(length, args.batch))
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
                loss = masked_nll(model, batch).mean()
            loss.backward()
            for optimizer in (muon, adam):
                optimizer.param_groups[0]["lr"] = args.lr * rate((step + 1) / args.steps)
                optimizer.step()
                optimizer.zero_grad()
            shown += loss.item()
            progress.advance(task)
            if (step + 1) % PRINT_EVERY == 0:
                seconds = progress.tasks[task].elapsed
                mean, shown = shown / PRINT_EVERY, 0.0
                progress.console.print(f"step {step + 1:4d}, window {length:4d}: {mean:.3f} nats, {seconds:.0f} s")


def rate(share: float) -> float:
    """The learning rate after this share of the steps, between 0 and 1: up, level, down."""
    return min(1.0, share / WARMUP, (1 - share) / DECAY + 1e-3)


def random_windows(tokens: Tensor, count: int, length: int) -> Tensor:
    """[count, length]"""
    starts = torch.randint(0, len(tokens) - length + 1, (count, 1))
    return tokens[starts + torch.arange(length)]


@torch.inference_mode()
def validate(model: MaskedLM, tokens: Tensor, length: int, total: int) -> float:
    """Nats a token on windows spread over ``tokens``, ``total`` of them in all; the same for every model."""
    count = max(1, total // length)
    starts = torch.linspace(0, len(tokens) - length, count).long()[:, None]
    windows = tokens[starts + torch.arange(length)]
    generator = torch.Generator().manual_seed(0)
    return masked_nll(model, windows, generator=generator, batch=max(1, 8192 // length)).mean().item()


def parameters(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="the safetensors file to write")
    parser.add_argument("--text", default="stdlib", help="stdlib, bible (needs Debian's bible-kjv), a file or a folder")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens to learn")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=4096, help="tokens a step")
    parser.add_argument("--lr", type=float, default=1.2e-2)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--validation", type=int, default=65536, help="tokens to measure on, for each length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="no bfloat16: slower where the processor has it")
    args = parser.parse_args()
    for name in ("steps", "batch", "validation"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
