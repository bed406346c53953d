"""Bytes of tars: on a local disk, or at any address that fsspec knows (`hf://`, `s3://`, `https://`).

What lies at an address is asked for again, ever later, before it counts as out of reach.  Tars that
cannot be read at an offset, compressed ones above all, are copied to this machine while they are
used; the copies lie in the cache of Hugging Face `datasets` and share a limited room.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import datasets
import fsspec
from filelock import FileLock

from unclip.checkpoint import written_file

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS, FIRST_WAIT = 5, 0.5
"""How often an address is asked, and the seconds before the second time; doubled each time."""
OPEN_FILES = 128
"""Tars that a process keeps open; systems allow a thousand or so files."""
BUSY = 60.0
"""A copy that was read within so many seconds is still needed."""
BLOCK = 2**20
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz")
TAR_NAMES = ("*.tar", "*.tar.gz", "*.tgz", "*.tar.bz2", "*.tar.xz")
"""What tars in a folder are called; of several kinds the first is taken."""
BAD_COMPRESSION = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
"""What reading a compressed file raises where it is damaged or cut off."""


class Unreachable(OSError):
    """An address could not be read, though it was asked several times."""


class HasChanged(OSError):
    """A file is another than when it was indexed."""


def is_remote(path: str) -> bool:
    """Whether it is an address rather than a path."""
    return "://" in path


def digest(*what: Any) -> str:
    """A name for plain values."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """Where indices and copies are kept; HF_HOME or HF_DATASETS_CACHE say where that is."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "unclip_tars"


def retried(action: Callable[[], T], path: str) -> T:
    """What `action` gives; where an address fails it is asked again, ever later.

    Raises:
        Unreachable: naming the address, when it has failed `ATTEMPTS` times.
        FileNotFoundError, PermissionError, HasChanged: at once; waiting would not help.
        ValueError: a package that this kind of address needs is missing.
    """
    if not is_remote(path):
        return action()
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except ImportError as error:
            raise ValueError(
                f"data at {path.split('://')[0]}:// needs a package that is not installed; got "
                f"{path}: {error}"
            ) from error
        except Exception as error:  # each kind of address has errors of its own
            if _is_final(error):
                raise
            failure = error
        if attempt + 1 < ATTEMPTS:
            # Workers that failed together are not to come back together.
            time.sleep(FIRST_WAIT * 2**attempt * random.SystemRandom().uniform(0.75, 1.25))
    raise Unreachable(
        f"{path} cannot be read, asked {ATTEMPTS} times: {failure or type(failure).__name__}"
    ) from failure


def _is_final(error: Exception) -> bool:
    """Whether it would be the same the next time."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None:
        # So fsspec says of a web server, whatever went wrong there.
        return isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410)
    return isinstance(error, (FileNotFoundError, PermissionError, HasChanged, Unreachable))


@dataclass(frozen=True)
class Source:
    """A file as it was when the data set was opened."""

    path: str
    size: int
    """Bytes."""
    changed: str
    """Another text where the content is another."""
    in_place: bool
    """Whether it can be read at any offset."""

    def is_same(self) -> bool:
        """Whether it is there as it was."""
        if is_remote(self.path):  # whose listings are kept
            fsspec.core.url_to_fs(self.path)[0].invalidate_cache()
        return source_of(self.path).changed == self.changed


def source_of(path: str) -> Source:
    """A file as it is now.

    Raises:
        FileNotFoundError: it is not there.
        Unreachable: its address cannot be asked.
    """
    plain = not path.endswith(COMPRESSED)
    if not is_remote(path):
        about = os.stat(path)
        return Source(path, about.st_size, str(about.st_mtime_ns), plain)

    def ask() -> Source:
        system, within = fsspec.core.url_to_fs(path)
        about = system.info(within)
        dates = [str(about.get(name, "")) for name in ("ETag", "mtime", "LastModified")]
        # Servers that give whole files only say so by `partial`; the others do not have it.
        whole_only = about.get("partial") is False or about["size"] is None
        changed = " ".join([str(system.ukey(within)), *dates])
        return Source(path, about["size"] or 0, changed, plain and not whole_only)

    return retried(ask, path)


# Which files


def expand(data: str | list[str]) -> list[str]:
    """The files that paths, addresses, globs and brace ranges name, in order."""
    files = []
    for pattern in [data] if isinstance(data, str) else data:
        for path in _expand_braces(pattern):
            if is_remote(path):
                found = _expand_remote(path)
            else:
                found = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
            if not found:
                within = "" if path == pattern else f" (from {pattern!r})"
                there = "" if is_remote(path) else f": {_what_is_there(path)}"
                raise FileNotFoundError(f"no file matches {path!r}{within}{there}")
            files += found
    return files


def _expand_remote(address: str) -> list[str]:
    """The files at an fsspec address: itself, what its pattern matches, or a folder's tars."""

    def ask() -> list[str]:
        system, path = fsspec.core.url_to_fs(address)
        if not re.search(r"[*?\[]", path):
            try:
                about = system.info(path)  # unlike `exists`, it tells what is not there from what
            except FileNotFoundError:  # cannot be asked
                return []
            if about["type"] != "directory":
                return [address]
            kinds = (system.glob(f"{path.rstrip('/')}/{kind}") for kind in TAR_NAMES)
            return [
                system.unstrip_protocol(found) for found in sorted(next(filter(None, kinds), []))
            ]
        return [system.unstrip_protocol(found) for found in sorted(system.glob(path))]

    return retried(ask, address)


def _what_is_there(pattern: str) -> str:
    """The nearest folder above a path or pattern, and what it holds."""
    folder = Path(pattern).parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder.resolve()} holds {', '.join(names[:5]) or 'nothing'}{more}"


def _expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar; `{train,val}.tar` -> train.tar, val.tar."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if not brace:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", brace[1]):
        first, last = span.groups()
        options = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    else:
        options = brace[1].split(",")
    head, tail = pattern[: brace.start()], pattern[brace.end() :]
    return [path for option in options for path in _expand_braces(head + option + tail)]


# Read at an offset


def read(source: Source, start: int, end: int, copy: Copy | None = None) -> bytes:
    """Bytes `start` to `end` of a file, or of its `copy`.

    Raises OSError if it has gone or changed, or cannot be reached.
    """
    if copy is not None:
        file = _opened_copy(source, copy)
        with suppress(OSError):  # when room is made, those go that were read longest ago
            os.utime(file.fileno())
        content = os.pread(file.fileno(), end - start, start)
    elif is_remote(source.path):
        content = retried(functools.partial(_ask, source.path, start, end), source.path)
    else:
        content = os.pread(_opened(source).fileno(), end - start, start)
    if len(content) != end - start:
        raise HasChanged(f"{source.path} ends before byte {end}: it has changed since indexed")
    return content


def _ask(path: str, start: int, end: int) -> bytes:
    # Made anew each time: fsspec keeps the connection, and makes another after a fork.
    system, within = fsspec.core.url_to_fs(path)
    return system.cat_file(within, start=start, end=end)


# A process keeps its last tars open. Reads name their offset, so that those opened before a fork
# may be shared by the workers.
@functools.lru_cache(OPEN_FILES)
def _opened(source: Source) -> io.FileIO:
    file = io.FileIO(source.path)
    if str(os.fstat(file.fileno()).st_mtime_ns) != source.changed:
        file.close()
        raise HasChanged(f"{source.path} has changed since it was indexed")
    return file


# Read from front to back


class Forward:
    """A file that can only be read on, with the little seeking that `tarfile` asks for: forward,
    or back to where the last read began."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._at, self._last, self._again = file, 0, b"", b""

    def read(self, size: int) -> bytes:
        data, self._again = self._again[:size], self._again[size:]
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        self._at, self._last = self._at + len(data), data
        return data

    def tell(self) -> int:
        return self._at

    def seek(self, to: int) -> int:
        if to < self._at:
            back = self._at - to
            self._at, self._again = to, self._last[len(self._last) - back :] + self._again
        while self._at < to and self.read(min(BLOCK, to - self._at)):
            pass
        return self._at


@contextmanager
def opened(source: Source) -> Iterator[Any]:
    """A tar to be read once from front to back, its compression undone."""
    path = source.path
    if source.in_place and not is_remote(path):
        with open(path, "rb") as file:
            yield file
        return
    kind = "gzip" if path.endswith(".tgz") else "infer"
    with fsspec.open(path, "rb", compression=kind) as stream:
        yield Forward(stream)


# Copies on this machine


@dataclass(frozen=True)
class Copy:
    """What is copied of a tar that cannot be read at an offset."""

    length: int
    """Its first so many bytes, uncompressed."""
    room: int
    """Bytes that all copies may take together, but for those being made."""


@functools.lru_cache(OPEN_FILES)
def _opened_copy(source: Source, copy: Copy) -> io.FileIO:
    for _ in range(3):  # between the copying and the opening another process may take it away
        try:
            return io.FileIO(copy_of(source, copy))
        except FileNotFoundError as error:
            gone = error
    raise gone


def copy_of(source: Source, copy: Copy) -> Path:
    """The copy of a tar, made if it is not there; of a machine's processes one makes it.

    Raises OSError if the tar has gone or changed, or cannot be reached.
    """
    folder = cache_folder() / "copies"
    where = source.path if is_remote(source.path) else os.path.abspath(source.path)
    name = digest(where, source.size, source.changed, copy.length)
    path = folder / f"{name}.tar"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name[:2]}.lock"):
            if not path.is_file():
                retried(functools.partial(_copy, source, copy, path), source.path)
    return path


def _copy(source: Source, copy: Copy, path: Path) -> None:
    if not source.is_same():
        raise HasChanged(f"{source.path} has changed since it was indexed")
    left = copy.length
    # Held from the making of room until the copy stands in its place, so that copies that are
    # finished at the same moment cannot exceed the room between them.
    lock = FileLock(path.parent / ".room.lock")
    try:
        with opened(source) as stream, written_file(path) as aside:
            with aside.open("wb") as out:
                while left and (block := stream.read(min(BLOCK, left))):
                    out.write(block)
                    left -= len(block)
            if left:
                raise EOFError(f"it ends {left} bytes too early")
            lock.acquire()
            _make_room(path.parent, copy.room - copy.length, copy.room)
    except BAD_COMPRESSION as error:
        raise OSError(f"{source.path} cannot be unpacked: {error}") from error
    finally:
        lock.release()


def _make_room(folder: Path, left: int, room: int) -> None:
    """Take away the copies that were read longest ago, until the others fit into `left` bytes."""
    there = [(path.stat(), path) for path in folder.glob("*.tar")]
    for about, path in sorted(there, key=lambda entry: -entry[0].st_mtime):
        left -= about.st_size
        if left < 0:
            if time.time() - about.st_mtime < BUSY:
                _warn_of_room(room)
            # Whoever has it open reads on: the file goes when the last has closed it.
            path.unlink()


@functools.lru_cache(1)
def _warn_of_room(room: int) -> None:
    logger.warning(
        "the tars in use need more room than copies_gb allows (%.1f): they are copied again and "
        "again; raise it, or lower shuffle_streams",
        room / 1e9,
    )
