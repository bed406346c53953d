"""Zero-shot classification: the classifier, the pictures it reads, the command."""

import json
import re
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unclip.clip import FrozenCLIP, OpenCLIP, load_clip
from unclip.evaluation.labelled import Pictures, label_among
from unclip.evaluation.zero_shot import (
    TEMPLATES,
    ZeroShotConfig,
    classify,
    embed_classes,
    main,
    probabilities,
)

pytestmark = pytest.mark.filterwarnings("ignore:the caption has more than 20 tokens")


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> FrozenCLIP:
    return load_clip(str(clip_folder))


@pytest.fixture
def by_class(tmp_path: Path) -> Path:
    """Two plain colours, a sub-folder each."""
    for name, colour in (("red_thing", "red"), ("blue thing", "blue")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for k in range(3):
            picture = Image.new("RGB", (40 + k, 36), colour)
            picture.save(tmp_path / "pictures" / name / f"{k}.png")
    return tmp_path / "pictures"


def test_the_classifier_is_open_clips(clip: FrozenCLIP) -> None:
    assert isinstance(clip, OpenCLIP) and len(TEMPLATES) == 80
    ours = embed_classes(clip, ["cat", "red square"])
    theirs = open_clip.build_zero_shot_classifier(
        clip.model, clip.tokenizer, ["cat", "red square"], open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    torch.testing.assert_close(ours, theirs.T, atol=1e-5, rtol=0)
    image_embed = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    found = probabilities(clip, image_embed, ours)
    expected = (clip.model.logit_scale.exp() * image_embed @ theirs).softmax(1)  # type: ignore[operator]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # An embedding's length says nothing, so that unnormalised CLIPs are judged alike.
    torch.testing.assert_close(probabilities(clip, 3 * image_embed, ours), found)


def test_a_picture_of_a_class_is_told_from_the_other(clip: FrozenCLIP, by_class: Path) -> None:
    """What is measured is the embeddings': with those of the pictures themselves as the classes',
    every verdict is right."""
    pictures = list(Pictures([str(by_class)], 32))
    embeds = clip.encode_image(torch.stack([picture.image for picture in pictures]))
    found = probabilities(clip, embeds, embeds[[0, 3]]).argmax(1).tolist()
    assert [p.said for p in pictures] == ["blue thing"] * 3 + ["red_thing"] * 3
    assert found == [0, 0, 0, 1, 1, 1]


def test_sub_folders_are_the_labels(clip_folder: Path, by_class: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.json"
    main(["--pictures", str(by_class), "--clip", str(clip_folder), "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["classes"] == ["blue thing", "red_thing"]
    assert len(result["pictures"]) == 6 and result["accuracy"]["count"] == 6
    for one in result["pictures"]:
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert one["verdict"] == max(one["probabilities"], key=one["probabilities"].get)
    hits = [one["verdict"] == one["label"] for one in result["pictures"]]
    assert result["accuracy"]["fraction"] == sum(hits) / 6


def test_captions_are_labels_too(clip_folder: Path, pictures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    config = ZeroShotConfig(
        pictures=(str(folder),),
        classes=("picture 3", "picture 4", "something else"),
        templates=("a {}",),
        clip=str(clip_folder),
    )
    result = classify(config)
    labels = {one["name"]: one["label"] for one in result["pictures"]}
    assert len(labels) == 10 and labels["3.png"] == "picture 3" and labels["5.png"] is None
    assert result["accuracy"]["count"] == 2 and result["without_label"] == 8
    # A captions file says it of a folder that has one.
    (folder / "captions.csv").write_text("file_name,caption\n0.png,a picture 4 of ours\n")
    (only,) = classify(config)["pictures"]
    assert only["label"] == "picture 4"


def test_names_templates_and_pictures_from_files(
    clip_folder: Path, by_class: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("cat\n\n dog \n")
    (tmp_path / "templates.txt").write_text("a {}\nthe {}\n")
    picture = next(by_class.rglob("*.png"))
    words = ["--classes", str(tmp_path / "names.txt"), "--clip", str(clip_folder)]
    words += ["--templates", str(tmp_path / "templates.txt")]
    main(["--pictures", str(picture), *words])
    said = capsys.readouterr().out
    assert "cat" in said and "dog" in said and "right in" not in said


def test_the_built_in_world_and_imagenets_names(clip_folder: Path) -> None:
    shapes = ("circle", "square", "triangle", "star", "heart", "cross")
    config = ZeroShotConfig(
        pictures=("shapes",), limit=5, classes=shapes, templates=("{}",), clip=str(clip_folder)
    )
    result = classify(config)
    assert result["accuracy"]["count"] == 5
    assert result["accuracy_at_5"] >= result["accuracy"]["fraction"]
    imagenet = ZeroShotConfig(
        pictures=("shapes",),
        limit=1,
        classes=("imagenet",),
        templates=("{}",),
        clip=str(clip_folder),
    )
    assert len(classify(imagenet)["classes"]) == len(set(open_clip.IMAGENET_CLASSNAMES))


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("red_circle", "red circle"),
        ("A Red Circle in the middle", "red circle"),
        ("a blue square", "square"),
        ("a square beside a heart", None),
        ("squares", None),
        ("", None),
        (None, None),
    ],
)
def test_a_caption_speaks_of_one_class_or_of_none(said: str | None, label: str | None) -> None:
    classes = ["red circle", "square", "heart"]
    found = label_among(said, classes)
    assert (None if found is None else classes[found]) == label


def test_a_picture_that_is_none_is_left_out(
    clip_folder: Path, by_class: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = by_class / "red_thing" / "bad.png"
    bad.write_text("no picture")
    result = classify(ZeroShotConfig(pictures=(str(by_class),), clip=str(clip_folder)))
    assert list(result["skipped"]) == [str(bad)] and len(result["pictures"]) == 6
    assert "no known image format" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "a", "b"], "pictures must name"),
        (["--pictures", "BAD", "--classes", "a", "b"], "none can be read"),
        (["--pictures", "EMPTY", "--classes", "a", "b"], "must hold captioned pictures; got 0"),
        (["--pictures", "no/such.png", "--classes", "a", "b"], "no/such.png"),
        (["--pictures", "GOOD", "--classes", "a"], "classes must name at least two"),
        (["--pictures", "GOOD", "--classes", "a", "a"], "each once; got 'a'"),
        (["--pictures", "GOOD", "--classes", "a", ""], "classes must be names"),
        (["--pictures", "GOOD"], "classes must name at least two, .* got 0"),
        (["--pictures", "GOOD", "--classes", "BLANK"], "got 0: add"),
        (["--pictures", "GOOD", "--classes", "BAD"], "got 1: add"),
        (["--pictures", "GOOD", "--classes", "a", "b", "--templates", "a cat"], "one {} for"),
        (["--pictures", "GOOD", "--classes", "a", "b", "--limit", "0"], "limit must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_line(
    words: list[str],
    said: str,
    clip_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "empty").mkdir()
    paths = {"GOOD": "good.png", "BAD": "bad.png", "BLANK": "blank.txt", "EMPTY": "empty"}
    words = [str(tmp_path / paths[word]) if word in paths else word for word in words]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--clip", str(clip_folder)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(said.replace("{}", r"\{\}"), error), error
