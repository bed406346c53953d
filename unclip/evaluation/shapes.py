"""How well pictures show what their captions say, read by the shapes world's oracle.

`python -m unclip.evaluation.shapes oracle` measures the instrument on true renders;
`python -m unclip.evaluation.shapes text2image` measures a model on captions it never trained on.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations, product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unclip.config import one_line_errors, parse, to_dict
from unclip.data.captions import Caption
from unclip.data.oracle import Oracle, Reading
from unclip.data.shapes import (
    Relation,
    Scene,
    SceneObject,
    ShapesConfig,
    Split,
    draw_scene,
    render,
)
from unclip.evaluation.intervals import wilson
from unclip.pipeline import CascadeOptions, UnCLIP

METRICS = ("shape", "colour", "place", "all", "size", "count")
"""Verdicts on a picture, in the order of a table's columns."""

LEAST_GAP = 0.1
"""How far apart two centres must lie to be left of or above, as a fraction of the side; true
scenes leave more than 0.4."""
INSIDE = 0.15
"""How near two centres must lie for one object to be inside the other, whose radius is 0.36."""

Table = dict[str, dict[str, Any]]


# --- one picture ----------------------------------------------------------------------------------


def match(readings: Sequence[Reading], objects: Sequence[SceneObject]) -> list[Reading | None]:
    """The reading that stands for each object, None for one that is missing.

    The assignment with most shapes and colours right; sizes decide between equals, then the
    readings' order. Places have no say: captions of several objects do not tell them.
    """

    def alike(reading: Reading | None, thing: SceneObject) -> float:
        if reading is None:
            return 0.0
        looks = (reading.shape == thing.shape) + (reading.colour == thing.colour)
        # Some reading is better than none, so that a wrong object is not also a missing one.
        return looks + 0.1 * (reading.size == thing.size) + 0.01

    missing: list[Reading | None] = [None] * len(objects)
    chosen = max(
        permutations([*readings, *missing], len(objects)),
        key=lambda some: sum(map(alike, some, objects)),
    )
    return list(chosen)


def relation_holds(relation: Relation, a: Reading, b: Reading) -> bool:
    """Whether `a` is left of, above or inside `b`."""
    if relation == "left":
        return b.x - a.x > LEAST_GAP
    if relation == "above":
        return b.y - a.y > LEAST_GAP
    near = max(abs(a.x - b.x), abs(a.y - b.y)) < INSIDE
    return near and a.size == "small" and b.size == "large"


def score_picture(readings: Sequence[Reading], scene: Scene, caption: Caption) -> dict[str, Any]:
    """Hold what the oracle read against a scene.

    Shapes, colours and sizes are the scene's, so the verdicts are about the caption only where it
    names them: `caption_detail="full"` names every shape and colour, and now and then a size.

    Returns:
        `shape`, `colour`, `size`: right for every object. `place`: a single object lies in its
        cell of the 3 x 3 grid, two objects in their relation; None if the caption does not say.
        `all`: shape, colour and place (where said). `count`: as many objects as there should be.
        `objects_right`: how many have both their shape and their colour.
    """
    objects = scene.objects
    found = match(readings, objects)
    pairs = [(r, o) for r, o in zip(found, objects, strict=True) if r is not None]
    whole = len(pairs) == len(objects)
    verdict: dict[str, Any] = {
        name: whole and all(getattr(r, name) == getattr(o, name) for r, o in pairs)
        for name in ("shape", "colour", "size")
    }
    place = None
    if caption.names_place:
        place = whole and pairs[0][0].cell == objects[0].cell
    elif caption.names_relation and scene.relation is not None:
        place = whole and relation_holds(scene.relation, pairs[0][0], pairs[1][0])
    return {
        **verdict,
        "place": place,
        "all": verdict["shape"] and verdict["colour"] and place is not False,
        "count": len(readings) == len(objects),
        "objects_right": sum((r.shape, r.colour) == (o.shape, o.colour) for r, o in pairs),
    }


# --- many pictures --------------------------------------------------------------------------------


def _fraction(hits: int, count: int) -> dict[str, Any]:
    low, high = wilson(hits, count)
    return {"fraction": hits / max(count, 1), "low": low, "high": high, "count": count}


def tabulate(verdicts: Sequence[Mapping[str, Any]], scenes: Sequence[Scene]) -> Table:
    """Verdicts of `score_picture` as fractions with 95% Wilson intervals.

    Returns:
        One row for each number of objects ("1", "2", "3") that occurs and one for "all" scenes.
        A row maps each of METRICS, and `objects` (single objects with shape and colour right), to
        `fraction`, `low`, `high` and `count`; `place` counts only pictures whose caption tells it.
    """
    groups: dict[str, list[tuple[Mapping[str, Any], int]]] = defaultdict(list)
    for verdict, scene in zip(verdicts, scenes, strict=True):
        size = len(scene.objects)
        for row in (str(size), "all"):
            groups[row].append((verdict, size))
    table: Table = {}
    for row, members in sorted(groups.items()):
        table[row] = {}
        for name in METRICS:
            said = [verdict[name] for verdict, _ in members if verdict[name] is not None]
            table[row][name] = _fraction(sum(said), len(said))
        right = sum(verdict["objects_right"] for verdict, _ in members)
        table[row]["objects"] = _fraction(right, sum(size for _, size in members))
    return table


def score(
    images: Tensor, scenes: Sequence[Scene], captions: Sequence[Caption], oracle: Oracle
) -> Table:
    """Score pictures [B, 3, H, W] in [-1, 1] against the B scenes they should show.

    Returns:
        The table of `tabulate`.

    Raises:
        ValueError: there are not as many scenes and captions as pictures.
    """
    if not len(images) == len(scenes) == len(captions):
        raise ValueError(
            "each picture needs one scene and one caption; got "
            f"{len(images)} pictures, {len(scenes)} scenes, {len(captions)} captions"
        )
    readings = oracle.read(images)
    return tabulate([*map(score_picture, readings, scenes, captions)], scenes)


def format_table(table: Table, title: str = "") -> str:
    """A table for people: percentages, with the interval's ends in brackets."""
    columns = (*METRICS, "objects")
    lines = [f"{title:<22}" + "".join(f"{name:>20}" for name in columns)]
    for row, cells in table.items():
        label = "all scenes" if row == "all" else f"{row} object{'s' * (row != '1')}"
        line = f"{label} (n={cells['all']['count']})"
        texts = [
            f"{100 * c['fraction']:.1f} [{100 * c['low']:.1f}, {100 * c['high']:.1f}]"
            if c["count"]
            else "-"
            for c in (cells[name] for name in columns)
        ]
        lines.append(f"{line:<22}" + "".join(f"{text:>20}" for text in texts))
    return "\n".join(lines)


def _true_pictures(scenes: Sequence[Scene], size: int) -> Tensor:
    return render(scenes, size).float().div_(127.5).sub_(1)


def _report(result: Mapping[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


# --- python -m unclip.evaluation.shapes oracle ----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OracleCheckConfig:
    """How the oracle is measured on true renders."""

    num: int = 2000
    """Scenes of each split."""
    sizes: tuple[int, ...] = (64, 256)
    """Sides of the pictures, px."""
    seed: int = 0
    """Seed of the world; the shipped oracle trained on seed 7."""
    oracle: Path | None = None
    """Folder of the oracle; None takes the shipped one."""
    out: Path | None = None
    """JSON file to write."""


def check_oracle(config: OracleCheckConfig) -> dict[str, Any]:
    """Score true renders of both splits at each size: what is missing from 100% is the oracle's."""
    oracle = Oracle.load() if config.oracle is None else Oracle.load(config.oracle)
    result: dict[str, Any] = {"settings": to_dict(config)}
    splits: tuple[Split, ...] = ("train", "held_out")
    for split, size in product(splits, config.sizes):
        world = ShapesConfig(split=split, seed=config.seed, caption_detail="full")
        scenes, captions = zip(*(draw_scene(world, k) for k in range(config.num)), strict=True)
        readings: list[list[Reading]] = []
        for start in range(0, config.num, 100):  # 2000 pictures of 256 px would fill the memory
            readings += oracle.read(_true_pictures(scenes[start : start + 100], size))
        table = tabulate([*map(score_picture, readings, scenes, captions)], scenes)
        print(format_table(table, f"{split}, {size} px"), "\n", flush=True)
        result[f"{split}_{size}px"] = table
    return result


# --- python -m unclip.evaluation.shapes text2image ------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Text2ImageConfig:
    """How a model is measured on captions of the shapes world."""

    model: str = "shapes"
    """What `UnCLIP.from_pretrained` takes: a name, a folder, or `org/name` on the Hub."""
    num: int = 500
    """Captions, a picture each."""
    world: ShapesConfig = field(
        default_factory=lambda: ShapesConfig(split="held_out", caption_detail="full")
    )
    """Whose captions: held-out combinations, all named, unless told otherwise."""
    given: Literal["true", "mean"] | None = None
    """What the decoder is given instead of `embed`: the true picture's image_embed, which measures
    the decoder alone, or the mean of the true ones, which says nothing of the picture."""
    batch_size: int = 25
    """Pictures at a time."""
    device: str = "cpu"
    """Where the model runs."""
    seed: int = 0
    """Seed of the noise; picture k has seed + k."""
    cascade: CascadeOptions = field(default_factory=lambda: CascadeOptions(size=64))
    """How pictures are drawn; size 64 stops after the decoder, 256 runs the upsampler too."""
    out: Path | None = None
    """JSON file to write."""


def text2image(config: Text2ImageConfig) -> dict[str, Any]:
    """Draw each caption once and score what the oracle reads on the pictures of each size."""
    pipe = UnCLIP.from_pretrained(config.model, device=config.device)
    drawn_scenes = (draw_scene(config.world, k) for k in range(config.num))
    scenes, captions = zip(*drawn_scenes, strict=True)
    image_embed, clip = None, pipe.clip
    if config.given is not None:
        if clip is None:
            raise ValueError(
                f"given must be null for a model without a CLIP; got {config.given!r} for "
                f"{config.model}: leave it out"
            )
        pictures = _true_pictures(scenes, clip.required_image_size())
        parts = [clip.encode_image(p.to(clip.device)) for p in pictures.split(100)]
        image_embed = torch.cat(parts)
        if config.given == "mean":
            image_embed = image_embed.mean(0)
    drawn = pipe(
        [caption.text for caption in captions],
        seed=config.seed,
        image_embed=image_embed,
        batch_size=config.batch_size,
        **asdict(config.cascade),
    )
    oracle, tables = Oracle.load(), {}
    for size, pictures in drawn.by_size.items():
        tables[f"{size}px"] = table = score(pictures, scenes, captions, oracle)
        print(format_table(table, f"{size} px, {config.given or config.cascade.embed}"), flush=True)
    return {"settings": to_dict(config), "tables": tables, "seconds": drawn.seconds}


def main() -> None:
    """Run one of the two measurements."""
    words = sys.argv[1:]
    with one_line_errors():
        if words[:1] == ["oracle"]:
            check = parse(OracleCheckConfig, words[1:], description=check_oracle.__doc__)
            _report(check_oracle(check), check.out)
        elif words[:1] == ["text2image"]:
            config = parse(Text2ImageConfig, words[1:], description=text2image.__doc__)
            _report(text2image(config), config.out)
        else:
            got = repr(words[0]) if words else "nothing"
            raise ValueError(f"say what to measure, `oracle` or `text2image`; got {got}")


if __name__ == "__main__":
    main()
