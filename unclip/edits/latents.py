"""The bipartite latent (z_i, x_T) of a picture (paper, section 3): what CLIP sees in it, and the
rest, which the decoder needs to draw just this picture.

Shapes: S side of the decoder's pictures, D width of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from unclip.checkpoint import load_weights
from unclip.edits.fitting import check_embeds, clip_of, embed_image, fit
from unclip.pipeline import CascadeOutput, UnCLIP, picture_generators

INVERSION_OPTIONS = {
    "decoder_steps",
    "guidance_scale",
    "guidance_interval",
    "guidance_rescale",
    "dynamic_threshold",
    "negative_prompt",
    "progress",
    "callback",
    "num_iterations",
}
"""Of a verb's options, those that inversion reads."""


PLAIN_DDIM = {"guidance_scale": 1.0, "sampler": "ddim", "eta": 0.0}
"""What leads back from x_T to the picture, whatever the model is sampled with elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Latent:
    """z_i and x_T of one picture."""

    image_embed: Tensor
    """[D]."""
    x_T: Tensor
    """[3, S, S]."""

    def to_bytes(self) -> bytes:
        """Both as a safetensors file."""
        return save({"image_embed": self.image_embed, "x_T": self.x_T})

    def save(self, path: Path) -> None:
        """Write `to_bytes`."""
        path.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Latent:
        """Read what `save` wrote; raises FileNotFoundError or ValueError for anything else."""
        tensors = load_weights(path, mapped=False)
        if set(tensors) != {"image_embed", "x_T"}:
            raise ValueError(f"{path} must hold image_embed and x_T; got {', '.join(tensors)}")
        return cls(**tensors)


def invert(model: UnCLIP, image: Tensor, *, prompt: str | None = None, **options: Any) -> Latent:
    """The latent of a picture: CLIP's embedding, and by DDIM inversion the noise from which the
    decoder draws it again.

    Args:
        model: with a CLIP that sees pictures and a decoder that reads its embeddings.
        image: [3, H, W] in [-1, 1].
        prompt: its caption, or None.
        options: `decoder_steps`, `guidance_scale` (1 unless given: guidance is not undone well),
            `num_iterations` of `unclip.diffusion.invert`, `progress`, `callback`.

    Raises:
        ValueError: the picture or an option does not fit.
    """
    image_embed = embed_image(model, image)
    small = fit(image, model.decoder.image_size)[None]
    chosen = {**PLAIN_DDIM, **for_inversion(options)}
    x_T = model.invert(small, image_embed=image_embed, prompts=prompt, **chosen)
    return Latent(image_embed=image_embed, x_T=x_T[0])


def for_inversion(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a call's options that inversion reads."""
    return {name: value for name, value in options.items() if name in INVERSION_OPTIONS}


def for_drawing(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a verb's options that the pipeline's call reads."""
    return {name: value for name, value in options.items() if name != "num_iterations"}


def reconstruct(
    model: UnCLIP, latent: Latent, *, prompt: str | None = None, **options: Any
) -> CascadeOutput:
    """Draw a picture from its latent, by DDIM without added noise; guidance is 1 unless given."""
    return model(
        prompt,
        image_embed=latent.image_embed,
        x_T=latent.x_T,
        **{**PLAIN_DDIM, **for_drawing(options)},
    )


def latent_of(
    model: UnCLIP, source: Tensor | str, *, seed: int = 0, invert_x_T: bool = True, **options: Any
) -> Latent:
    """The latent of a picture [3, H, W] or of a text.

    Of a text: the embedding that the prior draws for it by the seed, and the seed's own noise, as a
    picture of that caption and seed is drawn. A picture gets the seed's noise too where
    `invert_x_T` is False.
    """
    if isinstance(source, Tensor) and invert_x_T:
        return invert(model, source, **options)
    if isinstance(source, Tensor):
        image_embed = embed_image(model, source)
    else:
        image_embed = model.embed(source, seed=seed, **for_drawing(options))[0]
    side = model.decoder.image_size
    (generator,) = picture_generators([seed], "decoder")
    return Latent(image_embed=image_embed, x_T=torch.randn(3, side, side, generator=generator))


def given_latent(model: UnCLIP, image_embed: Tensor) -> Tensor:
    """An embedding [D], or several [N, D], checked against the model's CLIP: [N, D]."""
    clip = clip_of(model)
    return check_embeds(image_embed, clip.embed_dim, clip.unit_norm)[0]


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures [B, 3, H, W] in [-1, 1] to others, dB, [B]."""
    error = ((images - others) / 2).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-10).log10()
