"""The grammar of the shapes world: one scene, many ways to put it, most of them incomplete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from unclip.data.shapes import Scene, SceneObject

COLUMNS = ("left", "centre", "right")
ROWS = ("top", "middle", "bottom")


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption and what it claims, so that a picture can be held against it."""

    text: str
    names_place: bool
    """Whether it says where the (single) object is."""
    names_relation: bool
    """Whether it says how the first two objects lie to each other."""


def _pick(rng: np.random.Generator, *options: str) -> str:
    return options[rng.integers(len(options))]


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _noun_phrase(obj: SceneObject, rng: np.random.Generator, full: bool, terse: bool) -> str:
    # Every random number is drawn whatever the object looks like: near-copies of a scene then get
    # the same wording.
    say_size, say_look, say_tilt, drop = rng.random(4)
    words = []
    if say_size < 0.35:
        words.append(
            ("small", "little", "tiny") if obj.size == "small" else ("large", "big", "huge")
        )
    if say_look < 0.4 and obj.striped:
        words.append(("striped", "stripy", "striped"))
    if say_look > 0.6 and obj.outlined:
        words.append(("outlined", "outlined", "bordered"))
    if say_tilt < 0.4 and obj.tilted:
        words.append(("tilted", "rotated", "turned"))
    synonym = int(rng.integers(3))
    phrase = [] if terse else [options[synonym] for options in words]
    if full or drop >= 0.05:
        phrase.append(obj.colour)
    phrase.append("shape" if not full and 0.05 <= drop < 0.1 else obj.shape)
    return _article(" ".join(phrase))


def _place(obj: SceneObject, rng: np.random.Generator) -> str:
    column, row = obj.cell
    style = rng.integers(3)
    if (column, row) == (1, 1):
        return ("in the middle", "in the centre", "at the centre")[style]
    if row == 1:
        side = COLUMNS[column]
        return (f"on the {side}", f"at the {side}", f"on the {side} side")[style]
    if column == 1:
        end = ROWS[row]
        return (f"at the {end}", f"at the {end}", f"at the very {end}")[style]
    end, side = ROWS[row], COLUMNS[column]
    upper = "upper" if row == 0 else "lower"
    return (
        f"in the {end} {side}",
        f"in the {end} {side} corner",
        f"in the {upper} {side}",
    )[style]


def _relation(a: str, b: str, relation: str, rng: np.random.Generator) -> str:
    if relation == "left":
        options = (f"{a} left of {b}", f"{a} to the left of {b}", f"{b} right of {a}")
    elif relation == "above":
        options = (f"{a} above {b}", f"{a} over {b}", f"{b} below {a}")
    else:
        options = (f"{a} inside {b}", f"{a} in {b}", f"{b} with {a} inside")
    return _pick(rng, *options)


def describe(
    scene: Scene, rng: np.random.Generator, detail: Literal["varied", "full"] = "varied"
) -> Caption:
    """Put a scene into words.

    Args:
        scene: what to describe.
        rng: decides the wording and what is left out.
        detail: `varied` leaves things out; `full` names every shape and colour and the place of a
            single object or the relation of two.
    """
    full = detail == "full"
    # Three objects with every attribute would outgrow a small text encoder's context.
    terse = len(scene.objects) > 2
    phrases = [_noun_phrase(obj, rng, full, terse) for obj in scene.objects]
    names_relation = names_place = False
    if len(phrases) == 1:
        names_place = full or rng.random() < 0.7
        body = f"{phrases[0]} {_place(scene.objects[0], rng)}" if names_place else phrases[0]
    elif len(phrases) == 2:
        names_relation = full or rng.random() < 0.75
        assert scene.relation is not None
        related = _relation(phrases[0], phrases[1], scene.relation, rng)
        body = related if names_relation else f"{phrases[0]} and {phrases[1]}"
    else:
        body = f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    frame = rng.random()
    if rng.random() < 0.35:
        ground = scene.background
        body = f"{body} on {_article(ground)} background"
    if frame < 0.1:
        body = f"a picture of {body}"
    elif frame < 0.15:
        body = f"there is {body}"
    return Caption(body, names_place, names_relation)
