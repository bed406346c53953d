"""The built-in world: captioned scenes of coloured shapes, drawn by code at any resolution.

A scene holds one to three objects on a plain background. Everything about it follows from
``(seed, index)``, so the data set is endless, needs no files, and picture k is the same on every
machine. Captions leave things out on purpose (background, place, size, texture, tilt, outline, now
and then the colour or the shape itself): many pictures fit one caption, so P(z_i | y) has a spread
for a prior to learn.

Shapes: M objects, B pictures, H W pixels. Lengths are fractions of the picture's side, y points
down, and a picture is a uint8 tensor until `ShapesDataset` hands it out in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from unclip.data.captions import Caption, describe

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 138, 30),
    "yellow": (248, 214, 48),
    "green": (46, 158, 68),
    "cyan": (62, 200, 214),
    "blue": (38, 84, 206),
    "purple": (124, 52, 168),
    "pink": (246, 130, 184),
}

BACKGROUNDS = {
    "white": (250, 250, 250),
    "grey": (168, 168, 168),
    "brown": (112, 78, 56),
    "black": (22, 22, 26),
}

RADII = {"small": (0.125, 0.145), "large": (0.20, 0.24)}
"""Range of an object's radius for each size word. The gap keeps the two words apart."""

CELL_CENTRES = (0.20, 0.50, 0.80)
"""Centres of the three columns (and rows) that place words such as "top left" stand for."""

Split = Literal["train", "held_out"]
Relation = Literal["left", "above", "inside"]
RELATIONS: tuple[Relation, ...] = ("left", "above", "inside")


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape. `x`, `y`, `radius` are fractions of the side, `angle` is in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    striped: bool = False
    outlined: bool = False
    shade: float = 1.0
    """Factor on the colour, 0.92 to 1.06: a nuisance that no caption names."""

    @property
    def cell(self) -> tuple[int, int]:
        """(column, row) of the 3 x 3 grid that the centre lies in."""
        return min(2, int(self.x * 3)), min(2, int(self.y * 3))

    @property
    def tilted(self) -> bool:
        """Whether the shape is turned far enough to be called tilted."""
        return self.angle != 0.0


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects from back to front on a background."""

    objects: tuple[SceneObject, ...]
    background: str
    relation: Relation | None = None
    """What objects[0] is to objects[1] in two-object scenes; `inside` draws objects[0] on top."""


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Which scenes `ShapesDataset` draws."""

    image_size: int = 64
    """Side of a picture, px."""
    crop_size: int | None = None
    """Side of a random crop, px, drawn without rendering the rest; None draws the whole picture."""
    split: Split = "train"
    """`train` never shows a held-out combination; every `held_out` scene has one in each object."""
    seed: int = 0
    """Seed of the world. Another seed is another endless sequence of scenes."""
    object_weights: tuple[float, float, float] = (0.55, 0.35, 0.10)
    """Relative frequency of scenes with one, two and three objects."""
    variants: int = 1
    """Run length of near-copies (one or two attributes changed): hard negatives for CLIP."""
    caption_detail: Literal["varied", "full"] = "varied"
    """`varied` leaves things out at random; `full` names shape, colour and place or relation."""
    jitter: float = 0.03
    """How far an object may lie from the centre of its cell each way, as a fraction of the side."""
    small: float = 0.25
    """How often an object is small where there is room for a large one."""
    tilted: float = 0.15
    """How often an object that is no circle is turned by 17 to 34 degrees."""
    striped: float = 0.05
    """How often an object has light stripes."""
    outlined: float = 0.06
    """How often an object has a dark rim."""

    def __post_init__(self) -> None:
        if self.image_size < 8:
            raise ValueError(
                f"shapes.image_size must be at least 8 px; got {self.image_size}: use 64 or 256"
            )
        if self.crop_size is not None and not 8 <= self.crop_size <= self.image_size:
            raise ValueError(
                "shapes.crop_size must lie in 8..image_size; got "
                f"{self.crop_size} for image_size {self.image_size}: use {self.image_size // 4}"
            )
        if min(self.object_weights) < 0 or sum(self.object_weights) <= 0:
            raise ValueError(
                "shapes.object_weights must be three numbers >= 0, not all 0; got "
                f"{self.object_weights}: use [0.55, 0.35, 0.1]"
            )
        if not 0 <= self.jitter <= 0.1:
            raise ValueError(
                "shapes.jitter must lie in [0, 0.1], or objects leave their cells; got "
                f"{self.jitter}: use 0.03"
            )
        for name in ("small", "tilted", "striped", "outlined"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"shapes.{name} must lie in [0, 1]; got {getattr(self, name)}: use 0.1"
                )
        if self.variants < 1:
            raise ValueError(f"shapes.variants must be at least 1; got {self.variants}: use 1")


# --- which combinations training never shows -----------------------------------------------------


def _held_out_place(obj: SceneObject) -> bool:
    """One in nine (shape, colour, cell) triples: both are seen, but never there."""
    shape, colour = SHAPES.index(obj.shape), list(COLOURS).index(obj.colour)
    column, row = obj.cell
    return (5 * shape + 2 * colour + 3 * row + column) % 9 == 0


def _held_out_pair(a: SceneObject, b: SceneObject) -> bool:
    """About one in ten unordered pairs of (shape, colour): never together in one picture."""
    names = list(COLOURS)
    one, two = sorted((SHAPES.index(o.shape) * 8 + names.index(o.colour)) for o in (a, b))
    return (one * 53 + two * 29 + 7) % 10 == 0


def held_out(scene: Scene) -> bool:
    """Whether training must never show this scene.

    Each object's (shape, colour, place) triple and each two objects' pair of (shape, colour) is a
    combination; one held-out combination anywhere in a scene is enough.
    """
    objects = scene.objects
    return any(map(_held_out_place, objects)) or any(
        _held_out_pair(a, b) for i, a in enumerate(objects) for b in objects[i + 1 :]
    )


def _is_test_scene(scene: Scene) -> bool:
    """Whether a caption of this scene is sure to name something training never showed.

    One object: its place is held out, and captions of the split name the place. More objects: the
    first two are a held-out pair, so no training caption ever named both.
    """
    if len(scene.objects) == 1:
        return _held_out_place(scene.objects[0])
    return _held_out_pair(*scene.objects[:2])


# --- drawing scenes at random ---------------------------------------------------------------------


def _object(
    rng: np.random.Generator, world: ShapesConfig, size: str, x: float, y: float
) -> SceneObject:
    shape = SHAPES[rng.integers(len(SHAPES))]
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    radius = float(rng.uniform(*RADII[size]))
    # A circle has no tilt to see, and captions must not name what cannot be seen.
    tilted = shape != "circle" and rng.random() < world.tilted
    angle = float(rng.choice((-1, 1)) * rng.uniform(0.3, 0.6)) if tilted else 0.0
    margin = radius + 0.01
    return SceneObject(
        shape=shape,
        colour=colour,
        size=size,
        x=min(max(x, margin), 1 - margin),
        y=min(max(y, margin), 1 - margin),
        radius=radius,
        angle=angle,
        striped=bool(rng.random() < world.striped),
        outlined=bool(rng.random() < world.outlined),
        shade=float(rng.uniform(0.92, 1.06)),
    )


def _in_cell(
    rng: np.random.Generator, world: ShapesConfig, size: str, column: int, row: int
) -> SceneObject:
    dx, dy = rng.uniform(-world.jitter, world.jitter, 2)
    return _object(rng, world, size, CELL_CENTRES[column] + dx, CELL_CENTRES[row] + dy)


def _size(rng: np.random.Generator, world: ShapesConfig) -> str:
    return "small" if rng.random() < world.small else "large"


def _draw_scene(rng: np.random.Generator, world: ShapesConfig, count: int) -> Scene:
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    if count == 1:
        column, row = rng.integers(3, size=2)
        return Scene((_in_cell(rng, world, _size(rng, world), column, row),), background)
    if count == 3:
        # Three cells that do not touch leave room for small objects only.
        cells = [(0, 0), (2, 0), (0, 2), (2, 2), (1, 1)]
        if rng.random() < 0.5:
            cells = [(1, 0), (0, 1), (2, 1), (1, 2)] + cells[4:] * int(rng.random() < 0.5)
        chosen = rng.permutation(len(cells))[:3]
        return Scene(tuple(_in_cell(rng, world, "small", *cells[i]) for i in chosen), background)
    relation = RELATIONS[rng.choice(3, p=(0.4, 0.4, 0.2))]
    if relation == "inside":
        outer = replace(_in_cell(rng, world, "large", *rng.integers(3, size=2)), striped=False)
        outer = replace(outer, radius=float(rng.uniform(0.36, 0.40)))
        margin = outer.radius + 0.01
        x, y = (min(max(v, margin), 1 - margin) for v in (outer.x, outer.y))
        outer = replace(outer, x=x, y=y)
        inner = replace(_object(rng, world, "small", x, y), radius=float(rng.uniform(0.15, 0.165)))
        return Scene((inner, outer), background, "inside")
    near = int(rng.integers(3))
    far = near if rng.random() < 0.6 else int(rng.integers(3))
    ends = ((0, near), (2, far)) if relation == "left" else ((near, 0), (far, 2))
    a, b = (_in_cell(rng, world, _size(rng, world), *cell) for cell in ends)
    return Scene((a, b), background, relation)


def _looks_right(scene: Scene) -> bool:
    """No two objects of one look (a caption could not tell them apart); `inside` needs contrast."""
    looks = [(o.shape, o.colour) for o in scene.objects]
    if len(set(looks)) < len(looks):
        return False
    if scene.relation == "inside":
        inner, outer = scene.objects
        return inner.colour != outer.colour
    return True


def _accept(scene: Scene, split: Split) -> bool:
    if not _looks_right(scene):
        return False
    return _is_test_scene(scene) if split == "held_out" else not held_out(scene)


def _variant(rng: np.random.Generator, world: ShapesConfig, scene: Scene) -> Scene:
    """A near-copy: swap two objects' colours or shapes, swap places, or redraw one attribute."""
    objects = list(scene.objects)
    kind = rng.choice(5, p=(0.15, 0.2, 0.15, 0.2, 0.3))  # shapes are harder to learn than colours
    if len(objects) > 1 and kind < 3:
        i, j = rng.permutation(len(objects))[:2]
        a, b = objects[i], objects[j]
        if kind == 0:
            objects[i], objects[j] = replace(a, colour=b.colour), replace(b, colour=a.colour)
        elif kind == 1:
            objects[i], objects[j] = replace(a, shape=b.shape), replace(b, shape=a.shape)
        elif scene.relation != "inside":
            objects[i], objects[j] = (
                replace(a, shape=b.shape, colour=b.colour),
                replace(b, shape=a.shape, colour=a.colour),
            )
    else:
        i = int(rng.integers(len(objects)))
        if kind == 3:
            objects[i] = replace(objects[i], colour=list(COLOURS)[rng.integers(len(COLOURS))])
        elif kind == 4:
            objects[i] = replace(objects[i], shape=SHAPES[rng.integers(len(SHAPES))])
        elif len(objects) == 1:
            column, row = rng.integers(3, size=2)
            moved = _in_cell(rng, world, objects[0].size, column, row)
            objects[0] = replace(objects[0], x=moved.x, y=moved.y)
    objects = [replace(o, angle=0.0) if o.shape == "circle" else o for o in objects]
    return replace(scene, objects=tuple(objects))


def draw_scene(config: ShapesConfig, index: int) -> tuple[Scene, Caption]:
    """Scene and caption number `index` of the world that `config` describes."""
    group, member = divmod(index, config.variants)
    salt = 1 if config.split == "held_out" else 0
    rng = np.random.Generator(np.random.Philox(key=[config.seed * 2 + salt, group]))
    weights = np.asarray(config.object_weights) / sum(config.object_weights)
    count = 1 + int(rng.choice(3, p=weights))
    while not _accept(scene := _draw_scene(rng, config, count), config.split):
        pass
    caption_seed = int(rng.integers(2**62))

    def worded(scene: Scene) -> Caption:
        # One caption seed a group: near-copies are described with the same words, so that a
        # contrastive loss has to read the one attribute that differs.
        wording = np.random.Generator(np.random.Philox(caption_seed))
        return describe(scene, wording, config.caption_detail)

    caption = worded(scene)
    if member:
        rng = np.random.Generator(np.random.Philox(key=[config.seed, group], counter=member))
        for _ in range(20):
            changed = _variant(rng, config, scene)
            # A change that the caption does not tell would make a false negative of the pair.
            if _accept(changed, config.split) and (told := worded(changed)).text != caption.text:
                return changed, told
    return scene, caption


# --- rendering ------------------------------------------------------------------------------------


def _box(x: np.ndarray, y: np.ndarray, half_x: float, half_y: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_x, np.abs(y) - half_y)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    slope = math.sqrt(3) / 2
    y = y - 0.17
    return np.maximum(np.abs(x) * slope - y * 0.5, y) - 0.5 * np.where(y > 0, 1.1, 1.1)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Fold the plane into one tenth of the star, where its outline is a single straight edge.
    sector = 2 * math.pi / 5
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - sector * np.round(angle / sector))
    length = np.hypot(x, y)
    px, py = length * np.cos(angle), length * np.sin(angle)
    outer, inner = 1.0, 0.45
    vx, vy = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    edge = math.hypot(vx - outer, vy)
    return ((px - outer) * vy - py * (vx - outer)) / edge


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # A square on its corner with a disc on each of its two upper edges.
    half, y = 0.56, y - 0.08
    diamond = (np.abs(x) + np.abs(y)) / math.sqrt(2) - half
    offset = half / math.sqrt(2)
    return np.minimum(diamond, np.hypot(np.abs(x) - offset, y + offset) - half)


SIGNED_DISTANCE = {
    "circle": lambda x, y: np.hypot(x, y) - 0.92,
    "square": lambda x, y: _box(x, y, 0.8, 0.8),
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": lambda x, y: np.minimum(_box(x, y, 0.95, 0.32), _box(x, y, 0.32, 0.95)),
}
"""Signed distance to each shape's outline, negative inside, in units of the object's radius."""


def render(
    scenes: Sequence[Scene],
    size: int,
    crop_size: int | None = None,
    offsets: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Draw scenes with antialiased edges.

    Args:
        scenes: B scenes.
        size: side of the whole picture, px.
        crop_size: side of the window to draw, px; None draws everything.
        offsets: the window's (left, top) for each scene, px.

    Returns:
        [B, 3, S, S] uint8 with S = `crop_size` or `size`.
    """
    side = crop_size or size
    corner = np.zeros((len(scenes), 2)) if offsets is None else np.asarray(offsets, float)
    picture = np.empty((len(scenes), 3, side, side), np.float32)
    for b, scene in enumerate(scenes):
        picture[b] = np.asarray(BACKGROUNDS[scene.background], np.float32)[:, None, None]
    # Back to front: the last object of a scene lies deepest.
    for depth in reversed(range(max(len(s.objects) for s in scenes))):
        for name, distance in SIGNED_DISTANCE.items():
            rows = [
                b
                for b, s in enumerate(scenes)
                if len(s.objects) > depth and s.objects[depth].shape == name
            ]
            if rows:
                objects = [scenes[b].objects[depth] for b in rows]
                _paint(picture, rows, objects, distance, size, corner[rows])
    return torch.from_numpy(np.clip(picture + 0.5, 0, 255).astype(np.uint8))


def _paint(picture, rows, objects, distance, size, corner) -> None:  # type: ignore[no-untyped-def]
    """Lay objects of one shape over `picture[rows]`, each inside its bounding box only."""
    side = picture.shape[-1]
    pad = max(o.radius for o in objects) * 1.2 * size + 1.5
    box = min(side, int(2 * pad) + 1)
    centre = np.array([(o.x, o.y) for o in objects]) * size - corner  # px in the window
    start = np.clip(np.round(centre - box / 2), 0, side - box).astype(int)
    pixels = np.arange(box, dtype=np.float32) + 0.5
    radius = np.array([o.radius for o in objects], np.float32) * size
    angle = np.array([o.angle for o in objects])
    cos, sin = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    unit = radius[:, None, None]
    dx = ((pixels + (start - centre)[:, :1]).astype(np.float32) / radius[:, None])[:, None, :]
    dy = ((pixels + (start - centre)[:, 1:]).astype(np.float32) / radius[:, None])[:, :, None]
    x, y = cos * dx + sin * dy, cos * dy - sin * dx  # [M, box, box]
    d = distance(x, y)
    coverage = np.clip(0.5 - d * unit, 0, 1)
    base = np.array([COLOURS[o.colour] for o in objects], np.float32)
    base *= np.array([o.shade for o in objects], np.float32)[:, None]
    colour = np.broadcast_to(base[:, :, None, None], (*base.shape, box, box))
    striped = np.array([o.striped for o in objects])
    if striped.any():
        wave = np.clip(0.5 + np.sin(y[striped] * (2 * math.pi / 0.7)) * 0.25 * unit[striped], 0, 1)
        light = 0.45 * wave[:, None]
        colour = colour.copy()
        colour[striped] = colour[striped] * (1 - light) + 255 * light
    outlined = np.array([o.outlined for o in objects])
    if outlined.any():
        rim = np.clip(0.5 + (d[outlined] + 0.16) * unit[outlined], 0, 1)[:, None]
        colour = colour.copy()
        colour[outlined] = colour[outlined] * (1 - rim * 0.65)
    for m, b in enumerate(rows):
        left, top = start[m]
        area = picture[b, :, top : top + box, left : left + box]
        area += coverage[m] * (colour[m] - area)


class ShapesDataset(Dataset[dict[str, object]]):
    """Endless map-style data set of scenes: sample k is a function of (config, k) alone.

    Samples: ``image`` [3, S, S] float in [-1, 1], ``caption`` str, ``key`` str.
    """

    endless = True

    def __init__(self, config: ShapesConfig) -> None:
        self.config = config

    def __len__(self) -> int:
        return 2**40

    def scene(self, index: int) -> tuple[Scene, Caption]:
        """The scene and the caption of sample `index`, for tests and scoring."""
        return draw_scene(self.config, index)

    def __getitem__(self, index: int) -> dict[str, object]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, object]]:
        """A batch at once: rendering is vectorised over pictures."""
        config = self.config
        drawn = [draw_scene(config, index) for index in indices]
        offsets = None
        if config.crop_size:
            room = config.image_size - config.crop_size
            # Crops sit on multiples of 4 px, so that the low-resolution crop lies on whole pixels.
            offsets = [
                (int(v[0]) // 4 * 4, int(v[1]) // 4 * 4)
                for v in (
                    np.random.Generator(np.random.Philox(key=[config.seed + 1, i])).integers(
                        room + 1, size=2
                    )
                    for i in indices
                )
            ]
        pictures = render([s for s, _ in drawn], config.image_size, config.crop_size, offsets)
        images = pictures.float().div_(127.5).sub_(1)
        return [
            {"image": image, "caption": caption.text, "key": f"shapes-{config.split}-{index}"}
            for image, (_, caption), index in zip(images, drawn, indices, strict=True)
        ]
