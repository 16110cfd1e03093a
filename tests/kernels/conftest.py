"""What the tests of the int8 Triton kernels share."""

import pytest
import torch


@pytest.fixture
def poisoned_memory(monkeypatch):
    """What a kernel fails to write, or reads before it is written, shows up."""
    allocate = torch.empty

    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 85)

    monkeypatch.setattr(torch, "empty", poisoned)
