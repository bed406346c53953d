"""A model on disk: a folder whose `unclip.yaml` says in which sub-folder each stage lies.

    format: unclip
    version: 1
    stages: {clip: clip, prior: prior, decoder: decoder, upsamplers: [upsampler_256]}
    base: shapes                         # optional: completes the stages that are not here
    sampling: {guidance_scale: 4.0}      # optional: what it is sampled with unless told otherwise
    clip_fingerprint: 0123456789abcdef   # optional: of the CLIP that these stages were trained on
    lora: {decoder: lora}                # optional: adapters to merge into stages, the base's too

A CLIP may have its PCA beside it: `stages: {pca: pca}`, which belongs to it and to no other.
`clip` may also name a CLIP that lies elsewhere (`ViT-L-14/openai`, `hf-hub:org/name`). The folder
of a training run is such a model, with one stage, or the adapter of one (upsamplers go by their
size: `upsampler_256`), and a base.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import open_clip
import torch
import yaml

from unclip.checkpoint import (
    CONFIG_NAME,
    fill,
    load_stage,
    save_stage,
    unfilled,
    written_whole,
)
from unclip.clip import FrozenCLIP, is_clip_folder, load_clip
from unclip.glide import GlideStage
from unclip.hub import dalle2_pytorch, diffusers_format, glide, karlo
from unclip.hub.dalle2_pytorch import load_dalle2_pytorch_prior
from unclip.hub.model import STAGES, Model, Reader, Stages
from unclip.hub.names import resolve, shipped_names
from unclip.lora import merge_adapter
from unclip.priors import PCA, load_prior
from unclip.stages import DecoderStage, PictureStage, UpsamplerStage

MODEL_NAME = "unclip.yaml"
FORMAT, VERSION = "unclip", 1
KINDS = ("clip", "prior", "decoder", "upsampler", "glide")
PCA_NAME = "pca"
Stage = TypeVar("Stage")


# ------------------------------------------------------------------------------------ reading


def read_model(name: str | Path) -> Model:
    """What a model's folder holds, without loading it.

    Beside a folder with `unclip.yaml` this takes the folder of a single stage, and one that has
    sub-folders of the stages' names: a training run that has not ended yet.

    Raises:
        FileNotFoundError: there is no such folder, or no model in it.
        ValueError: `unclip.yaml` is of another format or version, or has an unknown key.
    """
    folder = resolve(name)
    path = folder / MODEL_NAME
    if path.is_file():
        return _from_yaml(folder, _parse(path))
    if (folder / diffusers_format.INDEX_NAME).is_file():
        return diffusers_format.read(folder)
    if karlo.is_checkpoint(folder):
        return karlo.read(folder)
    if glide.is_checkpoint(folder):
        return glide.read(folder)
    if dalle2_pytorch.is_checkpoint(folder):
        return Model(folder, prior=partial(load_dalle2_pytorch_prior, folder))
    kind = _stage_kind(folder)
    found = {kind: "."} if kind else {k: k for k in KINDS if _stage_kind(folder / k) is not None}
    if not found:
        raise FileNotFoundError(
            f"{folder} is no model folder: looked for {MODEL_NAME} and sub-folders of stages, "
            f"for diffusers' {diffusers_format.INDEX_NAME}, for Karlo's *.ckpt, for GLIDE's *.pt "
            "and for a prior of DALLE2-pytorch's, *.pth or *.pt; found "
            f"{_listing(folder)}. Pass the folder of a model, of a training run that has saved "
            "something, or of one stage"
        )
    if "glide" in found:
        name = found.pop("glide")
        enlarges = _stage_config(folder / name).get("network", {}).get("scale") is not None
        found["upsampler" if enlarges else "decoder"] = name
    upsampler = found.pop("upsampler", None)
    stages = {**found, "upsamplers": [upsampler] if upsampler else []}
    return _from_yaml(folder, {"stages": stages})


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["a file"]
    more = f" and {len(names) - 5} more" if names[5:] else ""
    return (", ".join(names[:5]) + more) or "nothing"


def _stage_kind(folder: Path) -> str | None:
    if is_clip_folder(folder):
        return "clip"
    kind = _stage_config(folder).get("stage")
    return kind if kind in KINDS else None


def _stage_config(folder: Path) -> dict[str, Any]:
    config = folder / CONFIG_NAME
    values = yaml.safe_load(config.read_text()) if config.is_file() else None
    return values if isinstance(values, dict) else {}


def _parse(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    values = values if isinstance(values, dict) else {}
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format must be {FORMAT!r}; got {values.get('format')!r}: pass a folder of "
            "this project's own"
        )
    if values.get("version") != VERSION:
        raise ValueError(
            f"{path}: version must be {VERSION}; got {values.get('version')!r}: install the "
            "release of unclip that wrote it, or save it again with this one"
        )
    keys = ("format", "version", "stages", "base", "sampling", "clip_fingerprint", "lora")
    _check_known(path, "", values, keys)
    stages = values.setdefault("stages", {})
    if not isinstance(stages, dict):
        raise ValueError(f"{path}: stages must map stages to sub-folders; got {stages!r}")
    _check_known(path, "stages.", stages, (*STAGES, PCA_NAME))
    if not isinstance(stages.get("upsamplers", []), list):
        raise ValueError(
            f"{path}: stages.upsamplers must be a list; got {stages['upsamplers']!r}: write "
            f"[{stages['upsamplers']}]"
        )
    adapters = values.setdefault("lora", {})
    if not isinstance(adapters, dict):
        raise ValueError(f"{path}: lora must map stages to sub-folders; got {adapters!r}")
    upsamplers = [key for key in adapters if re.fullmatch(r"upsampler_\d+", str(key))]
    _check_known(path, "lora.", adapters, ("prior", "decoder", *upsamplers))
    return values


def _check_known(path: Path, prefix: str, values: Mapping[str, Any], keys: Collection[str]) -> None:
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(keys)}"
            raise ValueError(f"{path}: unknown key {prefix + str(key)!r}: {hint}")


def _from_yaml(folder: Path, values: Mapping[str, Any]) -> Model:
    stages = values["stages"]

    def reader(stage: str, value: str, read: Callable[[Path, torch.dtype], Stage]) -> Reader[Stage]:
        return lambda dtype=torch.float32: read(_there(folder, stage, folder / value), dtype)

    def there_or_named(value: str) -> str:
        """A folder seen from this one, else a name as it stands."""
        return str(folder / value) if (folder / value).exists() else value

    model = Model(folder, clip_fingerprint=values.get("clip_fingerprint"))
    model.sampling = values.get("sampling", {})
    if (clip := stages.get("clip")) is not None:
        is_name = "/" in clip or ":" in clip
        model.clip = lambda: (
            load_clip_of(there_or_named(clip))
            if is_name
            else load_clip(str(_there(folder, "clip", folder / clip)))
        )
    if (prior := stages.get("prior")) is not None:
        model.prior = reader("prior", prior, load_prior)
    if (decoder := stages.get("decoder")) is not None:
        model.decoder = reader("decoder", decoder, _read_decoder)
    if (pca := stages.get(PCA_NAME)) is not None:
        model.pca = reader(PCA_NAME, pca, lambda folder, _: load_pca(folder))
    model.upsamplers = [
        reader("upsampler", value, _read_upsampler) for value in stages.get("upsamplers", [])
    ]
    if (base := values.get("base")) is not None:
        model.base = there_or_named(base)
    model.adapters = {stage: folder / name for stage, name in values.get("lora", {}).items()}
    return model


def load_pca(folder: Path) -> PCA:
    """Read what `save_pca` wrote, in fp32; raises FileNotFoundError or ValueError with what is
    wrong."""
    config, tensors = load_stage(folder, PCA_NAME)
    pca = unfilled(lambda: PCA(config["embed_dim"]))
    fill(pca, tensors, folder)
    return pca


def save_pca(pca: PCA, folder: Path) -> None:
    """Write a PCA's folder in half precision: its errors are far below those of a component left
    out."""
    config = {"stage": PCA_NAME, "embed_dim": len(pca.mean)}
    save_stage(folder, config, pca.state_dict(), torch.float16)


def _read_decoder(folder: Path, dtype: torch.dtype) -> DecoderStage | GlideStage:
    is_glide = _stage_kind(folder) == GlideStage.stage
    return GlideStage.load(folder, dtype) if is_glide else DecoderStage.load(folder, dtype)


def _read_upsampler(folder: Path, dtype: torch.dtype) -> PictureStage:
    is_glide = _stage_kind(folder) == GlideStage.stage
    return GlideStage.load(folder, dtype) if is_glide else UpsamplerStage.load(folder, dtype)


def _there(model: Path, stage: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{model} lacks its {stage}: {model / MODEL_NAME} says it is in {folder}, "
            f"which is not there; copy the folder again, or take the {stage} out of {MODEL_NAME} "
            "and name a base that has one"
        )
    return folder


def load_stages(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    only: Collection[str] | None = None,
    optional: Collection[str] = (),
    for_clip: FrozenCLIP | None = None,
) -> Stages:
    """Load a model, its base completing the stages that its own folder lacks.

    A folder with upsamplers of its own takes from its base those that come before and after them
    in the chain of sizes.

    Args:
        name: a shipped name, a folder, or `org/name[@revision]` on the Hub.
        device: where to put it, each stage as soon as it is read.
        dtype: of the prior's, the decoder's and the upsamplers' networks; None leaves them fp32.
            CLIP and the prior's statistics always stay fp32.
        only: which of `clip`, `prior`, `decoder`, `upsamplers` to load; None loads all.
        optional: which of these may be missing, and are None then.
        for_clip: the CLIP that the loaded stages will run on, where theirs is not loaded.

    Raises:
        FileNotFoundError: a stage or a file is missing, with what would complete it.
        ValueError: a file is damaged, or the stages do not fit one another.
    """
    wanted = set(STAGES if only is None else only)
    if unknown := wanted - set(STAGES):
        raise ValueError(f"only must name stages among {', '.join(STAGES)}; got {sorted(unknown)}")
    chain = _with_bases(name, wanted)
    dtype = dtype or torch.float32
    stages = Stages()
    adapters: dict[str, list[Path]] = {}  # those met on the way, the outermost model's first
    for model in chain:
        stages.sampling = stages.sampling or model.sampling
        for stage, folder in model.adapters.items():
            adapters.setdefault(stage, []).append(folder)
        if "clip" in wanted and stages.clip is None and model.clip is not None:
            stages.clip = model.clip().to(device)
            stages.pca = None if model.pca is None else model.pca().to(device)
        if "prior" in wanted and stages.prior is None and model.prior is not None:
            stages.prior = _adapted(model.prior(dtype), adapters.get("prior", [])).to(device)
        if "decoder" in wanted and stages.decoder is None and model.decoder is not None:
            stages.decoder = _adapted(model.decoder(dtype), adapters.get("decoder", [])).to(device)
        if "upsamplers" in wanted:
            others = [read(dtype) for read in model.upsamplers]
            for up in others:
                _adapted(up, adapters.pop(f"upsampler_{up.image_size}", [])).to(device)
            stages.upsamplers = _around(stages.upsamplers, others)
    if "upsamplers" in wanted and (left := adapters.keys() - {"prior", "decoder"}):
        raise FileNotFoundError(
            f"the model {chain[0].path} adapts {' and '.join(sorted(left))}, which neither it nor "
            "its base has: name the base that the adapter was trained on"
        )
    reads_captions = isinstance(stages.decoder, GlideStage)
    for stage in ("clip", "prior", "decoder"):
        missing = stage in wanted and stage not in optional and getattr(stages, stage) is None
        if missing and not (stage == "clip" and reads_captions):
            raise FileNotFoundError(_lacks(chain, stage))
    if (clip := stages.clip or for_clip) is not None:
        _check_fingerprints(chain, clip, wanted)
    check_stages(stages, str(name))
    return stages


def _adapted(stage: Any, folders: list[Path]) -> Any:
    """A stage with adapters merged into its network, the last of them first."""
    for folder in reversed(folders):
        merge_adapter(stage.network, _there(folder.parent, "adapter", folder))
    return stage


def _with_bases(name: str | Path, wanted: set[str]) -> list[Model]:
    """The model and as much of its chain of bases as `wanted` needs."""
    chain: list[Model] = []
    next_name: str | Path | None = name
    while next_name is not None:
        try:
            model = read_model(next_name)
        except FileNotFoundError as error:
            if not chain:
                raise
            path = chain[-1].path / MODEL_NAME
            raise FileNotFoundError(
                f"{path} names the base {chain[-1].base!r}, which cannot be had: {error}"
            ) from error
        seen = [link.path.resolve() for link in chain]
        if model.path.resolve() in seen:
            loop = " -> ".join(str(link.path) for link in [*chain, model])
            raise ValueError(f"the bases of {name} go round in a circle ({loop}): cut one of them")
        chain.append(model)
        # A base may always add upsamplers to the chain; else it is asked only for what is missing.
        missing = any(
            stage == "upsamplers" or all(getattr(link, stage) is None for link in chain)
            for stage in wanted
        )
        next_name = model.base if missing else None
    return chain


def _lacks(chain: list[Model], stage: str) -> str:
    places = " and its base ".join(str(model.path) for model in chain)
    if not (chain[-1].path / MODEL_NAME).is_file():  # another format: nothing to add a line to
        return f"the model {places} lacks a {stage}: take that of another model beside it"
    return (
        f"the model {places} lacks a {stage}: add one to {chain[-1].path / MODEL_NAME} under "
        f"stages, or a line 'base: <model that has a {stage}>'"
    )


def _around(own: list[PictureStage], others: list[PictureStage]) -> list[PictureStage]:
    """`own` upsamplers with those of `others` that come before and after them in size."""
    if not own:
        return others
    before = [up for up in others if up.image_size <= input_size(own[0])]
    after = [up for up in others if input_size(up) >= own[-1].image_size]
    return [*before, *own, *after]


def input_size(upsampler: PictureStage) -> int:
    """Side of the pictures an upsampler enlarges, px."""
    return upsampler.image_size // upsampler.config.network.scale


# ----------------------------------------------------------------------------------- checking


def _check_fingerprints(chain: list[Model], clip: FrozenCLIP, wanted: set[str]) -> None:
    """Two CLIPs of one width differ in nothing but their weights; the wrong one gives noise."""
    missing = wanted & {"prior", "decoder"}
    for model in chain:
        supplied = {s for s in missing if getattr(model, s) is not None or s in model.adapters}
        missing -= supplied
        trained_on = model.clip_fingerprint
        if supplied and trained_on is not None and trained_on != clip.fingerprint():
            raise ValueError(
                f"the {' and '.join(sorted(supplied))} of {model.path} must run on the CLIP of "
                f"training, {trained_on}; got another, {clip.fingerprint()} from {clip.name}: "
                "set stages.clip or base to the model it was trained on"
            )


def check_stages(stages: Stages, name: str = "the model") -> None:
    """Raise ValueError unless the stages that are there fit one another."""
    clip, prior, decoder = stages.clip, stages.prior, stages.decoder
    if clip is not None:
        widths: list[tuple[str, int | None, str, int]] = []
        embed = ("the CLIP's embed_dim", clip.embed_dim)
        text = ("the CLIP's text_width", clip.text_width)
        if prior is not None:
            network = prior.config.network
            widths.append(("prior.network.embed_dim", network.embed_dim, *embed))
            read = getattr(network, "text_encodings_dim", None)  # the linear one reads no tokens
            widths.append(("prior.network.text_encodings_dim", read, *text))
        if isinstance(decoder, DecoderStage):
            net = decoder.config.network
            widths.append(("decoder.network.image_embed_dim", net.image_embed_dim, *embed))
            widths.append(("decoder.network.text_encodings_dim", net.text_encodings_dim, *text))
            widths.append(("decoder.network.text_embed_dim", net.text_embed_dim, *embed))
        for key, width, whose, expected in widths:
            if width not in (None, expected):
                raise ValueError(
                    f"{key} of {name} must be {whose}, {expected}; got {width}: the stage was "
                    f"trained on another CLIP than {clip.name}; take both from one model"
                )
        longest = None if prior is None else getattr(prior.config.network, "max_text_len", None)
        if longest is not None and longest < clip.context_length:
            raise ValueError(
                f"prior.network.max_text_len of {name} must be at least the CLIP's "
                f"context_length, {clip.context_length}; got {longest}: the prior was trained on "
                f"another CLIP than {clip.name}; take both from one model"
            )
    previous = decoder
    for upsampler in stages.upsamplers:
        if previous is not None and input_size(upsampler) != previous.image_size:
            raise ValueError(
                f"an upsampler of {name} must take the {previous.image_size} px of the stage "
                f"before it; got one from {input_size(upsampler)} to {upsampler.image_size} px: "
                "use one that follows, in the order of their sizes"
            )
        previous = upsampler  # type: ignore[assignment]


def load_clip_of(name: str) -> FrozenCLIP:
    """The CLIP of a model (by any name `resolve` takes), or the CLIP that `name` itself is: a
    folder in open_clip's layout, `hf-hub:org/name`, or an open_clip model/tag.

    Raises:
        FileNotFoundError, ValueError: as `load_stages` and `unclip.clip.load_clip` do.
    """
    is_open_clip = name.partition("/")[0] in open_clip.list_models()
    if is_open_clip or name.startswith("hf-hub:") or is_clip_folder(Path(name)):
        return load_clip(name)
    clip = load_stages(name, only={"clip"}).clip
    assert clip is not None
    return clip


# ------------------------------------------------------------------------------------ writing


def save_stages(
    stages: Stages, folder: str | Path, dtype: torch.dtype | None = torch.float16
) -> None:
    """Write a model's folder, whole or not at all.

    Args:
        stages: those that are there. A CLIP that came from a folder is written into this one, any
            other is named.
        folder: where to; what is there already is replaced.
        dtype: of the stored weights; None keeps each tensor's own.

    Raises:
        OSError: the folder cannot be written, or is one that holds something else than a model.
        ValueError: the stages do not fit one another.
    """
    folder = Path(folder)
    check_stages(stages, str(folder))
    is_ours = (folder / MODEL_NAME).is_file() or (folder.is_dir() and not any(folder.iterdir()))
    if folder.exists() and not is_ours:
        raise FileExistsError(
            f"{folder} is there and is no model: choose a new folder to save into"
        )
    # The CLIP's fingerprint survives half precision and nothing less.
    clip_dtype = torch.float16 if dtype == torch.bfloat16 else dtype
    names: dict[str, Any] = {}
    with written_whole(folder) as temporary:
        if stages.clip is not None:
            names["clip"] = _save_clip(stages.clip, temporary, clip_dtype)
        if stages.prior is not None:
            stages.prior.save(temporary / "prior", dtype)
            names["prior"] = "prior"
        if stages.decoder is not None:
            stages.decoder.save(temporary / "decoder", dtype)
            names["decoder"] = "decoder"
        if stages.pca is not None:
            save_pca(stages.pca, temporary / PCA_NAME)
            names[PCA_NAME] = PCA_NAME
        names["upsamplers"] = [f"upsampler_{up.image_size}" for up in stages.upsamplers]
        for upsampler, name in zip(stages.upsamplers, names["upsamplers"], strict=True):
            upsampler.save(temporary / name, dtype)
        values = {"format": FORMAT, "version": VERSION, "stages": names}
        if stages.sampling:
            values["sampling"] = stages.sampling
        if stages.clip is not None:
            values["clip_fingerprint"] = stages.clip.fingerprint()
        _write(temporary / MODEL_NAME, values)


def _save_clip(clip: FrozenCLIP, folder: Path, dtype: torch.dtype | None) -> str:
    if not Path(clip.name).is_dir():
        return clip.name
    (folder / "clip").mkdir()
    clip.save(folder / "clip", dtype)
    return "clip"


def write_run_model(
    run: Path,
    stage: str,
    base: str | None,
    clip: str | None,
    clip_fingerprint: str | None = None,
    adapts: str | None = None,
) -> None:
    """Make a training run's folder a model that `load_stages` reads.

    Args:
        run: the run's folder; what it trains lies in its sub-folder `stage`.
        stage: `prior`, `decoder`, `upsampler`, or the name of an adapter's folder.
        base: the model that completes it. A folder is noted as seen from the run, so that both may
            move together.
        clip: the CLIP it was trained on, if that is not the base's.
        clip_fingerprint: of that CLIP, so that no other can take its place unnoticed.
        adapts: the base's stage that the folder `stage` holds an adapter of: `prior`, `decoder` or
            `upsampler_256`, by its size.
    """

    def seen_from_run(name: str) -> str:
        if name not in shipped_names() and Path(name).exists():
            return Path(os.path.relpath(Path(name).resolve(), run.resolve())).as_posix()
        return name

    stages: dict[str, Any] = {"upsamplers": [stage]} if stage == "upsampler" else {stage: stage}
    if adapts is not None:
        stages = {}
    if clip is not None:
        stages = {"clip": seen_from_run(clip), **stages}
    values: dict[str, Any] = {"format": FORMAT, "version": VERSION, "stages": stages}
    if adapts is not None:
        values["lora"] = {adapts: stage}
    if base is not None:
        values["base"] = seen_from_run(base)
    if clip_fingerprint is not None:
        values["clip_fingerprint"] = clip_fingerprint
    _write(run / MODEL_NAME, values)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Every process of a training run may write the same file at once: rename it into place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    os.replace(aside, path)
