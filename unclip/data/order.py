"""Which sample stands at which position: computed for each position alone, so nothing is stored.

A run's samples are one endless sequence.  What stands at a position follows from the seed and the
position, whatever the number of machines and workers and wherever a run resumes.  No permutation is
ever written out, so an order over a billion samples takes no memory and opens at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 8
CYCLE = 10_000
"""Positions within which a mixture keeps to its weights exactly: their resolution."""


def permute(positions: Integers, length: int, seeds: Words) -> Integers:
    """Where `positions` [N] of [0, length) go, in permutations that `seeds` [N] name; int64 [N].

    A Feistel network over pairs of digits (a, b) of the mixed radix (sides[0], sides[1]): in turn a
    hash of one digit is added to the other, which can be undone and so is a permutation of the
    sides[0] * sides[1] pairs.  These are at least `length`, by less than one side; a pair beyond is
    sent through again, until it falls within (Black and Rogaway 2002, cycle walking).
    """
    side = max(1, int(np.ceil(np.sqrt(length))))
    sides = (side, -(-length // side))
    places = positions.copy()
    beyond = np.ones(len(places), dtype=bool)
    while beyond.any():
        digits = list(np.divmod(places[beyond], sides[1]))
        for turn in range(ROUNDS):
            here, other = turn % 2, 1 - turn % 2
            with np.errstate(over="ignore"):
                hashed = _hash(seeds[beyond] + _hash(digits[other].astype(np.uint64) + _word(turn)))
            shift = (hashed % np.uint64(sides[here])).astype(np.int64)
            digits[here] = (digits[here] + shift) % sides[here]
        places[beyond] = digits[0] * sides[1] + digits[1]
        beyond = places >= length
    return places


def _word(number: int) -> np.uint64:
    return np.uint64(number * 0x9E3779B97F4A7C15 % 2**64)


def _hash(words: Words) -> Words:
    """SplitMix64's finaliser (Steele et al. 2014): every bit of the result depends on all bits."""
    with np.errstate(over="ignore"):
        words = words + _word(1)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _seeds(seed: int, stream: int, numbers: Integers) -> Words:
    """A seed [N] for each of `numbers` [N] (epochs, cycles) in one of a run's streams."""
    base = _hash(np.array([seed % 2**64], dtype=np.uint64)) ^ _word(2 * stream + 1)
    return _hash(_hash(base) ^ numbers.astype(np.uint64))


class Shards:
    """How samples are shuffled that must be read shard after shard: tars that cannot be read at
    offsets.

    In each epoch the shards are shuffled and laid end to end; what follows is cut into `streams`
    equal lengths that are read side by side, and in each, `buffer` samples in a row are shuffled.
    Position q belongs to stream q mod `streams`: ranks that take every n-th position, n dividing
    `streams`, read streams of their own.

    Args:
        sizes: samples of each shard; a sample's index counts through them.
        streams: how many are read at a time.
        buffer: how many samples in a row are shuffled.
    """

    def __init__(self, sizes: Sequence[int], streams: int, buffer: int) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.streams, self.buffer = streams, buffer
        self._starts = np.cumsum(self.sizes) - self.sizes

    def first(self, count: int) -> Shards:
        """Of the first `count` samples alone."""
        sizes = np.clip(count - self._starts, 0, self.sizes)
        return Shards(sizes.tolist(), self.streams, self.buffer)

    def __call__(self, places: Integers, seed: np.uint64) -> Integers:
        """The index of the samples at `places` [N] of an epoch that `seed` names; int64 [N]."""
        length = int(self.sizes.sum())
        stream, turn = places % self.streams, places // self.streams
        short, longer = divmod(length, self.streams)
        block, within = np.divmod(stream * short + np.minimum(stream, longer) + turn, self.buffer)
        for size in np.unique(np.minimum(self.buffer, length - block * self.buffer)).tolist():
            mine = np.minimum(self.buffer, length - block * self.buffer) == size
            seeds = _hash(seed ^ _hash(block[mine].astype(np.uint64)))
            within[mine] = permute(within[mine], size, seeds)
        return self._laid_out(block * self.buffer + within, seed)

    def _laid_out(self, places: Integers, seed: np.uint64) -> Integers:
        """The index of the sample at `places` [N] of the shards laid end to end in their order."""
        count = len(self.sizes)
        order = permute(np.arange(count), count, np.full(count, seed))
        ends = np.cumsum(self.sizes[order])
        at = np.searchsorted(ends, places, side="right")
        return self._starts[order[at]] + places - (ends - self.sizes[order])[at]


class Order:
    """An endless sequence over one data set or several, mixed by weight.

    Each cycle of 10,000 positions holds of each part its share to the sample, shuffled.  A part's
    own draws go through fresh permutations of it, one an epoch, so that it gives each of its
    samples once before any a second time (but for the width of a cycle where two epochs meet, if
    there are several parts).

    Args:
        lengths: samples of each part, all above 0.
        weights: share of each part in the sequence, in any unit.
        seed: another seed is another sequence.
        shards: of each part, how it is shuffled if it must be read shard after shard.

    Raises:
        ValueError: a weight is below a ten-thousandth of their sum.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float] = (1.0,),
        seed: int = 0,
        shards: Sequence[Shards | None] | None = None,
    ) -> None:
        self.lengths = list(lengths)
        self.shards = list(shards or [None] * len(self.lengths))
        self.seed = seed
        ends = np.round(np.cumsum(weights) / np.sum(weights) * CYCLE).astype(np.int64)
        self.starts = np.concatenate([[0], ends])
        self.shares = np.diff(self.starts)
        if not (self.shares > 0).all():
            raise ValueError(
                f"weight must be at least 1/{CYCLE} of the sum of weights; got {list(weights)}: "
                "raise the smallest or leave that source out"
            )

    def __call__(self, positions: Integers) -> tuple[Integers, Integers, Integers]:
        """The part [N], the index within it [N] and the part's epoch [N] at `positions` [N]."""
        if len(self.lengths) == 1:
            part, draws = np.zeros_like(positions), positions
        else:
            cycles, places = np.divmod(positions, CYCLE)
            slots = permute(places, CYCLE, _seeds(self.seed, 0, cycles))
            part = np.searchsorted(self.starts, slots, side="right") - 1
            draws = cycles * self.shares[part] + slots - self.starts[part]
        index, epoch = np.empty_like(positions), np.empty_like(positions)
        for number, length in enumerate(self.lengths):
            mine = part == number
            epoch[mine], places = np.divmod(draws[mine], length)
            seeds = _seeds(self.seed, number + 1, epoch[mine])
            if (shards := self.shards[number]) is None:
                index[mine] = permute(places, length, seeds)
                continue
            found = np.empty_like(places)
            for one in np.unique(seeds):  # an epoch's
                found[seeds == one] = shards(places[seeds == one], one)
            index[mine] = found
        return part, index, epoch
