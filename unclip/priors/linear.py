"""The linear prior: ridge regression from text_embed to image_embed, the baseline of every table
(Kandinsky, Razzhigaev et al. 2023, shows how strong it is).

Shapes: B captions, S training pairs, D width of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unclip.priors.base import Prior, PriorOptions
from unclip.priors.text import TextConditioning


@dataclass(frozen=True, kw_only=True)
class LinearMapConfig:
    """Shape of the linear prior's map."""

    embed_dim: int = 768
    """Width of CLIP's joint space: text_embed and image_embed."""


class LinearMap(nn.Linear):
    """text_embed [B, D] in, normalised image_embed [B, D] out."""

    def __init__(self, config: LinearMapConfig) -> None:
        super().__init__(config.embed_dim, config.embed_dim)


@dataclass(frozen=True, kw_only=True)
class LinearPriorConfig:
    """The linear prior."""

    network: LinearMapConfig = field(default_factory=LinearMapConfig)
    """The map."""
    ridge: float = 1e-3
    """Weight of the squared coefficients, as a share of the mean variance of text_embed."""
    num_samples: int = 16384
    """Most pairs that it is fitted to."""
    unit_norm: bool = True
    """Whether the CLIP's embeddings have unit norm, so that samples are put back on the sphere."""

    def __post_init__(self) -> None:
        if self.ridge < 0:
            raise ValueError(f"linear.ridge must not be negative; got {self.ridge}: use 1e-3")
        if self.num_samples < 2:
            raise ValueError(
                f"linear.num_samples must be at least 2; got {self.num_samples}: use 16384"
            )


class LinearPrior(Prior):
    """The mean image embedding that a caption's text_embed predicts: one, whatever the seed."""

    kind = "linear"
    config_class = LinearPriorConfig
    network_class = LinearMap
    config: LinearPriorConfig

    @classmethod
    def begin(
        cls, config: LinearPriorConfig, image_embed: Tensor, text_embed: Tensor
    ) -> LinearPrior:
        """The prior that fits true pairs [S, D] best: nothing is left to train."""
        prior = super().begin(config, image_embed, text_embed)
        prior.solve(image_embed, text_embed)
        return prior

    @torch.no_grad()
    def solve(self, image_embed: Tensor, text_embed: Tensor) -> None:
        """Fit the map to true pairs [S, D]: W = (X^T X + S lambda I)^-1 X^T Y of centred X, Y."""
        y = self.normalize(image_embed).double()
        x = text_embed.double()
        x_mean, y_mean = x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
        ridge = self.config.ridge * x.square().mean() * len(x)
        gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.lstsq(gram, x.T @ y).solution.T  # of full rank or not
        self.network.weight.copy_(weight)
        self.network.bias.copy_(y_mean - weight @ x_mean)

    def _draw(
        self,
        text: TextConditioning,
        generators: Sequence[torch.Generator],
        empty: TextConditioning | None,
        options: PriorOptions,
    ) -> Tensor:
        x_0 = self.network(text.text_embed.to(self.network.weight.dtype))
        return self.denormalize(x_0.float())[:, None]
