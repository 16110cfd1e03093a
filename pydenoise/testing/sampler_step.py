"""Cases of the op ``sampler_step``; tests and benches read the same table."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.ops import sampler_step

WRITTEN = {13: "out", 14: "kept", 4: "history", 15: "preview", 16: "model_input", 17: "faults"}  # by place in the args


@dataclass(frozen=True)
class SamplerStepCase:
    """One ``sampler_step`` call and the reason why it is in the table."""

    name: str
    why: str
    shape: tuple[int, ...]
    row: dict[int, float]  # column -> coefficient; other rows of the table are this one, scaled
    rows: str = "one"  # or "sample", "channel", "frame" ([B, 1, F]): a row for each of these
    guided: bool = False
    base: bool = False
    slots: int = 0
    noise: str = "none"  # "given": from outside; "keys": by a key for each sample; "seed": by one seed
    threshold: bool = False
    learned_variance: bool = False
    statistics: str = "none"
    kept: bool = False
    preview: bool = False
    copies: int = 0  # of the next model input
    model_dtype: torch.dtype | None = None  # of the model's output and input
    in_place: bool = False  # out is sample, kept is base
    strides: str = "dense"  # of the model's output: "batch" (rows of a larger tensor), "channels_last"
    unread: tuple[str, ...] = ()  # inputs that are full of NaN, since their coefficients are 0
    step: int = 0
    seed: int = 7
    no_output: bool = False
    extra: dict = field(default_factory=dict)

    def table(self) -> Tensor:
        """[5, 32]: the row, and others that differ from it."""
        row = torch.zeros(C.WIDTH, dtype=torch.float64)
        row[C.CLIP], row[C.SLOT], row[C.INPUT_SCALE], row[C.GUIDANCE] = math.inf, -1, 1, 1
        for column, value in self.row.items():
            row[column] = value
        table = row.repeat(5, 1)
        for i in range(1, 5):
            for column in self.row:
                if column not in (C.SLOT, C.CLIP):
                    table[i, column] *= 1 + 0.13 * i
            if self.row.get(C.SLOT, -1) >= 0 and self.rows != "one":
                table[i, C.SLOT] = (self.row[C.SLOT] + i) % self.slots
        return table

    def row_numbers(self) -> int | Tensor:
        """The argument ``rows``."""
        if self.rows == "one":
            return 3 if self.extra.get("row3") else 0
        shape = {"sample": self.shape[:1], "channel": self.shape[:2], "frame": (self.shape[0], 1, *self.shape[2:3])}[
            self.rows
        ]
        return (torch.arange(math.prod(shape)) * 3 % 5).reshape(shape)

    def args(self, dtype: torch.dtype, device: str = "cpu", exact: bool = False) -> tuple:
        """The rows' arguments, fresh tensors; with ``exact`` the same numbers in float64."""
        generator = torch.Generator().manual_seed(len(self.name))

        def draw(kind: torch.dtype, *shape: int, name: str = "") -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)
            if name in self.unread:
                x = torch.full_like(x, torch.nan)
            return (x.double() if exact else x).to(device)

        model = self.model_dtype or dtype
        shape = self.shape
        doubled = (shape[0], 2 * shape[1], *shape[2:]) if self.learned_variance else shape
        sample = draw(dtype, *shape, name="sample")
        output = None if self.no_output else self._strided(draw(model, *doubled, name="output"))
        other = self._strided(draw(model, *doubled, name="unconditional")) if self.guided else None
        base = draw(dtype, *shape, name="base") if self.base else None
        history = draw(dtype, self.slots, *shape, name="history") if self.slots else None
        noise = draw(dtype, *shape, name="noise") if self.noise == "given" else None
        threshold = (torch.rand(shape[0], generator=generator, dtype=torch.float64) + 1).float().to(device)
        wide = torch.float64 if exact else None
        rows = self.row_numbers()
        return sampler_step.prepare(
            sample, output, self.table().float().to(wide or torch.float32).to(device),
            rows.to(device) if isinstance(rows, Tensor) else rows, unconditional=other, base=base, history=history,
            noise=noise, seed=self._seed(device), step=self.step,
            threshold=(threshold.double() if exact else threshold) if self.threshold else None,
            learned_variance=self.learned_variance, statistics=self.statistics,
            out=sample if self.in_place else torch.full_like(sample, torch.nan),
            kept=(base if self.in_place else torch.full_like(sample, torch.nan)) if self.kept else None,
            preview=torch.full_like(sample, torch.nan) if self.preview else None,
            model_input=(
                torch.full((self.copies * shape[0], *shape[1:]), torch.nan, dtype=wide or model, device=device)
                if self.copies else None
            ),
            faults=torch.full((1,), 2**31 - 1, dtype=torch.int32, device=device),
        )  # fmt: skip

    def _strided(self, tensor: Tensor) -> Tensor:
        if self.strides == "batch":
            wide = tensor.new_full((2 * tensor.shape[0] + 1, *tensor.shape[1:]), torch.nan)
            wide[1::2] = tensor
            return wide[1::2]
        if self.strides == "channels_last":
            return tensor.to(memory_format=torch.channels_last)
        return tensor

    def _seed(self, device: str) -> int | Tensor | None:
        if self.noise == "seed":
            return self.seed
        if self.noise != "keys":
            return None
        numbers = torch.arange(self.shape[0])
        return torch.stack([numbers * 2**40 - 7, numbers * 2**33 + 5], 1).to(device)


_DDIM = {C.M_OUTPUT: 1.0, C.SAMPLE: 1.1, C.M: -0.3}
_X0 = {C.X0_SAMPLE: 1.4, C.X0_OUTPUT: -0.9, C.M_X0: 1.0, C.SAMPLE: 0.4, C.M: 0.7}
_AB4 = {
    C.M_OUTPUT: 1.0,
    C.SAMPLE: 1.05,
    C.M: -55 / 24,
    C.HISTORY: 59 / 24,
    C.HISTORY + 1: -37 / 24,
    C.HISTORY + 2: 9 / 24,
}
_UNIPC = {**_X0, C.BASE: 0.3, C.SLOT: 1, C.HISTORY: 0.2, C.KEPT_BASE: 0.8, C.KEPT_M: 0.3, C.KEPT_HISTORY: -0.2}
_ALL = {
    **{C.GUIDANCE: 3.0, C.X0_SAMPLE: 1.2, C.X0_OUTPUT: -0.7, C.CLIP: 1.5, C.M_SAMPLE: 0.1, C.M_OUTPUT: 0.2},
    **{C.M_X0: 0.9, C.SLOT: 2, C.SAMPLE: 0.8, C.BASE: -0.3, C.OUTPUT: 0.15, C.M: 0.4, C.NOISE: 0.25},
    **{C.INPUT_SCALE: 0.5},
    **{C.HISTORY + j: 0.1 * (j + 1) for j in range(6)}, **{C.KEPT_HISTORY + j: 0.2 - 0.1 * j for j in range(6)},
    **{C.KEPT_SAMPLE: 0.3, C.KEPT_BASE: 0.6, C.KEPT_M: -0.2, C.KEPT_OUT: 0.7},
}  # fmt: skip

_Case = SamplerStepCase
SAMPLER_STEP_CASES: tuple[SamplerStepCase, ...] = (
    _Case("ddim", "two tensors in, one out: the usual step", (2, 4, 64, 64), _DDIM),
    _Case("ddim_in_place", "the sample is overwritten", (2, 4, 16, 16), _DDIM, in_place=True),
    _Case("x0", "x0 as the canonical output, previewed", (2, 3, 20, 20), _X0, preview=True),
    _Case("clip", "x0 clamped", (2, 3, 20, 20), {**_X0, C.CLIP: 0.5}, preview=True),
    _Case("threshold", "x0 limited by a number for each sample", (3, 3, 9, 11), _X0, threshold=True, preview=True),
    _Case("guided", "classifier-free guidance", (2, 4, 16, 16), {**_DDIM, C.GUIDANCE: 7.5}, guided=True),
    _Case("guided_half", "halves of one batch of the model", (2, 4, 16, 16), {**_DDIM, C.GUIDANCE: 2.0}, guided=True,
          strides="batch", copies=2),
    _Case("guided_rows", "another guidance for each sample", (4, 2, 5, 7), {**_X0, C.GUIDANCE: 2.0}, guided=True,
          rows="sample"),
    _Case("channels_last", "the model's output in another layout", (2, 4, 9, 8), _DDIM, strides="channels_last"),
    _Case("multistep", "four terms; the oldest slot is overwritten", (2, 3, 24, 24), {**_AB4, C.SLOT: 2}, slots=3),
    _Case("multistep_rows", "a row and a slot for each sample", (5, 3, 8, 8), {**_AB4, C.SLOT: 2}, slots=3,
          rows="sample"),
    _Case("keeps_only", "the output goes into the history and nothing else", (2, 3, 8, 8),
          {C.M_OUTPUT: 1.0, C.SLOT: 1, C.SAMPLE: 1.0}, slots=2),
    _Case("kept", "a corrector and a predictor in one launch", (2, 4, 12, 12), _UNIPC, base=True, slots=2, kept=True),
    _Case("kept_in_place", "the base is overwritten", (2, 4, 12, 12), _UNIPC, base=True, slots=2, kept=True,
          in_place=True),
    _Case("kept_out", "the base becomes the result", (2, 4, 12, 12), {**_DDIM, C.KEPT_OUT: 1.0}, base=True, kept=True),
    _Case("kept_untouched", "no coefficient: the base stays", (2, 4, 12, 12), _DDIM, base=True, kept=True,
          in_place=True),
    _Case("noise", "generated noise, numbered samples", (3, 4, 32, 32), {**_DDIM, C.NOISE: 0.8}, noise="seed", step=5),
    _Case("noise_keys", "a seed for each sample", (3, 1, 5, 129), {**_DDIM, C.NOISE: 1.3}, noise="keys",
          step=2**32 + 9),
    _Case("noise_rows", "rows of one frame, odd sizes", (2, 3, 5, 7, 9), {**_DDIM, C.NOISE: 0.5}, noise="keys",
          rows="frame"),
    _Case("noise_alone", "nothing else: the start of a run", (2, 3, 17, 19), {C.NOISE: 14.6}, noise="seed",
          unread=("sample",), no_output=True, in_place=True),
    _Case("noise_given", "noise from outside", (2, 4, 16, 16), {**_X0, C.NOISE: 0.4}, noise="given"),
    _Case("learned", "a variance from the model", (2, 3, 8, 10),
          {**_X0, C.NOISE: 1.0, C.LOG_SMALL: -2.0, C.LOG_LARGE: -1.0}, learned_variance=True, noise="seed"),
    _Case("learned_guided", "variance and guidance, halves of a batch", (2, 3, 8, 10),
          {**_X0, C.GUIDANCE: 4.0, C.NOISE: 1.0, C.LOG_SMALL: -2.0, C.LOG_LARGE: -1.0}, learned_variance=True,
          noise="keys", guided=True, strides="batch"),
    _Case("channel_rows", "coefficients for each sample and channel", (3, 5, 6, 7), _UNIPC, rows="channel", base=True,
          slots=3, kept=True),
    _Case("frame_rows", "a time for each frame, frames behind the channels", (2, 3, 4, 5, 6), _DDIM, rows="frame"),
    _Case("moments", "sums for each sample", (3, 4, 33, 35), _DDIM, statistics="moments"),
    _Case("moments_rows", "sums for each channel", (3, 4, 9, 11), _DDIM, statistics="moments", rows="channel"),
    _Case("dots", "products with the history as it was", (2, 3, 40, 41), {**_X0, C.SLOT: 0}, slots=2,
          statistics="dots", rows="channel"),
    _Case("dots_one_row", "products for each sample", (3, 3, 10, 10), {**_X0, C.SLOT: 1}, slots=2, statistics="dots"),
    _Case("input", "the next model input, scaled", (2, 4, 16, 16), {**_DDIM, C.INPUT_SCALE: 0.3}, copies=1),
    _Case("input_thrice", "three copies of it", (2, 4, 5, 5), {**_DDIM, C.INPUT_SCALE: 0.3}, copies=3),
    _Case("mixed", "a bfloat16 model", (2, 4, 16, 18), {**_X0, C.INPUT_SCALE: 0.7}, copies=2, guided=True,
          model_dtype=torch.bfloat16),
    _Case("mixed_half", "a float16 model", (2, 4, 16, 18), {**_DDIM, C.INPUT_SCALE: 0.7}, copies=1,
          model_dtype=torch.float16),
    _Case("mixed_wide", "a float32 model", (2, 4, 16, 18), _DDIM, model_dtype=torch.float32),
    _Case("no_output", "no model was called", (2, 3, 8, 8), {C.SAMPLE: 0.5, C.BASE: 0.25, C.HISTORY + 1: 2.0},
          no_output=True, base=True, slots=2),
    _Case("unread", "NaN in what has no coefficient", (2, 3, 16, 16), {C.X0_OUTPUT: 1.0, C.M_X0: 1.0, C.M: 1.0,
          C.SLOT: 0}, base=True, slots=2, unread=("sample", "base", "history"), kept=True, in_place=True),
    _Case("delta", "a difference is kept, from sample and output", (2, 3, 16, 16),
          {C.M_SAMPLE: 0.02, C.M_OUTPUT: -0.1, C.SAMPLE: 1.0, C.M: 2.0, C.HISTORY: -1.0, C.SLOT: 0}, slots=1),
    _Case("third_row", "another row of the table", (2, 3, 16, 16), _UNIPC, base=True, slots=2, kept=True,
          extra={"row3": True}),
    _Case("everything", "all at once", (3, 4, 10, 13), _ALL, rows="channel", guided=True, base=True, slots=6,
          noise="keys", kept=True, preview=True, copies=2, statistics="dots", model_dtype=torch.float16,
          strides="batch", step=3),
    _Case("everything_in_place", "all at once, one row, in place", (2, 4, 33, 31), _ALL, guided=True, base=True,
          slots=6, noise="seed", kept=True, preview=True, copies=2, statistics="moments", in_place=True),
    _Case("long", "more than one piece of work", (1, 3, 300, 301), {**_X0, C.NOISE: 0.1}, noise="seed",
          statistics="moments"),
    _Case("many", "more samples than pieces of work", (70, 9), {**_DDIM, C.NOISE: 0.1}, noise="seed", rows="sample",
          statistics="moments"),
    _Case("one_number", "a single number", (1, 1), {**_DDIM, C.NOISE: 1.0}, noise="seed"),
    _Case("flat", "no dims beside the batch", (37,), {**_DDIM, C.NOISE: 1.0}, noise="seed"),
    _Case("empty_batch", "no samples", (0, 3, 8, 8), {**_DDIM, C.NOISE: 1.0}, noise="keys", statistics="moments"),
    _Case("empty_images", "samples without elements", (2, 0, 8), _DDIM, statistics="moments"),
)  # fmt: skip
