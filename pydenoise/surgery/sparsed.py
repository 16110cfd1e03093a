"""``attach_sparsed``: SparseD in a model that exists already, and ``detach_sparsed``: the model as it was."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from pydenoise.block_mask import BlockMask
from pydenoise.nn.sparsed_attention import SparseDAttention
from pydenoise.nn.sparsed_report import SparsityReport
from pydenoise.surgery.policy import Policy
from pydenoise.surgery.sparsed_sdpa import RoutedForward
from pydenoise.surgery.sparsed_transformers import TransformersAttachment, models_inside

KINDS = ("auto", "transformers", "diffusers", "sdpa")
_HANDLE = "_pydenoise_sparsed_handle"


class SparsedHandle:
    """What :func:`attach_sparsed` returns: tells the attention where the generation is, reports, and detaches.

    A sampler takes it as its ``sparsity``. Attributes: ``model``; ``kind``: "transformers", "diffusers" or "sdpa";
    ``attention``: the :class:`pydenoise.nn.SparseDAttention`, whose layers have the modules' names.
    """

    def __init__(self, model: nn.Module, kind: str, attention: SparseDAttention):
        self.model, self.kind, self.attention = model, kind, attention
        self.left_alone: dict[str, str] = {}
        self._attachment = None

    def begin_step(
        self, step: int, num_steps: int, *, new_tokens: int | None = None, branch: str = "conditional"
    ) -> None:
        """See :meth:`SparseDAttention.begin_step`. Images have no prompt: for "diffusers", ``new_tokens`` is ``None``
        or 0, which both mean the whole image."""
        if self.kind == "diffusers":
            if new_tokens not in (None, 0):
                raise ValueError(f"new_tokens: expected None or 0, because images have no prompt, got {new_tokens!r}")
            new_tokens = None
        self.attention.begin_step(step, num_steps, new_tokens=new_tokens, branch=branch)

    @contextlib.contextmanager
    def step(
        self, step: int, num_steps: int, *, new_tokens: int | None = None, branch: str = "conditional"
    ) -> Iterator[None]:
        """For loops of your own: ``with handle.step(i, n, new_tokens=...): logits = model(tokens)``."""
        self.begin_step(step, num_steps, new_tokens=new_tokens, branch=branch)
        try:
            yield
        finally:
            self.attention.end_step()

    def dense(self) -> contextlib.AbstractContextManager[None]:
        """Full attention inside ``with handle.dense():``, whatever the step; patterns and report stay."""
        return self.attention.dense()

    def pattern(self, layer: str, branch: str = "conditional") -> BlockMask | None:
        """The pattern of a layer, by its name in the report, or ``None`` if it has none yet."""
        return self.attention.pattern(layer, branch)

    def report(self) -> SparsityReport:
        """What was done since the last step 0: print it, or take ``to_json()``."""
        report = self.attention.report()
        report.left_alone = dict(self.left_alone)
        return report

    def detach(self) -> None:
        """Give the model its own attention back; it is then as before :func:`attach_sparsed`. The report stays."""
        if self.model.__dict__.get(_HANDLE) is not self:
            raise ValueError("this handle is detached already")
        self._attachment.restore()
        del self.model.__dict__[_HANDLE]

    def __repr__(self) -> str:
        return f"SparsedHandle({type(self.model).__name__}, kind={self.kind!r}, {self.attention.extra_repr()})"

    # -------------------------------------------------------------------------------------- called by attachments

    def leave_alone(self, layer: str, reason: str) -> None:
        self.left_alone.setdefault(layer, reason)

    def route(self, layer: str, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor | None:
        """Attention of one call, or ``None`` where the model's own is to run."""
        options = {name: option for name, option in options.items() if name != "enable_gqa"}
        reason = options.pop("alone", None) or _why_alone(query, key, value)
        if reason is not None:
            self.leave_alone(layer, reason)
            return None
        if query.dim() == 3:  # one head
            mask = options.get("attn_mask")
            options["attn_mask"] = mask if mask is None or mask.dim() < 3 else mask.unsqueeze(1)
            heads = (t.unsqueeze(1) for t in (query, key, value))
            return self.attention(*heads, layer=layer, **options).squeeze(1)
        return self.attention(query, key, value, layer=layer, **options)


def _why_alone(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why a call is not self-attention that SparseD knows, or ``None``."""
    if query.dim() not in (3, 4) or key.dim() != query.dim() or query.is_nested:
        return f"has queries of {query.dim()} dimensions" if not query.is_nested else "has nested tensors"
    if query.shape[-2] != key.shape[-2]:
        return "has queries and keys of different lengths: cross-attention, or keys from a cache"
    if value.shape != key.shape or query.shape[-1] != key.shape[-1] or query.shape[0] != key.shape[0]:
        return "has values of another shape than its keys, or batches that broadcast"
    return None


class _ForwardAttachment:
    """Routed forwards of modules, put in place together and taken out together."""

    def __init__(self):
        self.forwards: list[tuple[nn.Module, RoutedForward]] = []

    def add(self, module: nn.Module, *args, **kwargs) -> None:
        self.forwards.append((module, RoutedForward(module, *args, **kwargs)))

    def restore(self) -> None:
        while self.forwards:
            module, forward = self.forwards[-1]
            forward.restore(module)
            self.forwards.pop()


# ------------------------------------------------------------------------------------------------------- attach, detach


def attach_sparsed(
    model: nn.Module,
    skip: float = 0.2,
    select: float = 0.3,
    block_size: int = 128,
    *,
    kind: str = "auto",
    keep: Iterable[str] = (),
    schedule: str = "code",
    mode: str = "reference",
    pattern_scale: float | None = None,
    qk_dtype: str | None = None,
    other_masks: str = "error",
    backend: str = "auto",
) -> SparsedHandle:
    """SparseD in the self-attention of ``model``, in place: no weight, buffer or state-dict key changes.

    From then on every run of the model needs to know its denoising step: give the handle to a sampler as its
    ``sparsity``, or run the model inside ``with handle.step(i, n, new_tokens=...):``. A run without is an error.

    Args:
        model: bidirectional. Attach before ``torch.compile``; attention is then a graph break.
        skip, select, block_size, schedule, mode, pattern_scale, qk_dtype, other_masks, backend: see
            :class:`pydenoise.nn.SparseDAttention`.
        kind: how the attention is reached; "auto" takes "transformers" or "diffusers", as the model has parts of one.

            * "transformers": its attention-interface registry. Layers with a sliding window and cross-attention are
              left alone.
            * "diffusers": calls of ``F.scaled_dot_product_attention`` by the processors of self-attention modules.
              Cross-attention and joint attention are left alone. These modules run outside of compiled graphs.
            * "sdpa": every call of ``F.scaled_dot_product_attention`` (``nn.MultiheadAttention``'s too) while the
              model's forward runs, in its thread. Calls with as many keys as queries are taken for self-attention:
              name others in ``keep``. The model runs outside of compiled graphs.
        keep: names or glob patterns of modules whose attention is left alone, with all that is inside them.

    Returns:
        The handle, also for :func:`detach_sparsed`. What is left alone stands in its report.

    Raises:
        TypeError, ValueError: a bad argument; causal attention, named; a model that is compiled, has SparseD already,
            or has no attention of this kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    attention = SparseDAttention(
        skip, select, block_size, schedule=schedule, mode=mode, pattern_scale=pattern_scale, qk_dtype=qk_dtype,
        other_masks=other_masks, backend=backend,
    )  # fmt: skip
    policy = Policy(model, "fp32", (keep,) if isinstance(keep, str) else tuple(keep))
    _check_fresh(model)
    handle = SparsedHandle(model, _kind_of(model, kind), attention)
    attach = {"transformers": _attach_transformers, "diffusers": _attach_diffusers, "sdpa": _attach_sdpa}[handle.kind]
    handle._attachment = attach(handle, policy)
    model.__dict__[_HANDLE] = handle
    return handle


def detach_sparsed(model: nn.Module) -> None:
    """Undo :func:`attach_sparsed`: the model is as it was before. Raises ``ValueError`` if it has no SparseD."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    handle = model.__dict__.get(_HANDLE)
    if handle is None:
        raise ValueError(f"model: this {type(model).__name__} has no SparseD attached")
    handle.detach()


def _check_fresh(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"its part {name!r}" if name else f"this {type(model).__name__}"
        if _HANDLE in module.__dict__:
            raise ValueError(f"model: {where} has SparseD attached already; detach_sparsed first")
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"model: {where} is compiled; attach to the model before torch.compile")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"model: {where} is a TorchScript module, whose attention cannot be reached")


def _is_diffusers(module: nn.Module) -> bool:
    """An attention module of diffusers, told by its attributes."""
    return callable(getattr(module, "set_processor", None)) and hasattr(module, "processor")


def _kind_of(model: nn.Module, kind: str) -> str:
    has = {
        "transformers": bool(models_inside(model)),
        "diffusers": any(_is_diffusers(module) for module in model.modules()),
    }
    if kind == "auto":
        kinds = [name for name, present in has.items() if present]
        if len(kinds) != 1:
            found = "both transformers models and attention of diffusers" if kinds else "neither"
            raise ValueError(
                f"kind: 'auto' looks for transformers models or attention modules of diffusers, and found {found}; "
                "name one, or 'sdpa' to reach calls of F.scaled_dot_product_attention in any module"
            )
        return kinds[0]
    if not has.get(kind, True):
        raise ValueError(f"kind: {kind!r}, but there is nothing of {kind} in this {type(model).__name__}")
    return kind


def _attach_transformers(handle: SparsedHandle, policy: Policy) -> TransformersAttachment:
    return TransformersAttachment(handle.model, handle.route, policy.keeps, handle.leave_alone)


def _attach_diffusers(handle: SparsedHandle, policy: Policy) -> _ForwardAttachment:
    attachment = _ForwardAttachment()
    for name, module in handle.model.named_modules():
        if not _is_diffusers(module):
            continue
        reason = "named in keep" if policy.keeps(module) else _why_not_self(module)
        if reason is not None:
            handle.leave_alone(name, reason)
            continue
        attachment.add(
            module, name, handle.route, cross="encoder_hidden_states",
            must_call=f"the attention processor of {name!r}, {type(module.processor).__name__}, does not call "
            "F.scaled_dot_product_attention; set one that does (AttnProcessor2_0), or name the module in keep",
        )  # fmt: skip
    if not attachment.forwards:
        raise ValueError("model: none of its attention modules is self-attention that may be changed")
    return attachment


def _why_not_self(module: nn.Module) -> str | None:
    if getattr(module, "is_cross_attention", False):
        return "is cross-attention"
    if getattr(module, "add_k_proj", None) is not None:
        return "is joint attention over text and image"
    return None


def _attach_sdpa(handle: SparsedHandle, policy: Policy) -> _ForwardAttachment:
    """Every module that may call attention is routed, so that calls carry the innermost one's name."""
    attachment = _ForwardAttachment()
    for name, module in handle.model.named_modules():
        kept = policy.keeps(module)
        plain = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.MultiheadAttention)
        if name and plain and not kept:
            continue
        if kept:
            handle.leave_alone(name, "named in keep")
        attachment.add(
            module, name or type(module).__name__, None if kept else handle.route,
            must_call="" if kept else _must_call(name, module),
        )  # fmt: skip
    return attachment


def _must_call(name: str, module: nn.Module) -> str:
    """What is wrong with a forward of this module that makes no attention call; "" where that is normal."""
    if isinstance(module, nn.MultiheadAttention):
        return (
            f"nn.MultiheadAttention {name!r} was asked for its attention weights, so it cannot be sparse; call it with "
            "need_weights=False, or name it in keep"
        )
    return "" if name else "the model's forward made no call of F.scaled_dot_product_attention"
