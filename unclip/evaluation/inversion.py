"""How well a picture comes back from its latent (z_i, x_T): `python -m unclip.evaluation.inversion`
measures it.

Held-out pictures of the shapes world are inverted by DDIM and drawn again in as many steps, without
captions or guidance. Beside it the same pictures from z_i and a random x_T: what inversion adds.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.config import one_line_errors, parse, to_dict
from unclip.data.shapes import ShapesConfig, ShapesDataset
from unclip.edits import psnr
from unclip.pipeline import UnCLIP


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """How inversion is measured."""

    model: str = "shapes"
    """What `UnCLIP.from_pretrained` takes: a name, a folder, or `org/name` on the Hub."""
    num: int = 16
    """Pictures, of held-out scenes."""
    steps: tuple[int, ...] = (10, 25, 50, 100, 250)
    """Numbers of DDIM steps, the same both ways."""
    iterations: tuple[int, ...] = (1, 2)
    """Network evaluations of a step of the inversion; 1 is DDIM's own."""
    batch_size: int = 8
    """Pictures at a time."""
    device: str = "cpu"
    """Where the model runs."""
    out: Path | None = None
    """JSON file to write."""


def measure(config: InversionConfig) -> dict[str, Any]:
    """Mean PSNR of the pictures drawn again, dB, and how far x_T is from noise of variance 1."""
    model = UnCLIP.from_pretrained(config.model, device=config.device)
    if model.clip is None:
        raise ValueError(f"inversion needs a CLIP; got {config.model}, which has none")
    side = model.decoder.image_size
    dataset = ShapesDataset(ShapesConfig(split="held_out", image_size=side))
    images = torch.stack([dataset[k]["image"] for k in range(config.num)])  # type: ignore[misc]
    embeds = torch.cat([model.clip.encode_image(b.to(model.clip.device)) for b in images.split(64)])
    rows = []
    for steps in config.steps:
        options: dict[str, Any] = {"decoder_steps": steps, "guidance_scale": 1.0, "progress": False}

        def again(x_T: Tensor | None, options: dict[str, Any] = options) -> float:
            drawn = model(
                image_embed=embeds, x_T=x_T, size=side, batch_size=config.batch_size, **options
            )
            return psnr(drawn.images, images).mean().item()

        row: dict[str, Any] = {"steps": steps, "random": {"psnr": again(None)}}
        for iterations in config.iterations:
            pairs = zip(
                images.split(config.batch_size), embeds.split(config.batch_size), strict=True
            )
            x_T = torch.cat(
                [
                    model.invert(x, image_embed=z, num_iterations=iterations, **options)
                    for x, z in pairs
                ]
            )
            row[f"iterations_{iterations}"] = {"psnr": again(x_T), "x_T_std": x_T.std().item()}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return {"settings": to_dict(config), "rows": rows}


def main() -> None:
    """Measure one model and print JSON."""
    with one_line_errors():
        config = parse(InversionConfig, sys.argv[1:], description=__doc__)
        result = measure(config)
        if config.out is not None:
            config.out.parent.mkdir(parents=True, exist_ok=True)
            config.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
