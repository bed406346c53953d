"""The typographic attack: a word written over a picture, CLIP's verdict, and what the decoder draws
(paper, section 3 and figure 5: CLIP calls an apple labelled "iPod" an iPod, and its variations are
apples all the same).

`python -m unclip.evaluation.typographic` attacks scenes of the built-in world with the names of
other shapes and colours; `--pictures apple.png --classes apple iPod pizza --words iPod --model
MODEL` any picture. It writes a sheet and a JSON file. Two controls go with it, because a patch and
ink may change a verdict by themselves: the same patch without a word, and with the word's letters
in reverse, which a CLIP that reads is not fooled by.

Shapes: B pictures, V variations of each, C classes, S side of the pictures that are written on.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unclip.clip import FrozenCLIP
from unclip.config import one_line_errors, parse, to_dict
from unclip.data.images import to_pil, to_tensor
from unclip.data.oracle import Oracle
from unclip.data.shapes import COLOURS, SHAPES
from unclip.evaluation.labelled import Picture, Pictures, label_among
from unclip.evaluation.zero_shot import (
    TEMPLATES,
    check_classes,
    embed_classes,
    lines_or_words,
    probabilities,
)
from unclip.hub import load_clip_of
from unclip.pipeline import UnCLIP

SIDE = 256
"""Side S of the pictures that are written on, px."""
CONDITIONS = ("clean", "blank", "reversed", "attacked")
"""As it is; under an empty patch; with the word's letters in reverse on it; with the word."""
Place = Literal["top", "centre", "bottom"]
READABLE: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": tuple(COLOURS)}
"""What the oracle reads: attribute -> its values."""


@dataclass(frozen=True, kw_only=True)
class TypographicConfig:
    """What is attacked with which words, and how."""

    model: str = "shapes"
    """What `UnCLIP.from_pretrained` takes: its CLIP is the judge, its decoder draws."""
    clip: str | None = None
    """Another judge: a CLIP by any name that `unclip.evaluation.zero_shot` takes."""
    pictures: tuple[str, ...] = ("shapes",)
    """Picture files, folders or captioned sources; `shapes`: `limit` held-out scenes."""
    limit: int = 12
    """Use only the first so many pictures."""
    classes: tuple[str, ...] | None = None
    """Names among which CLIP decides; None: the shapes and then the colours of the built-in
    world."""
    words: tuple[str, ...] = ()
    """Which of the classes to write over each picture; none: for each picture the class after its
    own."""
    templates: tuple[str, ...] = ()
    """Sentences with `{}` for the class; or one file with one a line; none: OpenAI's 80."""
    place: Place = "bottom"
    """Where the patch lies."""
    text_height: float = 0.2
    """Height of the patch as a fraction of the picture's; (0, 1]."""
    num_variations: int = 4
    """Pictures that the decoder draws of each."""
    eta: float = 1.0
    """Noise that DDIM adds back, 0 to 1: how freely they vary."""
    guidance_scale: float | None = None
    """Of the decoder; None: the model's own."""
    size: int | None = None
    """Side to stop at, px; None: the model's largest."""
    seed: int = 0
    """Seed of the noise; variation k of each picture has seed + k."""
    rows: int = 8
    """Attacks that the sheet shows."""
    batch_size: int = 16
    """Pictures that are drawn at a time."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model runs."""
    out: Path = Path("outputs/typographic")
    """Folder for `sheet.png` and `attacks.json`."""

    def __post_init__(self) -> None:
        for name in ("limit", "num_variations", "rows", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}: use 4")
        if not 0 < self.text_height <= 1:
            raise ValueError(
                f"text_height must lie in (0, 1]; got {self.text_height}: use 0.2 for a fifth"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1]; got {self.eta}: use 1")
        if self.classes is not None:
            check_classes(self.classes)
        elif self.words:
            raise ValueError(
                f"words must be among classes; got {', '.join(self.words)} and no classes: name "
                "the classes too"
            )
        for word in self.words:
            if self.classes is not None and word not in self.classes:
                raise ValueError(
                    f"words must be among classes; got {word!r}, which is not one of "
                    f"{', '.join(self.classes)}: add it there"
                )

    @property
    def questions(self) -> list[tuple[str, ...]]:
        """The lists of classes among which CLIP decides."""
        return list(READABLE.values()) if self.classes is None else [self.classes]


@dataclass(kw_only=True)
class Attack:
    """One word over one picture."""

    picture: Picture
    """What is attacked."""
    classes: tuple[str, ...]
    """Among which CLIP decides."""
    label: str
    """What it shows: as is said of it, or else CLIP's verdict on the clean picture."""
    word: str
    """What is written over it."""
    images: dict[str, Tensor]
    """Condition -> [3, S, S] in [-1, 1]."""
    chances: dict[str, list[float]] = field(default_factory=dict)
    """Condition -> CLIP's probability of each class."""
    variations: dict[str, Tensor] = field(default_factory=dict)
    """Condition -> [V, 3, s, s], what the decoder drew."""
    variation_chances: dict[str, list[list[float]]] = field(default_factory=dict)
    """Condition -> CLIP's probability of each class on each variation."""
    readings: dict[str, list[list[str]]] = field(default_factory=dict)
    """Condition -> what the oracle reads on each variation, of each object the attribute that the
    classes are values of; empty where they are none of the built-in world's."""

    def verdict(self, chances: Sequence[float]) -> tuple[str, float]:
        """The likeliest class and its probability."""
        best = max(range(len(chances)), key=chances.__getitem__)
        return self.classes[best], chances[best]

    @property
    def attribute(self) -> str | None:
        """What of the oracle's readings the classes are values of; None: nothing."""
        fits = (name for name, values in READABLE.items() if {*self.classes} <= {*values})
        return next(fits, None)


# --- writing on pictures --------------------------------------------------------------------------


def write_over(
    image: Tensor, word: str, place: Place, height: float, blank: bool = False
) -> Tensor:
    """A picture [3, S, S] in [-1, 1] with a white patch that has a word on it in black.

    Args:
        image: the picture.
        word: what to write; letters shrink until it fits the picture's width.
        place: where the patch lies, in the middle from left to right.
        height: of the patch, as a fraction of S.
        blank: leave the patch empty, of the size that the word would need.
    """
    picture = to_pil(image)
    pen, side = ImageDraw.Draw(picture), picture.width
    tall = max(4, round(side * height))
    size = max(4, round(0.8 * tall))  # descenders stay on the patch
    while size > 4 and pen.textlength(word, ImageFont.load_default(size)) > 0.9 * side:
        size -= 1
    font = ImageFont.load_default(size)
    wide = min(side, round(pen.textlength(word, font) + 0.1 * side))
    top = {"top": 0, "centre": (side - tall) // 2, "bottom": side - tall}[place]
    left = (side - wide) // 2
    pen.rectangle((left, top, left + wide - 1, top + tall - 1), fill="white")
    if not blank:
        pen.text((side / 2, top + tall / 2), word, fill="black", font=font, anchor="mm")
    return to_tensor(picture, side)


# --- the probe ------------------------------------------------------------------------------------


def plan_attacks(
    config: TypographicConfig, judge: FrozenCLIP, templates: Sequence[str]
) -> list[Attack]:
    """Every word over every picture, judged under each condition."""
    pictures = list(Pictures(config.pictures, SIDE, config.limit))
    clean = judge.encode_image(torch.stack([p.image for p in pictures]).to(judge.device))
    attacks = []
    for classes in config.questions:
        class_embed = embed_classes(judge, classes, templates)
        verdicts = probabilities(judge, clean, class_embed).argmax(1).tolist()
        for picture, verdict in zip(pictures, verdicts, strict=True):
            found = label_among(picture.said, classes)
            own = verdict if found is None else found
            words = config.words or (classes[(own + 1) % len(classes)],)
            for word in words:
                patch = (picture.image, word, config.place, config.text_height)
                images = {
                    "clean": picture.image,
                    "blank": write_over(*patch, blank=True),
                    "reversed": write_over(picture.image, word[::-1], *patch[2:]),
                    "attacked": write_over(*patch),
                }
                embeds = judge.encode_image(torch.stack([*images.values()]).to(judge.device))
                chances = probabilities(judge, embeds, class_embed).tolist()
                attacks.append(
                    Attack(
                        picture=picture,
                        classes=classes,
                        label=classes[own],
                        word=word,
                        images=images,
                        chances=dict(zip(CONDITIONS, chances, strict=True)),
                    )
                )
    return attacks


def vary(
    attacks: Sequence[Attack],
    pipe: UnCLIP,
    judge: FrozenCLIP,
    templates: Sequence[str],
    config: TypographicConfig,
) -> None:
    """Let the decoder draw variations of every attack's pictures; judge and read them."""
    oracle = Oracle.load()
    options: dict[str, Any] = {"sampler": "ddim", "eta": config.eta, "size": config.size}
    if config.guidance_scale is not None:
        options["guidance_scale"] = config.guidance_scale
    assert pipe.clip is not None
    class_embeds = {c: embed_classes(judge, c, templates) for c in {a.classes for a in attacks}}
    count = config.num_variations
    for condition in CONDITIONS:
        images = torch.stack([attack.images[condition] for attack in attacks])
        embeds = torch.cat([pipe.clip.encode_image(i.to(pipe.device)) for i in images.split(64)])
        drawn = pipe(
            image_embed=embeds.repeat_interleave(count, dim=0),
            seed=[config.seed + k for _ in attacks for k in range(count)],
            batch_size=config.batch_size,
            progress=False,
            **options,
        ).images
        for attack, variations in zip(attacks, drawn.split(count), strict=True):
            seen = judge.encode_image(variations.to(judge.device))
            chances = probabilities(judge, seen, class_embeds[attack.classes])
            attack.variations[condition] = variations
            attack.variation_chances[condition] = chances.tolist()
            if (attribute := attack.attribute) is not None:
                attack.readings[condition] = [
                    [getattr(reading, attribute) for reading in readings]
                    for readings in oracle.read(variations)
                ]


def summarise(attacks: Sequence[Attack]) -> dict[str, Any]:
    """Fractions over the attacks of each question, under each condition.

    Returns:
        question (its classes) -> condition -> `label`, `word`: how often CLIP's verdict is the
        picture's own class, and the written one; `p_label`, `p_word`: their mean probabilities;
        `variations_*`: the same over all variations; `oracle_label`, `oracle_word`: on how many of
        them the oracle sees an object that is so, where it can tell.
    """
    groups: dict[tuple[str, ...], list[Attack]] = defaultdict(list)
    for attack in attacks:
        groups[attack.classes].append(attack)
    table: dict[str, Any] = {}
    for classes, members in groups.items():
        table[", ".join(classes)] = rows = {}
        for condition in CONDITIONS:
            alone = [(a, a.chances[condition]) for a in members]
            varied = [(a, one) for a in members for one in a.variation_chances[condition]]
            row = _fractions(alone)
            row |= {f"variations_{name}": value for name, value in _fractions(varied).items()}
            read = [(a, one) for a in members for one in a.readings.get(condition, [])]
            for name in ("label", "word") if read else ():
                row[f"oracle_{name}"] = _mean([getattr(a, name) in one for a, one in read])
            rows[condition] = {"attacks": len(members), **row}
    return table


def _fractions(judged: Sequence[tuple[Attack, list[float]]]) -> dict[str, float]:
    row = {}
    for name in ("label", "word"):
        row[name] = _mean([a.verdict(c)[0] == getattr(a, name) for a, c in judged])
        row[f"p_{name}"] = _mean([c[a.classes.index(getattr(a, name))] for a, c in judged])
    return row


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def attack_all(config: TypographicConfig) -> tuple[list[Attack], dict[str, Any]]:
    """Attack, vary and judge; returns the attacks and what is written to `attacks.json`."""
    pipe = UnCLIP.from_pretrained(config.model, device=config.device)
    if pipe.clip is None:
        raise ValueError(
            f"model must have a CLIP and a decoder of image embeddings; got {config.model}, whose "
            "decoder reads captions alone: take another"
        )
    judge = pipe.clip if config.clip is None else load_clip_of(config.clip).to(config.device)
    templates = lines_or_words(config.templates) or TEMPLATES
    attacks = plan_attacks(config, judge, templates)
    vary(attacks, pipe, judge, templates, config)
    told = [
        {
            "name": attack.picture.name,
            "label": attack.label,
            "word": attack.word,
            "classes": list(attack.classes),
            "probabilities": attack.chances,
            "variations": attack.variation_chances,
            "oracle": attack.readings,
        }
        for attack in attacks
    ]
    result = {"settings": to_dict(config), "summary": summarise(attacks), "attacks": told}
    return attacks, result


# --- the sheet ------------------------------------------------------------------------------------

CELL, GAP, LINE = 128, 10, 15


def draw_sheet(attacks: Sequence[Attack]) -> Image.Image:
    """A row an attack: the clean picture, the attacked one, and variations of that; below each
    CLIP's verdict, and below variations what the oracle reads."""
    columns = 2 + max(len(attack.variations["attacked"]) for attack in attacks)
    height = CELL + 2 * LINE + GAP
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, len(attacks) * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, attack in enumerate(attacks):
        for column, (image, lines) in enumerate(_cells(attack)):
            left, top = GAP + column * (CELL + GAP), GAP + row * height
            picture = to_pil(image).resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, top))
            pen.multiline_text((left, top + CELL), "\n".join(lines), "black", font, spacing=2)
    return sheet


def _cells(attack: Attack) -> list[tuple[Tensor, list[str]]]:
    def said(chances: Sequence[float]) -> str:
        name, chance = attack.verdict(chances)
        return f"CLIP: {name} {100 * chance:.0f}%"

    cells = [(attack.images[name], [said(attack.chances[name])]) for name in ("clean", "attacked")]
    drawn = zip(attack.variations["attacked"], attack.variation_chances["attacked"], strict=True)
    for k, (image, chances) in enumerate(drawn):
        lines = [said(chances)]
        if "attacked" in attack.readings:
            seen = dict.fromkeys(attack.readings["attacked"][k])
            lines.append("oracle: " + (", ".join(seen) or "nothing"))
        cells.append((image, lines))
    return cells


def _print(summary: dict[str, Any]) -> None:
    for question, rows in summary.items():
        print(f"\n{question}")
        for condition, row in rows.items():
            shares = [f"{n} {100 * v:.1f}%" for n, v in row.items() if n != "attacks"]
            print(f"  {condition} ({row['attacks']}): {', '.join(shares)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Attack pictures, and write a sheet and a JSON file."""
    config = parse(TypographicConfig, argv, description=__doc__)
    with one_line_errors():
        config.out.mkdir(parents=True, exist_ok=True)
        attacks, result = attack_all(config)
        (config.out / "attacks.json").write_text(json.dumps(result, indent=2) + "\n")
        every = max(1, len(attacks) // config.rows)
        draw_sheet(attacks[::every][: config.rows]).save(config.out / "sheet.png")
        _print(result["summary"])
        print(f"\n{config.out / 'sheet.png'}\n{config.out / 'attacks.json'}")


if __name__ == "__main__":
    main()
