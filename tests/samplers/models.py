"""Models that the sampler tests generate with."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

VOCABULARY, MASK, EOS, EOT = 23, 22, 20, 21


class TinyModel(nn.Module):
    """A bidirectional transformer of two layers with absolute positions and a random vocabulary head, in float64.

    Like transformers' models it takes ``input_ids`` and ``attention_mask`` and gives an object with ``.logits``.
    ``mask_logit`` is what the mask gets; ``eos_slope`` makes the end of text likelier the further right a position is.
    """

    def __init__(self, seed: int = 0, width: int = 16, sharpness: float = 4.0, mask_logit: float = -torch.inf,
                 eos_slope: float = 0.0):  # fmt: skip
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5)

        self.embedding, self.position = draw(VOCABULARY, width), draw(512, width)
        self.layers = nn.ParameterList(draw(4, width, width) for _ in range(2))
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False, dtype=torch.float64)
        self.lm_head.weight = nn.Parameter(draw(VOCABULARY, width) * sharpness)
        self.mask_logit, self.eos_slope = mask_logit, eos_slope
        self.calls: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        self.calls.append(tuple(input_ids.shape))
        x = 4 * (self.embedding[input_ids] + self.position[: input_ids.shape[1]])
        for query, key, value, out in self.layers:
            scores = (x @ query) @ (x @ key).mT / x.shape[-1] ** 0.5
            if attention_mask is not None:
                scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
            x = x + torch.tanh(scores.softmax(-1) @ (x @ value) @ out)
            x = x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True))
        logits = self.lm_head(x)
        bias = torch.zeros(VOCABULARY, dtype=torch.float64)
        bias[MASK] = self.mask_logit
        logits = logits + bias
        if self.eos_slope and logits.shape[:2] == input_ids.shape:
            logits[..., EOS] += self.eos_slope * torch.arange(input_ids.shape[1])
        return SimpleNamespace(logits=logits)
