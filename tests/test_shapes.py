"""The built-in world: scenes are repeatable, captions are true, splits do not leak."""

import re
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unclip.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    SHAPES,
    Scene,
    SceneObject,
    ShapesConfig,
    ShapesDataset,
    draw_scene,
    held_out,
    render,
)

SIZE_WORDS = {"small": {"small", "little", "tiny"}, "large": {"large", "big", "huge"}}
LOOKS = {
    "striped": {"striped", "stripy"},
    "outlined": {"outlined", "bordered"},
    "tilted": {"tilted", "rotated", "turned"},
}


def world(count: int, **config) -> list:
    return [draw_scene(ShapesConfig(**config), index) for index in range(count)]


@pytest.fixture(scope="module")
def train() -> list:
    return world(3000)


@pytest.fixture(scope="module")
def unseen() -> list:
    return world(600, split="held_out")


@pytest.fixture(scope="module")
def full(train, unseen) -> list:
    return world(600, caption_detail="full") + world(300, caption_detail="full", split="held_out")


# --- repeatable


def test_a_sample_follows_from_its_index_alone() -> None:
    dataset = ShapesDataset(ShapesConfig())
    together = dataset.__getitems__([5, 2**39, 17])
    for index, sample in zip([5, 2**39, 17], together, strict=True):
        alone = ShapesDataset(ShapesConfig())[index]
        assert torch.equal(sample["image"], alone["image"])
        assert (sample["caption"], sample["key"]) == (alone["caption"], alone["key"])
    assert together[0]["image"].shape == (3, 64, 64)
    assert together[0]["image"].abs().max() <= 1


def test_seeds_and_splits_are_other_worlds(train) -> None:
    captions = [caption.text for _, caption in train[:50]]
    assert captions != [caption.text for _, caption in world(50, seed=1)]
    assert captions != [caption.text for _, caption in world(50, split="held_out")]


def test_a_crop_is_the_crop_of_the_whole(train) -> None:
    scenes = [scene for scene, _ in train[:20]]
    whole = render(scenes, 128)
    offsets = [(4 * (i % 17), 4 * (i % 13)) for i in range(20)]
    windows = render(scenes, 128, 64, offsets)
    for picture, window, (left, top) in zip(whole, windows, offsets, strict=True):
        off = (picture[:, top : top + 64, left : left + 64].int() - window.int()).abs().max()
        assert off <= 1  # rounding: the two place their pixels by different sums


# --- splits


def test_training_never_shows_a_held_out_combination(train) -> None:
    assert not any(held_out(scene) for scene, _ in train)


def test_every_held_out_scene_shows_one(unseen) -> None:
    assert all(held_out(scene) for scene, _ in unseen)


def test_training_shows_each_shape_colour_and_cell(train) -> None:
    objects = [o for scene, _ in train for o in scene.objects]
    assert {(o.shape, o.colour) for o in objects} == {(s, c) for s in SHAPES for c in COLOURS}
    assert len({(o.shape, o.cell) for o in objects}) == len(SHAPES) * 9
    assert len({(o.colour, o.cell) for o in objects}) == len(COLOURS) * 9


# --- scenes


def test_objects_are_inside_the_frame_and_sizes_apart(train, unseen) -> None:
    for scene, _ in train + unseen:
        for o in scene.objects:
            assert o.radius < o.x < 1 - o.radius and o.radius < o.y < 1 - o.radius
            assert (o.radius < 0.17) == (o.size == "small")
    assert RADII["small"][1] < RADII["large"][0]


def test_relations_hold_and_no_two_objects_look_alike(train, unseen) -> None:
    for scene, _ in train + unseen:
        for a, b in combinations(scene.objects, 2):
            assert (a.shape, a.colour) != (b.shape, b.colour)
        if scene.relation is None:
            assert len(scene.objects) != 2
            continue
        a, b = scene.objects
        if scene.relation == "left":
            assert b.x - a.x > 0.4
        elif scene.relation == "above":
            assert b.y - a.y > 0.4
        else:
            assert (a.x, a.y) == (b.x, b.y) and a.radius < 0.6 * b.radius
            assert a.colour != b.colour


# --- captions


def test_words_are_true_of_the_scene(train, unseen, full) -> None:
    for scene, caption in train + unseen + full:
        # The background has a phrase of its own, at the end.
        text, _, ground = caption.text.partition(" on a ")
        assert ground in ("", f"{scene.background} background"), caption.text
        words = set(re.findall(r"[a-z]+", text))
        assert words & set(COLOURS) <= {o.colour for o in scene.objects}, caption.text
        assert words & set(SHAPES) <= {o.shape for o in scene.objects}, caption.text
        for size, said in SIZE_WORDS.items():
            if words & said:
                assert size in {o.size for o in scene.objects}, caption.text
        for look, said in LOOKS.items():
            if words & said:
                assert any(getattr(o, look) for o in scene.objects), caption.text


def test_places_and_relations_are_true_of_the_scene(train, unseen, full) -> None:
    for scene, caption in train + unseen + full:
        text, objects = caption.text, scene.objects
        if caption.names_place:
            column, row = objects[0].cell
            assert bool(re.search(r"\bleft\b", text)) == (column == 0), text
            assert bool(re.search(r"\bright\b", text)) == (column == 2), text
            assert bool(re.search(r"\b(top|upper)\b", text)) == (row == 0), text
            assert bool(re.search(r"\b(bottom|lower)\b", text)) == (row == 2), text
            assert bool(re.search(r"\b(middle|centre)\b", text)) == ((column, row) == (1, 1)), text
        elif caption.names_relation:
            words = {
                "left": r"\b(left|right) of\b",
                "above": r"\b(above|over|below)\b",
                "inside": r"\b(in|inside)\b",
            }
            for relation, pattern in words.items():
                assert bool(re.search(pattern, text)) == (relation == scene.relation), text
        else:
            assert not re.search(r"\b(left|right|top|bottom|above|below|inside)\b", text), text


def test_the_second_object_named_is_the_second_one(full) -> None:
    for scene, caption in full:
        if not caption.names_relation:
            continue
        a, b = (f"{o.colour} {o.shape}" for o in scene.objects)
        turned = re.search(r"\b(right of|below|with)\b", caption.text)
        assert (caption.text.index(a) > caption.text.index(b)) == bool(turned), caption.text


def test_full_detail_names_shapes_colours_and_place_or_relation(full) -> None:
    for scene, caption in full:
        for o in scene.objects:
            assert f"{o.colour} {o.shape}" in caption.text
        assert caption.names_place == (len(scene.objects) == 1)
        assert caption.names_relation == (len(scene.objects) == 2)


def test_varied_detail_leaves_things_out(train) -> None:
    single = [(scene.objects[0], c) for scene, c in train if len(scene.objects) == 1]
    for share, said in (
        (0.70, [c.names_place for _, c in single]),
        (0.95, [o.colour in c.text for o, c in single]),
        (0.95, [o.shape in c.text for o, c in single]),
        (0.35, ["background" in c.text for _, c in single]),
    ):
        assert np.mean(said) == pytest.approx(share, abs=0.04)


def test_near_copies_differ_in_caption_but_share_the_wording() -> None:
    changed = 0
    for group in range(60):
        config = ShapesConfig(variants=4)
        drawn = [draw_scene(config, 4 * group + member) for member in range(4)]
        first, caption = drawn[0]
        for scene, told in drawn[1:]:
            assert not held_out(scene)
            assert len(scene.objects) == len(first.objects)
            assert scene.background == first.background
            # Change the scene's own words into blanks: what is left is the wording.
            assert skeleton(told.text) == skeleton(caption.text)
            changed += told.text != caption.text
    assert changed > 0.9 * 180


def skeleton(text: str) -> str:
    places = r"(in|at|on) the (very |)(top|bottom|upper|lower|left|right|middle|centre).*?(?= on|$)"
    text = re.sub(places, "PLACE", text)
    text = re.sub("|".join([*COLOURS, *SHAPES]), "_", text)
    text = re.sub(r"\b(tilted|rotated|turned) ", "", text)  # a circle has no tilt to tell
    return re.sub(r"\ban\b", "a", text)


# --- pictures


def test_a_large_render_is_the_small_one_with_more_pixels(train) -> None:
    scenes = [scene for scene, _ in train[:100]]
    small, large = render(scenes, 64).float(), render(scenes, 256).float()
    apart = (F.avg_pool2d(large, 4) - small).abs()
    assert apart.mean() < 0.5  # of 255: edges are antialiased alike at both sizes
    assert apart.amax((1, 2, 3)).median() < 48


def alone(shape: str, **changes) -> Scene:
    look = {"colour": "red", "size": "large", "x": 0.5, "y": 0.5, "radius": 0.22} | changes
    return Scene((SceneObject(shape=shape, **look),), "white")


@pytest.mark.parametrize("radius", [0.125, 0.22])
def test_every_shape_looks_different(radius) -> None:
    pictures = render([alone(shape, radius=radius) for shape in SHAPES], 64).float()
    covered = (pictures != pictures[:, :, :1, :1]).any(1).float().sum((1, 2))
    for i, j in combinations(range(len(SHAPES)), 2):
        differs = ((pictures[i] - pictures[j]).abs().amax(0) > 100).sum()
        assert differs > 0.1 * min(covered[i], covered[j]), (SHAPES[i], SHAPES[j])


def test_shapes_stay_within_their_radius() -> None:
    scenes = [alone(s, angle=angle, radius=0.2) for s in SHAPES for angle in (0.0, 0.45)]
    line = (torch.arange(256) + 0.5) / 256 - 0.5
    distance = torch.hypot(line[:, None], line[None, :])
    for picture, scene in zip(render(scenes, 256), scenes, strict=True):
        far = (picture != picture[:, :1, :1]).any(0) * distance
        # A triangle's lower corners reach farthest, 1.195 of the radius.
        assert 0.8 * 0.2 < far.max() < 1.2 * 0.2, scene.objects[0]


def test_what_is_drawn_has_the_colours_it_should() -> None:
    for name, value in COLOURS.items():
        picture = render([alone("circle", colour=name)], 64)[0]
        assert picture[:, 32, 32].tolist() == list(value)
    for name, value in BACKGROUNDS.items():
        scene = Scene(alone("circle").objects, name)
        assert render([scene], 64)[0, :, 0, 0].tolist() == list(value)
    inner, outer = alone("circle", colour="blue", radius=0.12), alone("square", radius=0.3)
    picture = render([Scene((*inner.objects, *outer.objects), "white", "inside")], 64)[0]
    assert picture[:, 32, 32].tolist() == list(COLOURS["blue"])
    assert picture[:, 32, 18].tolist() == list(COLOURS["red"])


# --- config


def test_the_world_can_be_made_plainer_or_richer() -> None:
    def objects(**values) -> list[SceneObject]:
        config = ShapesConfig(object_weights=(1, 0, 0), **values)
        return [draw_scene(config, k)[0].objects[0] for k in range(200)]

    plain = objects(jitter=0, small=0, tilted=0, striped=0, outlined=0)
    assert {o.size for o in plain} == {"large"}
    assert not any(o.tilted or o.striped or o.outlined for o in plain)
    assert len({o.x for o in plain if o.cell[0] == 1}) == 1
    rich = objects(jitter=0.1, small=1, tilted=1, striped=1, outlined=1)
    assert {o.size for o in rich} == {"small"}
    assert all(o.striped and o.outlined for o in rich)
    assert all(o.tilted == (o.shape != "circle") for o in rich)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 4}, "image_size must be at least 8 px; got 4"),
        ({"crop_size": 128}, r"crop_size must lie in 8..image_size; got 128"),
        ({"object_weights": (0, 0, 0)}, "object_weights"),
        ({"variants": 0}, "variants must be at least 1; got 0"),
        ({"jitter": 0.2}, r"jitter must lie in \[0, 0.1\].*got 0.2"),
        ({"striped": 1.5}, r"striped must lie in \[0, 1\]; got 1.5"),
    ],
)
def test_bad_values_are_refused(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesConfig(**values)
