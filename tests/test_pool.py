"""The pool of large output buffers: reuse, its limit, and that no two live tensors share memory."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import pydenoise.functional as PF
from pydenoise import _native

module = _native.extension().module
pytestmark = pytest.mark.skipif(module is None, reason=str(_native.extension().reason))


def large_output(value: float) -> torch.Tensor:
    """A 1 MiB output of the cpu backend, every entry ``value``."""
    x = torch.full((1, 4, 256, 256), value).contiguous(memory_format=torch.channels_last)
    return PF.weighted_conv2d(x, torch.eye(4).view(4, 4, 1, 1), None, backend="cpu")


def test_a_freed_buffer_is_used_again():
    module.pool_clear()
    first = large_output(1.0)
    if module.pool_unused() == 0 and first.data_ptr() % 4096 != 64:
        pytest.skip("this torch cannot adopt memory (torch_from_blob came with 2.11)")
    address = first.data_ptr()
    del first
    assert module.pool_unused() > 0
    assert large_output(2.0).data_ptr() == address
    module.pool_clear()
    assert module.pool_unused() == 0


def test_live_tensors_never_share_memory():
    tensors = [large_output(float(i)) for i in range(5)]
    views = [t[:, :2] for t in tensors]
    del tensors
    more = [large_output(float(10 + i)) for i in range(5)]
    assert all((view == i).all() for i, view in enumerate(views))
    assert all((tensor == 10 + i).all() for i, tensor in enumerate(more))


def test_from_several_threads():
    wrong = []

    def work(value: float) -> None:
        for _ in range(10):
            y = large_output(value)
            if not (y == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("setting", "limit"), [("0", 0), ("3", 3 << 20), ("nonsense", 256 << 20), (None, 256 << 20)])
def test_limit_from_the_environment(setting, limit):
    code = (
        "import torch, pydenoise.functional as PF; from pydenoise import _native; m = _native.extension().module\n"
        "for n in (256, 512): PF.weighted_conv2d(torch.ones(1, 4, n, n), torch.ones(4, 4, 1, 1), None, backend='cpu')\n"
        f"assert m.pool_limit() == {limit}, m.pool_limit(); assert m.pool_unused() <= {limit}, m.pool_unused()"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYDENOISE_POOL_MIB"}
    if setting is not None:
        environment["PYDENOISE_POOL_MIB"] = setting
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
