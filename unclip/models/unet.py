"""The U-Net trunk of guided-diffusion, GLIDE and Karlo (ADM, Dhariwal and Nichol 2021).

Shapes: B batch, C channels, H W picture, h w grid after folding (H / patch_size), E = 4 * width
timestep-embedding width, M context tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unclip.models.layers import (
    AttentionBackend,
    AttentionBlock,
    ResBlock,
    TimeEmbedding,
    fold,
    norm,
    unfold,
)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of the trunk. The defaults are GLIDE's 64 px U-Net."""

    image_size: int = 64
    """Side of the picture in pixels. It places the attention; without attention or position
    embedding the network runs at any size."""
    in_channels: int = 3
    """Channels of the input picture, before folding."""
    out_channels: int = 3
    """Channels of the output picture, before folding: 6 with a learned variance."""
    width: int = 192
    """Channels at the finest level."""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    """Each level's channels over `width`; the grid halves from level to level."""
    num_res_blocks: int = 3
    """Residual blocks a level on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    """Sides of the grids, after folding, that have attention. Empty: none, the middle included."""
    head_dim: int = 64
    """Width of an attention head."""
    dropout: float = 0.1
    """Dropout inside the residual blocks."""
    scale_shift: bool = True
    """The embedding scales and shifts the second norm; False adds it ahead of it (Karlo's
    upsamplers)."""
    patch_size: Literal[1, 2, 4] = 1
    """Folds patches of this side into channels, for small computers."""
    context_dim: int | None = None
    """Width of the context tokens attention reads; None: self-attention only."""
    position_embedding: bool = False
    """A learned map added after the input convolution, so that a small decoder finds places
    easily. Off in published models; ties the network to `image_size`."""
    attention_backend: AttentionBackend = "sdpa"
    """Torch's own attention, or xformers' when it is installed."""
    checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        for name in ("image_size", "in_channels", "out_channels", "width", "num_res_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"unet.{name} must be at least 1; got {getattr(self, name)}")
        if self.width % 2:
            raise ValueError(f"unet.width must be even; got {self.width}: use {self.width + 1}")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(
                f"unet.channel_mult must name at least one level, each at least 1; "
                f"got {self.channel_mult}: use (1, 2)"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"unet.dropout must lie in [0, 1); got {self.dropout}: use 0.1")
        if self.patch_size not in (1, 2, 4):
            raise ValueError(f"unet.patch_size must be 1, 2 or 4; got {self.patch_size}: use 1")
        if self.attention_backend not in ("sdpa", "xformers"):
            raise ValueError(
                f"unet.attention_backend must be 'sdpa' or 'xformers'; "
                f"got {self.attention_backend!r}: use 'sdpa'"
            )
        if self.image_size % self.size_multiple:
            next_size = self.image_size + -self.image_size % self.size_multiple
            raise ValueError(
                f"unet.image_size must be a multiple of {self.size_multiple} (patch_size "
                f"{self.patch_size}, halved {len(self.channel_mult) - 1} times); "
                f"got {self.image_size}: use {next_size}"
            )
        for resolution in self.attention_resolutions:
            if resolution not in self.grids:
                raise ValueError(
                    f"unet.attention_resolutions must be among the grids {self.grids} "
                    f"(image_size / patch_size, halved at each level); got {resolution}: "
                    f"use {min(self.grids, key=lambda grid: abs(grid - resolution))}"
                )
        for channels in self.attention_channels:
            if self.head_dim < 1 or channels % self.head_dim:
                fits = [
                    d for d in range(8, 129, 8) if all(c % d == 0 for c in self.attention_channels)
                ]
                raise ValueError(
                    f"unet.head_dim must divide the channels at every attention level; "
                    f"got {self.head_dim} for {channels} channels: use "
                    f"{' or '.join(map(str, fits[-2:])) or 'a width that is a multiple of 8'}"
                )
        if self.context_dim is not None and not self.attention_resolutions:
            raise ValueError(
                f"unet.context_dim must be None in a network without attention; "
                f"got {self.context_dim}: set attention_resolutions, or drop context_dim"
            )

    @property
    def size_multiple(self) -> int:
        """The sides of every input picture must be multiples of this."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)

    @property
    def grids(self) -> tuple[int, ...]:
        """Side of the grid at each level, finest first."""
        return tuple(self.image_size // self.patch_size >> i for i in range(len(self.channel_mult)))

    @property
    def attention_channels(self) -> tuple[int, ...]:
        """Channels wherever there is attention; the last is the middle's."""
        if not self.attention_resolutions:
            return ()
        levels = zip(self.grids, self.channel_mult, strict=True)
        at_levels = [self.width * m for grid, m in levels if grid in self.attention_resolutions]
        return (*at_levels, self.width * self.channel_mult[-1])

    @property
    def emb_dim(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.width


class UNetBlock(nn.Module):
    """One step of the trunk: a residual block, then attention and upsampling where it has them."""

    def __init__(
        self, res: ResBlock, attention: AttentionBlock | None = None, up: ResBlock | None = None
    ):
        super().__init__()
        self.res, self.attention, self.up = res, attention, up

    def forward(
        self, x: Tensor, emb: Tensor, tokens: Tensor | None, token_mask: Tensor | None
    ) -> Tensor:
        x = self.res(x, emb)
        if self.attention is not None:
            x = self.attention(x, tokens, token_mask)
        return x if self.up is None else self.up(x, emb)


class UNet(nn.Module):
    """Picture, embedding and context tokens in, picture out.

    `down` and `up` are flat lists in guided-diffusion's order: its `input_blocks.{i + 1}` is
    `down[i]` (0 is `conv_in`) and its `output_blocks.{i}` is `up[i]`.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = c = config
        patch_area = c.patch_size**2

        def res(
            channels: int, out_channels: int, resample: Literal["up", "down"] | None = None
        ) -> ResBlock:
            return ResBlock(
                channels,
                out_channels,
                c.emb_dim,
                dropout=c.dropout,
                scale_shift=c.scale_shift,
                resample=resample,
            )

        def attend(channels: int) -> AttentionBlock:
            return AttentionBlock(channels, c.head_dim, c.context_dim, c.attention_backend)

        self.time_embed = TimeEmbedding(c.width, c.emb_dim)
        self.conv_in = nn.Conv2d(c.in_channels * patch_area, c.width, 3, padding=1)
        self.position_embedding = None
        if c.position_embedding:
            self.position_embedding = nn.Parameter(torch.empty(c.width, c.grids[0], c.grids[0]))

        channels, skips = c.width, [c.width]
        levels = list(zip(c.grids, (c.width * m for m in c.channel_mult), strict=True))

        self.down = nn.ModuleList()
        for grid, level_channels in levels:
            attended = grid in c.attention_resolutions
            for _ in range(c.num_res_blocks):
                block = res(channels, level_channels)
                channels = level_channels
                self.down.append(UNetBlock(block, attend(channels) if attended else None))
                skips.append(channels)
            if grid != c.grids[-1]:
                self.down.append(UNetBlock(res(channels, channels, resample="down")))
                skips.append(channels)

        middle = attend(channels) if c.attention_resolutions else None
        self.middle = nn.ModuleList(
            [UNetBlock(res(channels, channels), middle), UNetBlock(res(channels, channels))]
        )

        self.up = nn.ModuleList()
        for grid, level_channels in reversed(levels):
            attended = grid in c.attention_resolutions
            for i in range(c.num_res_blocks + 1):
                block = res(channels + skips.pop(), level_channels)
                channels = level_channels
                last = i == c.num_res_blocks and grid != c.grids[0]
                upsample = res(channels, channels, resample="up") if last else None
                self.up.append(UNetBlock(block, attend(channels) if attended else None, upsample))

        self.norm_out = norm(channels)
        self.conv_out = nn.Conv2d(channels, c.out_channels * patch_area, 3, padding=1)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Torch's defaults, save that every residual branch and the output start at zero, so that
        the untrained network is the identity of its skips (as in guided-diffusion)."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                zero(module.conv2)
            elif isinstance(module, AttentionBlock):
                zero(module.proj)
        zero(self.conv_out)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding, std=0.02)

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        layout: Tensor | None = None,
    ) -> Tensor:
        """x: [B, in_channels, H, W], H and W multiples of `config.size_multiple`; emb: [B, E],
        from `time_embed(timesteps)` and whatever is added to it; tokens: [B, M, context_dim];
        token_mask: [B, M] bool, True = keep; layout: [B, width, h, w], added after the input
        convolution. Returns [B, out_channels, H, W].

        Raises ValueError when the picture's size does not fit.
        """
        self.check_size(x)
        h = self.conv_in(fold(x, self.config.patch_size))  # [B, C, h, w]
        if self.position_embedding is not None:
            h = h + self.position_embedding.to(h.dtype)  # or autocast would go on in fp32
        if layout is not None:
            h = h + layout.to(h.dtype)

        skips = [h]
        for block in self.down:
            h = self.run(block, h, emb, tokens, token_mask)
            skips.append(h)
        for block in self.middle:
            h = self.run(block, h, emb, tokens, token_mask)
        for block in self.up:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), emb, tokens, token_mask)

        h = self.conv_out(nn.functional.silu(self.norm_out(h)))
        return unfold(h, self.config.patch_size)  # [B, out_channels, H, W]

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.config.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def check_size(self, x: Tensor) -> None:
        c, (height, width) = self.config, x.shape[-2:]
        if c.position_embedding and (height, width) != (c.image_size, c.image_size):
            raise ValueError(
                f"a U-Net with a position embedding takes {c.image_size} x {c.image_size} px; "
                f"got {height} x {width}: resize, or build it with position_embedding: false"
            )
        if height % c.size_multiple or width % c.size_multiple:
            raise ValueError(
                f"the sides of a picture must be multiples of {c.size_multiple} px for this U-Net; "
                f"got {height} x {width}: crop or pad it"
            )


def zero(module: nn.Linear | nn.Conv2d) -> None:
    """Sets a layer's weight and bias to zero."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
