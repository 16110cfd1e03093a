"""The command line in this process, and a small network's checkpoint for it."""

import re

import pytest
import torch

from pydenoise.cli.main import main
from pydenoise.models import FFDNet


@pytest.fixture
def cli(capsys):
    """Run the command line: (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(cli):
    """Run a command that must end with one line on stderr and exit code 2; returns that line."""

    def run(*arguments) -> str:
        code, out, err = cli(*arguments)
        assert code == 2, err
        assert out == ""
        line = err.strip().splitlines()[-1]
        assert re.match(r"pydenoise( \w+)?: error: ", line)
        assert "Traceback" not in err
        return line

    return run


@pytest.fixture
def weights(tmp_path_factory):
    """A small colour FFDNet that changes pictures visibly but not wildly: receptive radius 6."""
    torch.manual_seed(3)
    model = FFDNet(3, 8, 3)
    with torch.no_grad():
        model.model[-1].bias.add_(0.5)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(model.state_dict(), path)
    return path
