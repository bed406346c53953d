"""Which of two results do people prefer? A blind page to click through, and its tally.

`python -m unclip.evaluation.ab A B --out ab.html` writes one HTML file with the questions of the
paper's human study (section 5.2): which picture looks more photorealistic, which fits its caption
better, and of two 4 x 4 grids of one caption, which is more diverse. Sides are shuffled, and the
page does not say which is which. Who has clicked through saves a JSON file;
`python -m unclip.evaluation.ab tally FILE ...` turns such files into win rates.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import random
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from unclip.checkpoint import written_file
from unclip.config import one_line_errors
from unclip.evaluation.intervals import wilson
from unclip.evaluation.pages import inlined, render, write_page
from unclip.evaluation.results import Result, Sample, read_result

FORMAT, VERSION = "unclip-ab", 1
Question = Literal["photorealism", "caption", "diversity"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
SIDE, GRID_SIDE = 256, 512
"""Longest side of a picture and of a grid in the page, px."""


@dataclass(frozen=True, kw_only=True)
class ABOptions:
    """What a page asks."""

    questions: tuple[Question, ...] | None = None
    """None: photorealism and caption, and diversity where enough pictures share a caption."""
    count: int = 30
    """Pairs for each question."""
    grid: int = 4
    """Side of the grids for diversity: so many pictures squared of a caption in each result."""
    seed: int = 0
    """Of the choice of pairs, their order and their sides."""

    def __post_init__(self) -> None:
        for name in ("count", "grid"):
            if getattr(self, name) < (1 if name == "count" else 2):
                raise ValueError(f"{name} must be larger; got {getattr(self, name)}: use 4")
        for question in self.questions or ():
            if question not in QUESTIONS:
                raise ValueError(
                    f"questions must be among {', '.join(QUESTIONS)}; got {question!r}: take it out"
                )


def build_page(a: Result, b: Result, options: ABOptions | None = None) -> str:
    """The page that asks which of a and b is better, without saying which is which.

    Raises:
        ValueError: they share no captions, or too few pictures of one for a question asked for.
    """
    options = options or ABOptions()
    lot = random.Random(options.seed)
    singles, grids = _pairs(a, b), _grids(a, b, options.grid)
    if not singles and not grids:
        raise ValueError(
            f"A and B must have pictures of the same captions; {a.folder} and {b.folder} share "
            "none: draw both by one protocol"
        )
    if options.questions and "diversity" in options.questions and not grids:
        raise ValueError(
            f"diversity needs {options.grid**2} pictures of a caption in both; got fewer: draw "
            "more of each, or pass a smaller --grid"
        )
    trials: list[dict[str, Any]] = []
    for question in options.questions or QUESTIONS:
        pool: Sequence[Any] = grids if question == "diversity" else singles
        for pair in lot.sample(pool, min(options.count, len(pool))):
            trials.append(_trial(question, pair, options.grid, lot))
    lot.shuffle(trials)
    key = {
        "a": _who(a),
        "b": _who(b),
        "first": {str(k): trial.pop("first") for k, trial in enumerate(trials)},
    }
    study = {
        "format": FORMAT,
        "version": VERSION,
        "page": hashlib.sha256(json.dumps([key, trials]).encode()).hexdigest()[:16],
        "key": seal(key),
        "trials": trials,
    }
    return render("ab.html", study=study, count=len(trials))


def seal(key: Any) -> str:
    """The key in a form that nobody reads by accident; it is no secret from who wants to know."""
    return base64.b64encode(zlib.compress(json.dumps(key).encode())).decode()


def unseal(sealed: str) -> Any:
    """What `seal` was given; raises ValueError for anything else."""
    try:
        return json.loads(zlib.decompress(base64.b64decode(sealed, validate=True)))
    except (ValueError, TypeError, zlib.error) as error:
        raise ValueError(f"its key is damaged ({error})") from error


Pair = tuple[str, tuple[Sample, ...], tuple[Sample, ...]]
"""A caption, and the pictures of a and of b."""


def _pairs(a: Result, b: Result) -> list[Pair]:
    """Pictures of the same caption and id, the first of a with the first of b and so on."""
    found: dict[tuple[str, str], tuple[list[Sample], list[Sample]]] = defaultdict(lambda: ([], []))
    for side, result in enumerate((a, b)):
        for sample in result.samples:
            found[sample.id, sample.caption][side].append(sample)
    return [
        (caption, (one,), (other,))
        for (_, caption), (ours, theirs) in found.items()
        for one, other in zip(ours, theirs, strict=False)
    ]


def _grids(a: Result, b: Result, grid: int) -> list[Pair]:
    """As many pictures of one caption of each as fill a grid."""
    found: dict[str, tuple[list[Sample], list[Sample]]] = defaultdict(lambda: ([], []))
    for side, result in enumerate((a, b)):
        for sample in result.samples:
            found[sample.caption][side].append(sample)
    need = grid * grid
    return [
        (caption, tuple(ours[:need]), tuple(theirs[:need]))
        for caption, (ours, theirs) in found.items()
        if min(len(ours), len(theirs)) >= need
    ]


def _trial(question: Question, pair: Pair, grid: int, lot: random.Random) -> dict[str, Any]:
    caption, ours, theirs = pair
    first = lot.choice("ab")
    sides = (ours, theirs) if first == "a" else (theirs, ours)
    images = [_shown(side, grid) for side in sides]
    return {
        "question": question,
        # Photorealism is asked without the caption, as in the paper.
        "caption": None if question == "photorealism" else caption,
        "left": images[0],
        "right": images[1],
        "first": first,
    }


def _shown(samples: Sequence[Sample], grid: int) -> str:
    if len(samples) == 1:
        return inlined(samples[0].path, SIDE)
    cell, gap = GRID_SIDE // grid, 4
    side = grid * cell + (grid - 1) * gap
    canvas = Image.new("RGB", (side, side), "white")
    for k, sample in enumerate(samples):
        with Image.open(sample.path) as picture:
            tile = picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS)
        canvas.paste(tile, (k % grid * (cell + gap), k // grid * (cell + gap)))
    return inlined(canvas, side, lossless=False)


def _who(result: Result) -> dict[str, str]:
    return {
        "folder": result.folder.name,
        "model": str(result.model.get("name", "")),
        "protocol_sha256": result.protocol_sha256,
    }


# --- the tally ------------------------------------------------------------------------------------


def tally(files: Sequence[Path]) -> dict[str, Any]:
    """Win rates from the files that people saved.

    A tie is half a win for each. Where people answer the same pairs the answers are not
    independent, and the interval is narrower than it should be; `judges` and `pairs` tell.

    Returns:
        `a` and `b`: who they are. `questions`: for each one and for `all`: `a_wins`, `b_wins`,
        `ties`, `win_rate_a`, its 95% Wilson interval `low`, `high`, `judges` and `pairs`.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: one is none of these files, or is given twice, or they ask of other results.
    """
    if not files:
        raise ValueError("tally needs the files that people saved; got none: name them")
    answers: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    who: dict[str, Any] = {}
    seen: dict[tuple[str, str], Path] = {}
    for number, path in enumerate(files):
        saved, key = _read_answers(path)
        # The same person may save twice; the same file under another name is no second person.
        judge = saved["judge"] or f"nameless {number + 1}"
        once = saved["page"], saved["judge"] or json.dumps(saved["answers"], sort_keys=True)
        if once in seen:
            raise ValueError(
                f"{path} must be another person's than {seen[once]}; both are of {judge}: leave "
                "one out"
            )
        seen[once] = path
        names = {side: key[side] for side in "ab"}
        if who and names != who:
            raise ValueError(
                f"{path} must ask of the same two results as {files[0]}; it asks of "
                f"{names['a']['folder']} and {names['b']['folder']}: tally it by itself"
            )
        who = names
        for trial, answer in saved["answers"].items():
            first = key["first"][trial]
            other = "b" if first == "a" else "a"
            winner = {"left": first, "right": other, "tie": "tie"}[answer["choice"]]
            pair = f"{saved['page']} {trial}"
            for question in (answer["question"], "all"):
                answers[question].append((judge, pair, winner))
    order = [question for question in (*QUESTIONS, "all") if question in answers]
    return {**who, "questions": {question: _rate(answers[question]) for question in order}}


def _rate(answers: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    wins = Counter(winner for _, _, winner in answers)
    half = wins["a"] + wins["tie"] / 2
    low, high = wilson(half, len(answers))
    return {
        "a_wins": wins["a"],
        "b_wins": wins["b"],
        "ties": wins["tie"],
        "win_rate_a": half / len(answers),
        "low": low,
        "high": high,
        "judges": len({judge for judge, _, _ in answers}),
        "pairs": len({pair for _, pair, _ in answers}),
    }


def _read_answers(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a person saved, checked, and the key."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: name a file that the page saved")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if (saved["format"], saved["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it is of format {saved['format']!r}, version {saved['version']!r}")
        key = unseal(saved["key"])
        known = {"page": str(saved["page"]), "judge": str(saved.get("judge") or "").strip()}
        answers = dict(saved["answers"])
        for trial, answer in answers.items():
            if trial not in key["first"] or answer["question"] not in QUESTIONS:
                raise ValueError(f"it answers pair {trial}, which its page does not have")
            if answer["choice"] not in ("left", "right", "tie"):
                raise ValueError(f"it answers {answer['choice']!r} to pair {trial}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} must be a file that the page saved, unchanged; {error or 'it is not'}: leave "
            "it out, or save it again"
        ) from error
    if not answers:
        raise ValueError(f"{path} must hold an answer; got none: leave it out")
    return {**known, "answers": answers}, key


def format_tally(found: dict[str, Any]) -> str:
    """A table for people."""
    a, b = (f"{found[side]['folder']} (model {found[side]['model']})" for side in "ab")
    lines = [f"A  {a}", f"B  {b}", ""]
    heads = ("A wins", "ties", "B wins", "judges", "pairs")
    lines.append(f"{'question':<14}" + "".join(f"{h:>8}" for h in heads) + "   A preferred")
    for question, row in found["questions"].items():
        counts = [row[name] for name in ("a_wins", "ties", "b_wins", "judges", "pairs")]
        rate = "{:.1f}% [{:.1f}, {:.1f}]".format(
            *(100 * row[name] for name in ("win_rate_a", "low", "high"))
        )
        lines.append(f"{question:<14}" + "".join(f"{c:>8}" for c in counts) + f"   {rate}")
    return "\n".join(lines)


# --- python -m unclip.evaluation.ab ---------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Write a page, or tally what it saved."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["tally"]:
        _tally(words[1:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A", help="a result folder (or the word `tally`)")
    parser.add_argument("b", type=Path, metavar="B", help="another")
    parser.add_argument("--out", type=Path, default=Path("ab.html"), help="file to write")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, help="else all that can be")
    parser.add_argument("--count", type=int, default=30, help="pairs for each question")
    parser.add_argument("--grid", type=int, default=4, help="side of the grids for diversity")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and their sides")
    options = parser.parse_args(words)
    with one_line_errors():
        asked = ABOptions(
            questions=tuple(options.questions) if options.questions else None,
            count=options.count,
            grid=options.grid,
            seed=options.seed,
        )
        write_page(build_page(read_result(options.a), read_result(options.b), asked), options.out)
        print(options.out)


def _tally(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="ab tally", description=tally.__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what the page saved")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(words)
    with one_line_errors():
        found = tally(options.files)
        if options.out is not None:
            with written_file(options.out) as path:
                path.write_text(json.dumps(found, indent=2) + "\n")
        print(format_tally(found))


if __name__ == "__main__":
    main()
