"""Held-out data: the same noise and timesteps each time, whoever trains on how many processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from unclip.data.source import SourceConfig, open_source
from unclip.training.batches import collate
from unclip.training.noise import SampleGenerators, sample_seed
from unclip.training.tracking import Meter


def held_out_data(source: SourceConfig, val_data: str | None) -> Dataset[dict[str, Any]] | None:
    """The held-out data of a run.

    Args:
        source: what is trained on.
        val_data: another source, read in the same way; None is the shapes world's held-out split
            where that is trained on, else nothing.
    """
    if val_data is not None and val_data != "shapes":
        return open_source(replace(source, data=val_data, mix=None, limit=None))
    if val_data == "shapes" or (source.data == "shapes" and source.mix is None):
        shapes = replace(source.shapes, split="held_out")
        return open_source(replace(source, data="shapes", mix=None, limit=None, shapes=shapes))
    return None


def _shares(count: int, batch_size: int, rank: int, num_processes: int) -> Iterator[list[int]]:
    """Batches of one process, as many as of any other; those beyond the data are empty."""
    rounds = math.ceil(count / (batch_size * num_processes))
    for k in range(rounds):
        first = (k * num_processes + rank) * batch_size
        yield list(range(first, min(first + batch_size, count)))


class Validation:
    """The loss on the first `samples` of some held-out data.

    Noise, timesteps and dropped conditions follow from the number of the sample alone, so that
    losses compare over steps, runs and machines.
    """

    def __init__(self, dataset: Dataset[dict[str, Any]], samples: int, batch_size: int) -> None:
        self.dataset = dataset
        endless = getattr(dataset, "endless", False)
        self.count = samples if endless else min(samples, len(dataset))  # type: ignore[arg-type]
        self.batch_size = batch_size

    def _batch(self, indices: list[int]) -> dict[str, Any]:
        fetch = getattr(self.dataset, "__getitems__", None)
        return collate(fetch(indices) if fetch else [self.dataset[i] for i in indices])

    @torch.no_grad()
    def run(
        self,
        accelerator: Accelerator,
        module: torch.nn.Module,
        to_device: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> dict[str, float]:
        """Means over all processes, as `val/loss` and so on.

        Args:
            accelerator: of the run; every process calls this at the same time.
            module: the objective as it was prepared, with the weights to be judged.
            to_device: puts a batch where the module is.
        """
        meter = Meter()
        module.eval()
        shares = _shares(
            self.count, self.batch_size, accelerator.process_index, accelerator.num_processes
        )
        for share in shares:
            # Sharded networks are run by all processes together: who has none left takes any.
            indices = share or [0]
            seeds = [sample_seed("validation", 0, index) for index in indices]
            generator = SampleGenerators(seeds, accelerator.device)
            with accelerator.autocast():  # which Accelerate leaves out where it shards
                out = module(to_device(self._batch(indices)), generator)
            if share:
                meter.add({name: value.float() for name, value in out.items()}, len(share))
        module.train()
        return {f"val/{name}": value for name, value in meter.read().items()}
