"""Rows of embeddings into the prior's training: rows a second, the wait for them, peak memory.

    python benchmarks/embedding_rows.py --work DIR

Makes folders of 10,000 and of 1,000,000 random rows in clip-retrieval's layout under DIR (0.6 GB),
and trains the shapes prior (configs/prior/diffusion.yaml) from them. The wait is the share
of a training step's time that goes by until its batch is there. Peaks are those of a whole process
that trains a few steps, mapped files that it touched included (Linux only); its workers are none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from unclip.config import from_dict
from unclip.data.embeddings import EmbeddingDataset, file_of
from unclip.hub import load_clip_of
from unclip.priors import DiffusionPrior
from unclip.training.batches import GlobalBatches, loader
from unclip.training.prior import TrainPriorConfig, resolve, train
from unclip.training.prior_objectives import DiffusionPriorObjective

CONFIG = Path(__file__).resolve().parent.parent / "configs/prior/diffusion.yaml"
PIECE = 10_000
SIZES = (10_000, 1_000_000)
WORDS = ("red", "green", "blue", "yellow", "large", "small", "circle", "square", "star", "heart")


def make(folder: Path, rows: int, width: int) -> None:
    """Write a folder of random rows of unit norm, as LAION's: without a manifest."""
    random = np.random.default_rng(0)
    for kind in ("img_emb", "metadata"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for k in range(rows // PIECE):
        embeds = random.standard_normal((PIECE, width), np.float32)
        embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
        np.save(file_of(folder, "img_emb", f"{k:04d}"), embeds.astype(np.float16))
        chosen = random.integers(len(WORDS), size=(PIECE, 8))
        captions = [" ".join(WORDS[i] for i in row) for row in chosen]
        table = pa.table({"caption": captions, "key": [f"{k}-{row}" for row in range(PIECE)]})
        pq.write_table(table, file_of(folder, "metadata", f"{k:04d}"))


def config_of(folder: Path, **fit: Any) -> TrainPriorConfig:
    """The shapes prior's config, on a folder."""
    values = yaml.safe_load(CONFIG.read_text())
    values["source"], values["clip"] = {"data": str(folder)}, "shapes"
    values["fit"] |= fit
    return from_dict(TrainPriorConfig, values)


def batches_of(folder: Path, config: TrainPriorConfig) -> Iterator[dict[str, Any]]:
    """Batches as `fit` gets them."""
    dataset, size = EmbeddingDataset(folder), config.fit.batch_size
    order = GlobalBatches(dataset, batch_size=size, micro_batch_size=size, rank=0, num_processes=1)
    return iter(loader(dataset, order, config.fit.num_workers))


def rows_per_second(folder: Path, workers: int, count: int = 300) -> float:
    """Rows a second out of the loader, nothing done with them."""
    config = config_of(folder, num_workers=workers)
    batches = batches_of(folder, config)
    for _ in range(10):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * config.fit.batch_size / (time.perf_counter() - start)


def data_wait(folder: Path, workers: int, steps: int) -> tuple[float, float]:
    """Seconds a training step takes, and seconds of them that it waits for its batch."""
    config = config_of(folder, num_workers=workers)
    clip = load_clip_of("shapes")
    prior = DiffusionPrior(resolve(config, clip).prior)
    prior.fit_statistics(clip.encode_rows(EmbeddingDataset(folder), range(1000)))
    objective = DiffusionPriorObjective(prior, clip)
    optimizer = torch.optim.AdamW(objective.parameters(), fused=True)
    generator = torch.Generator().manual_seed(0)
    batches = batches_of(folder, config)
    waited, start, warm_up = 0.0, 0.0, 3
    for step in range(warm_up + steps):
        if step == warm_up:
            waited, start = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(batch, generator)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start) / steps, waited / steps


def memory(field: str) -> int:
    """Bytes of this process, now (`VmRSS`, `RssAnon`) or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure(folder: Path, run: Path) -> None:
    """Train a few steps with `train_prior.py`'s own code and print the peak as JSON."""
    config = config_of(folder, max_steps=5, num_workers=0, log_every=1)
    train(replace(config, run=run, fresh=True))
    print(json.dumps({"peak": memory("VmHWM"), "anonymous": memory("RssAnon")}))


def main() -> None:
    """Parse the command line; make, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the embeddings")
    parser.add_argument("--steps", type=int, default=30, help="training steps to time")
    parser.add_argument("--threads", type=int, default=2, help="that compute a step")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    datasets.config.HF_DATASETS_CACHE = args.work / "cache"
    datasets.disable_progress_bars()
    if args.measure:
        measure(args.measure, args.work / "run")
        return
    width = load_clip_of("shapes").embed_dim
    folders = {rows: args.work / f"rows-{rows}" for rows in SIZES}
    for rows, folder in folders.items():
        if not folder.is_dir():
            make(folder, rows, width)
    torch.set_num_threads(args.threads)
    largest = folders[SIZES[-1]]
    print("| workers | rows a second | step, s | waits for data, s | share |")
    print("| --- | --- | --- | --- | --- |")
    for workers in (0, 1):
        fast = rows_per_second(largest, workers)
        step, wait = data_wait(largest, workers, args.steps)
        print(
            f"| {workers} | {fast:,.0f} | {step:.3f} | {wait:.5f} | {wait / step:.2%} |", flush=True
        )
    print("\n| rows | embeddings and captions, MB | peak, MB | of it not files, MB |")
    print("| --- | --- | --- | --- |")
    for rows, folder in folders.items():
        command = [sys.executable, __file__, "--work", str(args.work), "--measure", str(folder)]
        subprocess.run(command, capture_output=True, check=True)  # fills the cache of captions
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        size = sum(path.stat().st_size for path in folder.glob("*/*")) / 1e6
        peak, anonymous = found["peak"] / 1e6, found["anonymous"] / 1e6
        print(f"| {rows:,} | {size:.0f} | {peak:.0f} | {anonymous:.0f} |", flush=True)


if __name__ == "__main__":
    main()
