"""What comes from outside, made to fit a model: pictures, masks, embeddings.

Shapes: H W a picture's own size, S a side that a stage sees, N embeddings, D width of CLIP's joint
space.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from unclip.clip import FrozenCLIP
from unclip.data.images import resize
from unclip.pipeline import UnCLIP

FAR_FROM_UNIT = 0.01
"""How far from 1 the length of an embedding may be that counts as one of unit norm."""


def square(image: Tensor) -> Tensor:
    """The middle square [..., S, S] of a picture [..., H, W], S the shorter side."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side]


def fit(image: Tensor, side: int) -> Tensor:
    """The middle square of a picture [3, H, W] in [-1, 1], resized to [3, side, side].

    Raises:
        ValueError: it has another shape, or is not finite.
    """
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be [3, H, W] in [-1, 1]; got {list(image.shape)}")
    if not image.isfinite().all():
        raise ValueError("image must be finite; got NaN or infinity: look at what made it")
    return resize(square(image)[None].float(), side)[0]


def clip_of(model: UnCLIP) -> FrozenCLIP:
    """The model's CLIP; raises ValueError where there is none, or none that sees pictures."""
    if model.clip is None:
        raise ValueError(
            "this needs a CLIP to see the picture with; got a model without, as GLIDE's are: load "
            "another model"
        )
    model.clip.required_image_size()
    return model.clip


def embed_image(model: UnCLIP, image: Tensor) -> Tensor:
    """CLIP's image_embed [D] of a picture, on the CPU."""
    clip = clip_of(model)
    with model.at_work(clip):
        view = fit(image, clip.required_image_size())
        return clip.encode_image(view[None].to(clip.device))[0].cpu()


def check_embeds(embeds: Tensor, width: int, unit_norm: bool) -> tuple[Tensor, int]:
    """Embeddings from elsewhere as [N, D], and how many were brought to unit norm.

    Args:
        embeds: [D] or [N, D].
        width: D of the model's CLIP.
        unit_norm: whether that CLIP's embeddings have unit norm; those that are not within 1% of it
            are brought there.

    Raises:
        ValueError: another width, NaN or infinity, or an embedding of zeros.
    """
    rows = embeds[None] if embeds.ndim == 1 else embeds
    if rows.ndim != 2 or rows.shape[1] != width or not len(rows):
        raise ValueError(
            f"image embeddings must be [{width}] or [N, {width}], as wide as this model's CLIP; "
            f"got {list(embeds.shape)}: take embeddings of that CLIP"
        )
    rows = rows.float()
    if not rows.isfinite().all():
        bad = (~rows.isfinite().all(dim=1)).nonzero()[0].item()
        raise ValueError(
            f"image embeddings must be finite; got NaN or infinity in row {bad}: leave it out"
        )
    if not unit_norm:
        return rows, 0
    norm = rows.norm(dim=1)
    if not (norm > 0).all():
        bad = (norm == 0).nonzero()[0].item()
        raise ValueError(f"image embeddings must not be zero; got row {bad}: leave it out")
    far = int(((norm - 1).abs() > FAR_FROM_UNIT).sum())
    return F.normalize(rows, dim=1), far


def check_mask(mask: Tensor, image: Tensor) -> Tensor:
    """What of a picture [3, H, W] is to be painted anew, as bool [H, W].

    Args:
        mask: [H, W] or [1, H, W], 0 to 1; above a half (white) is to be painted anew.
        image: the picture.

    Raises:
        ValueError: the mask has another size, or is all black or all white within the picture's
            middle square, which is what is drawn.
    """
    if mask.shape[-2:] != image.shape[-2:]:
        sizes = [f"{x.shape[-1]} x {x.shape[-2]}" for x in (image, mask)]
        raise ValueError(
            f"the mask must be as large as the picture, {sizes[0]} px; got {sizes[1]}: draw it on "
            "the picture itself"
        )
    repaint = mask.reshape(mask.shape[-2:]) > 0.5
    within = square(repaint)
    if not within.any():
        raise ValueError(
            "the mask must be white (1) where the picture is to be painted anew; got one that is "
            "all black: there is nothing to paint"
        )
    if within.all():
        raise ValueError(
            "the mask must be black (0) where the picture is to be kept; got one that is all "
            "white: draw the picture by its caption instead"
        )
    return repaint
