"""A look at sources before training: what is in them, what is wrong, how long an epoch is.

`python -m unclip.data check SOURCE...` reads through the data set that training reads, so that the
two cannot disagree: what that leaves out or skips is named here, with the first of each kind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from unclip.data.captioned import CaptionedDataset, cause_of
from unclip.data.causes import EMPTY_CAPTION, FILTERED, NAMES_KEPT, Tally
from unclip.data.embeddings import (
    Piece,
    find_caption_column,
    find_pieces,
    is_embedding_folder,
    made_by,
    open_rows,
    read_manifest,
    sha256,
)
from unclip.data.images import to_pil
from unclip.data.source import SourceConfig, open_source, sources_of

CLIP_CONTEXT = 77
"""Tokens that OpenAI's CLIP reads of a caption, and nearly every other."""
SHEET_COLUMNS, SHEET_ROWS, CELL, LINES = 6, 4, 160, 3
DUPLICATE = "duplicate key"


@dataclass(kw_only=True)
class Report:
    """What a check has found so far."""

    sources: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    samples: int = 0
    usable: int = 0
    """Samples with a caption and a picture that can be read, as far as pictures were decoded."""
    decoded: int = 0
    faults: Tally = field(default_factory=Tally)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Characters of the captions."""
    too_long: int = 0
    context_length: int = CLIP_CONTEXT
    embeddings: list[dict[str, Any]] = field(default_factory=list)
    """Of each folder of embeddings what else there is to say."""
    more: dict[str, Any] = field(default_factory=dict)

    def wrong(self, cause: str, name: str) -> None:
        """Enter a fault."""
        self.faults.add(cause, [name])

    def caption(self, caption: str, is_cut: Callable[[str], Any]) -> None:
        """Enter a caption."""
        self.lengths[len(caption)] += 1
        self.too_long += bool(is_cut(caption))

    def values(self) -> dict[str, Any]:
        """All of it in plain values, for `--json`."""
        sides: Counter[int] = Counter()
        for size, count in self.sizes.items():
            sides[min(size)] += count
        return {
            "sources": self.sources,
            "kinds": self.kinds,
            "samples": self.samples,
            "usable": self.usable,
            "pictures": {
                "decoded": self.decoded,
                "shorter_side": spread(sides),
                "sizes": {f"{w}x{h}": n for (w, h), n in self.sizes.most_common(5)},
            },
            "captions": {
                "characters": spread(self.lengths),
                "context_length": self.context_length,
                "too_long": self.too_long,
            },
            "embeddings": self.embeddings,
            **self.more,
            "faults": {
                cause: {"count": count, "first": self.faults.names[cause]}
                for cause, count in self.faults.counts.items()
            },
        }


def spread(counts: Counter[int]) -> dict[str, int] | None:
    """Least, middle and greatest of counted numbers; None where there are none."""
    total, seen = sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if 2 * seen >= total:
            return {"min": min(counts), "median": value, "max": max(counts)}
    return None


# -------------------------------------------------------------------------------- looking at it


def repeated(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a key comes that has come before."""
    again = np.ones(len(keys), dtype=bool)
    again[np.unique(keys, return_index=True)[1]] = False
    return np.flatnonzero(again)


def short(key: str) -> int:
    """Eight bytes for a key: those of a billion samples are to fit into memory."""
    encoded = key.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


class Sheet:
    """Some samples drawn at random, each of those seen with the same probability."""

    def __init__(self) -> None:
        self.samples: list[tuple[Image.Image, str]] = []
        self._seen = 0
        self._choice = random.Random(0)

    def add(self, picture: Image.Image, caption: str) -> None:
        """Show a sample, maybe."""
        room = SHEET_COLUMNS * SHEET_ROWS
        self._seen += 1
        place = self._seen - 1 if self._seen <= room else self._choice.randrange(self._seen)
        if place < room:
            picture.thumbnail((CELL, CELL))
            self.samples[place : place + 1] = [(picture, caption)]


def check_pictures(
    config: SourceConfig, report: Report, is_cut: Callable[[str], Any], sheet: Sheet, every: int = 1
) -> None:
    """Look at every sample of a source, and decode one picture in `every`.

    Raises:
        FileNotFoundError, ValueError: as `open_source` does.
    """
    if config.data == "shapes" and config.limit is None:
        raise ValueError("limit must be set for the endless shapes world; got none: --limit 1000")
    dataset: Any = open_source(config)
    (whole,) = sources_of(dataset)
    is_read = isinstance(whole, CaptionedDataset)
    report.kinds.append(whole.kind if isinstance(whole, CaptionedDataset) else "shapes world")
    count = len(dataset)
    keys = np.arange(count, dtype=np.uint64)
    if isinstance(whole, CaptionedDataset):
        report.faults.update(whole.left_out)
        report.faults.counts.pop(FILTERED, None)  # which is no fault
        report.samples += sum(whole.left_out.counts.values())
        keys[:] = [short(whole.key(index)[0]) for index in range(count)]
    report.samples += count
    found = repeated(keys)
    report.faults.add(DUPLICATE, [name_of(whole, k) for k in found[:NAMES_KEPT]], len(found))
    for index in range(count):
        try:
            captions, picture = _look(whole, index, decode=index % every == 0)
        except (ValueError, OSError) as error:
            report.wrong(cause_of(error), f"{name_of(whole, index)}: {error}")
            continue
        report.usable += 1
        for caption in captions:
            report.caption(caption, is_cut)
        if picture is not None:
            report.decoded += 1
            if is_read:
                report.sizes[picture.size] += 1
            sheet.add(picture, captions[0])


def name_of(dataset: Any, index: int) -> str:
    """How a report calls a sample."""
    key, file = dataset.key(int(index))
    return f"{file}: {key}" if file else key


def _look(dataset: Any, index: int, decode: bool) -> tuple[list[str], Image.Image | None]:
    """A sample's captions, and its picture if it is to be decoded."""
    if not isinstance(dataset, CaptionedDataset):  # the shapes world: drawn at the size asked for
        sample = dataset[index]
        return [sample["caption"]], to_pil(sample["image"]) if decode else None
    if not decode:
        return dataset.captions(index), None
    picture, captions = dataset.look(index)
    return captions, picture


def check_embeddings(
    folder: Path, caption_column: str | None, report: Report, is_cut: Callable[[str], Any]
) -> None:
    """Look at every row of a folder of embeddings, and at its files' checksums.

    Raises:
        ValueError: the column of captions is not there.
    """
    report.kinds.append("embeddings")
    pieces, width, faults = find_pieces(folder)
    for fault in faults:
        report.wrong(fault.cause, fault.name)
    unreadable = any(fault.cause == "unreadable manifest" for fault in faults)
    manifest = None if unreadable else read_manifest(folder)
    starts = list(accumulate((piece.rows for piece in pieces), initial=0))
    keys = np.arange(starts[-1], dtype=np.uint64)  # where there are none, all are different
    norms: list[float] = []
    for piece, start in zip(pieces, starts[:-1], strict=True):
        finite = _check_rows(piece, report, norms)
        column = find_caption_column(piece.metadata, caption_column)
        with pq.ParquetFile(piece.metadata) as table:
            columns = [column, *({"key"} & {*table.schema_arrow.names})]
            row = 0
            for batch in table.iter_batches(columns=columns):
                for values in batch.to_pylist():
                    caption = (values[column] or "").strip()
                    if caption:
                        report.caption(caption, is_cut)
                    else:
                        report.wrong(EMPTY_CAPTION, f"{piece.metadata.name}: row {row}")
                    if (key := values.get("key")) is not None:
                        keys[start + row] = short(key)
                    report.usable += bool(caption) and bool(finite[row])
                    row += 1
        report.samples += row
        _check_files(folder, ((manifest or {}).get("pieces") or {}).get(piece.number), report)
    found = repeated(keys)
    names = []
    for row in found[:NAMES_KEPT].tolist():
        number = int(np.searchsorted(starts, row, side="right")) - 1
        names.append(f"{pieces[number].metadata.name}: row {row - starts[number]}")
    report.faults.add(DUPLICATE, names, len(found))
    norm = {"min": round(min(norms), 4), "max": round(max(norms), 4)} if norms else None
    clip = None if manifest is None else manifest["clip"]
    report.embeddings.append({"pieces": len(pieces), "width": width, "norm": norm, "clip": clip})


def _check_rows(piece: Piece, report: Report, norms: list[float]) -> NDArray[np.bool_]:
    """Which rows of a piece are finite, bool [R]; the least and greatest norm go into `norms`."""
    rows = open_rows(piece.images)
    finite = np.ones(len(rows), bool)
    for start in range(0, len(rows), 4096):  # a piece of LAION's has a million rows
        part = np.linalg.norm(np.asarray(rows[start : start + 4096], np.float32), axis=1)
        finite[start : start + 4096] = np.isfinite(part)
        if (good := part[np.isfinite(part)]).size:
            norms[:] = [min([*norms, float(good.min())]), max([*norms, float(good.max())])]
    for bad in np.flatnonzero(~finite).tolist():
        report.wrong("row that is not finite", f"{piece.images.name}: row {bad}")
    return finite


def _check_files(folder: Path, record: dict[str, Any] | None, report: Report) -> None:
    """Hold a piece's files against what the manifest says of them."""
    for name, file in (record or {"files": {}})["files"].items():
        if not (folder / name).is_file():  # of text_emb: the others' lack is found by now
            report.wrong("missing piece", name)
        elif sha256(folder / name) != file["sha256"]:
            report.wrong("file that has changed", name)


def contact_sheet(samples: list[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures in a grid, each above its caption."""
    font = ImageFont.load_default(11)
    height = CELL + LINES * 13 + 8
    columns = min(SHEET_COLUMNS, max(1, len(samples)))
    rows = -(-len(samples) // columns) or 1
    sheet = Image.new("RGB", (columns * (CELL + 8), rows * height), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for k, (picture, caption) in enumerate(samples):
        left, top = k % columns * (CELL + 8) + 4, k // columns * height + 4
        offset = ((CELL - picture.width) // 2, (CELL - picture.height) // 2)
        sheet.paste(picture, (left + offset[0], top + offset[1]))
        words = textwrap.wrap(caption, 28, max_lines=LINES, placeholder=" …")
        pen.multiline_text((left, top + CELL), "\n".join(words), (0, 0, 0), font, spacing=2)
    return sheet


# ----------------------------------------------------------------------------------- the command


def add_commands(commands: Any) -> None:
    """Add `check` to the commands of `python -m unclip.data`."""
    command = commands.add_parser(
        "check",
        help="look at a source before training",
        description="Look at a source before training. Exit status: 0 good, 1 something is wrong, "
        "2 the source cannot be used at all.",
    )
    command.add_argument(
        "source", nargs="+", help="what --data of the training scripts takes; several count as one"
    )
    command.add_argument("--caption-key", default="txt", help="tars: extension, or json.caption")
    command.add_argument("--caption-column", help="column of captions")
    command.add_argument("--image-column", help="Parquet and Hub: column of pictures")
    command.add_argument("--split", default="train", help="split of a Hub data set")
    command.add_argument("--where", default="", help="filter of samples, as in training")
    command.add_argument("--limit", type=int, help="look at the first so many samples only")
    command.add_argument("--every", type=int, default=1, help="decode one picture in so many")
    command.add_argument("--clip", help="whose context captions must fit; OpenAI's if left out")
    command.add_argument("--batch-size", type=int, default=64, help="of the training to come")
    command.add_argument("--num-processes", type=int, default=1, help="of the training to come")
    command.add_argument(
        "--sheet", type=Path, default=Path("outputs/contact-sheet.png"), help="picture to write"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check what the arguments say and print it; returns the exit status.

    `args.load_clip` loads a CLIP by its name.

    Raises:
        FileNotFoundError, ValueError: the source cannot be used, or an argument is wrong.
    """
    for name in ("every", "batch_size", "num_processes"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(args, name)}: use 1")
    share = -(-args.batch_size // args.num_processes)
    if share * args.num_processes != args.batch_size:
        raise ValueError(
            f"batch_size must be a multiple of num_processes, {args.num_processes}; got "
            f"{args.batch_size}: use {share * args.num_processes}"
        )
    report, sheet = Report(sources=args.source), Sheet()
    clip = None if args.clip is None else args.load_clip(args.clip)
    if clip is None:
        is_cut = _openai_cut()
    else:
        is_cut, report.context_length = clip.cut_text, clip.context_length
    for source in args.source:
        if is_embedding_folder(source):
            check_embeddings(Path(source), args.caption_column, report, is_cut)
            if clip is not None:
                _check_clip(clip, report)
            continue
        config = SourceConfig(
            data=source,
            caption_key=args.caption_key,
            caption_column=args.caption_column,
            image_column=args.image_column,
            split=args.split,
            where=args.where,
            limit=args.limit,
            max_bad_share=1.0,  # what is bad is to be counted
        )
        check_pictures(config, report, is_cut, sheet, args.every)
    if sheet.samples:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(sheet.samples).save(args.sheet)
        report.more["contact_sheet"] = str(args.sheet)
    if report.usable < args.num_processes:
        report.wrong(
            "fewer samples than processes", f"{report.usable} for {args.num_processes} processes"
        )
    report.more["epoch"] = {
        "batch_size": args.batch_size,
        "num_processes": args.num_processes,
        "samples_per_process": share,
        "steps": round(report.usable / args.batch_size, 1),
    }
    values = report.values()
    print(json.dumps(values, indent=1) if args.json else describe(values))
    return 1 if report.faults.counts else 0


def _check_clip(clip: Any, report: Report) -> None:
    """Hold the embeddings looked at last against the CLIP that is to be trained on."""
    found, width = (report.embeddings[-1][name] for name in ("clip", "width"))
    if found is not None and not made_by(found, clip):
        report.wrong("another CLIP", f"{found['name']} made them, not {clip.name}")
    if width not in (0, clip.embed_dim):
        report.wrong("another CLIP", f"{width} wide, {clip.embed_dim} in {clip.name}")


def _openai_cut() -> Callable[[str], bool]:
    """Whether a caption has more tokens than OpenAI's CLIP reads, by its tokenizer."""
    # Takes seconds to import.
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    room = CLIP_CONTEXT - 2  # start and end tokens
    # A token covers at least one byte: short captions need not be tokenised.
    return lambda caption: len(caption.encode()) > room and len(tokenizer.encode(caption)) > room


def describe(values: dict[str, Any]) -> str:
    """A report as text."""
    epoch, captions, pictures = values["epoch"], values["captions"], values["pictures"]
    pairs = zip(values["sources"], values["kinds"], strict=True)
    lines = [f"{source}: {kind}" for source, kind in pairs]
    lines.append(f"samples   {values['samples']}, of which {values['usable']} can be trained on")
    if side := pictures["shorter_side"]:
        sizes = ", ".join(f"{size} ({n})" for size, n in pictures["sizes"].items())
        lines.append(
            f"pictures  {pictures['decoded']} decoded; shorter side {side['min']} to {side['max']} "
            f"px, median {side['median']}; {sizes}"
        )
    for rows in values["embeddings"]:
        norm, clip = rows["norm"], rows["clip"]
        made = f"by {clip['name']} ({clip['fingerprint']})" if clip else "no manifest says by what"
        norms = f", norms {norm['min']} to {norm['max']}" if norm else ""
        lines.append(f"rows      {rows['pieces']} pieces, {rows['width']} wide{norms}; {made}")
    if length := captions["characters"]:
        lines.append(
            f"captions  {length['min']} to {length['max']} characters, median {length['median']}; "
            f"{captions['too_long']} have more than the CLIP's {captions['context_length']} tokens"
        )
    lines.append(
        f"epoch     {epoch['steps']} steps of {epoch['batch_size']} samples, "
        f"{epoch['samples_per_process']} on each of {epoch['num_processes']} processes"
    )
    if "contact_sheet" in values:
        lines.append(f"sheet     {values['contact_sheet']}")
    for cause, found in values["faults"].items():
        left = found["count"] - len(found["first"])
        more = f" and {left} more" if left > 0 else ""
        lines.append(f"wrong     {cause}: {found['count']}: {'; '.join(found['first'])}{more}")
    if not values["faults"]:
        lines.append("nothing is wrong")
    return "\n".join(lines)
