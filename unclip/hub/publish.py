"""A model on the Hugging Face Hub: its card, and the one commit that puts it there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from unclip.glide import GlideStage
from unclip.hub.folders import save_stages
from unclip.hub.model import Stages

GRID_NAME = "samples.png"


def write_repository(
    stages: Stages,
    folder: Path,
    repo_id: str,
    *,
    license: str = "apache-2.0",
    data: Sequence[str] = (),
    grid: Path | None = None,
    captions: Sequence[str] = (),
    dtype: torch.dtype | None = torch.float16,
) -> None:
    """Write what is published: the model's folder with its card and sample grid.

    Args:
        stages: the model.
        folder: where to; a new one.
        repo_id: the name it will have, for the card.
        license: an identifier of the Hub's, such as `apache-2.0`.
        data: what it was trained on: data sets on the Hub by their names, others in words.
        grid: a picture of samples.
        captions: of the samples, in the grid's order.
        dtype: of the stored weights; None keeps each tensor's own.

    Raises:
        FileNotFoundError: there is no such grid.
    """
    if grid is not None and not grid.is_file():
        raise FileNotFoundError(f"{grid} is missing: draw one with sample.py, or leave --grid out")
    save_stages(stages, folder, dtype)
    if grid is not None:
        (folder / GRID_NAME).write_bytes(grid.read_bytes())
    card = model_card(stages, repo_id, license, data, captions, has_grid=grid is not None)
    card.save(folder / "README.md")


def publish(
    stages: Stages,
    repo_id: str,
    *,
    license: str = "apache-2.0",
    data: Sequence[str] = (),
    grid: Path | None = None,
    captions: Sequence[str] = (),
    dtype: torch.dtype | None = torch.float16,
    private: bool = False,
    message: str = "Publish the model",
    token: str | None = None,
) -> str:
    """Put a model on the Hub in one commit, safetensors and plain text only.

    Args:
        stages, license, data, grid, captions, dtype: as `write_repository` has them.
        repo_id: `org/name`; the repository is made if it is not there.
        private: whether a new repository is private.
        message: of the commit.
        token: of the Hub; None takes the one of `hf auth login` or HF_TOKEN.

    Returns:
        The commit's address.

    Raises:
        ValueError: `repo_id` is no name of a repository.
        PermissionError: the token may not write there, or there is none.
        ConnectionError: the Hub cannot be reached.
    """
    check_repo_id(repo_id)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_repository(
            stages,
            folder,
            repo_id,
            license=license,
            data=data,
            grid=grid,
            captions=captions,
            dtype=dtype,
        )
        return upload(folder, repo_id, private=private, message=message, token=token)


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless it is `org/name`."""
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("it has no '/'")
    except HFValidationError as error:
        raise ValueError(f"repo_id must be org/name; got {repo_id!r}: {error}") from error


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool,
    message: str,
    allow_patterns: Sequence[str] | None = None,
    token: str | None = None,
) -> str:
    """Put a folder on the Hub in one commit and return the commit's address.

    Args:
        folder: what to put there.
        repo_id, private, message, token: as `publish` has them.
        allow_patterns: which of its files; None is all.

    Raises:
        ValueError, PermissionError, ConnectionError: as `publish` does.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            allow_patterns=None if allow_patterns is None else list(allow_patterns),
        )
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PermissionError(
            f"{repo_id} cannot be written ({reason}): log in with `hf auth login` as someone "
            "who may, or pass a token that may"
        ) from error
    except Exception as error:  # the client's transport has errors of its own
        raise ConnectionError(f"the Hub cannot be reached ({error}): try again") from error
    return str(commit.commit_url)


def model_card(
    stages: Stages,
    repo_id: str,
    license: str,
    data: Sequence[str] = (),
    captions: Sequence[str] = (),
    has_grid: bool = False,
) -> ModelCard:
    """What the repository's page says: the stages and their sizes, how to use them, the data."""
    on_the_hub = [name for name in data if name.count("/") == 1 and " " not in name]
    fields = ModelCardData(
        license=license,
        library_name="unclip",
        pipeline_tag="text-to-image" if _reads_captions(stages) else "image-to-image",
        tags=["unclip", "glide" if isinstance(stages.decoder, GlideStage) else "dall-e-2"],
        datasets=on_the_hub or None,
    )
    parts = [
        f"---\n{fields.to_yaml()}\n---",
        f"# {repo_id.split('/')[-1]}",
        _what(stages),
    ]
    if has_grid:
        parts.append(f"![Samples]({GRID_NAME})")
        if captions:
            parts.append("*" + "; ".join(captions) + ".*")
    rows = ["| stage | what | parameters |", "| --- | --- | --- |"]
    parts += ["\n".join([*rows, *_rows(stages)])]
    parts += [
        "## Use",
        "```python\nfrom unclip import UnCLIP\n\n"
        f'unclip = UnCLIP.from_pretrained("{repo_id}")\n'
        'images = unclip("a caption", num_images=4).images  # [4, 3, S, S] in [-1, 1]\n```',
        f'or `python sample.py --model {repo_id} --prompt "a caption"`.',
        "## Data",
        "\n".join(f"- {name}" for name in data) or "Not said.",
        "## Licence",
        license,
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def _reads_captions(stages: Stages) -> bool:
    return stages.prior is not None or isinstance(stages.decoder, GlideStage)


def _what(stages: Stages) -> str:
    if isinstance(stages.decoder, GlideStage):
        return "A GLIDE model: it draws pictures from captions, which each of its networks reads."
    return (
        "A two-stage unCLIP (DALL-E 2) model: a prior draws a CLIP image embedding for a caption, "
        "a decoder and upsamplers draw the picture."
    )


def _rows(stages: Stages) -> Iterator[str]:
    def row(name: str, what: str, module: nn.Module) -> str:
        count = sum(parameter.numel() for parameter in module.parameters())
        return f"| {name} | {what} | {count / 1e6:.1f}M |"

    if (clip := stages.clip) is not None:
        name = "in `clip/`" if Path(clip.name).is_dir() else clip.name
        yield row("CLIP", f"{name}, embeddings of {clip.embed_dim}", clip)
    if (prior := stages.prior) is not None:
        yield row("prior", prior.kind.replace("_", " "), prior)
    if (decoder := stages.decoder) is not None:
        yield row("decoder", f"U-Net, {decoder.image_size} px", decoder)
    for upsampler in stages.upsamplers:
        size = upsampler.image_size
        yield row("upsampler", f"{size // upsampler.config.network.scale} to {size} px", upsampler)
