"""Which samples make up which batch: a function of (seed, step), whatever the machine count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

Index = int | tuple[int, int]


class GlobalBatches(Sampler[list[Index]]):
    """Endless micro-batches of indices for one process.

    Global batch k holds the same samples on any number of processes: positions k B to (k + 1) B of
    an endless sequence, each epoch of it a fresh permutation of the data set (an `endless` data set
    is its own sequence). The processes, and their accumulation steps, share it out in order. Data
    sets that say they vary by epoch are asked for (index, epoch).
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
        self.length = None if getattr(dataset, "endless", False) else len(dataset)  # type: ignore[arg-type]
        if self.length == 0:
            raise ValueError("the data set is empty: training needs at least one sample")
        self.varies_by_epoch = getattr(dataset, "varies_by_epoch", False)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.num_processes = num_processes
        self.first_batch = first_batch
        self.seed = seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def _index(self, position: int) -> Index:
        if self.length is None:
            return position
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.length, generator=generator)
        index = int(self._order[offset])
        return (index, epoch) if self.varies_by_epoch else index

    def __iter__(self) -> Iterator[list[Index]]:
        shares = torch.arange(self.batch_size).view(-1, self.micro_batch_size)
        accumulation = len(shares) // self.num_processes
        batch = self.first_batch
        while True:
            for k in range(accumulation):
                rows = shares[self.rank * accumulation + k].tolist()
                yield [self._index(batch * self.batch_size + row) for row in rows]
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
