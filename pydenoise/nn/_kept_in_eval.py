"""What modules share that make something of their parameters once, and keep it while they are evaluated."""

from torch import nn


class KeptInEval(nn.Module):
    """``_cache`` holds it, ``None`` if there is nothing. Training, moves, casts and copies drop it."""

    _cache = None

    def _apply(self, fn, recurse: bool = True):
        self._cache = None
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True):
        """Training mode (``mode=False``: evaluation) as in torch.nn; training drops what is kept."""
        if mode:
            self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": None}  # for pickle and deepcopy
