"""Priors P(z_i | y): how an image embedding is drawn from a caption's text conditioning."""

from unclip.priors.base import Prior, TextConditioning, best_candidate, fill_dropped
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
    "TextConditioning",
    "best_candidate",
    "fill_dropped",
]
