"""The fixed list of MS-COCO captions that models are compared by: `python -m unclip.evaluation.coco
captions_val2014.json --out coco30k.jsonl`.

One caption a picture, 30,000 pictures, drawn by a seed from the annotations that COCO gives out.
The list serves both conventions of FID: `reference.which: all` holds drawn pictures against the
whole folder of validation pictures, `captions` against those of the list.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unclip.checkpoint import written_file
from unclip.config import one_line_errors
from unclip.evaluation.captions import Item, list_sha256
from unclip.evaluation.references import plain_id


def choose(annotations: dict[str, Any], count: int = 30_000, seed: int = 0) -> list[Item]:
    """`count` pictures and a caption of each, in the order of COCO's ids; the same for a seed
    whatever the file's order.

    Raises:
        ValueError: it holds no captions, or of fewer pictures.
    """
    try:
        names = {row["id"]: plain_id(row["file_name"]) for row in annotations["images"]}
        captions = defaultdict(list)
        for row in annotations["annotations"]:
            captions[row["image_id"]].append((row["id"], " ".join(row["caption"].split())))
    except (KeyError, TypeError) as error:
        raise ValueError(
            "annotations must be COCO's captions_val2014.json, with images and annotations; got "
            f"a file without ({error}): take captions, not instances"
        ) from error
    if not 1 <= count <= len(captions):
        raise ValueError(
            f"count must lie between 1 and the pictures that have captions, {len(captions)}; got "
            f"{count}: lower it"
        )
    rng = np.random.default_rng(seed)
    pictures = sorted(captions)
    chosen = sorted(rng.permutation(len(pictures))[:count].tolist())
    items = []
    for number in chosen:
        of_one = sorted(captions[pictures[number]])
        # A generator a picture: its caption does not depend on which others are chosen.
        row = np.random.default_rng([seed, pictures[number]]).integers(len(of_one))
        items.append(Item(names[pictures[number]], of_one[row][1]))
    return items


def main(argv: Sequence[str] | None = None) -> None:
    """Write the list, and print its hash for the protocol."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", type=Path, help="COCO's captions_val2014.json")
    parser.add_argument("--out", type=Path, default=Path("coco30k.jsonl"), help="the list")
    parser.add_argument("--count", type=int, default=30_000, help="pictures (default: 30000)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    args = parser.parse_args(argv)
    with one_line_errors():
        items = choose(json.loads(args.annotations.read_text()), args.count, args.seed)
        lines = [{"id": item.id, "caption": item.caption} for item in items]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with written_file(args.out) as aside:
            aside.write_text(text, encoding="utf-8")
        print(f"{args.out}: {len(items)} captions, captions.sha256 {list_sha256(items)}")


if __name__ == "__main__":
    main()
