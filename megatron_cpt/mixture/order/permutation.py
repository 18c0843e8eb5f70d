"""A keyed hash of 64-bit integers, and permutations of 0..n-1 chosen by a key, computed one value at a time."""

from __future__ import annotations

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the step of splitmix64's counter
MIXER = 0xD6E8FEB86659FD93  # multiplier of the xmx mixer (J. Maiga)


def mix64(x: int) -> int:
    """A bijection of 64-bit integers that looks random (xorshift-multiply, twice)."""
    x ^= x >> 32
    x = x * MIXER & MASK64
    x ^= x >> 32
    x = x * MIXER & MASK64
    return x ^ (x >> 32)


def combine(*parts: int) -> int:
    """One 64-bit key from several integers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = mix64((key + GOLDEN + (part & MASK64)) & MASK64)
    return key


class KeyedPermutation:
    """A permutation of range(n) chosen by a 64-bit key: `permutation(i)` is in range(n), each value once.

    Large n: a Feistel network of 8 half-rounds on the next power of two, walked until it lands below n. Up to 4096
    values: a Fisher-Yates table, because Feistel networks on tiny domains are not uniform.
    """

    TABLE_LIMIT = 4096

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        if n <= self.TABLE_LIMIT:
            self.table = list(range(n))
            for i in range(n - 1, 0, -1):
                j = mix64((key + i * GOLDEN) & MASK64) % (i + 1)
                self.table[i], self.table[j] = self.table[j], self.table[i]
            return
        bits = (n - 1).bit_length()
        self.left_mask = (1 << bits // 2) - 1
        self.right_bits = bits - bits // 2
        self.right_mask = (1 << self.right_bits) - 1
        self.round_keys = [mix64((key + i * GOLDEN) & MASK64) for i in range(1, 9)]

    def __call__(self, i: int) -> int:
        if self.n <= self.TABLE_LIMIT:
            return self.table[i]
        while True:
            left, right = i >> self.right_bits, i & self.right_mask
            for even, odd in zip(self.round_keys[::2], self.round_keys[1::2], strict=True):
                left ^= mix64(right ^ even) & self.left_mask
                right ^= mix64(left ^ odd) & self.right_mask
            i = left << self.right_bits | right
            if i < self.n:
                return i

    def inverse(self, value: int) -> int:
        """The i of which `permutation(i)` is `value`."""
        if self.n <= self.TABLE_LIMIT:
            return self.table.index(value)
        while True:
            left, right = value >> self.right_bits, value & self.right_mask
            for even, odd in zip(self.round_keys[-2::-2], self.round_keys[::-2], strict=True):
                right ^= mix64(left ^ odd) & self.right_mask
                left ^= mix64(right ^ even) & self.left_mask
            value = left << self.right_bits | right
            if value < self.n:
                return value
