"""Models by name, folder and Hub repository: what loads, what completes what, what is refused."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_tiny_clip

from unclip.hub import load_clip_of, load_stages, names, resolve, save_stages, write_run_model
from unclip.hub.__main__ import main as hub_main

REVISION = "0123456789abcdef0123456789abcdef01234567"


def edit_yaml(path: Path, **changes: object) -> None:
    """Set keys of a YAML file; None takes one out."""
    values = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def shipped(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model as one that ships under the name `tiny`."""
    shutil.copytree(tiny_model, tmp_path / "pretrained" / "tiny")
    monkeypatch.setattr(names, "PRETRAINED", tmp_path / "pretrained")


# ------------------------------------------------------------------------------------- names


def test_a_shipped_name_wins_over_a_folder(
    shipped: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny") == tmp_path / "pretrained" / "tiny"
    assert resolve("./tiny") == Path("tiny")


@pytest.mark.parametrize("name", ["tinny", "../elsewhere/x", "a/b/c", "org/..", "-org/name", ""])
def test_a_name_that_is_nothing_lists_the_shipped_ones(shipped: None, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="shipped models: tiny"):
        resolve(name)


def test_a_repository_loads_from_the_local_cache(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    shutil.copytree(tiny_model, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    there = repository / "snapshots" / REVISION
    assert resolve("org/name").resolve() == there.resolve()
    assert resolve(f"org/name@{REVISION}").resolve() == there.resolve()
    assert load_stages("org/name", only={"prior"}).prior is not None
    with pytest.raises(FileNotFoundError, match="no folder 'org/other' here, and the Hub's"):
        resolve("org/other")
    with pytest.raises(FileNotFoundError, match="org/name@v2"):
        resolve("org/name@v2")


# ----------------------------------------------------------------------------- save and load


def test_saving_and_loading_changes_nothing(model: Path, tmp_path: Path) -> None:
    first = load_stages(model)
    save_stages(first, tmp_path / "again", dtype=None)
    again = load_stages(tmp_path / "again")
    assert first.clip is not None and again.clip is not None
    assert first.clip.fingerprint() == again.clip.fingerprint()
    for one, other in zip(
        [first.prior, first.decoder, *first.upsamplers],
        [again.prior, again.decoder, *again.upsamplers],
        strict=True,
    ):
        assert one is not None and other is not None
        assert one.config == other.config
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_model_saved_in_half_precision_is_half_as_large(model: Path, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        save_stages(load_stages(model), tmp_path / "half", dtype)
        small, large = (
            (folder / "decoder" / "model.safetensors").stat().st_size
            for folder in (tmp_path / "half", model)
        )
        assert small < 0.6 * large
        stages = load_stages(tmp_path / "half")  # its CLIP is still known by its fingerprint
        assert stages.prior is not None and stages.prior.mean.dtype == torch.float32


def test_dtype_casts_networks_and_nothing_else(model: Path) -> None:
    stages = load_stages(model, dtype=torch.bfloat16)
    assert stages.clip is not None and stages.prior is not None and stages.decoder is not None
    assert next(stages.clip.parameters()).dtype == torch.float32
    assert stages.prior.mean.dtype == torch.float32
    networks = (stages.prior.network, stages.decoder.network, stages.upsamplers[0].network)
    for network in networks:
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


def test_saving_never_replaces_what_is_no_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    for name in ("mine", "file"):
        with pytest.raises(OSError, match="choose a new folder"):
            save_stages(load_stages(model), tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_clip_that_came_by_name_is_named(model: Path, tmp_path: Path) -> None:
    stages = load_stages(model)
    assert stages.clip is not None
    stages.clip.name = "ViT-L-14/openai"
    save_stages(stages, tmp_path / "named")
    values = yaml.safe_load((tmp_path / "named" / "unclip.yaml").read_text())
    assert values["stages"]["clip"] == "ViT-L-14/openai"
    assert not (tmp_path / "named" / "clip").exists()


# ------------------------------------------------------------------------------ runs and bases


def make_run(model: Path, run: Path, stage: str, base: str | None, **kwargs: str | None) -> Path:
    """A training run's folder with one stage of a model."""
    run.mkdir()
    source = {"upsampler": "upsampler_64"}.get(stage, stage)
    shutil.copytree(model / source, run / stage)
    write_run_model(run, stage, base, kwargs.pop("clip", None), **kwargs)  # type: ignore[arg-type]
    return run


def test_a_base_completes_a_run(model: Path, tmp_path: Path) -> None:
    run = make_run(model, tmp_path / "run", "prior", str(model))
    shutil.rmtree(model / "prior")
    stages = load_stages(run)
    assert stages.clip is not None and stages.prior is not None and stages.decoder is not None
    assert [up.image_size for up in stages.upsamplers] == [64]


def test_run_and_base_may_move_together(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    moved = shutil.move(model, tmp_path / "a" / "model")
    make_run(Path(moved), tmp_path / "a" / "run", "decoder", str(moved))
    (tmp_path / "a").rename(tmp_path / "b")
    assert load_stages(tmp_path / "b" / "run").decoder is not None


def test_a_run_may_stand_on_a_clip_of_its_own(model: Path, tmp_path: Path) -> None:
    write_tiny_clip(tmp_path / "clip", seed=1)
    run = make_run(model, tmp_path / "run", "prior", str(model), clip=str(tmp_path / "clip"))
    clip = load_clip_of(str(run))
    assert clip.fingerprint() == load_clip_of(str(tmp_path / "clip")).fingerprint()
    assert clip.fingerprint() != load_clip_of(str(model)).fingerprint()
    # The decoder of the base was trained on the base's.
    with pytest.raises(ValueError, match=r"decoder of .*model must run on the CLIP of training"):
        load_stages(run)


def test_a_run_may_take_the_clip_of_a_model(model: Path, tmp_path: Path) -> None:
    run = make_run(model, tmp_path / "run", "prior", None, clip=str(model))
    assert yaml.safe_load((run / "unclip.yaml").read_text())["stages"]["clip"] == "../model"
    assert load_clip_of(str(run)).fingerprint() == load_clip_of(str(model)).fingerprint()


def test_a_run_remembers_which_clip_it_was_trained_on(model: Path, tmp_path: Path) -> None:
    make_run(model, tmp_path / "run", "prior", str(model), clip_fingerprint="another")
    with pytest.raises(ValueError, match=r"prior of .*run must run on the CLIP of training, anot"):
        load_stages(tmp_path / "run")


def test_an_upsampler_of_a_run_takes_its_place_in_the_chain(model: Path, tmp_path: Path) -> None:
    run = make_run(model, tmp_path / "run", "upsampler", str(model))
    assert [up.image_size for up in load_stages(run).upsamplers] == [64]
    config = run / "upsampler" / "config.yaml"
    values = yaml.safe_load(config.read_text())
    values["network"]["unet"]["image_size"] = 256
    config.write_text(yaml.safe_dump(values))
    assert [up.image_size for up in load_stages(run).upsamplers] == [64, 256]


def test_a_run_that_has_not_ended_yet_gives_its_stage(model: Path, tmp_path: Path) -> None:
    run = make_run(model, tmp_path / "run", "prior", None)
    (run / "unclip.yaml").unlink()
    (run / "config.yaml").write_text("fit: {max_steps: 3}\n")
    assert load_stages(run, only={"prior"}).prior is not None
    assert load_stages(run / "prior", only={"prior"}).prior is not None


def test_bases_in_a_circle_are_refused(model: Path, tmp_path: Path) -> None:
    one = make_run(model, tmp_path / "one", "prior", None)
    two = make_run(model, tmp_path / "two", "prior", str(one))
    edit_yaml(one / "unclip.yaml", base="../two")
    with pytest.raises(ValueError, match="go round in a circle"):
        load_stages(two)


def test_a_base_that_cannot_be_had_is_named(model: Path, tmp_path: Path) -> None:
    run = make_run(model, tmp_path / "run", "prior", "nowhere")
    with pytest.raises(FileNotFoundError, match=r"unclip.yaml names the base 'nowhere', which"):
        load_stages(run)
    assert load_stages(run, only={"prior"}).prior is not None  # nobody asked for the base


def test_assemble_makes_one_model_of_several_runs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {s: make_run(model, tmp_path / s, s, "nowhere") for s in ("prior", "decoder")}
    # What training a CLIP leaves: no unclip.yaml, the CLIP in a sub-folder.
    shutil.copytree(model / "clip", tmp_path / "runs-clip" / "clip")
    upsampler = make_run(model, tmp_path / "up", "upsampler", "nowhere")
    argv = ["assemble", "--out", str(tmp_path / "out"), "--clip", str(tmp_path / "runs-clip")]
    argv += ["--prior", str(runs["prior"]), "--decoder", str(runs["decoder"])]
    argv += ["--upsampler", str(upsampler)]
    assert hub_main(argv) == 0
    assert "MB" in capsys.readouterr().out
    assert [up.image_size for up in load_stages(tmp_path / "out").upsamplers] == [64]
    assert sorted(os.listdir(tmp_path / "out")) == [
        "clip",
        "decoder",
        "prior",
        "unclip.yaml",
        "upsampler_64",
    ]
    assert hub_main([*argv[:4], str(tmp_path / "nothing"), *argv[5:]]) == 2
    assert "error: " in capsys.readouterr().err


# --------------------------------------------------------------------------------- bad folders


def test_a_missing_stage_says_where_and_what_completes_it(model: Path) -> None:
    stages = yaml.safe_load((model / "unclip.yaml").read_text())["stages"]
    edit_yaml(model / "unclip.yaml", stages={k: v for k, v in stages.items() if k != "decoder"})
    with pytest.raises(FileNotFoundError, match=r"model lacks a decoder: add .* or a line 'base:"):
        load_stages(model)


@pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "upsampler_64"])
def test_a_missing_sub_folder_is_named(model: Path, stage: str) -> None:
    shutil.rmtree(model / stage)
    with pytest.raises(FileNotFoundError, match=f"lacks its .*says it is in .*{stage}, which is"):
        load_stages(model)


@pytest.mark.parametrize(
    "path",
    [
        "clip/open_clip_model.safetensors",
        "prior/model.safetensors",
        "decoder/model.safetensors",
        "upsampler_64/model.safetensors",
    ],
)
def test_a_truncated_file_is_named(model: Path, path: str) -> None:
    data = (model / path).read_bytes()
    (model / path).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=path.split("/")[0]) as caught:
        load_stages(model)
    assert str(model) in str(caught.value)


def test_another_clip_is_noticed_by_its_width(model: Path) -> None:
    shutil.rmtree(model / "clip")
    write_tiny_clip(model / "clip", embed_dim=24)
    edit_yaml(model / "unclip.yaml", clip_fingerprint=None)
    with pytest.raises(ValueError, match=r"embed_dim, 24; got 16: the stage was trained on ano"):
        load_stages(model)


def test_another_clip_of_the_same_width_is_noticed_too(model: Path) -> None:
    shutil.rmtree(model / "clip")
    write_tiny_clip(model / "clip", seed=1)
    with pytest.raises(ValueError, match="must run on the CLIP of training"):
        load_stages(model)


def test_an_upsampler_must_follow_the_stage_before(model: Path) -> None:
    stages = yaml.safe_load((model / "unclip.yaml").read_text())["stages"]
    stages["upsamplers"] = ["upsampler_64", "upsampler_64"]
    edit_yaml(model / "unclip.yaml", stages=stages)
    with pytest.raises(ValueError, match="must take the 64 px of the stage before it; got one fr"):
        load_stages(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format must be 'unclip'; got 'other'"),
        ({"format": None}, "format must be 'unclip'; got None"),
        ({"version": 2}, "version must be 1; got 2: install the release"),
        ({"bases": "shapes"}, "unknown key 'bases': did you mean 'base'"),
        ({"stages": {"decoders": "decoder"}}, "unknown key 'stages.decoders': did you mean 'dec"),
        ({"stages": {"upsamplers": "up"}}, r"stages.upsamplers must be a list; got 'up': write"),
        ({"stages": ["prior"]}, "stages must map stages to sub-folders"),
    ],
)
def test_a_description_that_is_wrong(model: Path, changes: dict[str, object], message: str) -> None:
    edit_yaml(model / "unclip.yaml", **changes)
    with pytest.raises(ValueError, match=message):
        load_stages(model)


def test_a_description_that_is_no_yaml(model: Path) -> None:
    (model / "unclip.yaml").write_text("stages: {clip: [")
    with pytest.raises(ValueError, match=r"unclip\.yaml is not YAML"):
        load_stages(model)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(FileNotFoundError, match=r"looked for unclip.yaml .* found notes.md\."):
        load_stages(tmp_path)
