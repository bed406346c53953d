"""Which samples make up which batch: a function of (seed, step), whatever the machine count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from unclip.data.order import Integers, Order, Shards

Index = int | tuple[int, int]

FETCHING = 4
"""Tars that are copied at a time, for each process."""


class GlobalBatches(Sampler[list[Index]]):
    """Endless micro-batches of indices for one process.

    Global batch k holds the same samples on any number of processes: positions k B to (k + 1) B of
    an endless sequence, each epoch of it a fresh permutation of the data set (an `endless` data set
    is its own sequence). Of n processes each takes every n-th. Data sets of several parts with
    `lengths` and `weights` are mixed, each part with epochs of its own; those that say they vary by
    epoch are asked for (index, epoch). Those with `shards` are read shard after shard; what they
    will need next is copied to this machine ahead of time.

    Every index is computed from its position: starting anywhere costs nothing, however long the
    data set is.

    Raises:
        ValueError: the data set has fewer samples than there are processes.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        num_processes: int,
        first_batch: int = 0,
        seed: int = 0,
    ) -> None:
        endless = getattr(dataset, "endless", False)
        length = None if endless else len(dataset)  # type: ignore[arg-type]
        if length is not None and length < num_processes:
            raise ValueError(
                f"data must hold a sample for each of {num_processes} processes; got {length}: "
                "add data or start fewer processes"
            )
        self.varies_by_epoch = getattr(dataset, "varies_by_epoch", False)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.num_processes = num_processes
        self.first_batch = first_batch
        lengths = getattr(dataset, "lengths", [length])
        weights = getattr(dataset, "weights", [1.0])
        self._starts = np.cumsum([0, *lengths[:-1]])
        self._parts = getattr(dataset, "parts", [dataset])
        shards = [getattr(part, "shards", None) for part in self._parts]
        self._order = None if endless else Order(lengths, weights, seed, shards)
        ahead = sum(_ahead(part) for part in shards if part is not None)
        self._ahead = -(-ahead // batch_size) * batch_size

    def _indices(self, positions: Integers) -> list[Index]:
        if self._order is None:
            return positions.tolist()
        part, index, epoch = self._order(positions)
        index += self._starts[part]
        if not self.varies_by_epoch:
            return index.tolist()
        return list(zip(index.tolist(), epoch.tolist(), strict=True))

    def positions(self, batch: int) -> Integers:
        """Where in the sequence stand this process's samples of global batch number `batch`,
        [accumulation steps, micro-batch]."""
        rows = np.arange(self.batch_size).reshape(-1, self.micro_batch_size, self.num_processes)
        return batch * self.batch_size + rows[:, :, self.rank]

    def __iter__(self) -> Iterator[list[Index]]:
        fetched = self.first_batch * self.batch_size
        threads = ThreadPoolExecutor(FETCHING)
        try:
            for batch in itertools.count(self.first_batch):
                now = batch * self.batch_size
                # Half of what lies ahead at a time: every position would cost more than it saves.
                if self._ahead and fetched <= now + self._ahead // 2:
                    end = now + self._ahead
                    self._fetch(np.arange(fetched + self.rank, end, self.num_processes), threads)
                    fetched = end
                for positions in self.positions(batch):
                    yield self._indices(positions)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, positions: Integers, threads: Executor) -> None:
        """Have copied to this machine what the samples at these positions need."""
        assert self._order is not None
        part, index, _ = self._order(positions)
        for number, dataset in enumerate(self._parts):
            if getattr(dataset, "shards", None) is not None:
                for some in np.array_split(index[part == number], FETCHING):
                    if len(some):
                        threads.submit(dataset.fetch, some)


def first_rows(dataset: Dataset[Any], count: int) -> list[int]:
    """The rows that the first `count` samples of a run are, at seed 0."""
    batches = GlobalBatches(
        dataset, batch_size=count, micro_batch_size=count, rank=0, num_processes=1
    )
    rows = next(iter(batches))
    return [row[0] if isinstance(row, tuple) else row for row in rows]


def _ahead(shards: Shards) -> int:
    """Positions of an epoch until every stream is half a shard on."""
    length, count = int(shards.sizes.sum()), max(1, int((shards.sizes > 0).sum()))
    return max(1, min(length, shards.streams * length // count // 2))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors, list everything else."""
    return {
        key: torch.stack([s[key] for s in samples])
        if isinstance(value, torch.Tensor)
        else [s[key] for s in samples]
        for key, value in samples[0].items()
    }


def loader(dataset: Dataset[Any], batches: GlobalBatches, num_workers: int) -> DataLoader[Any]:
    """A DataLoader over `batches`; workers only fetch, so their number changes nothing."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        # Without one of its own it draws from torch's, and a resumed run's dropout would differ.
        generator=torch.Generator(),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
    )
