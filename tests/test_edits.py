"""The verbs on a tiny model, what they refuse, and the shipped model once."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip import UnCLIP
from unclip.data.shapes import ShapesConfig, ShapesDataset
from unclip.diffusion import Resampling
from unclip.edits import (
    Latent,
    check_embeds,
    check_mask,
    decode,
    fit,
    fit_pca,
    inpaint,
    interpolate,
    invert,
    latent_of,
    pca_reconstructions,
    psnr,
    reconstruct,
    slerp,
    text_diff,
    upscale,
    variations,
)
from unclip.pipeline import Cancelled
from unclip.priors import PCA

FAST: dict[str, Any] = {
    "prior_steps": 3,
    "decoder_steps": 4,
    "upsampler_steps": 2,
    "progress": False,
}
SMALL: dict[str, Any] = {**FAST, "size": 16}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return 2 * torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0)) - 1


@pytest.fixture(scope="module")
def pca(model: UnCLIP) -> PCA:
    return PCA.fit(F.normalize(torch.randn(64, 16), dim=-1))


# ----------------------------------------------------------------------------------- mathematics


def test_slerp_goes_along_the_circle() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    half = slerp(a, b, 0.5)
    torch.testing.assert_close(half, 2 * torch.tensor([0.5**0.5, 0.5**0.5]))
    ends = slerp(a, b, [0.0, 1.0])
    torch.testing.assert_close(ends, torch.stack([a, b]))
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    third = slerp(a, torch.tensor([0.0, 1.0]), 1 / 3)
    torch.testing.assert_close(torch.atan2(third[1], third[0]), torch.tensor(torch.pi / 6))


@pytest.mark.parametrize(
    ("b", "message"),
    [([-1.0, 0.0], "opposite ways"), ([0.0, 0.0], "zeros"), ([1.0, 0.0, 0.0], "one shape")],
)
def test_slerp_refuses_what_has_no_way(b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slerp(torch.tensor([1.0, 0.0]), torch.tensor(b), 0.5)


def test_fit_cuts_the_middle_and_resizes(image: Tensor) -> None:
    assert torch.equal(fit(image, 48), image[:, :, 8:56])
    assert fit(image, 16).shape == (3, 16, 16)


# ---------------------------------------------------------------------------------------- verbs


def test_a_latent_is_saved_and_drawn_again(model: UnCLIP, image: Tensor, tmp_path: Path) -> None:
    latent = invert(model, image, **SMALL)
    assert latent.image_embed.shape == (16,) and latent.x_T.shape == (3, 16, 16)
    latent.save(tmp_path / "latent.safetensors")
    loaded = Latent.load(tmp_path / "latent.safetensors")
    drawn, again = (reconstruct(model, one, **SMALL).images for one in (latent, loaded))
    assert torch.equal(drawn, again)
    random = latent_of(model, image, invert_x_T=False)
    assert torch.equal(random.image_embed, latent.image_embed)
    usual = model(image_embed=latent.image_embed, guidance_scale=1.0, **SMALL).images
    torch.testing.assert_close(reconstruct(model, random, **SMALL).images, usual)
    assert (usual - drawn).abs().max() > 0.01


def test_psnr() -> None:
    white = torch.ones(1, 3, 4, 4)
    torch.testing.assert_close(psnr(white, -white), torch.zeros(1))
    torch.testing.assert_close(psnr(white, 0.8 * white), torch.tensor([20.0]))


def test_variations_differ_by_eta(model: UnCLIP, image: Tensor) -> None:
    still = reconstruct(model, invert(model, image, **SMALL), **SMALL, guidance_scale=3.0).images
    little, much = (
        variations(model, image, eta=eta, num_images=2, **SMALL).images for eta in (0.1, 1.0)
    )
    assert (little[0] - still).abs().mean() < (much[0] - still).abs().mean()
    assert (much[0] - much[1]).abs().max() > 0.01
    alone = variations(model, image, eta=1.0, num_images=1, seed=1, **SMALL).images
    torch.testing.assert_close(alone[0], much[1], atol=1e-3, rtol=0)


def test_interpolation_ends_at_both_pictures(model: UnCLIP, image: Tensor) -> None:
    other = image.flip(2)
    between = interpolate(model, image, other, at=3, **SMALL)
    assert between.images.shape == (3, 3, 16, 16) and between.seeds == [0, 0, 0]
    for frame, source in ((0, image), (2, other)):
        end = reconstruct(model, invert(model, source, **SMALL), **SMALL).images
        torch.testing.assert_close(between.images[frame], end[0], atol=1e-3, rtol=0)
    fixed = interpolate(model, image, other, at=3, fixed_x_T=True, **SMALL)
    torch.testing.assert_close(fixed.image_embed, between.image_embed)
    assert (fixed.images - between.images).abs().max() > 0.01


def test_interpolation_of_texts_ends_at_what_each_draws(model: UnCLIP, image: Tensor) -> None:
    between = interpolate(model, "a red circle", "a blue star", at=2, seed=3, **SMALL)
    embeds = model("a blue star", seed=3, **SMALL).image_embed
    assert embeds is not None and between.image_embed is not None
    torch.testing.assert_close(between.image_embed[1], embeds[0], atol=1e-4, rtol=0)
    drawn = model(image_embed=embeds, seed=3, guidance_scale=1.0, **SMALL).images
    torch.testing.assert_close(between.images[1], drawn[0], atol=1e-3, rtol=0)
    mixed = interpolate(model, image, "a blue star", at=[0.25], **SMALL)
    assert mixed.images.shape == (1, 3, 16, 16)


def test_between_a_picture_and_itself_there_is_only_itself(model: UnCLIP, image: Tensor) -> None:
    same = interpolate(model, image, image, at=3, **SMALL).images
    assert same.isfinite().all()
    torch.testing.assert_close(same[1], same[0], atol=1e-3, rtol=0)


def test_text_diff_starts_at_the_picture(model: UnCLIP, image: Tensor) -> None:
    drawn = text_diff(model, image, "a red circle", "a blue star", theta=0.4, frames=3, **SMALL)
    own = invert(model, image, **SMALL)
    assert drawn.image_embed is not None and model.clip is not None
    torch.testing.assert_close(drawn.image_embed[0], own.image_embed, atol=1e-5, rtol=0)
    text = model.clip.encode_text(["a red circle", "a blue star"]).text_embed
    direction = F.normalize(text[1] - text[0], dim=-1)
    cosines = F.cosine_similarity(drawn.image_embed, direction, dim=-1)
    assert cosines[0] < cosines[1] < cosines[2]
    torch.testing.assert_close(drawn.image_embed.norm(dim=1), torch.ones(3))


def test_pca_reconstructions_come_nearer(model: UnCLIP, image: Tensor, pca: PCA) -> None:
    drawn = pca_reconstructions(model, image, pca, **SMALL)
    assert drawn.image_embed is not None
    assert len(drawn.images) == 4  # 2, 4, 8 and all 16
    own = latent_of(model, image, invert_x_T=False).image_embed
    cosines = F.cosine_similarity(drawn.image_embed, own, dim=-1)
    assert (cosines.diff() > 0).all() and cosines[-1] > 0.9999


def test_pca_reconstructions_by_several_seeds(model: UnCLIP, image: Tensor, pca: PCA) -> None:
    both = pca_reconstructions(
        model, image, pca, num_components=[2, 16], num_images=2, seed=3, **SMALL
    )
    assert list(both.seeds) == [3, 3, 4, 4]
    second = pca_reconstructions(model, image, pca, num_components=[2, 16], seed=4, **SMALL)
    torch.testing.assert_close(both.images[2:], second.images, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="num_images must be at least 1; got 0"):
        pca_reconstructions(model, image, pca, num_images=0, **SMALL)


def test_a_pca_of_pictures_and_one_that_a_model_keeps(model: UnCLIP, tmp_path: Path) -> None:
    fitted = fit_pca(model, "shapes", 20)
    kept = UnCLIP(model.clip, model.prior, model.decoder, model.upsamplers, pca=fitted)
    kept.save_pretrained(tmp_path / "model")
    again = UnCLIP.from_pretrained(tmp_path / "model").pca
    assert again is not None
    torch.testing.assert_close(again.components, fitted.components, atol=1e-3, rtol=1e-3)
    assert again.mean.dtype == torch.float32
    assert UnCLIP.from_pretrained(tmp_path / "model", decoder=tmp_path / "model").pca is not None


@pytest.mark.parametrize("prompt", ["a red circle", None])
def test_inpainting_keeps_black_and_paints_white(
    model: UnCLIP, image: Tensor, prompt: str | None
) -> None:
    mask = torch.zeros(48, 64)
    mask[:, :32] = 1
    resampling = Resampling(jump_length=2, num_resamples=2)
    drawn = inpaint(model, image, mask, prompt=prompt, resampling=resampling, **FAST)
    own = fit(image, 64)
    # A column that the edge of the mask covers in part is painted.
    torch.testing.assert_close(drawn.images[0, :, :, 33:], own[:, :, 33:])
    assert (drawn.images[0, :, :, :31] - own[:, :, :31]).abs().mean() > 0.1
    small = drawn.by_size[16]
    torch.testing.assert_close(small[0, :, :, 9:], fit(own, 16)[:, :, 9:], atol=1e-5, rtol=0)


def test_upscaling_draws_no_small_picture(model: UnCLIP, image: Tensor) -> None:
    drawn = upscale(model, image, num_images=2, **FAST)
    assert list(drawn.by_size) == [64] and drawn.images.shape == (2, 3, 64, 64)
    assert drawn.image_embed is None and not {"prior", "decoder"} & set(drawn.seconds)
    own = model(low_res=fit(image, 16), seed=1, **FAST).images
    torch.testing.assert_close(own[0], drawn.images[1], atol=1e-3, rtol=0)


def test_decoding_brings_embeddings_to_unit_norm(model: UnCLIP) -> None:
    embeds = torch.randn(2, 16)
    drawn = decode(model, embeds, num_images=2, **SMALL)
    assert drawn.images.shape == (4, 3, 16, 16)
    assert drawn.image_embed is not None
    torch.testing.assert_close(drawn.image_embed[2], F.normalize(embeds[1], dim=0))
    one = decode(model, 5 * embeds[1], seed=2, **SMALL)
    torch.testing.assert_close(one.images[0], drawn.images[2], atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("eta", [0.0, -0.1, 1.5, float("nan")])
def test_eta_out_of_range(model: UnCLIP, image: Tensor, eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta must lie in \(0, 1\] for variations; got"):
        variations(model, image, eta=eta, **SMALL)


@pytest.mark.parametrize("theta", [0.0, -0.1, 1.5, float("nan")])
def test_theta_out_of_range(model: UnCLIP, image: Tensor, theta: float) -> None:
    with pytest.raises(ValueError, match=r"theta must lie in \(0, 1\]"):
        text_diff(model, image, "a", "b", theta=theta, **SMALL)


def test_texts_that_say_the_same(model: UnCLIP, image: Tensor) -> None:
    with pytest.raises(ValueError, match="the two texts must differ to CLIP"):
        text_diff(model, image, "a star", "a star", **SMALL)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(48, 64), "all black: there is nothing to paint"),
        (torch.ones(48, 64), "all white: draw the picture by its caption"),
        (torch.ones(64, 48), "as large as the picture, 64 x 48 px; got 48 x 64"),
        (F.pad(torch.zeros(48, 56), (8, 0), value=1.0), "all black"),  # white where it is cut off
    ],
)
def test_masks_that_do_not_fit(image: Tensor, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mask(mask, image)


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (torch.ones(15), r"must be \[16\] or \[N, 16\].*; got \[15\]"),
        (torch.ones(2, 3, 16), r"got \[2, 3, 16\]"),
        (torch.ones(0, 16), r"got \[0, 16\]"),
        (torch.tensor([[1.0] * 16, [float("nan")] * 16]), "got NaN or infinity in row 1"),
        (torch.zeros(16), "must not be zero; got row 0"),
    ],
)
def test_embeddings_that_do_not_fit(embeds: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_embeds(embeds, 16, True)


@pytest.mark.parametrize("count", [0, 17])
def test_more_components_than_there_are(model: UnCLIP, image: Tensor, pca: PCA, count: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the PCA's 16; got {count}: use"):
        pca_reconstructions(model, image, pca, num_components=[2, count], **SMALL)


def test_a_pca_of_another_clip(model: UnCLIP, image: Tensor) -> None:
    other = PCA.fit(torch.randn(40, 8))
    with pytest.raises(ValueError, match="as wide as the CLIP's embeddings, 16; got 8"):
        pca_reconstructions(model, image, other, **SMALL)


@pytest.mark.parametrize("at", [1, [], [0.5, 1.2]])
def test_places_between_that_are_none(model: UnCLIP, image: Tensor, at: Any) -> None:
    with pytest.raises(ValueError, match=r"frames must be at least 2|at must lie in \[0, 1\]"):
        interpolate(model, image, "a star", at=at, **SMALL)


@pytest.mark.parametrize("image", [torch.zeros(1, 8, 8), torch.full((3, 8, 8), torch.nan)])
def test_tensors_that_are_no_pictures(model: UnCLIP, image: Tensor) -> None:
    with pytest.raises(ValueError, match="image must be"):
        invert(model, image, **SMALL)


def test_a_model_without_upsamplers_cannot_upscale(model: UnCLIP, image: Tensor) -> None:
    bare = UnCLIP(model.clip, model.prior, model.decoder)
    with pytest.raises(ValueError, match="upscale needs an upsampler"):
        upscale(bare, image, **FAST)


@pytest.mark.parametrize("stage", ["inversion", "decoder", "upsampler_64"])
def test_cancelled_in_the_middle_of_a_stage(model: UnCLIP, image: Tensor, stage: str) -> None:
    seen = []

    def cancel(at: str, step: int, *_: Any) -> bool:
        seen.append((at, step))
        return (at, step) != (stage, 1)

    with pytest.raises(Cancelled, match=f"cancelled in step 2 of the {stage}"):
        variations(model, image, callback=cancel, **FAST)
    assert seen[-1] == (stage, 1)


# ------------------------------------------------------------------------------ the shipped model


def test_the_shipped_model_draws_a_picture_again() -> None:
    """From its latent better than from its embedding alone; and its PCA holds what it should."""
    shipped = UnCLIP.from_pretrained("shapes")
    picture = ShapesDataset(ShapesConfig(split="held_out", image_size=64))[1]["image"]
    assert isinstance(picture, Tensor)
    few: dict[str, Any] = {"decoder_steps": 10, "progress": False, "size": 64}
    latent = invert(shipped, picture, num_iterations=2, **few)
    back = reconstruct(shipped, latent, **few).images
    random = latent_of(shipped, picture, invert_x_T=False)
    other = reconstruct(shipped, random, **few).images
    assert psnr(back, picture[None]) > psnr(other, picture[None]) + 3
    assert shipped.pca is not None
    whole = shipped.pca.reconstruct(latent.image_embed[None], 256)
    torch.testing.assert_close(whole[0], latent.image_embed, atol=5e-3, rtol=0)
    some = shipped.pca.reconstruct(latent.image_embed[None], 64)
    assert F.cosine_similarity(some, latent.image_embed[None]) > 0.99
