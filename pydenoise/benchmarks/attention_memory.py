"""The peak of memory of one call, measured in a fresh process, which prints one line of JSON.

What the process had before (interpreter, torch, the library, its threads) is subtracted; what
the call needs to exist at all (its inputs, the mask) is not.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pydenoise.benchmarks.providers import Skip
from pydenoise.ops.registry import BackendUnavailable
from pydenoise.testing.memory import resident_bytes, unsupported

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TIMEOUT_SECONDS = 1800
CHILD = "import sys; from pydenoise.benchmarks.attention_memory import main; sys.exit(main())"
UNSUPPORTED = 3  # exit code; the reason is on stderr


def measure_in_child(case, threads: int, backend: str) -> dict:
    """What the child says about a ``MemoryBench``.

    Raises ``Skip`` where memory cannot be measured or the backend is not there, and ``RuntimeError`` with the end of
    the child's output if it fails.
    """
    options = {
        "what": case.what,
        "length": case.length,
        "heads": case.heads,
        "head-size": case.head_size,
        "dtype": case.precision,
    }
    options |= {"block-size": case.block_size, "density": case.density, "threads": threads, "backend": backend}
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-c", CHILD, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if done.returncode == UNSUPPORTED:
        raise Skip(done.stderr.strip())
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise RuntimeError(f"the child process ended with {done.returncode}: {' '.join(lines)}")
    return json.loads(done.stdout.splitlines()[-1])


def make_call(what: str, length: int, args: argparse.Namespace) -> Callable[[], object]:
    """Inputs, the mask and the call. Random numbers are drawn in the final dtype: no copy raises the peak."""
    from pydenoise import functional as PF
    from pydenoise.benchmarks.attention_cases import kept_blocks
    from pydenoise.block_mask import BlockMask, blocks_of

    def draw() -> Tensor:
        return torch.randn(1, args.heads, length, args.head_size, dtype=DTYPES[args.dtype])

    query, key = draw(), draw()
    if what == "pattern":
        rest = {"select": args.density, "block_size": args.block_size, "new_tokens": length // 2}
        return lambda: PF.sparsed_block_mask(query, key, **rest, backend=args.backend)
    value = draw()
    kept = kept_blocks("random", args.density, args.heads, blocks_of(length, args.block_size))
    mask = BlockMask.from_dense(kept, args.block_size, length, length)
    return lambda: PF.block_sparse_attention(query, key, value, mask, backend=args.backend)


def measure(args: argparse.Namespace) -> dict:
    """A small call first, which loads what there is to load; then the peak of the large one over what was there."""
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        make_call(args.what, min(args.length, 4 * args.block_size), args)()
        before = resident_bytes("VmRSS")
        call = make_call(args.what, args.length, args)
        prepared = resident_bytes("VmRSS")
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
    peak = resident_bytes("VmHWM")
    del result
    return {
        "peak_bytes": peak - before,
        "inputs_bytes": prepared - before,
        "process_before_bytes": before,
        "process_peak_bytes": peak,
        "seconds": seconds,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=("attention", "pattern"), default="attention")
    parser.add_argument("--length", type=int, default=65536, help="tokens")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.3, help="of the mask, or `select` of the pattern")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backend", default="cpu")
    args = parser.parse_args(argv)
    why = unsupported()
    if why is None:
        try:
            print(json.dumps(measure(args)))
            return 0
        except BackendUnavailable as error:
            why = str(error)
    print(why, file=sys.stderr)
    return UNSUPPORTED
