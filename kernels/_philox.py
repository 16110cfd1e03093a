"""Gumbel and normal noise from Philox4x32-10, counter by counter: the words of pydenoise/reference/_philox.py."""

import triton
import triton.language as tl

LANES = tl.constexpr(32)  # neighbouring columns that take the same word of neighbouring counters
BLOCK = tl.constexpr(128)  # columns that LANES counters serve
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def words(seed, row, step, counter):
    """The four words, uint32, of int32 ``counter`` [N], for a row's 64-bit seed and number and a 32-bit step."""
    zero = counter * 0
    low = zero + row.to(tl.int64).to(tl.int32)
    high = zero + (row.to(tl.int64) >> 32).to(tl.int32)
    return tl.philox(seed, counter, low, high, zero + step.to(tl.int64).to(tl.int32))


@triton.jit
def _log_of_parts(t, exponent):
    """log((1 + t) 2^exponent) for sqrt(1/2) <= 1 + t <= sqrt(2); the polynomial of csrc/core/philox.h."""
    p = -7.634429634e-2 * t + 1.276154965e-1
    p = p * t - 1.316019446e-1
    p = p * t + 1.420176178e-1
    p = p * t - 1.662335694e-1
    p = p * t + 2.000122666e-1
    p = p * t - 2.500082254e-1
    p = p * t + 3.333333135e-1
    return exponent * _LN2 + (t * t * (t * p - 0.5) + t)


@triton.jit
def _split(x):
    """(t, exponent) of positive normal numbers x = (1 + t) 2^exponent."""
    bits = x.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) >> 23
    return (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0, power.to(tl.float32)


@triton.jit
def gumbel(word):
    """-log(-log(u)) with u = 1 - (word + 0.5) / 2^32."""
    signed = word.to(tl.int32, bitcast=True)
    upper = signed < 0
    nearest = (signed ^ (signed >> 31)).to(tl.float32)
    q = (nearest + 0.5) * 2.3283064365386963e-10
    half = q > 0.29289322
    t, exponent = _split(q)
    t = tl.where(upper, t, tl.where(half, 1.0 - 2.0 * q, -q))
    exponent = tl.where(upper, exponent, tl.where(half, -1.0, 0.0))
    t, exponent = _split(-_log_of_parts(t, exponent))
    return -_log_of_parts(t, exponent)


@triton.jit
def _radius(word):
    """sqrt(-2 log(u)) with u = (word + 0.5) / 2^32; near 1 the logarithm is taken from 1 - u, which loses no bit."""
    signed = word.to(tl.int32, bitcast=True)
    upper = signed < 0
    nearest = (signed ^ (signed >> 31)).to(tl.float32)
    q = (nearest + 0.5) * 2.3283064365386963e-10
    half = q > 0.29289322
    t, exponent = _split(q)
    t = tl.where(upper, tl.where(half, 1.0 - 2.0 * q, -q), t)
    exponent = tl.where(upper, tl.where(half, -1.0, 0.0), exponent)
    return tl.sqrt_rn(-2.0 * _log_of_parts(t, exponent))


@triton.jit
def _cosine_sine(word):
    """cos and sin of pi word / 2^31, the word signed; the nearest quarter turn is taken off in integers."""
    signed = word.to(tl.int32, bitcast=True)
    quarter = ((signed >> 29) + 1) >> 1
    x = (signed - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-9
    s = x * x
    odd = (-1.951521821e-4 * s + 8.332160293e-3) * s - 1.666665460e-1
    odd = odd * s * x + x
    even = (-1.359179350e-3 * s + 4.165577261e-2) * s - 4.999988467e-1
    even = even * s + 1.0
    swapped = (quarter & 1) != 0
    cosine, sine = tl.where(swapped, odd, even), tl.where(swapped, even, odd)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    return cosine, tl.where((quarter & 2) != 0, -sine, sine)


@triton.jit
def normals(w0, w1, w2, w3):
    """Standard normal numbers of a counter's four columns, by Box and Muller; the numbers of csrc/core/normal.inl."""
    c0, s0 = _cosine_sine(w1)
    c1, s1 = _cosine_sine(w3)
    first, second = _radius(w0), _radius(w2)
    return first * c0, first * s0, second * c1, second * s1
