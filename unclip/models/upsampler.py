"""The upsamplers: a small picture to one `scale` times larger (paper 2.1, Table 3).

Shapes: B batch, h w small picture, H W = scale * (h, w), E timestep-embedding width.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.layers import Context, TimeEmbedding
from unclip.models.unet import UNet, UNetConfig


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """A U-Net without attention and the picture it enlarges. The defaults are Table 3's
    64 -> 256."""

    unet: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            image_size=256, in_channels=6, width=320, attention_resolutions=()
        )
    )
    """The trunk: 6 channels in (x_t and the enlarged small picture), no attention."""
    scale: int = 4
    """The output's side over the input's."""
    noise_conditioning: bool = False
    """The network is told how much noise was added to the small picture."""
    learned_variance: bool = False
    """The output has 6 channels: the prediction and the variance's interpolation."""

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"upsampler.scale must be at least 1; got {self.scale}: use 4")
        out_channels = 6 if self.learned_variance else 3
        for name, channels in (("in_channels", 6), ("out_channels", out_channels)):
            if getattr(self.unet, name) != channels:
                raise ValueError(
                    f"upsampler.unet.{name} must be {channels} (in: 3 of x_t, 3 of the small "
                    f"picture; out: 3, or 6 with learned_variance); "
                    f"got {getattr(self.unet, name)}: use {channels}"
                )
        if self.unet.attention_resolutions or self.unet.position_embedding:
            raise ValueError(
                "upsampler.unet must have neither attention nor a position embedding, because it "
                "trains on crops and runs on whole pictures; got attention_resolutions "
                f"{self.unet.attention_resolutions}, position_embedding "
                f"{self.unet.position_embedding}: use () and false"
            )


class Upsampler(nn.Module):
    """An ADM U-Net on x_t and the enlarged small picture, convolutions only: trained on crops,
    run on whole pictures of any size."""

    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        self.noise_embed = None
        if config.noise_conditioning:
            self.noise_embed = TimeEmbedding(config.unet.width, config.unet.emb_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Nothing beyond the trunk, which has initialised itself."""

    def forward(self, x_t: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        """x_t: [B, 3, H, W]; timesteps: [B]; context: from `encode_context`.

        Returns [B, 3, H, W], or [B, 6, H, W] with a learned variance. Raises ValueError when x_t
        is not `scale` times the small picture."""
        low_res, noise_emb = context["low_res"], context["noise_emb"]
        assert low_res is not None
        if x_t.shape[-2:] != low_res.shape[-2:]:
            raise ValueError(
                f"x_t must be upsampler.scale = {self.config.scale} times the small picture, "
                f"{tuple(low_res.shape[-2:])} px; got {tuple(x_t.shape[-2:])}: crop both alike"
            )
        emb = self.unet.time_embed(timesteps)  # [B, E]
        if noise_emb is not None:
            emb = emb + noise_emb
        return self.unet(torch.cat([x_t, low_res.to(x_t.dtype)], dim=1), emb)

    def encode_context(self, *, low_res: Tensor, noise_level: Tensor | None = None) -> Context:
        """Enlarges the small picture once for the whole sampling run.

        low_res: [B, 3, h, w] in [-1, 1], corrupted or not by the caller; noise_level: [B] in
        [0, 1], how much noise the caller added to it (with `noise_conditioning` only).

        Returns low_res [B, 3, H, W], which may overshoot [-1, 1] a little, and noise_emb [B, E] or
        None. Raises ValueError when noise_level does not fit the configuration.
        """
        if (noise_level is None) == self.config.noise_conditioning:
            raise ValueError(
                f"noise_level must be given exactly when upsampler.noise_conditioning is true; got "
                f"noise_level {noise_level} with noise_conditioning: "
                f"{str(self.config.noise_conditioning).lower()}: pass zeros, or leave it out"
            )
        noise_emb = None
        if self.noise_embed is not None and noise_level is not None:
            # A level of 1 sits where the sinusoids have timestep 1000.
            noise_emb = self.noise_embed(1000 * noise_level)  # [B, E]
        # `antialias` changes nothing in enlarging but the cubic's constant: Pillow's -0.5.
        enlarged = F.interpolate(
            low_res.float(),
            scale_factor=self.config.scale,
            mode="bicubic",
            align_corners=False,
            antialias=True,
        ).to(low_res.dtype)
        return {"low_res": enlarged, "noise_emb": noise_emb}  # [B, 3, H, W]
