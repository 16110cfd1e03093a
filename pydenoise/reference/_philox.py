"""Counter-based random numbers in plain torch: the words that every backend's kernels draw, bit for bit.

Philox4x32-10 makes four 32-bit words of a 128-bit counter and a 64-bit key, so a number depends on what it is for and
on nothing that was drawn before. Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LANES = 32  # neighbouring columns that take the same word of neighbouring counters
BLOCK = 4 * LANES  # columns that LANES counters serve
_LOW = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The four words of each counter; all int64 tensors of values below 2^32 that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The products wrap in int64; their 64 bits are right all the same.
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = ((second >> 32) & _LOW) ^ c1 ^ k0, ((first >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = second & _LOW, first & _LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & _LOW, (k1 + KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def words(keys: Tensor, step: int, columns: int) -> Tensor:
    """[R, columns] int64: a word below 2^32 for every row and column.

    ``keys`` is int64 [R, 2]: the seed of each row, and its number. Column v takes word ``v // 32 % 4`` of the counter
    (v // 128 * 32 + v % 32, low half of the row's number, its high half, ``step``); the seed is the key.
    """
    device = keys.device
    lanes = torch.arange(-(-columns // BLOCK) * LANES, device=device)
    seed, row = keys[:, :1], keys[:, 1:]
    shape = (keys.shape[0], lanes.shape[0])
    counter = (lanes.expand(shape), (row & _LOW).expand(shape), ((row >> 32) & _LOW).expand(shape))
    late = torch.full(shape, step & _LOW, device=device)
    four = philox4x32((*counter, late), ((seed & _LOW).expand(shape), ((seed >> 32) & _LOW).expand(shape)))
    blocks = torch.stack([word.unflatten(1, (-1, LANES)) for word in four], 2)  # [R, blocks, 4, LANES]
    return blocks.flatten(1)[:, :columns]


def uniform(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Words as numbers in (0, 1), from their upper 23 bits."""
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23


def gumbel(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Words as standard Gumbel numbers, -log(-log(u)) with u = 1 - (word + 0.5) / 2^32.

    Large ones come from small words, of which no bit is lost in float32: every value has its full relative precision.
    """
    upper = words >= 1 << 31
    nearest = (torch.where(upper, words ^ _LOW, words).to(dtype) + 0.5) * 2.0**-32
    exponential = -torch.where(upper, nearest.log(), torch.log1p(-nearest))
    return -exponential.log()
