"""Tokens and confidences of masked diffusion from logits: argument checks, the torch op, and the backend rows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_tensor
from pydenoise.ops._quantized import call, check_floats, never, values_are_known
from pydenoise.ops.registry import Backend
from pydenoise.reference import token_confidence as reference

OP = "token_confidence"
MOST_TOKENS = 4  # forbidden ones, and uncounted ones

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "token_confidence(Tensor logits, Tensor? unconditional, Tensor? rows, Tensor? keys, float guidance, "
    "float temperature, int seed, int step, int[] forbidden, int[] uncounted, int eos, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)


def token_confidence(
    logits: Tensor,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 0.0,
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
    step: int = 0,
    rows: Tensor | None = None,
    forbidden: Sequence[int] = (),
    uncounted: Sequence[int] = (),
    eos_token_id: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """The most likely (or a sampled) token of every row of logits and its softmax probability, reading a row once.

    ``token = argmax(l + temperature * gumbel)`` and ``confidence = softmax(l)[token]`` with
    ``l = u + (guidance + 1) (c - u)``, without a tensor of the vocabulary's size. Sampling is distributed as
    softmax(l / temperature), like the masked-diffusion code's ``argmax(exp(l) / (-log u)^temperature)`` in float64.

    Args:
        logits: [N, V], c above: float32, bfloat16 or float16, rows of any stride (another last stride is copied);
            float64 runs on the reference. Arithmetic is in float32.
        unconditional: u, of the same shape, dtype and device; ``None``: no guidance.
        guidance: 0 gives c. The masked-diffusion convention; the usual guidance scale is ``guidance + 1``.
        temperature: 0: the argmax, ties to the lower token. Noise comes from Philox4x32-10 by (seed, row's number,
            step, token): the same words on every backend, so tokens differ between backends only where noised logits
            tie within rounding.
        seed: an int, rows then being numbered 0, 1, 2, ...; or int64 [R, 2], the seed and number of every row, so that
            a position keeps its noise whatever it is batched with; ``None``: an int from torch's default generator.
        step: of 32 bits: other steps have other noise.
        rows: int64 [R], the rows of ``logits`` that are wanted; ``None``: all. Out of range is an error for tensors on
            the CPU; elsewhere such a row gives -1 and NaN.
        forbidden: at most 4 tokens that are neither chosen nor part of the softmax, as if their logits were -inf.
        uncounted: at most 4 tokens that can be chosen, but are no part of the softmax: their confidence is 0.
        eos_token_id: a token whose probability is wanted in every row.
        backend: "auto" or one of "cpu", "triton", "cuda", "reference".

    Returns:
        (token int64 [R], confidence float32 [R]), and with ``eos_token_id`` its probability, float32 [R]; float64 for
        float64 logits. A row with NaN or +inf among the tokens that are not forbidden, or with nothing above -inf,
        gives token -1 and NaN. No gradients.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    Source: Nie et al., Large Language Diffusion Models (2025), https://arxiv.org/abs/2502.09992, low-confidence
    remasking; Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
    """
    args = prepare(
        logits, unconditional=unconditional, guidance=guidance, temperature=temperature, seed=seed, step=step,
        rows=rows, forbidden=forbidden, uncounted=uncounted, eos_token_id=eos_token_id,
    )  # fmt: skip
    token, confidence, probability = call(OP, torch.ops.pydenoise.token_confidence, args, backend)
    return (token, confidence) if eos_token_id is None else (token, confidence, probability)


def prepare(logits, *, unconditional=None, guidance=0.0, temperature=0.0, seed=None, step=0, rows=None, forbidden=(),
            uncounted=(), eos_token_id=None) -> tuple:  # fmt: skip
    """Check everything and return the positional arguments of the rows."""
    check_floats("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: expected [N, V] with V >= 1, got shape {tuple(logits.shape)}")
    unconditional = _unconditional_of(unconditional, logits)
    guidance, temperature = _number("guidance", guidance), _number("temperature", temperature)
    if temperature < 0:
        raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
    if guidance and unconditional is None:
        raise ValueError(f"guidance: {guidance} needs unconditional logits")
    rows = _rows_of(rows, logits)
    count = logits.shape[0] if rows is None else rows.shape[0]
    seed, keys = _seed_of(seed, temperature, count, logits)
    _check_step(step)
    vocabulary = logits.shape[1]
    forbidden = _tokens_of("forbidden", forbidden, vocabulary)
    if len(forbidden) == vocabulary:
        raise ValueError(f"forbidden: leaves no token of {vocabulary}")
    uncounted = [t for t in _tokens_of("uncounted", uncounted, vocabulary) if t not in forbidden]
    eos = -1 if eos_token_id is None else _token("eos_token_id", eos_token_id, vocabulary)
    logits, unconditional = _adjacent(logits), None if unconditional is None else _adjacent(unconditional)
    return (logits, unconditional, rows, keys, guidance, temperature, seed, step, forbidden, uncounted, eos)


def _adjacent(logits: Tensor) -> Tensor:
    logits = logits.detach()
    return logits if logits.shape[1] == 1 or logits.stride(1) == 1 else logits.contiguous()


def _unconditional_of(value: object, logits: Tensor) -> Tensor | None:
    if value is None:
        return None
    check_tensor("unconditional", value)
    if value.dtype != logits.dtype:
        raise TypeError(f"unconditional: expected dtype {logits.dtype} (that of logits), got {value.dtype}")
    if value.device != logits.device:
        raise ValueError(f"unconditional: expected device {logits.device} (that of logits), got {value.device}")
    if value.shape != logits.shape:
        raise ValueError(f"unconditional: expected shape {tuple(logits.shape)}, got {tuple(value.shape)}")
    return value


def _number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return int(value)


def _token(name: str, value: object, vocabulary: int) -> int:
    token = _whole(name, value)
    if not 0 <= token < vocabulary:
        raise ValueError(f"{name}: expected a token from 0 to {vocabulary - 1}, got {token}")
    return token


def _tokens_of(name: str, values: object, vocabulary: int) -> list[int]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name}: expected a sequence of tokens, got {type(values).__name__}")
    tokens = sorted({_token(name, value, vocabulary) for value in values})
    if len(tokens) > MOST_TOKENS:
        raise ValueError(f"{name}: expected at most {MOST_TOKENS} tokens, got {len(tokens)}")
    return tokens


def _check_step(step: object) -> None:
    if not 0 <= _whole("step", step) < 2**32:
        raise ValueError(f"step: expected an int of 32 bits, got {step}")


def _int64_of(name: str, value: object, shape: tuple[int | None, ...], logits: Tensor) -> Tensor:
    """``value`` as an int64 tensor of ``shape``, row-major, on the device of ``logits``."""
    check_tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {value.dtype}")
    if value.device != logits.device:
        raise ValueError(f"{name}: expected device {logits.device} (that of logits), got {value.device}")
    fits = [size in (None, own) for size, own in zip(shape, value.shape, strict=False)]
    if value.dim() != len(shape) or not all(fits):
        wanted = ", ".join("R" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {tuple(value.shape)}")
    return value.contiguous()


def _rows_of(value: object, logits: Tensor) -> Tensor | None:
    if value is None:
        return None
    rows = _int64_of("rows", value, (None,), logits)
    if rows.numel() and values_are_known(rows):
        low, high = (v.item() for v in torch.aminmax(rows))
        if low < 0 or high >= logits.shape[0]:
            raise ValueError(f"rows: expected numbers from 0 to {logits.shape[0] - 1}, got {low if low < 0 else high}")
    return rows


def _seed_of(value: object, temperature: float, count: int, logits: Tensor) -> tuple[int, Tensor | None]:
    """(seed, keys); a seed of 64 bits as the int64 of the same bits."""
    if isinstance(value, Tensor):
        return 0, _int64_of("seed", value, (count, 2), logits)
    if value is None:
        return (int(torch.randint(2**63 - 1, ()).item()) if temperature > 0 else 0), None
    seed = _whole("seed", value)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an int of 64 bits, got {seed}")
    return (seed - 2**64 if seed >= 2**63 else seed), None


# --------------------------------------------------------------------------------------- torch op and fake kernel


def empty_results(logits: Tensor, rows: Tensor | None, eos: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (token, confidence, probability of eos)."""
    count = logits.shape[0] if rows is None else rows.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(count, dtype=torch.int64),
        logits.new_empty(count, dtype=dtype),
        logits.new_empty(count if eos >= 0 else 0, dtype=dtype),
    )


@torch.library.impl(_library, "token_confidence", "CompositeExplicitAutograd")
def _run(*args):
    *args, backend = args
    return registry.select(OP, backend, tuple(args)).run(*args)


@torch.library.register_fake("pydenoise::token_confidence", lib=_library)
def _fake(logits, unconditional, rows, keys, guidance, temperature, seed, step, forbidden, uncounted, eos, backend):
    return empty_results(logits, rows, eos)


# --------------------------------------------------------------------------------------------------- backend rows

registry.register(Backend(OP, "reference", 0, never, reference.token_confidence, "the fallback: always last"))

from pydenoise.ops._rows import token_confidence_cpu, token_confidence_cuda, token_confidence_triton  # noqa: E402

for _module in (token_confidence_cpu, token_confidence_triton, token_confidence_cuda):
    for _row in _module.ROWS:
        registry.register(_row)
