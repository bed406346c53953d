"""What differs between stages: the objective that `fit` is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclip.training.parallel import blocks


class Objective(nn.Module):
    """A stage as `fit` sees it: a network, its loss, and what to show and save of it.

    Frozen helpers (CLIP) live in the tuple `frozen`, which hides them from `parameters()`: what is
    registered as a submodule is trained, averaged and checkpointed.
    """

    frozen: tuple[nn.Module, ...] = ()
    """Modules that are used but not trained."""

    stage: str
    """Name of the sub-folder that `export` writes."""
    network: nn.Module
    """What is trained."""

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of one micro-batch.

        Args:
            batch: as the data set's samples are, stacked or listed.
            generator: of all that is random. What is drawn by `unclip.training.noise` is drawn for
                each sample on its own, and so is the same on any number of processes.

        Returns:
            `loss` (scalar); optionally `per_sample` [B] and `timesteps` [B] in [0, 1], from which
            the loss by timestep quartile is logged; other scalars are logged as they are.
        """
        raise NotImplementedError

    def preview(self) -> Tensor | None:
        """Pictures [B, 3, H, W] in [-1, 1] that show the state of training, or None."""
        return None

    def metrics(self) -> dict[str, float]:
        """What else to measure with each held-out loss, on the main process: name -> value."""
        return {}

    def export(self, folder: Path) -> None:
        """Write the stage's folder from the weights as they are now."""
        raise NotImplementedError

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the modules that Accelerate shards one by one."""
        return sorted({type(block).__name__ for block in blocks(self.network)})
