"""GLIDE's networks (Nichol et al. 2021): a caption's tokens straight to a picture, with a text
transformer of its own in each, plain, for upsampling, and for inpainting.

Shapes: B batch, N = context_length caption tokens, C text width, E timestep-embedding width, H W
picture, h w small picture.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.layers import AttentionBackend, Context, TransformerBlock
from unclip.models.unet import UNet, UNetConfig


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig:
    """Shape of the text transformer. The defaults are GLIDE's."""

    vocab_size: int = 50_257
    """Tokens there are; GLIDE's are GPT-2's."""
    context_length: int = 128
    """Tokens a caption is padded to."""
    width: int = 512
    """Width of the tokens, and of the U-Net's context."""
    depth: int = 16
    """Layers."""
    head_dim: int = 64
    """Width of an attention head."""
    attention_backend: AttentionBackend = "sdpa"
    """Torch's own attention, or xformers' when it is installed."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"glide.text.{name} must be at least 1; got {getattr(self, name)}")
        if self.head_dim < 1 or self.width % self.head_dim:
            raise ValueError(
                f"glide.text.head_dim must divide width; got {self.head_dim} for width "
                f"{self.width}: use 64 and a width that is a multiple of it"
            )


@dataclass(frozen=True, kw_only=True)
class GlideConfig:
    """A U-Net, its text transformer, and what else it is shown. The defaults are GLIDE's 64 px
    base network."""

    unet: UNetConfig = field(default_factory=lambda: UNetConfig(out_channels=6, context_dim=512))
    """The trunk."""
    text: TextTransformerConfig = field(default_factory=TextTransformerConfig)
    """What reads the caption."""
    scale: int | None = None
    """The output's side over the small picture's, for an upsampler; None: no small picture."""
    inpainting: bool = False
    """The network is shown a picture to be kept in part, and which part: 4 channels more."""
    text_drop_prob: float = 0.2
    """How often training drops the caption (GLIDE, section 4)."""
    learned_variance: bool = True
    """The output has 6 channels: the prediction and the variance's interpolation."""

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale < 1:
            raise ValueError(f"glide.scale must be at least 1 or null; got {self.scale}: use 4")
        if not 0 <= self.text_drop_prob <= 1:
            raise ValueError(
                f"glide.text_drop_prob must lie in [0, 1]; got {self.text_drop_prob}: use 0.2"
            )
        if self.unet.context_dim != self.text.width:
            raise ValueError(
                f"glide.unet.context_dim must be glide.text.width, {self.text.width}; got "
                f"{self.unet.context_dim}: use {self.text.width}"
            )
        channels = {
            "in_channels": 3 + 3 * (self.scale is not None) + 4 * self.inpainting,
            "out_channels": 6 if self.learned_variance else 3,
        }
        for name, count in channels.items():
            if getattr(self.unet, name) != count:
                raise ValueError(
                    f"glide.unet.{name} must be {count} (in: 3 of x_t, 3 with scale, 4 with "
                    "inpainting; out: 3, or 6 with learned_variance); got "
                    f"{getattr(self.unet, name)}: use {count}"
                )


class TextTransformer(nn.Module):
    """Caption tokens in, their encodings out; every token sees every other, padding included."""

    def __init__(self, config: TextTransformerConfig):
        super().__init__()
        c = config
        self.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.position_embedding = nn.Parameter(torch.empty(c.context_length, c.width))
        self.padding_embedding = nn.Parameter(torch.empty(c.context_length, c.width))
        self.blocks = nn.ModuleList(
            TransformerBlock(c.width, c.head_dim, backend=c.attention_backend)
            for _ in range(c.depth)
        )
        self.norm_out = nn.LayerNorm(c.width)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """GPT-2's scales for the embeddings; torch's defaults elsewhere."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        nn.init.normal_(self.padding_embedding, std=0.02)

    def forward(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """tokens: [B, N] ids; token_mask: [B, N] bool, True = a token, False = padding, which has
        an embedding of its own at each place. Returns [B, N, C]."""
        h = self.token_embedding(tokens) + self.position_embedding
        h = torch.where(token_mask[..., None], h, self.padding_embedding)
        for block in self.blocks:
            h, _, _ = block(h)
        return self.norm_out(h)


class Glide(nn.Module):
    """A U-Net told the caption twice: its last encoding is added to the timestep embedding, and all
    of them are context tokens, padding included. What it is shown besides joins x_t's channels."""

    def __init__(self, config: GlideConfig):
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        self.text = TextTransformer(config.text)
        self.text_to_emb = nn.Linear(config.text.width, config.unet.emb_dim)

    def forward(self, x_t: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        """x_t: [B, 3, H, W]; timesteps: [B]; context: from `encode_context`.

        Returns [B, 3, H, W], or [B, 6, H, W] with a learned variance. Raises ValueError when x_t
        has another size than what it is shown with."""
        emb = self.unet.time_embed(timesteps) + context["emb"]  # [B, E]
        shown = context["shown"]
        if shown is not None:
            if shown.shape[-2:] != x_t.shape[-2:]:
                raise ValueError(
                    f"x_t must be as large as the pictures it is shown with, "
                    f"{tuple(shown.shape[-2:])} px; got {tuple(x_t.shape[-2:])}: crop both alike"
                )
            x_t = torch.cat([x_t, shown.to(x_t.dtype)], dim=1)
        return self.unet(x_t, emb, context["tokens"])

    def encode_context(
        self,
        *,
        tokens: Tensor,
        token_mask: Tensor,
        low_res: Tensor | None = None,
        image: Tensor | None = None,
        keep: Tensor | None = None,
        drop_text: Tensor | None = None,
    ) -> Context:
        """Reads the caption and lines up what the network is shown, once for all timesteps.

        tokens: [B, N] ids; token_mask: [B, N] bool, True = a token; low_res: [B, 3, h, w] in
        [-1, 1], for an upsampler; image: [B, 3, H, W] in [-1, 1] and keep: [B, 1, H, W] bool, True
        = the pixel is known, for inpainting, where None is a picture nothing is known of;
        drop_text: [B] bool, True = the row goes without its caption: padding alone.

        Returns emb [B, E], tokens [B, N, C] and shown [B, 3 or 4 or 7, H, W], None in a plain
        network. Raises ValueError when low_res or image do not fit the configuration.
        """
        c = self.config
        if (low_res is None) != (c.scale is None):
            raise ValueError(
                "low_res must be given exactly where glide.scale is set; got "
                f"{'none' if low_res is None else 'one'} with scale {c.scale}"
            )
        if (image is not None or keep is not None) and not c.inpainting:
            raise ValueError(
                "image and keep need a network with glide.inpainting: true; got one without: take "
                "an inpainting checkpoint, or leave them out"
            )
        if drop_text is not None:
            token_mask = token_mask & ~drop_text[:, None]
        encodings = self.text(tokens, token_mask)  # [B, N, C]
        shown = []
        enlarged = None
        if low_res is not None and c.scale is not None:
            enlarged = F.interpolate(
                low_res.float(), scale_factor=c.scale, mode="bilinear", align_corners=False
            )
        if c.inpainting:
            shown += self._known(image, keep, tokens, enlarged)
        if enlarged is not None:
            shown.append(enlarged)
        return {
            "emb": self.text_to_emb(encodings[:, -1]),
            "tokens": encodings,
            "shown": torch.cat(shown, dim=1) if shown else None,
        }

    def _known(
        self, image: Tensor | None, keep: Tensor | None, tokens: Tensor, enlarged: Tensor | None
    ) -> list[Tensor]:
        """The known pixels [B, 3, H, W], zero elsewhere, and where they are [B, 1, H, W]."""
        if (image is None) != (keep is None):
            raise ValueError(
                "image and keep must be given together; got one of them: pass both, or neither to "
                "paint all of the picture"
            )
        if image is None or keep is None:
            side = self.config.unet.image_size
            height, width = (side, side) if enlarged is None else enlarged.shape[-2:]
            nothing = torch.zeros(len(tokens), 4, height, width, device=tokens.device)
            return [nothing]
        return [image * keep, keep.to(image.dtype)]

    def null_context(self, *, tokens: Tensor, **conditions: Tensor) -> Context:
        """The unconditional context, of the shapes `encode_context` gives the same arguments."""
        everything = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        return self.encode_context(tokens=tokens, drop_text=everything, **conditions)
