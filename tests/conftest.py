"""What every test starts from: a fixed seed, the thread count it found, and no memory of earlier fallbacks."""

import pytest
import torch

from pydenoise.ops import registry


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long or needs much memory; run with --slow or -m slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or "slow" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def _fresh_state():
    """Tests neither see nor leave each other's random numbers, threads, precision, default dtype or fallback notes."""
    threads, precision, dtype = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype()
    torch.manual_seed(0)
    registry._warned.clear()
    registry.fallbacks.clear()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(dtype)
