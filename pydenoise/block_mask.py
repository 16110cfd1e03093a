"""``BlockMask``: which blocks of keys each block of queries of each head attends to, as lists of block numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

BLOCK_SIZES = (16, 32, 64, 128)
_LARGEST_INT16 = 32767


def check_block_size(block_size: object) -> None:
    """``block_size`` is one that the kernels have."""
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"block_size: expected an int, got {type(block_size).__name__}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: expected one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")


def blocks_of(length: int, block_size: int) -> int:
    """How many blocks hold ``length`` tokens."""
    return -(-length // block_size)


def lists_from_dense(blocks: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """(counts int32 [...], indices [..., longest]) of boolean ``blocks`` [..., n]; ``longest``: of any row, or more."""
    n = blocks.shape[-1]
    counts = blocks.sum(-1, dtype=torch.int32)
    numbers = torch.arange(n, device=blocks.device, dtype=torch.int16 if n <= _LARGEST_INT16 else torch.int32)
    indices = torch.where(blocks, numbers, n if n <= _LARGEST_INT16 else 2**31 - 1)
    return counts, torch.sort(indices, -1).values[..., :longest].contiguous()


def dense_from_lists(counts: Tensor, indices: Tensor, n: int) -> Tensor:
    """Boolean [..., n]: the inverse of :func:`lists_from_dense`; what lies beyond a row's count is not read."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    blocks = torch.zeros((*counts.shape, n + 1), dtype=torch.bool, device=counts.device)
    return blocks.scatter_(-1, torch.where(used, indices.long(), n), True)[..., :n]


def transpose_lists(counts: Tensor, indices: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of counts [..., nq] and indices [..., nq, k]: which blocks of queries read each of the ``n`` blocks of keys."""
    return lists_from_dense(dense_from_lists(counts, indices, n).mT, counts.shape[-1])


class BlockMask:
    """For each block of queries, the blocks of keys that it attends to.

    Args:
        kv_counts: int32 [B, H, nq]: how many blocks of keys each row (block of queries) keeps. B or H of 1 stand for
            any batch and any number of heads.
        kv_indices: int16 or int32 [B, H, nq, k]: their numbers, ascending, in the first ``kv_counts`` places of each
            row; the rest is not read. int16 is kept where it suffices.
        block_size: tokens of a block, of queries and of keys: 16, 32, 64 or 128.
        query_length, key_length: tokens; the last block of either may be short.
        check: whether to look at the values (for a CUDA tensor this waits for the device).

    A row that keeps nothing gives an output of 0.

    Raises:
        TypeError, ValueError: shapes, dtypes, or lists that are not ascending, repeat a block or leave the range.
    """

    def __init__(
        self,
        kv_counts: Tensor,
        kv_indices: Tensor,
        block_size: int,
        query_length: int,
        key_length: int,
        *,
        check: bool = True,
    ) -> None:
        check_block_size(block_size)
        for name, length in (("query_length", query_length), ("key_length", key_length)):
            if not isinstance(length, int) or isinstance(length, bool):
                raise TypeError(f"{name}: expected an int, got {type(length).__name__}")
            if length < (name == "key_length"):
                raise ValueError(f"{name}: expected a positive number of tokens, got {length}")
        self.block_size, self.query_length, self.key_length = block_size, query_length, key_length
        self.num_query_blocks = blocks_of(query_length, block_size)
        self.num_key_blocks = blocks_of(key_length, block_size)
        self._check_form(kv_counts, kv_indices)
        if check:
            self._check_values(kv_counts, kv_indices)
        if self.num_key_blocks <= _LARGEST_INT16:
            kv_indices = kv_indices.to(torch.int16)
        self.kv_counts, self.kv_indices = kv_counts.contiguous(), kv_indices.contiguous()
        self._transposed: tuple[Tensor, Tensor] | None = None

    def _check_form(self, counts: object, indices: object) -> None:
        for name, tensor in (("kv_counts", counts), ("kv_indices", indices)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if counts.dtype != torch.int32:
            raise TypeError(f"kv_counts: expected dtype torch.int32, got {counts.dtype}")
        if indices.dtype not in (torch.int16, torch.int32):
            raise TypeError(f"kv_indices: expected dtype torch.int16 or torch.int32, got {indices.dtype}")
        if counts.dim() != 3 or counts.shape[2] != self.num_query_blocks:
            raise ValueError(
                f"kv_counts: expected [B, H, {self.num_query_blocks}] ({self.query_length} queries in blocks of "
                f"{self.block_size}), got shape {tuple(counts.shape)}"
            )
        if indices.dim() != 4 or indices.shape[:3] != counts.shape:
            raise ValueError(
                f"kv_indices: expected [{', '.join(map(str, counts.shape))}, k], got shape {tuple(indices.shape)}"
            )
        if indices.device != counts.device:
            raise ValueError(f"kv_indices: expected device {counts.device} (that of kv_counts), got {indices.device}")

    def _check_values(self, counts: Tensor, indices: Tensor) -> None:
        if counts.numel() == 0:
            return
        low, high = (x.item() for x in torch.aminmax(counts))
        if low < 0 or high > indices.shape[-1]:
            raise ValueError(f"kv_counts: expected 0 to {indices.shape[-1]} blocks, got {low if low < 0 else high}")
        if indices.shape[-1] == 0:
            return
        place = torch.arange(indices.shape[-1], device=indices.device)
        used = place < counts[..., None]
        outside = used & ((indices < 0) | (indices >= self.num_key_blocks))
        if outside.any():
            raise ValueError(
                f"kv_indices: expected block numbers from 0 to {self.num_key_blocks - 1}, got "
                f"{indices[outside][0].item()}"
            )
        wrong = used[..., 1:] & (indices[..., 1:] <= indices[..., :-1])
        if wrong.any():
            batch, head, row, at = wrong.nonzero()[0].tolist()
            pair = indices[batch, head, row, at : at + 2].tolist()
            raise ValueError(
                "kv_indices: expected ascending block numbers without repeats, got "
                f"{pair[0]} before {pair[1]} in batch {batch}, head {head}, row {row}"
            )

    # ------------------------------------------------------------------------------------------------ from, to

    @classmethod
    def from_dense(
        cls, blocks: Tensor, block_size: int, query_length: int, key_length: int, *, longest: int | None = None
    ) -> BlockMask:
        """From boolean ``blocks`` [B, H, nq, nk]; ``longest``: the most blocks of a row, if known (spares a wait)."""
        check_block_size(block_size)
        if not isinstance(blocks, Tensor) or blocks.dtype != torch.bool:
            kind = blocks.dtype if isinstance(blocks, Tensor) else type(blocks).__name__
            raise TypeError(f"blocks: expected a boolean tensor, got {kind}")
        sizes = (blocks_of(query_length, block_size), blocks_of(key_length, block_size))
        if blocks.dim() != 4 or tuple(blocks.shape[2:]) != sizes:
            raise ValueError(f"blocks: expected [B, H, {sizes[0]}, {sizes[1]}], got shape {tuple(blocks.shape)}")
        if longest is None:
            longest = int(blocks.sum(-1).max()) if blocks.numel() else 0
        counts, indices = lists_from_dense(blocks, longest)
        return cls(counts, indices, block_size, query_length, key_length, check=False)

    @classmethod
    def full(
        cls,
        block_size: int,
        query_length: int,
        key_length: int,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Every block: dense attention. One batch and one head stand for all."""
        check_block_size(block_size)
        sizes = (batch, heads, blocks_of(query_length, block_size), blocks_of(key_length, block_size))
        blocks = torch.ones(sizes, dtype=torch.bool, device=device)
        return cls.from_dense(blocks, block_size, query_length, key_length, longest=sizes[3])

    def to_dense(self) -> Tensor:
        """Boolean [B, H, nq, nk]: True where a block is kept."""
        return dense_from_lists(self.kv_counts, self.kv_indices, self.num_key_blocks)

    def to_token_mask(self) -> Tensor:
        """Boolean [B, H, query_length, key_length], as ``attn_mask`` of scaled_dot_product_attention. O(L^2) memory."""
        tokens = self.to_dense().repeat_interleave(self.block_size, -1)[..., : self.key_length]
        return tokens.repeat_interleave(self.block_size, -2)[..., : self.query_length, :]

    def to_flex(self) -> FlexBlockMask:
        """For torch's FlexAttention, with a ``mask_mod`` that says the same: its eager path reads only that."""
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        dense, size = self.to_dense(), self.block_size
        batches, heads = dense.shape[:2]
        numbers = torch.sort((~dense).to(torch.int8), dim=-1, stable=True).indices.to(torch.int32)

        def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return dense[b if batches > 1 else 0, h if heads > 1 else 0, query // size, key // size]

        mask_mod.is_block_mask = True
        return FlexBlockMask.from_kv_blocks(
            torch.zeros_like(self.kv_counts),
            torch.zeros_like(numbers),
            self.kv_counts,
            numbers,
            BLOCK_SIZE=size,
            mask_mod=mask_mod,
            seq_lengths=(self.query_length, self.key_length),
        )

    @classmethod
    def from_flex(cls, mask: FlexBlockMask, *, partial: str = "raise") -> BlockMask:
        """From a FlexAttention mask whose blocks are square and of a size that the kernels have.

        Args:
            mask: what ``create_block_mask`` gives, for instance.
            partial: what to do with blocks of which ``mask_mod`` keeps a part of the tokens: "raise", since that part
                would be lost, or "keep", which keeps such blocks whole.
        """
        if partial not in ("raise", "keep"):
            raise ValueError(f"partial: expected 'raise' or 'keep', got {partial!r}")
        rows, columns = mask.BLOCK_SIZE
        if rows != columns:
            raise ValueError(f"mask: expected square blocks, got {rows} x {columns}")
        check_block_size(rows)
        lengths = mask.seq_lengths
        sizes = tuple(blocks_of(length, rows) for length in lengths)
        some = dense_from_lists(mask.kv_num_blocks, mask.kv_indices, max(sizes[1], mask.kv_indices.shape[-1]))
        if partial == "raise" and some.any():
            raise ValueError(
                f"mask: {int(some.sum())} blocks are partial: their mask_mod may keep a part of their tokens. "
                "partial='keep' keeps them whole."
            )
        if mask.full_kv_num_blocks is not None:
            some = some | dense_from_lists(mask.full_kv_num_blocks, mask.full_kv_indices, some.shape[-1])
        return cls.from_dense(some[:, :, : sizes[0], : sizes[1]].contiguous(), rows, *lengths)

    def transposed(self) -> tuple[Tensor, Tensor]:
        """(q_counts int32 [B, H, nk], q_indices [B, H, nk, q]): which blocks of queries read a block of keys. Kept."""
        if self._transposed is None:
            self._transposed = transpose_lists(self.kv_counts, self.kv_indices, self.num_key_blocks)
        return self._transposed

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on ``device``; itself if it is there."""
        if self.kv_counts.device == torch.empty(0, device=device).device:
            return self
        return self._with(self.kv_counts.to(device), self.kv_indices.to(device))

    def _with(self, counts: Tensor, indices: Tensor) -> BlockMask:
        return BlockMask(counts, indices, self.block_size, self.query_length, self.key_length, check=False)

    def __getitem__(self, item: object) -> BlockMask:
        """Batches, or (batches, heads), by slices, ints or lists; an int keeps its dimension."""
        items = item if isinstance(item, tuple) else (item,)
        if len(items) > 2:
            raise IndexError(f"a BlockMask is sliced by batch and head, got {len(items)} indices")
        counts, indices = self.kv_counts, self.kv_indices
        for axis, i in enumerate(items):
            if isinstance(i, int):
                size = counts.shape[axis]
                if not -size <= i < size:
                    raise IndexError(f"index {i} is out of range for {size} {('batches', 'heads')[axis]}")
                i = slice(i % size, i % size + 1)
            place = (slice(None),) * axis + (i,)
            counts, indices = counts[place], indices[place]
        return self._with(counts, indices)

    # --------------------------------------------------------------------------------------------- what it says

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, blocks of queries, blocks of keys)."""
        return (*self.kv_counts.shape, self.num_key_blocks)

    @property
    def device(self) -> torch.device:
        return self.kv_counts.device

    @property
    def density(self) -> float:
        """Kept blocks over all blocks, 0 to 1."""
        total = self.kv_counts.numel() * self.num_key_blocks
        return self.kv_counts.sum().item() / total if total else 0.0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMask):
            return NotImplemented
        same = (self.shape, self.block_size, self.query_length, self.key_length, self.device)
        if same != (other.shape, other.block_size, other.query_length, other.key_length, other.device):
            return False
        return torch.equal(self.to_dense(), other.to_dense())

    __hash__ = None

    def __repr__(self) -> str:
        batches, heads, rows, columns = self.shape
        return (
            f"BlockMask(batch={batches}, heads={heads}, {rows} x {columns} blocks of {self.block_size}, "
            f"{self.query_length} queries x {self.key_length} keys, density={self.density:.3f}, device='{self.device}')"
        )

    def __str__(self) -> str:
        """A line, and the first head as text: each sign is a group of blocks, the darker the more are kept."""
        if 0 in self.shape:
            return repr(self)
        kept = self.to_dense()[0, 0].float()[None, None]
        size = [min(side, most) for side, most in zip(kept.shape[2:], (24, 64), strict=True)]
        shares = torch.nn.functional.adaptive_avg_pool2d(kept, size)[0, 0].tolist()
        signs = " .:-=+*#%@"
        lines = ["".join(signs[min(int(share * 9 + 0.999), 9)] for share in row) for row in shares]
        return "\n".join([repr(self), *(f"  |{line}|" for line in lines)])

    def plot(self, path: str | None = None, *, batch: int = 0, heads: list[int] | None = None, title: str = ""):
        """A picture of kept blocks, a panel for each head (all, or those listed). Needs matplotlib.

        Returns the figure, and writes it to ``path`` if there is one.
        """
        from matplotlib.figure import Figure

        heads = list(range(self.shape[1])) if heads is None else heads
        columns = min(len(heads), 4) or 1
        rows = -(-len(heads) // columns) or 1
        figure = Figure(figsize=(2.4 * columns + 0.4, 2.6 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for head, axis in zip(heads, axes.flat, strict=False):
            mask = self[batch, head]
            axis.set_axis_on()
            axis.imshow(mask.to_dense()[0, 0].cpu().numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"head {head}: {mask.density:.0%}", fontsize=9)
            axis.set_xlabel("block of keys", fontsize=8)
            axis.set_ylabel("block of queries", fontsize=8)
            axis.tick_params(labelsize=7)
        figure.suptitle(title or f"kept blocks of {self.block_size} tokens", fontsize=10)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure
