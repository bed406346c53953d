"""Pictures and their captions: decoding, resizing, and every kind of source."""

import csv
import io
import json
import logging
import os
import pickle
import tarfile

import datasets
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from unclip.data.captioned import CaptionedConfig, CaptionedDataset
from unclip.data.images import decode_image, resize, to_pil, to_tensor

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def plain(colour=RED, size=(8, 8)) -> bytes:
    return encode(Image.new("RGB", size, colour))


# --- decoding


def one_colour(image: Image.Image) -> tuple:
    assert image.mode == "RGB"
    ((_, colour),) = image.getcolors()
    return colour


def palette(transparency=None) -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return encode(image, **({} if transparency is None else {"transparency": transparency}))


def grey16(value: int) -> bytes:
    return encode(Image.fromarray(np.full((4, 4), value, np.uint16)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(Image.new("RGB", (4, 4), (1, 2, 3))), (1, 2, 3)),
        (encode(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (encode(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (grey16(65535), (255, 255, 255)),
        (grey16(100 * 257), (100, 100, 100)),
        (encode(Image.new("I", (4, 4), 100 * 257), "TIFF"), (100, 100, 100)),
        (palette(), (10, 20, 30)),
        (palette(transparency=1), (255, 255, 255)),  # the entry is wholly transparent
        (palette(transparency=bytes([255, 51])), (206, 208, 210)),  # 0.2 colour + 0.8 white
        (encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), (255, 255, 255)),
        (encode(Image.new("RGBA", (4, 4), (255, 0, 0, 51))), (255, 204, 204)),
        (encode(Image.new("LA", (4, 4), (0, 51))), (204, 204, 204)),
        (encode(Image.new("RGB", (4, 4), RED), transparency=RED), (255, 255, 255)),
        (encode(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
        (encode(Image.new("CMYK", (4, 4), (0, 0, 0, 204)), "TIFF"), (51, 51, 51)),
        # Pillow stores the inks of a JPEG inverted, as Adobe does, and reads them so.
        (encode(Image.new("CMYK", (8, 8), (0, 0, 0, 204)), "JPEG"), (51, 51, 51)),
    ],
)
def test_every_mode_becomes_the_right_rgb(data, expected):
    assert one_colour(decode_image(data)) == expected


def test_transparency_shows_the_background_asked_for():
    clear = encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    assert one_colour(decode_image(clear, background=(9, 8, 7))) == (9, 8, 7)


def test_a_picture_that_is_open_already_is_converted_too():
    assert one_colour(decode_image(Image.new("RGBA", (4, 4), (255, 0, 0, 51)))) == (255, 204, 204)


def test_the_exif_orientation_is_applied():
    image = Image.new("RGB", (16, 8), BLUE)
    image.paste(RED, (0, 0, 8, 8))  # red left, blue right
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the left goes to the top
    upright = decode_image(encode(image, exif=exif))
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2)) == RED and upright.getpixel((4, 14)) == BLUE


def noise(size=(32, 32), seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_corrupt_and_truncated_pictures_raise_and_say_why(format):
    data = encode(noise(), format)
    for bad in (data[: len(data) // 2], b"no picture", b""):
        with pytest.raises(ValueError, match=r"cannot be decoded: ."):
            decode_image(bad)


def test_modes_without_a_meaning_in_rgb_raise():
    with pytest.raises(ValueError, match="no white level"):
        decode_image(Image.new("F", (4, 4)))


# --- tensors


def test_to_tensor_and_back():
    image = noise((16, 16))
    tensor = to_tensor(image, 16)
    expected = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(tensor, expected)
    assert np.array_equal(np.asarray(to_pil(tensor)), np.asarray(image))


def test_to_pil_rounds_and_clamps_and_wants_one_picture():
    levels = torch.tensor([-3.0, 0.003, 5.0])[:, None, None].expand(3, 2, 2)
    assert one_colour(to_pil(levels)) == (0, 128, 255)
    with pytest.raises(ValueError, match=r"\[1, 3, 2, 2\]"):
        to_pil(levels[None])


def test_a_checkerboard_of_single_pixels_becomes_grey():
    squares = np.indices((64, 64)).sum(0) % 2 * 255
    image = Image.fromarray(squares.astype(np.uint8)).convert("RGB")
    tensor = to_tensor(image, 8)
    assert tensor.abs().max() < 0.05
    full = torch.tensor(squares / 127.5 - 1, dtype=torch.float32).expand(1, 3, 64, 64)
    assert resize(full, 8).abs().max() < 0.05


@pytest.mark.parametrize("wide", [True, False])
def test_the_centre_is_cut_along_the_longer_side(wide):
    image = Image.new("RGB", (48, 16), BLUE)
    image.paste(RED, (16, 0, 32, 16))
    if not wide:
        image = image.transpose(Image.Transpose.ROTATE_90)
    tensor = to_tensor(image, 8)
    assert tensor.shape == (3, 8, 8)
    across = tensor if wide else tensor.transpose(1, 2).flip(2)
    whole = image if wide else image.transpose(Image.Transpose.ROTATE_270)
    expected = to_tensor(whole.resize((24, 8), Image.Resampling.BICUBIC).crop((8, 0, 16, 8)), 8)
    torch.testing.assert_close(across, expected, atol=1.01 / 127.5, rtol=0)


def test_random_crops_come_from_the_generator_and_reach_both_ends():
    ramp = np.broadcast_to(np.arange(0, 200, 10, dtype=np.uint8), (4, 20))
    image = Image.fromarray(ramp.copy()).convert("RGB")

    def left(seed: int) -> int:
        generator = torch.Generator().manual_seed(seed)
        return to_pil(to_tensor(image, 4, crop="random", generator=generator)).getpixel((0, 0))[0]

    assert left(3) == left(3)
    assert {left(seed) for seed in range(150)} == set(range(0, 170, 10))


def test_resize_is_the_identity_at_the_same_size_and_stays_in_range():
    images = torch.rand(2, 3, 12, 12) * 2 - 1
    assert resize(images, 12) is images
    for size in (5, 30):
        resized = resize(images.sign(), size)
        assert resized.shape == (2, 3, size, size)
        assert resized.min() >= -1 and resized.max() <= 1


# --- sources


def write_tar(path, samples: dict[str, dict[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for extension, data in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def open_set(data, **options) -> CaptionedDataset:
    options = {"image_size": 8} | options
    return CaptionedDataset(
        CaptionedConfig(data=data if isinstance(data, list) else str(data), **options)
    )


def pairs(ds: CaptionedDataset) -> list[tuple[str, str]]:
    return [(ds[i]["key"], ds[i]["caption"]) for i in range(len(ds))]


@pytest.fixture
def tars(tmp_path):
    for shard in range(3):
        write_tar(
            tmp_path / f"t-{shard:05d}.tar",
            {
                f"{shard}{k}": {"png": plain(), "txt": f"picture {shard}{k} é".encode()}
                for k in range(2)
            },
        )
    return tmp_path


@pytest.mark.parametrize(
    "pattern", ["t-*.tar", "t-{00000..00002}.tar", "t-{00000,00001,00002}.tar", ""]
)
def test_tars_by_glob_braces_and_folder(tars, pattern):
    ds = open_set(tars / pattern)
    assert pairs(ds) == [(k, f"picture {k} é") for k in ("00", "01", "10", "11", "20", "21")]
    assert ds[0]["image"].shape == (3, 8, 8) and ds[0]["image"].dtype == torch.float32
    assert one_colour(to_pil(ds[0]["image"])) == RED
    assert ds[-1]["key"] == "21"
    with pytest.raises(IndexError):
        ds[6]


def test_a_list_of_tars(tars):
    ds = open_set([str(tars / "t-00002.tar"), str(tars / "t-00000.tar")])
    assert [key for key, _ in pairs(ds)] == ["20", "21", "00", "01"]


def test_brackets_in_a_folders_name_are_no_pattern(tmp_path):
    folder = tmp_path / "run [1]"
    folder.mkdir()
    tar = write_tar(folder / "a.tar", {"k": {"png": plain(), "txt": b"c"}})
    assert pairs(open_set(tar)) == [("k", "c")]


def test_a_tar_that_changes_is_read_again(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"k": {"png": plain(), "txt": b"old"}})
    assert pairs(open_set(tar)) == [("k", "old")]
    write_tar(tar, {"k": {"png": plain(), "txt": b"new"}, "l": {"png": plain(), "txt": b"more"}})
    assert pairs(open_set(tar)) == [("k", "new"), ("l", "more")]


def test_mixed_extensions_and_json_captions(tmp_path):
    def meta(**values) -> bytes:
        return json.dumps(values).encode()

    tar = write_tar(
        tmp_path / "a.tar",
        {
            "a": {"jpg": encode(noise(), "JPEG"), "json": meta(caption="one", width=8)},
            "b": {"webp": encode(noise(), "WEBP"), "json": meta(width="8", caption="two")},
            "c": {"jpeg": encode(noise(), "JPEG"), "json": meta(caption="three", x={"y": "deep"})},
            "d": {"png": plain(), "json": meta(caption="four"), "cls": b"7"},
        },
    )
    expected = [("a", "one"), ("b", "two"), ("c", "three"), ("d", "four")]
    assert pairs(open_set(tar, caption_key="json.caption")) == expected
    assert pairs(open_set(tar, caption_key="json.x.y")) == [("c", "deep")]
    with pytest.raises(ValueError, match=r"got 'txt': choose one of cls, json.caption, json.width"):
        open_set(tar)


def test_samples_without_picture_or_caption_are_dropped_with_one_warning(tmp_path, caplog):
    samples = {"a": {"png": plain(), "txt": b"one"}, "b": {"png": plain()}, "c": {"txt": b"three"}}
    assert pairs(open_set(write_tar(tmp_path / "a.tar", samples))) == [("a", "one")]
    (record,) = [r for r in caplog.records if r.name.startswith("unclip")]
    assert "dropped 2 samples" in record.getMessage()


def test_a_blank_caption_is_none_and_captions_are_stripped(tmp_path):
    samples = {"a": {"png": plain(), "txt": b" one\n"}, "b": {"png": plain(), "txt": b" \n"}}
    assert pairs(open_set(write_tar(tmp_path / "a.tar", samples))) == [("a", "one")]


def test_a_tar_cut_off_is_not_taken_for_a_short_one(tmp_path):
    samples = {f"k{i}": {"png": encode(noise(seed=i)), "txt": b"c"} for i in range(4)}
    tar = write_tar(tmp_path / "a.tar", samples)
    tar.write_bytes(tar.read_bytes()[:9000])
    with pytest.raises(
        ValueError, match=r"must hold whole tars; got 1 of 1 .*a.tar: unexpected end"
    ):
        open_set(tar)


def test_what_lies_before_the_damage_of_a_tar_is_used(tmp_path, caplog):
    samples = {f"k{i}": {"png": encode(noise(seed=i)), "txt": b"c"} for i in range(4)}
    for name in ("a", "b", "c"):
        write_tar(tmp_path / f"{name}.tar", samples)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:9000])
    ds = open_set(tmp_path)
    assert [key for key, _ in pairs(ds)] == ["k0", "k1", "k2", "k3", "k0", "k0", "k1", "k2", "k3"]
    assert ds.dropped == {"cut off by the tar's end": 1}
    assert f"{tmp_path / 'b.tar'} is damaged: unexpected end of data (9000" in caplog.text


def test_a_tar_that_ends_between_members_or_in_something_else(tmp_path, caplog):
    samples = {f"k{i}": {"png": plain(), "txt": b"c"} for i in range(4)}
    whole = write_tar(tmp_path / "a.tar", samples).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        start = tar.getmember("k2.png").offset
    for name, rest in {"b": b"", "c": b"something else " * 100}.items():
        (tmp_path / f"{name}.tar").write_bytes(whole[:start] + rest)
    ds = open_set(tmp_path, max_bad_share=0.9)
    assert [key for key, _ in pairs(ds)] == ["k0", "k1", "k2", "k3", "k0", "k0"]
    assert f"b.tar is damaged: it is cut off at byte {start}" in caplog.text
    assert f"c.tar is damaged: there is no tar header at byte {start}" in caplog.text


def test_a_tar_that_holds_something_else_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(ValueError, match="invalid header"):
        open_set(tmp_path)


def test_damaged_samples_of_a_tar_are_counted_by_cause(tmp_path, caplog):
    samples = {f"k{i}": {"png": plain(), "txt": f"{i}".encode()} for i in range(7)}
    samples["k1"]["txt"] = b"\xe9"
    samples["k2"]["png"] = b""
    samples["k3"] = {"txt": b"no picture"}
    samples = {"../x" if key == "k4" else key: files for key, files in samples.items()}
    tar = write_tar(tmp_path / "a.tar", samples)
    ds = open_set(tar)
    assert pairs(ds) == [("k0", "0"), ("k5", "5"), ("k6", "6")]
    assert ds.dropped == {
        "caption not in UTF-8 or no valid json": 1,
        "picture of no bytes": 1,
        "no picture": 1,
        "name that leads out of the tar": 1,
    }
    assert "dropped 4 samples: 1 caption not in UTF-8" in caplog.text
    with pytest.raises(ValueError, match=r"got 3 of 6 that are not .*raise max_bad_share \(0.1\)"):
        open_set(tar, max_bad_share=0.1)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_in_tars(tmp_path, format):
    name = "é" + "n" * 150
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for extension, data in {"png": plain(), "txt": b"c"}.items():
            info = tarfile.TarInfo(f"{name}.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert pairs(open_set(tmp_path)) == [(name, "c")]


def test_a_tar_that_vanishes_while_it_is_read(tars):
    ds = open_set(tars)
    assert ds[0]["key"] == "00"
    (tars / "t-00001.tar").unlink()
    assert ds[2]["key"] == "20"  # the next good one stands in
    assert ds[2, 1]["key"] == "20"
    assert ds.skips["file that has gone or changed"] == 2
    assert list(ds.skipped) == ["10", "11"]


def test_a_tar_that_changes_while_it_is_read(tars):
    ds = open_set(tars)
    os.utime(tars / "t-00001.tar", ns=(0, 0))
    assert ds[2]["key"] == "20"
    assert ds.skipped["10"].endswith("t-00001.tar has changed since it was indexed")


def test_many_tars_are_indexed_at_once(tmp_path):
    for k in range(9):
        write_tar(tmp_path / f"{k}.tar", {f"{k}": {"png": plain(), "txt": b"c"}})
    assert [key for key, _ in pairs(open_set(tmp_path))] == [str(k) for k in range(9)]


def test_a_tar_is_read_in_place_and_indexed_once(tars):
    open_set(tars)
    cache = tars / "cache/unclip_tars"
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    there = {file: file.read_bytes() for file in cache.glob("tar-*")}
    assert len(there) == 3 and size < 10_000
    write_tar(tars / "t-00000.tar", {"n": {"png": plain(), "txt": b"new"}})
    assert [key for key, _ in pairs(open_set(tars))] == ["n", "10", "11", "20", "21"]
    later = {file: file.read_bytes() for file in cache.glob("tar-*")}
    # Two were not read again, and the third's old index is taken away, as is that of the three.
    assert len(later) == 3 and len(there.items() & later.items()) == 2
    assert len(list(cache.glob("set-*"))) == 1


def test_tars_at_a_remote_address(tars):
    system = fsspec.filesystem("memory")
    for tar in tars.glob("*.tar"):
        system.pipe(f"/remote/{tar.name}", tar.read_bytes())
    for pattern in ("/*.tar", "", "/t-{00000..00002}.tar"):
        assert pairs(open_set(f"memory://remote{pattern}")) == pairs(open_set(tars))
    with pytest.raises(FileNotFoundError, match="no file matches 'memory://remote/x"):
        open_set("memory://remote/x-*.tar")
    system.rm("/remote", recursive=True)


def test_a_pattern_that_matches_nothing_is_named(tmp_path):
    for name in ("x-*.tar", "x.tar"):
        with pytest.raises(FileNotFoundError, match=r"no file matches '.*x"):
            open_set(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"x-1.tar' \(from '.*x-\{1..2\}.tar'"):
        open_set(tmp_path / "x-{1..2}.tar")
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.csv").touch()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds a.csv, sub/"):
        open_set(tmp_path / "wrong/x-*.tar")
    with pytest.raises(FileNotFoundError, match=r"no file or folder '.*/nowhere'"):
        open_set(tmp_path / "nowhere")


def test_without_a_network_a_hub_name_fails_with_both_readings(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no file or folder 'org/none', and as a Hub data"):
        open_set("org/none")


@pytest.mark.parametrize(
    "name", ["captions.csv", "metadata.csv", "captions.jsonl", "metadata.jsonl"]
)
@pytest.mark.parametrize("column", ["caption", "text"])
def test_a_folder_with_a_captions_file(tmp_path, name, column):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(plain())
    (tmp_path / "sub" / "b.JPG").write_bytes(encode(noise(), "JPEG"))
    rows = [
        {"file_name": "./sub/b.JPG", column: 'comma, "quote"\nand é'},
        {"file_name": "a.png", column: "one"},
        {"file_name": "a.png", column: "the same again"},
    ]
    with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
        if name.endswith("csv"):
            writer = csv.DictWriter(file, ["file_name", column])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    ds = open_set(tmp_path)
    assert pairs(ds) == [
        ("sub/b.JPG", 'comma, "quote"\nand é'),
        ("a.png", "one"),
        ("a.png", "the same again"),
    ]
    assert one_colour(to_pil(ds[1]["image"])) == RED


def test_a_folder_with_a_text_beside_each_picture(tmp_path, caplog):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(plain())
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "c.txt").write_text("  ")
    assert pairs(open_set(tmp_path)) == [("a.png", "one")]
    (record,) = [r for r in caplog.records if r.name.startswith("unclip")]
    assert "dropped 2 of 3 samples" in record.getMessage()
    assert "1 empty caption, 1 no caption" in record.getMessage()


def test_missing_pictures_are_counted_and_named(tmp_path):
    (tmp_path / "a.png").write_bytes(plain())
    lines = ["file_name,caption", "a.png,one", "gone.png,two", "lost.png,three"]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"got 2 of 3 .*gone.png, lost.png: add the pictures or"):
        open_set(tmp_path)


def test_a_folder_without_captions_and_files_without_the_columns(tmp_path):
    (tmp_path / "a.png").write_bytes(plain())
    with pytest.raises(ValueError, match=r"got 1 pictures and a caption for none: add a .txt"):
        open_set(tmp_path)
    (tmp_path / "captions.csv").write_text("picture,caption\na.png,one\n")
    with pytest.raises(
        ValueError, match=r"must have a column file_name; got .'picture', 'caption'"
    ):
        open_set(tmp_path)
    (tmp_path / "captions.csv").write_text("file_name,words\na.png,one\n")
    with pytest.raises(ValueError, match=r"caption_column must .*: choose one of file_name, words"):
        open_set(tmp_path)
    assert pairs(open_set(tmp_path, caption_column="words")) == [("a.png", "one")]


@pytest.fixture
def parquet(tmp_path):
    pictures = [{"bytes": plain(colour), "path": None} for colour in (RED, BLUE)]
    columns = {"picture": pictures, "prompt": ["one", "two"], "number": [1, 2]}
    table = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    table.to_parquet(str(tmp_path / "table.parquet"))
    return tmp_path / "table.parquet"


def test_parquet_finds_its_columns(parquet):
    ds = open_set(parquet)
    assert pairs(ds) == [("0", "one"), ("1", "two")]
    assert one_colour(to_pil(ds[1]["image"])) == BLUE


def test_columns_that_cannot_serve_are_named(parquet):
    with pytest.raises(ValueError, match="caption_column must hold strings; got 'number'"):
        open_set(parquet, caption_column="number")
    with pytest.raises(
        ValueError, match=r"caption_column must be a column .* picture, prompt, number"
    ):
        open_set(parquet, caption_column="words")
    with pytest.raises(ValueError, match=r"image_column must .*got 'prompt': choose .*'picture'"):
        open_set(parquet, image_column="prompt")


# --- bad pictures, crops, workers


@pytest.fixture
def partly_bad(tmp_path):
    samples = {f"k{i}": {"png": plain(), "txt": f"{i}".encode()} for i in range(6)}
    samples["k2"]["png"] = b"broken"
    samples["k5"]["png"] = encode(noise())[:200]
    return write_tar(tmp_path / "a.tar", samples)


def test_a_corrupt_picture_is_skipped_counted_and_named_once(partly_bad, caplog):
    ds = open_set(partly_bad)
    assert ds.skipped == {}
    for _ in range(2):
        assert [ds[i]["key"] for i in range(6)] == ["k0", "k1", "k3", "k3", "k4", "k0"]
    assert list(ds.skipped) == ["k2", "k5"]
    assert ds.skipped["k2"] == "the picture cannot be decoded: no known image format"
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(messages) == 2
    assert messages[0].startswith(f"skipped k2 of {partly_bad}: ")


def test_when_most_pictures_are_corrupt_it_stops(tmp_path):
    samples = {f"k{i}": {"png": b"broken", "txt": b"x"} for i in range(4)}
    samples["k3"]["png"] = plain()
    ds = open_set(write_tar(tmp_path / "a.tar", samples))
    with pytest.raises(ValueError, match="got 3 of 4 that cannot, the last being k2"):
        ds[0]


def test_crops_depend_on_seed_and_index_alone(tmp_path):
    picture = encode(noise((16, 16)))
    samples = {f"k{i}": {"png": picture, "txt": b"x"} for i in range(20)}
    tar = write_tar(tmp_path / "a.tar", samples)
    whole = open_set(tar, image_size=16)[0]["image"]
    ds = open_set(tar, image_size=16, crop_size=4)
    crops = [ds[i]["image"] for i in range(20)]
    windows = whole.unfold(1, 4, 1).unfold(2, 4, 1)  # [3, 13, 13, 4, 4]
    for index, crop in enumerate(crops):
        assert torch.equal(crop, ds[index]["image"])
        assert (windows == crop[:, None, None]).all(dim=(0, 3, 4)).any()
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) > 10
    other = open_set(tar, image_size=16, crop_size=4, seed=1)
    assert any(not torch.equal(crops[i], other[i]["image"]) for i in range(20))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_share_the_record_of_bad_pictures(partly_bad, context):
    ds = open_set(partly_bad)
    loader = DataLoader(ds, batch_size=2, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert [batch["image"].shape for batch in batches] == [(2, 3, 8, 8)] * 3
    assert [k for batch in batches for k in batch["key"]] == ["k0", "k1", "k3", "k3", "k4", "k0"]
    assert list(ds.skipped) == ["k2", "k5"]


def test_it_pickles(tars):
    ds = open_set(tars)
    again = pickle.loads(pickle.dumps(ds))
    assert pairs(again) == pairs(ds)


@pytest.mark.parametrize(
    "field",
    [
        {"data": ""},
        {"image_size": 0},
        {"crop_size": 65},
        {"crop_size": 0},
        {"background": (0, 0, 300)},
    ],
)
def test_the_config_names_what_is_wrong(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name} must .*; got .*: "):
        CaptionedConfig(**{"data": "x"} | field)
