"""A look at a source before training: what is in it, what is wrong with it, how long an epoch is.

`python -m unclip.data check SOURCE` reads the files themselves rather than through the data set,
which mends or skips what it can: here every fault is to be named.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tarfile
import textwrap
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from unclip.data.embeddings import (
    find_caption_column,
    find_pieces,
    is_embedding_folder,
    open_rows,
    read_manifest,
    sha256,
)
from unclip.data.images import decode_image, to_pil
from unclip.data.source import SourceConfig, open_source
from unclip.data.storage import expand as _expand
from unclip.data.tables import CAPTION_COLUMNS, CAPTION_FILES
from unclip.data.tars import EXTENSIONS

NAMES_SHOWN = 3
CLIP_CONTEXT = 77
"""Tokens that OpenAI's CLIP reads of a caption, and nearly every other."""
SHEET_COLUMNS, SHEET_ROWS, CELL, LINES = 6, 4, 160, 3


@dataclass(kw_only=True)
class Sample:
    """A picture and its caption as found; None is missing."""

    name: str
    """Where it lies, for the report."""
    key: str
    picture: bytes | Path | Image.Image | None
    caption: str | None


@dataclass(kw_only=True)
class Report:
    """What a check has found so far."""

    source: str
    kind: str = ""
    samples: int = 0
    usable: int = 0
    """Samples with a caption and a picture that can be read, as far as pictures were decoded."""
    decoded: int = 0
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Cause -> names."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Characters of the captions."""
    too_long: int = 0
    context_length: int = CLIP_CONTEXT
    more: dict[str, Any] = field(default_factory=dict)
    """What only some sources have to say."""

    def wrong(self, cause: str, name: str) -> None:
        """Enter a fault."""
        self.faults.setdefault(cause, []).append(name)

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
            "source": self.source,
            "kind": self.kind,
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
            **self.more,
            "faults": {
                cause: {"count": len(names), "first": names[:NAMES_SHOWN]}
                for cause, names in self.faults.items()
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


# ------------------------------------------------------------------------------- what is there


def scan(config: SourceConfig, report: Report) -> Iterator[Sample]:
    """Every sample of a source of pictures, whole or not, faults of its files entered.

    Raises:
        FileNotFoundError, ValueError: there is no such source, or nothing of it can be read.
    """
    data = config.data
    path = Path(data)
    if data != "shapes" and path.is_dir():
        tars = sorted(str(file) for file in path.glob("*.tar"))
        report.kind = f"{len(tars)} WebDataset tars" if tars else "folder of pictures"
        return _scan_tars(tars, config, report) if tars else _scan_folder(path, config, report)
    if data == "shapes" or not (path.suffix in (".tar", ".tgz", ".parquet", ".gz") or "*" in data):
        report.kind = "shapes world" if data == "shapes" else "Hub data set"
        return _scan_samples(config, report)
    files = _expand(data)
    is_parquet = all(file.endswith(".parquet") for file in files)
    report.kind = f"{len(files)} {'Parquet files' if is_parquet else 'WebDataset tars'}"
    return (_scan_parquet if is_parquet else _scan_tars)(files, config, report)


def _scan_tars(files: list[str], config: SourceConfig, report: Report) -> Iterator[Sample]:
    for file in files:
        parts: dict[str, bytes] = {}
        last = ""
        try:
            with tarfile.open(file) as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    path = PurePosixPath(member.name)
                    if path.is_absolute() or ".." in path.parts:
                        report.wrong("path that climbs out of the tar", f"{file}: {member.name}")
                        continue
                    stem, _, extension = path.name.partition(".")
                    key = str(path.with_name(stem or path.name))
                    if key != last and parts:
                        yield _from_parts(file, last, parts, config, report)
                        parts = {}
                    last = key
                    content = tar.extractfile(member)
                    assert content is not None
                    data = content.read()
                    if len(data) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    if extension in parts:
                        report.wrong("duplicate key", f"{file}: {member.name}")
                    parts[extension] = data
            if file.endswith(".tar") and not _ends_with_zeros(file):
                report.wrong("tar cut off", file)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            if isinstance(error, FileNotFoundError):
                raise
            report.wrong("tar cut off", f"{file}: {error}")
        if parts:
            yield _from_parts(file, last, parts, config, report)


def _ends_with_zeros(tar: str) -> bool:
    with open(tar, "rb") as file:
        file.seek(-min(512, file.seek(0, 2)), 2)
        return not any(file.read())


def _from_parts(
    file: str, key: str, parts: dict[str, bytes], config: SourceConfig, report: Report
) -> Sample:
    """A sample of the files of one key in a tar."""
    name = f"{file}: {key}"
    extension, *keys = config.caption_key.split(".")
    caption: Any = None
    if (data := parts.get(extension)) is not None:
        try:
            caption = json.loads(data) if keys else data.decode("utf-8")
            for step in keys:
                caption = caption.get(step) if isinstance(caption, dict) else None
        except UnicodeDecodeError:
            report.wrong("caption not UTF-8", name)
            caption = ""
        except ValueError:
            report.wrong("json that cannot be read", name)
            caption = ""
    picture = next((parts[e] for e in EXTENSIONS if e in parts), None)
    return Sample(
        name=name,
        key=key,
        picture=picture,
        caption=caption if isinstance(caption, str) else None,
    )


def _scan_folder(folder: Path, config: SourceConfig, report: Report) -> Iterator[Sample]:
    pictures = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix.lower().lstrip(".") in EXTENSIONS
    )
    listed = next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)
    if listed is None:
        with_text = {
            p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.txt")
        }
        for name in pictures:
            stem = Path(name).with_suffix("").as_posix()
            path, caption = (folder / name).with_suffix(".txt"), None
            if stem in with_text:
                caption = _text(path, report)
            yield Sample(name=name, key=name, picture=folder / name, caption=caption)
        stems = {Path(name).with_suffix("").as_posix() for name in pictures}
        for stem in sorted(with_text - stems):
            yield Sample(name=f"{stem}.txt", key=stem, picture=None, caption="")
        return
    text = _text(listed, report)
    try:
        lines = text.lstrip("\ufeff").splitlines()
        if listed.suffix == ".csv":
            rows = list(csv.DictReader(lines))
        else:
            rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{listed} must hold one json a line; got {error}: mend it") from error
    columns = list(rows[0]) if rows else []
    wanted = (config.caption_column,) if config.caption_column else CAPTION_COLUMNS
    column = next((name for name in wanted if name in columns), None)
    if "file_name" not in columns or column is None:
        raise ValueError(
            f"{listed} must have the columns file_name and {' or '.join(wanted)}; got {columns}: "
            "rename them, or set caption_column"
        )
    for row in rows:
        name = Path(row["file_name"]).as_posix()
        path = folder / name
        yield Sample(
            name=name,
            key=name,
            picture=path if path.is_file() else None,
            caption=str(row.get(column) or ""),
        )
    for name in sorted(set(pictures) - {Path(row["file_name"]).as_posix() for row in rows}):
        yield Sample(name=name, key=name, picture=folder / name, caption=None)


def _text(path: Path, report: Report) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        report.wrong("caption not UTF-8", str(path))
        return ""


def _scan_parquet(files: list[str], config: SourceConfig, report: Report) -> Iterator[Sample]:
    for file in files:
        try:
            table = pq.ParquetFile(file)
            schema = table.schema_arrow
            caption = find_caption_column(Path(file), config.caption_column)
            images = [f.name for f in schema if pyarrow.types.is_struct(f.type)]
            image = config.image_column or next(iter(images), None)
            if image not in schema.names:
                raise ValueError(
                    f"image_column must be a column of pictures of {file}; got "
                    f"{config.image_column!r}: choose one of {', '.join(schema.names)}"
                )
            row = 0
            for batch in table.iter_batches(batch_size=64, columns=[image, caption]):
                for values in batch.to_pylist():
                    name, picture = f"{file}: row {row}", values[image]
                    if isinstance(picture, dict):
                        linked = Path(picture["path"]) if picture.get("path") else None
                        picture = picture.get("bytes") or linked
                    yield Sample(name=name, key=name, picture=picture, caption=values[caption])
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            report.wrong("Parquet file that cannot be read", f"{file}: {error}")


def _scan_samples(config: SourceConfig, report: Report) -> Iterator[Sample]:
    """Samples as the data set gives them: of what has no files here to look into."""
    if config.data == "shapes" and config.limit is None:
        raise ValueError("limit must be set for the endless shapes world; got none: --limit 1000")
    dataset: Any = open_source(config)
    read = getattr(dataset, "read", dataset.__getitem__)
    for row in range(len(dataset)):
        try:
            sample = read(row)
        except (ValueError, OSError) as error:
            report.wrong("corrupt picture", f"row {row}: {error}")
            continue
        picture = to_pil(sample["image"])
        # Keys need not be told apart where there are no files.
        yield Sample(
            name=sample["key"], key=f"row {row}", picture=picture, caption=sample["caption"]
        )


# --------------------------------------------------------------------------------- looking at it


def check_pictures(
    config: SourceConfig, report: Report, is_cut: Callable[[str], Any], every: int = 1
) -> list[tuple[Image.Image, str]]:
    """Look at every sample of a source, and decode one picture in `every`.

    Returns:
        Some samples drawn at random, for the contact sheet.

    Raises:
        FileNotFoundError, ValueError: as `scan` does.
    """
    keys: set[str] = set()
    shown: list[tuple[Image.Image, str]] = []
    room = SHEET_COLUMNS * SHEET_ROWS
    choice = random.Random(0)
    for sample in scan(config, report):
        if config.limit is not None and report.samples == config.limit:
            break
        report.samples += 1
        if sample.key in keys:
            report.wrong("duplicate key", sample.name)
        keys.add(sample.key)
        if sample.picture is None:
            report.wrong("missing picture", sample.name)
        if sample.caption is None:
            report.wrong("missing caption", sample.name)
        elif not sample.caption.strip() and sample.picture is not None:
            report.wrong("empty caption", sample.name)
        if sample.picture is None or not (caption := (sample.caption or "").strip()):
            continue
        report.caption(caption, is_cut)
        if (report.samples - 1) % every:
            report.usable += 1
            continue
        try:
            picture = decode(sample.picture, config.background)
        except (ValueError, OSError) as error:
            report.wrong("corrupt picture", f"{sample.name}: {error}")
            continue
        report.usable += 1
        report.decoded += 1
        report.sizes[picture.size] += 1
        # Of all seen so far each is shown with the same probability, whatever is still to come.
        place = len(shown) if len(shown) < room else choice.randrange(report.decoded)
        if place < room:
            picture.thumbnail((CELL, CELL))
            shown[place : place + 1] = [(picture, caption)]
    if not report.samples and not report.faults:
        raise ValueError(f"{config.data} must hold captioned pictures; got none: name another")
    return shown


def decode(picture: bytes | Path | Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A picture as 8-bit RGB; ValueError or OSError if it is corrupt, empty, or a bomb."""
    if isinstance(picture, Image.Image):
        return picture
    data = picture.read_bytes() if isinstance(picture, Path) else picture
    if not data:
        raise ValueError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return decode_image(data, background=background)


def check_embeddings(
    folder: Path, caption_column: str | None, report: Report, is_cut: Callable[[str], Any]
) -> None:
    """Look at every row of a folder of embeddings, and at its files' checksums.

    Raises:
        ValueError: the column of captions is not there.
    """
    report.kind = "embeddings"
    pieces, width, faults = find_pieces(folder)
    for fault in faults:
        report.wrong(fault.cause, fault.name)
    unreadable = any(fault.cause == "unreadable manifest" for fault in faults)
    manifest = None if unreadable else read_manifest(folder)
    keys: set[str] = set()
    least, most = float("inf"), 0.0
    for piece in pieces:
        rows = open_rows(piece.images)
        finite = np.ones(len(rows), bool)
        for start in range(0, len(rows), 4096):  # a piece of LAION's has a million rows
            part = np.asarray(rows[start : start + 4096], np.float32)
            norms = np.linalg.norm(part, axis=1)
            finite[start : start + 4096] = np.isfinite(norms)
            if (good := norms[np.isfinite(norms)]).size:
                least, most = min(least, float(good.min())), max(most, float(good.max()))
        for bad in np.flatnonzero(~finite).tolist():
            report.wrong("row that is not finite", f"{piece.images.name}: row {bad}")
        column = find_caption_column(piece.metadata, caption_column)
        with pq.ParquetFile(piece.metadata) as table:
            columns = [column, *({"key"} & {*table.schema_arrow.names})]
            row = 0
            for batch in table.iter_batches(columns=columns):
                for values in batch.to_pylist():
                    name = f"{piece.metadata.name}: row {row}"
                    report.samples += 1
                    caption = (values[column] or "").strip()
                    if caption:
                        report.caption(caption, is_cut)
                    else:
                        report.wrong("empty caption", name)
                    if (key := values.get("key")) is not None:
                        if key in keys:
                            report.wrong("duplicate key", f"{name}: {key}")
                        keys.add(key)
                    report.usable += bool(caption) and bool(finite[row])
                    row += 1
        record = ((manifest or {}).get("pieces") or {}).get(piece.number, {"files": {}})
        for name, file in record["files"].items():
            if not (folder / name).is_file():  # of text_emb: the others' lack is found by now
                report.wrong("missing piece", name)
            elif sha256(folder / name) != file["sha256"]:
                report.wrong("file that has changed", name)
    norm = {"min": round(least, 4), "max": round(most, 4)} if most else None
    clip = None if manifest is None else manifest["clip"]
    report.more["embeddings"] = {"pieces": len(pieces), "width": width, "norm": norm, "clip": clip}


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
    command.add_argument("source", help="what --data of the training scripts takes")
    command.add_argument("--caption-key", default="txt", help="tars: extension, or json.caption")
    command.add_argument("--caption-column", help="column of captions")
    command.add_argument("--image-column", help="Parquet and Hub: column of pictures")
    command.add_argument("--split", default="train", help="split of a Hub data set")
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
    report = Report(source=args.source)
    clip = None if args.clip is None else args.load_clip(args.clip)
    if clip is None:
        is_cut = _openai_cut()
    else:
        is_cut, report.context_length = clip.cut_text, clip.context_length
    config = SourceConfig(
        data=args.source,
        caption_key=args.caption_key,
        caption_column=args.caption_column,
        image_column=args.image_column,
        split=args.split,
        limit=args.limit,
    )
    if is_embedding_folder(args.source):
        check_embeddings(Path(args.source), args.caption_column, report, is_cut)
        found = report.more["embeddings"]["clip"]
        if clip is not None and found is not None and found["fingerprint"] != clip.fingerprint():
            report.wrong("another CLIP", f"{found['name']} made them, not {clip.name}")
        if clip is not None and report.more["embeddings"]["width"] not in (0, clip.embed_dim):
            width = report.more["embeddings"]["width"]
            report.wrong("another CLIP", f"{width} wide, {clip.embed_dim} in {clip.name}")
    else:
        shown = check_pictures(config, report, is_cut, args.every)
        if shown:
            args.sheet.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(shown).save(args.sheet)
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
    return 1 if report.faults else 0


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
    lines = [
        f"{values['source']}: {values['kind']}",
        f"samples   {values['samples']}, of which {values['usable']} can be trained on",
    ]
    if side := pictures["shorter_side"]:
        sizes = ", ".join(f"{size} ({n})" for size, n in pictures["sizes"].items())
        lines.append(
            f"pictures  {pictures['decoded']} decoded; shorter side {side['min']} to {side['max']} "
            f"px, median {side['median']}; {sizes}"
        )
    if rows := values.get("embeddings"):
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
        more = f" and {found['count'] - NAMES_SHOWN} more" if found["count"] > NAMES_SHOWN else ""
        lines.append(f"wrong     {cause}: {found['count']}: {'; '.join(found['first'])}{more}")
    if not values["faults"]:
        lines.append("nothing is wrong")
    return "\n".join(lines)
