"""Fine-tuning: from every format of a model, frozen parts, LoRA adapters, and what is refused."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from conftest import liven, write_tiny_clip
from safetensors.torch import load_file, save_file
from test_dalle2_pytorch import recorded as recorded_prior
from test_dalle2_pytorch import write as write_dalle2_pytorch
from test_diffusers_format import add_image_encoder
from test_diffusers_format import karlo as diffusers_karlo  # noqa: F401
from test_glide import folder as glide_files  # noqa: F401
from test_glide import vocabulary  # noqa: F401
from test_karlo import folder as karlo_files  # noqa: F401
from test_training import DECODER, FIT, PRIOR, STAGES, UPSAMPLER
from torch import nn

from unclip.config import from_dict, to_dict
from unclip.diffusion import make_generators
from unclip.hub import Stages, load_dalle2_pytorch_prior, load_stages, save_stages
from unclip.hub import karlo as karlo_format
from unclip.hub.__main__ import main as hub_main
from unclip.lora import LoRAConfig, add_adapter, merge_adapter, save_adapter
from unclip.models import PriorTransformer
from unclip.pipeline import UnCLIP
from unclip.priors import DiffusionPriorConfig
from unclip.stages import UpsamplerStage
from unclip.training.checkpoints import read_weights, seal
from unclip.training.finetune import RUNS_OWN, start_from

pytestmark = pytest.mark.filterwarnings("ignore:the caption has more than")

CONFIGS = {"prior": PRIOR, "decoder": DECODER, "upsampler": UPSAMPLER}


def train(stage: str, folder: Path, run: str, *flags: str) -> Path:
    """Train a stage by the tiny config of test_training, whose sizes are no other model's; returns
    the run's folder."""
    config = folder / f"{stage}.yaml"
    config.write_text(CONFIGS[stage] + FIT)
    STAGES[stage][0](["--config", str(config), "--run", str(folder / run), *flags])
    return folder / run


@pytest.fixture
def small_clip(tmp_path: Path) -> Path:
    """A CLIP of the sizes that the recorded models of others have."""
    write_tiny_clip(tmp_path / "small_clip", embed_dim=24, width=24, context_length=8)
    return tmp_path / "small_clip"


def model_of(kind: str, request: pytest.FixtureRequest, folder: Path) -> list[str]:
    """The flags that start a run from a model of some format."""
    if kind == "ours":
        return ["--init", str(request.getfixturevalue("tiny_model"))]
    if kind == "diffusers":
        copy = shutil.copytree(request.getfixturevalue("diffusers_karlo"), folder / "karlo")
        add_image_encoder(Path(copy), "feature_extractor")
        return ["--init", str(copy)]
    clip = request.getfixturevalue("small_clip")
    if kind == "karlo":
        request.getfixturevalue("monkeypatch").setattr(karlo_format, "CLIP_NAME", str(clip))
        return ["--init", str(request.getfixturevalue("karlo_files"))]
    if kind.startswith("glide"):
        files = Path(request.getfixturevalue("glide_files"))
        return ["--init", str(files / "base_inpaint.pt" if kind == "glide_inpaint" else files)]
    case = recorded_prior("1.15.6", "released")
    prior = write_dalle2_pytorch(folder / "laion", case) / "prior.pth"
    return ["--init", str(prior), "--clip", str(clip)]


def stage_of(name: Path | str, stage: str) -> Any:
    stages = load_stages(name, only={"upsamplers" if stage == "upsampler" else stage})
    return stages.upsamplers[0] if stage == "upsampler" else getattr(stages, stage)


def plain(values: Any) -> Any:
    """A config's values without those that stay the run's."""
    if not isinstance(values, dict):
        return values
    # A tokenizer from a folder is saved within the stage's.
    return {k: plain(v) for k, v in values.items() if k not in {*RUNS_OWN, "tokenizer"}}


def files(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# ------------------------------------------------------------------------------- where it starts

FORMATS = [
    *(("ours", stage) for stage in STAGES),
    *(("diffusers", stage) for stage in STAGES),
    *(("karlo", stage) for stage in STAGES),
    ("dalle2_pytorch", "prior"),
    ("glide", "decoder"),
    ("glide", "upsampler"),
    ("glide_inpaint", "decoder"),
]


@pytest.mark.parametrize(("kind", "stage"), FORMATS)
def test_a_run_starts_from_a_model_of_any_format(
    kind: str,
    stage: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flags = model_of(kind, request, tmp_path)
    initial = stage_of(flags[1], stage)
    one_step = ["--max-steps", "1", "--learning-rate", "1e-9", "--sample-every", "0"]
    run = train(stage, tmp_path, "run", *flags, *one_step)
    trained = stage_of(run, stage)
    assert type(trained.network) is type(initial.network)
    for name, tensor in initial.state_dict().items():  # the prior's statistics among them
        torch.testing.assert_close(trained.state_dict()[name], tensor, atol=1e-6, rtol=0, msg=name)

    resolved = yaml.safe_load((run / "config.yaml").read_text())
    saved = yaml.safe_load((run / stage / "config.yaml").read_text())
    theirs = plain(to_dict(initial.config))
    for values in (resolved[stage], {k: saved[k] for k in resolved[stage]}):
        assert plain(values) == theirs
    assert yaml.safe_load((run / "unclip.yaml").read_text())["base"] == os.path.relpath(
        Path(flags[1]).resolve(), run.resolve()
    )
    if kind != "ours" or stage == "decoder":
        (said,) = [r.getMessage() for r in caplog.records if "decides what" in r.getMessage()]
        assert said.startswith(f"{flags[1]} decides what is trained: {stage}.network")


def test_training_settings_stay_the_runs_and_the_network_answers_as_before(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = ["--prior.network.dropout", "0.25", "--prior.diffusion.weighting", "min_snr"]
    run = train("prior", tmp_path, "run", "--init", str(tiny_model), "--max-steps", "1", *settings)
    config = stage_of(run, "prior").config
    assert (config.network.dropout, config.diffusion.weighting) == (0.25, "min_snr")

    initial = stage_of(tiny_model, "prior")
    started = start_from(initial, DiffusionPriorConfig()).eval()
    text = {"text_embed": torch.randn(2, 16), "text_encodings": torch.randn(2, 5, 32)}
    x_t, timesteps = torch.randn(2, 16), torch.tensor([3, 900])
    ours, theirs = (
        p.network(x_t, timesteps, p.network.encode_context(**text)) for p in (started, initial)
    )
    assert torch.equal(ours, theirs)


def test_a_prior_without_a_null_condition_keeps_its_captions(
    small_clip: Path, tmp_path: Path
) -> None:
    folder = write_dalle2_pytorch(tmp_path / "laion", recorded_prior("1.8.4", "released"))
    (folder / "prior_config.json").unlink()
    initial = load_dalle2_pytorch_prior(folder, version="1.8.4")
    assert start_from(initial, DiffusionPriorConfig()).config.network.text_drop_prob == 0


def test_the_second_network_of_an_upsampler_is_left_alone(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    flags = model_of("karlo", request, tmp_path)
    initial = stage_of(flags[1], "upsampler")
    run = train("upsampler", tmp_path, "run", *flags, "--max-steps", "1", "--sample-every", "0")
    trained = stage_of(run, "upsampler")
    assert isinstance(trained, UpsamplerStage) and trained.final_network is not None
    after = trained.final_network.state_dict()
    assert all(torch.equal(after[k], v) for k, v in initial.final_network.state_dict().items())
    state = trained.network.state_dict()
    assert any(not torch.equal(state[k], v) for k, v in initial.network.state_dict().items())


def test_the_upsampler_to_the_configured_size_is_taken(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = load_stages(tiny_model)
    (first,) = stages.upsamplers
    larger = first.config.network.unet.image_size * first.config.network.scale
    values = to_dict(first.config)
    values["network"]["unet"]["image_size"] = larger
    second = UpsamplerStage(from_dict(type(first.config), values))
    both = Stages(stages.clip, stages.prior, stages.decoder, [first, second])
    save_stages(both, tmp_path / "both", dtype=None)
    init = ["--init", str(tmp_path / "both"), "--max-steps", "1", "--sample-every", "0"]
    size = "--upsampler.network.unet.image_size"
    run = train("upsampler", tmp_path, "run", *init, size, str(larger))
    assert f"image_size: {larger}" in (run / "upsampler" / "config.yaml").read_text()
    with pytest.raises(SystemExit):
        train("upsampler", tmp_path, "other", *init, size, "128")
    assert "init must have an upsampler to 128 px; got" in capsys.readouterr().err


# --------------------------------------------------------------------------------- frozen parts


@pytest.mark.parametrize(
    ("stage", "flags", "trained"),
    [
        ("prior", ["--train-only", "blocks.*.qkv", "out"], ("blocks.0.qkv", "blocks.1.qkv", "out")),
        ("decoder", ["--freeze", "unet", "text_to_tokens"], ("image_to", "null_")),
    ],
)
def test_frozen_parts_stay_bit_for_bit_and_the_run_resumes_exactly(
    stage: str, flags: list[str], trained: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    flags = ["--init", str(tiny_model), *flags]
    whole = train(stage, tmp_path, "whole", *flags)
    before = load_file(tiny_model / stage / "model.safetensors")
    after = load_file(whole / stage / "model.safetensors")
    chosen = {name for name in before if name.removeprefix("network.").startswith(trained)}
    assert {n for n in before if not torch.equal(before[n], after[n])} <= chosen
    for part in trained:
        names = [name for name in chosen if name.removeprefix("network.").startswith(part)]
        assert any(not torch.equal(before[name], after[name]) for name in names), part

    buffers = {"network.mean", "network.std"} if stage == "prior" else set()
    for run in (whole, tmp_path / "halves"):
        if not run.exists():
            train(stage, tmp_path, "halves", *flags, "--max-steps", "2")
            train(stage, tmp_path, "halves", *flags)
        state = read_weights(run / "checkpoints/step-0000004")
        assert set(state) == {f"network.{name}" for name in chosen} | buffers
    halves = load_file(tmp_path / "halves" / stage / "model.safetensors")
    assert all(torch.equal(halves[name], after[name]) for name in after)


def test_a_checkpoint_that_lacks_what_is_trained_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--init", str(tiny_model), "--freeze", "blocks.0"]
    run = train("prior", tmp_path, "run", *flags, "--max-steps", "2")
    folder = run / "checkpoints/step-0000002"
    state = read_weights(folder)
    rewrite(folder, {k: v for k, v in state.items() if "blocks.1.qkv" not in k})
    with pytest.raises(SystemExit):
        train("prior", tmp_path, "run", *flags)
    assert "step-0000002 lacks model.network.network.blocks.1.qkv.bias" in capsys.readouterr().err
    rewrite(folder, {**state, "network.network.other": torch.ones(1)})
    with pytest.raises(SystemExit):
        train("prior", tmp_path, "run", *flags)
    assert "has no place for model.network.network.other" in capsys.readouterr().err
    name = "network.network.blocks.1.qkv.bias"
    rewrite(folder, {**state, name: state[name][1:]})
    with pytest.raises(SystemExit):
        train("prior", tmp_path, "run", *flags)
    error = capsys.readouterr().err
    assert f"has other shapes: model.{name} [95] there, [96] here" in error
    assert "--fresh" in error


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Give a checkpoint other weights, and the sums that say that all is well."""
    state = {"model": weights, "ema": read_weights(folder, "ema")}
    (folder / "SHA256SUMS").unlink()
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    seal(folder)


def test_a_run_does_not_go_on_from_another_init(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    flags = ["--init", str(model), "--lora.rank", "2"]
    train("prior", tmp_path, "run", *flags, "--max-steps", "2")
    path = model / "prior/model.safetensors"
    state = load_file(path)
    save_file({**state, "network.out.bias": state["network.out.bias"] + 1}, path)
    with pytest.raises(SystemExit):
        train("prior", tmp_path, "run", *flags)
    assert "init must hold the weights that this run started from" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- LoRA


def unmerged(base: Path, run: Path, stage: str) -> Any:
    """The base's stage with the adapter beside its weights, as peft itself loads it."""
    loaded = stage_of(base, stage)
    network = peft.PeftModel.from_pretrained(loaded.network, str(run / "lora")).eval()
    assert any("lora_B" in name for name, _ in loaded.network.named_parameters())
    assert network.base_model.model is loaded.network
    return loaded


@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_is_saved_apart_resumes_exactly_and_merges(
    stage: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    there = files(base)
    flags = ["--init", str(base), "--lora.rank", "2", "--lora.dropout", "0.1"]
    flags += ["--learning-rate", "0.03"]  # so that it is seen
    run = train(stage, tmp_path, "whole", *flags)
    assert files(base) == there
    assert sorted(path.name for path in (run / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((run / "lora/adapter_config.json").read_text())["r"] == 2
    assert not (run / stage).exists()
    values = yaml.safe_load((run / "unclip.yaml").read_text())
    name = {"upsampler": "upsampler_64"}.get(stage, stage)
    assert (values["base"], values["lora"], values["stages"]) == ("../model", {name: "lora"}, {})
    state = read_weights(run / "checkpoints/step-0000004")
    assert all("lora_" in key or key in ("network.mean", "network.std") for key in state)
    assert stage == "prior" or (run / "samples/step-0000004.png").is_file()

    train(stage, tmp_path, "halves", *flags, "--max-steps", "2")
    halves = train(stage, tmp_path, "halves", *flags)
    adapter, checkpoint = Path("lora/adapter_model.safetensors"), Path("checkpoints/step-0000004")
    for read, file in ((load_file, adapter), (read_weights, checkpoint)):
        resumed, straight = read(halves / file), read(run / file)
        assert resumed.keys() == straight.keys()
        assert all(torch.equal(resumed[key], straight[key]) for key in straight)

    assert hub_main(["export", "--to", "unclip", "--out", str(tmp_path / "out"), str(run)]) == 0
    drawn = [draw(model, stage) for model in (UnCLIP.from_pretrained(run), tmp_path / "out")]
    beside = UnCLIP.from_pretrained(base)
    other = unmerged(base, run, stage)
    if stage == "upsampler":
        beside.upsamplers = [other]
    else:
        setattr(beside, stage, other)
    drawn.append(draw(beside, stage))
    for picture in drawn[1:]:
        torch.testing.assert_close(picture, drawn[0], atol=1e-5, rtol=0)
    assert (draw(base, stage) - drawn[0]).abs().max() > 1e-3
    alone = UnCLIP.from_pretrained(base, **{stage: run})
    torch.testing.assert_close(draw(alone, stage), drawn[0], atol=1e-5, rtol=0)


def draw(model: Any, stage: str) -> torch.Tensor:
    """What one stage of a model draws."""
    model = model if isinstance(model, UnCLIP) else UnCLIP.from_pretrained(model)
    text = model.clip.encode_text(["a red circle"])
    if stage == "prior":
        return model.prior.sample(text, generators=make_generators(0, 1), num_inference_steps=4)
    steps = {"prior_steps": 2, "decoder_steps": 2, "upsampler_steps": 2}
    drawn = model(["a red circle"], seed=0, guidance_scale=1.0, **steps)
    return drawn.by_size[16 if stage == "decoder" else 64]


def test_adapters_stand_on_one_another_and_a_whole_stage_hides_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    short = ["--max-steps", "2", "--learning-rate", "0.1"]
    first = train("prior", tmp_path, "first", "--init", str(tiny_model), "--rank", "2", *short)
    second = train("prior", tmp_path, "second", "--init", str(first), "--rank", "3", *short)
    by_hand = stage_of(tiny_model, "prior")
    for run in (first, second):
        merge_adapter(by_hand.network, run / "lora")
    merged = stage_of(second, "prior").state_dict()
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0, msg=name)
    assert all(parameter.requires_grad for parameter in by_hand.parameters())

    whole = train("prior", tmp_path, "third", "--init", str(second), "--max-steps", "1")
    saved = load_file(whole / "prior/model.safetensors")
    loaded = stage_of(whole, "prior").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


def test_targets_choose_the_adapted_layers(tiny_model: Path) -> None:
    decoder = stage_of(tiny_model, "decoder")
    add_adapter(decoder.network, LoRAConfig(rank=2, targets=("unet.conv_in", "*.attention")))
    trained = {n for n, p in decoder.network.named_parameters() if p.requires_grad}
    layers = {name.split(".lora_")[0] for name in trained}
    assert "unet.conv_in" in layers and "unet.middle.0.attention.context_kv" in layers
    assert all(name == "unet.conv_in" or ".attention." in name for name in layers)


def test_two_processes_train_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "prior.yaml"
    config.write_text(PRIOR + FIT)
    words = ["--config", str(config), "--run", str(tmp_path / "run")]
    words += ["--init", str(tiny_model), "--lora.rank", "2", "--max-steps", "2"]
    processes.run(2, STAGES["prior"][0], [words], tmp_path / "logs")
    assert (tmp_path / "run/lora/adapter_model.safetensors").is_file()
    processes.run(2, STAGES["prior"][0], [[*words, "--max-steps", "4"]], tmp_path / "logs")
    assert (tmp_path / "run/checkpoints/step-0000004").is_dir()


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--freeze", "blocks.0.qvk"],
            r"got 'blocks.0.qvk', which fits none: did you mean blocks.0.qkv",
        ),
        (["--freeze", "*.qvk"], "did you mean *.qkv?"),
        (
            ["--train-only", "nothing"],
            "train_only must name parts of the PriorTransformer; got 'no",
        ),
        (
            ["--freeze", "*"],
            "freeze must leave something to train; got ['*'], which leaves nothing",
        ),
        (["--train-only", "out", "--freeze", "out"], "which leaves nothing of ['out']: its parts"),
        (["--rank", "2", "--freeze", "out"], "freeze must be left out with lora"),
        (["--rank", "0"], "lora.rank must be at least 1; got 0: use 8"),
        (
            ["--lora.targets", "*.qvk"],
            "lora.targets must name parts of the PriorTransformer; got '*",
        ),
        (["--lora.targets", "norm_out"], "got 'norm_out', which fits none"),
    ],
)
def test_what_cannot_be_trained_is_told(
    flags: list[str],
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        train("prior", tmp_path, "run", "--init", str(tiny_model), *flags)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_adapter_needs_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train("prior", tmp_path, "run", "--lora.rank", "4")
    assert "lora needs a model to adapt; got rank 4 and no init" in capsys.readouterr().err


def test_an_adapter_stands_on_what_it_adapts(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--init", str(tiny_model), "--base", "shapes", "--rank", "2"]
    with pytest.raises(SystemExit):
        train("prior", tmp_path, "run", *flags)
    assert "base must be init with lora" in capsys.readouterr().err


def test_an_init_without_the_stage_is_refused(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train("decoder", tmp_path, "run", *model_of("dalle2_pytorch", request, tmp_path))
    assert "init must have a decoder; got" in capsys.readouterr().err


def test_a_run_cannot_stand_on_itself(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "run")
    with pytest.raises(SystemExit):
        train("prior", tmp_path, "run", "--init", str(tmp_path / "run"))
    assert "run must be another folder than init" in capsys.readouterr().err


def test_a_model_without_a_clip_or_without_its_image_tower_says_what_to_pass(
    request: pytest.FixtureRequest,
    small_clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    init, _ = model_of("dalle2_pytorch", request, tmp_path)[:2], small_clip
    with pytest.raises(SystemExit):
        train("prior", tmp_path, "run", *init)
    said = capsys.readouterr().err
    assert f"clip must be set where the model has none; got init {init[1]}" in said
    assert "--clip ViT-L-14/openai" in said

    karlo = str(request.getfixturevalue("diffusers_karlo"))
    for stage in ("prior", "decoder"):
        with pytest.raises(SystemExit):
            train(stage, tmp_path, "run", "--init", karlo)
        said = capsys.readouterr().err
        assert (
            f"clip must have an image tower to train on pictures; got the CLIP of init {karlo}"
            in said
        )
        assert "karlo-v1-alpha-image-variations" in said

    write_tiny_clip(tmp_path / "unit", embed_dim=32, width=32, context_length=24)
    with pytest.raises(SystemExit):
        train("prior", tmp_path, "run", "--init", karlo, "--clip", str(tmp_path / "unit"))
    assert "clip must give unnormalised embeddings, as init" in capsys.readouterr().err


def test_a_clip_of_other_widths_is_refused(
    small_clip: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("prior", "decoder"):
        with pytest.raises(SystemExit):
            train(stage, tmp_path, "run", "--init", str(tiny_model), "--clip", str(small_clip))
        assert "must be the CLIP's embed_dim, 24; got 16" in capsys.readouterr().err


@pytest.fixture
def adapted(tiny_model: Path, tmp_path: Path) -> Path:
    """A model with an adapter of its prior, and nothing else."""
    network = stage_of(tiny_model, "prior").network
    add_adapter(network, LoRAConfig(rank=2))
    liven(network)
    folder = tmp_path / "adapted"
    save_adapter(network, folder / "lora")
    values = {"format": "unclip", "version": 1, "base": str(tiny_model), "lora": {"prior": "lora"}}
    (folder / "unclip.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_an_adapter_that_does_not_fit_its_base_is_refused(adapted: Path, tiny_model: Path) -> None:
    assert stage_of(adapted, "prior") is not None
    config = stage_of(tiny_model, "prior").config.network
    other: nn.Module
    for field, value, message in (
        ("width", 48, r"lora_A.weight \[2, 32\] for \[2, 48\].* trained on another model"),
        ("depth", 1, r"blocks.1.mlp.0.lora_A.weight \[2, 32\] for nothing"),
    ):
        other = PriorTransformer(type(config)(**{**vars(config), field: value}))
        with pytest.raises(ValueError, match=message):
            merge_adapter(other, adapted / "lora")
    other = stage_of(tiny_model, "decoder").network
    with pytest.raises(ValueError, match="does not fit the Decoder of its base: Target modules"):
        merge_adapter(other, adapted / "lora")


def test_a_damaged_adapter_is_named(adapted: Path) -> None:
    path = adapted / "lora/adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is truncated or damaged"):
        load_stages(adapted)
    (adapted / "lora/adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing"):
        load_stages(adapted)
    shutil.rmtree(adapted / "lora")
    with pytest.raises(FileNotFoundError, match=r"lacks its adapter"):
        load_stages(adapted)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"priors": "lora"}, "unknown key 'lora.priors': did you mean 'prior'"),
        ({"upsampler": "lora"}, "unknown key 'lora.upsampler'"),
        (["prior"], "lora must map stages to sub-folders"),
        ({"upsampler_512": "lora"}, "adapts upsampler_512, which neither it nor its base has"),
    ],
)
def test_adapters_of_nothing_are_refused(adapted: Path, adapters: object, message: str) -> None:
    values = yaml.safe_load((adapted / "unclip.yaml").read_text())
    (adapted / "unclip.yaml").write_text(yaml.safe_dump({**values, "lora": adapters}))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_stages(adapted)
