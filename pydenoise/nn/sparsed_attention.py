"""SparseDAttention: full attention in a generation's first steps, then block-sparse attention with a pattern kept."""

import contextlib
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise import functional as PF
from pydenoise.block_mask import BlockMask, check_block_size
from pydenoise.nn._graph_break import keep_out_of_graphs
from pydenoise.nn._key_padding import KeyPadding, KeyPaddings
from pydenoise.nn.sparsed_report import LayerSparsity, SparsityReport
from pydenoise.nn.sparsed_schedule import Phase, SparseDSchedule
from pydenoise.ops import block_sparse_attention as op
from pydenoise.ops import registry
from pydenoise.ops.sparsed_block_mask import check_select, mask_from_importances
from pydenoise.reference.sparsed_block_mask import MODES

# Backends whose kernel, with every block listed, beats torch's full attention: bench/notes-sparse-attention.md.
_FAST_DENSE = ("cpu",)
_CALL_BEGIN_STEP = (
    "SparseDAttention does not know the denoising step: a sampler that takes `sparsity` calls begin_step; in a loop of "
    "your own, call begin_step(step, num_steps, new_tokens=...) before the model, or run the model inside `with "
    "handle.step(step, num_steps, new_tokens=...):`; `with handle.dense():` runs it with full attention"
)


@dataclass(frozen=True)
class _Fit:
    """What a pattern was computed for: it is used for the same only."""

    batch: int
    heads: int
    queries: int
    keys: int
    new_tokens: int
    lengths: tuple[int, ...] | None
    device: torch.device

    def changes(self, old: "_Fit") -> str:
        names = {"queries": "number of queries", "keys": "length", "lengths": "key lengths", "new_tokens": "new tokens"}
        pairs = {name: (getattr(old, name), getattr(self, name)) for name in self.__dataclass_fields__}
        if old.queries == old.keys and self.queries == self.keys:
            del pairs["queries"]
        return ", ".join(f"{names.get(name, name)} {a} -> {b}" for name, (a, b) in pairs.items() if a != b)


@dataclass
class _Layer:
    """State of one layer in one branch."""

    entry: LayerSparsity
    fit: _Fit | None = None
    mask: BlockMask | None = None


@dataclass
class _Generation:
    """State from one step 0 to the next."""

    num_steps: int | None = None
    steps: dict[int, Phase] = field(default_factory=dict)
    branches: dict[str, dict[Hashable, _Layer]] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    masked: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Now:
    step: int
    phase: Phase
    new_tokens: int | None
    branch: str


class SparseDAttention(nn.Module):
    """SparseD over a whole generation: holds the schedule, and a pattern for each layer and branch.

    One object serves all attention layers of a model. Before each run of the model, :meth:`begin_step` says where the
    generation is; samplers with a ``sparsity`` argument do that. The first steps attend fully, the last of them gives
    the pattern of each layer (see :class:`SparseDSchedule` and :func:`pydenoise.functional.sparsed_block_mask`), the
    others attend to its blocks only. Step 0 forgets all patterns. A pattern that does not fit any more, because the
    length, the batch, the key lengths or ``new_tokens`` changed, is computed again in the call that shows it; that
    call attends fully and the report says so.

    For inference and training: gradients flow through both kinds of attention; dropout of attention weights does not
    exist. Inside ``torch.compile`` it is a graph break (with ``fullgraph=True`` an error that says so). One
    generation at a time: the step is not kept per thread.

    Args:
        skip: share of the steps with full attention, in [0, 1).
        select: share of the blocks to keep, in (0, 1].
        block_size: 16, 32, 64 or 128 tokens.
        schedule: "code" or "paper": see :class:`SparseDSchedule`.
        mode: "reference" or "per_side": see :func:`pydenoise.functional.sparsed_block_mask`.
        scale: of attention's scores; ``None``: 1 / sqrt(D). A call's own ``scale`` goes first.
        pattern_scale: of the scores that give the pattern; ``None``: attention's. (SparseD's code for LLaDA takes
            1 / sqrt(H) here.)
        qk_dtype: of the sparse steps' scores: ``None`` or "int8", without gradients.
        other_masks: what to do with an attention mask that is not padding on the right: "error", or "dense": full
            attention for that call, counted in the report.
        backend: of the sparse kernels: "auto" or one of "cpu", "triton", "cuda", "reference". Where attention is
            full, the faster of the kernel and torch's scaled_dot_product_attention runs.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.

    Source: SparseD (2025), https://arxiv.org/abs/2509.24014, and its public code.
    """

    def __init__(
        self,
        skip: float = 0.2,
        select: float = 0.3,
        block_size: int = 128,
        *,
        schedule: str = "code",
        mode: str = "reference",
        scale: float | None = None,
        pattern_scale: float | None = None,
        qk_dtype: str | None = None,
        other_masks: str = "error",
        backend: str = "auto",
    ):
        super().__init__()
        keep_out_of_graphs(SparseDAttention, "forward", "SparseD decides in Python, at every step, what attention does")
        self.schedule = SparseDSchedule(skip, schedule)
        check_select(select)
        check_block_size(block_size)
        for name, value, choices in (
            ("mode", mode, MODES),
            ("qk_dtype", qk_dtype, (None, "int8")),
            ("other_masks", other_masks, ("error", "dense")),
            ("backend", backend, (registry.AUTO, *registry.BACKENDS)),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
        for name, value in (("scale", scale), ("pattern_scale", pattern_scale)):
            if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
                raise TypeError(f"{name}: expected a number or None, got {type(value).__name__}")
        self.select, self.block_size, self.mode = select, block_size, mode
        self.scale, self.pattern_scale, self.qk_dtype = scale, pattern_scale, qk_dtype
        self.other_masks, self.backend = other_masks, backend
        self._paddings = KeyPaddings()
        self._full: tuple[tuple, BlockMask] | None = None
        self._dense_only = 0
        self.reset()

    def extra_repr(self) -> str:
        return (
            f"skip={self.schedule.skip}, select={self.select}, block_size={self.block_size}, "
            f"schedule={self.schedule.kind!r}, mode={self.mode!r}"
        )

    # --------------------------------------------------------------------------------------------------- steps

    def begin_step(
        self, step: int, num_steps: int, *, new_tokens: int | None = None, branch: str = "conditional"
    ) -> None:
        """Say which run of the model comes next.

        Args:
            step: from 0, counted over the whole generation. 0 begins a generation: patterns and report start anew.
            num_steps: of the generation; the schedule is a share of it.
            new_tokens: how many tokens at the end of the sequence are being generated, the rest being the prompt;
                ``None``: all of them, so that blocks are chosen in one selection over the whole sequence. More than
                there are means all.
            branch: which of several runs per step this is, each with patterns of its own: "conditional" and
                "unconditional" under classifier-free guidance.
        """
        for name, value in (("step", step), ("num_steps", num_steps), ("new_tokens", new_tokens)):
            if not isinstance(value, int) and not (name == "new_tokens" and value is None) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if num_steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
        if not 0 <= step < num_steps:
            raise ValueError(f"step: expected 0 to {num_steps - 1} (num_steps is {num_steps}), got {step}")
        if new_tokens is not None and new_tokens < 0:
            raise ValueError(f"new_tokens: expected a number of tokens or None, got {new_tokens}")
        if not isinstance(branch, str):
            raise TypeError(f"branch: expected a str, got {type(branch).__name__}")
        if step == 0:
            if any(self._generation.steps):  # a step behind 0
                self._generation = _Generation()
            self._generation.branches.pop(branch, None)
        phase = self.schedule.phase(step, num_steps)
        self._generation.num_steps = num_steps
        self._generation.steps[step] = phase
        self._generation.branches.setdefault(branch, {})
        self._now = _Now(step, phase, new_tokens, branch)

    def end_step(self) -> None:
        """From here on the step is unknown again; patterns stay."""
        self._now = None

    @contextlib.contextmanager
    def step(
        self, step: int, num_steps: int, *, new_tokens: int | None = None, branch: str = "conditional"
    ) -> Iterator[None]:
        """:meth:`begin_step` and :meth:`end_step` around a block of code."""
        self.begin_step(step, num_steps, new_tokens=new_tokens, branch=branch)
        try:
            yield
        finally:
            self.end_step()

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        """Full attention inside, whatever the step; patterns and report stay as they are."""
        self._dense_only += 1
        try:
            yield
        finally:
            self._dense_only -= 1

    def reset(self) -> None:
        """Forget patterns, steps and report."""
        self._generation, self._now = _Generation(), None

    def pattern(self, layer: Hashable = 0, branch: str = "conditional") -> BlockMask | None:
        """The pattern of a layer, or ``None`` if it has none yet."""
        state = self._generation.branches.get(branch, {}).get(layer)
        return None if state is None else state.mask

    def report(self) -> SparsityReport:
        """What was done since the last step 0."""
        generation = self._generation
        sparse = sum(phase in (Phase.SPARSE, Phase.PATTERN_AND_SPARSE) for phase in generation.steps.values())
        return SparsityReport(
            self.schedule.skip, self.select, self.block_size, self.schedule.kind, self.mode,
            num_steps=generation.num_steps, dense_steps=len(generation.steps) - sparse, sparse_steps=sparse,
            layers=[layer.entry for layers in generation.branches.values() for layer in layers.values()],
            changes=list(generation.changes), masked_calls=dict(generation.masked),
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------- attention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: Hashable = 0,
        key_lengths: Tensor | None = None,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        """``softmax(scale * query @ key^T) @ value``, over all keys or over the layer's pattern.

        Args:
            query: [B, H, Lq, D], float32, bfloat16 or float16. key, value: [B, Hkv, Lk, D] of its dtype and device;
                Hkv divides H. Under autocast they are cast as torch's attention would cast them.
            layer: which attention layer of the model calls.
            key_lengths: [B] integers from 0 to Lk: keys at or beyond a batch's length do not count.
            attn_mask: the same as a mask that broadcasts to [B, H, Lq, Lk], boolean (True keeps) or added to the
                scores. Other masks: see ``other_masks``. The values are read, once per mask.
            scale: of the scores; ``None``: the constructor's.
            dropout_p, is_causal: 0 and False; present so that calls with other values fail.

        Returns:
            [B, H, Lq, D] in ``query``'s dtype.

        Raises:
            RuntimeError: no step was begun. TypeError, ValueError: a bad argument; the message names it.
        """
        self._check_call(dropout_p, is_causal, layer)
        query, key, value = _autocast(query, key, value)
        op.check_query(query)
        op.check_key("key", key, query)
        op.check_key("value", value, query)
        scale = self.scale if scale is None else scale
        padding = self._paddings.of(attn_mask, key_lengths, query, key.shape[2])
        if padding.reason is not None:
            return self._with_mask(query, key, value, attn_mask, scale, layer, padding.reason)
        if self._dense_only:
            return self._dense(query, key, value, scale, padding)
        return self._at_step(query, key, value, scale, padding, layer)

    def _check_call(self, dropout_p: float, is_causal: bool, layer: Hashable) -> None:
        if torch.jit.is_tracing():
            raise RuntimeError("SparseDAttention cannot be traced: what it does depends on the step")
        if is_causal:
            raise ValueError(f"is_causal: SparseD is for bidirectional attention, but layer {layer!r} is causal")
        if dropout_p:
            raise ValueError(
                f"dropout_p: expected 0, because sparse attention has no dropout; layer {layer!r} passes {dropout_p}. "
                "Set the model's attention dropout to 0, or call model.eval()"
            )
        if self._now is None and not self._dense_only:
            raise RuntimeError(_CALL_BEGIN_STEP)

    def _at_step(self, query, key, value, scale, padding: KeyPadding, layer: Hashable) -> Tensor:
        now, keys = self._now, key.shape[2]
        state = self._generation.branches[now.branch].setdefault(layer, _Layer(LayerSparsity(str(layer), now.branch)))
        new_tokens = keys if now.new_tokens is None else min(now.new_tokens, keys)
        fit = _Fit(*query.shape[:3], keys, new_tokens, padding.values, query.device)
        state.entry.shape = (*query.shape, keys)
        if now.phase is Phase.DENSE:
            state.entry.dense_calls += 1
            return self._dense(query, key, value, scale, padding)
        if now.phase is Phase.SPARSE and state.fit == fit:
            return self._sparse(query, key, value, scale, padding, state)
        if now.phase is Phase.SPARSE:
            self._note_change(fit, state)
        if now.phase is Phase.PATTERN_AND_SPARSE:
            self._find_pattern(query, key, scale, padding, state, fit, lse=None)
            return self._sparse(query, key, value, scale, padding, state)
        started = _clock(query)
        output, lse = self._dense_with_lse(query, key, value, scale, padding)
        state.entry.dense_calls += 1
        state.entry.attention_seconds = _clock(query) - started
        self._find_pattern(query, key, scale, padding, state, fit, lse)
        return output

    def _note_change(self, fit: _Fit, state: _Layer) -> None:
        why = "no pattern was computed in an earlier step" if state.fit is None else fit.changes(state.fit)
        place = f"{state.entry.layer} ({state.entry.branch})"
        self._generation.changes.append(f"step {self._now.step}, layer {place}: {why}")

    def _find_pattern(self, query, key, scale, padding: KeyPadding, state: _Layer, fit: _Fit, lse) -> None:
        """Fill ``state``. ``lse``: of attention's scores, which are the pattern's unless it has a scale of its own."""
        started = _clock(query)
        if self.pattern_scale is not None and self.pattern_scale != scale:
            scale, lse = self.pattern_scale, None
        with torch.no_grad():
            importances = PF.block_importance(
                query, key, self.block_size, new_tokens=fit.new_tokens, scale=scale, lse=lse,
                key_lengths=padding.lengths, backend=self.backend,
            )  # fmt: skip
            state.mask = mask_from_importances(
                *importances, self.select, self.block_size, fit.queries, fit.keys, mode=self.mode,
                key_lengths=padding.lengths,
            )  # fmt: skip
        state.fit, entry = fit, state.entry
        entry.pattern_seconds = _clock(query) - started
        entry.pattern_step, entry.density = self._now.step, state.mask.density
        entry.recall = _recall(importances[0], state.mask, padding if fit.queries == fit.keys else KeyPadding())

    # ------------------------------------------------------------------------------------------------- kernels

    def _sparse(self, query, key, value, scale, padding: KeyPadding, state: _Layer) -> Tensor:
        state.entry.sparse_calls += 1
        if state.entry.density == 1 and self.qk_dtype is None:
            return self._dense(query, key, value, scale, padding)
        return PF.block_sparse_attention(
            query, key, value, state.mask, scale=scale, key_lengths=padding.lengths, qk_dtype=self.qk_dtype,
            backend=self.backend,
        )  # fmt: skip

    def _dense_with_lse(self, query, key, value, scale, padding: KeyPadding) -> tuple[Tensor, Tensor | None]:
        """Full attention, and the log-sum-exps if a kernel gives them along with it."""
        mask = self._all_blocks(query, key)
        if self._kernel(query, key, value, mask, scale, padding) == registry.REFERENCE:
            return self._dense(query, key, value, scale, padding), None
        return PF.block_sparse_attention(
            query, key, value, mask, scale=scale, key_lengths=padding.lengths, return_lse=True, backend=self.backend
        )

    def _dense(self, query, key, value, scale, padding: KeyPadding) -> Tensor:
        mask = self._all_blocks(query, key)
        if self._kernel(query, key, value, mask, scale, padding) in _FAST_DENSE:
            return PF.block_sparse_attention(
                query, key, value, mask, scale=scale, key_lengths=padding.lengths, backend=self.backend
            )
        valid = None
        if padding.lengths is not None:
            valid = (torch.arange(key.shape[2], device=key.device) < padding.lengths[:, None])[:, None, None]
        return _torch_attention(query, key, value, valid, scale)

    def _with_mask(self, query, key, value, attn_mask, scale, layer: Hashable, reason: str) -> Tensor:
        if self.other_masks == "error":
            raise ValueError(
                f"attn_mask: expected none, or padding on the right, but of the mask of layer {layer!r}, {reason}. "
                "other_masks='dense' runs such calls with full attention"
            )
        self._generation.masked[str(layer)] = self._generation.masked.get(str(layer), 0) + 1
        return _torch_attention(query, key, value, attn_mask, scale)

    def _all_blocks(self, query: Tensor, key: Tensor) -> BlockMask:
        sizes = (query.shape[2], key.shape[2], query.device)
        if self._full is None or self._full[0] != sizes:
            self._full = (sizes, BlockMask.full(self.block_size, *sizes[:2], device=query.device))
        return self._full[1]

    def _kernel(self, query, key, value, mask: BlockMask, scale, padding: KeyPadding) -> str:
        """The backend that :func:`block_sparse_attention` would take for this call."""
        if self.backend != registry.AUTO:
            return self.backend
        args = op.prepare(query, key, value, mask, scale=scale, key_lengths=padding.lengths)
        return next(row.name for row in registry.rows(op.OP) if row.unsupported(*args) is None)


def _torch_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch's attention is autocast: every floating-point tensor but float64."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    narrow, cast = torch.get_autocast_dtype(device), (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(narrow) if isinstance(t, Tensor) and t.dtype in cast else t for t in tensors)


def _clock(tensor: Tensor) -> float:
    """Seconds; on a GPU, once its work is done. Asked for at the steps that compute a pattern only."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _recall(over_all: Tensor, mask: BlockMask, padding: KeyPadding) -> float:
    """Share of the importances [B, H, nq, nk] inside ``mask``; blocks of queries that are padding do not count."""
    weights = over_all
    if padding.lengths is not None:
        starts = torch.arange(over_all.shape[2], device=over_all.device) * mask.block_size
        weights = over_all * (starts < padding.lengths[:, None])[:, None, :, None]
    total = weights.sum(dtype=torch.float64).item()
    return (weights * mask.to_dense()).sum(dtype=torch.float64).item() / total if total else 1.0
