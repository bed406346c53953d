"""Making tars of captions and pictures, and of a font."""

import argparse
import csv
import json
import logging
import tarfile

import datasets
import pytest
from PIL import Image

from unclip.data import build
from unclip.data.images import to_pil
from unclip.data.source import SourceConfig, open_source


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    build.add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


@pytest.fixture
def pictures(tmp_path):
    """Forty pictures by four artists, and their captions."""
    folder = tmp_path / "pictures"
    (folder / "sub.dir").mkdir(parents=True)
    with (folder / "captions.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["file_name", "caption", "artist"])
        for k in range(40):
            name = f"sub.dir/{k}.png" if k % 2 else f"{k}.jpg"
            Image.new("RGB", (20, 10), (6 * k, 0, 0)).save(folder / name)
            lines.writerow([name, f"picture {k} é", f"artist {k % 4}"])
    return folder


def read(pattern) -> dict[str, str]:
    ds = open_source(SourceConfig(data=str(pattern), image_size=8))
    return {ds[i]["key"]: ds[i]["caption"] for i in range(len(ds))}


def test_a_folder_becomes_tars_with_a_split_by_key(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["pack", pictures / "captions.csv", "--val-share", "0.3", "--samples-per-tar", "10"]
    assert run(*words, "--out", out) == 0
    train, val = read(out / "train-*.tar"), read(out / "val-*.tar")
    assert len(train) + len(val) == 40 and 5 < len(val) < 20
    assert (train | val)["sub_dir_7"] == "picture 7 é"
    assert f"train: {len(train)} samples in {out / 'train'}-*.tar" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} >= {"train-00000.tar", "train-00001.tar"}

    run(*words, "--out", tmp_path / "again")
    for path in out.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()

    with (pictures / "captions.csv").open("a") as file:  # more samples move none between splits
        for k in range(40, 60):
            Image.new("RGB", (8, 8)).save(pictures / f"{k}.png")
            file.write(f"{k}.png,more,artist\n")
    run(*words, "--out", tmp_path / "more")
    assert read(tmp_path / "more/train-*.tar").items() >= train.items()
    assert read(tmp_path / "more/val-*.tar").items() >= val.items()


def test_a_split_by_a_column_keeps_its_groups_together(pictures, tmp_path):
    words = ["--split-by", "artist", "--val-share", "0.4", "--out", tmp_path / "out"]
    run("pack", pictures / "captions.csv", *words)
    artists = {}
    for path in (tmp_path / "out").iterdir():
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith("json"):
                    artist = json.load(tar.extractfile(member))["artist"]
                    artists.setdefault(path.name[:3], set()).add(artist)
    assert not artists["tra"] & artists["val"]
    with pytest.raises(ValueError, match=r"got 'painter': choose one of file_name, caption, art"):
        run("pack", pictures / "captions.csv", "--split-by", "painter", "--out", tmp_path / "x")


def test_pictures_are_made_smaller_when_asked(pictures, tmp_path):
    run("pack", pictures / "captions.csv", "--max-side", "5", "--out", tmp_path / "out")
    with tarfile.open(tmp_path / "out/train-00000.tar") as tar:
        pictures_in = [m for m in tar if m.name.endswith(("jpg", "png"))]
        assert all(member.name.endswith("jpg") for member in pictures_in)
        assert Image.open(tar.extractfile(pictures_in[0])).size == (10, 5)


def test_bad_lines_are_left_out_up_to_a_share_and_nothing_half_made_stays(
    pictures, tmp_path, caplog
):
    (pictures / "4.jpg").write_bytes(b"broken")
    (pictures / "6.jpg").unlink()
    Image.new("RGB", (8, 8)).save(pictures / "6.bmp")
    words = ["pack", pictures / "captions.csv", "--out", tmp_path / "out"]
    with pytest.raises(ValueError, match=r"got 1 of 40 lines so far .*raise max_bad_share \(0.01"):
        run(*words)
    assert not list(tmp_path.glob("*out*"))
    run(*words, "--max-bad-share", "0.1")
    assert len(read(tmp_path / "out/*.tar")) == 38
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "left out 6.jpg: missing picture" in messages
    with pytest.raises(ValueError, match="out must be a new folder; got"):
        run(*words)


def test_numbers_out_of_range_and_keys_that_meet(tmp_path):
    sample = build.Sample("k", "c", b"", "png", "k")
    with pytest.raises(ValueError, match=r"val_share must lie in \[0, 1\); got 1"):
        build.write_tars([sample], tmp_path / "a", val_share=1)
    with pytest.raises(ValueError, match="samples_per_tar must be at least 1; got 0"):
        build.write_tars([sample], tmp_path / "a", samples_per_tar=0)
    with pytest.raises(ValueError, match="keys must differ; got 'k' twice"):
        build.write_tars([sample, sample], tmp_path / "a")
    with pytest.raises(ValueError, match="there must be samples to write; got none"):
        build.write_tars([], tmp_path / "a")


@pytest.fixture
def font(tmp_path):
    """A font of two squares in colour, 😀 red and 👍 blue, and one without, A."""
    builder = pytest.importorskip("fontTools.fontBuilder")
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen")

    def square(side: int):
        pen = pens.TTGlyphPen(None)
        pen.moveTo((0, 0))
        for point in ((0, side), (side, side), (side, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    glyphs = {".notdef": square(300), "smile": square(900), "thumb": square(900), "A": square(900)}
    glyphs["layer"] = square(900)
    made = builder.FontBuilder(1000, isTTF=True)
    made.setupGlyphOrder(list(glyphs))
    made.setupCharacterMap({0x1F600: "smile", 0x1F44D: "thumb", 0x41: "A"})
    made.setupGlyf(glyphs)
    made.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    made.setupHorizontalHeader(ascent=900, descent=-100)
    made.setupNameTable({"familyName": "Tiny"})
    made.setupOS2()
    made.setupPost()
    made.setupCOLR({"smile": [("layer", 0)], "thumb": [("layer", 1)]})
    made.setupCPAL([[(1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0)]])
    made.save(tmp_path / "tiny.ttf")
    return tmp_path / "tiny.ttf"


NAMES = {"😀": "grinning face", "👍": "thumbs up", "A": "letter", "🚗": "car", "😀👍": "a pair"}


def test_emoji_of_a_font(font, tmp_path, caplog):
    samples = list(build.emoji_samples(NAMES, font, size=16, caption="tiny {name}"))
    build.write_tars(samples, tmp_path / "out", val_share=0)
    ds = open_source(SourceConfig(data=str(tmp_path / "out/*.tar"), image_size=16))
    drawn = {ds[i]["caption"]: to_pil(ds[i]["image"]) for i in range(len(ds))}
    assert drawn.keys() == {"tiny grinning face", "tiny thumbs up"}
    assert drawn["tiny grinning face"].getpixel((8, 8)) == (255, 0, 0)
    assert drawn["tiny thumbs up"].getpixel((8, 8)) == (0, 0, 255)
    assert drawn["tiny thumbs up"].getpixel((0, 0)) == (255, 255, 255)
    assert "lacks 3 of 5 emoji" in caplog.text
    with pytest.raises(
        ValueError, match=r"font must draw emoji in colour; got .* which draws none"
    ):
        list(build.emoji_samples({"A": "letter"}, font))
    with pytest.raises(ValueError, match=r"caption must hold {name}; got 'x'"):
        list(build.emoji_samples(NAMES, font, caption="x"))


def test_skin_tones_share_a_split(font):
    assert build.SKIN_TONES.keys() == set(range(0x1F3FB, 0x1F400))
    thumbs = {"👍": "thumbs up"}
    (sample,) = build.emoji_samples(thumbs, font)
    assert sample.split_by == "👍🏽".translate(build.SKIN_TONES)


def test_names_come_from_the_package_emoji():
    pytest.importorskip("emoji")
    names = build.emoji_names()
    assert names["😀"] == "grinning face" and len(names) > 3000


def test_a_font_that_is_none(tmp_path):
    (tmp_path / "x.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match=r"font must be one that can be read; got .*x\.ttf"):
        list(build.emoji_samples(NAMES, tmp_path / "x.ttf"))
    with pytest.raises(FileNotFoundError, match="font must be a file; got"):
        list(build.emoji_samples(NAMES, tmp_path / "gone.ttf"))
