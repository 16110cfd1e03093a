"""Attention over lists of blocks of keys in plain torch: the oracle and the fallback. Reads only what is listed."""

import torch
from torch import Tensor

_SMALLEST = torch.finfo(torch.float32).tiny


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    block_size: int,
    scale: float,
    key_lengths: Tensor | None,
    int8_qk: bool = False,
) -> tuple[Tensor, Tensor]:
    """(output like ``query``, log-sum-exp of the scores [B, H, Lq]); rows without keys give 0 and -inf."""
    output, wide = torch.empty_like(query), _wide(query)
    lse = torch.empty(query.shape[:3], dtype=wide, device=query.device)
    if query.numel() == 0:
        return output, lse.fill_(-torch.inf)
    blocks = _Blocks(key, value, kv_counts, kv_indices, block_size, key_lengths, query.shape[:2], wide)
    smoothed = _Smoothed(blocks, scale) if int8_qk else None
    for row, start in enumerate(range(0, query.shape[2], block_size)):
        q = query[:, :, start : start + block_size].to(wide)
        k, v, kept = blocks.of(row)
        scores = smoothed.scores(q, row) if smoothed else (q @ k.mT) * scale
        scores = scores.masked_fill(~kept, -torch.inf)
        total = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
        weights = (scores - total.masked_fill(total == -torch.inf, 0)[..., None]).exp()
        output[:, :, start : start + block_size] = (weights @ v).to(query.dtype)
        lse[:, :, start : start + block_size] = total
    return output, lse


def block_sparse_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    block_size: int,
    scale: float,
    key_lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. ``delta`` [B, H, Lq]: sum of grad * output, less the gradient of the lse."""
    wide = _wide(query)
    blocks = _Blocks(key, value, kv_counts, kv_indices, block_size, key_lengths, query.shape[:2], wide)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    sums = [torch.zeros(blocks.keys.shape, dtype=wide, device=query.device) for _ in range(2)]
    for row, start in enumerate(range(0, query.shape[2], block_size)):
        rows = slice(start, start + block_size)
        q, g = query[:, :, rows].to(wide), grad[:, :, rows].to(wide)
        k, v, kept = blocks.of(row)
        total = lse[:, :, rows, None].to(wide)
        scores = ((q @ k.mT) * scale).masked_fill(~kept, -torch.inf)
        weights = (scores - total.masked_fill(total == -torch.inf, 0)).exp()
        inner = (weights * (g @ v.mT - delta[:, :, rows, None].to(wide))).masked_fill(~kept, 0)
        grad_query[:, :, rows] = (inner @ k * scale).to(query.dtype)
        blocks.add(sums[0], row, inner.mT @ q * scale)
        blocks.add(sums[1], row, weights.mT @ g)
    return grad_query, *(blocks.joined(s, like) for s, like in zip(sums, (key, value), strict=True))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _Blocks:
    """Keys and values cut into blocks, and the listed ones of a row of blocks."""

    def __init__(self, key, value, counts, indices, size, key_lengths, heads, wide) -> None:
        self.batch, self.num_heads = heads
        self.size, self.length = size, key.shape[2]
        self.number = -(-self.length // size)
        self.keys, self.values = (self._cut(t.to(wide)) for t in (key, value))  # [B, Hkv, blocks, size, D]
        self.group = self.num_heads // key.shape[1]
        self.counts = counts.expand(self.batch, self.num_heads, -1)
        self.indices = indices.expand(self.batch, self.num_heads, -1, -1)
        lengths = torch.full((self.batch,), self.length, device=key.device) if key_lengths is None else key_lengths
        self.lengths = lengths

    def _cut(self, tensor: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(tensor, (0, 0, 0, self.number * self.size - self.length))
        return padded.unflatten(2, (self.number, self.size))

    def _listed(self, row: int) -> tuple[Tensor, Tensor]:
        """(block numbers [B, H, k], which of them count)."""
        indices = self.indices[:, :, row].long()
        used = torch.arange(indices.shape[-1], device=indices.device) < self.counts[:, :, row, None]
        return indices.masked_fill(~used, 0), used

    def gather(self, blocks: Tensor, numbers: Tensor) -> Tensor:
        """[B, H, k, ...] of ``blocks`` [B, Hkv, blocks, ...]."""
        batch = torch.arange(self.batch, device=blocks.device)[:, None, None]
        head = torch.arange(self.num_heads, device=blocks.device)[None, :, None] // self.group
        return blocks[batch, head, numbers]

    def of(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """(keys [B, H, n, D], values, whether each counts [B, H, 1, n]); what does not count has value 0."""
        numbers, used = self._listed(row)
        token = numbers[..., None] * self.size + torch.arange(self.size, device=numbers.device)
        kept = (used[..., None] & (token < self.lengths[:, None, None, None])).flatten(2)
        k, v = (self.gather(t, numbers).flatten(2, 3) for t in (self.keys, self.values))
        return k.masked_fill(~kept[..., None], 0), v.masked_fill(~kept[..., None], 0), kept[:, :, None]

    def add(self, sums: Tensor, row: int, terms: Tensor) -> None:
        """Add ``terms`` [B, H, n, D] to the blocks that they belong to; terms of what does not count are 0."""
        numbers, _ = self._listed(row)
        batch = torch.arange(self.batch, device=sums.device)[:, None, None].expand_as(numbers)
        head = (torch.arange(self.num_heads, device=sums.device)[None, :, None] // self.group).expand_as(numbers)
        sums.index_put_((batch, head, numbers), terms.unflatten(2, (-1, self.size)), accumulate=True)

    def joined(self, sums: Tensor, like: Tensor) -> Tensor:
        return sums.flatten(2, 3)[:, :, : self.length].to(like.dtype).contiguous()


class _Smoothed:
    """Scores from int8 codes: keys less their mean, one scale for each block. All codes come from float32."""

    def __init__(self, blocks: _Blocks, scale: float) -> None:
        self.blocks, self.scale = blocks, scale
        token = torch.arange(blocks.number * blocks.size, device=blocks.keys.device)
        valid = (token < blocks.lengths[:, None]).view(blocks.batch, 1, blocks.number, blocks.size, 1)
        keys = blocks.keys.float().masked_fill(~valid, 0)
        self.mean = keys.sum((2, 3)) / blocks.lengths.clamp(min=1)[:, None, None]  # [B, Hkv, D]
        smooth = (keys - self.mean[:, :, None, None]).masked_fill(~valid, 0)
        self.codes, self.scales = _codes(smooth, (3, 4))

    def scores(self, query: Tensor, row: int) -> Tensor:
        """[B, H, rows, n] for a block of queries, in its dtype."""
        blocks, wide = self.blocks, query.dtype
        codes, scale = _codes(query.float(), (2, 3))
        numbers, _ = blocks._listed(row)
        keys = blocks.gather(self.codes, numbers).to(wide)
        by = blocks.gather(self.scales, numbers).to(wide)[..., 0].expand(-1, -1, -1, blocks.size).flatten(2)
        mean = self.mean.to(wide).repeat_interleave(blocks.group, 1)
        dots = codes.to(wide) @ keys.flatten(2, 3).mT
        smooth = dots * (scale.to(wide) * by[:, :, None])
        return (smooth + query @ mean[..., None]) * self.scale


def _codes(values: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(codes, scales) with one scale for the values along ``axes``."""
    scale = values.abs().amax(axes, keepdim=True) / 127
    scale = torch.where(scale < _SMALLEST, 1.0, scale)
    return (values / scale).round().clamp(-127, 127), scale
