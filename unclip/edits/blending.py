"""Between two latents: interpolation and text diffs (paper, sections 3.2 and 3.3).

Shapes: F frames, S side of the decoder's pictures, D width of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.edits.fitting import clip_of
from unclip.edits.latents import PLAIN_DDIM, Latent, for_drawing, invert, latent_of
from unclip.pipeline import CascadeOutput, UnCLIP, check_prompt

SAME_ANGLE = 1e-4
"""Radians below which two directions are one: slerp divides by the sine of the angle."""


def slerp(a: Tensor, b: Tensor, fraction: float | Sequence[float]) -> Tensor:
    """Spherical interpolation between two tensors of one shape.

    The directions go along the great circle between them, sin((1 - f) w) / sin(w) a + sin(f w) /
    sin(w) b with w the angle; the length goes in a straight line, so that the ends are a and b.

    Args:
        a, b: of any shape.
        fraction: from 0 (a) to 1 (b); or several.

    Returns:
        The shape of `a`; with several fractions, stacked.

    Raises:
        ValueError: a and b have other shapes, one is zero, or they point opposite ways, where there
            is no one way between them.
    """
    if not isinstance(fraction, float | int):
        return torch.stack([slerp(a, b, one) for one in fraction])
    if a.shape != b.shape:
        raise ValueError(f"slerp needs one shape; got {list(a.shape)} and {list(b.shape)}")
    lengths = a.norm(), b.norm()
    if not all(lengths):
        raise ValueError("slerp needs directions; got a tensor of zeros")
    u, v = a / lengths[0], b / lengths[1]
    # The chord tells small angles that the cosine rounds to 1.
    angle = 2 * torch.asin(((u - v).norm() / 2).clamp(max=1))
    if angle > torch.pi - SAME_ANGLE:
        raise ValueError("slerp needs a way between the two; got two that point opposite ways")
    if angle < SAME_ANGLE:
        direction = torch.lerp(u, v, float(fraction))
    else:
        weights = torch.sin((1 - fraction) * angle), torch.sin(fraction * angle)
        direction = (weights[0] * u + weights[1] * v) / torch.sin(angle)
    return direction * torch.lerp(lengths[0], lengths[1], float(fraction))


def interpolate(
    model: UnCLIP,
    a: Tensor | str,
    b: Tensor | str,
    *,
    at: Sequence[float] | int = 9,
    fixed_x_T: bool = False,
    prompt: str | None = None,
    seed: int = 0,
    **options: Any,
) -> CascadeOutput:
    """Pictures between two, each a picture or a text (paper, section 3.2).

    Args:
        model: with a CLIP, and a prior if one of the two is a text.
        a, b: a picture [3, H, W] in [-1, 1], or a caption.
        at: how many frames, evenly spaced with both ends; or where they lie, 0 (a) to 1 (b): one
            number mixes the two by weight.
        fixed_x_T: all frames start from the seed's noise. Else a picture's end starts from its own
            inversion, so that it comes out as it was, a text's from the seed's noise, and the
            frames between from a slerp of the two.
        prompt: a caption that all frames are given, or None.
        seed: of the noise, the same for all frames.
        options: as of the pipeline's call; guidance is 1 unless given.

    Raises:
        ValueError: an argument is out of its range.
    """
    if isinstance(at, int):
        if at < 2:
            raise ValueError(f"frames must be at least 2, both ends; got {at}: use 9")
        at = torch.linspace(0, 1, at).tolist()
    if not len(at) or not all(0 <= f <= 1 for f in at):
        raise ValueError(
            f"at must lie in [0, 1], 0 being the first and 1 the second; got {list(at)}"
        )
    for source in (a, b):
        if isinstance(source, str):
            check_prompt(source)
    clip_of(model)
    options = {**PLAIN_DDIM, **options}
    first, second = (
        latent_of(model, source, seed=seed, invert_x_T=not fixed_x_T, **options)
        for source in (a, b)
    )
    latents = Latent(
        image_embed=slerp(first.image_embed, second.image_embed, at),
        x_T=slerp(first.x_T, second.x_T, at),
    )
    return _draw(model, latents, prompt, seed, options)


def text_diff(
    model: UnCLIP,
    image: Tensor,
    source: str,
    target: str,
    *,
    theta: float = 0.5,
    frames: int = 6,
    prompt: str | None = None,
    seed: int = 0,
    **options: Any,
) -> CascadeOutput:
    """A picture on its way from what one text says to what another does (paper, section 3.3): with
    z_d = normalise(z_t - z_t0), frames of slerp(z_i, z_d, f) for f from 0 to `theta`, all from the
    picture's own x_T.

    Args:
        model: with a CLIP that sees pictures.
        image: [3, H, W] in [-1, 1].
        source: what the picture shows now (z_t0); a baseline such as "a photo" will do.
        target: what it is to show (z_t).
        theta: how far to go, above 0 and at most 1; the paper's are 0.25 to 0.50.
        frames: how many pictures, both ends included.
        prompt: a caption that all frames are given, or None.
        seed: of what the upsamplers draw.
        options: as of the pipeline's call; guidance is 1 unless given.

    Raises:
        ValueError: an argument is out of its range, or the two texts are the same to CLIP.
    """
    check_theta(theta)
    if frames < 2:
        raise ValueError(f"frames must be at least 2, both ends; got {frames}: use 6")
    for text in (source, target):
        check_prompt(text)
    clip = clip_of(model)
    with model.at_work(clip):
        z_t0, z_t = clip.encode_text([source, target]).text_embed.cpu()
    difference = F.normalize(z_t, dim=-1) - F.normalize(z_t0, dim=-1)
    if difference.norm() < SAME_ANGLE:
        raise ValueError(
            f"the two texts must differ to CLIP; got {source!r} and {target!r}: say what changes"
        )
    options = {**PLAIN_DDIM, **options}
    latent = invert(model, image, prompt=prompt, **options)
    length = latent.image_embed.norm()
    direction = F.normalize(difference, dim=-1) * length
    fractions = torch.linspace(0, theta, frames).tolist()
    latents = Latent(
        image_embed=slerp(latent.image_embed, direction, fractions),
        x_T=latent.x_T.expand(frames, -1, -1, -1),
    )
    return _draw(model, latents, prompt, seed, options)


def check_theta(theta: float) -> None:
    """Raise ValueError unless a text diff's theta is above 0 and at most 1."""
    if not 0 < theta <= 1:
        raise ValueError(
            f"theta must lie in (0, 1], how far to go; got {theta}: the paper takes 0.25 to 0.50"
        )


def _draw(
    model: UnCLIP, latents: Latent, prompt: str | None, seed: int, options: dict[str, Any]
) -> CascadeOutput:
    """A picture of each of F latents, `image_embed` [F, D] and `x_T` [F, 3, S, S]."""
    frames = len(latents.x_T)
    return model(
        None if prompt is None else [prompt] * frames,
        image_embed=latents.image_embed,
        x_T=latents.x_T,
        seed=[seed] * frames,  # the upsamplers' noise is not to flicker
        **for_drawing(options),
    )
