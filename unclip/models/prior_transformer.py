"""The diffusion prior's network P(z_i | y): a causal transformer over the caption, z_t, the
timestep, the noised z_i and a learned final token (paper 2.2).

Shapes: B batch, D width.
"""

from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor, nn

from unclip.models.layers import Context, TimeEmbedding, check_width
from unclip.models.text_prefix import TextPrefix, TextPrefixConfig


@dataclass(frozen=True, kw_only=True)
class PriorTransformerConfig(TextPrefixConfig):
    """Shape of the network of a prior that denoises. The defaults are Karlo's."""


class PriorTransformer(TextPrefix):
    """Noised image embedding in, prediction out.

    Each call runs three tokens after the prefix: the timestep, the noised embedding, the final one.
    """

    config: PriorTransformerConfig

    def __init__(self, config: PriorTransformerConfig):
        super().__init__(config, num_tokens=3)
        self.time_embed = TimeEmbedding(config.width, config.width)
        self.image_embed_in = nn.Linear(config.embed_dim, config.width)
        self.final_token = nn.Parameter(torch.empty(config.width))
        self.out = nn.Linear(config.width, config.embed_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """The trunk's; the output starts at zero."""
        super().initialize_weights()
        nn.init.normal_(self.final_token, std=0.02)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_t: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        """x_t: [B, embed_dim]; timesteps: [B]; context: from `encode_context`.

        Returns [B, embed_dim]. Raises ValueError when x_t has another width."""
        check_width("x_t", x_t, "prior.embed_dim", self.config.embed_dim)
        final = repeat(self.final_token, "d -> b d", b=x_t.shape[0])
        tokens = [self.time_embed(timesteps), self.image_embed_in(x_t), final]
        h, _ = self.after_prefix(torch.stack(tokens, dim=1), context)  # [B, 3, D]
        out: Tensor = self.out(h[:, -1])  # [B, embed_dim]
        return out
