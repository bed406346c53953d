"""The Hub for real: huggingface_hub's own client against a stand-in on this computer."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from loopback_hub import REVISION, LoopbackHub, loopback_hub
from test_dalle2_pytorch import recorded
from test_dalle2_pytorch import write as write_dalle2_pytorch
from test_glide import folder as glide_files  # noqa: F401
from test_glide import vocabulary  # noqa: F401
from test_training import words
from torchvision.utils import save_image

from unclip.hub import load_stages, publish, resolve
from unclip.hub.__main__ import main as hub_main
from unclip.hub.publish import write_repository
from unclip.pipeline import UnCLIP
from unclip.training.prior import main as train_prior


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with loopback_hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def test_a_model_is_published_in_one_commit_and_comes_back(
    hub: LoopbackHub, tiny_model: Path
) -> None:
    pipe = UnCLIP.from_pretrained(str(tiny_model))
    url = pipe.push_to_hub("org/tiny", prompts=["a red circle"], data=["a/set", "my pictures"])
    assert url == f"{hub.url}/org/tiny/commit/{REVISION}" and hub.commits == 1
    files = hub.files["org/tiny"]
    assert {Path(name).suffix for name in files} <= {
        ".yaml",
        ".safetensors",
        ".json",
        ".gz",
        ".md",
        ".png",
    }
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.datasets == ["a/set"]
    assert card.data.pipeline_tag == "text-to-image" and card.data.library_name == "unclip"
    for said in ("![Samples](samples.png)", "*a red circle.*", "- my pictures", "| decoder | "):
        assert said in card.text
    assert 'UnCLIP.from_pretrained("org/tiny")' in card.text

    again = load_stages("org/tiny")
    for before, after in zip(
        (pipe.prior, pipe.decoder, *pipe.upsamplers),
        (again.prior, again.decoder, *again.upsamplers),
        strict=True,
    ):
        for name, tensor in before.state_dict().items():
            torch.testing.assert_close(after.state_dict()[name], tensor.half().float(), msg=name)


def test_a_published_model_loads_by_revision_and_offline(
    hub: LoopbackHub, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(load_stages(tiny_model), "org/tiny")
    assert resolve("org/tiny@v1").name == REVISION
    resolve("org/tiny")  # notes in the cache what `main` is
    with pytest.raises(FileNotFoundError, match=r"org/tiny@v9.*RevisionNotFound"):
        resolve("org/tiny@v9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_stages("org/tiny", only={"prior"}).prior is not None


def test_a_download_that_breaks_off_goes_on_where_it_stopped(
    hub: LoopbackHub, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(load_stages(tiny_model), "org/tiny")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # what came whole is kept
    name = "decoder/model.safetensors"
    hub.cut.add(name)
    folder = resolve("org/tiny")
    whole = hub.files["org/tiny"][name]
    assert (folder / name).read_bytes() == whole
    assert not hub.cut and hub.ranges == [f"bytes={len(whole) // 2 // 2**16 * 2**16}-"]


def test_a_private_repository_wants_a_token(
    hub: LoopbackHub, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(load_stages(tiny_model), "org/secret", private=True)
    assert load_stages("org/secret", only={"prior"}).prior is not None
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-of-another")
    with pytest.raises(FileNotFoundError, match=r"org/secret.*RepositoryNotFoundError.*401"):
        resolve("org/secret")
    with pytest.raises(PermissionError, match=r"org/secret cannot be written .*hf auth login"):
        publish(load_stages(tiny_model), "org/secret")


def test_files_within_a_repository_go_by_their_path(
    hub: LoopbackHub, tiny_model: Path, tmp_path: Path
) -> None:
    case = recorded("1.15.6", "released")
    folder = write_dalle2_pytorch(tmp_path / "prior", case)
    files = {f"prior/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.files["org/zoo"] = {**files, "decoder/latest.pth": b"pickle", "README.md": b"# zoo"}
    stages = load_stages("org/zoo/prior/prior.pth@v1", only={"prior"})
    assert stages.prior is not None and stages.prior.config.network.embed_dim == 24
    there = resolve("org/zoo/prior/prior.pth").parents[1]
    assert not (there / "decoder").exists()  # only what was named is fetched
    with pytest.raises(FileNotFoundError, match=r"but prior/prior.pth.*as org/zoo/prior/prior.pth"):
        resolve("org/zoo")
    with pytest.raises(FileNotFoundError, match=r"org/zoo/nowhere holds no safetensors, but"):
        resolve("org/zoo/nowhere")

    shutil.copy(folder / "prior.pth", there)  # as who fetches a repository whole has it
    assert load_stages("org/zoo", only={"prior"}).prior is not None

    model = {str(p.relative_to(tiny_model)): p.read_bytes() for p in tiny_model.rglob("*.*")}
    hub.files["org/many"] = {f"first/{name}": body for name, body in model.items()}
    assert load_stages("org/many/first", only={"decoder"}).decoder is not None


@pytest.mark.parametrize("name", ["org/name/../x", "org/name//x", "org/name/a b", "org/name/x/."])
def test_a_path_within_a_repository_is_checked_first(hub: LoopbackHub, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a name on the Hub"):
        resolve(name)


def test_a_model_of_glides_has_a_card_of_its_own(
    glide_files: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    stages = load_stages(glide_files, optional={"prior"})
    write_repository(stages, tmp_path / "model", "org/glide")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.pipeline_tag == "text-to-image" and "A GLIDE model" in card.text
    assert "| CLIP |" not in card.text and "| upsampler | 64 to 256 px |" in card.text


@pytest.mark.parametrize("name", ["tiny", "../x", "a/b/c", "org/na me", ""])
def test_a_wrong_name_is_refused_before_anything_is_sent(
    hub: LoopbackHub, tiny_model: Path, name: str
) -> None:
    with pytest.raises(ValueError, match="repo_id must be org/name"):
        publish(load_stages(tiny_model), name)
    assert not hub.files


def test_the_command_publishes_or_only_writes(
    hub: LoopbackHub, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.png"
    save_image(torch.zeros(3, 8, 8), grid)
    words = ["publish", str(tiny_model), "org/tiny", "--license", "mit", "--grid", str(grid)]
    dry = tmp_path / "dry"
    assert hub_main([*words, "--dry-run", str(dry)]) == 0 and not hub.files
    assert (dry / "samples.png").read_bytes() == grid.read_bytes()
    assert "license: mit" in (dry / "README.md").read_text()
    assert hub_main(words) == 0
    assert f"{hub.url}/org/tiny/commit" in capsys.readouterr().out
    assert set(hub.files["org/tiny"]) == {
        path.relative_to(dry).as_posix() for path in dry.rglob("*") if path.is_file()
    }
    grid.unlink()
    assert hub_main(words) == 2
    assert "grid.png is missing" in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_said(
    hub: LoopbackHub, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="the Hub cannot be reached"):
        publish(load_stages(tiny_model), "org/tiny")


# ---------------------------------------------------------------------------- while a run trains


def test_a_run_pushes_its_stage_with_each_checkpoint(
    hub: LoopbackHub, tiny_model: Path, tmp_path: Path
) -> None:
    argv = words("prior", tmp_path, tiny_model)
    train_prior([*argv, "--push-to", "org/run"])
    assert hub.commits == 2
    files = hub.files["org/run"]
    assert {"prior/config.yaml", "unclip.yaml", "config.yaml", "metrics.jsonl"} <= files.keys()
    assert not any(name.startswith("checkpoints") for name in files)
    exported = (tmp_path / "run/prior/model.safetensors").read_bytes()
    assert files["prior/model.safetensors"] == exported


def test_a_push_that_fails_is_a_warning(
    hub: LoopbackHub,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    train_prior([*words("prior", tmp_path, tiny_model), "--push-to", "org/run"])
    assert "is not on the Hub: org/run cannot be written" in caplog.text
    assert (tmp_path / "run/checkpoints/step-0000004").is_dir()


def test_where_to_push_is_looked_at_before_training(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_prior([*words("prior", tmp_path, tiny_model), "--push-to", "nowhere"])
    assert "push_to must be org/name; got 'nowhere'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
