"""What a run meets: signals, damage, disks, workers and batches that are bad, no server."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import full_disk
from processes import Processes, run
from test_training import Numbers, fit_line, words
from torch import Tensor, nn

from unclip.training import checkpoints, tracking
from unclip.training.checkpoints import read_weights
from unclip.training.fit import FitConfig, Objective, fit
from unclip.training.prior import main as train_prior
from unclip.training.signals import EXIT_STOPPED, SIGNALS

pytestmark = pytest.mark.filterwarnings("ignore:the caption has more than 20 tokens")


class Keyed(Numbers):
    """Numbers with names; `bad` of them are not a number."""

    def __init__(self, bad: set[int] | None = None, before: Callable[[int], None] = id) -> None:
        self.bad = bad or set()
        self.before = before

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.before(index)
        x = torch.tensor([float("nan") if index in self.bad else index / 10])
        return {"x": x, "key": f"sample-{index}"}


class Noisy(Objective):
    """Fits x -> 3 x - 1 through dropout and noise, so that a run that goes on wrongly shows."""

    stage = "noisy"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        noise = torch.randn(batch["x"].shape, generator=generator)
        losses = (self.network(batch["x"] + 0.1 * noise) - (3 * batch["x"] - 1)).square()[:, 0]
        return {
            "loss": losses.mean(),
            "per_sample": losses.detach(),
            "timesteps": torch.zeros(len(losses)),
        }

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self.network.state_dict(), folder / "weights.pt")


def train(folder: Path, dataset: Any = None, **changes: Any) -> Noisy:
    settings: dict[str, Any] = {
        **{"max_steps": 8, "batch_size": 4, "num_workers": 0, "checkpoint_every": 2},
        **{"log_every": 3, "warmup_steps": 0, "learning_rate": 0.01, "keep_checkpoints": 9},
    }
    objective = Noisy()
    fit(objective, dataset or Keyed(), FitConfig(**settings | changes), folder, resolved={})
    return objective


def trace(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: {k: v for k, v in line.items() if "second" not in k} for line in lines}


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# --------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_leaves_and_the_run_goes_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole")

    def at_the_fifth_step(index: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 18:
            os.kill(os.getpid(), number)

    seen, before = 0, signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        train(tmp_path / "run", Keyed(before=at_the_fifth_step))
    assert left.value.code == EXIT_STOPPED == 75
    assert steps(tmp_path / "run")[-1] == "step-0000005"  # between two, and within a line's means
    assert signal.getsignal(number) is before
    again = train(tmp_path / "run")
    assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


def test_processes_leave_at_the_same_step_whichever_is_told(
    tmp_path: Path, tiny_model: Path
) -> None:
    flags = ["--max-steps", "500", "--sample-every", "0", "--checkpoint-every", "500"]
    argv = [*words("prior", tmp_path, tiny_model), *flags, "--log-every", "1"]
    processes = Processes(2, train_prior, [argv], tmp_path / "logs")
    until = time.monotonic() + 100
    while not (tmp_path / "run/metrics.jsonl").is_file() and time.monotonic() < until:
        time.sleep(0.05)
    processes.signal(signal.SIGUSR1, 1)  # the main process hears of it from the other
    assert processes.wait() == [EXIT_STOPPED, EXIT_STOPPED], processes.said()
    (left,) = steps(tmp_path / "run")
    last = max(trace(tmp_path / "run"))
    assert left == f"step-{last:07d}" and last < 500
    argv[argv.index("--max-steps") + 1] = str(last + 1)
    assert f"from step {last}" in run(2, train_prior, [argv], tmp_path / "logs")


# ------------------------------------------------------------------------------------ checkpoints


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped byte": lambda folder: flip(next(folder.glob("*.distcp"))),
    "a file missing": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "a file cut short": lambda folder: os.truncate(next(folder.glob("*.distcp")), 100),
    "no sums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "sums cut short": lambda folder: os.truncate(folder / "SHA256SUMS", 50),
    "another step": lambda folder: flip(folder / "progress.json"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(tmp_path / "run")
    DAMAGE[what](tmp_path / "run/checkpoints/step-0000008")
    again = train(tmp_path / "run")
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "step-0000008 is damaged (" in told[0] and "using the one before it" in told[0]
    assert "from step 6" in told[1]
    assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))
    assert steps(tmp_path / "run")[0] == "damaged-step-0000008"  # kept, to be looked at
    assert checkpoints.latest(tmp_path / "run") == tmp_path / "run/checkpoints/step-0000008"


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again_unasked(
    tmp_path: Path,
) -> None:
    train(tmp_path, keep_checkpoints=1)
    flip(tmp_path / "checkpoints/step-0000008/.metadata")
    with pytest.raises(ValueError, match=r"all damaged.*\.metadata.*--fresh"):
        train(tmp_path)
    assert steps(tmp_path) == ["step-0000008"]


def test_half_a_checkpoint_is_swept_away(tmp_path: Path) -> None:
    train(tmp_path, max_steps=2)
    half = tmp_path / "checkpoints/.writing-0000004"
    shutil.copytree(tmp_path / "checkpoints/step-0000002", half)
    train(tmp_path, max_steps=4)
    assert steps(tmp_path) == ["step-0000002", "step-0000004"]


def test_a_checkpoint_that_is_half_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, max_steps=2)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: next(folder.iterdir()).unlink())
    train(tmp_path, max_steps=4, keep_checkpoints=1)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-0000004"]
    train(tmp_path, max_steps=6)
    assert steps(tmp_path) == ["step-0000004", "step-0000006"]  # the rest is swept away


def test_the_newest_checkpoints_are_kept_and_some_for_good(tmp_path: Path) -> None:
    train(tmp_path, keep_checkpoints=2, keep_every=4, max_steps=14)
    assert steps(tmp_path) == [f"step-{k:07d}" for k in (4, 8, 12, 14)]


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is written is what was there when the save began."""
    whole = train(tmp_path / "whole")
    going_on, order = threading.Event(), []
    finish = checkpoints.Checkpointer._finish

    def slow(self: Any, aside: Path, folder: Path) -> None:
        order.append("waits")
        assert going_on.wait(60)
        order.append("written")
        finish(self, aside, folder)

    def fetched(index: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 5 * 4:  # of step 5, after the save of step 4 has begun
            going_on.set()
            order.append("step 5")

    monkeypatch.setattr(checkpoints.Checkpointer, "_finish", slow)
    seen = 0
    train(tmp_path / "run", Keyed(before=fetched), checkpoint_every=4)
    assert order.index("step 5") < order.index("written")
    for step in (4, 8):
        name = f"checkpoints/step-{step:07d}"
        there, straight = (
            read_weights(tmp_path / "run" / name),
            read_weights(tmp_path / "whole" / name),
        )
        assert all(torch.equal(there[key], straight[key]) for key in straight)
    assert whole is not None


def test_a_full_disk_under_two_processes_ends_both(tmp_path: Path, tiny_model: Path) -> None:
    argv = words("prior", tmp_path, tiny_model)
    processes = Processes(2, on_a_full_disk, [argv], tmp_path / "logs")
    assert processes.wait() == [2, 2], processes.said()
    errors = [line for line in processes.said().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "could not write the checkpoint of step 2" in errors[0]
    assert steps(tmp_path / "run") == []


def on_a_full_disk(argv: list[str]) -> None:
    with full_disk(30_000):
        train_prior(argv)


def test_a_read_only_run_folder(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words("prior", tmp_path, tiny_model)
    argv[argv.index("--run") + 1] = "/proc/run"  # not even root writes there
    with pytest.raises(SystemExit) as left:
        train_prior(argv)
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1
    assert "cannot write the run folder /proc/run" in error and "--run" in error


# -------------------------------------------------------------------------------- other machines


def test_a_run_that_is_stopped_while_it_writes_its_config_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, max_steps=2)

    def cut_off(self: Path, text: str) -> None:
        with self.open("w") as file:
            file.write(text[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, max_steps=4)
    monkeypatch.undo()
    train(tmp_path, max_steps=4)
    assert 4 in trace(tmp_path)


def test_two_runs_in_one_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LOCK_TIMEOUT", 0.2)
    with (
        checkpoints.alone(tmp_path / "run"),
        pytest.raises(ValueError, match="one process's at a time; got a run that goes on there"),
    ):
        train(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    train(tmp_path / "run")


def test_another_number_of_processes_goes_on_rightly(tmp_path: Path, tiny_model: Path) -> None:
    argv = [*words("prior", tmp_path, tiny_model), "--log-every", "1", "--validate-every", "0"]
    elsewhere = [*words("prior", tmp_path, tiny_model, "moved"), *argv[4:]]
    train_prior(argv)
    run(2, train_prior, [[*elsewhere, "--max-steps", "2"]], tmp_path / "logs")
    train_prior([*elsewhere, "--gradient-accumulation-steps", "2"])
    there, straight = trace(tmp_path / "moved"), trace(tmp_path / "run")
    assert there.keys() == straight.keys() == {1, 2, 3, 4}
    for step, line in straight.items():
        assert there[step] == pytest.approx(line, abs=1e-4)
        assert there[step]["loss"] == pytest.approx(line["loss"], abs=1e-5)


# ------------------------------------------------------------------------------------ bad batches


def test_a_bad_step_is_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objective = train(tmp_path, Keyed({7}), max_steps=5, log_every=5)  # once in ten samples
    assert all(torch.isfinite(p).all() for p in objective.parameters())
    (line,) = trace(tmp_path).values()
    assert line["bad_steps"] == 2 and line["loss"] < 10
    told = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert len(told) == 2 and "1 in a row, 1 in all" in told[0]
    progress = json.loads((tmp_path / "checkpoints/step-0000005/progress.json").read_text())
    assert progress["averaged_steps"] == 3


def test_a_batch_that_is_entirely_bad_ends_the_run_with_its_samples_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        train(tmp_path, Keyed(set(range(10))), max_bad_steps=3, batch_size=10)
    for said in ("3 steps in a row", "sample-", "and 2 more", "fit.max_bad_steps"):
        assert said in str(error.value)
    assert not (tmp_path / "checkpoints/step-0000004").exists()


def test_only_the_bad_samples_of_a_batch_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of the samples sample-[37], sample-[37]: look"):
        train(tmp_path, Keyed({3, 7}), max_bad_steps=1, batch_size=10)


# --------------------------------------------------------------------------------------- workers


def test_a_data_worker_that_dies_ends_in_one_line(tmp_path: Path) -> None:
    def dies(index: int) -> None:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(OSError, match=r"a process that reads data died.*fit.num_workers"):
        train(tmp_path, Keyed(before=dies), num_workers=1)


# -------------------------------------------------------------------------------------- tracking


def test_a_resumed_run_is_the_same_run_at_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit_line(tmp_path / "run", tracker="wandb", log_every=1, max_steps=2, checkpoint_every=2)
    time.sleep(1.1)  # wandb's folders are named by the second
    fit_line(tmp_path / "run", tracker="wandb", log_every=1, max_steps=4)
    folders = [path.name for path in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert {name.split("-")[-1] for name in folders} == {
        (tmp_path / "run/wandb_run_id").read_text()
    }


def track_at_wandb(folder: Path) -> None:
    tracking.WANDB_TIMEOUT = 2
    fit_line(folder, tracker="wandb", log_every=1)


def test_training_goes_on_without_wandbs_server(tmp_path: Path) -> None:
    said = run(
        1,
        track_at_wandb,
        [tmp_path / "run"],
        tmp_path / "logs",
        WANDB_API_KEY="a" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_MODE="online",
    )
    assert "wandb cannot be reached" in said and "wandb sync" in said
    (written,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    assert written.stat().st_size > 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 5
