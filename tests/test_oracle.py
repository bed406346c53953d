"""The oracle that ships, and the scoring of pictures by what it reads."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from unclip.data.captions import Caption
from unclip.data.oracle import SHIPPED, Oracle, OracleConfig, Reading
from unclip.data.shapes import Scene, SceneObject, ShapesConfig, draw_scene, render
from unclip.evaluation.intervals import wilson
from unclip.evaluation.shapes import (
    OracleCheckConfig,
    check_oracle,
    format_table,
    main,
    match,
    relation_holds,
    score,
    score_picture,
    tabulate,
)
from unclip.training.oracle import AugmentConfig, OracleObjective, ReadableShapes, augment

PLACED = Caption("", names_place=True, names_relation=False)
RELATED = Caption("", names_place=False, names_relation=True)
SILENT = Caption("", names_place=False, names_relation=False)


def held_out_scene(index: int) -> tuple[Scene, Caption]:
    return draw_scene(ShapesConfig(split="held_out", caption_detail="full"), index)


def thing(shape="circle", colour="red", size="large", x=0.2, y=0.2) -> SceneObject:
    return SceneObject(shape=shape, colour=colour, size=size, x=x, y=y, radius=0.2)


def reading_of(o: SceneObject, **changes) -> Reading:
    return replace(Reading(o.shape, o.colour, o.size, o.x, o.y), **changes)


# --- the shipped oracle


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle.load()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [
        draw_scene(ShapesConfig(split=split), index)[0]
        for split in ("train", "held_out")
        for index in range(150)
    ]


@pytest.mark.parametrize("size", [64, 256])
def test_the_shipped_oracle_reads_true_renders(oracle, scenes, size) -> None:
    images = render(scenes, size).float() / 127.5 - 1
    right = {"shape": 0, "colour": 0, "size": 0, "cell": 0}
    distance = []
    for readings, scene in zip(oracle.read(images), scenes, strict=True):
        for found, true in zip(match(readings, scene.objects), scene.objects, strict=True):
            for name in right:
                right[name] += getattr(found, name, None) == getattr(true, name)
            if found is not None:
                distance.append(math.hypot(found.x - true.x, found.y - true.y))
    total = sum(len(scene.objects) for scene in scenes)
    assert {name: n for name, n in right.items() if n < 0.99 * total} == {}
    assert sum(distance) / len(distance) < 0.01


def test_the_shipped_oracle_is_small() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 1_500_000


def test_a_reading_does_not_depend_on_the_batch(oracle, scenes) -> None:
    images = render(scenes[:5], 64).float() / 127.5 - 1
    together = oracle.read(images, batch_size=5)
    apart = [oracle.read(image[None])[0] for image in images]
    for a, b in zip(together, apart, strict=True):
        assert [(r.shape, r.colour, r.size) for r in a] == [(r.shape, r.colour, r.size) for r in b]
        assert [r.x for r in a] == pytest.approx([r.x for r in b], abs=1e-4)
        assert [r.y for r in a] == pytest.approx([r.y for r in b], abs=1e-4)


def test_an_empty_picture_reads_as_empty(oracle) -> None:
    assert oracle.read(torch.full((1, 3, 64, 64), 0.95)) == [[]]


def test_save_and_load_is_exact(tmp_path, oracle) -> None:
    oracle.save(tmp_path / "oracle")
    again = Oracle.load(tmp_path / "oracle")
    assert again.config == oracle.config
    for name, tensor in oracle.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_bad_input_says_what_is_wrong(oracle) -> None:
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]; got \[3, 64, 64\]"):
        oracle.read(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match=r"eval\(\)"):
        Oracle().read(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="threshold"):
        OracleConfig(threshold=1.0)


# --- its training


def test_training_shows_both_splits_with_their_objects() -> None:
    config = ShapesConfig(seed=3)
    samples = ReadableShapes(config).__getitems__([2, 3])
    for sample, split in zip(samples, ("train", "held_out"), strict=True):
        scene, _ = draw_scene(replace(config, split=split), 1)
        assert torch.equal(sample["image"], render([scene], 64)[0].float() / 127.5 - 1)
        rows = sample["objects"]
        assert (rows[len(scene.objects) :] == -1).all()
        for row, o in zip(rows, scene.objects, strict=False):
            assert row[3:].tolist() == pytest.approx([o.x, o.y])


def test_training_shows_nested_objects_often() -> None:
    rows = torch.stack(
        [s["objects"] for s in ReadableShapes(ShapesConfig()).__getitems__(range(12))]
    )
    nested = (rows[:, 0, 3:] == rows[:, 1, 3:]).all(-1) & (rows[:, 1, 0] >= 0)
    assert nested[[4, 5, 10, 11]].all()


def test_the_loss_is_finite_repeatable_and_reaches_every_weight() -> None:
    torch.manual_seed(0)
    objective = OracleObjective(
        OracleConfig(width=8, fine_blocks=1, dilations=(1,)), AugmentConfig()
    )
    samples = ReadableShapes(ShapesConfig()).__getitems__(range(8))
    batch = {key: torch.stack([s[key] for s in samples]) for key in ("image", "objects")}
    losses = [objective(batch, torch.Generator().manual_seed(1))["loss"] for _ in range(2)]
    assert torch.equal(*losses) and losses[0].isfinite()
    losses[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())


def test_no_flaws_leave_pictures_as_they_are() -> None:
    images = torch.rand(4, 3, 16, 16)
    none = AugmentConfig(blur=0, noise=0, brightness=0, contrast=0)
    assert torch.equal(augment(images, none, torch.Generator().manual_seed(0)), images)
    assert not torch.equal(augment(images, AugmentConfig(), torch.Generator()), images)


# --- scoring


def test_a_right_picture_is_right_in_everything() -> None:
    a, b = thing(), thing("star", "blue", "small", x=0.8)
    verdict = score_picture([reading_of(b), reading_of(a)], Scene((a, b), "white", "left"), RELATED)
    assert verdict.pop("objects_right") == 2
    assert all(value is True for value in verdict.values())


def test_a_swapped_relation_costs_the_place_only() -> None:
    a, b = thing(), thing("star", "blue", x=0.8)
    readings = [reading_of(a, x=0.8), reading_of(b, x=0.2)]
    verdict = score_picture(readings, Scene((a, b), "white", "left"), RELATED)
    assert verdict["shape"] and verdict["colour"] and verdict["objects_right"] == 2
    assert verdict["place"] is False and verdict["all"] is False


def test_swapped_colours_are_never_all_right() -> None:
    a, b = thing(), thing("star", "blue", x=0.8)
    readings = [reading_of(a, colour="blue"), reading_of(b, colour="red")]
    verdict = score_picture(readings, Scene((a, b), "white", "left"), RELATED)
    assert not (verdict["shape"] and verdict["colour"]) and verdict["objects_right"] == 0
    assert verdict["all"] is False and verdict["count"] is True


def test_a_missing_object_costs_everything_but_the_object_that_is_there() -> None:
    a, b = thing(), thing("star", "blue", x=0.8)
    verdict = score_picture([reading_of(b)], Scene((a, b), "white", "left"), RELATED)
    assert verdict == {
        "shape": False, "colour": False, "size": False, "place": False, "all": False,
        "count": False, "objects_right": 1,
    }  # fmt: skip
    assert match([reading_of(b)], (a, b)) == [None, reading_of(b)]


def test_an_extra_object_shows_in_the_count_only() -> None:
    a = thing()
    readings = [reading_of(a, shape="heart", x=0.9), reading_of(a)]
    verdict = score_picture(readings, Scene((a,), "white"), PLACED)
    assert verdict["all"] is True and verdict["count"] is False


def test_the_place_of_one_object_is_its_cell() -> None:
    a = thing(x=0.2, y=0.5)
    scene = Scene((a,), "white")
    assert score_picture([reading_of(a, x=0.3)], scene, PLACED)["place"] is True
    assert score_picture([reading_of(a, x=0.35)], scene, PLACED)["all"] is False
    silent = score_picture([reading_of(a, x=0.9)], scene, SILENT)
    assert silent["place"] is None and silent["all"] is True


def test_relations() -> None:
    small, large = reading_of(thing(size="small", x=0.5)), reading_of(thing(x=0.5))
    assert relation_holds("inside", small, large)
    assert not relation_holds("inside", large, small)
    assert not relation_holds("inside", replace(small, x=0.9), large)
    assert relation_holds("left", replace(small, x=0.2), large)
    assert not relation_holds("left", small, large)
    assert relation_holds("above", small, replace(large, y=0.8))
    assert not relation_holds("above", replace(small, y=0.8), large)


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (7, 20), (499, 500)])
def test_wilsons_ends_solve_its_equation(hits, count) -> None:
    """The ends are the p0 with (p - p0)² = z² p0 (1 - p0) / n."""
    p, z = hits / count, 1.96
    low, high = wilson(hits, count)
    assert 0 <= low <= p <= high <= 1
    for end in (low, high):
        assert (p - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / count, abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_table_counts_by_number_of_objects() -> None:
    one, two = Scene((thing(),), "white"), Scene((thing(), thing("star", x=0.8)), "white", "left")
    verdicts = [
        score_picture([reading_of(o) for o in one.objects], one, PLACED),
        score_picture([], one, PLACED),
        score_picture([reading_of(o) for o in two.objects], two, SILENT),
    ]
    table = tabulate(verdicts, [one, one, two])
    assert list(table) == ["1", "2", "all"]
    assert (table["1"]["all"]["fraction"], table["1"]["all"]["count"]) == (0.5, 2)
    assert table["2"]["place"]["count"] == 0 and table["2"]["all"]["fraction"] == 1
    assert table["all"]["objects"] == table["all"]["objects"] | {"fraction": 0.75, "count": 4}
    assert "1 object (n=2)" in format_table(table)


def test_score_needs_a_scene_for_each_picture(oracle) -> None:
    scene, caption = draw_scene(ShapesConfig(caption_detail="full"), 0)
    picture = render([scene], 64).float() / 127.5 - 1
    assert score(picture, [scene], [caption], oracle)["all"]["all"]["count"] == 1
    with pytest.raises(ValueError, match="2 pictures, 1 scenes"):
        score(picture.repeat(2, 1, 1, 1), [scene], [caption], oracle)


def test_the_oracle_is_measured_on_both_splits_and_sizes(capsys) -> None:
    result = check_oracle(OracleCheckConfig(num=20))
    tables = {name: result[name] for name in result if name != "settings"}
    assert set(tables) == {f"{s}_{n}px" for s in ("train", "held_out") for n in (64, 256)}
    assert all(table["all"]["all"]["count"] == 20 for table in tables.values())
    assert "held_out, 256 px" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["null", "true", "mean"])
def test_text2image_scores_what_the_pipeline_draws(monkeypatch, tmp_path, given) -> None:
    """A pipeline that draws the true pictures of all captions but the first gets 3 of 4."""
    scenes = [scene for scene, _ in map(held_out_scene, range(4))]
    captions = [caption.text for _, caption in map(held_out_scene, range(4))]

    def draw(prompts, *, image_embed, guidance_scale, **options) -> SimpleNamespace:
        assert prompts == captions and guidance_scale == 2
        shapes = {"null": None, "true": (4, 3), "mean": (3,)}
        assert (None if image_embed is None else image_embed.shape) == shapes[given]
        images = render(scenes, 64).float() / 127.5 - 1
        images[0] = 0.9
        return SimpleNamespace(by_size={64: images}, seconds={"decoder": 1.0})

    draw.clip = SimpleNamespace(
        required_image_size=lambda: 64,
        device="cpu",
        encode_image=lambda x: x.mean((2, 3)),
    )
    monkeypatch.setattr("unclip.pipeline.UnCLIP.from_pretrained", lambda *_, **__: draw)
    words = ["text2image", "--num", "4", "--guidance-scale", "2", "--out", str(tmp_path / "a.json")]
    monkeypatch.setattr("sys.argv", ["shapes", *words, "--given", given])
    main()
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["tables"]["64px"]["all"]["all"]["fraction"] == 0.75
    assert result["settings"]["cascade"]["size"] == 64


def test_an_unknown_measurement_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["shapes", "fid"])
    with pytest.raises(SystemExit):
        main()
    assert "`oracle` or `text2image`; got 'fid'" in capsys.readouterr().err
