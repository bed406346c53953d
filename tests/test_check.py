"""The look at a source before training: what it counts, and every fault it is to find."""

import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_tiny_clip
from PIL import Image
from test_embed import SPOILT, spoil

from unclip.data.__main__ import main


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (250, 80, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; the exit status and the report."""

    def run(source: Any, *flags: str) -> tuple[int, dict[str, Any]]:
        sheet = ["--sheet", str(tmp_path / "sheets/sheet.png")]
        sources = source if isinstance(source, list) else [source]
        status = main(["check", *map(str, sources), *sheet, "--json", *flags])
        return status, json.loads(capsys.readouterr().out)

    return run


def test_a_good_folder(
    pictures: Path, check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = check(pictures, "--batch-size", "4", "--num-processes", "2")
    assert status == 0
    assert (report["samples"], report["usable"], report["faults"]) == (10, 10, {})
    assert report["pictures"] == {
        "decoded": 10,
        "shorter_side": {"min": 36, "median": 36, "max": 36},
        "sizes": {"40x36": 10},
    }
    assert report["captions"] == {
        "characters": {"min": 9, "median": 9, "max": 9},
        "context_length": 77,
        "too_long": 0,
    }
    assert report["epoch"]["steps"] == 2.5
    assert report["epoch"]["samples_per_process"] == 2
    with Image.open(report["contact_sheet"]) as sheet:
        assert sheet.width == 6 * 168
        assert len(sheet.convert("RGB").getcolors(2**20) or []) > 100  # pictures and letters
    assert main(["check", str(pictures), "--sheet", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr().out
    assert "samples   10, of which 10 can be trained on" in said
    assert said.endswith("nothing is wrong\n")


def test_faults_of_tars(check: Any, tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")  # above the 89 million pixels of Pillow
    write_tar(
        tmp_path / "a.tar",
        [
            *(("good.png", png()), ("good.txt", b"a good one")),
            ("alone.png", png((9, 7))),
            ("untold.txt", b"no picture"),
            *(("blank.png", png()), ("blank.txt", b" \n")),
            *(("latin.png", png()), ("latin.txt", "caf\xe9".encode("latin-1"))),
            *(("empty.png", b""), ("empty.txt", b"zero bytes")),
            *(("bad.png", b"no picture"), ("bad.txt", b"ten bytes")),
            *(("bomb.png", bomb.getvalue()), ("bomb.txt", b"a bomb")),
            *(("../out.png", png()), ("../out.txt", b"climbs out")),
            *(("good.png", png()), ("good.txt", b"again " * 100)),
        ],
    )
    status, report = check(tmp_path / "*.tar")
    faults = report["faults"]
    assert status == 1
    assert {cause: found["count"] for cause, found in faults.items()} == {
        "no caption": 1,
        "no picture": 1,
        "empty caption": 1,
        "caption not in UTF-8 or no valid json": 1,
        "picture of no bytes": 1,
        "corrupt picture": 1,
        "picture above max_pixels": 1,
        "name that leads out of the tar": 1,
        "duplicate key": 1,
    }
    a = tmp_path / "a.tar"
    assert faults["no caption"]["first"] == [f"{a}: alone"]
    assert faults["no picture"]["first"] == [f"{a}: untold"]
    assert faults["empty caption"]["first"] == [f"{a}: blank"]
    assert faults["picture of no bytes"]["first"] == [f"{a}: empty"]
    assert faults["name that leads out of the tar"]["first"] == [f"{a}: ../out.png"]
    assert faults["picture above max_pixels"]["first"][0].startswith(f"{a}: bomb: ")
    assert faults["duplicate key"]["first"] == [f"{a}: good"]
    assert (report["samples"], report["usable"]) == (10, 2)
    assert report["captions"]["too_long"] == 1


def test_tars_cut_off(check: Any, tmp_path: Path) -> None:
    members = [(f"{k}.{e}", d) for k in range(5) for e, d in (("png", png()), ("txt", b"words"))]
    whole = write_tar(tmp_path / "whole.tar", members)
    data = whole.read_bytes()
    whole.write_bytes(data[:4800])  # within a member of the third sample
    status, report = check(tmp_path)
    assert status == 1
    cause = "cut off by the tar's end"
    assert report["faults"][cause]["first"][0].startswith(f"{whole}: 2: unexpected end of data")
    whole.write_bytes(data[: 5 * 2 * 1024])  # between two, which tarfile takes for the end
    assert check(tmp_path)[1]["faults"] == {
        cause: {"count": 1, "first": [f"{whole}: 4: it is cut off at byte 10240"]},
    }
    whole.unlink()
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress(data)[:-40])
    assert cause in check(packed)[1]["faults"]
    packed.write_bytes(gzip.compress(data))
    assert check(packed)[0] == 0


def test_captions_in_json(check: Any, tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "a.tar",
        [
            *(("0.png", png()), ("0.json", b'{"caption": "a picture"}')),
            *(("1.png", png()), ("1.json", b'{"words": "a picture"}')),
            *(("2.png", png()), ("2.json", b"{")),
        ],
    )
    status, report = check(tar, "--caption-key", "json.caption")
    assert status == 1
    assert report["faults"]["no caption"]["first"] == [f"{tar}: 1"]
    assert report["faults"]["caption not in UTF-8 or no valid json"]["first"] == [f"{tar}: 2"]
    assert report["usable"] == 1


def test_faults_of_folders(check: Any, pictures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "folder"))
    (folder / "1.txt").unlink()
    (folder / "2.png").unlink()
    (folder / "3.txt").write_text("")
    (folder / "4.png").write_bytes(b"")
    (folder / "5.txt").write_bytes(b"\xff\xfe")
    status, report = check(folder)
    first = {cause: found["first"] for cause, found in report["faults"].items()}
    assert status == 1
    assert first == {
        "no caption": ["1.png"],
        "no picture": ["2.txt"],
        "empty caption": ["3.png"],
        "corrupt picture": ["4.png: the picture cannot be decoded: no known image format"],
        "caption not in UTF-8 or no valid json": ["5.txt"],
    }
    assert report["usable"] == 5


def test_faults_of_a_captions_file(check: Any, pictures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "folder"))
    lines = ["file_name,caption", "0.png,zero", "0.png,again", "gone.png,gone", "1.png,"]
    (folder / "captions.csv").write_text("\n".join(lines))
    _, report = check(folder)
    counts = {cause: found["count"] for cause, found in report["faults"].items()}
    assert counts == {
        "duplicate key": 1,
        "no picture": 1,
        "empty caption": 1,
        "no caption": 8,
    }
    assert report["faults"]["no caption"]["first"] == ["2.png", "3.png", "4.png"]


def test_parquet(check: Any, tmp_path: Path) -> None:
    images = [{"bytes": png(), "path": None}, {"bytes": b"x", "path": None}, None]
    table = pa.table({"image": images, "text": ["one", "two", None]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    status, report = check(tmp_path / "*.parquet")
    counts = {cause: found["count"] for cause, found in report["faults"].items()}
    assert status == 1
    assert counts == {
        "corrupt picture": 1,
        "no picture": 1,
        "file that cannot be read": 1,
    }
    assert report["faults"]["file that cannot be read"]["first"][0].startswith(str(tmp_path))


def test_the_shapes_world(check: Any) -> None:
    status, report = check("shapes", "--limit", "30", "--every", "10")
    assert status == 0
    assert (report["samples"], report["pictures"]["decoded"]) == (30, 3)


def test_good_embeddings(written: Path, clip_folder: Path, check: Any) -> None:
    status, report = check(written, "--clip", str(clip_folder))
    assert status == 0
    assert (report["samples"], report["usable"]) == (10, 10)
    assert report["captions"]["context_length"] == 20
    (rows,) = report["embeddings"]
    assert (rows["pieces"], rows["width"]) == (3, 16)
    assert rows["norm"]["max"] == pytest.approx(1, abs=1e-3)


CAUSES = {
    "misaligned": ["misaligned piece", "missing piece"],
    "nan": ["row that is not finite", "file that has changed"],
    "truncated": ["unreadable embeddings"],
    "width": ["mixed widths"],
    "no_images": ["missing piece"],
    "no_piece": ["missing piece"],
    "parquet": ["unreadable metadata"],
    "text": ["misaligned piece", "file that has changed"],
    "manifest": ["unreadable manifest"],
    "float64": ["unreadable embeddings"],
}


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_embeddings(what: str, copied: Path, check: Any) -> None:
    spoil(copied, what)
    status, report = check(copied)
    assert status == 1
    found = list(report["faults"])
    assert found[0] == CAUSES.get(what, found)[0]


def test_rows_of_embeddings(copied: Path, tmp_path: Path, check: Any) -> None:
    path = copied / "metadata/metadata_0001.parquet"
    table = pq.read_table(path).to_pydict()
    table["caption"][1] = None
    table["key"][2] = table["key"][0]
    pq.write_table(pa.table(table), path)
    rows = np.load(copied / "img_emb/img_emb_0000.npy")
    rows[3, 5] = np.inf
    np.save(copied / "img_emb/img_emb_0000.npy", rows)
    write_tiny_clip(tmp_path / "other", seed=1)
    status, report = check(copied, "--clip", str(tmp_path / "other"))
    first = {cause: found["first"] for cause, found in report["faults"].items()}
    assert status == 1
    assert first.pop("another CLIP")[0].endswith(f"not {tmp_path / 'other'}")
    assert first == {
        "row that is not finite": ["img_emb_0000.npy: row 3"],
        "empty caption": ["metadata_0001.parquet: row 1"],
        "duplicate key": ["metadata_0001.parquet: row 2"],
        "file that has changed": [
            "img_emb/img_emb_0000.npy",
            "metadata/metadata_0001.parquet",
        ],
    }
    assert report["usable"] == 8


@pytest.mark.parametrize(
    ("source", "flags", "said"),
    [
        ("nowhere/*.tar", [], "no file matches"),
        ("nowhere", [], "nowhere"),
        ("EMPTY", [], "must hold captioned pictures; got 0 pictures"),
        ("shapes", [], "limit must be set"),
        (
            "PICTURES",
            ["--batch-size", "5", "--num-processes", "2"],
            "batch_size must be a multiple",
        ),
        ("PICTURES", ["--every", "0"], "every must be at least 1"),
        ("PICTURES", ["--clip", "NoSuch/clip"], "NoSuch/clip"),
    ],
)
def test_what_cannot_be_used_at_all(
    source: str,
    flags: list[str],
    said: str,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "PICTURES": pictures}
    with pytest.raises(SystemExit) as stop:
        main(["check", str(places.get(source, source)), *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error


def test_fewer_samples_than_processes(pictures: Path, check: Any) -> None:
    status, report = check(pictures, "--batch-size", "64", "--num-processes", "64")
    assert status == 1
    assert report["faults"]["fewer samples than processes"]["first"] == ["10 for 64 processes"]


def test_several_sources_count_as_one(pictures: Path, written: Path, check: Any) -> None:
    status, report = check(pictures, "--batch-size", "4")
    again, both = check([pictures, written, pictures], "--batch-size", "4")
    assert (status, again) == (0, 0)
    assert both["kinds"] == ["folder of pictures", "embeddings", "folder of pictures"]
    assert (both["samples"], both["usable"]) == (30, 30)
    assert both["epoch"]["steps"] == 3 * report["epoch"]["steps"]


def test_a_remote_source_and_a_filter(check: Any, tmp_path: Path) -> None:
    members = [
        (f"{k}.{e}", d)
        for k in range(5)
        for e, d in (("png", png()), ("txt", b"words"), ("json", b'{"width": %d}' % k))
    ]
    system = fsspec.filesystem("memory")
    system.pipe("/check/a.tar", write_tar(tmp_path / "a.tar", members).read_bytes())
    status, report = check("memory://check/*.tar", "--where", "width > 1")
    system.rm("/check", recursive=True)
    assert (status, report["samples"], report["usable"]) == (0, 5, 3)
