"""The one-step prior: noise and caption in, image embedding out (ECLIPSE, Patel et al. 2024).

Shapes: R rows, D width of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from unclip.diffusion import guided
from unclip.models import PriorTransformer, PriorTransformerConfig
from unclip.priors.base import PriorOptions, TransformerPrior, split
from unclip.priors.text import TextConditioning


@dataclass(frozen=True, kw_only=True)
class OneStepPriorConfig:
    """The network of a one-step prior, and its loss."""

    network: PriorTransformerConfig = field(default_factory=PriorTransformerConfig)
    """The transformer, the diffusion prior's own; its timestep is always 0."""
    contrastive_weight: float = 0.2
    """Of the contrastive loss beside the MSE (ECLIPSE: 0.2)."""
    contrastive_temperature: float = 0.01
    """Cosines are divided by it; 0.01 is where CLIP's own training ends."""
    unit_norm: bool = True
    """Whether the CLIP's embeddings have unit norm, so that samples are put back on the sphere."""

    def __post_init__(self) -> None:
        if self.contrastive_weight < 0:
            raise ValueError(
                "one_step.contrastive_weight must not be negative; "
                f"got {self.contrastive_weight}: use 0.2"
            )
        if self.contrastive_temperature <= 0:
            raise ValueError(
                "one_step.contrastive_temperature must be above 0; "
                f"got {self.contrastive_temperature}: use 0.01"
            )


class OneStepPrior(TransformerPrior):
    """Draws image embeddings in one call of the network."""

    kind = "one_step"
    config_class = OneStepPriorConfig
    network_class = PriorTransformer
    config: OneStepPriorConfig

    def _draw(
        self,
        text: TextConditioning,
        generators: Sequence[torch.Generator],
        empty: TextConditioning | None,
        options: PriorOptions,
    ) -> Tensor:
        context, null = self._contexts(text, empty, options)
        generators = split(generators, options.num_candidates)
        shape = (len(generators), text.text_embed.shape[1])
        noise = randn_tensor(shape, generator=generators, device=text.text_embed.device)
        x_0 = guided(
            self.network,
            noise.to(next(self.network.parameters()).dtype),
            torch.zeros(len(noise), dtype=torch.long, device=noise.device),
            context,
            null,
            options.guidance_scale,
        )
        return self.denormalize(x_0.float()).unflatten(0, (-1, options.num_candidates))
