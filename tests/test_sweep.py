"""Sweeps: a folder a value, gone on with after an interruption."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from result_folders import write_result

from unclip.evaluation.curves import sweep_figure
from unclip.evaluation.results import Metric, read_result, read_sweep
from unclip.evaluation.sweep import main
from unclip.evaluation.sweeping import folder_name, open_sweep, sweep, typed

SETTINGS = {"name": "tiny", "cascade": {"size": 64}, "seed": 0}


class Runs:
    """Writes a result folder for each value, and stops at one of them."""

    def __init__(self, stop_at: Any = None) -> None:
        self.stop_at, self.values = stop_at, []

    def __call__(self, value: Any, folder: Path) -> None:
        if value == self.stop_at:
            (folder / "images").mkdir(parents=True)  # as a killed command leaves it
            raise KeyboardInterrupt
        self.values.append(value)
        if (folder / "images").is_dir():
            (folder / "images").rmdir()
        scores = (
            {"clip_score": [10.0 * float(value), 10.0]}
            if isinstance(value, float)
            else {"clip_score": [1.0, 2.0]}
        )
        fid = {"value": 5.0 - len(self.values), "better": "lower", "count": 2, "settings": {}}
        write_result(folder, scores, metrics={"fid": {**fid, "interval": [0.5, 6.0]}})


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "sweep.csv").open()))


def test_a_sweep_goes_on_after_an_interruption(tmp_path: Path) -> None:
    out, values = tmp_path / "sweep", typed("guidance", ["3", "1", "2"])
    first = Runs(stop_at=2.0)
    with pytest.raises(KeyboardInterrupt):
        sweep(out, "guidance", values, SETTINGS, first)
    assert first.values == [1.0]
    assert [row["guidance"] for row in table(out)] == ["1.0"], "what is done can be looked at"
    assert [value for value, _ in read_sweep(out)[1]] == [1.0]
    before = (out / "guidance=1.0/result.json").stat().st_mtime_ns
    again = Runs()
    sweep(out, "guidance", values, SETTINGS, again)
    assert again.values == [2.0, 3.0]
    assert (out / "guidance=1.0/result.json").stat().st_mtime_ns == before
    more = Runs()
    sweep(out, "guidance", [2.0, 1.5], SETTINGS, more)
    assert more.values == [1.5]
    axis, points = read_sweep(out)
    assert axis == "guidance" and [value for value, _ in points] == [1.0, 1.5, 2.0, 3.0]
    told = json.loads((out / "sweep.json").read_text())
    assert told["format"] == 1 and told["points"][0] == {"value": 1.0, "folder": "guidance=1.0"}


def test_the_table_holds_metrics_and_intervals(tmp_path: Path) -> None:
    sweep(tmp_path / "s", "guidance", [1.0, 3.0], SETTINGS, Runs())
    rows = table(tmp_path / "s")
    assert list(rows[0]) == ["guidance", "clip_score", "fid", "fid_low", "fid_high"]
    assert [float(row["clip_score"]) for row in rows] == [10.0, 20.0]
    assert [row["fid_low"] for row in rows] == ["0.5", "0.5"]


def test_curves_are_drawn_of_numbers_and_of_names(tmp_path: Path) -> None:
    from PIL import Image

    for axis, values in (("guidance", [1.0, 3.0]), ("sampler", ["ddim", "ddpm"])):
        out = tmp_path / axis
        sweep(out, axis, values, SETTINGS, Runs())
        with Image.open(out / "sweep.png") as picture:
            assert picture.width > 800 and len(set(picture.convert("L").tobytes())) > 50


def test_checkpoints_stand_at_their_steps() -> None:
    metrics = {"clip_score": Metric(value=1.0), "fid": Metric(value=2.0)}
    for values, places in (
        (["runs/a/checkpoints/step-0000500", "runs/a/checkpoints/step-0002000"], [500, 2000]),
        ([1.0, 1.5], [1.0, 1.5]),
    ):
        figure = sweep_figure("checkpoint", [(value, metrics) for value in values])
        trade_off, against, _ = figure.axes
        assert [note.get_text() for note in trade_off.texts] == [str(place) for place in places]
        assert against.lines[0].get_xdata().tolist() == places
    figure = sweep_figure("prior", [(value, metrics) for value in ("runs/flow", "shapes")])
    assert [tick.get_text() for tick in figure.axes[1].get_xticklabels()] == ["flow", "shapes"]
    with pytest.raises(ValueError, match="none that was computed"):
        sweep_figure("steps", [(5, {"fid": Metric(value=None, reason="no weights")})])


def test_changed_settings_or_axis_are_refused(tmp_path: Path) -> None:
    out, run = tmp_path / "s", Runs()
    sweep(out, "guidance", [1.0], SETTINGS, run)
    changed = SETTINGS | {"cascade": {"size": 256}}
    with pytest.raises(ValueError, match=r"cascade.size is 64 and not 256: choose another --out"):
        sweep(out, "guidance", [1.0], changed, run)
    with pytest.raises(ValueError, match="axis is 'guidance' and not 'steps'"):
        sweep(out, "steps", [10], SETTINGS, run)
    assert run.values == [1.0]
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things"):
        sweep(other, "guidance", [1.0], SETTINGS, run)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


def test_every_process_runs_the_same_points_and_one_writes(tmp_path: Path) -> None:
    """Two processes, one after the other where they do not wait for each other."""
    out = tmp_path / "s"
    open_sweep(out, "guidance", [1.0, 2.0], SETTINGS)
    seen, waits = [], []
    sweep(
        out,
        "guidance",
        [1.0, 2.0],
        SETTINGS,
        lambda value, folder: seen.append(value),
        is_main=False,
        wait=lambda: waits.append(len(seen)),
    )
    assert seen == [1.0, 2.0] and not (out / "sweep.csv").exists()
    assert waits == [0, 0], "before sweep.json is read, and before the first point is finished"


@pytest.mark.parametrize(
    ("axis", "words", "message"),
    [
        ("guidance", ["1", "much"], "values of guidance must be numbers; got 1 much"),
        ("steps", ["1.5"], "values of steps must be whole numbers"),
        ("guidance", ["1", "1.0"], "each once"),
        ("sampler", [], "got none"),
        ("checkpoint", ["a/runs/step-1", "b/runs/step-1"], "by another name"),
    ],
)
def test_values_that_cannot_be_are_refused(axis, words, message) -> None:
    with pytest.raises(ValueError, match=message):
        typed(axis, words)


def test_points_are_named_by_their_values() -> None:
    assert folder_name("guidance", 3.0) == "guidance=3.0"
    assert folder_name("sampler", "dpm++sde") == "sampler=dpm++sde"
    assert folder_name("checkpoint", "runs/a/step-1/") == "checkpoint=a-step-1"
    assert folder_name("prior", "/runs/my prior") == "prior=runs-my-prior"


# --- python -m unclip.evaluation.sweep ------------------------------------------------------------


# The tiny CLIP reads 20 tokens, and some captions of the shapes world have more.
@pytest.mark.filterwarnings("ignore:the caption has more than 20 tokens")
def test_a_model_is_swept(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = tmp_path / "p.yaml"
    protocol.write_text(
        "name: tiny\ncaptions: {data: shapes, count: 6}\n"
        "cascade: {size: 16, decoder_steps: 2, prior_steps: 2}\nmetrics: [clip_score]\n"
    )
    out = tmp_path / "sweep"
    flags = ["--config", str(protocol), "--model", str(tiny_model), "--device", "cpu"]
    flags += ["--axis", "guidance", "--out", str(out)]
    main([*flags, "--values", "1", "3"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("guidance,clip_score") and said[-1] == str(out)
    scales = [
        read_result(path).protocol["cascade"]["guidance_scale"] for _, path in read_sweep(out)[1]
    ]
    assert scales == [1.0, 3.0]
    main([*flags, "--values", "2"])
    assert [row["guidance"] for row in table(out)] == ["1.0", "2.0", "3.0"]
    other = [str(tmp_path / "embeds") if flag == str(out) else flag for flag in flags]
    main([*other, "--axis", "embed", "--values", "prior", "text", "none"])
    assert len({row["clip_score"] for row in table(tmp_path / "embeds")}) == 3
    for bad, message in (
        (["--values", "1", "--seed", "5"], "seed is 0 and not 5"),
        (["--values", "-1"], "guidance_scale must not be negative"),
        (["--values", "1", "--pictures", str(tmp_path)], "pictures must be drawn"),
    ):
        with pytest.raises(SystemExit) as exit:
            main([*flags, *bad])
        error = capsys.readouterr().err
        assert exit.value.code == 2 and message in error, error
