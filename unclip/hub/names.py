"""From a model's name to its folder."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

PRETRAINED = Path(__file__).parent.parent / "pretrained"

ALLOWED_FILES = ["*.yaml", "*.json", "*.safetensors", "*.txt", "*.gz", "*.md"]
"""What is fetched of a repository unless a file is named: plain text and safetensors."""
PICKLES = (".ckpt", ".pt", ".pth", ".th")
"""What is fetched only where it is named, and read as `unclip.hub.pickles` reads it."""


def shipped_names() -> list[str]:
    """Models that come with the package."""
    return sorted(folder.name for folder in PRETRAINED.glob("*") if folder.is_dir())


def resolve(name: str | Path) -> Path:
    """The folder of a model, or the file that is one.

    Args:
        name: a shipped name such as `shapes`, a folder (or a file that is a checkpoint), or
            `org/name[/path][@revision]` on the Hub, `path` being a folder or a file of the
            repository. A shipped name wins over a folder of the same name: write `./shapes` for
            that one.

    Raises:
        FileNotFoundError: it is none of these, or the Hub cannot be reached and the local cache
            does not hold it.
    """
    name = str(name)
    if name in shipped_names():
        return PRETRAINED / name
    if name and (path := Path(name)).exists():  # Path("") is the current folder
        return path
    address, _, revision = name.partition("@")
    org, *rest = address.split("/")
    repository, inside = "/".join([org, *rest[:1]]), rest[1:]
    try:
        if not rest:
            raise HFValidationError("a repository's name is org/name")
        validate_repo_id(repository)
        if not all(re.fullmatch(r"[\w.=+%-]+", part) and part.strip(".") for part in inside):
            raise HFValidationError("a path within a repository has names between slashes")
    except HFValidationError as error:
        raise FileNotFoundError(
            f"there is no model {name!r}: it is neither a folder here nor a name on the Hub; "
            f"shipped models: {_listed()}"
        ) from error
    try:
        snapshot = snapshot_download(
            repository, revision=revision or None, allow_patterns=_wanted("/".join(inside))
        )
    except OSError as error:  # not found, no access, no network: all of them are OSErrors
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"there is no folder {name!r} here, and the Hub's repository of that name cannot be "
            f"had ({type(error).__name__}: {reason}); shipped models: {_listed()}"
        ) from error
    found = Path(snapshot, *inside)
    # Pickles are here where someone has fetched them before.
    files = [*found.glob("*"), *found.rglob("*.safetensors")] if found.is_dir() else [found]
    if not any(file.is_file() and file.suffix in (".safetensors", *PICKLES) for file in files):
        raise FileNotFoundError(_nothing_in(name, repository, revision))
    return found


def _wanted(inside: str) -> list[str]:
    """Patterns of what is fetched: a file with the plain text beside it, or a folder's files."""
    beside = f"{glob.escape(inside.rpartition('/')[0])}/".lstrip("/")
    if inside.endswith(PICKLES):
        texts = ["*.json", "merges.txt", "*stats*.th"]
        return [glob.escape(inside), *(beside + text for text in texts)]
    return [f"{glob.escape(inside)}/{pattern}".lstrip("/") for pattern in ALLOWED_FILES]


def _nothing_in(name: str, repository: str, revision: str) -> str:
    """What to say of a repository without safetensors, or without the path that was named."""
    said = f"{name} holds no safetensors"
    try:
        files = HfApi().list_repo_files(repository, revision=revision or None)
    except (OSError, HfHubHTTPError):  # offline: the cache does not say what else there is
        return f"{said}: name another repository, or a file in it"
    pickles = [file for file in files if file.endswith(PICKLES)]
    if not pickles:
        listed = ", ".join(files[:5]) or "nothing"
        return f"{said}, nor any other checkpoint; found {listed}: name another repository"
    listed = ", ".join(pickles[:5])
    return f"{said}, but {listed}: name the file, as {repository}/{pickles[0]}"


def _listed() -> str:
    return ", ".join(shipped_names()) or "none in this installation"
