"""diffusers where the C library's allocator keeps its memory: a child process that takes samples when it is asked.

By default glibc gives large blocks back to the system when they are freed, and every step of a scheduler pays for the
pages of its results again. The thresholds are read when a process starts, so the setting needs one of its own.
"""

import atexit
import os
import pickle
import subprocess
import sys

import torch

from pydenoise.benchmarks.cases import Case
from pydenoise.benchmarks.measure import interleave
from pydenoise.benchmarks.providers import Contender, Setting, Skip
from pydenoise.benchmarks.sampler_cases import LoopBench

# The largest threshold that glibc takes, and no trimming of what is free at the end of the heap.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
NOTE = ", ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
CHILD = "from pydenoise.benchmarks.sampler_tuned import serve; serve()"
LIMIT_SECONDS = 60
_child: subprocess.Popen | None = None


def contender(case: Case, setting: Setting) -> Contender:
    """diffusers' side of ``case`` in the child. Its results are those of the same code here; they are not sent."""
    if sys.platform != "linux":
        raise Skip("the allocator's thresholds are those of glibc")

    def prepare() -> None:
        kind, what = _ask(("prepare", case, setting))
        if kind == "skip":
            raise Skip(what)

    def sample() -> float:
        kind, seconds = _ask(("sample", case.key))
        if kind == "other":  # another case was prepared since
            prepare()
            kind, seconds = _ask(("sample", case.key))
        return seconds

    prepare()
    return Contender(sample=sample, note=f"a process with {NOTE}")


def _ask(request: tuple) -> tuple:
    global _child
    if _child is None or _child.poll() is not None:
        environment = os.environ | ENVIRONMENT
        command = [sys.executable, "-c", CHILD]
        _child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        atexit.register(stop)
    pickle.dump(request, _child.stdin)
    _child.stdin.flush()
    try:
        kind, value = pickle.load(_child.stdout)
    except EOFError as error:
        raise RuntimeError(f"the process of diffusers-tuned ended with {_child.wait(LIMIT_SECONDS)}") from error
    if kind == "error":
        raise RuntimeError(value)
    return kind, value


def stop() -> None:
    """End the child, if there is one."""
    global _child
    child, _child = _child, None
    if child is not None:
        child.stdin.close()
        child.stdout.close()
        child.wait(LIMIT_SECONDS)


def serve() -> None:
    """The child: answers requests on its standard input until that ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    key, prepared = None, None
    while True:
        try:
            kind, *words = pickle.load(requests)
        except EOFError:
            return
        try:
            if kind == "prepare":
                key, prepared = None, None  # the last case's tensors, before there are new ones
                key, prepared = words[0].key, _prepared(*words)
                answer = ("ok", None)
            elif words[0] != key:
                answer = ("other", None)
            else:
                answer = ("seconds", _seconds(prepared))
        except Skip as reason:
            answer = ("skip", str(reason))
        except Exception as error:  # it belongs into the parent's table, and the child goes on
            answer = ("error", f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


def _prepared(case: Case, setting: Setting):
    from pydenoise.benchmarks import sampler, sampler_loop

    torch.set_num_threads(setting.threads)
    made = sampler_loop.diffusers_loop(case) if isinstance(case, LoopBench) else sampler.diffusers_step(case)
    return made.run


def _seconds(run) -> float:
    """One sample, as ``interleave`` takes it in this process."""
    return interleave({"run": run}, rounds=1, settle_seconds=0)["run"].seconds[0]
