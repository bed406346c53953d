"""From a model's name to its folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

PRETRAINED = Path(__file__).parent.parent / "pretrained"

ALLOWED_FILES = ["*.yaml", "*.json", "*.safetensors", "*.txt", "*.gz", "*.md"]
"""What is fetched of a repository: plain text and safetensors, never pickle or code."""


def shipped_names() -> list[str]:
    """Models that come with the package."""
    return sorted(folder.name for folder in PRETRAINED.glob("*") if folder.is_dir())


def resolve(name: str | Path) -> Path:
    """The folder of a model.

    Args:
        name: a shipped name such as `shapes`, a folder (or a file that is a checkpoint), or
            `org/name[@revision]` on the Hub. A shipped name wins over a folder of the same name:
            write `./shapes` for that one.

    Raises:
        FileNotFoundError: it is none of these, or the Hub cannot be reached and the local cache
            does not hold it.
    """
    name = str(name)
    if name in shipped_names():
        return PRETRAINED / name
    if name and (path := Path(name)).exists():  # Path("") is the current folder
        return path
    repository, _, revision = name.partition("@")
    try:
        if "/" not in repository:
            raise HFValidationError("a repository's name is org/name")
        validate_repo_id(repository)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"there is no model {name!r}: it is neither a folder here nor a name on the Hub; "
            f"shipped models: {_listed()}"
        ) from error
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=ALLOWED_FILES)
        )
    except OSError as error:  # not found, no access, no network: all of them are OSErrors
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"there is no folder {name!r} here, and the Hub's repository of that name cannot be "
            f"had ({type(error).__name__}: {reason}); shipped models: {_listed()}"
        ) from error


def _listed() -> str:
    return ", ".join(shipped_names()) or "none in this installation"
