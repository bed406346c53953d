"""Training: the real loop on tiny networks, resume, bad input, two processes."""

import io
import itertools
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from conftest import full_disk
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from unclip.data.source import SourceConfig, open_source
from unclip.diffusion import DiffusionConfig, NoiseSchedule
from unclip.priors import DiffusionPrior
from unclip.training import checkpoints
from unclip.training.batches import GlobalBatches
from unclip.training.checkpoints import read_weights
from unclip.training.decoder import main as train_decoder
from unclip.training.fit import FitConfig, Objective, draw, fit, learning_rate_factor
from unclip.training.plot import plot
from unclip.training.prior import main as train_prior
from unclip.training.tracking import Meter

# The tiny CLIP reads 20 tokens, and some captions of the shapes world have more.
pytestmark = pytest.mark.filterwarnings("ignore:the caption has more than 20 tokens")

ROOT = Path(__file__).parent.parent

PRIOR = """
prior: {network: {width: 32, depth: 2, head_dim: 16}}
statistics_samples: 32
"""
DECODER = """
decoder:
  network:
    unet: {image_size: 64, patch_size: 4, width: 32, channel_mult: [1, 2], num_res_blocks: 1,
           attention_resolutions: [8], head_dim: 16, context_dim: 32, dropout: 0.1}
    text_encodings_dim: 1
preview: {num_images: 2, num_inference_steps: 2}
"""
UPSAMPLER = """
source: {image_size: 64, crop_size: 32}
upsampler:
  network:
    noise_conditioning: true
    unet: {image_size: 64, in_channels: 6, patch_size: 4, width: 32, channel_mult: [1, 2],
           num_res_blocks: 1, attention_resolutions: [], dropout: 0.1}
degradation: {kind: blur}
noise_level: 0.2
preview: {num_images: 2, num_inference_steps: 2}
"""
FIT = """
fit: {max_steps: 4, batch_size: 4, learning_rate: 0.001, lr_schedule: constant, warmup_steps: 1,
      log_every: 2, checkpoint_every: 2, num_workers: 0, sample_every: 4, seed: 3}
"""
STAGES = {
    "prior": (train_prior, PRIOR),
    "decoder": (train_decoder, DECODER),
    "upsampler": (train_decoder, UPSAMPLER),
}


def words(stage: str, folder: Path, tiny_model: Path, run: str = "run") -> list[str]:
    """The command line that trains a tiny stage on the tiny model into `folder / run`."""
    path = folder / f"{stage}.yaml"
    path.write_text(f"base: {tiny_model}\n" + STAGES[stage][1] + FIT)
    return ["--config", str(path), "--run", str(folder / run)]


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_saves_and_resumes(stage: str, tmp_path: Path, tiny_model: Path) -> None:
    main, _ = STAGES[stage]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    main(words(stage, tmp_path, tiny_model, "whole"))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert any(name.startswith("loss_q") for name in lines[0])
    assert (whole / "config.yaml").is_file()
    if stage != "prior":
        assert (whole / "samples" / "step-0000004.png").is_file()

    main([*words(stage, tmp_path, tiny_model, "halves"), "--max-steps", "2"])
    main(words(stage, tmp_path, tiny_model, "halves"))  # goes on from step 2
    exported, checkpoint = Path(f"{stage}/model.safetensors"), Path("checkpoints/step-0000004")
    for read, file in ((load_file, exported), (read_weights, checkpoint)):
        resumed, straight = read(halves / file), read(whole / file)
        assert resumed.keys() == straight.keys()
        for name, tensor in straight.items():
            torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_starts_from_another_runs_weights(
    stage: str, tmp_path: Path, tiny_model: Path
) -> None:
    main, _ = STAGES[stage]
    main([*words(stage, tmp_path, tiny_model, "first"), "--max-steps", "1"])
    again = [*words(stage, tmp_path, tiny_model, "again"), "--max-steps", "1"]
    main([*again, "--init", str(tmp_path / "first"), "--learning-rate", "1e-9"])
    first, second = (
        load_file(tmp_path / run / stage / "model.safetensors") for run in ("first", "again")
    )
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_config_is_written_before_training_and_another_one_is_refused(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = words("prior", tmp_path, tiny_model)
    train_prior([*config, "--max-steps", "2"])
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["fit"]["max_steps"] == 2
    with pytest.raises(SystemExit):
        train_prior([*config, "--learning-rate", "0.5"])
    error = capsys.readouterr().err
    assert "fit.learning_rate: 0.001 there, 0.5 here" in error
    assert "--fresh" in error
    train_prior([*config, "--learning-rate", "0.5", "--max-steps", "2", "--fresh"])
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]


def test_run_folder_that_cannot_be_written(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit):
        train_prior(words("prior", tmp_path, tiny_model, "file/run"))
    error = capsys.readouterr().err
    assert "cannot write the run folder" in error
    assert error.count("\n") == 1


def test_a_full_disk_leaves_the_stage_before_whole(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = words("prior", tmp_path, tiny_model), tmp_path / "run"
    train_prior([*config, "--max-steps", "2"])
    before = (run / "prior/model.safetensors").read_bytes()
    there = sorted(path.name for path in run.iterdir())
    with full_disk(), pytest.raises(SystemExit):
        train_prior(config)
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: could not write the checkpoint of step 4 to {run / 'checkpoints'} (" in error
    assert "the ones before it are untouched" in error
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000002"]
    assert sorted(path.name for path in run.iterdir()) == there
    assert (run / "prior/model.safetensors").read_bytes() == before
    DiffusionPrior.load(run / "prior")
    train_prior(config)  # goes on from step 2, and the last step is not taken for done
    assert (run / "prior/model.safetensors").read_bytes() != before
    assert checkpoints.latest(run) == run / "checkpoints/step-0000004"


def test_training_on_files(tmp_path: Path, tiny_model: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(6):
        Image.new("RGB", (70, 64), (40 * k, 10, 90)).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text(f"picture number {k}")
    config = words("prior", tmp_path, tiny_model)
    train_prior([*config, "--data", str(pictures), "--max-steps", "2"])
    assert (tmp_path / "run/prior/config.yaml").is_file()
    few = SourceConfig(data=str(pictures), limit=100)
    assert len(open_source(few)) == 6  # type: ignore[arg-type]


def test_a_corrupt_picture_in_a_tar_is_skipped_counted_and_named(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (10, 90, 200)).save(picture, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for k in range(6):
            data = b"no picture" if k == 2 else picture.getvalue()
            for name, content in ((f"k{k}.png", data), (f"k{k}.txt", b"a blue square")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    config = words("prior", tmp_path, tiny_model)
    train_prior([*config, "--data", str(tmp_path / "a.tar"), "--max-steps", "2"])
    assert (tmp_path / "run/prior/config.yaml").is_file()
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said.startswith(f"skipped k2 of {tmp_path / 'a.tar'}: ")
    assert said.endswith("(1 of 6 so far)")
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["skipped/corrupt picture"] == 1


def test_data_that_is_mostly_corrupt_ends_in_one_line(
    tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for k in range(6):
        (tmp_path / f"{k}.png").write_bytes(b"broken")
        (tmp_path / f"{k}.txt").write_text("nothing")
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    config = words("decoder", tmp_path, tiny_model)
    with pytest.raises(SystemExit):
        train_decoder([*config, "--data", str(tmp_path), "--num-workers", "1", "--num-images", "1"])
    lines = capfd.readouterr().err.splitlines()
    assert (
        sum("data must hold pictures that can be read; got 4 of 6" in line for line in lines) == 1
    )
    assert not any("Traceback" in line for line in lines)


# ------------------------------------------------------------------------------ several processes


def launch(options: list[str], script: str, arguments: list[str]) -> str:
    """Run a script by `accelerate launch` on the CPU; what it wrote to stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    done = subprocess.run(
        [*command, *options, str(ROOT / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(("stage", "way"), [("decoder", "ddp"), ("prior", "fsdp2")])
def test_two_processes_train_together(
    stage: str, way: str, tmp_path: Path, tiny_model: Path
) -> None:
    config = [*words(stage, tmp_path, tiny_model), "--max-steps", "2"]
    options = ["--config_file", str(ROOT / f"configs/accelerate/{way}.yaml")]
    options += ["--main_process_port", "0", "--mixed_precision", "no"]
    launch(options, f"train_{stage}.py", config)
    run = tmp_path / "run"
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["samples"] == 8
    assert (run / stage / "model.safetensors").is_file()
    progress = json.loads((run / "checkpoints/step-0000002/progress.json").read_text())
    assert progress["num_processes"] == 2
    shards = sorted((run / "checkpoints/step-0000002").glob("*.distcp"))
    assert [shard.name for shard in shards] == ["__0_0.distcp", "__1_0.distcp"]


def test_accelerate_launch_on_the_cpu_says_that_it_starts_one(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Several start through MPI alone, and Accelerate does not say that it has ignored a number."""
    config = [*words("prior", tmp_path, tiny_model), "--max-steps", "2"]
    said = launch(["--cpu"], "train_prior.py", config)
    assert (tmp_path / "run/prior/model.safetensors").is_file()
    assert "accelerate launch --multi_gpu" in said


class Numbers(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Ten numbers."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.tensor([index / 10])}


class Endless(Numbers):
    """A sequence of its own."""

    endless = True


def batch_indices(
    world: int, first: int = 0, count: int = 5, accumulation: int = 1, dataset: Any = None
) -> list[list[int]]:
    per_rank = []
    for rank in range(world):
        batches = GlobalBatches(
            dataset or Numbers(),
            batch_size=4,
            micro_batch_size=4 // world // accumulation,
            rank=rank,
            num_processes=world,
            first_batch=first,
            seed=5,
        )
        stream = iter(batches)
        per_rank.append([next(stream) for _ in range(count * accumulation)])
    # Of n processes each takes every n-th position.
    steps = [
        [i for row in zip(*(rank[step] for rank in per_rank), strict=True) for i in row]
        for step in range(count * accumulation)
    ]
    flat = list(itertools.chain.from_iterable(steps))
    return [flat[4 * b : 4 * b + 4] for b in range(count)]


def test_global_batches_do_not_depend_on_processes_or_on_where_they_start() -> None:
    one = batch_indices(1)
    assert batch_indices(2) == one
    assert batch_indices(4) == one
    assert batch_indices(1, accumulation=2) == one
    assert batch_indices(1, first=2, count=3) == one[2:]
    flat = [i for batch in one for i in batch]
    assert sorted(flat[:10]) == list(range(10))  # each sample once an epoch
    assert flat[:10] != flat[10:20]
    assert batch_indices(2, first=3, count=2, dataset=Endless()) == [
        [12, 13, 14, 15],
        [16, 17, 18, 19],
    ]


def test_batch_size_must_be_shared_out(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_prior(
            [*words("prior", tmp_path, tiny_model), "--gradient-accumulation-steps", "3"],
        )
    assert "fit.batch_size must be a multiple of" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- the loop


class Line(Objective):
    """Fits x -> 3 x - 1: a loss without noise, so that runs may be compared."""

    stage = "line"

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1)
        nn.init.ones_(self.network.weight)
        nn.init.zeros_(self.network.bias)

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": (self.network(batch["x"]) - (3 * batch["x"] - 1)).square().mean()}

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self.network.state_dict(), folder / "weights.pt")


def fit_line(run: Path, **changes: Any) -> Line:
    """A line after 5 optimizer steps."""
    settings: dict[str, Any] = {"max_steps": 5, "batch_size": 4, "num_workers": 0} | changes
    objective = Line()
    config = FitConfig(learning_rate=0.1, warmup_steps=0, ema_decay=0.5, **settings)
    fit(objective, Numbers(), config, run, resolved={"a": {"b": [1, 2], "c": None}})
    return objective


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return fit_line(tmp_path / "one-batch")


def test_gradient_accumulation_gives_the_update_of_one_batch(line: Line, tmp_path: Path) -> None:
    assert line.network.weight.item() > 1.2  # it has moved
    run = tmp_path / "accumulated"
    accumulated = fit_line(run, gradient_accumulation_steps=4)
    torch.testing.assert_close(accumulated.state_dict(), line.state_dict())
    # The averaged weights tick with the optimizer, not with each micro-batch.
    average = torch.load(run / "line/weights.pt")
    torch.testing.assert_close(average, torch.load(tmp_path / "one-batch/line/weights.pt"))
    assert not torch.equal(average["weight"], line.network.weight)
    progress = json.loads((run / "checkpoints/step-0000005/progress.json").read_text())
    assert progress["averaged_steps"] == 5


def test_learning_rate_warms_up_and_falls() -> None:
    config = FitConfig(max_steps=100, warmup_steps=10, lr_floor=0.1)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[10] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1, abs=1e-2)
    assert all(b <= a for a, b in itertools.pairwise(factors[10:]))


def test_a_shift_draws_noisy_timesteps_more_often() -> None:
    schedule, x_0 = NoiseSchedule(DiffusionConfig()), torch.zeros(20_000, 1)

    def below_half(shift: float) -> float:
        timesteps, _ = draw(x_0, schedule, torch.Generator().manual_seed(0), shift)
        assert timesteps.min() < 10 and timesteps.max() > 990
        return (timesteps < 500).float().mean().item()

    assert abs(below_half(1.0) - 1 / 2) < 0.02
    assert abs(below_half(2.0) - 1 / 3) < 0.02


def test_crops_differ_from_epoch_to_epoch(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 100).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("noise")
    source = SourceConfig(data=str(tmp_path), image_size=64, crop_size=8, limit=1)
    dataset = open_source(source)
    batches = GlobalBatches(dataset, batch_size=1, micro_batch_size=1, rank=0, num_processes=1)
    first, second = (dataset[rows[0]]["image"] for rows in itertools.islice(batches, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first, dataset[0]["image"])
    with pytest.raises(IndexError):
        dataset[1, 0]  # type: ignore[index]


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


def test_master_weights_are_fp32_under_autocast(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    linear = torch.nn.functional.linear

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        out = linear(*args, **kwargs)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    config = [*words("decoder", tmp_path, tiny_model), "--max-steps", "2"]
    train_decoder([*config, "--mixed-precision", "bf16", "--sample-every", "0"])
    assert torch.bfloat16 in seen  # it did autocast
    for name in ("checkpoints/step-0000002", "decoder"):
        folder = tmp_path / "run" / name
        exported = folder / "model.safetensors"
        state = load_file(exported) if exported.is_file() else read_weights(folder)
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}


# -------------------------------------------------------------------------------------- tracking


def test_wandb_works_offline_without_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc, no settings
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "")  # so that what `fit` sets is undone afterwards
    monkeypatch.delenv("WANDB_MODE")
    fit_line(tmp_path / "run", tracker="wandb", log_every=1)
    (written,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    assert written.stat().st_size > 0


@pytest.mark.filterwarnings("ignore:`log_with=tensorboard`")
@pytest.mark.skipif(
    bool(find_spec("tensorboard") or find_spec("tensorboardX")), reason="TensorBoard is installed"
)
def test_a_tracker_that_is_not_installed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pip install tensorboard"):
        fit_line(tmp_path / "run", tracker="tensorboard")


def test_a_run_is_plotted(tmp_path: Path) -> None:
    rows = [{"step": k, "samples": 4 * k, "loss": 1 / k, "val/loss": 2 / k} for k in (1, 2, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    plot([tmp_path], "loss", tmp_path / "new/loss.png")
    with Image.open(tmp_path / "new/loss.png") as drawn:
        assert len(set(drawn.convert("RGB").resize((60, 35)).getdata())) > 20
    with pytest.raises(ValueError, match="got cosine: choose one of loss, samples, step, val/loss"):
        plot([tmp_path], "cosine", tmp_path / "x.png")
    with pytest.raises(FileNotFoundError, match="is not the folder of a training run"):
        plot([tmp_path / "new"], "loss", tmp_path / "x.png")
