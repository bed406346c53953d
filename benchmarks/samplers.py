"""What a decoder's samplers draw in how many steps: oracle accuracy on the built-in world.

    python benchmarks/samplers.py --out samplers.json [--num 150] [--steps 5 10 20 40]

Held-out captions, one embedding of the prior for each, the same starting noise for every sampler;
prints a Markdown table of the percent of one-object scenes that are whole, with the milliseconds a
picture takes. Of what is in the file already nothing is drawn again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from unclip.data.oracle import Oracle
from unclip.data.shapes import ShapesConfig, draw_scene
from unclip.diffusion import SAMPLERS
from unclip.evaluation.shapes import score
from unclip.pipeline import UnCLIP


def main() -> None:
    """Draw, score, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of what was measured")
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--num", type=int, default=150, help="captions")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--samplers", nargs="+", default=[s for s in SAMPLERS if s != "analytic"])
    a = parser.parse_args()
    model = UnCLIP.from_pretrained(a.model)
    size = model.decoder.image_size
    world = ShapesConfig(split="held_out", caption_detail="full", object_weights=(1, 0, 0))
    scenes, captions = zip(*(draw_scene(world, k) for k in range(a.num)), strict=True)
    texts = [caption.text for caption in captions]
    found: dict[str, Any] = json.loads(a.out.read_text()) if a.out.is_file() else {}
    drawn = model(texts, size=size, decoder_steps=1, batch_size=25, progress=False)
    oracle = Oracle.load()
    for sampler in a.samplers:
        for steps in a.steps:
            key = f"{sampler}/{steps}/{a.guidance}/{a.num}"
            if key in found:
                continue
            began = time.perf_counter()
            pictures = model(
                texts,
                image_embed=drawn.image_embed,
                size=size,
                sampler=sampler,
                decoder_steps=steps,
                guidance_scale=a.guidance,
                batch_size=25,
                progress=False,
            ).images
            seconds = time.perf_counter() - began
            table = score(pictures, scenes, captions, oracle)["all"]
            found[key] = {
                "whole": table["all"]["fraction"],
                "low": table["all"]["low"],
                "high": table["all"]["high"],
                "milliseconds": 1000 * seconds / a.num,
            }
            a.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"| sampler | {' | '.join(f'{steps} steps' for steps in a.steps)} |")
    print("| --- |" + " --- |" * len(a.steps))
    for sampler in a.samplers:
        cells = (found[f"{sampler}/{steps}/{a.guidance}/{a.num}"] for steps in a.steps)
        line = " | ".join(
            f"{100 * c['whole']:.1f} [{100 * c['low']:.0f}, {100 * c['high']:.0f}]" for c in cells
        )
        print(f"| {sampler} | {line} |")


if __name__ == "__main__":
    main()
