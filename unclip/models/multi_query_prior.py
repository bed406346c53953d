"""DALLE2-pytorch's network for the diffusion prior, so that its published checkpoints run here.

Like `PriorTransformer` a causal transformer over the caption, z_t, the timestep, the noised z_i and
a learned final token, of another make: multi-query attention (Shazeer 2019) with a learned null
key, rotary and T5 relative positions, SwiGLU, and norms without bias on both sides of attention.
What changed between its releases is a field of the config each.

Shapes: B batch, N caption tokens, M = max_text_len, P prefix tokens (caption and z_t), T tokens of
a step (timestep, noised z_i, the estimate before, final), L layers, A heads, K head width, D width.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from unclip.models.layers import Context, check_width, drop

TimeTokens = Literal["table", "sinusoid", "truncated_sinusoid"]
Similarity = Literal["cosine", "dot"]
NormOut = Literal["rescaled", "plain", "none"]
Padding = Literal["learned", "masked"]
NullCondition = Literal["learned", "keeps_text_embed", "masked", "absent"]

COSINE_SCALE = 16.0
NUM_BUCKETS, MAX_DISTANCE = 32, 128  # T5's (Raffel et al. 2020, section 2.1)
MAX_ROTARY_DIM = 32


@dataclass(frozen=True, kw_only=True)
class MultiQueryPriorConfig:
    """Shape of the network. The defaults are LAION's prior for ViT-L/14, at DALLE2-pytorch 1.15."""

    embed_dim: int = 768
    """One width for all: text_embed, image_embed, the caption's token encodings, the network."""
    max_text_len: int = 77
    """Caption tokens; shorter captions are padded to it, because positions count from the first."""
    depth: int = 12
    """Layers."""
    num_heads: int = 12
    """Heads of queries; they share one head of keys and values."""
    head_dim: int = 64
    """Width of a head; the heads together need not be `embed_dim` wide."""
    mlp_ratio: int = 4
    """Width of the MLP's hidden layer over `embed_dim`."""
    num_text_embed_tokens: int = 1
    """Tokens that text_embed becomes."""
    num_time_tokens: int = 1
    """Tokens that the timestep becomes."""
    num_image_embed_tokens: int = 1
    """Tokens that the noised image_embed becomes."""
    time_tokens: TimeTokens = "table"
    """The timestep as a row of a learned table, or as a sinusoid through an MLP. From 0.16.9 to
    1.10.8 the sinusoid was cut to whole numbers, a slip that its weights have learned with."""
    num_timesteps: int = 1000
    """Rows of the table of timesteps."""
    similarity: Similarity = "cosine"
    """Of a query and a key: 16 times their cosine (1.4.3 on), or the scaled dot product."""
    position_bias_scale: float = 1.0
    """What the relative position bias is multiplied by: 128 from 0.23.3 to 1.4.2, else 1."""
    rotary: bool = True
    """Rotary positions on the first 32 channels of queries and keys, beside the relative bias."""
    normformer: bool = True
    """A norm inside the MLP, behind its activation (Shleifer et al. 2021)."""
    norm_in: bool = False
    """A norm on the tokens before the first layer."""
    norm_out: NormOut = "rescaled"
    """The norm behind the last layer. `rescaled` divides by the largest channel first (0.23.3 on):
    that moves the norm's epsilon, and turns the sign where all channels are negative."""
    project_out: bool = True
    """A linear layer at the very end."""
    padding: Padding = "learned"
    """Padding as learned tokens, one a position, that attention sees (0.23.0 on), or masked out."""
    null_condition: NullCondition = "learned"
    """What the unconditional pass of guidance sees. `learned`: learned captions, text_embed and
    noised image_embed. `keeps_text_embed`: the same but for text_embed (1.9.0 to 1.10.3). `masked`:
    the image_embed alone (with `padding: masked`). `absent`: it was never trained (always so from
    0.23.3 to 1.8), and guidance is refused."""
    reads_text_encodings: bool = True
    """Whether the caption's token encodings are read; else text_embed is the whole condition."""
    self_conditioning: bool = False
    """A token for the x_0 estimate of the step before (Chen et al. 2022)."""
    attn_dropout: float = 0.0
    """Dropout on the attention weights."""
    mlp_dropout: float = 0.0
    """Dropout on the MLP's hidden layer."""
    text_drop_prob: float = 0.1
    """How often training takes the null condition."""

    @property
    def null_text(self) -> Literal["learned"]:
        """What stands for no caption: parameters of its own (see `null_condition`)."""
        return "learned"

    @property
    def text_encodings_dim(self) -> int:
        """Width of the caption's token encodings."""
        return self.embed_dim

    def __post_init__(self) -> None:
        counts = ["embed_dim", "max_text_len", "depth", "num_heads", "head_dim", "mlp_ratio"]
        counts += ["num_text_embed_tokens", "num_time_tokens", "num_image_embed_tokens"]
        for name in [*counts, "num_timesteps"]:
            if getattr(self, name) < 1:
                raise ValueError(f"prior.{name} must be at least 1; got {getattr(self, name)}")
        if self.rotary and self.head_dim % 2:
            raise ValueError(
                f"prior.head_dim must be even with prior.rotary; got {self.head_dim}: "
                f"use {self.head_dim + 1}"
            )
        if self.time_tokens != "table" and (self.embed_dim % 2 or self.embed_dim < 4):
            raise ValueError(
                f"prior.embed_dim must be even and at least 4 with prior.time_tokens "
                f"{self.time_tokens!r}; got {self.embed_dim}: use prior.time_tokens: table"
            )
        if not self.position_bias_scale > 0:
            raise ValueError(
                "prior.position_bias_scale must be positive; "
                f"got {self.position_bias_scale}: use 1, or 128 for DALLE2-pytorch 0.23.3 to 1.4.2"
            )
        for name in ("attn_dropout", "mlp_dropout", "text_drop_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"prior.{name} must lie in [0, 1); got {getattr(self, name)}: use 0.05"
                )
        choices: dict[str, Any] = {"time_tokens": TimeTokens, "similarity": Similarity}
        choices |= {"norm_out": NormOut, "padding": Padding, "null_condition": NullCondition}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise ValueError(
                    f"prior.{name} must be one of {', '.join(get_args(choice))}; "
                    f"got {getattr(self, name)!r}: use {get_args(choice)[0]!r}"
                )
        masked = self.padding == "masked"
        if self.null_condition != "absent" and masked != (self.null_condition == "masked"):
            raise ValueError(
                "prior.null_condition must be 'masked' exactly where prior.padding is; got "
                f"{self.null_condition!r} with padding {self.padding!r}: "
                f"use {'masked' if masked else 'learned'!r}"
            )
        if masked and not self.reads_text_encodings:
            raise ValueError(
                "prior.reads_text_encodings must be true with prior.padding 'masked'; got false: "
                "use prior.padding: learned"
            )
        if self.null_condition == "absent" and self.text_drop_prob:
            raise ValueError(
                "prior.text_drop_prob must be 0 with prior.null_condition 'absent'; "
                f"got {self.text_drop_prob}: there is nothing to put in the caption's place"
            )


class MultiQueryBlock(nn.Module):
    """Attention and MLP, both residual. Earlier tokens enter as keys and values alone."""

    def __init__(self, config: MultiQueryPriorConfig):
        super().__init__()
        c, width = config, config.embed_dim
        inner, hidden = c.num_heads * c.head_dim, c.mlp_ratio * c.embed_dim
        self.config = config
        self.norm1 = _norm(width)
        self.to_q = nn.Linear(width, inner, bias=False)  # rows grouped per head
        self.to_kv = nn.Linear(width, 2 * c.head_dim, bias=False)  # the key's rows, the value's
        self.null_kv = nn.Parameter(torch.empty(2, c.head_dim))
        self.proj = nn.Linear(inner, width, bias=False)
        self.norm_attn = _norm(width)
        self.norm2 = _norm(width)
        self.mlp_in = nn.Linear(width, 2 * hidden, bias=False)  # the values' rows, the gates'
        self.norm_mlp = _norm(hidden) if c.normformer else nn.Identity()
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def null_past(self, batch: int) -> Tensor:
        """What stands before the first token: [B, 2, 1, K], the null key and value."""
        key, value = self.null_kv
        if self.config.similarity == "cosine":
            key = F.normalize(key, dim=-1)
        return repeat(torch.stack([key, value]), "p k -> b p 1 k", b=batch)

    def forward(
        self, x: Tensor, bias: Tensor, angles: Tensor | None, past: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x: [B, T, D] new tokens; bias: [1 or B, A, T, S + T], -inf where a key is not seen;
        angles: [T, R], R rotated channels; past: [B, 2, S, K], keys and values before the tokens.

        Returns the new tokens [B, T, D] and the past with theirs behind it, [B, 2, S + T, K]."""
        c = self.config
        h = self.norm1(x)
        q = rearrange(self.to_q(h), "b t (a k) -> b a t k", k=c.head_dim)
        k, v = self.to_kv(h).chunk(2, dim=-1)  # [B, T, K]
        if angles is not None:
            q, k = _rotate(q, angles), _rotate(k, angles)
        scale = c.head_dim**-0.5
        if c.similarity == "cosine":
            q, k, scale = F.normalize(q, dim=-1), F.normalize(k, dim=-1), COSINE_SCALE
        past = torch.cat([past.to(v.dtype), torch.stack([k.to(v.dtype), v], dim=1)], dim=2)
        keys, values = repeat(past, "b p s k -> p b a s k", a=c.num_heads).unbind(0)
        h = F.scaled_dot_product_attention(
            q.to(v.dtype),
            keys,
            values,
            attn_mask=bias.to(v.dtype),
            dropout_p=c.attn_dropout if self.training else 0.0,
            scale=scale,
        )  # [B, A, T, K]
        x = x + self.norm_attn(self.proj(rearrange(h, "b a t k -> b t (a k)")))  # [B, T, D]
        value, gate = self.mlp_in(self.norm2(x)).chunk(2, dim=-1)
        h = F.dropout(self.norm_mlp(value * F.silu(gate)), c.mlp_dropout, self.training)
        return x + self.mlp_out(h), past


class MultiQueryPrior(nn.Module):
    """Noised image embedding in, prediction out; the interface is `PriorTransformer`'s.

    As there, the caption and z_t are blind to what follows them, and the position bias depends on
    the two positions alone: `encode_context` runs them once and keeps their keys and values (one
    head of them, so the context is small), and `forward` runs the remaining tokens.

    The unconditional pass replaces the noised image_embed too (`null_condition: learned`), so its
    output is a function of the timestep alone: in this network guidance pushes away from what it
    would say without any input.
    """

    relative_positions: Tensor

    def __init__(self, config: MultiQueryPriorConfig):
        super().__init__()
        self.config = c = config
        D = c.embed_dim
        self.text_embed_in = _tokens_in(D, c.num_text_embed_tokens)
        self.image_embed_in = _tokens_in(D, c.num_image_embed_tokens)
        self.time_embed: nn.Module
        if c.time_tokens == "table":
            self.time_embed = nn.Embedding(c.num_timesteps, D * c.num_time_tokens)
        else:
            truncate = c.time_tokens == "truncated_sinusoid"
            self.time_embed = SinusoidTokens(D, D * c.num_time_tokens, truncate)
        self.final_token = nn.Parameter(torch.empty(D))
        self.null_text_encodings = self.null_text_embed = self.null_image_embed = None
        if c.padding == "learned":
            self.null_text_encodings = nn.Parameter(torch.empty(c.max_text_len, D))
        if c.null_condition == "learned":
            self.null_text_embed = nn.Parameter(torch.empty(c.num_text_embed_tokens, D))
        if c.null_condition in ("learned", "keeps_text_embed"):
            self.null_image_embed = nn.Parameter(torch.empty(D))
        self.position_bias = nn.Embedding(NUM_BUCKETS, c.num_heads)
        self.norm_in = _norm(D) if c.norm_in else nn.Identity()
        self.blocks = nn.ModuleList(MultiQueryBlock(c) for _ in range(c.depth))
        self.norm_out = nn.Identity() if c.norm_out == "none" else _norm(D)
        self.out = nn.Linear(D, D, bias=False) if c.project_out else nn.Identity()

        self.num_prefix_tokens = c.max_text_len + c.num_text_embed_tokens
        num_tokens = self.num_prefix_tokens + c.num_time_tokens + c.num_image_embed_tokens
        num_tokens += 1 + c.self_conditioning
        with torch.device("cpu"):  # no checkpoint has it: it is needed even where weights are not
            buckets = _buckets(num_tokens)
        self.register_buffer("relative_positions", buckets, persistent=False)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Linear layers keep the variance of what they read; learned tokens are N(0, 1), like the
        noised image_embed among which they stand."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.position_bias.weight, std=0.02)
        tokens = [self.final_token, self.null_text_encodings, self.null_text_embed]
        tokens += [self.null_image_embed]
        tokens += [block.get_parameter("null_kv") for block in self.blocks]
        for token in tokens:
            if token is not None:
                nn.init.normal_(token)

    def forward(
        self, x_t: Tensor, timesteps: Tensor, context: Context, self_cond: Tensor | None = None
    ) -> Tensor:
        """x_t: [B, embed_dim]; timesteps: [B]; context: from `encode_context`; self_cond: the
        estimate of x_0 [B, embed_dim] from the step before, None at the first (read only with
        `self_conditioning`).

        Returns [B, embed_dim]. Raises ValueError when x_t has another width."""
        c, B = self.config, x_t.shape[0]
        check_width("x_t", x_t, "prior.embed_dim", c.embed_dim)
        prefix_kv, unconditional = context["prefix_kv"], context["unconditional"]
        assert prefix_kv is not None and unconditional is not None

        times = rearrange(self.time_embed(timesteps), "b (t d) -> b t d", d=c.embed_dim)
        image = rearrange(self.image_embed_in(x_t), "b (t d) -> b t d", d=c.embed_dim)
        if self.null_image_embed is not None:
            image = drop(image, unconditional, self.null_image_embed)
        tokens = [times, image]
        if c.self_conditioning:
            tokens.append((torch.zeros_like(x_t) if self_cond is None else self_cond)[:, None])
        tokens.append(repeat(self.final_token, "d -> b 1 d", b=B))
        h = self.norm_in(torch.cat(tokens, dim=1))  # [B, T, D]

        start, stop = self.num_prefix_tokens, self.num_prefix_tokens + h.shape[1]
        bias, angles = self._positions(start, stop, context["prefix_mask"])
        for layer, block in enumerate(self.blocks):
            h, _ = block(h, bias, angles, prefix_kv[:, layer])
        h = h[:, -1]  # [B, D]
        if c.norm_out == "rescaled":
            h = h / h.amax(dim=-1, keepdim=True).detach()
        return self.out(self.norm_out(h))

    def encode_context(
        self,
        *,
        text_embed: Tensor,
        text_encodings: Tensor,
        text_mask: Tensor | None = None,
        drop_text: Tensor | None = None,
    ) -> Context:
        """Runs the caption and z_t through the transformer, once for all timesteps.

        text_embed: [B, embed_dim]; text_encodings: [B, N, embed_dim], N at most max_text_len;
        text_mask: [B, N] bool, True = keep, None keeps all; drop_text: [B] bool, True = the row
        gets the null condition, which reaches beyond the text: see the class.

        Returns prefix_kv [B, L, 2, 1 + P, K] with the null key and value first, prefix_mask
        [B, 1 + P] or None, and unconditional [B]. Raises ValueError for wrong widths, captions
        that are too long, and rows to drop where there is no null condition.
        """
        c, B = self.config, text_embed.shape[0]
        check_width("text_embed", text_embed, "prior.embed_dim", c.embed_dim)
        check_width("text_encodings", text_encodings, "prior.embed_dim", c.embed_dim)
        missing = c.max_text_len - text_encodings.shape[1]
        if missing < 0:
            raise ValueError(
                f"text_encodings must have at most prior.max_text_len = {c.max_text_len} tokens; "
                f"got {text_encodings.shape[1]}: truncate the captions"
            )
        if text_mask is None:
            text_mask = text_encodings.new_ones(text_encodings.shape[:2], dtype=torch.bool)
        if drop_text is None:
            drop_text = text_mask.new_zeros(B)
        elif c.null_condition == "absent" and drop_text.any():
            raise ValueError(
                "this prior was not trained with a null condition (prior.null_condition is "
                "'absent'), so there is nothing to guide away from: use guidance_scale=1"
            )
        text_encodings = F.pad(text_encodings, (0, 0, 0, missing))  # [B, M, D]
        keep = F.pad(text_mask, (0, missing)) & ~drop_text[:, None]  # [B, M]
        if not c.reads_text_encodings:
            keep = torch.zeros_like(keep)

        text = rearrange(self.text_embed_in(text_embed), "b (t d) -> b t d", d=c.embed_dim)
        prefix_mask = None
        if self.null_text_encodings is not None:
            nulls = self.null_text_encodings.to(text_encodings.dtype)
            text_encodings = torch.where(keep[..., None], text_encodings, nulls)
        else:
            keep_text = repeat(~drop_text, "b -> b t", t=text.shape[1])
            prefix_mask = torch.cat([torch.ones_like(keep[:, :1]), keep, keep_text], dim=1)
        if self.null_text_embed is not None:
            text = drop(text, drop_text, self.null_text_embed)

        h = self.norm_in(torch.cat([text_encodings, text], dim=1))  # [B, P, D]
        bias, angles = self._positions(0, self.num_prefix_tokens, prefix_mask)
        prefix_kv = []
        for block in self.blocks:
            assert isinstance(block, MultiQueryBlock)
            h, past = block(h, bias, angles, block.null_past(B))
            prefix_kv.append(past)
        return {
            "prefix_kv": torch.stack(prefix_kv, dim=1),
            "prefix_mask": prefix_mask,
            "unconditional": drop_text,
        }

    def null_context(self, *, text_embed: Tensor, **conditions: Any) -> Context:
        """The unconditional context, of the shapes `encode_context` gives the same arguments."""
        conditions["drop_text"] = text_embed.new_ones(text_embed.shape[0], dtype=torch.bool)
        return self.encode_context(text_embed=text_embed, **conditions)

    def _positions(
        self, start: int, stop: int, prefix_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """For the tokens start .. stop - 1: the bias [1 or B, A, T, 1 + stop] on what they see up
        to their own place, the null key and a masked prefix included; and their angles [T, R]."""
        c, device = self.config, self.relative_positions.device
        bias = self.position_bias(self.relative_positions[start:stop, : stop + 1])
        bias = rearrange(bias, "t s a -> 1 a t s") * c.position_bias_scale
        hidden = torch.ones(bias.shape[-2:], dtype=torch.bool, device=device).triu(start + 2)
        if prefix_mask is not None:
            rest = stop + 1 - prefix_mask.shape[1]
            hidden = hidden | ~F.pad(prefix_mask, (0, rest), value=True)[:, None, None, :]
        bias = bias.masked_fill(hidden, -math.inf)
        if not c.rotary:
            return bias, None
        R = min(MAX_ROTARY_DIM, c.head_dim)
        frequencies = 10_000.0 ** -(torch.arange(0, R, 2, device=device).float() / R)
        places = torch.arange(start, stop, device=device).float()
        return bias, repeat(torch.outer(places, frequencies), "t r -> t (r two)", two=2)


class SinusoidTokens(nn.Sequential):
    """Sinusoids of the timestep, sines first, through an MLP of three layers: [B] -> [B, out]."""

    def __init__(self, dim: int, out_dim: int, truncate: bool = False):
        hidden = 2 * out_dim
        super().__init__(
            nn.Linear(dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, out_dim),
        )
        self.dim, self.truncate = dim, truncate

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.dim // 2
        # Not `timestep_embedding`: here the last frequency is 1 / 10000 itself.
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        frequencies = torch.exp(-math.log(10_000) / (half - 1) * steps)
        angles = timesteps.float()[:, None] * frequencies
        sinusoid = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [B, dim]
        if self.truncate:
            sinusoid = sinusoid.trunc()
        return super().forward(sinusoid.to(next(self.parameters()).dtype))


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, bias=False)


def _tokens_in(width: int, num_tokens: int) -> nn.Module:
    """An embedding that becomes one token does so as it is."""
    return nn.Identity() if num_tokens == 1 else nn.Linear(width, num_tokens * width)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates the channel pairs (0, 1), (2, 3), ... of x [..., T, K] that angles [T, R] covers."""
    rotated, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    even, odd = rotated[..., ::2], rotated[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    rotated = rotated * angles.cos() + turned * angles.sin()
    return torch.cat([rotated.to(x.dtype), rest], dim=-1)


def _buckets(num_tokens: int) -> Tensor:
    """T5's bucket [num_tokens, 1 + num_tokens] of a query's distance to each key.

    The null key has place 0 among the keys and so moves all others one up: token i is at distance
    i from the null key, at 0 from itself and from the token before it, at 1 from the one before
    that. The checkpoints were trained so.
    """
    query, key = torch.arange(num_tokens)[:, None], torch.arange(num_tokens + 1)
    distance = (query - key).clamp(min=0)
    exact = NUM_BUCKETS // 2  # one bucket for each small distance, logarithmic ones behind
    fraction = (distance.clamp(min=1) / exact).log() / math.log(MAX_DISTANCE / exact)
    coarse = (exact + fraction * (NUM_BUCKETS - exact)).long().clamp(max=NUM_BUCKETS - 1)
    return torch.where(distance < exact, distance, coarse)
