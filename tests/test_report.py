"""Reading result folders, and the page that shows them."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from result_folders import CAPTION, spoil, write_result

from unclip.data.shapes import ShapesConfig, draw_scene, render
from unclip.evaluation.neighbours import neighbours_of
from unclip.evaluation.protocol import Protocol, ReferenceConfig, protocol_values
from unclip.evaluation.report import ReportOptions, build_report, main, rank
from unclip.evaluation.results import differing, read_result, read_sweep

NULL = {"fid": {"value": None, "better": "lower", "count": 0, "reason": "no <weights>: fetch"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    features = {"clip": {"features": rng.normal(size=(6, 4)), "reference": rng.normal(size=(9, 4))}}
    scores = {"clip_score": [3.0, 1.0, 2.0, 6.0, 5.0, 4.0], "oracle_all": [True, None, False] * 2}
    cell = {"fraction": 0.5, "low": 0.2, "high": 0.8, "count": 6}
    tables = {"oracle": {"1": {"all": cell}}, "prior": {"cosine": 0.5, "kind": "flow"}}
    return write_result(tmp_path / "a", scores, features=features, metrics=NULL, tables=tables)


# --- reading --------------------------------------------------------------------------------------


def test_a_result_folder_is_read(folder: Path) -> None:
    result = read_result(folder)
    assert result.metrics["clip_score"].value == 3.5 and result.metrics["fid"].value is None
    assert result.scores == ("clip_score", "oracle_all") and result.encoders == ("clip",)
    assert [s.scores["oracle_all"] for s in result.samples] == [1.0, None, 0.0] * 2
    assert [array.shape for array in result.features("clip") if array is not None] == [
        (6, 4),
        (9, 4),
    ]
    with pytest.raises(FileNotFoundError, match="there are features of clip"):
        result.features("inception")


def test_a_caption_may_hold_what_ends_a_line(tmp_path: Path) -> None:
    caption = "one\u2028two\x85three"
    folder = write_result(tmp_path / "a", {"clip_score": [1.0]}, captions=[caption])
    line = json.loads((folder / "samples.jsonl").read_text())
    (folder / "samples.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n")
    assert read_result(folder).samples[0].caption == caption


def lines_of(folder: Path) -> list[str]:
    return (folder / "samples.jsonl").read_text().splitlines()


def drop_line(folder: Path) -> None:
    (folder / "samples.jsonl").write_text("\n".join(lines_of(folder)[:-1]) + "\n")


def spoil_line(folder: Path) -> None:
    (folder / "samples.jsonl").write_text("\n".join([*lines_of(folder)[:-1], '{"id": 1}']))


BAD = {
    "unfinished": lambda folder: (folder / "result.json").unlink(),
    "is none; run": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "is not there": shutil.rmtree,
    "format 1; got 7": lambda folder: spoil(folder, format=7),
    "not JSON": lambda folder: (folder / "result.json").write_text("{"),
    "lacks or misuses 'metrics'": lambda folder: (folder / "result.json").write_text(
        '{"format": 1, "name": "", "protocol": {}, "protocol_sha256": "", "model": {}}'
    ),
    "000005.png is missing, one of 1 of 6": lambda folder: (folder / "images/000005.png").unlink(),
    "5 lines, and 1 pictures without one": drop_line,
    "line 6 of .* is not a sample": spoil_line,
    "got none": lambda folder: (
        (folder / "samples.jsonl").write_text(""),
        shutil.rmtree(folder / "images"),
    ),
    "finite value, or none and a reason": lambda folder: spoil(
        folder, metrics={"fid": {"value": None}}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_folders_are_refused_in_one_line(
    folder: Path, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    BAD[message](folder)
    with pytest.raises((ValueError, OSError), match=message):
        read_result(folder)
    with pytest.raises(SystemExit) as exit:
        main([str(folder), "--out", str(tmp_path / "r.html")])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": np.zeros((5, 2))}, "one row a picture; got 5 for 6"),
        ({"features": np.full((6, 2), np.nan)}, "finite"),
        ({"features": np.zeros((6, 2)), "reference": np.zeros((6, 3))}, "one width"),
        ({"wrong": np.zeros(3)}, "damaged"),
    ],
)
def test_bad_features_are_refused(folder: Path, arrays, message: str) -> None:
    np.savez(folder / "features/clip.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_result(folder).features("clip")


def test_damaged_features_are_refused(folder: Path) -> None:
    path = folder / "features/clip.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        read_result(folder).features("clip")


def test_what_differs_between_protocols_is_named() -> None:
    a = {"cascade": {"guidance_scale": 1.0, "size": 64}, "seed": 0}
    b = {"cascade": {"guidance_scale": 3.0, "size": 64}, "num": 5, "seed": 0}
    assert differing(a, a) == {}
    assert differing(a, b) == {"cascade.guidance_scale": (1.0, 3.0), "num": (None, 5)}


# --- the page -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page refers to, shows, and leaves open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data


def assert_whole(text: str) -> Page:
    """One file: nothing in it is fetched from anywhere else, and its tags close."""
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?:|//\w+\.|@import|url\((?!#)", text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name, value in attributes.items():
            if name in ("src", "srcset", "data", "poster", "action", "xlink:href"):
                assert (value or "").startswith("data:image/"), (tag, name, value)
            assert name != "href" or (value or "").startswith("#")
    return page


def test_the_report_is_one_file_that_escapes_what_it_is_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new/report.html"
    main([str(folder), "--out", str(out), "--extremes", "2"])
    assert capsys.readouterr().out.strip() == str(out)
    text = out.read_text()
    page = assert_whole(text)
    assert "<b>circle" not in text and CAPTION in page.text
    assert {a["alt"] for tag, a in page.tags if tag == "img"} >= {f"{CAPTION} 0"}
    assert "not computed" in page.text and "no <weights>: fetch" in page.text
    assert "--name '<x>'" in page.text  # the command, to type again
    assert sum(tag == "img" for tag, _ in page.tags) == 6 + 2 + 2
    assert "50.0%" in page.text and "[20.0, 80.0]" in page.text and "flow" in page.text
    assert any(tag == "svg" for tag, _ in page.tags)


def test_pictures_are_ranked_by_the_score_that_is_asked_for(folder: Path) -> None:
    result = read_result(folder)
    assert [s.seed for s in rank(result.samples, "clip_score", "higher")] == [3, 4, 5, 0, 2, 1]
    assert [s.seed for s in rank(result.samples, "clip_score", "lower")] == [1, 2, 0, 5, 4, 3]
    # Pictures without a verdict are neither best nor worst.
    assert [s.seed for s in rank(result.samples, "oracle_all", "higher")] == [0, 3, 2, 5]
    page = Page(build_report([folder], ReportOptions(score="oracle_all", random=0)))
    assert "Best by oracle_all" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 4 + 4


def test_several_folders_stand_side_by_side(folder: Path, tmp_path: Path) -> None:
    other = write_result(
        tmp_path / "b",
        {"clip_score": [4.0, 2.0, 3.0, 7.0, 6.0, 5.0]},
        protocol={"captions": {"count": 6}, "cascade": {"guidance_scale": 1.0}},
        seed=1,
    )
    page = assert_whole(build_report([folder, other], ReportOptions(random=2, extremes=1)))
    assert sum(tag == "img" for tag, _ in page.tags) == 2 * 2 + 4 * 1
    assert (
        "b (B) against a (A)" in page.text and "cascade.guidance_scale (3.0 and 1.0)" in page.text
    )
    assert re.search(r"\+1\s*\[1, 1\]\s*B", page.text), "each picture is one better, so b is"


def test_a_folder_of_another_protocol_is_shown_and_not_compared(
    folder: Path, tmp_path: Path
) -> None:
    other = write_result(tmp_path / "b", {"clip_score": [1.0, 2.0]}, captions=["x", "y"])
    page = Page(build_report([folder, other]))
    assert "Not compared" in page.text and "captions.count (6 and 2)" in page.text
    assert "By lot, a" in page.text and "By lot, b" in page.text


def test_pictures_without_scores_have_no_best(tmp_path: Path) -> None:
    folder = write_result(
        tmp_path / "a",
        {"clip_score": [None, None]},
        metrics=NULL
        | {"clip_score": {"value": None, "better": "higher", "count": 0, "reason": "none"}},
    )
    page = Page(build_report([folder]))
    assert "No best and worst" in page.text and "Best by" not in page.text


def test_large_pictures_are_made_small(tmp_path: Path) -> None:
    folder = write_result(tmp_path / "a", {"clip_score": [1.0, 2.0]}, side=600)
    assert len(build_report([folder])) < 300_000
    assert sum(p.stat().st_size for p in (folder / "images").iterdir()) > 2_000_000


def test_a_sweep_stands_for_its_points(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "guidance=1.0")
    write_result(tmp_path / "guidance=3.0", {"clip_score": [9.0] * 6}, metrics=NULL)
    points = [{"value": v, "folder": f"guidance={v}"} for v in (1.0, 3.0, 5.0)]
    sweep = {"format": 1, "axis": "guidance", "points": points}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    assert [value for value, _ in read_sweep(tmp_path)[1]] == [1.0, 3.0], "5 is unfinished"
    page = assert_whole(build_report([tmp_path]))
    assert "guidance=1.0" in page.text and "guidance=3.0" in page.text
    assert "clip_score (higher is better)" in page.text, "the axis of a curve"
    with pytest.raises(FileNotFoundError, match="is a sweep"):
        read_result(tmp_path)


def test_options_that_cannot_be_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="extremes must not be negative"):
        ReportOptions(extremes=-1)
    with pytest.raises(ValueError, match=r"score must be one .* 'fid': use clip_score, oracle_all"):
        build_report([folder], ReportOptions(score="fid"))
    with pytest.raises(ValueError, match="named once"):
        build_report([folder, folder])
    (folder / "images/000003.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"000003.png cannot be read"):
        build_report([folder])


# --- neighbours -----------------------------------------------------------------------------------


def with_reference(folder: Path, **reference: object) -> Path:
    """Three pictures whose features are those of real scenes 4, 0 and 2."""
    real = np.eye(5)
    features = {"clip": {"features": 3 * real[[4, 0, 2]], "reference": real}}
    protocol = Protocol(reference=ReferenceConfig(**reference))  # type: ignore[arg-type]
    return write_result(
        folder,
        {"clip_score": [1.0, 2.0, 3.0]},
        features=features,
        protocol=protocol_values(protocol),
        side=16,
    )


def test_the_nearest_real_picture_is_found(tmp_path: Path) -> None:
    folder = with_reference(tmp_path / "a", data="shapes", start=7, count=5)
    neighbours = neighbours_of(read_result(folder))
    world = ShapesConfig(split="held_out", caption_detail="full")
    for row, scene in enumerate((4, 0, 2)):
        picture, cosine = neighbours.to(row)
        expected = render([draw_scene(world, 7 + scene)[0]], 16)[0].permute(1, 2, 0).numpy()
        assert cosine == pytest.approx(1) and (np.asarray(picture) == expected).all()
    page = assert_whole(build_report([folder], ReportOptions(neighbours=True, extremes=0)))
    assert page.text.count("nearest real one, cosine 1.000") == 3
    assert sum(tag == "img" for tag, _ in page.tags) == 3 + 3


def test_neighbours_that_cannot_be_shown_are_refused(tmp_path: Path, folder: Path) -> None:
    other = with_reference(tmp_path / "b", data="shapes", count=6)
    with pytest.raises(ValueError, match="5 pictures that were measured; got 6"):
        neighbours_of(read_result(other))
    none = with_reference(tmp_path / "c")
    with pytest.raises(ValueError, match="names no pictures"):
        neighbours_of(read_result(none))
    with pytest.raises(FileNotFoundError, match="there are features of clip"):
        neighbours_of(read_result(none), "dinov2")
    np.savez(folder / "features/clip.npz", features=np.zeros((6, 2)))
    with pytest.raises(ValueError, match="has those of clip, without one"):
        neighbours_of(read_result(folder))
