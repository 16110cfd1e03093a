"""Cases of the op ``token_confidence``; tests and benches read the same table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.ops import token_confidence


@dataclass(frozen=True)
class TokenConfidenceCase:
    """One ``token_confidence`` call and the reason why it is in the table."""

    name: str
    why: str
    rows: int
    vocabulary: int
    temperature: float = 0.0
    guidance: float | None = None  # None: no unconditional logits
    forbidden: tuple[int, ...] = ()
    uncounted: tuple[int, ...] = ()
    eos: int | None = None
    spread: float = 3.0
    layout: str = "dense"  # "sliced": rows far apart at odd addresses; "transposed": the last dim is not adjacent
    values: str = "normal"  # "ties": few distinct ones; "rising": every token above those before; "holes": many -inf
    picked: bool = False  # rows taken by number, keys by row
    step: int = 0
    seed: int = 0

    def logits(self, dtype: torch.dtype, device: str = "cpu", draw: int = 0) -> Tensor:
        """[N, V], drawn in float64; ``draw`` 1 gives the unconditional ones."""
        generator = torch.Generator().manual_seed(draw)
        count = 2 * self.rows + 1 if self.picked else self.rows
        x = torch.randn(count, self.vocabulary, generator=generator, dtype=torch.float64) * self.spread
        if self.values == "ties":
            x = x.round().clamp(-2, 2)
        elif self.values == "rising":
            x = x.sort(1).values
        elif self.values == "holes":
            generator.manual_seed(9)  # the same ones in both
            x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.7, -torch.inf)
            x[:, -1] = 0.5
        x = x.to(dtype).to(device)
        if self.layout == "sliced":
            wide = x.new_full((count, self.vocabulary + 5), torch.nan)
            wide[:, 3 : 3 + self.vocabulary] = x
            return wide[:, 3 : 3 + self.vocabulary]
        return x.t().contiguous().t() if self.layout == "transposed" else x

    def options(self, device: str = "cpu") -> dict:
        """Keyword arguments of the functional, but for the unconditional logits."""
        options = {
            "guidance": self.guidance or 0.0, "temperature": self.temperature, "seed": self.seed, "step": self.step,
            "forbidden": self.forbidden, "uncounted": self.uncounted, "eos_token_id": self.eos,
        }  # fmt: skip
        if self.picked:
            generator = torch.Generator().manual_seed(2)
            rows = torch.randperm(2 * self.rows + 1, generator=generator)[: self.rows]
            options["rows"] = rows.to(device)
            options["seed"] = torch.stack([rows * 2**40 - 7, rows + 2**35], 1).to(device)
        return options

    def args(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        """The rows' arguments."""
        other = None if self.guidance is None else self.logits(dtype, device, 1)
        return token_confidence.prepare(self.logits(dtype, device), unconditional=other, **self.options(device))


TOKEN_CONFIDENCE_CASES: tuple[TokenConfidenceCase, ...] = (
    TokenConfidenceCase("words", "several pieces of a long vocabulary, few rows", 3, 50257),
    TokenConfidenceCase("many", "more rows than threads", 70, 1000, eos=999),
    TokenConfidenceCase("characters", "shorter than any block", 9, 65, eos=0),
    TokenConfidenceCase("one", "a single token: certain", 3, 1, eos=0),
    TokenConfidenceCase("odd", "nothing divides anything", 5, 131, eos=7),
    TokenConfidenceCase("piece", "exactly one piece", 2, 16384),
    TokenConfidenceCase("piece_and_one", "a piece of one token", 2, 16385, spread=8.0),
    TokenConfidenceCase("flat", "small differences, long sums", 2, 40000, spread=1e-3),
    TokenConfidenceCase("sharp", "a softmax that picks one token", 4, 3000, spread=40.0, eos=5),
    TokenConfidenceCase("ties", "equal logits: the lower token", 8, 5000, values="ties"),
    TokenConfidenceCase("rising", "a new maximum in every vector", 2, 9000, values="rising"),
    TokenConfidenceCase("holes", "most tokens impossible", 4, 3001, values="holes", eos=3000),
    TokenConfidenceCase("sliced", "rows at odd addresses between NaN", 5, 301, layout="sliced"),
    TokenConfidenceCase("transposed", "the last dim not adjacent", 5, 301, layout="transposed"),
    TokenConfidenceCase("forbidden", "the first and the last token left out", 6, 700, forbidden=(0, 3, 699, 350)),
    TokenConfidenceCase("uncounted", "chosen, but not counted", 60, 6, uncounted=(5, 2), eos=2),
    TokenConfidenceCase("all_uncounted", "no token counts", 3, 3, uncounted=(0, 1, 2), eos=1),
    TokenConfidenceCase("both", "left out and uncounted in a later piece", 3, 20000, forbidden=(17000, 5),
                        uncounted=(17001, 16384), eos=17000),
    TokenConfidenceCase("guided", "classifier-free guidance", 5, 5000, guidance=1.5, eos=17),
    TokenConfidenceCase("guided_holes", "impossible in both: impossible", 5, 700, guidance=0.5, values="holes"),
    TokenConfidenceCase("guided_zero", "guidance 0 gives the conditional logits", 5, 700, guidance=0.0),
    TokenConfidenceCase("sampled", "Gumbel noise", 20, 2000, temperature=1.0, seed=11, eos=3),
    TokenConfidenceCase("sampled_short", "noise for fewer tokens than a block of it", 50, 27, temperature=0.7, step=5),
    TokenConfidenceCase("sampled_long", "noise in several pieces", 3, 33001, temperature=0.3, seed=-1, step=2**32 - 1),
    TokenConfidenceCase("sampled_hot", "noise that hides the logits", 9, 1300, temperature=50.0, seed=2**64 - 3),
    TokenConfidenceCase("sampled_holes", "noise makes nothing possible", 9, 1300, temperature=2.0, values="holes"),
    TokenConfidenceCase("sampled_left_out", "noise does not choose what is forbidden", 40, 40, temperature=9.0,
                        forbidden=(3, 39), uncounted=(0, 31, 32), eos=31),
    TokenConfidenceCase("everything", "all at once, rows by number", 7, 18000, temperature=0.9, guidance=0.8,
                        forbidden=(17999,), uncounted=(1, 16500), eos=2, picked=True, step=3, layout="sliced"),
    TokenConfidenceCase("picked", "rows by number", 6, 300, picked=True),
    TokenConfidenceCase("empty", "no rows", 0, 300, temperature=1.0, eos=1),
    TokenConfidenceCase("none_picked", "no rows of some", 0, 300, picked=True),
)  # fmt: skip
