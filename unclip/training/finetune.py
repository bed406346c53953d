"""Fine-tuning: a stage as another model has it, which of its parts to train, and its adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from unclip.checkpoint import unfilled
from unclip.clip import FrozenCLIP
from unclip.config import to_dict
from unclip.glide import GlideStage
from unclip.hub import load_clip_of, load_stages, resolve
from unclip.lora import LoRAConfig, add_adapter, chosen, has_adapter, save_adapter
from unclip.priors import Prior
from unclip.stages import DecoderStage, UpsamplerStage

log = logging.getLogger(__name__)

Stage = TypeVar("Stage", Prior, DecoderStage, UpsamplerStage, GlideStage)

RUNS_OWN = {
    **{name: name for name in ("dropout", "text_drop_prob", "image_drop_prob")},
    "attn_dropout": "dropout",  # DALLE2-pytorch's network has two
    "mlp_dropout": "dropout",
    **{name: name for name in ("attention_backend", "checkpointing")},
    **{name: name for name in ("weighting", "min_snr_gamma", "vlb_weight")},
}
"""What concerns training alone: a setting of the init model's, and the run's that replaces it."""


# ------------------------------------------------------------------------- where a run starts


def base_of(base: str | None, init: str | None, run: Path, lora: LoRAConfig | None) -> str:
    """The model that completes a run: the one that is named, else that it starts from, else
    `shapes`.

    Raises:
        ValueError: it would be the run itself, or an adapter's is another than that it adapts.
        FileNotFoundError: there is no such model.
    """
    if lora is not None and init is not None and base not in (None, init):
        raise ValueError(
            f"base must be init with lora, whose adapter is merged into init's; got base {base} "
            f"and init {init}: leave base out"
        )
    if base is None and init is not None and resolve(init).resolve() == run.resolve():
        raise ValueError(
            f"run must be another folder than init, whose model completes it; got {run} for both: "
            "choose another --run"
        )
    return base or init or "shapes"


def clip_for_training(
    clip: str | None, base: str, init: str | None, needs_images: bool = True
) -> FrozenCLIP:
    """The CLIP a stage is trained on: the one that is named, else the base's.

    Without `needs_images`, for training on embeddings, a text encoder alone will do.

    Raises:
        FileNotFoundError, ValueError: as `load_clip_of` does.
        ValueError: there is none, it lacks the image tower, or its embeddings are normalised where
            those that `init` was trained on are not (or the other way round).
    """
    where = f"{'init' if base == init else 'base'} {base}"
    if clip is not None:
        found: FrozenCLIP | None = load_clip_of(clip)
    else:
        found = load_stages(base, only={"clip"}, optional={"clip"}).clip
    if found is None:
        raise ValueError(
            f"clip must be set where the model has none; got {where}, a model without a CLIP: pass "
            "the one it was trained on, such as --clip ViT-L-14/openai"
        )
    if needs_images and found.image_size is None:
        raise ValueError(
            f"clip must have an image tower to train on pictures; got "
            f"{f'the CLIP of {where}' if clip is None else clip}, a text encoder alone: pass a "
            "folder that has both towers by --clip; for Karlo that of its image variations, "
            "kakaobrain/karlo-v1-alpha-image-variations"
        )
    if init is not None and (clip is not None or base != init):
        try:
            theirs = load_stages(init, only={"clip"}, optional={"clip"}).clip
        except (OSError, ValueError):  # not at hand: nothing to compare with
            theirs = None
        if theirs is not None and theirs.unit_norm != found.unit_norm:
            raise ValueError(
                f"clip must give {'normalised' if theirs.unit_norm else 'unnormalised'} "
                f"embeddings, as init {init} was trained on; got {found.name}, whose are not: pass "
                "the CLIP of a model of the same family"
            )
    return found


def stage_of(init: str, stage: Literal["prior", "decoder"]) -> Any:
    """A stage of the model that a run starts from.

    Raises:
        FileNotFoundError, ValueError: as `load_stages` does.
        ValueError: the model has no such stage.
    """
    found = getattr(load_stages(init, only={stage}, optional={stage}), stage)
    if found is None:
        raise ValueError(
            f"init must have a {stage}; got {init}, which has none: name a model that has one, or "
            "leave init out"
        )
    return found


def start_from(initial: Stage, own: Any) -> Stage:
    """A stage to train: network, diffusion and weights of another, drop probabilities, attention
    backend, checkpointing and loss weights of the run's own config.

    Args:
        initial: the other.
        own: the run's config of the stage.
    """
    stage = unfilled(lambda: type(initial)(adopted(initial.config, own)))
    stage.load_state_dict(initial.state_dict(), assign=True)  # the same memory, not a copy
    return stage


def adopted(theirs: Any, own: Any) -> Any:
    """A config of the init model's with the run's own settings in what concerns training alone."""
    changes = {}
    for name in (field.name for field in fields(theirs)):
        value = getattr(theirs, name)
        if is_dataclass(value) and hasattr(own, name):
            changes[name] = adopted(value, getattr(own, name))
        elif name in RUNS_OWN and hasattr(own, RUNS_OWN[name]):
            changes[name] = getattr(own, RUNS_OWN[name])
    if getattr(theirs, "null_condition", None) == "absent":  # nothing can stand for the caption
        del changes["text_drop_prob"]
    return replace(theirs, **changes)


def warn_of_differences(own: Any, trained: Any, section: str, init: str) -> None:
    """Say in one line which settings of the run's config give way to the init model's.

    Args:
        own: the run's config of the stage.
        trained: that of the stage that is trained.
        section: name of the first.
        init: what the model was called.
    """
    told = list(_differences(to_dict(own), to_dict(trained), section))
    if type(own.network) is not type(trained.network):
        kinds = [type(c.network).__name__.removesuffix("Config") for c in (trained, own)]
        told.insert(0, f"{section}.network: a {kinds[0]}, not a {kinds[1]}")
    if told:
        more = f" and {len(told) - 5} more" if told[5:] else ""
        log.warning("%s decides what is trained: %s%s", init, "; ".join(told[:5]), more)


def _differences(own: Mapping[str, Any], trained: Mapping[str, Any], name: str) -> Iterator[str]:
    for key in (key for key in own if key in trained):
        ours, theirs = own[key], trained[key]
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(ours, theirs, f"{name}.{key}")
        elif ours != theirs:
            yield f"{name}.{key}: {theirs}, not {ours}"


# ---------------------------------------------------------------------------- what is trained


def choose_trained(
    network: nn.Module,
    *,
    freeze: Sequence[str] | None,
    train_only: Sequence[str] | None,
    lora: LoRAConfig | None,
    init: str | None,
) -> None:
    """Leave to training what the settings of these names say, in place.

    Raises:
        ValueError: a pattern fits nothing, nothing is left to train, or the settings contradict
            one another.
    """
    if lora is not None:
        if init is None:
            raise ValueError(
                f"lora needs a model to adapt; got rank {lora.rank} and no init: add --init MODEL, "
                "or leave lora out"
            )
        for field, patterns in (("freeze", freeze), ("train_only", train_only)):
            if patterns:
                raise ValueError(
                    f"{field} must be left out with lora, which freezes all but the adapter; got "
                    f"{list(patterns)}: choose the adapted layers by lora.targets"
                )
        add_adapter(network, lora)
        return
    names = {name for name, _ in network.named_parameters()}
    trained = chosen("train_only", train_only, names, network) if train_only else set(names)
    trained -= chosen("freeze", freeze or (), names, network)
    if not trained:
        parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in sorted(names)))
        raise ValueError(
            f"freeze must leave something to train; got {list(freeze or ())}, which leaves nothing "
            f"of {list(train_only) if train_only else 'the network'}: its parts are {parts}"
        )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)


def save_trained(stage: Any, folder: Path) -> None:
    """Write a stage's folder, or that of its adapter where it has one."""
    if has_adapter(stage.network):
        save_adapter(stage.network, folder)
    else:
        stage.save(folder)
