"""What a call of a cascade is given, held against its stages before anything is drawn.

Shapes: P prompts, B pictures, D width of CLIP's joint space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from unclip.clip import split_weights
from unclip.diffusion import Resampling, make_scheduler, sampling_timesteps
from unclip.glide import GlideStage
from unclip.hub import Stages
from unclip.pipeline.options import CascadeOptions, as_of_prior, check_prompt
from unclip.priors import PriorOptions
from unclip.stages import DecoderStage, PictureStage


def chain_of(stages: Stages) -> list[PictureStage]:
    """The decoder and the upsamplers, small to large."""
    assert stages.decoder is not None
    return [stages.decoder, *stages.upsamplers]


def check_steps(stages: Stages, options: CascadeOptions) -> None:
    """Raise ValueError for steps, samplers and a size that the stages cannot do."""
    if stages.prior is not None:
        try:
            stages.prior.check_options(PriorOptions(**options.of_prior))
        except ValueError as error:
            raise ValueError(as_of_prior(error)) from error
    for place, stage in enumerate(chain_of(stages)):
        steps, sampler = "decoder_steps", "sampler"
        if place:
            steps, sampler = "upsampler_steps", "upsampler_sampler"
        config = stage.config.diffusion
        try:
            timesteps = sampling_timesteps(config, getattr(options, steps))
            make_scheduler(config, getattr(options, sampler), timesteps)
        except ValueError as error:
            message = str(error).replace("num_inference_steps", steps, 1)
            message = re.sub("^sampler ", f"{sampler} ", message)
            raise ValueError(message) from error
    sizes = [stage.image_size for stage in chain_of(stages)]
    if options.size is not None and options.size not in sizes:
        raise ValueError(
            f"size must be one of {', '.join(map(str, sizes))}, the sides this model draws; got "
            f"{options.size}: leave it out for {sizes[-1]}"
        )


def check_embed(stages: Stages, options: CascadeOptions, prompts: object) -> None:
    """Raise ValueError where the decoder's image embedding cannot be had as the options say."""
    decoder = stages.decoder
    if options.embed == "prior":
        if stages.prior is None and isinstance(decoder, DecoderStage) and prompts is not None:
            raise ValueError(
                "this model has no prior, so image_embed must be given; got None: embed a picture "
                "with clip.encode_image, or load the model with prior=<a model that has one>"
            )
        return
    network = decoder.config.network if isinstance(decoder, DecoderStage) else None
    fault = None
    if network is None:
        fault = "GLIDE's decoder, which reads captions alone as it is"
    elif stages.clip is None or prompts is None:
        fault = "no CLIP" if stages.clip is None else "no caption"
    elif (
        options.embed == "none"
        and network.text_encodings_dim is None
        and network.text_embed_dim is None
    ):
        fault = "a decoder that reads no caption"
    if fault is not None:
        raise ValueError(f"embed must be 'prior' for {fault}; got {options.embed!r}: leave it out")


def check_best_of(stages: Stages, options: CascadeOptions, prompts: object) -> None:
    """Raise ValueError where there is nothing to choose the best by."""
    if options.best_of == 1:
        return
    if stages.clip is None or prompts is None:
        raise ValueError(
            f"best_of needs a CLIP and a caption to choose by; got {options.best_of} with "
            f"{'no CLIP' if stages.clip is None else 'no caption'}: leave it out"
        )
    stages.clip.required_image_size()


def check_inpainting(
    stages: Stages,
    image: Tensor | None,
    repaint: Tensor | None,
    resampling: Resampling | None,
    options: CascadeOptions,
) -> None:
    """Raise ValueError for a picture and a mask that do not fit, or cannot be painted by."""
    if image is None and repaint is None:
        return
    shapes = [None if part is None else tuple(part.shape) for part in (image, repaint)]
    if image is None or repaint is None or image.ndim != 3 or repaint.ndim not in (2, 3):
        raise ValueError(
            "image must be [3, H, W] and repaint [1, H, W], and both be given; got "
            f"{shapes[0]} and {shapes[1]}"
        )
    if image.shape[-2:] != repaint.shape[-2:]:
        raise ValueError(
            f"repaint must be as large as image, {list(image.shape[-2:])}; got "
            f"{list(repaint.shape[-2:])}: draw the mask on the picture"
        )
    for name in ("sampler", "upsampler_sampler"):
        sampler = getattr(options, name)
        if resampling is not None and sampler not in ("ddpm", "ddim"):
            raise ValueError(
                f"{name} must be 'ddpm' or 'ddim' for resampling; got {sampler!r}: use 'ddim'"
            )


def captions_and_given(
    stages: Stages,
    prompts: str | Sequence[str] | None,
    image_embed: Tensor | None,
    x_T: Tensor | None,
    low_res: Tensor | None,
    num_images: int,
) -> tuple[list[str | None], dict[str, Tensor]]:
    """The caption of each picture, and what else was given, of B pictures each."""
    if isinstance(stages.decoder, GlideStage) and (prompts is None or image_embed is not None):
        raise ValueError(
            "this model's decoder reads captions alone: prompts must be given and image_embed "
            f"must not; got {'an image_embed' if prompts else 'no prompts'}"
        )
    if prompts is None and image_embed is None and low_res is None:
        raise ValueError("prompts must be given where image_embed is not; got neither")
    captions: list[str | None]
    if prompts is None:
        first, single = (image_embed, 1) if image_embed is not None else (low_res, 3)
        assert first is not None
        captions = [None] * (1 if first.ndim == single else len(first))
    else:
        captions = [prompts] if isinstance(prompts, str) else list(prompts)
        if not captions:
            raise ValueError("prompts must hold at least one caption; got none: give one")
        for prompt in captions:
            check_prompt(prompt)
            if isinstance(stages.decoder, GlideStage) and split_weights(str(prompt))[1:]:
                raise ValueError(
                    f"weighted prompts need a CLIP, in whose numbers they are blended; got "
                    f"{prompt!r} for GLIDE's networks: write one caption"
                )
    sides = [stage.image_size for stage in chain_of(stages)]
    side = sides[0]
    if low_res is not None:
        side = low_res.shape[-1]
        if side not in sides[:-1] or low_res.shape[-2] != side:
            raise ValueError(
                f"low_res must have a side among {sides[:-1]}, which this model's upsamplers "
                f"enlarge; got {list(low_res.shape[-2:])}: resize it, or load an upsampler"
            )
    given = {
        "image_embed": (image_embed, (None if stages.clip is None else stages.clip.embed_dim,)),
        "x_T": (x_T, (3, sides[0], sides[0])),
        "low_res": (low_res, (3, side, side)),
    }
    parts = {
        name: rows_of(name, part, shape, len(captions)).repeat_interleave(num_images, dim=0)
        for name, (part, shape) in given.items()
        if part is not None
    }
    return [caption for caption in captions for _ in range(num_images)], parts


def rows_of(name: str, part: Tensor, shape: tuple[int | None, ...], count: int) -> Tensor:
    """What was given, once or for each of `count` prompts, as a batch of them; raises ValueError
    where it has another shape or is not finite."""
    batch = part.expand(count, *part.shape) if part.ndim == len(shape) else part
    if tuple(batch.shape) != (count, *shape):
        one, all_ = list(shape), [count, *shape]
        raise ValueError(
            f"{name} must be {one}, or {all_} for {count} prompts; got {list(part.shape)}: "
            + ("use this model's own CLIP to make it" if name == "image_embed" else "resize it")
        )
    if not batch.isfinite().all():
        raise ValueError(
            f"{name} must be finite; got NaN or infinity in {list(part.shape)}: look at what made "
            "it"
        )
    return batch
