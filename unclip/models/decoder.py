"""The decoder P(x | z_i, y): an image embedding and a caption to a 64 px picture (paper 2.1).

Shapes: B batch, N caption tokens, M = num_image_tokens + N context tokens, C context width,
E timestep-embedding width, H W picture.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from unclip.models.layers import Context, check_width, drop
from unclip.models.unet import UNet, UNetConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A U-Net and the conditions it is given."""

    unet: UNetConfig = field(default_factory=lambda: UNetConfig(context_dim=512))
    """The trunk."""
    image_embed_dim: int = 768
    """Width of CLIP's image embedding."""
    text_encodings_dim: int | None = None
    """Width of the caption's token encodings; None: the decoder sees no caption."""
    text_embed_dim: int | None = None
    """Width of CLIP's text embedding, added to the timestep embedding as Karlo does; None: not."""
    embed_scale: float | None = None
    """Factor on CLIP's embeddings before any layer sees them. None: the square root of their width,
    which gives unit-norm embeddings unit variance; without it a network is slow to hear them.
    Published models were trained at 1."""
    num_image_tokens: int = 4
    """Context tokens made from the image embedding (paper 2.1); 0: only the timestep embedding
    carries it."""
    layout_size: int = 0
    """Side of a coarse map made from the image embedding and added after the input convolution, so
    that a small decoder finds places easily; 0, as in published models: none."""
    image_drop_prob: float = 0.1
    """How often training drops the image embedding (paper 2.1; its section 5.1 says 5%)."""
    text_drop_prob: float = 0.5
    """How often training drops the caption (paper 2.1)."""
    null_text: Literal["learned", "empty_prompt"] = "learned"
    """What stands for no caption: one learned token, or the encodings of the empty prompt, which
    the caller passes (Karlo)."""
    learned_variance: bool = False
    """The output has 6 channels: the prediction and the variance's interpolation."""

    def __post_init__(self) -> None:
        for name in ("image_embed_dim", "text_encodings_dim", "text_embed_dim"):
            width = getattr(self, name)
            if width is not None and width < 1:
                raise ValueError(f"decoder.{name} must be at least 1; got {width}: use CLIP's")
        for name in ("image_drop_prob", "text_drop_prob"):
            probability = getattr(self, name)
            if not 0 <= probability <= 1:
                raise ValueError(f"decoder.{name} must lie in [0, 1]; got {probability}: use 0.1")
        if self.embed_scale is not None and self.embed_scale <= 0:
            raise ValueError(
                f"decoder.embed_scale must be above 0; got {self.embed_scale}: use null or 1"
            )
        if self.layout_size < 0:
            raise ValueError(
                f"decoder.layout_size must not be negative; got {self.layout_size}: use 0 or 8"
            )
        if self.num_image_tokens < 0:
            raise ValueError(
                f"decoder.num_image_tokens must not be negative; got {self.num_image_tokens}: use 4"
            )
        if self.null_text not in ("learned", "empty_prompt"):
            raise ValueError(
                f"decoder.null_text must be 'learned' or 'empty_prompt'; got {self.null_text!r}: "
                f"use 'learned'"
            )
        if self.has_tokens and self.unet.context_dim is None:
            raise ValueError(
                "decoder.unet.context_dim must be set where the decoder has context tokens; got "
                "None: use 512, or num_image_tokens: 0 without text_encodings_dim"
            )
        if not self.has_tokens and self.unet.context_dim is not None:
            raise ValueError(
                f"decoder.unet.context_dim must be None where the decoder has no context tokens; "
                f"got {self.unet.context_dim}: drop it, or use num_image_tokens: 4"
            )
        out_channels = 6 if self.learned_variance else 3
        if self.unet.out_channels != out_channels:
            raise ValueError(
                f"decoder.unet.out_channels must be {out_channels} with learned_variance: "
                f"{str(self.learned_variance).lower()}; got {self.unet.out_channels}: "
                f"use {out_channels}"
            )

    @property
    def has_tokens(self) -> bool:
        """Whether attention reads any context token."""
        return self.num_image_tokens > 0 or self.text_encodings_dim is not None


class Decoder(nn.Module):
    """GLIDE's U-Net, told the image embedding twice: added to the timestep embedding, and as
    context tokens ahead of the caption's (paper 2.1)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = c = config
        self.unet = UNet(c.unet)
        emb_dim, context_dim = c.unet.emb_dim, c.unet.context_dim

        self.image_to_emb = nn.Linear(c.image_embed_dim, emb_dim)
        self.null_image_embed = nn.Parameter(torch.zeros(c.image_embed_dim))
        self.image_to_tokens = self.text_to_tokens = self.text_to_emb = None
        self.null_text_encoding = self.null_text_embed = None
        if c.num_image_tokens and context_dim is not None:
            self.image_to_tokens = nn.Linear(c.image_embed_dim, c.num_image_tokens * context_dim)
        if c.text_encodings_dim is not None and context_dim is not None:
            self.text_to_tokens = nn.Sequential(
                nn.Linear(c.text_encodings_dim, context_dim), nn.LayerNorm(context_dim)
            )
            if c.null_text == "learned":
                self.null_text_encoding = nn.Parameter(torch.empty(c.text_encodings_dim))
        if c.text_embed_dim is not None:
            self.text_to_emb = nn.Linear(c.text_embed_dim, emb_dim)
            if c.null_text == "learned":
                self.null_text_embed = nn.Parameter(torch.zeros(c.text_embed_dim))
        self.image_to_layout = None
        if c.layout_size:
            self.image_to_layout = nn.Sequential(
                nn.Linear(c.image_embed_dim, emb_dim),
                nn.SiLU(),
                nn.Linear(emb_dim, c.unet.width * c.layout_size**2),
            )
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """The trunk has initialised itself. The null embeddings start at the paper's zero; the
        null token starts at the scale of CLIP's encodings, because a LayerNorm follows it."""
        if self.null_text_encoding is not None:
            nn.init.normal_(self.null_text_encoding)

    def forward(self, x_t: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        """x_t: [B, 3, H, W]; timesteps: [B]; context: from `encode_context`.

        Returns [B, 3, H, W], or [B, 6, H, W] with a learned variance."""
        emb = self.unet.time_embed(timesteps) + context["emb"]  # [B, E]
        tokens, token_mask = context["tokens"], context["token_mask"]
        return self.unet(x_t, emb, tokens, token_mask, context["layout"])

    def encode_context(
        self,
        *,
        image_embed: Tensor,
        text_encodings: Tensor | None = None,
        text_mask: Tensor | None = None,
        text_embed: Tensor | None = None,
        drop_image: Tensor | None = None,
        drop_text: Tensor | None = None,
    ) -> Context:
        """Everything the network needs to know besides x_t and the timestep.

        image_embed: [B, image_embed_dim]; text_encodings: [B, N, text_encodings_dim]; text_mask:
        [B, N] bool, True = keep, None keeps all; text_embed: [B, text_embed_dim]; drop_image,
        drop_text: [B] bool, True = the row gets the null in its place.

        A dropped caption is one learned token, and no caption at all (None) is the same. With
        `null_text: empty_prompt` the caller passes the empty prompt's encodings instead, in the
        rows it drops, and `drop_text` is refused.

        Returns emb [B, E], tokens [B, M, C] (image tokens first), token_mask [B, M], and layout
        [B, width, h, w]; tokens and token_mask are None in a decoder without context tokens, layout
        in one with layout_size 0. Raises ValueError when a
        condition's width, presence or absence does not fit the configuration.
        """
        c = self.config
        check_width("image_embed", image_embed, "decoder.image_embed_dim", c.image_embed_dim)
        if c.null_text == "empty_prompt" and drop_text is not None:
            raise ValueError(
                "drop_text needs decoder.null_text: learned; got 'empty_prompt': pass the empty "
                "prompt's encodings in the rows to drop"
            )
        image_embed = drop(self.scaled(image_embed), drop_image, self.null_image_embed)  # [B, D]

        emb = self.image_to_emb(image_embed)  # [B, E]
        if self.text_to_emb is not None:
            emb = emb + self.text_to_emb(self.fill_text_embed(text_embed, drop_text, image_embed))

        tokens, masks = [], []
        if self.image_to_tokens is not None:
            # The token index is the fastest axis, as in Karlo's weights.
            image_tokens = rearrange(
                self.image_to_tokens(image_embed), "b (c m) -> b m c", m=c.num_image_tokens
            )
            tokens.append(image_tokens)
            masks.append(image_tokens.new_ones(image_tokens.shape[:2], dtype=torch.bool))
        if self.text_to_tokens is not None:
            text, text_mask = self.fill_text(text_encodings, text_mask, drop_text, image_embed)
            tokens.append(self.text_to_tokens(text))  # [B, N, C]
            masks.append(text_mask)
        elif text_encodings is not None:
            raise ValueError(
                "text_encodings must be None in a decoder without a caption; got "
                f"{tuple(text_encodings.shape)}: set decoder.text_encodings_dim, or leave it out"
            )
        return {
            "emb": emb,
            "tokens": torch.cat(tokens, dim=1) if tokens else None,  # [B, M, C]
            "token_mask": torch.cat(masks, dim=1) if masks else None,  # [B, M]
            "layout": self.layout(image_embed),
        }

    def scaled(self, embed: Tensor) -> Tensor:
        """An embedding of CLIP's [B, D] at the size that the layers are made for."""
        scale = self.config.embed_scale
        return embed * (embed.shape[-1] ** 0.5 if scale is None else scale)

    def layout(self, image_embed: Tensor) -> Tensor | None:
        """The coarse map [B, width, h, w] of scaled embeddings [B, D], as large as the grid."""
        if self.image_to_layout is None:
            return None
        side, grid = self.config.layout_size, self.config.unet.grids[0]
        coarse = rearrange(
            self.image_to_layout(image_embed), "b (c h w) -> b c h w", h=side, w=side
        )
        return F.interpolate(coarse, (grid, grid), mode="bilinear", align_corners=False)

    def null_context(self, *, image_embed: Tensor, **conditions: Any) -> Context:
        """The unconditional context, of the shapes `encode_context` gives the same arguments.

        With `null_text: empty_prompt`, pass the empty prompt's encodings."""
        everything = image_embed.new_ones(image_embed.shape[0], dtype=torch.bool)
        conditions["drop_image"] = everything
        if self.config.null_text == "learned":
            conditions["drop_text"] = everything
        return self.encode_context(image_embed=image_embed, **conditions)

    def fill_text(
        self,
        text_encodings: Tensor | None,
        text_mask: Tensor | None,
        drop_text: Tensor | None,
        like: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The caption's encodings and mask with the null where there is no caption."""
        null = self.null_text_encoding
        if text_encodings is None:
            if null is None:
                raise ValueError(
                    "text_encodings must be given where decoder.null_text is 'empty_prompt'; got "
                    "None: pass the empty prompt's encodings"
                )
            text = repeat(null, "d -> b 1 d", b=like.shape[0]).to(like.dtype)
            return text, text.new_ones(text.shape[:2], dtype=torch.bool)
        width = self.config.text_encodings_dim
        assert width is not None
        check_width("text_encodings", text_encodings, "decoder.text_encodings_dim", width)
        if text_mask is None:
            text_mask = text_encodings.new_ones(text_encodings.shape[:2], dtype=torch.bool)
        if drop_text is None or null is None:
            return text_encodings, text_mask
        only_first = torch.arange(text_mask.shape[1], device=text_mask.device) == 0
        return drop(text_encodings, drop_text, null), drop(text_mask, drop_text, only_first)

    def fill_text_embed(
        self, text_embed: Tensor | None, drop_text: Tensor | None, like: Tensor
    ) -> Tensor:
        """The text embedding with the null where there is no caption."""
        null, width = self.null_text_embed, self.config.text_embed_dim
        assert width is not None
        if text_embed is None:
            if null is None:
                raise ValueError(
                    "text_embed must be given where decoder.null_text is 'empty_prompt'; got "
                    "None: pass the empty prompt's embedding"
                )
            return repeat(null, "d -> b d", b=like.shape[0]).to(like.dtype)
        check_width("text_embed", text_embed, "decoder.text_embed_dim", width)
        text_embed = self.scaled(text_embed)
        return text_embed if null is None else drop(text_embed, drop_text, null)
