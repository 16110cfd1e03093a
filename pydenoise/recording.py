"""Record a model's forward once per input shape, and replay it without running its Python code.

What a CUDA graph does on a GPU, for the CPU: while the forward runs once, every kernel of this package writes its call
onto a tape (C++, with all pointers), and every torch operation between them is noted with its tensors. A replay copies
the new inputs into the first ones' memory, runs the tape, and returns copies of the outputs. Memory is planned by the
recording itself, so a replay allocates nothing but its outputs.

What the forward decides in Python is decided once, when it is recorded. It must therefore be a function of its tensors
and of arguments that compare equal; a forward that reads a value back (``.item()``, ``if tensor``), or whose shapes
depend on values, is refused with a reason.
"""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pydenoise import _native

MAX_RECORDINGS = 4  # shapes kept per model: each holds the buffers of a whole forward

_ATEN = torch.ops.aten
_READS_A_VALUE = {_ATEN._local_scalar_dense.default, _ATEN.equal.default, _ATEN.is_nonzero.default}
_MOVES_NOTHING = {_ATEN.lift_fresh.default, _ATEN._unsafe_view.default, _ATEN._reshape_alias.default}


class Unrecordable(RuntimeError):
    """A forward that cannot be replayed; the message says why."""


def unavailable() -> str | None:
    """Why nothing can be recorded here, or ``None``."""
    library = _native.extension()
    if not library.loaded:
        return library.reason
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        return f"recording needs torch 2.11 or later, this is {torch.__version__}"
    return None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _out_overload(func: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The overload of ``func`` that writes into a given tensor: same arguments, then one ``out``."""
    plain = [(a.name, str(a.type)) for a in func._schema.arguments]
    if len(func._schema.returns) != 1:
        return None
    for name in func.overloadpacket.overloads():
        candidate = getattr(func.overloadpacket, name)
        arguments = candidate._schema.arguments
        if len(arguments) == len(plain) + 1 and arguments[-1].name == "out" and arguments[-1].alias_info is not None:
            if [(a.name, str(a.type)) for a in arguments[:-1]] == plain:
                return candidate
    return None


class _TorchStep:
    """One torch operation between the kernels: computed again into the tensors it gave when it was recorded."""

    def __init__(self, func, args, kwargs, outputs: list[Tensor]):
        self.func, self.args, self.kwargs, self.outputs = func, args, kwargs, outputs
        into = _out_overload(func) if len(outputs) == 1 and not func._schema.is_mutable else None
        self.call = self._again
        if func._schema.is_mutable:
            self.call = self._in_place
        elif into is not None:
            self.into = into
            self.call = self._into

    def _in_place(self) -> None:
        self.func(*self.args, **self.kwargs)

    def _into(self) -> None:
        self.into(*self.args, **self.kwargs, out=self.outputs[0])

    def _again(self) -> None:
        results = self.func(*self.args, **self.kwargs)
        for old, new in zip(self.outputs, _tensors(results), strict=True):
            old.copy_(new)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Recorder(TorchDispatchMode):
    """Sees every torch operation of the forward. ``variable`` are the storages whose contents a replay may change."""

    def __init__(self, tape, inputs: list[Tensor], fold: bool):
        super().__init__()
        self.tape, self.fold = tape, fold
        self.variable = {_storage(t) for t in inputs}
        self.folded: set[int] = set()  # constants that something was computed from, once and for all
        self.written: set[int] = set()
        self.steps: list = []
        self.native = 0  # steps of the tape that are in ``steps`` already

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = len(self.tape)
        result = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        depends = any(_storage(t) in self.variable for t in inputs)
        if any(not t.is_cpu for t in outputs):
            raise Unrecordable(f"{func} computes on {outputs[0].device}, and only the CPU is recorded")
        if func.namespace == "pydenoise":
            self._note_kernel(func, before, outputs, depends)
        elif func in _READS_A_VALUE or torch.Tag.dynamic_output_shape in func.tags:
            if depends:
                raise Unrecordable(f"the forward reads values back from a tensor ({func})")
        elif not self._moves_nothing(func, inputs, outputs):
            self._note_torch(func, args, kwargs, inputs, outputs, depends)
        return result

    @staticmethod
    def _moves_nothing(func, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        """Views: the data they show is computed by the steps that write it.

        Under ``torch.inference_mode`` operations such as ``contiguous`` and ``reshape`` arrive whole, and what is
        declared a view may be a copy: then the output's memory is not an input's.
        """
        returns = func._schema.returns
        aliased = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        seen = {_storage(t) for t in inputs}
        return (aliased or func in _MOVES_NOTHING) and all(_storage(t) in seen for t in outputs)

    def _note_kernel(self, func, before: int, outputs: list[Tensor], depends: bool) -> None:
        if self.tape.refusal:
            raise Unrecordable(self.tape.refusal)
        if len(self.tape) == before and depends and any(t.numel() for t in outputs):
            raise Unrecordable(f"{func} is not a kernel that can be recorded")
        if len(self.tape) > before:
            self.variable.update(_storage(t) for t in outputs)

    def _note_torch(self, func, args, kwargs, inputs, outputs, depends) -> None:
        random = torch.Tag.nondeterministic_seeded in func.tags
        if func._schema.is_mutable:
            targets = {_storage(t) for t in outputs} or {_storage(t) for t in inputs}
            if targets & self.folded:
                raise _FoldedTooEarly
            self.written |= targets
        elif self.fold and not depends and not random:
            self.folded.update(_storage(t) for t in inputs)
            return
        self.variable.update(_storage(t) for t in outputs)
        self._flush()
        self.steps.append(_TorchStep(func, args, kwargs, outputs))

    def _flush(self) -> None:
        """The kernels since the last torch operation become one segment of the tape."""
        if len(self.tape) > self.native:
            self.steps.append((self.native, len(self.tape)))
            self.native = len(self.tape)


class _FoldedTooEarly(Exception):
    """Something taken for a constant is written to later."""


class Recording:
    """One forward, recorded for the shapes of its inputs."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict):
        leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._leaves = [_static_copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._inputs = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        for leaf in self._inputs:
            if not leaf.is_cpu:
                raise Unrecordable(f"an input is on {leaf.device}, and only the CPU is recorded")
        try:
            recorder, result = self._record(function, fold=True)
        except _FoldedTooEarly:
            recorder, result = self._record(function, fold=False)
        self._outputs, self._result_spec = pytree.tree_flatten(result)
        self.written = recorder.written
        self.torch_steps = sum(isinstance(step, _TorchStep) for step in recorder.steps)
        self.kernel_steps = len(self._tape)
        self._calls = [self._segment(*s) if isinstance(s, tuple) else s.call for s in recorder.steps]

    def _record(self, function: Callable, fold: bool) -> tuple[_Recorder, object]:
        self._tape = _native.extension().module.Tape()
        recorder = _Recorder(self._tape, self._inputs, fold)
        args, kwargs = pytree.tree_unflatten(self._leaves, self._spec)
        self._tape.start()
        try:
            with torch.no_grad(), recorder:
                result = function(*args, **kwargs)
        finally:
            self._tape.stop()
        recorder._flush()
        return recorder, result

    def _segment(self, begin: int, end: int) -> Callable[[], None]:
        replay = self._tape.replay
        return lambda: replay(begin, end)

    @property
    def arena_bytes(self) -> int:
        """Memory of the kernels' outputs."""
        return self._tape.arena_bytes

    def replay(self, leaves: list) -> object:
        """The forward's result for new inputs: the flattened arguments, of the recorded shapes."""
        tensors = iter(self._inputs)
        with torch.no_grad():
            for leaf in leaves:
                if isinstance(leaf, Tensor):
                    next(tensors).copy_(leaf)
            for call in self._calls:
                call()
            results = [
                leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._outputs
            ]  # the caller may keep them
        return pytree.tree_unflatten(results, self._result_spec)


def _static_copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides, whose memory stays where it is; an expanded tensor gets memory of its own."""
    with torch.inference_mode(False), torch.no_grad():
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
            tensor
        )


def _key(leaves: list, spec) -> tuple | None:
    """What a recording depends on: shapes, dtypes, strides and all other arguments; ``None`` if one cannot be a key."""
    parts: list = [spec]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            parts.append((leaf.shape, leaf.dtype, leaf.stride(), leaf.device))
        elif leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
            parts.append((type(leaf), leaf))
        else:
            return None
    return tuple(parts)


class _State:
    """What a recording depends on besides its inputs: the modules, the parameters and buffers that it only reads, each
    module's mode, and what a module gives by a method ``recorded_state``. Looked at in every call, so it is kept flat.
    """

    def __init__(self, model: nn.Module, written: Collection[int]):
        modules = list(model.modules())
        self._stateful = [module for module in modules if hasattr(type(module), "recorded_state")]
        self._places: list[tuple[dict, str, object]] = []  # whose entry is to stay the same object
        self._modes = [module.__dict__ for module in modules]
        self._tensors: list[Tensor] = []
        for module in modules:
            inside = module.__dict__
            for entries in (inside["_modules"], inside["_parameters"], inside["_buffers"]):
                self._places += [(entries, name, value) for name, value in entries.items()]
            tensors = [*inside["_parameters"].values(), *inside["_buffers"].values()]
            self._tensors += [t for t in tensors if t is not None and _storage(t) not in written]
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._seen = self._look()

    def _look(self) -> tuple:
        return (
            [t._version for t in self._versioned],
            [t.data_ptr() for t in self._tensors],
            [inside["training"] for inside in self._modes],
            [module.recorded_state() for module in self._stateful],
        )

    def changed(self) -> bool:
        """Whether anything is not as it was."""
        for entries, name, value in self._places:
            if entries.get(name) is not value:
                return True
        return self._look() != self._seen


@dataclass
class RecordedForward:
    """Stands in for a model's ``forward``: records it once per input shape and replays it.

    Calls that need gradients, are compiled or in training mode, or cannot be recorded, run the model's own forward;
    ``refusals`` says why, once per kind of call. What a new recording replays must be what the model itself gives.
    Numbers among the arguments are part of what is recorded, so those named in ``as_tensors`` (a time step) are turned
    into tensors first. Changed weights and a change of threads' or ISA settings are noticed; writing to ``.data`` is
    not, nor to other attributes, but for those that a module gives by a method ``recorded_state``.
    """

    model: nn.Module
    as_tensors: tuple[str, ...] = ()
    refusals: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._recordings: OrderedDict[tuple, tuple[Recording | None, _State]] = OrderedDict()
        parameters = list(inspect.signature(type(self.model).forward).parameters.values())[1:]
        self._names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    def __call__(self, *args, **kwargs) -> object:
        if self.model.training or torch.compiler.is_compiling():
            return self._own(*args, **kwargs)
        if torch.is_grad_enabled() and self._wants_gradients(args, kwargs):
            return self._own(*args, **kwargs)
        call, numbers = self._with_tensors(args, kwargs)
        leaves, spec = pytree.tree_flatten(call)
        key = _key(leaves, spec)
        if key is None or not all(type(t) in (Tensor, nn.Parameter) for t in leaves if isinstance(t, Tensor)):
            self._refuse("an argument is neither a plain tensor nor a plain value")
            return self._own(*args, **kwargs)
        key = (key, numbers, torch.is_autocast_enabled("cpu"), _native.extension().module.active_isa())
        recording, state = self._recordings.get(key, (None, None))
        if state is None or state.changed():
            recording = self._record(key, args, kwargs, call)
        else:
            self._recordings.move_to_end(key)
        return self._own(*args, **kwargs) if recording is None else recording.replay(leaves)

    def _own(self, *args, **kwargs) -> object:
        return type(self.model).forward(self.model, *args, **kwargs)

    def _with_tensors(self, args: tuple, kwargs: dict) -> tuple[tuple[tuple, dict], tuple]:
        """The arguments with numbers among those named in ``as_tensors`` as tensors, and the kinds of these numbers."""
        kinds: list = []

        def change(name: object, value: object) -> object:
            if name not in self.as_tensors or isinstance(value, bool) or not isinstance(value, (int, float)):
                return value
            kinds.append((name, type(value), value == int(value) if math.isfinite(value) else None))
            return torch.tensor(value)

        if not self.as_tensors:
            return (args, kwargs), ()
        names = (*self._names, *[None] * len(args))
        args = tuple(change(name, value) for name, value in zip(names, args, strict=False))
        return (args, {name: change(name, value) for name, value in kwargs.items()}), tuple(kinds)

    def _wants_gradients(self, args: tuple, kwargs: dict) -> bool:
        return any(t.requires_grad for t in _tensors((args, kwargs)))

    def _record(self, key: tuple, args: tuple, kwargs: dict, call: tuple[tuple, dict]) -> Recording | None:
        try:
            with torch.no_grad():
                # packs weights and fills caches, so that the recorded run computes nothing else
                expected = self._own(*args, **kwargs)
                recording = Recording(self._own, *call)
                recording.written &= {_storage(t) for t in [*self.model.parameters(), *self.model.buffers()]}
                if not _same(recording.replay(pytree.tree_leaves(call)), expected):
                    raise Unrecordable("a replay differs from the model's own result")
        except Unrecordable as reason:
            self._refuse(str(reason))
            recording = None
        self._recordings[key] = (recording, _State(self.model, () if recording is None else recording.written))
        self._recordings.move_to_end(key)
        while len(self._recordings) > MAX_RECORDINGS:
            self._recordings.popitem(last=False)
        return recording

    def _refuse(self, reason: str) -> None:
        if reason not in self.refusals:
            self.refusals.append(reason)

    def recordings(self) -> list[Recording]:
        """What is recorded now, least recently used first."""
        return [recording for recording, _ in self._recordings.values() if recording is not None]

    def clear(self) -> None:
        """Forget all recordings and free their buffers."""
        self._recordings.clear()

    def __getstate__(self) -> dict:
        return {"model": self.model, "as_tensors": self.as_tensors, "refusals": list(self.refusals)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.__post_init__()


def _same(one: object, other: object) -> bool:
    """Whether two results are equal bit for bit; NaN equals NaN."""
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def record_forward(model: nn.Module, as_tensors: tuple[str, ...] = ()) -> RecordedForward:
    """Make ``model(...)`` replay recordings of its forward; ``release_forward`` undoes it.

    Args:
        model: in eval mode, on the CPU.
        as_tensors: names of arguments whose numbers are turned into tensors, because they change from call to call.

    Raises:
        Unrecordable: nothing can be recorded here; the message says why.
    """
    reason = unavailable()
    if reason is not None:
        raise Unrecordable(reason)
    recorded = RecordedForward(model, tuple(as_tensors))
    model.forward = recorded  # on the instance: the class, its attributes and isinstance stay
    return recorded


def release_forward(model: nn.Module) -> None:
    """Give ``model`` its own forward back."""
    if isinstance(model.__dict__.get("forward"), RecordedForward):
        del model.forward
