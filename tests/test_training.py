"""Training: the real loop on tiny networks, resume, bad input, two processes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from unclip.training import checkpoints
from unclip.training.batches import GlobalBatches
from unclip.training.decoder import main as train_decoder
from unclip.training.fit import FitConfig, Meter, learning_rate_factor
from unclip.training.prior import main as train_prior

ROOT = Path(__file__).parent.parent

PRIOR = """
prior: {network: {width: 32, depth: 2, head_dim: 16}}
statistics_samples: 32
"""
DECODER = """
decoder:
  network:
    unet: {image_size: 64, patch_size: 4, width: 32, channel_mult: [1, 2], num_res_blocks: 1,
           attention_resolutions: [8], head_dim: 16, context_dim: 32, dropout: 0.0}
    text_encodings_dim: 1
preview: {num_images: 2, num_inference_steps: 2}
"""
UPSAMPLER = """
source: {image_size: 64, crop_size: 32}
upsampler:
  network:
    noise_conditioning: true
    unet: {image_size: 64, in_channels: 6, patch_size: 4, width: 32, channel_mult: [1, 2],
           num_res_blocks: 1, attention_resolutions: [], dropout: 0.0}
degradation: {kind: blur}
noise_level: 0.2
preview: {num_images: 2, num_inference_steps: 2}
"""
FIT = """
fit: {max_steps: 4, batch_size: 4, learning_rate: 0.001, warmup_steps: 1, log_every: 2,
      checkpoint_every: 2, num_workers: 0, sample_every: 4, seed: 3}
"""
STAGES = {
    "prior": (train_prior, PRIOR),
    "decoder": (train_decoder, DECODER),
    "upsampler": (train_decoder, UPSAMPLER),
}


def write_config(folder: Path, stage: str, tiny_model: Path) -> Path:
    path = folder / f"{stage}.yaml"
    path.write_text(f"base: {tiny_model}\n" + STAGES[stage][1] + FIT)
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_saves_and_resumes(stage: str, tmp_path: Path, tiny_model: Path) -> None:
    main, _ = STAGES[stage]
    config = ["--config", str(write_config(tmp_path, stage, tiny_model))]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    main([*config, "--run", str(whole)])
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert any(name.startswith("loss_q") for name in lines[0])
    assert (whole / "config.yaml").is_file()
    assert (whole / stage / "model.safetensors").is_file()
    if stage != "prior":
        assert (whole / "samples" / "step-0000004.png").is_file()

    main([*config, "--run", str(halves), "--fit.max_steps", "2", "--fit.lr_schedule", "constant"])
    other = tmp_path / "straight"
    main([*config, "--run", str(other), "--fit.lr_schedule", "constant"])
    main([*config, "--run", str(halves), "--fit.lr_schedule", "constant"])  # goes on from step 2
    resumed = load_file(halves / stage / "model.safetensors")
    straight = load_file(other / stage / "model.safetensors")
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


def test_config_is_written_before_training_and_another_one_is_refused(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = [
        "--config",
        str(write_config(tmp_path, "prior", tiny_model)),
        "--run",
        str(tmp_path / "r"),
    ]
    train_prior([*config, "--max-steps", "2"])
    assert yaml.safe_load((tmp_path / "r/config.yaml").read_text())["fit"]["max_steps"] == 2
    with pytest.raises(SystemExit):
        train_prior([*config, "--learning-rate", "0.5"])
    error = capsys.readouterr().err
    assert "fit.learning_rate: 0.001 there, 0.5 here" in error
    assert "--fresh" in error
    train_prior([*config, "--learning-rate", "0.5", "--max-steps", "2", "--fresh"])


def test_run_folder_that_cannot_be_written(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    config = str(write_config(tmp_path, "prior", tiny_model))
    with pytest.raises(SystemExit):
        train_prior(["--config", config, "--run", str(tmp_path / "file" / "run")])
    assert "cannot write the run folder" in capsys.readouterr().err


def test_a_full_disk_leaves_the_checkpoint_before_whole(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint's write fails half-way, as on a full disk: the first one stays."""
    config = [
        "--config",
        str(write_config(tmp_path, "prior", tiny_model)),
        "--run",
        str(tmp_path / "r"),
    ]
    real = torch.save
    written = []

    def full(value: object, target: object, *args: object, **kwargs: object) -> None:
        written.append(target)
        if any("writing-0000004" in str(t) for t in written):
            Path(str(target)).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(value, target, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit):
        train_prior(config)
    assert written, "the failing write was never reached"
    monkeypatch.undo()
    left = sorted(p.name for p in (tmp_path / "r/checkpoints").iterdir())
    assert left == ["step-0000002"]
    train_prior(config)  # goes on from step 2
    assert checkpoints.latest(tmp_path / "r").name == "step-0000004"  # type: ignore[union-attr]


def test_training_on_files(tmp_path: Path, tiny_model: Path) -> None:
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(6):
        Image.new("RGB", (70, 64), (40 * k, 10, 90)).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text(f"picture number {k}")
    config = str(write_config(tmp_path, "prior", tiny_model))
    train_prior(
        [
            "--config",
            config,
            "--run",
            str(tmp_path / "r"),
            "--data",
            str(pictures),
            "--max-steps",
            "2",
        ]
    )
    assert (tmp_path / "r/prior/config.yaml").is_file()


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_two_processes_train_like_one(stage: str, tmp_path: Path, tiny_model: Path) -> None:
    """`accelerate launch --num_processes 2` sees the batches of one process; weights come out
    alike up to the noise each rank draws for itself."""
    config = str(write_config(tmp_path, stage, tiny_model))
    run = tmp_path / "two"
    script = "train_prior.py" if stage == "prior" else "train_decoder.py"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(ROOT / script), "--config", config, "--run", str(run), "--max-steps", "2"],
        check=True,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["samples"] == 8
    assert (run / stage / "model.safetensors").is_file()


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


def batch_indices(
    world: int, first: int = 0, count: int = 5, accumulation: int = 1
) -> list[list[int]]:
    per_rank = []
    for rank in range(world):
        batches = GlobalBatches(
            Numbers(),
            batch_size=4,
            micro_batch_size=4 // world // accumulation,
            rank=rank,
            num_processes=world,
            first_batch=first,
            seed=5,
        )
        stream = iter(batches)
        per_rank.append([next(stream) for _ in range(count * accumulation)])
    k = range(count)
    return [
        [i for rank in per_rank for m in range(accumulation) for i in rank[b * accumulation + m]]
        for b in k
    ]


def test_global_batches_do_not_depend_on_processes_or_on_where_they_start() -> None:
    one = batch_indices(1)
    assert batch_indices(2) == one
    assert batch_indices(4) == one
    assert batch_indices(1, accumulation=2) == one
    assert batch_indices(1, first=2, count=3) == one[2:]
    flat = [i for batch in one for i in batch]
    assert sorted(flat[:10]) == list(range(10))  # each sample once an epoch
    assert flat[:10] != flat[10:20]


def test_batch_size_must_be_shared_out(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path, "prior", tiny_model))
    with pytest.raises(SystemExit):
        train_prior(
            ["--config", config, "--run", str(tmp_path / "r"), "--gradient-accumulation-steps", "3"]
        )
    assert "fit.batch_size must be a multiple of" in capsys.readouterr().err


def test_learning_rate_warms_up_and_falls() -> None:
    config = FitConfig(max_steps=100, warmup_steps=10, lr_floor=0.1)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[10] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1, abs=1e-2)
    assert all(b <= a for a, b in itertools.pairwise(factors[10:]))


def test_meter_splits_the_loss_by_timestep_quartile() -> None:
    meter = Meter()
    meter.add(
        {
            "loss": torch.tensor(2.5),
            "per_sample": torch.tensor([1.0, 2.0, 3.0, 4.0]),
            "timesteps": torch.tensor([0.1, 0.3, 0.6, 0.999]),
        }
    )
    assert meter.read() == {
        "loss": 2.5,
        "loss_q1": 1.0,
        "loss_q2": 2.0,
        "loss_q3": 3.0,
        "loss_q4": 4.0,
    }
    assert meter.read() == {}


def test_master_weights_are_fp32_under_autocast(tmp_path: Path, tiny_model: Path) -> None:
    config = str(write_config(tmp_path, "decoder", tiny_model))
    run = tmp_path / "r"
    train_decoder(
        ["--config", config, "--run", str(run), "--max-steps", "2", "--mixed-precision", "bf16"]
    )
    state = load_file(run / "checkpoints/step-0000002/model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
