"""``python -m pydenoise``: the command line."""

import sys

from pydenoise.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
