"""Cases of the op ``attention``; tests and benches read the same table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.ops import attention


@dataclass(frozen=True)
class AttentionCase:
    """One ``attention`` call and the reason why it is in the table. ``mask`` is the mask's shape, if there is one."""

    name: str
    why: str
    batch: int
    queries: int
    keys: int
    heads: int
    size: int
    mask: tuple[int, ...] | None = None
    boolean: bool = True
    spread: float = 1.0  # of queries and keys
    layout: str = "separate"  # "fused": chunks of one projection; "sliced": no dim is contiguous
    scale: float | None = None

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, drawn in float64."""
        generator = torch.Generator().manual_seed(0)
        width = self.heads * self.size

        def draw(tokens: int, width: int, spread: float) -> Tensor:
            values = torch.randn(self.batch, tokens, width, generator=generator, dtype=torch.float64) * spread
            return values.to(dtype).to(device)

        if self.layout == "fused":
            q, k, v = draw(self.keys, 3 * width, self.spread).chunk(3, dim=-1)
            return q[:, : self.queries], k, v
        q, k, v = (draw(n, width, self.spread) for n in (self.queries, self.keys, self.keys))
        if self.layout == "sliced":
            q, k, v = (t.repeat_interleave(2, dim=-1)[..., ::2] for t in (q, k, v))
        return q, k, v

    def mask_tensor(self, device: str = "cpu") -> Tensor | None:
        """A mask that drops a third of the keys, and all keys of the last row where rows differ."""
        if self.mask is None:
            return None
        generator = torch.Generator().manual_seed(1)
        keep = torch.rand(self.mask, generator=generator) > 1 / 3
        if keep.dim() > 1 and keep.shape[-2] > 1:
            keep[..., -1, :] = False
        if self.boolean:
            return keep.to(device)
        return torch.randn(self.mask, generator=generator).masked_fill(~keep, -torch.inf).to(device)

    def args(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        """The rows' arguments."""
        options = {"scale": self.scale, "mask": self.mask_tensor(device)}
        return attention.prepare(*self.tensors(dtype, device), self.heads, **options)


ATTENTION_CASES: tuple[AttentionCase, ...] = (
    AttentionCase("ddpm", "short heads, whole vectors, one fused projection", 1, 256, 256, 4, 8, layout="fused"),
    AttentionCase("short_blocks", "short heads, several blocks of keys", 1, 20, 1100, 2, 8),
    AttentionCase("size16", "heads as long as the widest vector", 2, 65, 49, 3, 16, layout="fused"),
    AttentionCase("size24", "heads longer than a vector, not two", 1, 33, 50, 2, 24),
    AttentionCase("size32", "several blocks of queries", 2, 100, 300, 2, 32),
    AttentionCase("cross", "77 tokens of a text", 2, 64, 77, 4, 40),
    AttentionCase("size40", "several blocks of keys", 1, 40, 600, 2, 40, layout="fused"),
    AttentionCase("size80", "two tiles of a value", 1, 30, 70, 2, 80),
    AttentionCase("size160", "long heads", 1, 64, 64, 2, 160),
    AttentionCase("size512", "the attention of an autoencoder", 1, 50, 100, 1, 512),
    AttentionCase("odd", "nothing divides anything", 3, 7, 13, 5, 11),
    AttentionCase("odd_long", "an odd length beyond one tile", 1, 13, 31, 2, 67, layout="fused"),
    AttentionCase("size1", "one element", 2, 5, 9, 3, 1),
    AttentionCase("single", "one query, one key", 2, 1, 1, 2, 8),
    AttentionCase("many_heads", "heads as items", 2, 130, 20, 20, 8),
    AttentionCase("sharp", "a softmax that picks single keys", 1, 30, 700, 2, 32, spread=4.0),
    AttentionCase("scaled", "a scale of its own", 1, 20, 30, 2, 40, scale=0.3),
    AttentionCase("sliced", "the last dim not contiguous", 2, 9, 17, 2, 8, layout="sliced"),
    AttentionCase("mask_keys", "drops keys for all", 2, 20, 77, 3, 40, mask=(2, 1, 1, 77)),
    AttentionCase("mask_full", "a row of its own everywhere; some drop all", 2, 9, 40, 3, 8, mask=(2, 3, 9, 40)),
    AttentionCase("mask_short", "fewer dims", 1, 9, 600, 2, 8, mask=(9, 600)),
    AttentionCase("mask_column", "a column stands for all keys", 1, 9, 20, 2, 24, mask=(9, 1)),
    AttentionCase("mask_added", "added to the scores", 2, 20, 300, 2, 40, mask=(20, 300), boolean=False),
    AttentionCase("mask_vector", "one dim", 1, 9, 33, 2, 8, mask=(33,), boolean=False),
    AttentionCase("empty", "no images", 0, 4, 5, 2, 8),
    AttentionCase("no_queries", "no tokens", 2, 0, 5, 2, 8),
)  # fmt: skip
