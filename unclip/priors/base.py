"""What the cascade asks of a prior, whatever kind it is, and what all kinds share.

Shapes: B captions, K candidates a caption, R = B * K rows, D width of CLIP's joint space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.checkpoint import fill, load_stage, save_stage, unfilled
from unclip.config import from_dict, to_dict
from unclip.diffusion.guidance import check_guidance_scale
from unclip.models import Context
from unclip.priors.text import TextConditioning, fill_dropped

Kind = TypeVar("Kind", bound="Prior")
Callback = Callable[[int, int, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class PriorOptions:
    """How image embeddings are drawn; each kind of prior reads what it has a use for."""

    guidance_scale: float = 1.0
    """Classifier-free guidance, 1 is off; guiding the prior hurt in the paper."""
    num_candidates: int = 2
    """Embeddings drawn for each caption, of which the one closest to text_embed is kept (paper: 2).
    """
    sampler: str | None = None
    """One of the kind's `samplers`; None is the first of them."""
    num_inference_steps: int = 64
    """Steps of a prior that has them; paper: 64."""
    temperature: float = 1.0
    """Of a prior that draws tokens: below 1 likelier ones come more often."""
    top_p: float = 1.0
    """Of a prior that draws tokens: only the likeliest that hold this much probability are drawn
    (Holtzman et al. 2020)."""
    negative: TextConditioning | None = None
    """Conditioning of one caption, on as many tokens as the others, that guidance leads away from
    in place of no caption."""
    progress: str | None = None
    """Title of a progress bar, or None."""
    callback: Callback | None = None
    """Called after each step with (step, timestep, x_t, x_0), by a prior that has steps."""

    def __post_init__(self) -> None:
        check_guidance_scale(self.guidance_scale)
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1; got {self.num_candidates}: use 2")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0; got {self.temperature}: use 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; got {self.top_p}: use 1 for all tokens")


class Prior(nn.Module, ABC):
    """Draws image embeddings for captions: P(z_i | y).

    A kind says how its network is built, what `_draw` makes of a caption, and its `kind`.

    Attributes:
        kind: name in checkpoints. config_class: what `config` is. network_class: what it builds.
        samplers: what `PriorOptions.sampler` may be, its own choice first.
        mean, std: [D] statistics of the image embeddings it was trained on. A network works on
            (z_i - mean) / std, whose variance is 1 as the paper's factor of 0.5375 sqrt(D) makes
            it that of pixels. They are saved with the weights and never defaulted.
    """

    stage: ClassVar[str] = "prior"
    kind: ClassVar[str]
    config_class: ClassVar[type[Any]]
    network_class: ClassVar[type[nn.Module]]
    samplers: ClassVar[tuple[str, ...]] = ()
    statistics: ClassVar[tuple[str, ...]] = ("mean", "std")
    """Buffers that are fp32 whatever the network computes in."""
    mean: Tensor
    std: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.network: Any = self.network_class(config.network)
        unset = torch.full((config.network.embed_dim,), torch.nan)
        self.register_buffer("mean", unset)
        self.register_buffer("std", unset.clone())

    @classmethod
    def begin(cls: type[Kind], config: Any, image_embed: Tensor, text_embed: Tensor) -> Kind:
        """A prior to train: random weights, statistics measured on true pairs [S, D] of them."""
        del text_embed
        prior = cls(config)
        prior.fit_statistics(image_embed)
        return prior

    # ------------------------------------------------------------------------------ statistics

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

    def require_statistics(self) -> None:
        """Raise ValueError where mean and std were never set."""
        if not (torch.isfinite(self.mean).all() and (self.std > 0).all()):
            raise ValueError(
                "the prior's embedding statistics must be set before it is used; got none: call "
                "fit_statistics(image_embed), or load a checkpoint that has them"
            )

    def normalize(self, image_embed: Tensor) -> Tensor:
        """Embeddings [B, D] as the network sees them."""
        self.require_statistics()
        return (image_embed - self.mean) / self.std

    def denormalize(self, x_0: Tensor) -> Tensor:
        """The network's x_0 [B, D] as embeddings of CLIP."""
        self.require_statistics()
        return self.on_sphere(x_0 * self.std + self.mean)

    def on_sphere(self, image_embed: Tensor) -> Tensor:
        """Embeddings [B, D] of unit norm, if those of the CLIP are."""
        return F.normalize(image_embed, dim=-1) if self.config.unit_norm else image_embed

    # -------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(
        self,
        text: TextConditioning,
        *,
        generators: Sequence[torch.Generator],
        empty: TextConditioning | None = None,
        **options: Any,
    ) -> Tensor:
        """Draw one image embedding for each caption (paper, section 2.2).

        Args:
            text: conditioning of B captions.
            generators: one a caption, so that an embedding is the same alone and in a batch.
            empty: conditioning of one empty prompt, which guidance needs where the network's
                `null_text` is `empty_prompt`.
            options: fields of `PriorOptions`.

        Returns:
            [B, D] image embeddings: of K candidates each the one closest to its caption.

        Raises:
            ValueError: an option is out of its range or not of this kind, or there are no
                statistics.
        """
        chosen = PriorOptions(**options)
        self.check_options(chosen)
        self.require_statistics()
        candidates = self._draw(text, generators, empty, chosen)  # [B, K, D]
        return best_candidate(candidates, text.text_embed)

    def check_options(self, options: PriorOptions) -> None:
        """Raise ValueError for options that a prior of this kind cannot be sampled with."""
        sampler = options.sampler
        if sampler is not None and self.samplers and sampler not in self.samplers:
            raise ValueError(
                f"sampler must be one of {', '.join(self.samplers)} for a prior of kind "
                f"{self.kind}; got {sampler!r}: leave it out for {self.samplers[0]}"
            )
        if options.num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps must be at least 1; got {options.num_inference_steps}: use 64"
            )

    @abstractmethod
    def _draw(
        self,
        text: TextConditioning,
        generators: Sequence[torch.Generator],
        empty: TextConditioning | None,
        options: PriorOptions,
    ) -> Tensor:
        """Candidates [B, K, D] for B captions, as embeddings of CLIP."""

    # ------------------------------------------------------------------------------ checkpoints

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the stage's folder; the statistics stay fp32 only if `dtype` is None."""
        self.require_statistics()
        config = {"stage": self.stage, "kind": self.kind, **to_dict(self.config)}
        save_stage(folder, config, self.state_dict(), dtype)

    @classmethod
    def load(cls: type[Kind], folder: Path, dtype: torch.dtype = torch.float32) -> Kind:
        """Read a stage's folder, its network in `dtype`; raises ValueError where it does not fit,
        lacks statistics, or holds another kind. `load_prior` reads any kind."""
        config, tensors = load_stage(folder, cls.stage, dtype, keep=cls.statistics)
        if (kind := config.pop("kind", None)) != cls.kind:
            raise ValueError(
                f"{folder} holds a prior of kind {kind!r}; this class reads {cls.kind!r}"
            )
        prior = unfilled(lambda: cls(from_dict(cls.config_class, config)))
        fill(prior, tensors, folder)
        prior.require_statistics()
        return prior.eval()


class TransformerPrior(Prior):
    """A prior whose network reads the whole caption."""

    one_null: ClassVar[bool] = True
    """Whether the context without a caption is the same whatever caption is left out."""

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
        context: dict[str, Tensor | None] = self.network.encode_context(
            text_embed=text.text_embed,
            text_encodings=text.text_encodings,
            text_mask=text.text_mask,
            drop_text=drop_text,
        )
        return context

    def _contexts(
        self, text: TextConditioning, empty: TextConditioning | None, options: PriorOptions
    ) -> tuple[Context, Context | None]:
        """The contexts of R rows, with the caption and, where there is guidance, without it or with
        the negative one."""
        num, device = len(text.text_embed), text.text_embed.device
        rows = torch.arange(num, device=device).repeat_interleave(options.num_candidates)

        def repeated(context: Context, rows: Tensor) -> Context:
            return {name: None if part is None else part[rows] for name, part in context.items()}

        context = repeated(self.encode_context(text), rows)
        if options.guidance_scale == 1:
            return context, None
        # What guidance leads away from is mostly one for all rows, and encoded once.
        if options.negative is not None:
            return context, repeated(self.encode_context(options.negative), torch.zeros_like(rows))
        without = torch.arange(1 if self.one_null else num, device=device)
        dropped = torch.ones_like(without, dtype=torch.bool)
        away = self.encode_context(text.rows(without), dropped, empty)
        return context, repeated(away, torch.zeros_like(rows) if self.one_null else rows)


def best_candidate(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """Of K candidates for each caption keep the one closest to its text (paper, section 2.2).

    Args:
        image_embed: [B, K, D] candidates z_i.
        text_embed: [B, D] embeddings z_t.

    Returns:
        [B, D]: for each caption the candidate with the highest dot product z_i . z_t.
    """
    score = torch.einsum("bkd,bd->bk", image_embed, text_embed)
    return image_embed[torch.arange(len(image_embed)), score.argmax(dim=1)]


def split(generators: Sequence[torch.Generator], count: int) -> list[torch.Generator]:
    """`count` generators for each one given, seeded from it: a caption's candidates are the same
    whatever else is in the batch."""
    split = []
    for generator in generators:
        seeds = torch.randint(2**31, (count,), generator=generator, device=generator.device)
        split += [torch.Generator(generator.device).manual_seed(int(s)) for s in seeds]
    return split
