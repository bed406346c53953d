"""A stage on disk: there whole or not at all, and damage is named."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import full_disk
from torch import nn

from unclip import checkpoint
from unclip.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    fill,
    load_stage,
    load_weights,
    save_stage,
    unfilled,
    written_whole,
)

CONFIG = {"stage": "prior", "width": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_stage(tmp_path / "prior", CONFIG, {"x": torch.ones(3), "n": torch.tensor([1, 2])})
    return tmp_path / "prior"


def test_round_trip(folder: Path) -> None:
    config, tensors = load_stage(folder, "prior")
    assert config == {"width": 3}
    assert torch.equal(tensors["x"], torch.ones(3))
    assert tensors["n"].dtype == torch.int64


def test_half_precision_is_for_floats_alone_and_comes_back_as_fp32(tmp_path: Path) -> None:
    tensors = {"x": torch.ones(3), "n": torch.tensor([1, 2])}
    save_stage(tmp_path / "half", CONFIG, tensors, torch.float16)
    stored = load_weights(tmp_path / "half" / WEIGHTS_NAME)
    assert (stored["x"].dtype, stored["n"].dtype) == (torch.float16, torch.int64)
    assert load_stage(tmp_path / "half", "prior")[1]["x"].dtype == torch.float32


def test_weights_are_converted_on_the_way_save_those_to_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MAPPED_BYTES", 8)  # the file is opened anew for each tensor
    tensors = {"x": torch.randn(3), "mean": torch.randn(3), "n": torch.tensor([1, 2])}
    save_stage(tmp_path / "x", CONFIG, tensors)
    loaded = load_weights(tmp_path / "x" / WEIGHTS_NAME, torch.bfloat16, keep=["mean"])
    assert torch.equal(loaded["x"], tensors["x"].bfloat16())
    assert torch.equal(loaded["mean"], tensors["mean"])
    assert torch.equal(loaded["n"], tensors["n"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
def test_weights_of_the_dtype_asked_for_stay_in_their_file(tmp_path: Path) -> None:
    module = unfilled(lambda: nn.Linear(3, 2))
    assert module.weight.is_meta
    save_stage(tmp_path / "x", CONFIG, nn.Linear(3, 2).state_dict())
    weights = tmp_path / "x" / WEIGHTS_NAME
    fill(module, load_weights(weights, torch.float32), tmp_path)
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(weights))
    ]
    assert any(start <= module.weight.data_ptr() < end for start, end in mapped)
    before = weights.read_bytes()
    nn.init.zeros_(module.weight)  # the mapping is private: training does not write into the file
    assert weights.read_bytes() == before


def test_writing_again_replaces_everything(folder: Path) -> None:
    (folder / "stray").touch()
    save_stage(folder, CONFIG, {"x": torch.zeros(3)})
    assert not (folder / "stray").exists()
    assert load_stage(folder, "prior")[1].keys() == {"x"}
    assert list(folder.parent.iterdir()) == [folder]
    umask = os.umask(0)
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask  # as readable as any new folder


def check_untouched(folder: Path) -> None:
    assert torch.equal(load_stage(folder, "prior")[1]["x"], torch.ones(3))
    assert list(folder.parent.iterdir()) == [folder]  # and nothing is left beside it


def test_a_full_disk_keeps_the_folder_before(folder: Path) -> None:
    large = {"x": torch.zeros(10_000)}
    with full_disk(), pytest.raises(OSError, match=f"could not write {folder}.*untouched"):
        save_stage(folder, CONFIG, large)
    check_untouched(folder)


def test_a_folder_that_cannot_be_put_in_place_keeps_the_one_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if target == folder and not source.name.endswith("-old"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space left on device; what was there before is untouche"):
        save_stage(folder, CONFIG, {"x": torch.zeros(3)})
    check_untouched(folder)


def test_any_other_error_keeps_it_too(folder: Path) -> None:
    with pytest.raises(RuntimeError), written_whole(folder) as temporary:
        (temporary / "half").touch()
        raise RuntimeError("interrupted")
    check_untouched(folder)


def test_a_folder_in_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*choose an output folder you may write to"):
        save_stage(tmp_path / "file" / "prior", CONFIG, {})


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none holds no prior"):
        load_stage(tmp_path / "none", "prior")
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS_NAME} is missing"):
        load_stage(folder, "prior")


@pytest.mark.parametrize("length", [0, 5, -1])
def test_a_truncated_file(folder: Path, length: int) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{path} is truncated or damaged"):
        load_stage(folder, "prior")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stage: decoder", "must describe the stage 'prior'; got 'decoder'"),
        ("width: 3", "must describe the stage 'prior'; got None"),
        ("- a list", "must describe the stage 'prior'; got None"),
        ("stage: [", "is not YAML"),
    ],
)
def test_a_config_of_something_else(folder: Path, text: str, said: str) -> None:
    (folder / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match=said):
        load_stage(folder, "prior")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bias": None}, "lacks bias of the Linear: it is not whole"),
        ({"extra": torch.ones(1)}, "has no place for extra of the Linear"),
        ({"weight": torch.ones(2, 2)}, r"has other shapes .* weight \[2, 2\] for \[2, 3\]"),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    tensors = {k: v for k, v in (module.state_dict() | change).items() if v is not None}
    with pytest.raises(ValueError, match=f"{tmp_path} {said}.*copy or download it again"):
        fill(module, tensors, tmp_path)
