"""pytest-benchmark entry points: ``pytest bench --benchmark-only``, over the cases of ``pydenoise.benchmarks``.

These time one provider after the other, which is good for following one kernel over commits; for a comparison with
other libraries use ``pydenoise bench``, which interleaves them.
"""

import pytest
import torch

from pydenoise.benchmarks.providers import Provider, Setting, Skip
from pydenoise.benchmarks.suites import SUITES


def pytest_collect_file(file_path, parent):
    """Collect bench_*.py, whatever the project's ``python_files`` says."""
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not _collected_anyway(file_path, parent):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def _collected_anyway(file_path, parent) -> bool:
    patterns = parent.config.getini("python_files")
    return parent.session.isinitpath(file_path) or any(file_path.match(pattern) for pattern in patterns)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the tiny cases of `pydenoise bench --quick`")


def pytest_generate_tests(metafunc):
    """Give a test that takes ``case`` and ``provider`` those of its module's ``SUITE``, if it has one."""
    suite = getattr(metafunc.module, "SUITE", None)
    if suite is not None and {"case", "provider"} <= set(metafunc.fixturenames):
        suite = SUITES[suite] if isinstance(suite, str) else suite
        cases = [case for case in suite.cases(metafunc.config.getoption("--quick")) if not case.optional]
        providers = [provider for provider in suite.providers if provider.default]
        metafunc.parametrize("case", cases, ids=[case.key for case in cases])
        metafunc.parametrize("provider", providers, ids=[provider.name for provider in providers])


@pytest.fixture
def time_contender(benchmark):
    """Prepare a provider for a case and hand its call to pytest-benchmark; skips with the provider's own reason."""

    def run(case, provider: Provider) -> None:
        try:
            contender = provider.prepare(case, Setting(torch.get_num_threads()))
        except Skip as reason:
            pytest.skip(str(reason))
        if contender.sample is not None or contender.memory is not None:
            pytest.skip("takes its own samples; use `pydenoise bench`")
        benchmark.group = case.key
        benchmark.extra_info.update(case.describe() | {"provider": provider.name, "threads": torch.get_num_threads()})
        benchmark(contender.run)

    return run
