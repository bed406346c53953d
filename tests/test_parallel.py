"""Training on several processes gives what one gives; sharded, accumulated, resumed or not."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import FSDP2, run
from safetensors.torch import load_file
from test_training import DECODER, STAGES, words
from test_training import FIT as SHORT
from torch import Tensor

from unclip.data.source import SourceConfig
from unclip.diffusion import NoiseSchedule
from unclip.pipeline import UnCLIP
from unclip.training.checkpoints import read_weights
from unclip.training.consolidate import main as consolidate
from unclip.training.decoder import main as train_decoder
from unclip.training.noise import SampleGenerators, each, normal, uniform
from unclip.training.prior import main as train_prior
from unclip.training.validation import _shares, held_out_data

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


# ------------------------------------------------------------------------------ accelerate launch


def load_launch_config(name: str) -> dict[str, str]:
    """What `accelerate launch` puts into the environment for one of our configs."""
    parser = launch_command_parser()
    path = str(ROOT / f"configs/accelerate/{name}.yaml")
    arguments, _, _ = _validate_launch_command(
        parser.parse_args(["--config_file", path, "--num_processes", "2", "script.py"])
    )
    return {k: v for k, v in prepare_multi_gpu_env(arguments).items() if k not in os.environ}


def test_the_configs_ask_for_what_they_say() -> None:
    assert load_launch_config("fsdp2").items() >= FSDP2.items()
    assert "ACCELERATE_USE_FSDP" not in load_launch_config("ddp")
    for name in ("single", "ddp", "fsdp2"):
        values = yaml.safe_load((ROOT / f"configs/accelerate/{name}.yaml").read_text())
        assert values["mixed_precision"] == "bf16"
    zero3 = load_config_from_file(str(ROOT / "configs/accelerate/zero3.yaml"))
    assert zero3.distributed_type == "DEEPSPEED" and zero3.deepspeed_config["zero_stage"] == 3


def test_deepspeed_is_refused(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SystemExit):
        train_prior(words("prior", tmp_path, tiny_model))
    assert "fsdp2.yaml" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- shards


def sharded_state(argv: list[str], told: Path) -> None:
    """Train sharded in bf16, and tell how weights, averages and optimizer are kept."""
    from torch.distributed.tensor import DTensor

    import unclip.training.state as module

    kept: list[Any] = []
    made = module.Trained

    def watched(*args: Any) -> Any:
        kept.append(made(*args))
        return kept[0]

    module.Trained = watched  # type: ignore[misc]
    train_prior(argv)
    state = kept[0].state()
    optimizer = [
        v for named in state["optimizer"]["state"].values() for k, v in named.items() if "exp" in k
    ]
    parameters = dict(kept[0].module.named_parameters())
    weights = [state["model"][name] for name in parameters]
    facts = {
        "sharded": all(
            isinstance(t, DTensor) for t in [*weights, *state["ema"].values(), *optimizer]
        ),
        "dtypes": sorted({str(t.dtype) for t in [*weights, *state["ema"].values(), *optimizer]}),
        "share": sum(t.to_local().numel() for t in weights) / sum(t.numel() for t in weights),
        "counts": [len(weights), len(state["ema"]), len(optimizer)],
    }
    if os.environ["RANK"] == "0":
        told.write_text(json.dumps(facts))


def test_weights_averages_and_optimizer_are_sharded_in_fp32(
    tmp_path: Path, tiny_model: Path
) -> None:
    argv = [*words("prior", tmp_path, tiny_model), "--mixed-precision", "bf16"]
    argv += ["--activation-checkpointing", "true", "--max-steps", "2"]
    run(2, sharded_state, [argv, tmp_path / "told.json"], tmp_path / "logs", **FSDP2)
    facts = json.loads((tmp_path / "told.json").read_text())
    assert facts["sharded"] and facts["dtypes"] == ["torch.float32"]
    assert 0.4 < facts["share"] < 0.6
    weights, averages, moments = facts["counts"]
    assert weights == averages == moments / 2 > 20


def test_a_sharded_checkpoint_becomes_one_folder_to_sample_from(
    tmp_path: Path, tiny_model: Path
) -> None:
    argv = [*words("prior", tmp_path, tiny_model), "--keep-checkpoints", "2"]
    run(2, train_prior, [argv], tmp_path / "logs", **FSDP2)
    consolidate([str(tmp_path / "run"), "--out", str(tmp_path / "deep/out")])
    exported = load_file(tmp_path / "run/prior/model.safetensors")
    written = load_file(tmp_path / "deep/out/prior/model.safetensors")
    assert all(torch.equal(written[name], exported[name]) for name in exported)
    earlier = ["--step", "2", "--weights", "model"]
    consolidate([str(tmp_path / "run"), "--out", str(tmp_path / "out"), *earlier])
    at_2 = load_file(tmp_path / "out/prior/model.safetensors")
    assert any(not torch.equal(at_2[name], exported[name]) for name in exported)
    pipe = UnCLIP.from_pretrained(tmp_path / "out")
    embed = pipe.prior.network.out.weight  # type: ignore[union-attr]
    assert torch.equal(embed, at_2["network.out.weight"])


# ------------------------------------------------------------------------------------- randomness


def test_what_is_drawn_for_a_sample_does_not_depend_on_its_batch() -> None:
    cpu = torch.device("cpu")

    def drawn(*seeds: int) -> list[Tensor]:
        generator = SampleGenerators(seeds, cpu)
        return [
            uniform(generator, len(seeds), 2, device=cpu),
            normal(generator, len(seeds), 3, 4, device=cpu),
        ]

    for both, first, second in zip(drawn(1, 2), drawn(1), drawn(2), strict=True):
        assert torch.equal(both, torch.cat([first, second]))
        assert not torch.equal(first, second)
    twice = uniform(SampleGenerators([1, 2], cpu), 4, device=cpu)  # two rows a sample
    assert torch.equal(twice[::2], uniform(SampleGenerators([1], cpu), 2, device=cpu))
    assert len(set(twice.tolist())) == 4
    with pytest.raises(ValueError, match="a multiple"):
        uniform(SampleGenerators([1, 2], cpu), 3, device=cpu)
    assert len(each(SampleGenerators([1, 2], cpu), 2)) == 2  # type: ignore[arg-type]
    one = torch.Generator()
    assert each(one, 2) is one


# -------------------------------------------------------------------------------- held-out losses


def test_held_out_samples_are_shared_out_once_each() -> None:
    for count, batch_size, world in ((7, 2, 2), (1, 4, 3), (8, 4, 2), (5, 2, 1)):
        shares = [list(_shares(count, batch_size, rank, world)) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1  # nobody waits for ever
        rows = sorted(row for share in shares for rows in share for row in rows)
        assert rows == list(range(count))


def test_held_out_data_is_named_or_the_worlds_own(pictures: Path) -> None:
    assert held_out_data(SourceConfig(data=str(pictures)), None) is None
    named = held_out_data(SourceConfig(limit=3), str(pictures))
    assert named is not None and len(named) == 10  # type: ignore[arg-type]
    shapes = held_out_data(SourceConfig(), None)
    assert shapes is not None and "held_out" in shapes[0]["key"]


def test_the_held_out_loss_is_of_the_averages_and_stays_the_same(
    tmp_path: Path, tiny_model: Path, pictures: Path
) -> None:
    flags = ["--val-data", str(pictures), "--val-samples", "5", "--validate-every", "1"]
    flags += ["--log-every", "1"]
    still = [*words("prior", tmp_path, tiny_model, "still"), *flags, "--learning-rate", "1e-12"]
    train_prior(still)
    one, *others = trace(tmp_path / "still", "val/loss", "val/cosine")
    assert len(others) == 3
    for other in others:
        assert other == pytest.approx(one, abs=1e-5)
    # The averages do not follow one step of training: 0.999 of them is what they began with.
    plain = [*words("prior", tmp_path, tiny_model, "plain"), *flags, "--learning-rate", "0.1"]
    train_prior([*plain, "--max-steps", "3"])
    train_prior(
        [
            *words("prior", tmp_path, tiny_model, "raw"),
            *plain[4:],
            "--max-steps",
            "3",
            "--ema-decay",
            "0",
        ]
    )
    averaged, raw = (trace(tmp_path / name, "val/loss", "loss") for name in ("plain", "raw"))
    assert [line[1] for line in averaged] == [line[1] for line in raw]  # the same training
    assert averaged[-1][0] != raw[-1][0]


# ------------------------------------------------------------------------------------ the switches


def test_recomputed_activations_give_the_same_weights(tmp_path: Path, tiny_model: Path) -> None:
    stage, short = "decoder", ["--max-steps", "2", "--sample-every", "0"]
    train_decoder([*words(stage, tmp_path, tiny_model, "kept"), *short])
    again = [*words(stage, tmp_path, tiny_model, "again"), *short]
    train_decoder([*again, "--activation-checkpointing", "true"])
    kept, recomputed = (
        load_file(tmp_path / name / stage / "model.safetensors") for name in ("kept", "again")
    )
    for name, tensor in kept.items():  # dropout included: its mask is drawn again
        torch.testing.assert_close(recomputed[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.slow
def test_compiled_blocks_train_alike(tmp_path: Path, tiny_model: Path) -> None:
    train_prior([*words("prior", tmp_path, tiny_model, "plain"), "--compile", "false"])
    train_prior([*words("prior", tmp_path, tiny_model, "fast"), "--compile", "true"])
    plain, fast = (trace(tmp_path / name, "loss", "grad_norm") for name in ("plain", "fast"))
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(plain), atol=1e-4, rtol=1e-4)


SMALL = "image_size: 16, patch_size: 2"


def test_averages_dropout_and_learned_variance_in_bf16(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is worked out in fp32 under autocast, training resumes exactly, and the averages
    are fp32 and between the weights they are of."""
    seen: dict[str, set[torch.dtype]] = {"output": set(), "bound": set()}
    bound, split = NoiseSchedule.vlb, NoiseSchedule.split_output

    def watched_bound(self: Any, prediction: Tensor, *args: Any) -> Tensor:
        found = bound(self, prediction, *args)
        seen["bound"] |= {prediction.dtype, found.dtype}
        return found

    def watched_split(self: Any, output: Tensor, x_t: Tensor) -> Any:
        seen["output"].add(output.dtype)
        return split(self, output, x_t)

    monkeypatch.setattr(NoiseSchedule, "vlb", watched_bound)
    monkeypatch.setattr(NoiseSchedule, "split_output", watched_split)
    values = yaml.safe_load(DECODER.replace("image_size: 64, patch_size: 4", SMALL))
    values["decoder"]["diffusion"] = {"variance": "learned_range", "prediction_type": "eps"}
    values["decoder"]["network"]["learned_variance"] = True
    values["decoder"]["network"]["unet"] |= {"out_channels": 6, "dropout": 0.1}
    fit_values = yaml.safe_load(SHORT)["fit"]
    path = tmp_path / "learned.yaml"
    path.write_text(yaml.safe_dump({"base": str(tiny_model), **values, "fit": fit_values}))
    flags = ["--config", str(path), "--mixed-precision", "bf16", "--sample-every", "0"]
    train_decoder([*flags, "--run", str(tmp_path / "whole")])
    assert seen == {"output": {torch.bfloat16}, "bound": {torch.float32}}
    train_decoder([*flags, "--run", str(tmp_path / "halves"), "--max-steps", "2"])
    train_decoder([*flags, "--run", str(tmp_path / "halves")])
    for part in ("model", "ema"):
        whole, halves = (
            read_weights(tmp_path / name / "checkpoints/step-0000004", part)  # type: ignore
            for name in ("whole", "halves")
        )
        assert whole and {t.dtype for t in whole.values()} == {torch.float32}
        assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert trace(tmp_path / "whole", "vlb") == trace(tmp_path / "halves", "vlb")
