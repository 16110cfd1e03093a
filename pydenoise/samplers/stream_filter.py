"""The stochastic similarity filter: frames like the last accepted one are skipped, the likelier the more alike.

Source: Kodaira et al., "StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation", 2023, section
3.4.
"""

import random

import torch
from torch import Tensor

SMALLEST = 1e-6  # of the product of two norms


class SimilarityFilter:
    """Accepts a frame, or skips it with probability max(0, 1 - (1 - cos) / (1 - threshold)).

    cos is the cosine of the frame and the last accepted one, both as vectors. Skips are random so that a slowly
    changing picture does not freeze until it has changed by the threshold.

    Args:
        threshold: from 0 to 1; frames less alike are always accepted, and 1 accepts all.
        max_skip: after so many skips in a row a frame is accepted. (The public code lets one more pass, and counts on
            through frames that are accepted for their difference.)
        seed: of the random numbers, which are Python's; ``None``: other ones every time.
    """

    def __init__(self, threshold: float = 0.98, max_skip: int = 10, seed: int | None = None):
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"threshold: expected a number, got {type(threshold).__name__}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected a number from 0 to 1, got {threshold}")
        if isinstance(max_skip, bool) or not hasattr(max_skip, "__index__"):
            raise TypeError(f"max_skip: expected an int, got {type(max_skip).__name__}")
        if max_skip < 0:
            raise ValueError(f"max_skip: expected at least 0, got {max_skip}")
        if seed is not None and (isinstance(seed, bool) or not hasattr(seed, "__index__")):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        self.threshold, self.max_skip, self._seed = float(threshold), int(max_skip), seed
        self.reset()

    def reset(self) -> None:
        """Forget the last frame, the skips and where the random numbers were."""
        self._random = random.Random(self._seed)
        self._last: Tensor | None = None
        self._norm = 0.0
        self.skips = 0

    def probability(self, frame: Tensor) -> float:
        """With which ``frame`` is skipped, whatever ``max_skip`` says; 0 for the first one."""
        return self._compare(_vector(frame))[0]

    def accepts(self, frame: Tensor) -> bool:
        """Whether ``frame`` is to be evaluated. Accepted ones are kept: they must not change afterwards."""
        vector = _vector(frame)
        probability, norm = self._compare(vector)
        if self.skips < self.max_skip and probability > self._random.random():
            self.skips += 1
            return False
        self._last, self._norm, self.skips = vector, norm, 0
        return True

    def accept(self, frame: Tensor) -> None:
        """``frame`` is evaluated in any case."""
        vector = _vector(frame)
        self._last, self._norm, self.skips = vector, float(torch.linalg.vector_norm(vector)), 0

    def _compare(self, vector: Tensor) -> tuple[float, float]:
        """(probability of a skip, the frame's norm); one pass and, on a device, one wait."""
        if self._last is None:
            return 0.0, float(torch.linalg.vector_norm(vector))
        if vector.shape != self._last.shape:
            raise ValueError(f"frame: expected {self._last.numel()} numbers, as in the last one, got {vector.numel()}")
        product, norm = torch.stack([vector @ self._last, torch.linalg.vector_norm(vector)]).tolist()
        cosine = product / max(norm * self._norm, SMALLEST)
        unlike = 1.0 - min(cosine, 1.0)
        return (max(0.0, 1 - unlike / (1 - self.threshold)) if self.threshold < 1 else 0.0), norm


def _vector(frame: object) -> Tensor:
    if not isinstance(frame, Tensor):
        raise TypeError(f"frame: expected a tensor, got {type(frame).__name__}")
    return frame.detach().reshape(-1).to(torch.float64 if frame.dtype == torch.float64 else torch.float32)
