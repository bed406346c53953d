"""The kinds of prior by name, and how a checkpoint of any of them is read."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from unclip.checkpoint import CONFIG_NAME
from unclip.priors.autoregressive import AutoregressivePrior
from unclip.priors.base import Prior
from unclip.priors.diffusion import DiffusionPrior, MultiQueryDiffusionPrior
from unclip.priors.flow import FlowPrior
from unclip.priors.linear import LinearPrior
from unclip.priors.one_step import OneStepPrior

KINDS: dict[str, type[Prior]] = {
    kind.kind: kind
    for kind in (
        DiffusionPrior,
        MultiQueryDiffusionPrior,
        AutoregressivePrior,
        OneStepPrior,
        LinearPrior,
        FlowPrior,
    )
}


def load_prior(folder: Path, dtype: torch.dtype = torch.float32) -> Prior:
    """Read a prior's folder, whatever its kind.

    Raises:
        FileNotFoundError, ValueError: as `Prior.load` does.
        ValueError: the kind is unknown.
    """
    config = Path(folder) / CONFIG_NAME
    values = yaml.safe_load(config.read_text()) if config.is_file() else {}
    kind = values.get("kind", DiffusionPrior.kind) if isinstance(values, dict) else None
    if kind not in KINDS:
        raise ValueError(
            f"{folder} holds a prior of kind {kind!r}, which must be one of {', '.join(KINDS)}: "
            "install the release of unclip that wrote it"
        )
    return KINDS[kind].load(folder, dtype)
