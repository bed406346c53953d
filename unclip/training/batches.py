"""Which samples make up which batch: a function of (seed, step), whatever the machine count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from unclip.data.order import Integers, Order

Index = int | tuple[int, int]


class GlobalBatches(Sampler[list[Index]]):
    """Endless micro-batches of indices for one process.

    Global batch k holds the same samples on any number of processes: positions k B to (k + 1) B of
    an endless sequence, each epoch of it a fresh permutation of the data set (an `endless` data set
    is its own sequence). The processes, and their accumulation steps, share it out in order. Data
    sets of several parts with `lengths` and `weights` are mixed, each part with epochs of its own;
    those that say they vary by epoch are asked for (index, epoch).

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
        self._order = None if endless else Order(lengths, weights, seed)

    def _indices(self, positions: Integers) -> list[Index]:
        if self._order is None:
            return positions.tolist()
        part, index, epoch = self._order(positions)
        index += self._starts[part]
        if not self.varies_by_epoch:
            return index.tolist()
        return list(zip(index.tolist(), epoch.tolist(), strict=True))

    def __iter__(self) -> Iterator[list[Index]]:
        shares = np.arange(self.batch_size).reshape(-1, self.micro_batch_size)
        accumulation = len(shares) // self.num_processes
        batch = self.first_batch
        while True:
            for k in range(accumulation):
                rows = shares[self.rank * accumulation + k]
                yield self._indices(batch * self.batch_size + rows)
            batch += 1


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
