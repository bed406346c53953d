"""Priors P(z_i | y): how an image embedding is drawn from a caption's text conditioning."""

from unclip.priors.base import Prior, best_candidate
from unclip.priors.diffusion import (
    DiffusionPrior,
    DiffusionPriorConfig,
    MultiQueryDiffusionPriorConfig,
)

__all__ = [
    "DiffusionPrior",
    "DiffusionPriorConfig",
    "MultiQueryDiffusionPriorConfig",
    "Prior",
    "best_candidate",
]
