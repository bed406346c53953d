"""The pictures of docs/edits.md: `python docs/gallery.py` draws them all with the shipped model,
`python docs/gallery.py inpainting pca` some of them.

Each manipulation on pictures of held-out scenes, by the same calls that the page shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip import UnCLIP
from unclip.data.shapes import ShapesConfig, ShapesDataset
from unclip.edits import (
    default_components,
    inpaint,
    interpolate,
    invert,
    latent_of,
    pca_reconstructions,
    reconstruct,
    text_diff,
    upscale,
    variations,
)
from unclip.pictures import animated, encoded, grid, strip, to_pil

IMAGES = Path(__file__).parent / "images" / "edits"
SCENES = {
    "cross": 1,
    "heart": 2,
    "square and circle": 5,
    "heart with star": 6,
    "circle and star": 8,
    "circle above cross": 13,
    "triangle": 16,
}
"""Rows of the held-out world."""
STEPS: dict[str, Any] = {"decoder_steps": 25, "upsampler_steps": 8, "progress": False}
FRAMES = 7
THUMB = 128


def main() -> None:
    """Draw the pictures of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--model", default="shapes", help="shipped name, folder or org/name")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"PART must be among {', '.join(PARTS)}; got {', '.join(unknown)}")
    IMAGES.mkdir(parents=True, exist_ok=True)
    model = UnCLIP.from_pretrained(args.model)
    world = ShapesDataset(ShapesConfig(split="held_out", image_size=256))
    scenes: dict[str, Tensor] = {name: world[row]["image"] for name, row in SCENES.items()}  # type: ignore[misc]
    for part in args.parts or PARTS:
        print(part, flush=True)
        PARTS[part](model, scenes)


def draw_variations(model: UnCLIP, scenes: dict[str, Tensor]) -> None:
    images, labels = [], []
    for name in ("cross", "triangle", "circle and star"):
        for eta in (0.3, 1.0):
            drawn = variations(model, scenes[name], eta=eta, num_images=3, **STEPS)
            images += [scenes[name], *drawn.images]
            labels += ["the picture", *[f"eta {eta:g}, seed {seed}" for seed in drawn.seeds]]
    write_grid("variations", images, labels, 8)


def draw_inversions(model: UnCLIP, scenes: dict[str, Tensor]) -> None:
    rows, labels = [], []
    for name in ("cross", "square and circle"):
        latent = invert(model, scenes[name], **STEPS)
        back = reconstruct(model, latent, **STEPS)
        random = latent_of(model, scenes[name], invert_x_T=False)
        other = reconstruct(model, random, **STEPS)
        rows += [scenes[name], latent.x_T / 2, back.images[0], other.images[0]]
        labels += ["the picture", "its x_T", "from z_i and x_T", "from z_i, random x_T"]
    write_grid("inversion", rows, labels, 8)


def draw_interpolations(model: UnCLIP, scenes: dict[str, Tensor]) -> None:
    a, b = scenes["heart"], scenes["circle above cross"]
    between = interpolate(model, a, b, at=FRAMES, **STEPS)
    write_strip("interpolation", between.images)
    pictures = [to_pil(image).resize((THUMB, THUMB)) for image in between.images]
    (IMAGES / "interpolation.gif").write_bytes(animated(pictures, "gif"))
    fixed = interpolate(model, a, b, at=FRAMES, fixed_x_T=True, guidance_scale=2.0, **STEPS)
    write_strip("interpolation-fixed", fixed.images)
    texts = "a red circle in the middle", "a blue star in the middle"
    write_strip(
        "interpolation-texts",
        interpolate(model, *texts, at=FRAMES, guidance_scale=2.0, **STEPS).images,
    )
    mixed = interpolate(
        model,
        scenes["triangle"],
        "a green heart",
        at=FRAMES,
        fixed_x_T=True,
        guidance_scale=2.0,
        **STEPS,
    )
    write_strip("mix", mixed.images)


def draw_text_diffs(model: UnCLIP, scenes: dict[str, Tensor]) -> None:
    for name, texts, scene in (
        ("colour", ("a cyan heart", "a red heart"), "heart"),
        ("shape", ("a yellow triangle", "a yellow circle"), "triangle"),
    ):
        drawn = text_diff(
            model, scenes[scene], *texts, theta=0.5, frames=FRAMES, guidance_scale=2.0, **STEPS
        )
        write_strip(f"text-diff-{name}", drawn.images)


def draw_components(model: UnCLIP, scenes: dict[str, Tensor]) -> None:
    assert model.pca is not None, "the model has no PCA: python -m unclip.edits fits one"
    counts = [*default_components(len(model.pca.mean))]
    images, labels = [], []
    for name, num_images in (("heart", 1), ("square and circle", 2)):
        drawn = pca_reconstructions(
            model,
            scenes[name],
            model.pca,
            num_components=counts,
            num_images=num_images,
            guidance_scale=2.0,
            **STEPS,
        )
        for row in drawn.images.split(len(counts)):
            images += [scenes[name], *row]
            labels += ["the picture", *[f"{count} components" for count in counts]]
    write_grid("pca", images, labels, len(counts) + 1)


def draw_inpainting(model: UnCLIP, scenes: dict[str, Tensor]) -> None:
    picture = scenes["circle above cross"]
    mask = torch.zeros(256, 256)
    mask[128:, :128] = 1
    images = [picture, torch.where(mask > 0, torch.ones_like(picture), picture)]
    labels = ["the picture", "white: to paint"]
    for prompt in (
        "a yellow circle above a purple heart on a brown background",
        "a yellow circle above a red square on a brown background",
    ):
        drawn = inpaint(model, picture, mask, prompt=prompt, num_images=3, **STEPS)
        images += list(drawn.images)
        labels += [prompt] * 3
    write_grid("inpainting", images, labels, 8)


def draw_upscaling(model: UnCLIP, scenes: dict[str, Tensor]) -> None:
    images, labels = [], []
    for name in ("circle and star", "heart with star"):
        small = upscale(model, scenes[name], progress=False)
        blocks = torch.nn.functional.interpolate(scenes[name][None], (64, 64), mode="area")
        images += [torch.nn.functional.interpolate(blocks, (256, 256))[0], small.images[0]]
        labels += ["64 px", "256 px"]
    write_grid("upscaling", images, labels, 4, side=192)


def draw_prompts(model: UnCLIP, scenes: dict[str, Tensor]) -> None:
    del scenes
    options = {**STEPS, "num_images": 4}
    images, labels = [], []
    for prompt, more in (
        ("a circle in the middle", {}),
        ("a circle in the middle", {"negative_prompt": "yellow", "prior_guidance_scale": 3.0}),
        ("a red circle::2 a blue circle::1", {}),
        ("a red circle::1 a blue circle::2", {}),
    ):
        drawn = model(prompt, **options, **more)
        images += list(drawn.images)
        away = f", not {more['negative_prompt']}" if more else ""
        labels += [prompt + away] * 4
    write_grid("prompts", images, labels, 8)


def write_grid(
    name: str, images: Sequence[Tensor], labels: Sequence[str], columns: int, side: int = THUMB
) -> None:
    """A labelled grid, each picture brought to one side."""
    pictures = [to_pil(image).resize((side, side)) for image in images]
    (IMAGES / f"{name}.png").write_bytes(encoded(grid(pictures, labels, columns), optimize=True))


def write_strip(name: str, images: Tensor) -> None:
    """Pictures edge to edge."""
    pictures = [to_pil(image).resize((THUMB, THUMB)) for image in images]
    (IMAGES / f"{name}.png").write_bytes(encoded(strip(pictures), optimize=True))


PARTS = {
    "variations": draw_variations,
    "inversion": draw_inversions,
    "interpolation": draw_interpolations,
    "text-diff": draw_text_diffs,
    "pca": draw_components,
    "inpainting": draw_inpainting,
    "upscaling": draw_upscaling,
    "prompts": draw_prompts,
}

if __name__ == "__main__":
    main()
