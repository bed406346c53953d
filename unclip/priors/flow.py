"""The flow prior: the diffusion prior's network, trained on the velocities of straight paths.

Shapes: R rows, D width of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unclip.diffusion import FLOW_SAMPLERS, FlowConfig, sample_flow
from unclip.models import PriorTransformer, PriorTransformerConfig
from unclip.priors.base import PriorOptions, TransformerPrior, split
from unclip.priors.text import TextConditioning


@dataclass(frozen=True, kw_only=True)
class FlowPriorConfig:
    """A flow prior's network and its path."""

    network: PriorTransformerConfig = field(default_factory=PriorTransformerConfig)
    """The transformer, the diffusion prior's own."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """What is trained on."""
    unit_norm: bool = True
    """Whether the CLIP's embeddings have unit norm, so that samples are put back on the sphere."""


class FlowPrior(TransformerPrior):
    """Draws image embeddings by integrating a velocity."""

    kind = "flow"
    config_class = FlowPriorConfig
    network_class = PriorTransformer
    samplers = FLOW_SAMPLERS
    config: FlowPriorConfig

    def _draw(
        self,
        text: TextConditioning,
        generators: Sequence[torch.Generator],
        empty: TextConditioning | None,
        options: PriorOptions,
    ) -> Tensor:
        context, null = self._contexts(text, empty, options)
        generators = split(generators, options.num_candidates)
        x_0 = sample_flow(
            self.network,
            self.config.flow,
            (len(generators), text.text_embed.shape[1]),
            context=context,
            null_context=null,
            guidance_scale=options.guidance_scale,
            sampler=options.sampler or self.samplers[0],
            num_inference_steps=options.num_inference_steps,
            generators=generators,
            dtype=next(self.network.parameters()).dtype,
            progress=options.progress,
            callback=options.callback,
        )
        return self.denormalize(x_0).unflatten(0, (-1, options.num_candidates))
