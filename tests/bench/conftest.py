"""What tests of the benchmarks share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Two threads that wait for each other take seconds where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
