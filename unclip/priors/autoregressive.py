"""The autoregressive prior (paper, section 2.2): the principal components of z_i as tokens, drawn
one after the other.

Shapes: B captions, C candidates a caption, R = B * C rows, D width of CLIP's joint space, K
components, V buckets of a component.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from unclip.diffusion import join
from unclip.models import TokenTransformer, TokenTransformerConfig
from unclip.priors.base import PriorOptions, TransformerPrior, split
from unclip.priors.pca import PCA
from unclip.priors.text import TextConditioning


@dataclass(frozen=True, kw_only=True)
class AutoregressivePriorConfig:
    """An autoregressive prior's network and its tokens."""

    network: TokenTransformerConfig = field(default_factory=TokenTransformerConfig)
    """The transformer; `num_components` is filled in from `explained_variance`."""
    explained_variance: float = 0.99
    """Share of the variance that the kept components hold (paper: less than 1% is lost)."""
    dot_top: float = 0.5
    """Sampling draws the dot product z_i . z_t from this share of training's, the highest (paper:
    the top half)."""
    unit_norm: bool = True
    """Whether the CLIP's embeddings have unit norm, so that samples are put back on the sphere."""

    def __post_init__(self) -> None:
        for name, mend in (("explained_variance", 0.99), ("dot_top", 0.5)):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"autoregressive.{name} must lie in (0, 1]; got {getattr(self, name)}: "
                    f"use {mend}"
                )


class AutoregressivePrior(TransformerPrior):
    """Draws image embeddings component by component, the largest first.

    Attributes:
        pca: of true image embeddings. low, high: [D] least and largest coordinate of each component
            in training, between which its buckets lie. dot_edges: [num_dot_buckets - 1] quantiles
            of z_i . z_t, so that all dot tokens come equally often in training.
    """

    kind = "autoregressive"
    config_class = AutoregressivePriorConfig
    network_class = TokenTransformer
    statistics = (
        *("mean", "std", "low", "high", "dot_edges"),
        *("pca.mean", "pca.components", "pca.variance"),
    )
    config: AutoregressivePriorConfig
    low: Tensor
    high: Tensor
    dot_edges: Tensor

    def __init__(self, config: AutoregressivePriorConfig) -> None:
        super().__init__(config)
        network = config.network
        self.pca = PCA(network.embed_dim)
        self.register_buffer("low", torch.full((network.embed_dim,), torch.nan))
        self.register_buffer("high", torch.full((network.embed_dim,), torch.nan))
        self.register_buffer("dot_edges", torch.full((network.num_dot_buckets - 1,), torch.nan))

    @classmethod
    def begin(
        cls, config: AutoregressivePriorConfig, image_embed: Tensor, text_embed: Tensor
    ) -> AutoregressivePrior:
        """Random weights, and as many components as `explained_variance` asks for."""
        pca = PCA.fit(image_embed)
        kept = pca.num_components(config.explained_variance)
        config = replace(config, network=replace(config.network, num_components=kept))
        prior = super().begin(config, image_embed, text_embed)
        prior.pca = pca
        coordinates = pca.project(image_embed)
        prior.low, prior.high = coordinates.min(0).values, coordinates.max(0).values
        dots = (image_embed * text_embed).sum(1).double()
        shares = torch.linspace(0, 1, config.network.num_dot_buckets + 1, dtype=dots.dtype)[1:-1]
        prior.dot_edges = torch.quantile(dots, shares.to(dots.device)).float()
        return prior

    # ---------------------------------------------------------------------------------- tokens

    def quantize(self, image_embed: Tensor) -> Tensor:
        """The tokens [B, K] of embeddings [B, D]."""
        network = self.config.network
        coordinates = self.pca.project(image_embed)[:, : self.num_components]
        low, high = self._range()
        places = (coordinates - low) / (high - low) * network.num_buckets
        return places.long().clamp(0, network.num_buckets - 1)

    def dequantize(self, tokens: Tensor) -> Tensor:
        """The embeddings [B, D] that tokens [B, K] stand for: the middle of each bucket."""
        low, high = self._range()
        coordinates = low + (tokens + 0.5) / self.config.network.num_buckets * (high - low)
        return self.on_sphere(self.pca.embed(coordinates))

    def quantize_dot(self, image_embed: Tensor, text_embed: Tensor) -> Tensor:
        """The dot product's tokens [B], 0 for the lowest, of pairs [B, D]."""
        return torch.bucketize((image_embed * text_embed).sum(1), self.dot_edges)

    @property
    def num_components(self) -> int:
        """K, how many tokens stand for an embedding."""
        return int(self.config.network.num_components or 0)

    def _range(self) -> tuple[Tensor, Tensor]:
        kept = slice(self.num_components)
        return self.low[kept], self.high[kept].clamp(min=self.low[kept] + 1e-6)

    # -------------------------------------------------------------------------------- sampling

    def _draw(
        self,
        text: TextConditioning,
        generators: Sequence[torch.Generator],
        empty: TextConditioning | None,
        options: PriorOptions,
    ) -> Tensor:
        network, device = self.config.network, text.text_embed.device
        context, null = self._contexts(text, empty, options)
        generators = split(generators, options.num_candidates)
        # All chances of a row are drawn at once, from its own generator.
        shape = (self.num_components + 1,)
        drawn = [torch.rand(shape, generator=g, device=g.device) for g in generators]
        chances = torch.stack(drawn).to(device)
        first_dot = int((1 - self.config.dot_top) * network.num_dot_buckets)
        last = first_dot + (chances[:, -1] * (network.num_dot_buckets - first_dot)).long()
        if null is not None:
            last = torch.cat([torch.full_like(last, self.network.no_dot), last])
            context = join(null, context)
        past, tokens = None, []
        steps = range(self.num_components)
        for k in tqdm(steps, desc=options.progress, disable=options.progress is None):
            logits, past = self.network.step(last, context, past)
            if null is not None:
                uncond, cond = logits.float().chunk(2)
                logits = uncond + options.guidance_scale * (cond - uncond)
            token = pick(logits.float(), chances[:, k], options.temperature, options.top_p)
            tokens.append(token)
            last = token if null is None else token.repeat(2)
        image_embed = self.dequantize(torch.stack(tokens, dim=1))
        return image_embed.unflatten(0, (-1, options.num_candidates))


def pick(logits: Tensor, chances: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens [R] by logits [R, V] and uniform numbers [R] in [0, 1).

    Only the likeliest tokens that together hold `top_p` of the probability are drawn, the likeliest
    always (Holtzman et al. 2020)."""
    probs, order = (logits / temperature).softmax(dim=1).sort(dim=1, descending=True)
    total = probs.cumsum(dim=1)
    # What comes before a token decides whether it still belongs: the likeliest has nothing before.
    total = total.masked_fill(total - probs >= top_p, 0).cummax(dim=1).values
    place = torch.searchsorted(total, chances[:, None] * total[:, -1:], right=True)
    return order.gather(1, place.clamp(max=order.shape[1] - 1)).squeeze(1)
