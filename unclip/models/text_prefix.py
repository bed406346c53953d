"""A causal transformer over a caption, z_t and what follows: what the priors' networks share.

Shapes: B batch, N caption tokens, P = N + 1 prefix tokens (caption and z_t), S tokens after them,
L layers, A heads, K head width, D width = A * K.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from einops import repeat
from torch import Tensor, nn

from unclip.models.layers import (
    AttentionBackend,
    Context,
    TransformerBlock,
    check_width,
    drop,
)

KeysAndValues: TypeAlias = list[tuple[Tensor, Tensor]]
"""Of each layer [B, A, M, K] each."""


@dataclass(frozen=True, kw_only=True)
class TextPrefixConfig:
    """Shape of a causal transformer over a caption and what follows. The defaults are Karlo's."""

    embed_dim: int = 768
    """Width of CLIP's joint space: text_embed and image_embed."""
    text_encodings_dim: int = 768
    """Width of the caption's token encodings."""
    max_text_len: int = 77
    """Most caption tokens; shorter captions may come unpadded."""
    width: int = 2048
    """Width of the transformer."""
    depth: int = 20
    """Layers."""
    head_dim: int = 64
    """Width of an attention head."""
    mlp_ratio: int = 4
    """Width of the MLP's hidden layer over `width`."""
    dropout: float = 0.0
    """Dropout on the output of every attention and MLP."""
    text_drop_prob: float = 0.1
    """How often training drops the caption (paper 2.2)."""
    null_text: Literal["learned", "empty_prompt"] = "learned"
    """What stands for no caption: a learned token and text embedding, or the empty prompt's own,
    which the caller passes (Karlo, diffusers)."""
    attention_backend: AttentionBackend = "sdpa"
    """Torch's own attention, or xformers' when it is installed."""

    def __post_init__(self) -> None:
        names = ("embed_dim", "text_encodings_dim", "max_text_len", "width", "depth", "mlp_ratio")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"prior.{name} must be at least 1; got {getattr(self, name)}")
        if self.width % 2:
            raise ValueError(f"prior.width must be even; got {self.width}: use {self.width + 1}")
        if self.head_dim < 1 or self.width % self.head_dim:
            fits = [d for d in range(8, 129, 8) if self.width % d == 0]
            raise ValueError(
                f"prior.head_dim must divide width; got {self.head_dim} for width {self.width}: "
                f"use {' or '.join(map(str, fits[-2:])) or 'a width that is a multiple of 64'}"
            )
        for name in ("dropout", "text_drop_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"prior.{name} must lie in [0, 1); got {getattr(self, name)}: use 0.1"
                )
        if self.null_text not in ("learned", "empty_prompt"):
            raise ValueError(
                f"prior.null_text must be 'learned' or 'empty_prompt'; got {self.null_text!r}: "
                f"use 'learned'"
            )
        if self.attention_backend not in ("sdpa", "xformers"):
            raise ValueError(
                f"prior.attention_backend must be 'sdpa' or 'xformers'; "
                f"got {self.attention_backend!r}: use 'sdpa'"
            )


class TextPrefix(nn.Module):
    """The trunk of a prior's network.

    The causal mask makes the caption and z_t, the prefix, blind to what follows them. So
    `encode_context` runs the prefix once and keeps its keys and values, and `after_prefix` runs
    only the tokens that follow, in training as in sampling: together they are exactly one causal
    pass over the whole sequence.
    """

    def __init__(self, config: TextPrefixConfig, num_tokens: int):
        """num_tokens: how many may follow z_t."""
        super().__init__()
        self.config: Any = config
        c = config
        self.num_tokens = num_tokens
        self.text_encodings_in = nn.Linear(c.text_encodings_dim, c.width)
        self.text_embed_in = nn.Linear(c.embed_dim, c.width)
        positions = c.max_text_len + 1 + num_tokens
        self.position_embedding = nn.Parameter(torch.empty(positions, c.width))
        self.blocks = nn.ModuleList(
            TransformerBlock(c.width, c.head_dim, c.mlp_ratio, c.dropout, c.attention_backend)
            for _ in range(c.depth)
        )
        self.norm_out = nn.LayerNorm(c.width)
        self.null_text_encoding = self.null_text_embed = None
        if c.null_text == "learned":
            self.null_text_encoding = nn.Parameter(torch.empty(c.text_encodings_dim))
            self.null_text_embed = nn.Parameter(torch.empty(c.embed_dim))

    def initialize_weights(self) -> None:
        """GPT-2's: normal(0.02), residual branches divided by sqrt(2 * depth) so that their sum
        keeps its scale."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            for branch_end in (block.proj.weight, block.mlp[-1].get_parameter("weight")):
                nn.init.normal_(branch_end, std=0.02 / math.sqrt(2 * self.config.depth))
        nn.init.normal_(self.position_embedding, std=0.01)
        for null in (self.null_text_encoding, self.null_text_embed):
            if null is not None:
                nn.init.normal_(null, std=0.02)

    def after_prefix(
        self, tokens: Tensor, context: Context, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        """Run tokens that follow the prefix through all layers.

        tokens: [B, S, D]; context: from `encode_context`; past: of each layer the keys and values
        [B, A, M, K] of the M tokens between the prefix and these, from earlier calls.

        Returns what the last layer makes of them [B, S, D], normalised, and of each layer their
        own keys and values [B, A, S, K]."""
        prefix_kv, prefix_mask = context["prefix_kv"], context["prefix_mask"]
        assert prefix_kv is not None and prefix_mask is not None
        B, S, _ = tokens.shape
        M = 0 if past is None else past[0][0].shape[2]
        # z_t's place is max_text_len, however short the caption is; these come after it.
        first = self.config.max_text_len + 1 + M
        h = tokens + self.position_embedding[first : first + S]
        causal = prefix_mask.new_ones(S, M + S).tril(M)
        mask = torch.cat(  # [B, 1, S, P + M + S]
            [repeat(prefix_mask, "b p -> b 1 s p", s=S), repeat(causal, "s m -> b 1 s m", b=B)],
            dim=-1,
        )
        own: KeysAndValues = []
        for layer, block in enumerate(self.blocks):
            earlier = prefix_kv[:, layer].unbind(1)  # [B, A, P, K] each
            if past is not None:
                pairs = zip(earlier, past[layer], strict=True)
                earlier = tuple(torch.cat([a.to(b.dtype), b], dim=2) for a, b in pairs)
            h, keys, values = block(h, mask, earlier)
            own.append((keys, values))
        return self.norm_out(h), own

    def encode_context(
        self,
        *,
        text_embed: Tensor,
        text_encodings: Tensor,
        text_mask: Tensor | None = None,
        drop_text: Tensor | None = None,
    ) -> Context:
        """Runs the caption and z_t through the transformer, once for all timesteps.

        text_embed: [B, embed_dim]; text_encodings: [B, N, text_encodings_dim], N at most
        max_text_len; text_mask: [B, N] bool, True = keep, None keeps all; drop_text: [B] bool,
        True = the row gets the null caption: one learned token and a learned text embedding. With
        `null_text: empty_prompt` the caller passes the empty prompt's text_embed, text_encodings
        and text_mask instead, in the rows it drops, and `drop_text` is refused.

        Returns prefix_kv [B, L, 2, A, P, K] and prefix_mask [B, P]. Raises ValueError for wrong
        widths and captions that are too long.
        """
        c = self.config
        check_width("text_embed", text_embed, "prior.embed_dim", c.embed_dim)
        check_width(
            "text_encodings", text_encodings, "prior.text_encodings_dim", c.text_encodings_dim
        )
        B, N = text_encodings.shape[:2]
        if c.max_text_len < N:
            raise ValueError(
                f"text_encodings must have at most prior.max_text_len = {c.max_text_len} tokens; "
                f"got {N}: truncate the captions"
            )
        if text_mask is None:
            text_mask = text_encodings.new_ones(B, N, dtype=torch.bool)
        if drop_text is not None:
            if self.null_text_encoding is None or self.null_text_embed is None:
                raise ValueError(
                    "drop_text needs prior.null_text: learned; got 'empty_prompt': pass the empty "
                    "prompt's text_embed, text_encodings and text_mask in the rows to drop"
                )
            text_embed = drop(text_embed, drop_text, self.null_text_embed)
            text_encodings = drop(text_encodings, drop_text, self.null_text_encoding)
            only_first = torch.arange(N, device=text_mask.device) == 0
            text_mask = drop(text_mask, drop_text, only_first)

        # z_t keeps its own position however short the caption, so padding changes nothing.
        positions = self.position_embedding
        h = torch.cat(
            [
                self.text_encodings_in(text_encodings) + positions[:N],
                (self.text_embed_in(text_embed) + positions[c.max_text_len])[:, None],
            ],
            dim=1,
        )  # [B, P, D]
        prefix_mask = nn.functional.pad(text_mask, (0, 1), value=True)  # [B, P]
        causal = prefix_mask.new_ones(N + 1, N + 1).tril()
        # A padded token keeps itself, or its softmax would be over nothing; no kept token sees it.
        itself = torch.eye(N + 1, dtype=torch.bool, device=prefix_mask.device)
        mask = (prefix_mask[:, None, None, :] & causal) | itself  # [B, 1, P, P]

        prefix_kv = []
        for block in self.blocks:
            h, keys, values = block(h, mask)
            prefix_kv.append(torch.stack([keys, values], dim=1))  # [B, 2, A, P, K]
        return {"prefix_kv": torch.stack(prefix_kv, dim=1), "prefix_mask": prefix_mask}

    def null_context(self, *, text_embed: Tensor, **conditions: Any) -> Context:
        """The unconditional context, of the shapes `encode_context` gives the same arguments.

        With `null_text: empty_prompt`, pass the empty prompt's conditions."""
        if self.config.null_text == "learned":
            conditions["drop_text"] = text_embed.new_ones(text_embed.shape[0], dtype=torch.bool)
        return self.encode_context(text_embed=text_embed, **conditions)
