"""What happens to a step whose loss or gradient is no number."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

log = logging.getLogger(__name__)

NAMED = 8
"""How many samples of a bad batch an error names."""


class Guard:
    """Counts the steps that were skipped, and ends a run of too many.

    Args:
        limit: how many steps in a row may be skipped.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0

    def passed(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def skip(
        self,
        accelerator: Accelerator,
        step: int,
        micro_batches: Sequence[tuple[Mapping[str, Any], Mapping[str, Tensor]]],
        norm: Tensor,
    ) -> None:
        """A step was left out on all processes; each calls this at the same time.

        Args:
            accelerator: of the run.
            step: its number.
            micro_batches: this process's batches and what the objective returned for them.
            norm: of the gradient.

        Raises:
            ValueError: it was the last in a row that is allowed. Names samples of the batch.
        """
        self.skipped += 1
        self.in_a_row += 1
        lost = [out for _, out in micro_batches if not torch.isfinite(out["loss"]).all()]
        what = "loss" if lost else "gradient"
        if accelerator.is_main_process:
            log.warning(
                "step %d is left out: its loss or gradient is not finite (loss %s, gradient norm "
                "%s; %d in a row, %d in all)",
                step,
                ", ".join(f"{out['loss'].item():.4g}" for _, out in micro_batches),
                f"{norm.item():.4g}",
                self.in_a_row,
                self.skipped,
            )
        if self.in_a_row < self.limit:
            return
        named = gather_object([bad_samples(micro_batches, what)])
        keys = [key for own in named for key in own]
        more = f" and {len(keys) - NAMED} more" if keys[NAMED:] else ""
        raise ValueError(
            f"the loss and its gradient must be finite; got a {what} that is not in "
            f"{self.in_a_row} steps in a row, the last of them {step}, of the samples "
            f"{', '.join(keys[:NAMED])}{more}: look at them, lower fit.learning_rate or raise "
            "fit.max_bad_steps, and run the command again"
        )


def bad_samples(
    micro_batches: Sequence[tuple[Mapping[str, Any], Mapping[str, Tensor]]], what: str
) -> list[str]:
    """Names of the samples whose loss is not finite; where none is known to be, of all."""
    bad, all_keys = [], []
    for batch, out in micro_batches:
        keys = sample_keys(batch)
        all_keys += keys
        losses = out.get("per_sample")
        if what == "loss" and losses is not None and len(losses) % len(keys) == 0:
            finite = torch.isfinite(losses).reshape(-1, len(keys)).all(0).tolist()
            bad += [key for key, fine in zip(keys, finite, strict=True) if not fine]
    return bad or all_keys


def sample_keys(batch: Mapping[str, Any]) -> list[str]:
    """What to call the samples of a batch: by their keys, else by their captions, else by their
    places in it."""
    for name in ("key", "caption"):
        if name in batch:
            return [repr(value) if name == "caption" else str(value) for value in batch[name]]
    count = max(len(value) for value in batch.values())
    return [f"number {k}" for k in range(count)]
