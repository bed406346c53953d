"""Training on several processes gives what one gives; sharded, accumulated, resumed or not."""

import json
from pathlib import Path

import pytest
import torch
from processes import FSDP2, run
from test_training import STAGES

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:the caption has more than 20 tokens")

FIT = """
fit: {max_steps: 20, batch_size: 8, learning_rate: 0.001, lr_schedule: constant, warmup_steps: 1,
      log_every: 1, checkpoint_every: 10, num_workers: 0, sample_every: 0, validate_every: 20,
      val_samples: 6, seed: 3, keep_checkpoints: 3}
"""


def command(stage: str, folder: Path, tiny_model: Path, run_name: str) -> list[str]:
    path = folder / f"{stage}.yaml"
    recipe = STAGES[stage][1].replace("dropout: 0.1", "dropout: 0.0")
    path.write_text(f"base: {tiny_model}\n" + recipe + FIT)
    return ["--config", str(path), "--run", str(folder / run_name)]


def trace(run: Path, *names: str) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines}
    return [[by_step[step][name] for name in names] for step in sorted(by_step)]


TWICE = ["--gradient-accumulation-steps", "2"]
WAYS: dict[str, tuple[int, list[str], dict[str, str]]] = {
    "one": (1, [], {}),
    "accumulated": (1, TWICE, {}),
    "two": (2, [], {}),
    "sharded": (2, [], FSDP2),
    "sharded and accumulated": (2, TWICE, FSDP2),
}


@pytest.mark.parametrize(
    ("stage", "ways"),
    [
        ("prior", ["one", "accumulated", "two", "sharded"]),
        ("upsampler", ["one", "two"]),
        *(pytest.param(stage, list(WAYS), marks=pytest.mark.slow) for stage in STAGES),
    ],
)
def test_processes_shards_and_accumulation_change_nothing(
    stage: str, ways: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    """1 x 8 = 2 x 4 = 1 x 4 x 2 = 2 shards x 4 = 2 shards x 2 x 2, over 20 steps."""
    main, _ = STAGES[stage]
    losses, held_out = {}, {}
    for name in ways:
        count, flags, environment = WAYS[name]
        words = [*command(stage, tmp_path, tiny_model, name), *flags]
        run(count, main, [words], tmp_path / "logs" / name, **environment)
        losses[name] = torch.tensor(trace(tmp_path / name, "loss", "grad_norm"))
        last = (tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]
        held_out[name] = json.loads(last)["val/loss"]
    assert len(losses["one"]) == 20
    assert losses["one"][:, 0].std() > 0.01  # there is something to agree on
    for name in ways:
        torch.testing.assert_close(losses[name][:, 0], losses["one"][:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(losses[name][:, 1], losses["one"][:, 1], atol=1e-3, rtol=1e-3)
        assert held_out[name] == pytest.approx(held_out["one"], abs=1e-5)
    if "sharded" in ways:
        folder = tmp_path / "sharded/checkpoints/step-0000020"
        assert sorted(p.name for p in folder.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
