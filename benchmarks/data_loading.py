"""Pictures per second from tars, against the webdataset package and torchvision's ImageFolder.

    python benchmarks/data_loading.py speed "emoji/64/train-*.tar" --size 64
    python benchmarks/data_loading.py resume --samples 1000000
    python benchmarks/data_loading.py soak --samples 1000000

`speed` reads, decodes, transforms and collates the same pictures in one process on one thread, by
each loader in turn, several times over; what counts is the ratio within one run.  ImageFolder gets
the pictures unpacked into a folder, without captions.  `resume` writes tiny tars, indexes them, and
then measures in a process of its own how long it takes to open them and give the first batch at 90%
of an epoch.  `soak` reads an epoch of tiny tars by two ranks with four workers each, killing one
rank three times and starting it anew at the batch it had come to; at the end every sample must have
been read exactly once.  With `--stream` both read shard after shard instead of at offsets.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from unclip.data.source import SourceConfig, open_source
from unclip.training.batches import GlobalBatches, loader

BATCH = 64


def ours(pattern: str, size: int, folder: Path) -> Callable[[], Iterator[Any]]:
    def batches() -> Iterator[Any]:
        dataset = open_source(SourceConfig(data=pattern, image_size=size))
        order = GlobalBatches(
            dataset, batch_size=BATCH, micro_batch_size=BATCH, rank=0, num_processes=1
        )
        return iter(loader(dataset, order, num_workers=0))

    return batches


def transform(size: int) -> Callable[[Any], torch.Tensor]:
    """What our loader does, by torchvision's usual pieces."""
    return transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC, antialias=True),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


def webdataset_(pattern: str, size: int, folder: Path) -> Callable[[], Iterator[Any]]:
    import webdataset

    def batches() -> Iterator[Any]:
        dataset = (
            webdataset.WebDataset(sorted(glob.glob(pattern)), shardshuffle=100, seed=0)
            .shuffle(1000)
            .decode("pilrgb")
            .to_tuple("png;jpg", "txt")
            .map_tuple(transform(size), None)
            .batched(BATCH)
        )
        return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=0))

    return batches


def image_folder(pattern: str, size: int, folder: Path) -> Callable[[], Iterator[Any]]:
    (folder / "pictures/one").mkdir(parents=True)
    for tar in glob.glob(pattern):
        with tarfile.open(tar) as members:
            for member in members:
                if member.name.endswith((".png", ".jpg")):
                    content = members.extractfile(member)
                    assert content is not None
                    (folder / "pictures/one" / Path(member.name).name).write_bytes(content.read())

    def batches() -> Iterator[Any]:
        dataset = ImageFolder(str(folder / "pictures"), transform(size))
        return iter(DataLoader(dataset, BATCH, shuffle=True))

    return batches


LOADERS = {"unclip": ours, "webdataset": webdataset_, "ImageFolder": image_folder}


def speed(pattern: str, size: int, pictures: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in LOADERS}
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        made = {name: make(pattern, size, Path(folder)) for name, make in LOADERS.items()}
        for turn in range(rounds + 1):
            for name, batches in made.items():
                stream = batches()
                next(stream)  # opening, and an index where there is one
                start = time.process_time()
                for _ in range(pictures // BATCH):
                    next(stream)
                if turn:  # the first warms the file system's cache
                    rates[name].append(pictures // BATCH * BATCH / (time.process_time() - start))
    best = max(median(rates["webdataset"]), median(rates["ImageFolder"]))
    return {
        "size": size,
        "pictures a second and core": {name: round(median(r)) for name, r in rates.items()},
        "ratio to the better": round(median(rates["unclip"]) / best, 2),
        "ratios by round": [
            round(r / max(rates["webdataset"][k], rates["ImageFolder"][k]), 2)
            for k, r in enumerate(rates["unclip"])
        ],
    }


def write_tiny_tars(folder: Path, samples: int, shard: int = 10_000) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")

    def member(name: str, data: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)

    picture, caption = (member("KEYKEYKEY.png", buffer.getvalue()), member("KEYKEYKEY.txt", b"c"))
    header = slice(148, 156)
    for first in range(0, samples, shard):
        with (folder / f"{first // shard:05d}.tar").open("wb") as file:
            for k in range(first, min(samples, first + shard)):
                for template in (picture, caption):
                    block = bytearray(template.replace(b"KEYKEYKEY", b"%09d" % k))
                    total = sum(block[:512]) - sum(block[header]) + 8 * 32
                    block[header] = b"%06o\0 " % total
                    file.write(block)
            file.write(bytes(1024))


def resume(samples: int, stream: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_tars(folder, samples)
        tars = sum(file.stat().st_size for file in folder.glob("*.tar"))
        results = []
        for _ in range(3):  # the first makes the index
            command = [sys.executable, __file__, "first-batch", name, str(samples)]
            command += ["--stream"] * stream
            results.append(json.loads(subprocess.check_output(command)))
        files = [file for file in (folder / "cache").rglob("*") if file.is_file()]
        copies = sum(file.stat().st_size for file in files if file.suffix == ".tar")
        index = sum(file.stat().st_size for file in files) - copies
    return {
        "samples": samples,
        "tars, MB": round(tars / 1e6),
        "index, MB": round(index / 1e6),
        "copies, MB": round(copies / 1e6),
        "first opening, s": round(results[0]["seconds"], 2),
        "later openings to the first batch at 90%, s": [
            round(r["seconds"], 3) for r in results[1:]
        ],
        "memory grown meanwhile, MB": [round(r["megabytes"]) for r in results[1:]],
    }


def source_of(folder: Path, stream: bool) -> SourceConfig:
    return SourceConfig(data=str(folder / "*.tar"), image_size=8, stream=stream)


def first_batch(folder: Path, samples: int, stream: bool) -> dict[str, float]:
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    dataset = open_source(source_of(folder, stream))
    assert len(dataset) == samples  # type: ignore[arg-type]
    order = GlobalBatches(
        dataset,
        batch_size=BATCH,
        micro_batch_size=BATCH,
        rank=0,
        num_processes=1,
        first_batch=int(0.9 * samples) // BATCH,
    )
    next(iter(loader(dataset, order, num_workers=0)))
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "megabytes": (after - before) / 1024}


def soak(samples: int, ranks: int, workers: int, kills: int, stream: bool) -> dict[str, Any]:
    """Each rank notes the batches it has finished, as training does with its steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_tars(folder, samples)
        first_batch(folder, samples, stream)  # makes the index
        batches = samples // SOAK_BATCH

        def start(rank: int) -> subprocess.Popen[bytes]:
            command = [sys.executable, __file__, "rank", name, str(samples)]
            command += [str(rank), str(ranks), str(workers), *["--stream"] * stream]
            return subprocess.Popen(command)

        def done(rank: int) -> int:
            log = folder / f"rank-{rank}.bin"
            return log.stat().st_size // rank_record(ranks).itemsize if log.exists() else 0

        running = [start(rank) for rank in range(ranks)]
        for kill in range(1, kills + 1):
            while done(ranks - 1) < batches * kill // (kills + 1):
                time.sleep(0.2)
            running[-1].kill()
            running[-1].wait()
            running[-1] = start(ranks - 1)
        if any(process.wait() for process in running):
            raise RuntimeError("a rank has failed")
        records = [
            np.fromfile(folder / f"rank-{rank}.bin", rank_record(ranks)) for rank in range(ranks)
        ]
    keys = np.concatenate([record["keys"].ravel() for record in records])
    return {
        "samples": len(keys),
        "different": len(np.unique(keys)),
        "times a rank was killed": kills,
        "memory of rank 0 and its workers at a tenth and at the end, MB": [
            int(records[0]["megabytes"][round(at * (len(records[0]) - 1))]) for at in (0.1, 1.0)
        ],
    }


SOAK_BATCH = 1000


def rank_record(ranks: int) -> np.dtype[Any]:
    return np.dtype([("megabytes", "<i8"), ("keys", "<i8", (SOAK_BATCH // ranks,))])


def rank_of_soak(
    folder: Path, samples: int, rank: int, ranks: int, workers: int, stream: bool
) -> None:
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    log, dtype = folder / f"rank-{rank}.bin", rank_record(ranks)
    done = log.stat().st_size // dtype.itemsize if log.exists() else 0
    with log.open("ab") as file:
        file.truncate(done * dtype.itemsize)  # what it was writing when it was killed
        dataset = open_source(source_of(folder, stream))
        order = GlobalBatches(
            dataset,
            batch_size=SOAK_BATCH,
            micro_batch_size=SOAK_BATCH // ranks,
            rank=rank,
            num_processes=ranks,
            first_batch=done,
        )
        stream = iter(loader(dataset, order, workers))
        record = np.zeros((), dtype)
        for number in range(done, samples // SOAK_BATCH):
            record["keys"] = [int(key) for key in next(stream)["key"]]
            if number % 100 == 0 or number == samples // SOAK_BATCH - 1:
                record["megabytes"] = memory_of_family()
            file.write(record.tobytes())
            file.flush()


def memory_of_family() -> int:
    """Proportional set size of this process and its workers, MB: shared pages count once."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for pid in (str(os.getpid()), *children):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    commands = parser.add_subparsers(dest="command", required=True)
    fast = commands.add_parser("speed", help="pictures a second of three loaders")
    fast.add_argument("pattern", help="tars of png or jpg and txt")
    fast.add_argument("--size", type=int, default=64, help="pixels a side")
    fast.add_argument("--pictures", type=int, default=5120, help="pictures a round")
    fast.add_argument("--rounds", type=int, default=5)
    again = commands.add_parser("resume", help="time to the first batch at 90%% of an epoch")
    again.add_argument("--samples", type=int, default=1_000_000)
    inner = commands.add_parser("first-batch")
    inner.add_argument("folder", type=Path)
    inner.add_argument("samples", type=int)
    long = commands.add_parser("soak", help="every sample exactly once, though a rank is killed")
    long.add_argument("--samples", type=int, default=1_000_000)
    long.add_argument("--ranks", type=int, default=2)
    long.add_argument("--workers", type=int, default=4)
    long.add_argument("--kills", type=int, default=3)
    one = commands.add_parser("rank")
    one.add_argument("folder", type=Path)
    for number in ("samples", "rank", "ranks", "workers"):
        one.add_argument(number, type=int)
    for command in (again, inner, long, one):
        command.add_argument("--stream", action="store_true", help="read shard after shard")
    args = parser.parse_args()
    if args.command == "rank":
        rank_of_soak(args.folder, args.samples, args.rank, args.ranks, args.workers, args.stream)
        return
    if args.command == "speed":
        result = speed(args.pattern, args.size, args.pictures, args.rounds)
    elif args.command == "resume":
        result = resume(args.samples, args.stream)
    elif args.command == "soak":
        result = soak(args.samples, args.ranks, args.workers, args.kills, args.stream)
    else:
        result = first_batch(args.folder, args.samples, args.stream)
    print(json.dumps(result, indent=None if args.command == "first-batch" else 2))


if __name__ == "__main__":
    main()
