"""Embed captioned pictures once, for priors to train from: what `python -m unclip.embed` runs.

The folder has clip-retrieval's layout (`unclip.data.embeddings`). Pieces of a fixed number of rows
are shared out over all processes; one is done when its record is there, which is written last. The
same command again goes on with those that are not.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from unclip.checkpoint import aside_of, written_file
from unclip.clip import FrozenCLIP
from unclip.config import one_line_errors, parse, to_dict
from unclip.data.captioned import CaptionedDataset
from unclip.data.embeddings import (
    FORMAT,
    MANIFEST_NAME,
    VERSION,
    file_of,
    read_manifest,
    sha256,
)
from unclip.data.source import SourceConfig, check_pictures, open_source, sources_of
from unclip.hub import load_clip_of
from unclip.training.batches import collate
from unclip.training.checkpoints import differences
from unclip.training.parallel import patient_accelerator

log = logging.getLogger(__name__)

RESULTS = ("rows", "unreadable", "pieces")
"""What the manifest says only when the last piece is done."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Everything `python -m unclip.embed` needs."""

    out: Path
    """Folder to write; one that holds a part of the same embeddings is gone on with."""
    clip: str = "shapes"
    """CLIP: a model, a folder, `hf-hub:org/name`, or an open_clip model/tag."""
    text: bool = False
    """Write the captions' embeddings too. The prior's training needs none: it reads all of the
    text encoder's states, which it computes from the captions."""
    rows_per_piece: int = 10_000
    """Samples a piece, those that cannot be read included: what a stop may lose."""
    batch_size: int = 256
    """Samples at a time on each process."""
    num_workers: int = 1
    """Processes that fetch data, for each embedding process."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast of the CLIP."""
    max_unreadable: float = 0.1
    """Stop when more than this share of a piece's samples cannot be read."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """Captioned pictures. They are read at `image_size`, or the CLIP's size where that is more."""

    def __post_init__(self) -> None:
        for name in ("rows_per_piece", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}: use 256")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative; got {self.num_workers}: use 0")
        if not 0 <= self.max_unreadable < 1:
            raise ValueError(
                f"max_unreadable must lie in [0, 1); got {self.max_unreadable}: use 0.1"
            )
        if self.source.crop_size is not None:
            raise ValueError(
                f"source.crop_size must be null, for whole pictures are embedded; got "
                f"{self.source.crop_size}: leave it out"
            )
        drawn = {"crop": "random", "flip": True, "caption_choice": "random"}
        for name, value in drawn.items():
            if getattr(self.source, name) == value:
                raise ValueError(
                    f"source.{name} must not be drawn anew each epoch, for each sample is embedded "
                    f"once; got {value}: leave it out"
                )
        if self.source.mix is not None:
            raise ValueError(
                "source.mix must be null, for its parts are read at other rates; got "
                f"{len(self.source.mix)} parts: embed each into a folder of its own"
            )
        check_pictures(self.source)
        if self.source.data == "shapes" and self.source.limit is None:
            raise ValueError(
                "source.limit must say how many pictures of the endless shapes world to embed; "
                "got null: add --limit 100000, say"
            )


class Rows(Dataset[dict[str, Any]]):
    """Samples of a source by row, with why one cannot be read in its place: no other may stand in
    for it, since rows must keep to their pieces."""

    def __init__(self, dataset: Dataset[dict[str, Any]]) -> None:
        (whole,) = sources_of(dataset)
        self._read: Callable[[int], dict[str, Any]] = getattr(whole, "read", whole.__getitem__)

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            return self._read(row)
        except (ValueError, OSError) as error:
            return {"row": row, "unreadable": str(error)}


def _readable(samples: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[int, str]]:
    """A batch of the samples that could be read, and row -> reason of the others."""
    good = [sample for sample in samples if "unreadable" not in sample]
    bad = {s["row"]: s["unreadable"] for s in samples if "unreadable" in s}
    return collate(good) if good else {}, bad


def describe(config: EmbedConfig, clip: FrozenCLIP, dataset: Dataset[Any]) -> dict[str, Any]:
    """The manifest before there is a piece: what all pieces of a folder have in common."""
    (whole,) = sources_of(dataset)
    source = to_dict(config.source)
    if config.source.data != "shapes":
        del source["shapes"]
    return {
        "format": FORMAT,
        "version": VERSION,
        "clip": {
            "name": config.clip,
            "fingerprint": clip.fingerprint(),
            "text_fingerprint": clip.fingerprint("text"),
            "embed_dim": clip.embed_dim,
            "unit_norm": clip.unit_norm,
        },
        "preprocessing": {
            "read_at": config.source.image_size,
            "image_size": clip.image_size,
            "resize": "shorter side, bicubic, antialiased",
            "crop": "centre square",
            "mean": [round(v, 8) for v in ((clip.mean.flatten() + 1) / 2).tolist()],
            "std": [round(v, 8) for v in (clip.std.flatten() / 2).tolist()],
        },
        "dtype": "float16",
        "mixed_precision": config.mixed_precision,
        "text": config.text,
        "rows_per_piece": config.rows_per_piece,
        "source": source,
        "source_rows": len(dataset),  # type: ignore[arg-type]
        # The names, sizes and times of its files.
        "source_state": whole.fingerprint() if isinstance(whole, CaptionedDataset) else None,
        **dict.fromkeys(RESULTS),
    }


def open_folder(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into a new folder, or see that one that is there goes on the same.

    Raises:
        ValueError: the folder holds other embeddings, or something else.
        OSError: it cannot be written.
    """
    there = read_manifest(folder)
    if there is None:
        path = folder / MANIFEST_NAME
        # What a run left that was killed while it wrote the manifest is no other thing.
        if folder.is_dir() and {*folder.iterdir()} - {aside_of(path)}:
            raise ValueError(
                f"out must be a new folder, or one that this command wrote; got {folder}, which "
                "holds other things: choose another --out"
            )
        _write_json(path, manifest)
        return
    for values, name in ((there, "source_state"), (there["clip"], "text_fingerprint")):
        values.setdefault(name, None)  # a release that did not write it
    may_change = ["clip.text_fingerprint", *RESULTS]
    # A CLIP may have moved; its weights are the same by their fingerprint.
    may_change.append("clip.name")
    if there["source_state"] is None:
        may_change.append("source_state")
    if changed := differences(there, manifest, may_change):
        if changed.startswith("source_state: "):
            raise ValueError(
                f"source.data must be as it was when {folder} was begun; got "
                f"{manifest['source']['data']}, whose files have changed since: choose another "
                "--out, or take that folder away to start over"
            )
        raise ValueError(
            f"out must hold embeddings by the same CLIP and settings; got {folder}, by "
            f"{there['clip']['name']}, which differs ({changed}): choose another --out, or go on "
            "as before"
        )


def _write(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with written_file(path) as aside:
            aside.write_bytes(data)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"could not write {path}: {reason}; mend that, and the same command goes on from there"
        ) from error


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(values, indent=1) + "\n").encode())


def _record_path(folder: Path, number: str) -> Path:
    return folder / "pieces" / f"{number}.json"


def records_of(folder: Path, numbers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The records of those pieces that are done and whose files are there whole."""
    gathered = (read_manifest(folder) or {}).get("pieces") or {}
    records = {}
    for number in numbers:
        path = _record_path(folder, number)
        record = json.loads(path.read_text()) if path.is_file() else gathered.get(number)
        if record is not None and all(
            (folder / name).is_file() and (folder / name).stat().st_size == file["bytes"]
            for name, file in record["files"].items()
        ):
            records[number] = record
    return records


def write_piece(
    folder: Path,
    number: str,
    embeds: Mapping[str, list[np.ndarray]],
    columns: Mapping[str, list[str]],
    unreadable: Mapping[int, str],
) -> None:
    """Write the files of a piece, and its record when they are there.

    Args:
        folder: where to.
        number: the piece's.
        embeds: `img_emb` and maybe `text_emb` -> batches [B, D] fp16.
        columns: of the metadata.
        unreadable: row of the source -> why it is left out.
    """
    # Files are made in memory: numpy, given a file, does not notice when the last of an array fails
    # to get to a full disk.
    for kind, batches in embeds.items():
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(batches))
        _write(file_of(folder, kind, number), buffer.getvalue())
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    _write(file_of(folder, "metadata", number), buffer.getvalue())
    files = {}
    for kind in (*embeds, "metadata"):
        path = file_of(folder, kind, number)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    first = [f"row {row}: {reason}" for row, reason in list(unreadable.items())[:3]]
    record = {"rows": table.num_rows, "unreadable": len(unreadable), "first_unreadable": first}
    _write_json(_record_path(folder, number), {**record, "files": files})


def embed(config: EmbedConfig) -> None:
    """Embed what `config` describes, into its folder.

    Raises:
        FileNotFoundError, ValueError: the CLIP or the source cannot be had; the folder holds other
            embeddings; too many samples cannot be read; an embedding does not fit into fp16.
        OSError: the folder cannot be written.
    """
    accelerator = patient_accelerator(config.mixed_precision)
    clip = load_clip_of(config.clip)
    size = max(config.source.image_size, clip.required_image_size())
    config = replace(config, source=replace(config.source, image_size=size))
    dataset = open_source(config.source)
    total = len(dataset)  # type: ignore[arg-type]
    manifest = describe(config, clip, dataset)
    if accelerator.is_main_process:
        open_folder(config.out, manifest)
    accelerator.wait_for_everyone()
    starts = range(0, total, config.rows_per_piece)
    digits = max(4, len(str(len(starts) - 1)))
    pieces = {
        f"{k:0{digits}d}": range(start, min(start + config.rows_per_piece, total))
        for k, start in enumerate(starts)
    }
    own = list(pieces)[accelerator.process_index :: accelerator.num_processes]
    done = records_of(config.out, own)
    todo = {number: pieces[number] for number in own if number not in done}
    if done and accelerator.is_main_process:
        print(f"{len(done)} of {len(own)} pieces are done already")
    _embed_pieces(todo, Rows(dataset), clip.to(accelerator.device), config, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(config.out, manifest, list(pieces))
    accelerator.end_training()


def _embed_pieces(
    todo: Mapping[str, range],
    rows: Rows,
    clip: FrozenCLIP,
    config: EmbedConfig,
    accelerator: Accelerator,
) -> None:
    """Embed and write this process's pieces; one loader fetches for all of them."""
    size = config.batch_size
    batches = [span[k : k + size] for span in todo.values() for k in range(0, len(span), size)]
    loader = iter(
        DataLoader(
            rows,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=_readable,
            num_workers=config.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
    )
    shown = accelerator.is_main_process
    with tqdm(total=sum(map(len, todo.values())), unit="picture", disable=not shown) as bar:
        for number, span in todo.items():
            embeds: dict[str, list[np.ndarray]] = {"img_emb": []}
            columns: dict[str, list[str]] = {"caption": [], "key": []}
            unreadable: dict[int, str] = {}
            for _ in range(0, len(span), size):
                batch, bad = next(loader)
                unreadable |= bad
                bar.update(len(batch.get("caption", ())) + len(bad))
                if not batch:
                    continue
                with accelerator.autocast():
                    image = clip.encode_image(batch["image"].to(clip.device, non_blocking=True))
                    text = clip.encode_text(batch["caption"]).text_embed if config.text else None
                embeds["img_emb"].append(_half(image, config.clip))
                if text is not None:
                    embeds.setdefault("text_emb", []).append(_half(text, config.clip))
                columns["caption"] += batch["caption"]
                columns["key"] += batch["key"]
            if len(unreadable) > config.max_unreadable * len(span):
                row, reason = next(iter(unreadable.items()))
                raise ValueError(
                    f"source.data must hold pictures that can be read; got {len(unreadable)} of "
                    f"the {len(span)} of piece {number} that cannot, such as row {row}: {reason}: "
                    "mend them, or raise max_unreadable"
                )
            write_piece(config.out, number, embeds, columns, unreadable)


def _half(embeds: torch.Tensor, clip: str) -> np.ndarray:
    """Embeddings [B, D] as fp16 on the CPU."""
    half = embeds.float().half().cpu().numpy()
    if not np.isfinite(half).all():
        raise ValueError(
            f"clip must give embeddings that fit into fp16; got some of {clip} that do not: try "
            "--mixed-precision no, or another CLIP"
        )
    return half


def _finish(folder: Path, manifest: Mapping[str, Any], numbers: Sequence[str]) -> None:
    """Gather the pieces' records into the manifest, and say what was left out."""
    records = records_of(folder, numbers)
    if vanished := [number for number in numbers if number not in records]:
        raise ValueError(
            f"out must be left alone while it is written; got {folder} without its pieces "
            f"{', '.join(vanished[:3])}: run the same command again"
        )
    totals = Counter[str]()
    for record in records.values():
        totals.update(rows=record["rows"], unreadable=record["unreadable"])
    _write_json(folder / MANIFEST_NAME, {**manifest, **totals, "pieces": records})
    for number in numbers:
        _record_path(folder, number).unlink(missing_ok=True)
    if (folder / "pieces").is_dir():
        (folder / "pieces").rmdir()
    if totals["unreadable"]:
        first = next(r["first_unreadable"][0] for r in records.values() if r["unreadable"])
        log.warning("left out %d samples that cannot be read: %s", totals["unreadable"], first)
    print(f"{folder}: {totals['rows']} rows in {len(numbers)} pieces")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and embed."""
    config = parse(EmbedConfig, argv, description=__doc__)
    with one_line_errors():
        embed(config)
