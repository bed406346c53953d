"""What can be done to a picture with an unCLIP model (paper, section 3): verbs over the pipeline.

Every verb takes an `UnCLIP` first; pictures are [3, H, W] in [-1, 1], of any size, and are cut to
their middle square and resized to what each stage sees. What it draws comes back as a
`CascadeOutput`. Further keywords go to the pipeline: fields of `CascadeOptions`, `progress`,
`callback`.
"""

from unclip.edits.blending import check_theta, interpolate, slerp, text_diff
from unclip.edits.drawing import check_eta, decode, inpaint, upscale, variations
from unclip.edits.fitting import check_embeds, check_mask, fit
from unclip.edits.latents import Latent, invert, latent_of, psnr, reconstruct
from unclip.edits.principal import default_components, fit_pca, pca_reconstructions

__all__ = [
    "Latent",
    "check_embeds",
    "check_eta",
    "check_mask",
    "check_theta",
    "decode",
    "default_components",
    "fit",
    "fit_pca",
    "inpaint",
    "interpolate",
    "invert",
    "latent_of",
    "pca_reconstructions",
    "psnr",
    "reconstruct",
    "slerp",
    "text_diff",
    "upscale",
    "variations",
]
