"""Cases of the ops ``block_sparse_attention`` and ``block_importance``; tests and benches read the same tables."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.block_mask import BlockMask, blocks_of
from pydenoise.ops import block_importance, block_sparse_attention


@dataclass(frozen=True)
class SparseCase:
    """One call of an op on [B, H, L, D] queries and keys, and the reason why it is in the table."""

    name: str
    why: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    size: int
    block: int
    density: float = 0.5  # of the blocks, on average; every list is drawn for itself
    pattern: str = "random"  # "full", "holes": some rows keep nothing, "diagonal", "shared": one mask for all heads
    lengths: tuple[int, ...] | None = None  # of the keys, for each batch
    new_tokens: int = 0
    spread: float = 1.0  # of queries and keys
    layout: str = "contiguous"  # "projected": [B, L, H, D] in memory; "fused": slices of one projection; "sliced"
    scale: float | None = None

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, drawn in float64."""
        generator = torch.Generator().manual_seed(0)

        def draw(tokens: int, heads: int, spread: float) -> Tensor:
            values = torch.randn(self.batch, tokens, heads, self.size, generator=generator, dtype=torch.float64)
            return (values * spread).to(dtype).to(device)

        q = draw(self.queries, self.heads, self.spread)
        k = draw(self.keys, self.kv_heads, self.spread)
        v = draw(self.keys, self.kv_heads, 1.0)
        if self.layout == "fused":
            k, v = torch.cat([k, v], 2).split(self.kv_heads, 2)
        if self.layout == "sliced":
            q, k, v = (t.repeat_interleave(2, dim=-1)[..., ::2] for t in (q, k, v))
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return tuple(t.contiguous() if self.layout == "contiguous" else t for t in heads)

    def mask(self, device: str = "cpu") -> BlockMask:
        """The lists of this case; blocks of a row beyond its count hold what must not be read."""
        rows, columns = blocks_of(self.queries, self.block), blocks_of(self.keys, self.block)
        shape = (1, 1, rows, columns) if self.pattern == "shared" else (self.batch, self.heads, rows, columns)
        kept = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < self.density
        if self.pattern == "full":
            kept[:] = True
        elif self.pattern == "diagonal":
            distance = torch.arange(rows)[:, None] - torch.arange(columns)
            kept = (distance.abs() <= 1).expand(shape).clone()
        elif self.pattern == "holes":
            kept[:, :, ::2] = False
            kept[:, -1] = False
        else:
            kept[..., -1] |= ~kept.any(-1)
        mask = BlockMask.from_dense(kept, self.block, self.queries, self.keys, longest=columns)
        unused = torch.arange(columns) >= mask.kv_counts[..., None]
        mask.kv_indices = mask.kv_indices.masked_fill(unused, -7)
        return mask.to(device)

    def key_lengths(self, device: str = "cpu") -> Tensor | None:
        return None if self.lengths is None else torch.tensor(self.lengths, device=device)

    def args(self, dtype: torch.dtype, device: str = "cpu", *, int8: bool = False) -> tuple:
        """The arguments of block_sparse_attention's rows."""
        options = {"scale": self.scale, "key_lengths": self.key_lengths(device), "qk_dtype": "int8" if int8 else None}
        return block_sparse_attention.prepare(*self.tensors(dtype, device), self.mask(device), **options)

    def importance_args(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        """The arguments of block_importance's rows, without the log-sum-exp."""
        query, key, _ = self.tensors(dtype, device)
        options = {"scale": self.scale, "key_lengths": self.key_lengths(device)}
        return block_importance.prepare(query, key, self.block, new_tokens=self.new_tokens, **options)


# name, why, batch, heads, kv_heads, queries, keys, size, block
SPARSE_CASES: tuple[SparseCase, ...] = (
    SparseCase("whole", "everything divides", 1, 2, 2, 256, 256, 64, 128, new_tokens=128),
    SparseCase("dense", "every block: dense attention", 1, 2, 2, 200, 200, 32, 32, pattern="full"),
    SparseCase("tail", "short last blocks of queries and keys", 2, 2, 2, 203, 203, 64, 64, new_tokens=70),
    SparseCase("cross", "fewer queries than keys", 1, 2, 2, 37, 300, 32, 32, new_tokens=37),
    SparseCase("cross_long", "more queries than keys", 1, 2, 1, 150, 40, 32, 16),
    SparseCase("gqa", "three heads read one, patterns differ", 2, 6, 2, 140, 140, 32, 32, layout="projected"),
    SparseCase("mqa", "all heads read one", 1, 4, 1, 130, 130, 64, 64, new_tokens=60),
    SparseCase("fused", "parts of one projection, read in place", 2, 2, 2, 100, 100, 40, 16, layout="fused"),
    SparseCase("sliced", "the last dim not contiguous", 1, 2, 2, 50, 50, 16, 16, layout="sliced"),
    SparseCase("block16", "the smallest blocks", 1, 3, 3, 170, 170, 24, 16, density=0.3, new_tokens=64),
    SparseCase("block128", "the largest blocks, all new", 1, 1, 1, 400, 400, 16, 128, density=0.6, new_tokens=400),
    SparseCase("size96", "not a power of two", 1, 2, 2, 96, 96, 96, 32),
    SparseCase("size128", "long heads", 1, 2, 1, 192, 192, 128, 64, density=0.4),
    SparseCase("size256", "the longest heads", 1, 1, 1, 130, 130, 256, 64),
    SparseCase("size8", "the shortest heads", 2, 2, 2, 90, 90, 8, 32),
    SparseCase("odd_size", "a head of no whole vector", 1, 2, 2, 70, 70, 11, 16),
    SparseCase("holes", "rows and a head that keep nothing", 2, 3, 3, 130, 130, 32, 32, pattern="holes"),
    SparseCase("diagonal", "as a window", 1, 2, 2, 300, 300, 32, 32, pattern="diagonal"),
    SparseCase("shared", "one mask for all batches and heads", 2, 4, 2, 100, 100, 32, 32, pattern="shared"),
    SparseCase("lengths", "padding inside a block, at its end, everywhere, none", 4, 2, 2, 100, 100, 32, 32,
               lengths=(45, 64, 0, 100), new_tokens=50),
    SparseCase("one_key", "one key counts", 2, 1, 1, 40, 40, 32, 16, lengths=(1, 40)),
    SparseCase("single", "one query, one key", 1, 1, 1, 1, 1, 32, 16),
    SparseCase("sharp", "a softmax that picks single keys", 1, 2, 2, 260, 260, 64, 64, spread=4.0, new_tokens=100),
    SparseCase("scaled", "a scale of its own", 1, 2, 2, 64, 64, 32, 32, scale=0.5),
    SparseCase("negative", "a negative scale", 1, 1, 1, 64, 64, 32, 32, scale=-0.2),
    SparseCase("no_batch", "no batches", 0, 2, 2, 64, 64, 32, 32),
    SparseCase("no_queries", "no queries", 1, 2, 2, 0, 64, 32, 32),
)  # fmt: skip
