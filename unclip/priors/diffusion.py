"""The diffusion prior (paper, section 2.2): a causal transformer that denoises image embeddings.

Shapes: B captions, K candidates a caption, R = B * K rows, D width of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unclip.diffusion import (
    SAMPLERS,
    DiffusionConfig,
    Network,
    make_scheduler,
    sample,
    sampling_timesteps,
)
from unclip.models import (
    Context,
    MultiQueryPrior,
    MultiQueryPriorConfig,
    PriorTransformer,
    PriorTransformerConfig,
)
from unclip.priors.base import Callback, PriorOptions, TransformerPrior, split
from unclip.priors.text import TextConditioning


def _diffusion() -> DiffusionConfig:
    # Embeddings are scaled to unit variance, not to a range: there is nothing to clamp to.
    return DiffusionConfig(prediction_type="x_0", clip_range=None)


@dataclass(frozen=True, kw_only=True)
class DiffusionPriorConfig:
    """A prior's network and the diffusion it runs."""

    network: PriorTransformerConfig = field(default_factory=PriorTransformerConfig)
    """The transformer."""
    diffusion: DiffusionConfig = field(default_factory=_diffusion)
    """Schedule and target; the paper predicts x_0 under plain MSE."""
    unit_norm: bool = True
    """Whether the CLIP's embeddings have unit norm, so that samples are put back on the sphere."""


@dataclass(frozen=True, kw_only=True)
class MultiQueryDiffusionPriorConfig:
    """A diffusion prior on DALLE2-pytorch's network."""

    network: MultiQueryPriorConfig = field(default_factory=MultiQueryPriorConfig)
    """The transformer."""
    diffusion: DiffusionConfig = field(default_factory=_diffusion)
    """Schedule and target."""
    unit_norm: bool = False
    """Whether samples are put back on the sphere. DALLE2-pytorch leaves their length as drawn,
    unless its `sampling_final_clamp_l2norm` is set."""

    def __post_init__(self) -> None:
        rows, steps = self.network.num_timesteps, self.diffusion.num_train_timesteps
        if self.network.time_tokens == "table" and rows < steps:
            raise ValueError(
                "prior.network.num_timesteps must be at least diffusion.num_train_timesteps = "
                f"{steps}; got {rows}: use {steps}"
            )


class DiffusionPrior(TransformerPrior):
    """Draws image embeddings by denoising."""

    kind = "diffusion"
    config_class: ClassVar[type[Any]] = DiffusionPriorConfig
    network_class: ClassVar[type[nn.Module]] = PriorTransformer
    samplers = SAMPLERS
    config: DiffusionPriorConfig | MultiQueryDiffusionPriorConfig

    def check_options(self, options: PriorOptions) -> None:
        """Raise ValueError for options that it cannot be sampled with."""
        super().check_options(options)
        config = self.config.diffusion
        timesteps = sampling_timesteps(config, options.num_inference_steps)
        make_scheduler(config, options.sampler or self.samplers[0], timesteps)

    def _draw(
        self,
        text: TextConditioning,
        generators: Sequence[torch.Generator],
        empty: TextConditioning | None,
        options: PriorOptions,
    ) -> Tensor:
        context, null = self._contexts(text, empty, options)
        generators = split(generators, options.num_candidates)
        network, callback = self._denoiser(options.callback)
        x_0 = sample(
            network,
            self.config.diffusion,
            (len(generators), text.text_embed.shape[1]),
            context=context,
            null_context=null,
            guidance_scale=options.guidance_scale,
            sampler=options.sampler or self.samplers[0],
            num_inference_steps=options.num_inference_steps,
            generators=generators,
            dtype=next(self.network.parameters()).dtype,
            progress=options.progress,
            callback=callback,
        )
        return self.denormalize(x_0).unflatten(0, (-1, options.num_candidates))

    def _denoiser(self, callback: Callback | None) -> tuple[Network, Callback | None]:
        """The network and callback that `sample` calls."""
        return self.network, callback


class MultiQueryDiffusionPrior(DiffusionPrior):
    """The same on DALLE2-pytorch's network."""

    kind = "multi_query_diffusion"
    config_class = MultiQueryDiffusionPriorConfig
    network_class = MultiQueryPrior
    config: MultiQueryDiffusionPriorConfig
    one_null = False  # it keeps the length of the caption it stands for

    def _denoiser(self, callback: Callback | None) -> tuple[Network, Callback | None]:
        """With self-conditioning the callback hands each step's estimate of x_0 to the network's
        next call."""
        network = self.network
        if not network.config.self_conditioning:
            return network, callback
        estimate: list[Tensor] = []

        def denoise(x_t: Tensor, timesteps: Tensor, context: Context) -> Tensor:
            self_cond = None
            if estimate:  # guidance asks for a batch twice the size of the estimate's
                self_cond = estimate[0].repeat(len(x_t) // len(estimate[0]), 1).to(x_t.dtype)
            prediction: Tensor = network(x_t, timesteps, context, self_cond)
            return prediction

        def remember(step: int, timestep: int, x_t: Tensor, x_0: Tensor) -> None:
            estimate[:] = [x_0]
            if callback is not None:
                callback(step, timestep, x_t, x_0)

        return denoise, remember
