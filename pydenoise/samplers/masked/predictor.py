"""Calls of the model: its logits at chosen positions, with and without the prompt."""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

_PADDING_ARGUMENTS = ("attention_mask", "lengths", "key_lengths")


class Sparsity(Protocol):
    """What is told of every call of the model, right before it: the handle of a sparse attention."""

    def begin_step(self, step: int, num_steps: int, *, new_tokens: int, branch: str = "conditional") -> None: ...


@dataclass(frozen=True)
class Step:
    """Where in the generation a call is made; ``new_tokens`` at the end of a batch's rows may be generated ones."""

    step: int
    num_steps: int
    new_tokens: int


@dataclass(frozen=True)
class Batch:
    """A state of the generation. ``lengths``: tokens of each row, ``None`` where no row has padding."""

    tokens: Tensor  # [B, L]
    prompt: Tensor | None  # bool [B, L], the prompts' tokens; only guidance asks
    lengths: Tensor | None  # int64 [B]


@dataclass(frozen=True)
class Logits:
    """Logits of N positions: arguments of ``functional.token_confidence``. Row i is ``rows[i]``, or i for ``None``."""

    conditional: Tensor
    unconditional: Tensor | None
    rows: Tensor | None

    def arguments(self, chosen: Tensor | None = None) -> dict:
        """Of all positions, or of the ``chosen`` ones."""
        rows = self.rows
        if chosen is not None:
            rows = chosen if rows is None else rows[chosen]
        return {"unconditional": self.unconditional, "rows": rows}


class Predictor:
    """A model, asked for logits at chosen positions.

    The final projection to the vocabulary runs on these positions only where the model shows it: ``lm_head`` is that
    module, ``"auto"`` (what ``get_output_embeddings()`` or ``lm_head`` of the model gives), or ``None`` (never).
    """

    def __init__(
        self,
        model: Callable,
        mask_token_id: int,
        cfg_scale: float,
        sparsity: Sparsity | None,
        lm_head: nn.Module | str | None,
    ):
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}")
        if sparsity is not None and not callable(getattr(sparsity, "begin_step", None)):
            raise TypeError(f"sparsity: expected an object with begin_step(), got {type(sparsity).__name__}")
        self.model, self.mask_token_id, self.cfg_scale, self.sparsity = model, mask_token_id, cfg_scale, sparsity
        self.calls = 0
        _check_readable(model, mask_token_id)
        self._padding = _padding_argument(model)
        self._head = _find_head(model) if lm_head == "auto" else lm_head
        if self._head is not None and not isinstance(self._head, nn.Module):
            raise TypeError(f"lm_head: expected a module, 'auto' or None, got {type(self._head).__name__}")

    def __call__(self, batch: Batch, row: Tensor, position: Tensor, at: Step, guided: bool = True) -> Logits:
        """Logits at ``(row[i], position[i])``, both int64 [N]."""
        guided = guided and self.cfg_scale > 0
        if not guided:
            logits, rows = self._run(batch, row, position, at, "conditional")
            return Logits(logits, None, rows)
        blind = Batch(torch.where(batch.prompt, self.mask_token_id, batch.tokens), None, batch.lengths)
        if self.sparsity is None:  # one call for both
            return self._run_both(batch, blind, row, position, at)
        conditional, rows = self._run(batch, row, position, at, "conditional")
        unconditional, _ = self._run(blind, row, position, at, "unconditional")
        return Logits(conditional, unconditional, rows)

    def _run_both(self, batch: Batch, blind: Batch, row: Tensor, position: Tensor, at: Step) -> Logits:
        both = Batch(
            torch.cat([batch.tokens, blind.tokens]), None, None if batch.lengths is None else batch.lengths.repeat(2)
        )
        count = batch.tokens.shape[0]
        row, position = torch.cat([row, row + count]), position.repeat(2)
        logits, rows = self._run(both, row, position, at, "conditional")
        first, second = logits.chunk(2)
        return Logits(first, second, None if rows is None else rows[: rows.shape[0] // 2])

    def _run(self, batch: Batch, row: Tensor, position: Tensor, at: Step, branch: str) -> tuple[Tensor, Tensor | None]:
        """(logits [rows, V], row of each position, or ``None`` where position i is row i)."""
        if self.sparsity is not None:
            self.sparsity.begin_step(at.step, at.num_steps, new_tokens=at.new_tokens, branch=branch)
        self.calls += 1
        tokens = batch.tokens
        with _positions_only(self._head, tokens.shape, row, position) as fired:
            logits = _logits_of(self.model(tokens, **self._padding_of(batch)))
        shape = (1, row.shape[0]) if fired else tuple(tokens.shape)
        if logits.dim() != 3 or tuple(logits.shape[:2]) != shape or not logits.is_floating_point():
            raise ValueError(
                f"model: expected floating-point logits [{shape[0]}, {shape[1]}, V], got {logits.dtype} "
                f"{tuple(logits.shape)}"
            )
        self._check_vocabulary(logits.shape[2])
        return logits.reshape(-1, logits.shape[2]), None if fired else row * tokens.shape[1] + position

    def _check_vocabulary(self, vocabulary: int) -> None:
        # One more than the logits have: a mask that can be read but never predicted.
        if self.mask_token_id > vocabulary:
            raise ValueError(
                f"mask_token_id: {self.mask_token_id} is outside the vocabulary: the model has logits of {vocabulary}"
            )

    def _padding_of(self, batch: Batch) -> dict:
        if batch.lengths is None:
            return {}
        if self._padding is None:
            raise TypeError(
                "model: the batch has padding, so the model must take one of the arguments "
                f"{', '.join(_PADDING_ARGUMENTS)}"
            )
        if self._padding != "attention_mask":
            return {self._padding: batch.lengths}
        places = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        return {"attention_mask": (places < batch.lengths[:, None]).to(torch.int64)}

    def forbidden(self, vocabulary: int, *others: int) -> tuple[int, ...]:
        """The mask, if it can be predicted, and ``others``."""
        return (*((self.mask_token_id,) if self.mask_token_id < vocabulary else ()), *others)


def _check_readable(model: Callable, mask_token_id: int) -> None:
    """The mask has an embedding, if the model shows them: on a GPU a missing one would be no clean error."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return
    count = getattr(embeddings, "num_embeddings", None)
    if isinstance(count, int) and mask_token_id >= count:
        raise ValueError(f"mask_token_id: {mask_token_id} is outside the vocabulary: the model embeds {count} tokens")


def _padding_argument(model: Callable) -> str | None:
    """The name under which the model takes its padding."""
    try:
        parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    except (TypeError, ValueError):
        return _PADDING_ARGUMENTS[0]
    found = next((name for name in _PADDING_ARGUMENTS if name in parameters), None)
    if found is None and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return _PADDING_ARGUMENTS[0]
    return found


def _find_head(model: Callable) -> nn.Module | None:
    """The model's own projection to the vocabulary, if it shows one and its forward is plain Python."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        return None
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Module) or isinstance(head, nn.Embedding):  # an embedding shared with the input
        return None
    return head


@contextmanager
def _positions_only(head: nn.Module | None, shape: torch.Size, row: Tensor, position: Tensor):
    """Within the block, ``head`` is given the chosen positions only; the list yielded is then not empty."""
    fired: list[bool] = []

    def gather(module: nn.Module, args: tuple):
        if len(args) == 1 and isinstance(args[0], Tensor) and args[0].dim() == 3 and args[0].shape[:2] == shape:
            fired.append(True)
            return (args[0][row, position][None],)
        return None

    handle = None if head is None else head.register_forward_pre_hook(gather)
    try:
        yield fired
    finally:
        if handle is not None:
            handle.remove()


def _logits_of(output: object) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: expected logits or an object with .logits, got {type(output).__name__}")
    return logits
