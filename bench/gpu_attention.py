"""The sparse-attention part of bench/gpu.py: every CUDA and Triton row against float64, then long sequences.

python bench/gpu_attention.py --dry     # no GPU: the reference on small cases, to see that the script runs
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from statistics import median

import torch
import torch.nn.functional as F

BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 128
BARS = {  # (tokens, provider): milliseconds, on one H200
    (65536, "triton"): 53.0,
    (65536, "cuda"): 39.0,
    (65536, "triton int8"): 35.0,
    (65536, "cuda int8"): 35.0,
    (65536, "mask, lse known triton"): 70.0,
    (65536, "mask, lse known cuda"): 70.0,
}
OVER_FLEX = 1.3
ALLOWED = {"int8": 0.1, "": 0.02}  # of sampled results, relative to the largest value


# --------------------------------------------------------------------------------------------------------- correctness


@dataclass
class Expected:
    """What a case of the table should give, on the CPU: exact, and by torch in the case's own dtype."""

    output: torch.Tensor
    lse: torch.Tensor
    own_output: torch.Tensor
    own_lse: torch.Tensor


def _kept(case) -> torch.Tensor:
    kept = case.mask().to_token_mask().expand(case.batch, case.heads, -1, -1)
    if case.lengths is None:
        return kept
    return kept & (torch.arange(case.keys) < torch.tensor(case.lengths)[:, None, None, None])


def _scale(case) -> float:
    return case.size**-0.5 if case.scale is None else case.scale


def _repeated(case, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(case.heads // case.kv_heads, 1)


def _formula(case, query, key, value) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all tokens: (output, log-sum-exp)."""
    kept = _kept(case)
    scores = (query @ _repeated(case, key).mT * _scale(case)).masked_fill(~kept, -torch.inf)
    weights = torch.where(kept.any(-1, keepdim=True), scores, 0).softmax(-1) * kept
    return weights @ _repeated(case, value), scores.logsumexp(-1)


@cache
def _forward(case, dtype: torch.dtype) -> Expected:
    query, key, value = case.tensors(dtype)
    exact = _formula(case, query.double(), key.double(), value.double())
    mine = F.scaled_dot_product_attention(
        query, _repeated(case, key), _repeated(case, value), attn_mask=_kept(case), scale=case.scale
    )
    return Expected(*exact, mine.nan_to_num(), _formula(case, query, key, value)[1].float())


@cache
def _gradients(case, dtype: torch.dtype) -> tuple[tuple, list, list]:
    """(the backward rows' arguments on the CPU, exact gradients, torch's)."""
    from pydenoise.ops import block_sparse_attention as op
    from pydenoise.reference import block_sparse_attention as reference

    args = case.args(dtype)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(args[0].shape, generator=generator, dtype=torch.float64).to(dtype)
    output, lse = reference.block_sparse_attention(*args)
    back = op.prepare_backward(grad, output, lse, None, args, case.mask().transposed())
    results = []
    for kind in (torch.float64, dtype):
        leaves = [t.detach().to(kind).requires_grad_() for t in args[:3]]
        grads = torch.autograd.grad((_formula(case, *leaves)[0] * grad.to(kind)).sum(), leaves)
        results.append([g.nan_to_num() for g in grads])
    return back, *results


@cache
def _importances(case, dtype: torch.dtype) -> tuple[tuple, torch.Tensor, tuple]:
    """(arguments on the CPU, log-sum-exps, exact importances)."""
    from pydenoise.reference.block_importance import block_importance

    args = case.importance_args(dtype)
    query, key, *rest = args
    scores = (query.double() @ _repeated(case, key.double()).mT) * _scale(case)
    if case.lengths is not None:
        beyond = torch.arange(case.keys) >= torch.tensor(case.lengths)[:, None, None, None]
        scores = scores.masked_fill(beyond, -torch.inf)
    return args, scores.logsumexp(-1).float(), block_importance(query.double(), key.double(), *rest)


def _wrong(name: str, actual: torch.Tensor, exact: torch.Tensor, own: torch.Tensor) -> str | None:
    """What is wrong with a result under the policy of pydenoise.testing, or ``None``."""
    from pydenoise.testing import error_bound

    actual = actual.detach().cpu()
    if actual.shape != exact.shape:
        return f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    nothing = exact == -torch.inf
    if not torch.equal(actual == -torch.inf, nothing):
        return f"{name}: -inf in other places"
    if nothing.all():
        return None
    actual, exact, own = (t.masked_fill(nothing, 0) for t in (actual, exact, own))
    error = (actual.double() - exact).abs().max().item()
    bound = error_bound(exact, own)
    return None if error <= bound else f"{name}: error {error:.3e}, allowed {bound:.3e}"  # NaN is no <=


def _check_forward(case, dtype, results) -> list[str | None]:
    expected = _forward(case, dtype)
    return [
        _wrong("output", results[0], expected.output, expected.own_output),
        _wrong("lse", results[1], expected.lse, expected.own_lse),
    ]


def _check_int8(case, dtype, results) -> list[str | None]:
    """Near the reference's codes, one of which may differ here and there."""
    from pydenoise.reference import block_sparse_attention as reference

    args = [a.double() if _is_float(a) else a for a in case.args(dtype, int8=True)]
    quantized, lse = reference.block_sparse_attention(*args)
    expected = _forward(case, dtype)
    some = expected.lse > -torch.inf
    if not some.any():
        return []
    own = (expected.own_output.double() - expected.output).abs().max()
    allowed = 0.1 * (quantized - expected.output).abs().max() + 4 * own
    error = (results[0].cpu().double() - quantized).abs().max()
    lse_allowed = 0.1 * (lse - expected.lse)[some].abs().max() + 1e-5
    lse_error = (results[1].cpu().double() - lse)[some].abs().max()
    return [
        None if error <= allowed else f"output: error {error:.3e}, allowed {allowed:.3e}",
        None if lse_error <= lse_allowed else f"lse: error {lse_error:.3e}, allowed {lse_allowed:.3e}",
    ]


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _jobs(case, dtype: torch.dtype, device: str) -> Iterator[tuple[str, str, tuple, Callable]]:
    """(what, op, arguments on the device, function of the results that lists what is wrong)."""
    from pydenoise.reference.block_importance import block_importance

    yield "forward", "block_sparse_attention", case.args(dtype, device), lambda r: _check_forward(case, dtype, r)
    if not (case.batch and case.queries):
        return
    yield "int8", "block_sparse_attention", case.args(dtype, device, int8=True), lambda r: _check_int8(case, dtype, r)
    back, exact, own = _gradients(case, dtype)
    names = ("d query", "d key", "d value")
    yield (
        "backward", "block_sparse_attention_backward", _to(back, device),
        lambda r: [_wrong(*row) for row in zip(names, r, exact, own, strict=True)],
    )  # fmt: skip
    args, lse, exact_importance = _importances(case, dtype)
    for what, known in (("importance", None), ("importance, lse known", lse)):
        args = (*args[:5], known, args[6])

        def judge(results: tuple, args: tuple = args) -> list[str | None]:
            pairs = zip(("over all", "over generated"), results, exact_importance, block_importance(*args), strict=True)
            return [_wrong(*row) for row in pairs]

        yield what, "block_importance", _to(args, device), judge


def _to(args: tuple, device: str) -> tuple:
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)


def checks(
    wanted: str = "", *, backends: tuple[str, ...] = BACKENDS, device: str = "cuda", dtypes=DTYPES
) -> Iterator[tuple[str, str | None]]:
    """(name of one check, what is wrong or ``None``); "skipped: ..." where a row cannot take a case."""
    from pydenoise.ops import registry
    from pydenoise.testing.sparse import SPARSE_CASES

    rows = {(op, row.name): row for op in _ops() for row in registry.rows(op)}
    for dtype in dtypes:
        for case in SPARSE_CASES:
            if wanted not in case.name:
                continue
            for what, op, args, judge in _jobs(case, dtype, device):
                for backend in backends:
                    name = f"{op} {what} {case.name} {str(dtype).removeprefix('torch.')} {backend}"
                    yield name, _attempt(rows.get((op, backend)), args, judge, device)
    yield from _check_confidence(wanted, backends, device, dtypes)


def _check_confidence(wanted: str, backends: tuple[str, ...], device: str, dtypes) -> Iterator[tuple[str, str | None]]:
    from pydenoise.ops import registry, token_confidence
    from pydenoise.testing.token_confidence import TOKEN_CONFIDENCE_CASES

    rows = {row.name: row for row in registry.rows(token_confidence.OP)}
    for dtype in dtypes:
        for case in TOKEN_CONFIDENCE_CASES:
            if wanted not in case.name or not case.rows:
                continue
            args = case.args(dtype)
            for backend in backends:
                name = f"token_confidence {case.name} {str(dtype).removeprefix('torch.')} {backend}"
                judge = lambda results, args=args: _confidence_wrong(args, results)  # noqa: E731
                yield name, _attempt(rows.get(backend), _to(args, device), judge, device)


def _confidence_wrong(args: tuple, results: tuple) -> list[str | None]:
    """Tokens are exact, but that noise and guidance may decide near ties otherwise; probabilities where they agree."""
    from pydenoise.reference.token_confidence import token_confidence as reference

    logits, other, *rest = args
    exact = reference(logits.double(), None if other is None else other.double(), *rest)
    own = reference(*args)
    token, confidence, probability = (r.cpu() for r in results)
    same = (token == exact[0]) & (own[0] == exact[0])
    differ = (token != exact[0]).double().mean().item()
    allowed = 0.05 if other is not None or rest[3] > 0 else 0.0
    return [
        None if differ <= allowed else f"tokens differ in {differ:.1%} of the rows",
        _wrong("confidence", confidence[same], exact[1][same], own[1][same]) if same.any() else None,
        _wrong("probability of eos", probability, exact[2], own[2]) if probability.numel() else None,
    ]


def _ops() -> tuple[str, ...]:
    from pydenoise.ops import block_importance, block_sparse_attention

    return block_sparse_attention.OP, block_sparse_attention.OP_BACKWARD, block_importance.OP


def _attempt(row, args: tuple, judge: Callable, device: str) -> str | None:
    reason = "no such row" if row is None else row.unsupported(*args)
    if reason is not None:
        return f"skipped: {reason}"
    try:
        with torch.no_grad():
            results = row.run(*args)
        _wait(device)
        wrong = [text for text in judge(results) if text is not None]
    except Exception as error:  # noqa: BLE001  (the other checks still count)
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return "; ".join(wrong) or None


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------- timings


@dataclass(frozen=True)
class Sequence:
    """One timed length: ``dense`` times our rows at density 1 too, ``train`` forward and backward."""

    length: int
    heads: int = 32
    size: int = 128
    density: float = 0.3
    dtype: torch.dtype = torch.bfloat16
    dense: bool = False
    train: bool = False

    @property
    def name(self) -> str:
        kind = " train" if self.train else " dense" if self.dense else ""
        return f"attention {self.length} H{self.heads} D{self.size} {self.density if not self.dense else 1.0}{kind}"

    def flops(self, density: float) -> float:
        return 4.0 * self.heads * self.length**2 * self.size * density * (3.5 if self.train else 1)


def sequences(dry: bool = False) -> list[Sequence]:
    """4k to 64k tokens, as the specification has them."""
    if dry:
        shape = {"heads": 2, "size": 32, "dtype": torch.float32}
        return [Sequence(512, **shape), Sequence(512, dense=True, **shape), Sequence(512, train=True, **shape)]
    lengths = (4096, 8192, 16384, 32768, 65536)
    train = [Sequence(length, train=True) for length in (4096, 16384)]
    return [*map(Sequence, lengths), Sequence(16384, dense=True), *train, Sequence(16384, dtype=torch.float16)]


@dataclass
class Problem:
    """Tensors and mask of a sequence on the device."""

    sequence: Sequence
    device: str
    query: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        from pydenoise.benchmarks.attention_cases import kept_blocks
        from pydenoise.block_mask import BlockMask, blocks_of

        s = self.sequence
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (1, s.heads, s.length, s.size)
        self.query, self.key, self.value, self.grad = (
            torch.randn(shape, device=self.device, dtype=s.dtype, generator=generator) for _ in range(4)
        )
        density = 1.0 if s.dense else s.density
        self.kept = kept_blocks("random", density, s.heads, blocks_of(s.length, BLOCK))
        self.mask = BlockMask.from_dense(self.kept, BLOCK, s.length, s.length).to(self.device)
        if s.train:
            for leaf in (self.query, self.key, self.value):
                leaf.requires_grad_()
            self.mask.transposed()

    @property
    def density(self) -> float:
        return self.kept.double().mean().item()

    def attention(self, call: Callable) -> Callable[[], torch.Tensor]:
        """``call(query, key, value)``, with the backward pass in training."""
        qkv = (self.query, self.key, self.value)
        if not self.sequence.train:
            return lambda: call(*qkv)

        def step() -> torch.Tensor:
            y = call(*qkv)
            torch.autograd.grad(y, qkv, self.grad)
            return y

        return step

    def error(self, output: torch.Tensor, dense: bool) -> float:
        """Of the first and last block of queries of the first and last head, against float32; relative."""
        worst, s = 0.0, self.sequence
        last = self.kept.shape[2] - 1
        for head in (0, s.heads - 1):
            for row in (0, last):
                tokens = slice(row * BLOCK, (row + 1) * BLOCK)
                keys = slice(None) if dense else self._tokens(head, row)
                q, k, v = (t.detach()[0, head].float() for t in (self.query, self.key, self.value))
                exact = torch.softmax(q[tokens] @ k[keys].mT * s.size**-0.5, -1) @ v[keys]
                difference = (output.detach()[0, head, tokens].float() - exact).abs().max() / exact.abs().max()
                worst = max(worst, difference.item() if torch.isfinite(difference) else float("inf"))
        return worst

    def _tokens(self, head: int, row: int) -> torch.Tensor:
        kept = self.kept[0, head, row].repeat_interleave(BLOCK)[: self.sequence.length]
        return kept.nonzero()[:, 0].to(self.device)


def attention_calls(problem: Problem, backends: tuple[str, ...], with_compile: bool) -> dict[str, Callable]:
    """What computes attention, by name: dense ones begin with "sdpa"."""
    import pydenoise.functional as PF

    sequence, mask = problem.sequence, problem.mask
    calls = {name: problem.attention(call) for name, call in dense_calls(problem.device).items()}
    if with_compile:
        calls["flex"] = problem.attention(flex_call(mask))
    for backend in backends:
        for name, qk_dtype in ((backend, None), (f"{backend} int8", "int8")):
            if not (sequence.train and qk_dtype):
                options = {"qk_dtype": qk_dtype, "backend": backend}
                calls[name] = problem.attention(lambda *qkv, o=options: PF.block_sparse_attention(*qkv, mask, **o))
    return calls


def dense_calls(device: str) -> dict[str, Callable]:
    """Torch's own attention: each of its fused kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def with_kernel(kernel):
        def call(*qkv):
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(*qkv)

        return call

    kernels = {"sdpa flash": SDPBackend.FLASH_ATTENTION}
    if device == "cuda":
        kernels["sdpa cudnn"] = SDPBackend.CUDNN_ATTENTION
    return {name: with_kernel(kernel) for name, kernel in kernels.items()}


def flex_call(mask) -> Callable:
    """FlexAttention compiled for this length with the same blocks, all of them whole."""
    from torch.nn.attention.flex_attention import flex_attention

    from pydenoise.benchmarks.attention_peers import flex_mask

    torch.compiler.reset()
    blocks = flex_mask(mask)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda *qkv: compiled(*qkv, block_mask=blocks)


def pattern_calls(problem: Problem, backends: tuple[str, ...]) -> dict[str, Callable]:
    """What a pattern costs, its second half being generated; the log-sum-exps are those of a dense pass."""
    import pydenoise.functional as PF
    from pydenoise.block_mask import BlockMask

    s = problem.sequence
    query, key = problem.query, problem.key
    new = s.length // 2
    calls = {}
    for backend in backends:

        def known(backend=backend):
            full = BlockMask.full(BLOCK, s.length, s.length, device=problem.device)
            return PF.block_sparse_attention(query, key, key, full, return_lse=True, backend=backend)[1]

        def importance(lse, backend=backend):
            return PF.block_importance(query, key, BLOCK, new_tokens=new, lse=lse, backend=backend)

        def mask(lse, backend=backend):
            return PF.sparsed_block_mask(query, key, select=s.density, new_tokens=new, lse=lse, backend=backend)

        calls[f"importance {backend}"] = lambda call=importance: call(None)
        calls[f"mask {backend}"] = lambda call=mask: call(None)
        with_lse = cache(known)
        calls[f"importance, lse known {backend}"] = lambda call=importance, lse=with_lse: call(lse())
        calls[f"mask, lse known {backend}"] = lambda call=mask, lse=with_lse: call(lse())
    return calls


def time_sequence(
    sequence: Sequence, interleaved: Callable[[dict, int], dict], *, rounds: int, device: str = "cuda",
    backends: tuple[str, ...] = BACKENDS, with_compile: bool = True, peak: float | None = None,
) -> dict:  # fmt: skip
    """Milliseconds of every provider that runs and is right; ratios to the faster dense kernel and to FlexAttention.

    ``interleaved(calls, rounds)`` gives medians in milliseconds. ``peak``: TFLOP/s of a matrix product in the dtype.
    """
    problem = Problem(sequence, device)
    calls = attention_calls(problem, backends, with_compile)
    failed = {}
    for name, call in list(calls.items()):
        try:
            error = problem.error(call(), name.startswith("sdpa"))
            _wait(device)
            if not error <= ALLOWED["int8" if name.endswith("int8") else ""]:
                failed[name] = f"WRONG: error {error:.1e}"
        except Exception as error:  # noqa: BLE001  (one provider's failure must not end the run)
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if not sequence.train and not sequence.dense:
        for name, call in pattern_calls(problem, backends).items():
            try:
                call()
                _wait(device)
                calls[name] = call
            except Exception as error:  # noqa: BLE001
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    calls = {name: call for name, call in calls.items() if name not in failed}
    ms = interleaved(calls, rounds if sequence.length < 32768 else min(rounds, 10))
    return _row(sequence, problem.density, ms, failed, peak)


def _row(sequence: Sequence, density: float, ms: dict[str, float], failed: dict[str, str], peak: float | None) -> dict:
    dense = min((value for name, value in ms.items() if name.startswith("sdpa")), default=None)
    ours = [name for name in ms if not name.startswith(("sdpa", "flex"))]
    row = {"case": sequence.name, "dtype": str(sequence.dtype).removeprefix("torch."), "density": round(density, 4)}
    row["ms"] = {name: round(value, 4) for name, value in ms.items()}
    row["speedup_over_dense"] = {name: round(dense / ms[name], 3) for name in ours if dense is not None}
    row["speedup_over_flex"] = {
        name: round(ms["flex"] / ms[name], 3) for name in ours if "flex" in ms and not name.startswith(("imp", "mask"))
    }
    if peak is not None:
        work = {name: sequence.flops(1.0 if name.startswith("sdpa") else density) for name in ms}
        row["of_peak"] = {
            name: round(work[name] / value / 1e9 / peak, 3)
            for name, value in ms.items()
            if not name.startswith(("imp", "mask"))
        }
    row["bars"] = _bars(sequence, row)
    row["not_run"] = failed
    return row


def _bars(sequence: Sequence, row: dict) -> list[dict]:
    """The specification's: times at 64k, FlexAttention at every length, and a win over dense attention."""
    if sequence.dense or sequence.train or sequence.dtype != torch.bfloat16:
        return []
    bars = []
    for name, ms in row["ms"].items():
        target = BARS.get((sequence.length, name))
        if target is not None:
            bars.append({"provider": name, "bar": f"<= {target:g} ms", "met": ms <= target})
    for name, ratio in row["speedup_over_flex"].items():
        bars.append({"provider": name, "bar": f">= {OVER_FLEX}x flex", "met": ratio >= OVER_FLEX})
        over = row["speedup_over_dense"].get(name)
        if over is not None:
            bars.append({"provider": name, "bar": "> 1x dense", "met": over > 1})
    return bars


def describe_row(row: dict) -> Iterator[str]:
    """The lines that are printed of a row."""
    parts = [f"{name} {value:.3f}" for name, value in row["ms"].items()]
    yield f"{row['case']:36s} {row['dtype']:9s} ms: " + " | ".join(parts)
    yield f"    over dense {row['speedup_over_dense']} | over flex {row['speedup_over_flex']}"
    yield f"    of the peak {row.get('of_peak')}"
    for bar in row["bars"]:
        if not bar["met"]:
            yield f"    missed: {bar['provider']} {bar['bar']}"
    for provider, why in row["not_run"].items():
        yield f"    {provider} not timed: {why}"


def on_cpu(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median milliseconds by the clock, in turns."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def main(argv: list[str] | None = None) -> int:
    """A dry run: small cases on the CPU, through the same functions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "small cases on the CPU (bench/gpu.py is the real run)"
    parser.add_argument("--dry", action="store_true", required=True, help=text)
    parser.add_argument("--filter", default="", help="only checks of cases whose name contains this text")
    parser.add_argument("--backends", nargs="+", default=["reference"], help="of ours: reference, cpu")
    parser.add_argument("--compile", action="store_true", help="FlexAttention too")
    args = parser.parse_args(argv)
    failures = 0
    for name, wrong in checks(args.filter, backends=tuple(args.backends), device="cpu", dtypes=DTYPES[:2]):
        if wrong is not None and not wrong.startswith("skipped"):
            failures += 1
            print(f"FAILED {name}: {wrong}")
    print(f"{failures} checks failed")
    options = {"rounds": 2, "device": "cpu", "backends": tuple(args.backends)}
    options |= {"with_compile": args.compile, "peak": 0.1}
    for sequence in sequences(dry=True):
        print("\n".join(describe_row(time_sequence(sequence, on_cpu, **options))))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
