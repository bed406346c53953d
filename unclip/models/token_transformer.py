"""The autoregressive prior's network (paper 2.2): a causal transformer over the caption, z_t, the
quantised dot product z_i . z_t, and the quantised principal components of z_i.

Shapes: B batch, K components, V buckets of a component, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unclip.models.layers import Context
from unclip.models.text_prefix import KeysAndValues, TextPrefix, TextPrefixConfig


@dataclass(frozen=True, kw_only=True)
class TokenTransformerConfig(TextPrefixConfig):
    """Shape of the network of a prior that draws tokens."""

    num_components: int | None = None
    """K tokens are drawn, one a principal component (paper: 319 of 1,024); None where the prior
    fills in how many it keeps."""
    num_buckets: int = 1024
    """V values that a token can have (paper: 1,024)."""
    num_dot_buckets: int = 64
    """Values of the token for the dot product z_i . z_t."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_buckets", "num_dot_buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"prior.{name} must be at least 1; got {getattr(self, name)}")
        if self.num_components is not None and not 1 <= self.num_components <= self.embed_dim:
            raise ValueError(
                f"prior.num_components must lie between 1 and embed_dim, {self.embed_dim}; got "
                f"{self.num_components}: leave it out"
            )


class TokenTransformer(TextPrefix):
    """Tokens in, logits of the token after each out.

    One more value of the dot product's token stands for none given: the unconditional branch of
    guidance must not hear of the caption.
    """

    config: TokenTransformerConfig

    def __init__(self, config: TokenTransformerConfig):
        if config.num_components is None:
            raise ValueError(
                "prior.num_components must be set to build a network; got None: begin the prior "
                "from embeddings, which fills it in"
            )
        super().__init__(config, num_tokens=config.num_components)
        self.dot_in = nn.Embedding(config.num_dot_buckets + 1, config.width)
        self.bucket_in = nn.Embedding(config.num_buckets, config.width)
        self.out = nn.Linear(config.width, config.num_buckets)
        self.initialize_weights()

    @property
    def no_dot(self) -> int:
        """The token for no dot product."""
        return self.config.num_dot_buckets

    def forward(self, dot: Tensor, tokens: Tensor, context: Context) -> Tensor:
        """Logits of all components at once, for training.

        dot: [B]; tokens: [B, K]; context: from `encode_context`. Returns [B, K, V], of which
        component k depends on `dot` and on the tokens before it."""
        known = torch.cat([self.dot_in(dot)[:, None], self.bucket_in(tokens[:, :-1])], dim=1)
        h, _ = self.after_prefix(known, context)  # [B, K, D]
        logits: Tensor = self.out(h)
        return logits

    def step(
        self, last: Tensor, context: Context, past: KeysAndValues | None
    ) -> tuple[Tensor, KeysAndValues]:
        """Logits [B, V] of the next component, from the token before it alone.

        last: [B], the dot product's where `past` is None, else a component's; past: what the call
        before returned beside the logits."""
        token = (self.dot_in if past is None else self.bucket_in)(last)
        h, own = self.after_prefix(token[:, None], context, past)
        if past is not None:
            own = [
                (torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2))
                for (k, v), (own_k, own_v) in zip(past, own, strict=True)
            ]
        return self.out(h[:, -1]), own
