"""Embeddings on disk: written in pieces, gone on with, and trained from; every way to be wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import embed_flags, full_disk, write_tiny_clip
from safetensors.torch import load_file
from test_diffusers_format import add_image_encoder
from test_diffusers_format import karlo as diffusers_karlo  # noqa: F401
from test_training import ROOT, launch, words

from unclip.clip import load_clip
from unclip.data.embeddings import EmbeddingDataset, is_embedding_folder, read_manifest
from unclip.data.source import SourceConfig, open_source
from unclip.training.decoder import main as train_decoder
from unclip.training.embed import main as embed
from unclip.training.prior import main as train_prior

pytestmark = pytest.mark.filterwarnings("ignore:the caption has more than 20 tokens")


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    return said


# ---------------------------------------------------------------------------------------- writing


def test_layout_alignment_and_manifest(written: Path, pictures: Path, clip_folder: Path) -> None:
    assert sorted(contents(written)) == [
        *(f"img_emb/img_emb_000{k}.npy" for k in range(3)),
        "manifest.json",
        *(f"metadata/metadata_000{k}.parquet" for k in range(3)),
        *(f"text_emb/text_emb_000{k}.npy" for k in range(3)),
    ]
    clip = load_clip(str(clip_folder))
    source = open_source(SourceConfig(data=str(pictures)))
    row = 0
    for k in range(3):
        images = np.load(written / f"img_emb/img_emb_000{k}.npy")
        texts = np.load(written / f"text_emb/text_emb_000{k}.npy")
        table = pq.read_table(written / f"metadata/metadata_000{k}.parquet").to_pylist()
        assert images.dtype == texts.dtype == np.float16
        assert len(images) == len(texts) == len(table)
        for image, text, meta in zip(images, texts, table, strict=True):
            sample = source[row]
            assert (meta["key"], meta["caption"]) == (sample["key"], sample["caption"])
            expected = clip.encode_image(sample["image"][None])[0]
            torch.testing.assert_close(torch.tensor(image).float(), expected, atol=1e-3, rtol=0)
            expected = clip.encode_text([sample["caption"]]).text_embed[0]
            torch.testing.assert_close(torch.tensor(text).float(), expected, atol=1e-3, rtol=0)
            row += 1
    assert row == 10
    manifest = read_manifest(written)
    assert manifest is not None
    assert manifest["clip"]["fingerprint"] == clip.fingerprint()
    assert (manifest["clip"]["embed_dim"], manifest["clip"]["unit_norm"]) == (16, True)
    assert manifest["preprocessing"]["image_size"] == 32
    assert manifest["source"]["data"] == str(pictures)
    assert manifest["rows_per_piece"] == 4
    assert [piece["rows"] for piece in manifest["pieces"].values()] == [4, 4, 2]
    assert len(manifest["pieces"]["0002"]["files"]["img_emb/img_emb_0002.npy"]["sha256"]) == 64


def test_a_finished_piece_is_left_and_a_broken_one_redone(
    written: Path, copied: Path, pictures: Path, clip_folder: Path
) -> None:
    before = contents(written)
    kept = (copied / "img_emb/img_emb_0000.npy").stat().st_mtime_ns
    (copied / "img_emb/img_emb_0001.npy").write_bytes(b"half")
    (copied / "metadata/metadata_0002.parquet").unlink()
    embed(embed_flags(pictures, clip_folder, copied, "--text"))
    assert contents(copied) == before
    assert (copied / "img_emb/img_emb_0000.npy").stat().st_mtime_ns == kept


def test_a_full_disk_loses_one_piece(
    written: Path,
    pictures: Path,
    clip_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with full_disk(200), pytest.raises(SystemExit):
        embed(embed_flags(pictures, clip_folder, out, "--text"))
    assert f"could not write {out / 'manifest.json'}" in one_line(capsys)
    embed(embed_flags(pictures, clip_folder, out, "--text"))
    for path in [*out.glob("*/*_0001.*"), *out.glob("*/*_0002.*")]:
        path.unlink()
    with full_disk(200), pytest.raises(SystemExit):
        embed(embed_flags(pictures, clip_folder, out, "--text"))
    assert f"could not write {out / 'img_emb/img_emb_0001.npy'}" in one_line(capsys)
    with pytest.raises(ValueError, match="piece 0001"):
        EmbeddingDataset(out)
    embed(embed_flags(pictures, clip_folder, out, "--text"))
    assert contents(out) == contents(written)


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "unclip.embed", *arguments]


ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
}


def test_killed_in_the_middle_and_run_again_gives_the_same_files(
    clip_folder: Path, tmp_path: Path
) -> None:
    def arguments(out: Path) -> list[str]:
        world = ["--data", "shapes", "--limit", "300", "--clip", str(clip_folder)]
        return [*world, "--out", str(out), "--rows-per-piece", "3", "--num-workers", "0"]

    broken, straight = tmp_path / "broken", tmp_path / "straight"
    process = subprocess.Popen(command(arguments(broken)), env=ENVIRONMENT, stderr=subprocess.PIPE)
    while not (broken / "pieces/0001.json").is_file() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    with pytest.raises(ValueError, match="is not finished"):
        EmbeddingDataset(broken)
    first = (broken / "img_emb/img_emb_0000.npy").stat().st_mtime_ns
    embed(arguments(broken))
    assert (broken / "img_emb/img_emb_0000.npy").stat().st_mtime_ns == first
    embed(arguments(straight))
    assert contents(broken) == contents(straight)


def test_two_ranks_share_the_pieces_and_write_the_same(
    written: Path, pictures: Path, clip_folder: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    options = ["--multi_gpu", "--main_process_port", "0", "-m", "unclip.embed"]
    arguments = embed_flags(pictures, clip_folder, tmp_path / "out", "--text")
    done = subprocess.run(
        [*launcher, *options, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(written)


def test_what_cannot_be_read_is_left_out_of_all_files_alike(
    pictures: Path,
    clip_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoilt = Path(shutil.copytree(pictures, tmp_path / "spoilt"))
    (spoilt / "1.png").write_bytes(b"")
    (spoilt / "6.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    embed(embed_flags(spoilt, clip_folder, out, "--text", "--max-unreadable", "0.5"))
    keys = [pq.read_table(out / f"metadata/metadata_000{k}.parquet")["key"] for k in range(3)]
    assert [k for column in keys for k in column.to_pylist()] == [
        f"{k}.png" for k in (0, 2, 3, 4, 5, 7, 8, 9)
    ]
    for kind in ("img_emb", "text_emb"):
        assert [len(np.load(out / f"{kind}/{kind}_000{k}.npy")) for k in range(3)] == [3, 3, 2]
    manifest = read_manifest(out)
    assert manifest is not None
    assert (manifest["rows"], manifest["unreadable"]) == (8, 2)
    assert "left out 2 samples that cannot be read: row 1: " in caplog.text
    assert len(EmbeddingDataset(out)) == 8


def test_a_source_that_changed_since_is_refused(
    pictures: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(pictures, tmp_path / "source"))
    out = tmp_path / "out"
    embed(embed_flags(source, clip_folder, out))
    (out / "img_emb/img_emb_0001.npy").unlink()
    other = (source / "5.png").read_bytes()
    (source / "6.png").write_bytes(other)
    with pytest.raises(SystemExit):
        embed(embed_flags(source, clip_folder, out))
    assert "whose files have changed since: choose another --out" in one_line(capsys)
    manifest = json.loads((out / "manifest.json").read_text())
    del (
        manifest["source_state"],
        manifest["clip"]["text_fingerprint"],
    )  # as releases before wrote it
    (out / "manifest.json").write_text(json.dumps(manifest))
    embed(embed_flags(source, clip_folder, out))
    assert (out / "img_emb/img_emb_0001.npy").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--clip", "OTHER"], "clip.fingerprint: "),
        (["--data", "OTHER_PICTURES"], "source.data: "),
        (["--rows-per-piece", "5"], "rows_per_piece: 4 there, 5 here"),
        (["--out", "FULL"], "holds other things"),
        (["--data", "EMBEDDINGS"], "source.data must hold pictures"),
        (["--data", "shapes"], "source.limit must say how many pictures"),
        (["--source.crop-size", "16"], "source.crop_size must be null"),
        (["--max-unreadable", "1.5"], "max_unreadable must lie in [0, 1)"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--data", "nowhere/*.tar"], "no file matches"),
        (["--clip", "ViT-Q-14/openai"], "ViT-Q-14/openai"),
        (["--data", "SPOILT", "--out", "NEW"], "3 of the 4 of piece 0000 that cannot"),
    ],
)
def test_bad_settings(
    change: list[str],
    said: str,
    copied: Path,
    pictures: Path,
    clip_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "OTHER": tmp_path / "other",
        "OTHER_PICTURES": tmp_path / "pictures",
        "FULL": pictures,
        "EMBEDDINGS": copied,
        "NEW": tmp_path / "new",
        "SPOILT": tmp_path / "spoilt",
    }
    if "OTHER" in change:
        write_tiny_clip(places["OTHER"], seed=1)
    shutil.copytree(pictures, places["OTHER_PICTURES"])
    shutil.copytree(pictures, places["SPOILT"])
    for k in range(3):
        (places["SPOILT"] / f"{k}.png").write_bytes(b"")
    before = contents(copied)
    arguments = [str(places.get(word, word)) for word in change]
    with pytest.raises(SystemExit):
        embed([*embed_flags(pictures, clip_folder, copied, "--text"), *arguments])
    assert said in one_line(capsys)
    assert contents(copied) == before


# --------------------------------------------------------------------------------------- training


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_prior_trains_from_a_folder_as_from_its_pictures(
    written: Path, pictures: Path, clip_folder: Path, tmp_path: Path, tiny_model: Path
) -> None:
    for run, data in (("rows", written), ("pictures", pictures)):
        # A CLIP at random weights gives all pictures nearly one embedding, and units measured on
        # them would blow the rounding to fp16 up: take those of a prior that has others.
        config = [*words("prior", tmp_path, tiny_model, run), "--init", str(tiny_model)]
        train_prior([*config, "--data", str(data)])
    assert losses(tmp_path / "rows") == pytest.approx(losses(tmp_path / "pictures"), rel=1e-3)
    # Without a manifest the folder is as one of LAION's, once the CLIP is named.
    bare = Path(shutil.copytree(written, tmp_path / "bare"))
    (bare / "manifest.json").unlink()
    config = [*words("prior", tmp_path, tiny_model, "bare_run"), "--init", str(tiny_model)]
    train_prior([*config, "--data", str(bare), "--clip", str(clip_folder)])
    assert losses(tmp_path / "bare_run") == losses(tmp_path / "rows")


def test_statistics_are_measured_on_the_rows(
    written: Path, tmp_path: Path, tiny_model: Path
) -> None:
    config = [*words("prior", tmp_path, tiny_model), "--max-steps", "1"]
    train_prior([*config, "--data", str(written), "--limit", "6"])
    rows = np.concatenate([np.load(path) for path in sorted(written.glob("img_emb/*.npy"))])[:6]
    mean = load_file(tmp_path / "run/prior/model.safetensors")["mean"]
    torch.testing.assert_close(mean, torch.tensor(rows).float().mean(dim=0), atol=1e-5, rtol=0)


def test_training_from_rows_resumes_to_the_sample(
    written: Path, tmp_path: Path, tiny_model: Path
) -> None:
    whole, halves = (
        [*words("prior", tmp_path, tiny_model, run), "--data", str(written), "--num-workers", "1"]
        for run in ("whole", "halves")
    )
    train_prior(whole)
    train_prior([*halves, "--max-steps", "2"])
    train_prior(halves)
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    file = "prior/model.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "halves" / file).read_bytes()


def test_two_processes_train_from_rows_and_one_goes_on(
    written: Path, tmp_path: Path, tiny_model: Path
) -> None:
    config = [*words("prior", tmp_path, tiny_model), "--data", str(written)]
    two = [*config, "--max-steps", "2", "--num-workers", "1"]
    launch(["--multi_gpu", "--main_process_port", "0"], "train_prior.py", two)
    run = tmp_path / "run"
    progress = json.loads((run / "checkpoints/step-0000002/progress.json").read_text())
    assert progress["num_processes"] == 2
    train_prior(config)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["samples"]) for line in lines] == [(2, 8), (4, 16)]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_a_text_encoder_alone_serves_to_train_from_rows(
    diffusers_karlo: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = Path(shutil.copytree(diffusers_karlo, tmp_path / "whole"))
    add_image_encoder(whole, "feature_extractor")
    world = ["--data", "shapes", "--limit", "8", "--num-workers", "0"]
    embed([*world, "--clip", str(whole), "--out", str(tmp_path / "rows")])
    config = words("prior", tmp_path, diffusers_karlo, "alone")
    config += ["--data", str(tmp_path / "rows"), "--max-steps", "2"]
    train_prior(config)
    train_prior([*config, "--base", str(whole), "--run", str(tmp_path / "both")])
    assert losses(tmp_path / "alone") == losses(tmp_path / "both")
    manifest = json.loads((tmp_path / "rows/manifest.json").read_text())
    manifest["clip"]["text_fingerprint"] = "another"
    (tmp_path / "rows/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit):
        train_prior([*config, "--run", str(tmp_path / "wrong")])
    assert "clip must be the one that made the embeddings in" in one_line(capsys)


def write_laion(folder: Path, counts: list[int], width: int = 16, dtype: Any = np.float16) -> None:
    """A folder as LAION publishes them: numbers without leading zeros, columns of its own."""
    rows = np.random.default_rng(0)
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for k, count in enumerate(counts):
        embeds = rows.standard_normal((count, width))
        embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
        np.save(folder / f"img_emb/img_emb_{k}.npy", embeds.astype(dtype))
        captions = [None if row == 1 else f"piece {k} row {row}" for row in range(count)]
        table = pa.table({"image_path": [str(row) for row in range(count)], "caption": captions})
        pq.write_table(table, folder / f"metadata/metadata_{k}.parquet", row_group_size=2)


def test_laions_folders(tmp_path: Path, tiny_model: Path, clip_folder: Path) -> None:
    folder = tmp_path / "laion[1]"
    write_laion(folder, [3] * 11, dtype=np.float32)
    assert is_embedding_folder(str(folder))
    dataset = open_source(SourceConfig(data=str(folder)))
    assert isinstance(dataset, EmbeddingDataset)
    assert len(dataset) == 33
    assert dataset[31]["caption"] == ""  # null there
    for row, name in ((8, "piece 2 row 2"), (30, "piece 10 row 0")):  # 2 comes before 10
        sample = dataset[row]
        assert sample["caption"] == name
        piece, k = divmod(row, 3)
        stored = np.load(folder / f"img_emb/img_emb_{piece}.npy")[k]
        assert torch.equal(sample["image_embed"], torch.tensor(stored))
    config = words("prior", tmp_path, tiny_model)
    train_prior([*config, "--data", str(folder), "--clip", str(clip_folder), "--max-steps", "2"])
    assert (tmp_path / "run/prior/model.safetensors").is_file()


def test_rows_are_mapped_and_a_pickle_holds_none_of_them(tmp_path: Path) -> None:
    import pickle

    write_laion(tmp_path / "wide", [64], width=4096)
    dataset = EmbeddingDataset(tmp_path / "wide")
    first = dataset[0]["image_embed"]
    assert isinstance(dataset._maps[0], np.memmap)  # type: ignore[index]
    data = pickle.dumps(dataset)
    assert len(data) < 64 * 4096
    assert torch.equal(pickle.loads(data)[0]["image_embed"], first)


def spoil(folder: Path, what: str) -> None:
    images = folder / "img_emb/img_emb_0001.npy"
    rows = np.load(images)
    if what == "misaligned":
        np.save(images, rows[:-1])
    elif what == "float64":
        np.save(images, rows.astype(np.float64))
    elif what == "flat":
        np.save(images, rows.reshape(-1))
    elif what == "width":
        np.save(images, rows[:, :8])
    elif what == "nan":
        rows[2] = np.nan
        np.save(images, rows)
    elif what == "truncated":
        images.write_bytes(images.read_bytes()[:-20])
    elif what == "empty":
        images.write_bytes(b"")
    elif what == "no_images":
        images.unlink()
    elif what == "no_metadata":
        (folder / "metadata/metadata_0001.parquet").unlink()
    elif what == "no_piece":
        images.unlink()
        (folder / "metadata/metadata_0001.parquet").unlink()
    elif what == "parquet":
        (folder / "metadata/metadata_0001.parquet").write_bytes(b"PAR1")
    elif what == "text":
        np.save(folder / "text_emb/text_emb_0001.npy", rows[:-1])
    elif what == "manifest":
        (folder / "manifest.json").write_text("{")
    elif what == "version":
        (folder / "manifest.json").write_text('{"format": "unclip-embeddings", "version": 2}')
    elif what == "all":
        for path in (folder / "img_emb").iterdir():
            path.unlink()


SPOILT = {
    "misaligned": "must have as many rows as metadata_0001.parquet; got 3 and 4",
    "float64": "must hold rows [R, D] of float16 or float32; got [4, 16] of float64",
    "flat": "must hold rows [R, D] of float16 or float32; got [64] of float16",
    "width": "must be 16 wide, as the pieces before it; got 8",
    "nan": "must hold finite numbers; got a row that does not, 2",
    "truncated": "must be a whole .npy",
    "empty": "must be a whole .npy",
    "no_images": "img_emb_0001.npy is missing",
    "no_metadata": "metadata_0001.parquet is missing",
    "no_piece": "piece 0001 of",
    "parquet": "must be a whole Parquet file",
    "text": "must be of the pictures' shape [4, 16]; got [3, 16]",
    "manifest": "is not JSON",
    "version": "must be of format 'unclip-embeddings', version 1",
    "all": "must hold img_emb_0000.npy",
}


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_folders(
    what: str, copied: Path, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(copied, what)
    with pytest.raises(SystemExit):
        train_prior([*words("prior", tmp_path, tiny_model), "--data", str(copied)])
    assert SPOILT[what] in one_line(capsys)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("unnamed", "clip must be named for embeddings without a manifest"),
        ("width", "clip must be as wide as the embeddings in"),
        ("other", "clip must be the one that made the embeddings in"),
        ("mixed", "clip must be the one that made the embeddings in"),
        ("norm", "clip must give unnormalised embeddings"),
        ("column", "caption_column must be a column of"),
    ],
)
def test_another_clip_than_made_the_folder(
    what: str,
    said: str,
    written: Path,
    clip_folder: Path,
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    laion = tmp_path / "laion"
    write_laion(laion, [4], width=8 if what == "width" else 16)
    config = [*words("prior", tmp_path, tiny_model), "--data", str(laion)]
    if what == "other":
        write_tiny_clip(tmp_path / "other", seed=1)
        config += ["--data", str(written), "--clip", str(tmp_path / "other")]
    elif what == "mixed":
        write_tiny_clip(tmp_path / "other", seed=1)
        mix = [{"data": str(laion)}, {"data": str(written)}]
        config += ["--source.mix", json.dumps(mix), "--clip", str(tmp_path / "other")]
        for path in (laion / "img_emb").iterdir():  # that part names no CLIP: only its norm counts
            np.save(path, (rows := np.load(path)) / np.linalg.norm(rows, axis=1, keepdims=True))
    elif what != "unnamed":
        config += ["--clip", str(clip_folder)]
    if what == "norm":
        np.save(laion / "img_emb/img_emb_0.npy", 3 * np.load(laion / "img_emb/img_emb_0.npy"))
    if what == "column":
        config += ["--caption-column", "words"]
    with pytest.raises(SystemExit):
        train_prior(config)
    error = one_line(capsys)
    assert said in error
    if what in ("other", "mixed"):
        assert str(clip_folder) in error
        assert str(tmp_path / "other") in error


def test_a_decoder_needs_pictures(
    written: Path, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in (["--data", str(written)], ["--source.mix", json.dumps([{"data": str(written)}])]):
        with pytest.raises(SystemExit):
            train_decoder([*words("decoder", tmp_path, tiny_model), *flags])
        assert "source.data must hold pictures to train a decoder on" in one_line(capsys)
