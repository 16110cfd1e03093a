"""A line of progress on stderr."""

import sys
import time


class Progress:
    """``label: step 12/64, 3.1 steps/s``, rewritten at most ten times a second; silent unless ``enabled``."""

    def __init__(self, enabled: bool, label: str, total: int | None = None):
        self._enabled, self._label, self._total = enabled, label, total
        self._done, self._begin, self._shown = 0, time.monotonic(), -1.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self._enabled and self._done:
            self._show()
            print(file=sys.stderr)

    def advance(self) -> None:
        """One more step is done."""
        self._done += 1
        if self._enabled and time.monotonic() - self._shown > 0.1:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        rate = self._done / max(self._shown - self._begin, 1e-9)
        of = "" if self._total is None else f"/{self._total}"
        print(f"\r{self._label}: step {self._done}{of}, {rate:.3g} steps/s  ", end="", file=sys.stderr, flush=True)
