"""Priors P(z_i | y): how an image embedding is drawn from a caption's text conditioning."""

from unclip.priors.autoregressive import AutoregressivePrior, AutoregressivePriorConfig
from unclip.priors.base import Prior, PriorOptions, TransformerPrior, best_candidate
from unclip.priors.diffusion import (
    DiffusionPrior,
    DiffusionPriorConfig,
    MultiQueryDiffusionPrior,
    MultiQueryDiffusionPriorConfig,
)
from unclip.priors.flow import FlowPrior, FlowPriorConfig
from unclip.priors.kinds import KINDS, load_prior
from unclip.priors.linear import LinearPrior, LinearPriorConfig
from unclip.priors.one_step import OneStepPrior, OneStepPriorConfig
from unclip.priors.pca import PCA
from unclip.priors.text import TextConditioning, fill_dropped

__all__ = [
    "KINDS",
    "PCA",
    "AutoregressivePrior",
    "AutoregressivePriorConfig",
    "DiffusionPrior",
    "DiffusionPriorConfig",
    "FlowPrior",
    "FlowPriorConfig",
    "LinearPrior",
    "LinearPriorConfig",
    "MultiQueryDiffusionPrior",
    "MultiQueryDiffusionPriorConfig",
    "OneStepPrior",
    "OneStepPriorConfig",
    "Prior",
    "PriorOptions",
    "TextConditioning",
    "TransformerPrior",
    "best_candidate",
    "fill_dropped",
    "load_prior",
]
