"""Processes killed at random moments: the run ends as one that nobody disturbed."""

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import FSDP2, Processes
from safetensors.torch import load_file
from test_clip import SIZES
from test_training import STAGES

from unclip.training import checkpoints
from unclip.training.checkpoints import read_weights
from unclip.training.clip import main as train_clip

pytestmark = pytest.mark.filterwarnings("ignore:the caption has more than 20 tokens")

FIT = """
fit: {batch_size: 4, learning_rate: 0.001, warmup_steps: 5, log_every: 3, checkpoint_every: 1,
      num_workers: 0, sample_every: 0, validate_every: 0, seed: 3}
"""
CLIP = (train_clip, "")


def command(
    stage: str, steps: int, folder: Path, tiny_model: Path, name: str
) -> tuple[Callable[..., Any], list[str]]:
    main, recipe = CLIP if stage == "clip" else STAGES[stage]
    path = folder / f"{stage}.yaml"
    recipe = recipe.replace("image_size: 64, patch_size: 4", "image_size: 16, patch_size: 2")
    base = "" if stage == "clip" else f"base: {tiny_model}\n"
    path.write_text(base + recipe + FIT)
    words = ["--config", str(path), "--run", str(folder / name), "--max-steps", str(steps)]
    return main, [*words, *(SIZES if stage == "clip" else [])]


def result(run: Path, stage: str) -> dict[str, torch.Tensor]:
    """All that a run ends with: weights, averages, and what it exported."""
    last = checkpoints.latest(run)
    assert last is not None and checkpoints.damage(last) is None
    (exported,) = (run / stage).glob("*.safetensors")
    parts = {
        "model": read_weights(last, "model"),
        "ema": read_weights(last, "ema"),
        "exported": load_file(exported),
    }
    assert all(parts.values())
    return {f"{part}.{k}": v for part, named in parts.items() for k, v in named.items()}


def trace(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["samples_per_second"]
    return {line["step"]: line for line in lines}


def step_of(run: Path) -> int:
    """Of the newest checkpoint, 0 for none."""
    names = (path.name for path in (run / "checkpoints").glob("step-*"))
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def disturbed(
    main: Callable[..., Any],
    words: list[str],
    folder: Path,
    kills: int,
    environment: dict[str, str],
    chance: random.Random,
) -> list[str]:
    """Kill a run `kills` times, then let it end. Returns what happened, a line a start."""
    told = []
    for number in range(kills + 1):
        before = step_of(folder)
        processes = Processes(2, main, [words], folder.parent / "logs", **environment)
        if number == kills:
            assert processes.wait(900) == [0, 0], processes.said()
        else:
            # Before the first step, or some steps and a moment after the checkpoint it began at.
            ahead = chance.choice([0, 0, 1, 2])
            until = time.monotonic() + 300
            while ahead and step_of(folder) < before + ahead and processes.alive:
                assert time.monotonic() < until, processes.said()
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 4 if ahead == 0 else 0.4))
            victim = chance.randrange(2)
            processes.kill(victim)
            if chance.random() < 0.5:  # the other is left to find out
                processes.processes[1 - victim].join(1)
            processes.kill()
        resumed = re.search(r"resuming .* from step (\d+)", processes.said())
        assert "damaged" not in processes.said()
        for checkpoint in (folder / "checkpoints").glob("step-*"):
            assert checkpoints.damage(checkpoint) is None  # what is there is whole
        if resumed is not None:
            assert int(resumed[1]) == before  # nothing lost beyond the last checkpoint
        assert step_of(folder) >= before
        told.append(f"{before} -> {step_of(folder)}" + (" resumed" if resumed else ""))
    return told


@pytest.mark.parametrize(
    ("stage", "kills", "environment"),
    [
        ("prior", 3, {}),
        ("clip", 2, {}),  # its batch norms keep running means, which differ between processes
        *(
            pytest.param(stage, 50, {}, marks=pytest.mark.slow)
            for stage in ("prior", "decoder", "upsampler", "clip")
        ),
        pytest.param("prior", 50, FSDP2, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_ends_as_if_nothing_had_happened(
    stage: str, kills: int, environment: dict[str, str], tmp_path: Path, tiny_model: Path
) -> None:
    steps = kills + 12
    main, words = command(stage, steps, tmp_path, tiny_model, "calm")
    calm = Processes(2, main, [words], tmp_path / "logs", **environment)
    assert calm.wait(900) == [0, 0], calm.said()
    main, words = command(stage, steps, tmp_path, tiny_model, "killed")
    told = disturbed(main, words, tmp_path / "killed", kills, environment, random.Random(kills))
    print("\n".join(told))
    assert len(told) == kills + 1
    assert sum("resumed" in line for line in told) > kills // 4
    straight, killed = (result(tmp_path / name, stage) for name in ("calm", "killed"))
    assert straight.keys() == killed.keys()
    for name, tensor in straight.items():
        assert torch.equal(killed[name], tensor), name
    assert trace(tmp_path / "killed") == trace(tmp_path / "calm")
