"""What the first principal components of CLIP's embeddings hold (paper, section 3.4).

Shapes: K numbers of components, D width of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.data.source import SourceConfig, open_source
from unclip.edits.fitting import clip_of, embed_image
from unclip.pipeline import CascadeOutput, UnCLIP
from unclip.priors import PCA


def pca_reconstructions(
    model: UnCLIP,
    image: Tensor,
    pca: PCA,
    *,
    num_components: Sequence[int] | None = None,
    num_images: int = 1,
    prompt: str | None = None,
    seed: int = 0,
    **options: Any,
) -> CascadeOutput:
    """A picture drawn K times, each from more of its embedding's principal components and all from
    one seed's noise; the same again with the next seed for each further image.

    Args:
        model: with a CLIP that sees pictures.
        image: [3, H, W] in [-1, 1].
        pca: fitted on embeddings of that CLIP.
        num_components: K numbers, 1 to D; None: powers of two, and D.
        num_images: seeds, K pictures each.
        prompt, seed: as of the pipeline's call.
        options: as of the pipeline's call.

    Returns:
        num_images x K pictures, those of one seed together.

    Raises:
        ValueError: `num_images` is below 1, the PCA is of another width, or has fewer components.
    """
    clip = clip_of(model)
    width = len(pca.mean)
    if width != clip.embed_dim:
        raise ValueError(
            f"the PCA must be as wide as the CLIP's embeddings, {clip.embed_dim}; got {width}: fit "
            "it on embeddings of this CLIP"
        )
    if num_components is None:
        num_components = default_components(width)
    for count in num_components:
        if not 1 <= count <= width:
            raise ValueError(
                f"num_components must lie between 1 and the PCA's {width}; got {count}: use "
                f"{min(max(count, 1), width)}"
            )
    image_embed = embed_image(model, image)[None].to(pca.mean.device)
    embeds = torch.cat([pca.reconstruct(image_embed, count) for count in num_components]).cpu()
    if clip.unit_norm:
        embeds = F.normalize(embeds, dim=-1)
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1; got {num_images}: use 1")
    seeds = [seed + k for k in range(num_images) for _ in embeds]
    embeds = embeds.repeat(num_images, 1)
    prompts = None if prompt is None else [prompt] * len(embeds)
    return model(prompts, image_embed=embeds, seed=seeds, **options)


def fit_pca(model: UnCLIP, data: str, num_samples: int = 10_000) -> PCA:
    """A PCA fitted on embeddings of the model's CLIP.

    Args:
        model: with a CLIP that sees pictures, unless `data` is a folder of embeddings.
        data: `shapes`, pictures, or a folder of embeddings: what `unclip.data.source` opens.
        num_samples: how many of them, at the most.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read, or there is too little.
    """
    clip = clip_of(model)
    size = clip.required_image_size()
    dataset = open_source(SourceConfig(data=data, image_size=size))
    count = min(num_samples, len(dataset))  # type: ignore[arg-type]
    if count < 2:
        raise ValueError(
            f"a PCA needs at least 2 embeddings; got {count} of {data}: use more, 10000 say"
        )
    with model.at_work(clip):
        embeds = clip.encode_rows(dataset, range(count))
    return PCA.fit(embeds.cpu())


def default_components(width: int) -> list[int]:
    """2, 4, 8 and so on below D, and D."""
    return [2**k for k in range(1, 16) if 2**k < width] + [width]
