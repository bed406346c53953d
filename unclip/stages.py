"""The picture stages: a network with the diffusion it was trained for, as a checkpoint holds it.
GLIDE's are in `unclip.glide`.

Shapes: B pictures, S side of the decoder's pictures, D width of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.checkpoint import fill, load_stage, save_stage, unfilled
from unclip.config import from_dict, to_dict
from unclip.diffusion import (
    DiffusionConfig,
    GuidanceLimits,
    Network,
    Resampling,
    invert,
    sample,
    sampling_timesteps,
)
from unclip.diffusion.guidance import UNLIMITED
from unclip.models import Decoder, DecoderConfig, Upsampler, UpsamplerConfig
from unclip.priors import TextConditioning, fill_dropped

Stage = TypeVar("Stage", bound="PictureStage")
StepCallback = Callable[[int, int, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a picture stage is sampled."""

    sampler: str = "ddim"
    """One of `unclip.diffusion.SAMPLERS`."""
    num_inference_steps: int = 27
    """Steps."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is off."""
    guidance_limits: GuidanceLimits = UNLIMITED
    """What keeps guidance from overdoing it."""
    eta: float = 0.0
    """Noise DDIM adds back, 0 to 1."""
    resampling: Resampling | None = None
    """How a network without channels for a known picture paints parts of it anew; None: by what is
    known alone, without going back."""
    progress: str | None = None
    """Title of a progress bar, or None."""
    callback: StepCallback | None = None
    """Called after each step with (step, timestep, x_t, x_0)."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What is known of B pictures before a stage draws them; each stage reads what it was made for
    and leaves the rest."""

    image_embed: Tensor | None = None
    """[B, D] CLIP's; None: a decoder has the captions alone."""
    text: TextConditioning | None = None
    """What CLIP says of the captions; None: no captions."""
    empty: TextConditioning | None = None
    """What CLIP says of one empty prompt, which stands for no caption where the network's
    `null_text` is `empty_prompt`."""
    negative: TextConditioning | None = None
    """What CLIP says of one caption to stay away from, on as many tokens as `text`: guidance takes
    it for no caption."""
    captions: Sequence[str | None] | None = None
    """The captions themselves, for stages with a text encoder of their own."""
    negative_caption: str | None = None
    """The caption to stay away from, for those stages."""
    low_res: Tensor | None = None
    """[B, 3, h, w] in [-1, 1] what the stage before drew."""
    image: Tensor | None = None
    """[B, 3, H, W] in [-1, 1] a picture to be kept in part, of any size."""
    repaint: Tensor | None = None
    """[B, 1, H, W] True (or above 0) where it is to be painted anew."""


class Known(NamedTuple):
    """A picture to be kept in part, at a stage's size."""

    image: Tensor
    """[B, 3, S, S] in [-1, 1]."""
    keep: Tensor
    """[B, 1, S, S] bool, True = the pixel is known."""

    @classmethod
    def of(cls, conditions: Conditions, side: int) -> Known | None:
        """What the conditions say is known, on S = `side` px; None if they say nothing."""
        image, repaint = conditions.image, conditions.repaint
        if image is None or repaint is None:
            return None
        if image.shape[-2:] != (side, side):
            image = F.interpolate(image, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        # A pixel is known only where all of what it covers is.
        return cls(image, F.adaptive_max_pool2d(repaint.float(), side) == 0)

    def hold(self, x_0: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] with what is known put back."""
        return torch.where(self.keep, self.image, x_0)


@dataclass(frozen=True, kw_only=True)
class DecoderStageConfig:
    """The decoder's network and its diffusion."""

    network: DecoderConfig = field(default_factory=DecoderConfig)
    """The U-Net and its conditioning."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Schedule, target and loss."""


@dataclass(frozen=True, kw_only=True)
class UpsamplerStageConfig:
    """An upsampler's network and its diffusion."""

    network: UpsamplerConfig = field(default_factory=UpsamplerConfig)
    """The U-Net."""
    final_network: bool = False
    """A second network of the same sizes draws the last step, as Karlo's do: its own is trained to
    bring back fine detail. Training leaves it as it is."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Schedule, target and loss."""


class PictureStage(nn.Module):
    """What decoder and upsamplers share: a network, its config, its folder.

    Attributes:
        stage: name in checkpoints. config_class: what `config` is. network_class: what it builds.
    """

    stage: ClassVar[str]
    config_class: ClassVar[type[Any]]
    network_class: ClassVar[type[nn.Module]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.network: Any = self.network_class(config.network)

    @property
    def image_size(self) -> int:
        """Side of the pictures it draws, px."""
        return int(self.config.network.unet.image_size)

    def sample(
        self,
        conditions: Conditions,
        generators: Sequence[torch.Generator],
        options: SamplingOptions,
        x_T: Tensor | None = None,
    ) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] under B conditions.

        Args:
            conditions: what is known of the pictures.
            generators: one a picture.
            options: sampler, steps, guidance.
            x_T: noise [B, 3, H, W] to start from; None draws it from the generators.

        Raises:
            ValueError: a condition that the stage needs is missing, or does not fit.
        """
        raise NotImplementedError

    def _denoise(
        self,
        size: int,
        context: dict[str, Tensor | None],
        null_context: dict[str, Tensor | None] | None,
        generators: Sequence[torch.Generator],
        options: SamplingOptions,
        x_T: Tensor | None = None,
        network: Network | None = None,
        known: Known | None = None,
    ) -> Tensor:
        weight = next(self.network.parameters())
        return sample(
            network or self.network,
            self.config.diffusion,
            (len(generators), 3, size, size),
            context=context,
            null_context=null_context,
            guidance_scale=options.guidance_scale,
            guidance_limits=options.guidance_limits,
            sampler=options.sampler,
            num_inference_steps=options.num_inference_steps,
            eta=options.eta,
            generators=generators,
            device=weight.device,
            dtype=weight.dtype,
            x_T=x_T,
            constrain=None if known is None else known.hold,
            # A network that is shown what is known needs no second attempt.
            resampling=None if known is None or self.is_shown_known else options.resampling,
            progress=options.progress,
            callback=options.callback,
        ).clamp(-1, 1)

    @property
    def is_shown_known(self) -> bool:
        """Whether the network has channels for a picture that is known in part."""
        return False

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the stage's folder."""
        save_stage(folder, {"stage": self.stage, **to_dict(self.config)}, self.state_dict(), dtype)

    @classmethod
    def load(cls: type[Stage], folder: Path, dtype: torch.dtype = torch.float32) -> Stage:
        """Read a stage's folder, its weights in `dtype`; raises FileNotFoundError or ValueError
        with what is wrong."""
        config, tensors = load_stage(folder, cls.stage, dtype)
        stage = unfilled(lambda: cls(from_dict(cls.config_class, config)))
        fill(stage, tensors, folder)
        return stage.eval()


class DecoderStage(PictureStage):
    """P(x | z_i, y): pictures from image embeddings and captions (paper, section 2.1)."""

    stage = "decoder"
    config_class = DecoderStageConfig
    network_class = Decoder
    config: DecoderStageConfig
    network: Decoder

    def encode_context(
        self,
        image_embed: Tensor,
        text: TextConditioning | None,
        drop_image: Tensor | None = None,
        drop_text: Tensor | None = None,
        empty: TextConditioning | None = None,
    ) -> dict[str, Tensor | None]:
        """The network's context from image embeddings [B, D] and B captions (None: no captions).

        `drop_image`, `drop_text`: [B] bool, True = the row does without. `empty`: see
        `Conditions`."""
        network = self.config.network
        if network.null_text == "empty_prompt":
            if text is None and empty is not None:
                rows = torch.zeros(len(image_embed), dtype=torch.long, device=image_embed.device)
                text, drop_text = empty.rows(rows), None
            elif text is not None:
                text, drop_text = fill_dropped(text, drop_text, empty), None
        conditions: dict[str, Any] = {"image_embed": image_embed, "drop_image": drop_image}
        if network.text_encodings_dim is not None and text is not None:
            conditions["text_encodings"] = text.text_encodings
            conditions["text_mask"] = text.text_mask
            conditions["drop_text"] = drop_text
        if network.text_embed_dim is not None and text is not None:
            conditions["text_embed"] = text.text_embed
            conditions["drop_text"] = drop_text
        return self.network.encode_context(**conditions)

    def sample(
        self,
        conditions: Conditions,
        generators: Sequence[torch.Generator],
        options: SamplingOptions,
        x_T: Tensor | None = None,
    ) -> Tensor:
        """Pictures [B, 3, S, S] from `image_embed`, `text`, `empty`, `negative`, `image`,
        `repaint`; see `PictureStage.sample`."""
        context, null = self._contexts(conditions, options)
        known = Known.of(conditions, self.image_size)
        return self._denoise(self.image_size, context, null, generators, options, x_T, known=known)

    def invert(
        self,
        images: Tensor,
        conditions: Conditions,
        options: SamplingOptions,
        num_iterations: int = 1,
    ) -> Tensor:
        """The noise x_T [B, 3, S, S], fp32, from which `sample` by `ddim` under the same conditions
        and options leads back to pictures [B, 3, S, S] (paper, section 3).

        Args:
            images: in [-1, 1].
            conditions: what `sample` is given.
            options: steps and guidance; the rest is left aside.
            num_iterations: network evaluations of a step; see `unclip.diffusion.invert`.

        Raises:
            ValueError: the pictures have another size, or a condition does not fit.
        """
        side = self.image_size
        if images.shape[1:] != (3, side, side):
            raise ValueError(
                f"images must be [B, 3, {side}, {side}], what the decoder draws; got "
                f"{list(images.shape)}: resize them"
            )
        context, null = self._contexts(conditions, options)
        return invert(
            self.network,
            self.config.diffusion,
            images,
            context=context,
            null_context=null,
            guidance_scale=options.guidance_scale,
            guidance_limits=options.guidance_limits,
            num_inference_steps=options.num_inference_steps,
            num_iterations=num_iterations,
            dtype=next(self.network.parameters()).dtype,
            progress=options.progress,
            callback=options.callback,
        )

    def _contexts(
        self, conditions: Conditions, options: SamplingOptions
    ) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None] | None]:
        """The network's context, and for guidance the one without the condition, or with that which
        is to be stayed away from."""
        image_embed, text, empty = conditions.image_embed, conditions.text, conditions.empty
        negative = conditions.negative
        alone = image_embed is None
        if image_embed is None:
            if text is None:
                raise ValueError(
                    "image_embed must be given to a decoder that is given no text; got None: draw "
                    "it by a prior"
                )
            # Of the right shape; it is dropped.
            width = self.config.network.image_embed_dim
            image_embed = text.text_embed.new_zeros(len(text.text_embed), width)
        everything = torch.ones(len(image_embed), dtype=torch.bool, device=image_embed.device)
        away, no_text, null = None, None, None
        if negative is not None:
            away = negative.rows(torch.zeros_like(everything, dtype=torch.long))
            if text is None:  # no caption, on as many tokens as the negative has
                text, no_text = away, everything
        if options.guidance_scale != 1:
            null = (
                self.encode_context(image_embed, text, everything, everything, empty)
                if away is None
                else self.encode_context(image_embed, away, everything, empty=empty)
            )
        no_image = everything if alone else None
        return self.encode_context(image_embed, text, no_image, no_text, empty), null


class UpsamplerStage(PictureStage):
    """Pictures to pictures `scale` times larger, by convolutions alone (paper, section 2.1)."""

    stage = "upsampler"
    config_class = UpsamplerStageConfig
    network_class = Upsampler
    config: UpsamplerStageConfig
    network: Upsampler

    def __init__(self, config: UpsamplerStageConfig) -> None:
        super().__init__(config)
        self.final_network = Upsampler(config.network) if config.final_network else None
        if self.final_network is not None:
            self.final_network.requires_grad_(False)

    def sample(
        self,
        conditions: Conditions,
        generators: Sequence[torch.Generator],
        options: SamplingOptions,
        x_T: Tensor | None = None,
    ) -> Tensor:
        """Pictures [B, 3, scale h, scale h] from `low_res`, and `image` and `repaint` where parts
        are to be kept; see `PictureStage.sample`."""
        low_res = required_low_res(conditions)
        noise_level = None
        if self.config.network.noise_conditioning:
            noise_level = torch.zeros(len(low_res), device=low_res.device)
        context = self.network.encode_context(low_res=low_res, noise_level=noise_level)
        size = low_res.shape[-1] * self.config.network.scale
        last = sampling_timesteps(self.config.diffusion, options.num_inference_steps)[-1]

        def network(x_t: Tensor, timesteps: Tensor, context: dict[str, Tensor | None]) -> Tensor:
            chosen = self.network
            if self.final_network is not None and int(timesteps[0]) == last:
                chosen = self.final_network
            out: Tensor = chosen(x_t, timesteps, context)
            return out

        known = Known.of(conditions, size)
        return self._denoise(size, context, None, generators, options, x_T, network, known)


def required_low_res(conditions: Conditions) -> Tensor:
    """The small pictures; raises ValueError where there are none."""
    if conditions.low_res is None:
        raise ValueError("low_res must be given to an upsampler; got None: pass small pictures")
    return conditions.low_res
