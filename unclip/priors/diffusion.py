"""The diffusion prior (paper, section 2.2): a causal transformer that denoises image embeddings.

Shapes: B captions, K candidates a caption, D width of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.checkpoint import fill, load_stage, save_stage, unfilled
from unclip.config import from_dict, to_dict
from unclip.diffusion import DiffusionConfig, Network, sample
from unclip.models import (
    Context,
    MultiQueryPrior,
    MultiQueryPriorConfig,
    PriorTransformer,
    PriorTransformerConfig,
)
from unclip.priors.base import TextConditioning, best_candidate, fill_dropped

Callback = Callable[[int, int, Tensor, Tensor], None]


def _diffusion() -> DiffusionConfig:
    # Embeddings are scaled to unit variance, not to a range: there is nothing to clamp to.
    return DiffusionConfig(prediction_type="x_0", clip_range=None)


@dataclass(frozen=True, kw_only=True)
class DiffusionPriorConfig:
    """A prior's network and the diffusion it runs."""

    network: PriorTransformerConfig = field(default_factory=PriorTransformerConfig)
    """The transformer."""
    diffusion: DiffusionConfig = field(default_factory=_diffusion)
    """Schedule and target; the paper predicts x_0 under plain MSE."""
    unit_norm: bool = True
    """Whether the CLIP's embeddings have unit norm, so that samples are put back on the sphere."""


@dataclass(frozen=True, kw_only=True)
class MultiQueryDiffusionPriorConfig:
    """A diffusion prior on DALLE2-pytorch's network."""

    network: MultiQueryPriorConfig = field(default_factory=MultiQueryPriorConfig)
    """The transformer."""
    diffusion: DiffusionConfig = field(default_factory=_diffusion)
    """Schedule and target."""
    unit_norm: bool = False
    """Whether samples are put back on the sphere. DALLE2-pytorch leaves their length as drawn,
    unless its `sampling_final_clamp_l2norm` is set."""

    def __post_init__(self) -> None:
        rows, steps = self.network.num_timesteps, self.diffusion.num_train_timesteps
        if self.network.time_tokens == "table" and rows < steps:
            raise ValueError(
                "prior.network.num_timesteps must be at least diffusion.num_train_timesteps = "
                f"{steps}; got {rows}: use {steps}"
            )


# One class of a prior for each network; `kind` names it in a checkpoint.
STATISTICS = ("mean", "std")
"""Buffers that are fp32 whatever the network computes in."""
CONFIG_KINDS = {
    "diffusion": DiffusionPriorConfig,
    "multi_query_diffusion": MultiQueryDiffusionPriorConfig,
}


class DiffusionPrior(nn.Module):
    """Draws image embeddings by denoising; see `unclip.priors.base.Prior`.

    Attributes:
        mean, std: [D] statistics of the image embeddings it was trained on. The network works on
            (z_i - mean) / std, whose variance is 1 as the paper's factor of 0.5375 sqrt(D) makes
            it that of pixels. They are saved with the weights and never defaulted.
    """

    stage = "prior"
    mean: Tensor
    std: Tensor

    def __init__(self, config: DiffusionPriorConfig | MultiQueryDiffusionPriorConfig) -> None:
        super().__init__()
        self.config = config
        self.network: PriorTransformer | MultiQueryPrior
        if isinstance(config.network, MultiQueryPriorConfig):
            self.network = MultiQueryPrior(config.network)
        else:
            self.network = PriorTransformer(config.network)
        unset = torch.full((config.network.embed_dim,), torch.nan)
        self.register_buffer("mean", unset)
        self.register_buffer("std", unset.clone())

    def fit_statistics(self, image_embed: Tensor) -> None:
        """Set mean and std from true image embeddings [S, D]; std is one number for all D.

        One scale keeps the directions' relative variances, as the paper's single factor does: the
        error the network is trained on stays the distance between embeddings.
        """
        if len(image_embed) < 2:
            raise ValueError(
                f"embedding statistics need at least 2 embeddings; got {len(image_embed)}: "
                "use a few thousand"
            )
        mean = image_embed.mean(0)
        self.set_statistics(mean, (image_embed - mean).square().mean().sqrt().expand_as(mean))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and std, [D] or one row of D."""
        device = next(self.network.parameters()).device
        self.mean, self.std = (x.flatten().float().to(device).clone() for x in (mean, std))

    def _require_statistics(self) -> None:
        if not (torch.isfinite(self.mean).all() and (self.std > 0).all()):
            raise ValueError(
                "the prior's embedding statistics must be set before it is used; got none: call "
                "fit_statistics(image_embed), or load a checkpoint that has them"
            )

    def normalize(self, image_embed: Tensor) -> Tensor:
        """Embeddings [B, D] as the network sees them."""
        self._require_statistics()
        return (image_embed - self.mean) / self.std

    def denormalize(self, x_0: Tensor) -> Tensor:
        """The network's x_0 [B, D] as embeddings of CLIP."""
        self._require_statistics()
        image_embed = x_0 * self.std + self.mean
        return F.normalize(image_embed, dim=-1) if self.config.unit_norm else image_embed

    def encode_context(
        self,
        text: TextConditioning,
        drop_text: Tensor | None = None,
        empty: TextConditioning | None = None,
    ) -> dict[str, Tensor | None]:
        """The network's context for B captions, without the caption in the rows that `drop_text`
        [B] marks; `empty` stands in for it where the network's `null_text` is `empty_prompt`."""
        if self.config.network.null_text == "empty_prompt":
            text, drop_text = fill_dropped(text, drop_text, empty), None
        return self.network.encode_context(
            text_embed=text.text_embed,
            text_encodings=text.text_encodings,
            text_mask=text.text_mask,
            drop_text=drop_text,
        )

    def sample(
        self,
        text: TextConditioning,
        *,
        guidance_scale: float = 1.0,
        num_candidates: int = 2,
        generators: Sequence[torch.Generator],
        sampler: str = "ddpm",
        num_inference_steps: int = 64,
        empty: TextConditioning | None = None,
        progress: str | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw one image embedding for each caption.

        Args:
            text: conditioning of B captions.
            guidance_scale: 1 is off; guiding the prior hurt in the paper.
            num_candidates: K embeddings are drawn, the one closest to text_embed is kept; paper: 2.
            generators: one a caption.
            sampler: one of `unclip.diffusion.SAMPLERS`.
            num_inference_steps: strided steps; paper: 64.
            empty: conditioning of one empty prompt, which guidance needs where the network's
                `null_text` is `empty_prompt`.
            progress: title of a progress bar, or None.
            callback: called after each step.

        Returns:
            [B, D] image embeddings.
        """
        if num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1; got {num_candidates}: use 2")
        embed = text.text_embed
        rows = torch.arange(len(embed), device=embed.device).repeat_interleave(num_candidates)
        null = None
        if guidance_scale != 1:
            null = self.encode_context(text, torch.ones_like(embed[:, 0], dtype=torch.bool), empty)
            null = {name: None if part is None else part[rows] for name, part in null.items()}
        context = self.encode_context(text)
        context = {name: None if part is None else part[rows] for name, part in context.items()}
        network, callback = self._denoiser(callback)
        x_0 = sample(
            network,
            self.config.diffusion,
            (len(rows), embed.shape[1]),
            context=context,
            null_context=null,
            guidance_scale=guidance_scale,
            sampler=sampler,
            num_inference_steps=num_inference_steps,
            generators=_split(generators, num_candidates),
            dtype=next(self.network.parameters()).dtype,
            progress=progress,
            callback=callback,
        )
        candidates = self.denormalize(x_0).unflatten(0, (len(embed), num_candidates))
        return best_candidate(candidates, embed)

    def _denoiser(self, callback: Callback | None) -> tuple[Network, Callback | None]:
        """The network and callback that `sample` calls. With self-conditioning the callback hands
        each step's estimate of x_0 to the network's next call."""
        network = self.network
        if not isinstance(network, MultiQueryPrior) or not network.config.self_conditioning:
            return network, callback
        estimate: list[Tensor] = []

        def denoise(x_t: Tensor, timesteps: Tensor, context: Context) -> Tensor:
            self_cond = None
            if estimate:  # guidance asks for a batch twice the size of the estimate's
                self_cond = estimate[0].repeat(len(x_t) // len(estimate[0]), 1).to(x_t.dtype)
            return network(x_t, timesteps, context, self_cond)

        def remember(step: int, timestep: int, x_t: Tensor, x_0: Tensor) -> None:
            estimate[:] = [x_0]
            if callback is not None:
                callback(step, timestep, x_t, x_0)

        return denoise, remember

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the stage's folder; the statistics stay fp32 only if `dtype` is None."""
        self._require_statistics()
        kinds = {config_class: kind for kind, config_class in CONFIG_KINDS.items()}
        kind = kinds[type(self.config)]
        config = {"stage": self.stage, "kind": kind, **to_dict(self.config)}
        save_stage(folder, config, self.state_dict(), dtype)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> DiffusionPrior:
        """Read a stage's folder, its network in `dtype`; raises ValueError where it does not fit or
        lacks statistics."""
        config, tensors = load_stage(folder, cls.stage, dtype, keep=STATISTICS)
        kind = config.pop("kind", None)
        if kind not in CONFIG_KINDS:
            raise ValueError(
                f"{folder} holds a prior of kind {kind!r}; this class reads "
                f"{' and '.join(map(repr, CONFIG_KINDS))}"
            )
        prior = unfilled(lambda: cls(from_dict(CONFIG_KINDS[kind], config)))
        fill(prior, tensors, folder)
        prior._require_statistics()
        return prior.eval()


def _split(generators: Sequence[torch.Generator], count: int) -> list[torch.Generator]:
    """`count` generators for each one given, seeded from it: a caption's candidates are the same
    whatever else is in the batch."""
    split = []
    for generator in generators:
        seeds = torch.randint(2**31, (count,), generator=generator, device=generator.device)
        split += [torch.Generator(generator.device).manual_seed(int(s)) for s in seeds]
    return split
