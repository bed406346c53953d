"""Drawing from what is there: variations, inpainting, upscaling, embeddings from elsewhere.

Shapes: H W a picture's own size, N embeddings, D width of CLIP's joint space.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from unclip.diffusion import Resampling
from unclip.edits.fitting import check_mask, embed_image, fit, square
from unclip.edits.latents import PLAIN_DDIM, for_drawing, given_latent, invert
from unclip.glide import GlideStage
from unclip.hub.folders import input_size
from unclip.pipeline import CascadeOutput, UnCLIP


def variations(
    model: UnCLIP,
    image: Tensor,
    *,
    eta: float = 1.0,
    num_images: int = 4,
    prompt: str | None = None,
    seed: int = 0,
    **options: Any,
) -> CascadeOutput:
    """Pictures of which CLIP sees the same as of one (paper, section 3.1): its embedding and its
    x_T, decoded by DDIM with noise added on the way.

    Args:
        model: with a CLIP that sees pictures.
        image: [3, H, W] in [-1, 1].
        eta: how much noise, above 0, at most 1; 0 would be the picture itself (`reconstruct`).
        num_images, prompt, seed: as of the pipeline's call.
        options: as of the pipeline's call. x_T is inverted without guidance; what is drawn from it
            has the model's own.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_eta(eta)
    options.pop("sampler", None)
    latent = invert(model, image, prompt=prompt, **{**options, **PLAIN_DDIM})
    return model(
        prompt,
        image_embed=latent.image_embed,
        x_T=latent.x_T,
        num_images=num_images,
        seed=seed,
        eta=eta,
        sampler="ddim",
        **for_drawing(options),
    )


def check_eta(eta: float) -> None:
    """Raise ValueError unless a variation's eta is above 0 and at most 1."""
    if not 0 < eta <= 1:
        raise ValueError(
            f"eta must lie in (0, 1] for variations; got {eta}: 0 draws the picture itself, which "
            "`invert` does"
        )


def inpaint(
    model: UnCLIP,
    image: Tensor,
    mask: Tensor,
    *,
    prompt: str | None = None,
    num_images: int = 1,
    seed: int = 0,
    resampling: Resampling | None = None,
    **options: Any,
) -> CascadeOutput:
    """Paint parts of a picture anew and keep the others to the pixel, in every stage.

    GLIDE's inpainting networks are shown what is known. Others hold it at each step and go back up
    the chain for the new to fit it (RePaint, Lugmayr et al. 2022).

    Args:
        model: any; its last stage's side is the picture's.
        image: [3, H, W] in [-1, 1].
        mask: [H, W] or [1, H, W], 0 to 1: white (1) is painted anew.
        prompt: what the whole picture shall show, from which the prior draws an embedding. None:
            the picture's own embedding, with what is to be painted over still in it.
        num_images, seed: as of the pipeline's call.
        resampling: how often to go back; None: five times over five steps.
        options: as of the pipeline's call.

    Raises:
        ValueError: an argument is out of its range, or the mask does not fit the picture.
    """
    repaint = check_mask(mask, image)
    size = options.get("size") or model.sizes[-1]
    fitted = fit(image, size)
    own = square(repaint)[None, None].float()
    # A pixel is known only where all of what it covers is.
    whole = F.adaptive_max_pool2d(own, size)[0]
    image_embed = None
    if prompt is None and not isinstance(model.decoder, GlideStage):
        image_embed = embed_image(model, image)
    return model(
        prompt,
        image_embed=image_embed,
        image=fitted,
        repaint=whole,
        resampling=resampling or Resampling(),
        num_images=num_images,
        seed=seed,
        **options,
    )


def upscale(
    model: UnCLIP, image: Tensor, *, prompt: str | None = None, seed: int = 0, **options: Any
) -> CascadeOutput:
    """A picture [3, H, W] in [-1, 1] made larger by the upsamplers alone. It is resized to the
    largest side an upsampler enlarges that is not above its own; GLIDE's need a prompt.

    Raises:
        ValueError: the model has no upsampler, or an argument is out of its range.
    """
    return model(prompt, low_res=fit(image, upscaled_side(model, image)), seed=seed, **options)


def upscaled_side(model: UnCLIP, image: Tensor) -> int:
    """The side that `upscale` brings a picture to first, px."""
    sides = sorted(input_size(upsampler) for upsampler in model.upsamplers)
    if not sides:
        raise ValueError("upscale needs an upsampler; got a model without: load another model")
    own = min(image.shape[-2:])
    return max((side for side in sides if side <= own), default=sides[0])


def decode(
    model: UnCLIP,
    image_embed: Tensor,
    *,
    prompt: str | None = None,
    num_images: int = 1,
    seed: int = 0,
    **options: Any,
) -> CascadeOutput:
    """Pictures of image embeddings [D] or [N, D] from elsewhere, `num_images` of each. Where the
    CLIP's have unit norm, these are brought to it.

    Raises:
        ValueError: another width, NaN, or an argument out of its range.
    """
    embeds = given_latent(model, image_embed)
    prompts = None if prompt is None else [prompt] * len(embeds)
    return model(prompts, image_embed=embeds, num_images=num_images, seed=seed, **options)
