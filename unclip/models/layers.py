"""The pieces all networks are made of.

Shapes: B batch, C channels, H W picture grid, N queries or picture tokens (N = H * W), M context
tokens, A attention heads, D head width, E timestep-embedding width.
"""

import importlib
import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

AttentionBackend = Literal["sdpa", "xformers"]
Context = dict[str, Tensor | None]
"""What ``encode_context`` returns: every tensor has the batch first; None marks an absent part."""


# ---------------------------------------------------------------------------------- timesteps


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of the timestep at geometrically spaced frequencies, cosines first.

    timesteps: [B], integer or fractional. dim: even. Returns [B, dim] in fp32 whatever the input's
    type: bf16 cannot tell timestep 997 from 1000.
    """
    if dim % 2:
        raise ValueError(f"timestep_embedding: dim must be even; got {dim}: use {dim + 1}")
    steps = torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * steps / (dim // 2))
    angles = timesteps.float()[:, None] * frequencies  # [B, dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, dim]


class TimeEmbedding(nn.Sequential):
    """Sinusoid, then a two-layer MLP: [B] -> [B, out_dim]."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__(nn.Linear(dim, out_dim), nn.SiLU(), nn.Linear(out_dim, out_dim))
        self.dim = dim

    def forward(self, timesteps: Tensor) -> Tensor:
        weight_dtype = next(self.parameters()).dtype
        return super().forward(timestep_embedding(timesteps, self.dim).to(weight_dtype))


# ---------------------------------------------------------------------------------- attention


def require_backend(backend: AttentionBackend) -> None:
    """Raises ImportError when xformers is asked for and missing: never a silent fallback."""
    if backend == "xformers":
        try:
            importlib.import_module("xformers.ops")
        except ImportError as error:
            raise ImportError(
                "attention_backend is 'xformers' but xformers cannot be imported: "
                'pip install "unclip[xformers]", or set attention_backend: sdpa'
            ) from error


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    backend: AttentionBackend = "sdpa",
) -> Tensor:
    """Scaled dot-product attention, scale D ** -0.5.

    q: [B, A, N, D]; k, v: [B, A, M, D]; mask: bool, broadcastable to [B, A, N, M], True = keep.
    Every query must keep at least one key. Returns [B, A, N, D].
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    require_backend(backend)
    xops = importlib.import_module("xformers.ops")
    bias = None
    if mask is not None:
        B, A, N, M = *q.shape[:3], k.shape[2]
        # The kernels want a bias of full shape whose rows start at multiples of 8.
        bias = q.new_zeros(B, A, N, -(-M // 8) * 8)[..., :M]
        bias.masked_fill_(~mask, float("-inf"))
    q, k, v = (rearrange(x, "b a n d -> b n a d") for x in (q, k, v))
    out: Tensor = xops.memory_efficient_attention(q, k, v, attn_bias=bias)  # [B, N, A, D]
    return rearrange(out, "b n a d -> b a n d")


def split_heads(qkv: Tensor, head_dim: int, parts: int) -> tuple[Tensor, ...]:
    """[B, N, A * parts * D] -> parts x [B, A, N, D].

    Rows are grouped per head, [q_0, k_0, v_0, q_1, ...], as in guided-diffusion, GLIDE and Karlo.
    """
    return rearrange(qkv, "b n (a p d) -> p b a n d", p=parts, d=head_dim).unbind(0)


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, eps 1e-5; of the largest power of two that divides a width 32 does
    not. So every published width has exactly 32."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-5)


class AttentionBlock(nn.Module):
    """Self-attention over the picture's positions, which also attend to the context tokens.

    The context's keys come first; the residual is added inside. A Linear on [B, N, C] is a 1x1
    convolution, and under channels_last getting there costs no copy.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int,
        context_dim: int | None = None,
        backend: AttentionBackend = "sdpa",
    ):
        super().__init__()
        require_backend(backend)
        self.head_dim, self.backend = head_dim, backend
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = None if context_dim is None else nn.Linear(context_dim, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(
        self, x: Tensor, tokens: Tensor | None = None, token_mask: Tensor | None = None
    ) -> Tensor:
        """x: [B, C, H, W]; tokens: [B, M, context_dim]; token_mask: [B, M] bool, True = keep."""
        height = x.shape[-2]
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")  # [B, N, C]
        q, k, v = split_heads(self.qkv(h), self.head_dim, 3)  # [B, A, N, D]
        mask = None
        if self.context_kv is not None and tokens is not None:
            context_k, context_v = split_heads(self.context_kv(tokens), self.head_dim, 2)
            k = torch.cat([context_k, k], dim=2)  # [B, A, M + N, D]
            v = torch.cat([context_v, v], dim=2)
            if token_mask is not None:  # the picture's own positions are always kept
                mask = F.pad(token_mask, (0, h.shape[1]), value=True)[:, None, None, :]
        h = attention(q, k, v, mask, self.backend)  # [B, A, N, D]
        h = self.proj(rearrange(h, "b a n d -> b n (a d)"))  # [B, N, C]
        return x + rearrange(h, "b (h w) c -> b c h w", h=height)


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP over a sequence. Earlier tokens enter as keys and values alone."""

    def __init__(
        self,
        width: int,
        head_dim: int,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        backend: AttentionBackend = "sdpa",
    ):
        super().__init__()
        require_backend(backend)
        hidden = mlp_ratio * width
        self.head_dim, self.backend = head_dim, backend
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)  # rows grouped per head: [q_0, k_0, v_0, q_1, ...]
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, N, C], N new tokens; past: keys and values of the M tokens before them,
        [B, A, M, D] each; mask: [B, 1, N, M + N] bool, True = keep, None keeps all.

        Returns the new tokens [B, N, C] and their own keys and values [B, A, N, D]."""
        q, k, v = split_heads(self.qkv(self.norm1(x)), self.head_dim, 3)  # [B, A, N, D]
        keys, values = k, v
        if past is not None:
            keys = torch.cat([past[0].to(k.dtype), k], dim=2)  # [B, A, M + N, D]
            values = torch.cat([past[1].to(v.dtype), v], dim=2)
        h = attention(q, keys, values, mask, self.backend)
        x = x + self.dropout(self.proj(rearrange(h, "b a n d -> b n (a d)")))  # [B, N, C]
        return x + self.dropout(self.mlp(self.norm2(x))), k, v


# ------------------------------------------------------------------------------- convolutions


class ResBlock(nn.Module):
    """The residual block of ADM (Dhariwal and Nichol 2021), conditioned on the embedding.

    norm, SiLU, resample, conv, norm * (1 + scale) + shift, SiLU, dropout, conv; the skip path is
    resampled alike. Resampling has no weights: average pooling down, nearest neighbour up.
    Without `scale_shift` the embedding is added before the second norm, as in Karlo's upsamplers.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_dim: int,
        *,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resample: Literal["up", "down"] | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample_to = scale_shift, resample
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, (2 if scale_shift else 1) * out_channels)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip: nn.Module = nn.Identity()
        if channels != out_channels:
            self.skip = nn.Conv2d(channels, out_channels, 1)

    def resample(self, x: Tensor) -> Tensor:
        if self.resample_to == "down":
            return F.avg_pool2d(x, 2)
        if self.resample_to == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, C, H, W]; emb: [B, E]. Returns [B, out_channels, H', W']."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        condition = self.emb(F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + condition)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(self.resample(x)) + h


def fold(x: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, C * p * p, H / p, W / p]: pixels become channels."""
    if patch_size == 1:
        return x
    return rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=patch_size, q=patch_size)


def unfold(x: Tensor, patch_size: int) -> Tensor:
    """[B, C * p * p, H, W] -> [B, C, H * p, W * p]: the inverse of `fold`."""
    if patch_size == 1:
        return x
    return rearrange(x, "b (c p q) h w -> b c (h p) (w q)", p=patch_size, q=patch_size)


# --------------------------------------------------------------------------- checks on inputs


def check_width(name: str, x: Tensor, field: str, width: int) -> None:
    """Raises ValueError unless the last axis of `x` has the width the network was built for."""
    if x.shape[-1] != width:
        raise ValueError(
            f"{name} must be {width} wide ({field}); got {x.shape[-1]}: it probably comes from "
            f"another CLIP. Use the CLIP this network was trained with, or train one with "
            f"{field}: {x.shape[-1]}"
        )


def drop(x: Tensor, dropped: Tensor | None, null: Tensor) -> Tensor:
    """Replaces the rows of `x` [B, ...] that `dropped` [B] marks by `null`, broadcast."""
    if dropped is None:
        return x
    keep_shape = (-1,) + (1,) * (x.dim() - 1)
    return torch.where(dropped.view(keep_shape), null.to(x.dtype), x)
