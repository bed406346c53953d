"""The blind page and its tally."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from result_folders import write_result
from test_report import assert_whole

from unclip.evaluation.ab import ABOptions, build_page, main, seal, tally, unseal
from unclip.evaluation.results import Result, read_result


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Result, Result]:
    """Two models that drew the same eight captions, four of the first."""
    captions = ["</script><b>x</b> & 'y'"] * 4 + [f"caption {k}" for k in range(4)]
    return tuple(  # type: ignore[return-value]
        read_result(
            write_result(
                tmp_path / f"secret-{name}",
                {"clip_score": [1.0] * 8},
                captions=captions,
                seed=k,
                model={"name": f"model-{name}", "stages": {}},
            )
        )
        for k, name in enumerate(("alpha", "beta"))
    )


def study_of(page: str) -> dict[str, Any]:
    found = re.search(r"^const study = (.*);$", page, re.MULTILINE)
    assert found is not None
    return json.loads(found[1])


def answered(study: dict[str, Any], choose, judge: str = "ann") -> dict[str, Any]:
    """What the page saves when somebody clicks through it."""
    kept = {name: study[name] for name in ("format", "version", "page", "key")}
    answers = {
        str(k): {"question": t["question"], "choice": choose(k, t), "milliseconds": 900}
        for k, t in enumerate(study["trials"])
    }
    return {**kept, "judge": judge, "answers": answers}


def saved(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_the_page_is_one_file_and_does_not_say_which_is_which(pair) -> None:
    page = build_page(*pair, ABOptions(grid=2))
    assert_whole(page)
    for name in ("alpha", "beta", "secret", "model-"):
        assert name not in page
    study = study_of(page)
    assert {key for trial in study["trials"] for key in trial} == {
        "question",
        "caption",
        "left",
        "right",
    }
    assert page.count("</script>") == 1, "a caption does not end the script"
    assert "<b>x</b>" not in page
    asked = [trial["question"] for trial in study["trials"]]
    assert {name: asked.count(name) for name in asked} == {
        "photorealism": 8,
        "caption": 8,
        "diversity": 1,
    }
    for trial in study["trials"]:
        assert (trial["caption"] is None) == (trial["question"] == "photorealism")
        assert trial["left"] != trial["right"]


def test_pictures_are_shown_as_they_were_drawn(pair) -> None:
    study = study_of(build_page(*pair, ABOptions(questions=("caption",))))
    first = unseal(study["key"])["first"]
    drawn = {
        name: {Image.open(s.path).convert("RGB").tobytes() for s in result.samples}
        for name, result in zip("ab", pair, strict=True)
    }
    for k, trial in enumerate(study["trials"]):
        shown = Image.open(io.BytesIO(base64.b64decode(trial["left"].split(",")[1])))
        assert shown.convert("RGB").tobytes() in drawn[first[str(k)]]


def test_sides_and_order_are_shuffled_by_the_seed(pair) -> None:
    page = build_page(*pair, ABOptions(seed=1))
    assert page == build_page(*pair, ABOptions(seed=1))
    other = study_of(build_page(*pair, ABOptions(seed=2)))
    assert study_of(page)["page"] != other["page"]
    first = unseal(other["key"])["first"].values()
    assert set(first) == {"a", "b"}


def test_a_page_without_enough_of_one_caption_does_not_ask_for_diversity(pair) -> None:
    asked = {trial["question"] for trial in study_of(build_page(*pair))["trials"]}
    assert asked == {"photorealism", "caption"}
    with pytest.raises(ValueError, match="diversity needs 16 pictures of a caption"):
        build_page(*pair, ABOptions(questions=("diversity",)))


def test_the_tally_finds_who_was_chosen(pair, tmp_path: Path) -> None:
    study = study_of(build_page(*pair, ABOptions(grid=2)))
    first = unseal(study["key"])["first"]

    def for_b(k: int, trial: dict[str, Any]) -> str:
        if trial["question"] == "diversity":
            return "tie"
        return "left" if first[str(k)] == "b" else "right"

    found = tally([saved(tmp_path / "ann.json", answered(study, for_b))])
    assert found["a"]["model"] == "model-alpha" and found["b"]["folder"] == "secret-beta"
    row = found["questions"]["photorealism"]
    assert (row["a_wins"], row["b_wins"], row["ties"], row["win_rate_a"]) == (0, 8, 0, 0)
    # Wilson: of 8 with no hit the upper end is z^2 / (n + z^2).
    assert row["low"] == 0 and row["high"] == pytest.approx(1.96**2 / (8 + 1.96**2))
    assert found["questions"]["diversity"]["win_rate_a"] == 0.5
    total = found["questions"]["all"]
    assert (total["b_wins"], total["ties"], total["judges"], total["pairs"]) == (16, 1, 1, 17)

    always_left = saved(tmp_path / "bob.json", answered(study, lambda k, t: "left", "bob"))
    both = tally([tmp_path / "ann.json", always_left])["questions"]["all"]
    lefts = list(first.values())
    assert both["a_wins"] == lefts.count("a") and both["b_wins"] == 16 + lefts.count("b")
    assert both["judges"] == 2 and both["pairs"] == 17


def test_unfinished_answers_count_as_far_as_they_go(pair, tmp_path: Path) -> None:
    values = answered(study_of(build_page(*pair)), lambda k, t: "tie")
    values["answers"] = {"0": values["answers"]["0"]}
    assert tally([saved(tmp_path / "a.json", values)])["questions"]["all"]["ties"] == 1


def break_key(values: dict[str, Any]) -> None:
    values["key"] = values["key"][:-9]


BAD = {
    "its key is damaged": break_key,
    "of format 'x'": lambda values: values.update(format="x"),
    "which its page does not have": lambda values: values["answers"].update(
        {"999": {"question": "caption", "choice": "left"}}
    ),
    "it answers 'both'": lambda values: values["answers"]["0"].update(choice="both"),
    "must hold an answer; got none": lambda values: values.update(answers={}),
    "'page'": lambda values: values.pop("page"),
}


@pytest.mark.parametrize("message", BAD)
def test_files_that_the_page_did_not_save_are_refused(
    pair, tmp_path: Path, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = answered(study_of(build_page(*pair)), lambda k, t: "tie")
    BAD[message](values)
    path = saved(tmp_path / "a.json", values)
    with pytest.raises(ValueError, match=message):
        tally([path])
    with pytest.raises(SystemExit) as exit:
        main(["tally", str(path)])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1 and str(path) in said


def test_a_person_counts_once_and_studies_are_kept_apart(pair, tmp_path: Path) -> None:
    study = study_of(build_page(*pair))
    ann = saved(tmp_path / "ann.json", answered(study, lambda k, t: "tie"))
    again = saved(tmp_path / "again.json", answered(study, lambda k, t: "left"))
    with pytest.raises(ValueError, match="another person's"):
        tally([ann, again])
    nameless = [
        saved(tmp_path / f"{k}.json", answered(study, lambda k, t: "tie", "")) for k in range(2)
    ]
    with pytest.raises(ValueError, match="another person's"):
        tally(nameless)
    swapped = study_of(build_page(pair[1], pair[0]))
    other = saved(tmp_path / "o.json", answered(swapped, lambda k, t: "tie", "eve"))
    with pytest.raises(ValueError, match="the same two results"):
        tally([ann, other])
    with pytest.raises(FileNotFoundError, match="is not there"):
        tally([tmp_path / "nobody.json"])


def test_the_commands(pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new/ab.html"
    main([*(str(r.folder) for r in pair), "--out", str(out), "--count", "2", "--seed", "3"])
    assert capsys.readouterr().out.strip() == str(out)
    study = study_of(out.read_text())
    assert len(study["trials"]) == 4
    path = saved(tmp_path / "ann.json", answered(study, lambda k, t: "tie"))
    main(["tally", str(path), "--out", str(tmp_path / "tally.json")])
    said = capsys.readouterr().out
    assert "A  secret-alpha (model model-alpha)" in said and "50.0%" in said
    written = json.loads((tmp_path / "tally.json").read_text())
    assert written["questions"]["all"]["ties"] == 4


def test_results_without_a_caption_in_common_are_refused(pair, tmp_path: Path) -> None:
    other = write_result(tmp_path / "c", {"clip_score": [1.0]}, captions=["another"])
    with pytest.raises(ValueError, match="must have pictures of the same captions"):
        build_page(pair[0], read_result(other))
    with pytest.raises(ValueError, match="questions must be among"):
        ABOptions(questions=("beauty",))  # type: ignore[arg-type]


def test_the_key_comes_back() -> None:
    assert unseal(seal({"a": "é"})) == {"a": "é"}
    with pytest.raises(ValueError, match="damaged"):
        unseal("no key")
