"""What a generation returns, and what its callback sees."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Generation:
    """The texts of one call.

    Attributes:
        sequences: int64 [B, L], every prompt followed by its generated tokens, padded on the right.
        prompt_lengths: tokens of each prompt.
        lengths: tokens of each prompt and what follows it; ``sequences[b, lengths[b]:]`` is padding.
        nfe: evaluations of the model on each sample; guidance takes two a step.
        model_calls: calls of the model, each on a batch.
        trajectory: the sequences before the first step and after every step, if they were asked for.
    """

    sequences: Tensor
    prompt_lengths: tuple[int, ...]
    lengths: tuple[int, ...]
    nfe: tuple[int, ...]
    model_calls: int
    trajectory: tuple[Tensor, ...] | None = None

    @property
    def generated(self) -> list[Tensor]:
        """The generated tokens of each sample, int64 [lengths[b] - prompt_lengths[b]]."""
        bounds = zip(self.prompt_lengths, self.lengths, strict=True)
        return [row[begin:end] for row, (begin, end) in zip(self.sequences, bounds, strict=True)]


@dataclass(frozen=True)
class StepInfo:
    """What a callback gets after a step.

    ``step`` counts from 0; ``num_steps`` is ``None`` where their number is not known. ``tokens`` [B, L] is the state,
    to be read and not written; ``nfe`` the evaluations so far, of the sample with the most.
    """

    step: int
    num_steps: int | None
    tokens: Tensor
    nfe: int
