"""Which row comes when: a pure function of the seed, so that a checkpoint stores nothing but the
step.

`Permutation` is a seeded bijection without a table (a Feistel network with cycle walking; Black and
Rogaway 2002, Ciphers with Arbitrary Finite Domains). `Mixture` spreads several sources over a fixed
table of slots in the proportion of their weights; rows have equal length, so weights count tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

MASK = 2**64 - 1
ROUNDS = 6
SLOTS = 4096


def mix(value: int, key: int) -> int:
    """Return a 64-bit hash of two integers (the finaliser of SplitMix64, applied twice)."""
    for word in (key, value):
        value = (value ^ word) + 0x9E3779B97F4A7C15 & MASK
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
        value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
        value ^= value >> 31
    return value


class Permutation:
    """A seeded bijection of `range(size)`.

    Raises:
        ValueError: `size` is not positive.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got {size}")
        self.size = size
        # Two halves of equal width hold every number below the size; walking needs four tries at
        # most.
        self.half_bits = max(1, -(-(size - 1).bit_length() // 2))
        self.keys = [mix(seed, number + 1) for number in range(ROUNDS)]

    def __call__(self, index: int) -> int:
        """Return the image of `index`."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside range({self.size})")
        value = self.encrypt(index)
        while value >= self.size:
            value = self.encrypt(value)
        return value

    def encrypt(self, value: int) -> int:
        """Permute the numbers of `2 * half_bits` bits."""
        mask = (1 << self.half_bits) - 1
        left, right = value >> self.half_bits, value & mask
        for key in self.keys:
            left, right = right, left ^ (mix(right, key) & mask)
        return left << self.half_bits | right


class SourceRow(NamedTuple):
    """One row of the training order: which source, and which of its rows."""

    source: int
    row: int


class Mixture:
    """The endless order of rows over several sources.

    Args:
        weights: Relative share of each source, all positive.
        row_counts: Rows of each source, all positive.
        seed: Fixes slots and permutations.
    """

    def __init__(self, weights: Sequence[float], row_counts: Sequence[int], seed: int) -> None:
        self.row_counts = row_counts
        self.seed = seed
        shares = slot_shares(weights)
        ordered = [source for source, share in enumerate(shares) for _ in range(share)]
        shuffle = Permutation(SLOTS, mix(seed, 0))
        self.slots = [ordered[shuffle(slot)] for slot in range(SLOTS)]
        self.per_table = shares
        seen = [0] * len(shares)
        self.rank_in_table: list[int] = []
        for source in self.slots:
            self.rank_in_table.append(seen[source])
            seen[source] += 1
        self.permutations: dict[tuple[int, int], Permutation] = {}

    def __getitem__(self, number: int) -> SourceRow:
        """Return row `number` of the order; every row of a source comes once in each of its
        epochs.
        """
        table, slot = divmod(number, SLOTS)
        source = self.slots[slot]
        occurrence = table * self.per_table[source] + self.rank_in_table[slot]
        epoch, position = divmod(occurrence, self.row_counts[source])
        return SourceRow(source, self.permutation(source, epoch)(position))

    def permutation(self, source: int, epoch: int) -> Permutation:
        """Return the order of one source's epoch."""
        key = (source, epoch)
        if key not in self.permutations:
            seed = mix(mix(self.seed, source + 1), epoch)
            self.permutations[key] = Permutation(self.row_counts[source], seed)
        return self.permutations[key]


def slot_shares(weights: Sequence[float]) -> list[int]:
    """Divide the slots by weight with the largest remainders; every source gets one at least."""
    total = sum(weights)
    exact = [weight / total * SLOTS for weight in weights]
    shares = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: exact[n] - int(exact[n]), reverse=True)
    for number in range(max(0, SLOTS - sum(shares))):
        shares[by_remainder[number % len(shares)]] += 1
    while sum(shares) > SLOTS:
        shares[shares.index(max(shares))] -= 1
    return shares
