"""Zero-shot classification by a CLIP: which class name is nearest to a picture.

`python -m unclip.evaluation.zero_shot --pictures FOLDER --classes cat dog --clip ViT-L-14/openai`
prints the probabilities of each picture, and how often the verdict is right where sub-folders or
captions tell. A class is the mean embedding of its name in many templates, 80 of OpenAI's unless
others are given (Radford et al. 2021, section 3.1.4).

Shapes: B pictures, C classes, D width of CLIP's joint space.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.clip import FrozenCLIP
from unclip.config import one_line_errors, parse, to_dict
from unclip.evaluation.intervals import wilson
from unclip.evaluation.labelled import Picture, Pictures, label_among
from unclip.hub import load_clip_of

TEMPLATES = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
"""OpenAI's 80 for ImageNet, `{}` standing for the class."""
CAPTIONS = 256
"""Captions that are embedded at a time."""
SHOWN = 20
"""Pictures that are printed one by one; the JSON file has all."""
NAMED = 5
"""Classes that are printed of each picture."""


@torch.no_grad()
def embed_classes(
    clip: FrozenCLIP, classes: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """Embed C class names as [C, D], of unit norm: each the mean over its templates.

    Raises:
        ValueError: there are fewer than two classes, an empty or a doubled one, no template, or one
            without its place `{}`.
    """
    check_classes(classes)
    if not templates:
        raise ValueError("templates must not be empty; got none: leave them out for OpenAI's 80")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"each of templates must have one {{}} for the class; got {template!r}: write "
                "'a photo of a {}', say"
            )
    texts = [template.replace("{}", name) for name in classes for template in templates]
    parts = [
        clip.encode_text(texts[start : start + CAPTIONS]).text_embed
        for start in range(0, len(texts), CAPTIONS)
    ]
    embeds = F.normalize(torch.cat(parts), dim=-1).unflatten(0, (len(classes), len(templates)))
    return F.normalize(embeds.mean(1), dim=-1)


def probabilities(clip: FrozenCLIP, image_embed: Tensor, class_embed: Tensor) -> Tensor:
    """[B, C] probabilities of C classes [C, D] for B image embeddings [B, D]: a softmax over their
    cosines times the CLIP's own `logit_scale`."""
    cosines = F.normalize(image_embed, dim=-1) @ class_embed.T
    return (clip.logit_scale * cosines).softmax(-1)


def check_classes(classes: Sequence[str]) -> None:
    """Raise ValueError for fewer than two class names, an empty or a doubled one."""
    if len(classes) < 2:
        raise ValueError(
            f"classes must name at least two, or the verdict is certain; got {len(classes)}: add "
            "others, such as 'something else'"
        )
    for name in classes:
        if not name.strip() or list(classes).count(name) > 1:
            raise ValueError(f"classes must be names, each once; got {name!r}: take it out")


# --- python -m unclip.evaluation.zero_shot --------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """What is to be told apart, on what, by which CLIP."""

    pictures: tuple[str, ...] = ()
    """Picture files, folders of pictures (with a sub-folder a class, or captions, the verdicts are
    held against those), captioned sources as `source.data` of the training scripts, or `shapes`,
    500 held-out scenes of one object."""
    classes: tuple[str, ...] | None = None
    """Names; or one file with a name a line; or `imagenet` for its 1,000; None: the names of the
    sub-folders."""
    templates: tuple[str, ...] = ()
    """Sentences with `{}` for the class; or one file with one a line; none: OpenAI's 80."""
    clip: str = "shapes"
    """A model whose CLIP to take, a CLIP's folder, `hf-hub:org/name`, or an open_clip model/tag."""
    limit: int | None = None
    """Use only the first so many pictures."""
    batch_size: int = 64
    """Pictures at a time."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the CLIP runs."""
    out: Path | None = None
    """JSON file to write, with every picture's probabilities."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}: use 64, say")


def lines_or_words(words: Sequence[str]) -> list[str]:
    """The words, or the lines of the text file that the only one of them names."""
    if len(words) == 1 and Path(words[0]).is_file():
        try:
            lines = Path(words[0]).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{words[0]} must be UTF-8 text, a line each; got {error}") from error
        return [line.strip() for line in lines if line.strip()]
    return list(words)


def choose_classes(words: Sequence[str] | None, pictures: Pictures) -> list[str]:
    """The class names that `ZeroShotConfig.classes` stands for."""
    if words is None:
        return list(dict.fromkeys(pictures.sub_folders))
    if list(words) == ["imagenet"]:
        return list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES))  # two of them are `missile`
    return lines_or_words(words)


def classify(config: ZeroShotConfig) -> dict[str, Any]:
    """Judge each picture, and hold the verdicts against what sub-folders or captions say."""
    clip = load_clip_of(config.clip).to(config.device)
    pictures = Pictures(config.pictures, clip.required_image_size(), config.limit)
    classes = choose_classes(config.classes, pictures)
    templates = lines_or_words(config.templates) or TEMPLATES
    class_embed = embed_classes(clip, classes, templates)
    judged = []
    for batch in _batches(pictures, config.batch_size):
        images = torch.stack([picture.image for picture in batch]).to(config.device)
        found = probabilities(clip, clip.encode_image(images), class_embed).tolist()
        judged += [_judge(*pair, classes) for pair in zip(batch, found, strict=True)]
    return {
        "settings": to_dict(config),
        "classes": classes,
        "templates": len(templates),
        **_score(judged, classes),
        "skipped": pictures.skipped,
        "pictures": judged,
    }


def _batches(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    iterator = iter(pictures)
    while batch := list(islice(iterator, size)):
        yield batch


def _judge(picture: Picture, found: list[float], classes: list[str]) -> dict[str, Any]:
    order = sorted(range(len(classes)), key=lambda k: -found[k])
    label = label_among(picture.said, classes)
    return {
        "name": picture.name,
        "said": picture.said,
        "label": None if label is None else classes[label],
        "verdict": classes[order[0]],
        "probabilities": {classes[k]: round(found[k], 6) for k in order},
    }


def _score(judged: Sequence[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy over the pictures that have a label; the mean over classes beside it, because they
    are seldom equally many."""
    labelled = [one for one in judged if one["label"] is not None]
    if not labelled:
        return {"accuracy": None}
    hits: dict[str, list[bool]] = defaultdict(list)
    for one in labelled:
        hits[one["label"]].append(one["verdict"] == one["label"])
    right, count = sum(map(sum, hits.values())), len(labelled)
    low, high = wilson(right, count)
    by_class = {name: sum(hits[name]) / len(hits[name]) for name in classes if name in hits}
    top = [one["label"] in list(one["probabilities"])[:NAMED] for one in labelled]
    return {
        "accuracy": {"fraction": right / count, "low": low, "high": high, "count": count},
        "accuracy_at_5": sum(top) / count if len(classes) > NAMED else None,
        "mean_class_accuracy": sum(by_class.values()) / len(by_class),
        "accuracy_by_class": by_class,
        "without_label": len(judged) - count,
    }


def _print(result: dict[str, Any]) -> None:
    for one in result["pictures"][:SHOWN]:
        named = list(one["probabilities"].items())[:NAMED]
        said = "" if one["label"] is None else f"  (it is {one['label']})"
        print(one["name"] + said)
        print("   " + ", ".join(f"{name} {100 * p:.2f}%" for name, p in named))
    if (more := len(result["pictures"]) - SHOWN) > 0:
        print(f"... and {more} more")
    if (accuracy := result["accuracy"]) is not None:
        low, high = (100 * accuracy[end] for end in ("low", "high"))
        print(
            f"right in {100 * accuracy['fraction']:.1f}% [{low:.1f}, {high:.1f}] of "
            f"{accuracy['count']}; mean over classes {100 * result['mean_class_accuracy']:.1f}%; "
            f"{result['without_label']} pictures without a label among the classes"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Classify pictures and print the verdicts."""
    config = parse(ZeroShotConfig, argv, description=__doc__)
    with one_line_errors():
        result = classify(config)
        if config.out is not None:
            config.out.parent.mkdir(parents=True, exist_ok=True)
            config.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        _print(result)


if __name__ == "__main__":
    main()
