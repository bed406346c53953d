"""LoRA (Hu et al. 2021) through the peft library: low-rank adapters on some layers of a network,
kept in a folder of their own and merged into the network's weights when it is loaded.

The folder is peft's, `adapter_config.json` and `adapter_model.safetensors`, and loads there too:
`PeftModel.from_pretrained(stage.network, folder)`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import peft
from torch import nn

from unclip.checkpoint import load_weights, save_weights, written_whole

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft puts before a layer's name in its files
LAYERS = (nn.Linear, nn.Conv2d)
DEFAULT_TARGETS = (
    *("*.qkv", "*.to_q", "*.to_kv", "*.context_kv", "*.proj"),  # attention
    *("*.mlp", "*.mlp_in", "*.mlp_out"),
    "*.emb",  # in a U-Net's residual blocks, from the timestep embedding; all that upsamplers have
)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """An adapter of low rank on every target: W becomes W + alpha / rank * B A, B zero at first."""

    rank: int = 8
    """Rank of B A."""
    alpha: float | None = None
    """Its factor, times the rank; None is the rank, so that the factor is 1."""
    dropout: float = 0.0
    """Dropout on what an adapter reads."""
    targets: tuple[str, ...] | None = None
    """Patterns of the layers' names, as `freeze` has them; None takes the projections of attention,
    the MLPs of transformers and, in U-Nets, the layers that read the timestep embedding."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1; got {self.rank}: use 8")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora.alpha must be above 0; got {self.alpha}: leave it out")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must lie in [0, 1); got {self.dropout}: use 0.05")
        if self.targets is not None and not self.targets:
            raise ValueError("lora.targets must name layers; got none: leave it out, or use *.qkv")


# ------------------------------------------------------------------------------- names of parts


def below(pattern: str, names: Collection[str]) -> set[str]:
    """Those of `names` that `pattern` matches, or that lie below a module that it matches.

    Patterns are the shell's, and `*` crosses dots: `unet.down` is that module and all in it,
    `*.attention` every attention, `blocks.1?` the blocks 10 to 19.
    """
    return {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}


def chosen(
    field: str, patterns: Sequence[str], names: Collection[str], network: nn.Module
) -> set[str]:
    """Those of `names` that any of `patterns` chooses.

    Raises:
        ValueError: a pattern chooses none; with the network's nearest names.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = below(pattern, names)
        if not matched:
            raise ValueError(
                f"{field} must name parts of the {type(network).__name__}; got {pattern!r}, which "
                f"fits none: did you mean {' or '.join(_nearest(pattern, network))}?"
            )
        found |= matched
    return found


def _nearest(pattern: str, network: nn.Module) -> list[str]:
    modules = [name for name, _ in network.named_modules() if name]
    names = [*modules, *(name for name, _ in network.named_parameters())]
    leaves = {name.rsplit(".", 1)[-1]: f"*.{name.rsplit('.', 1)[-1]}" for name in modules}
    leaf = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], leaves, 3)
    top = list(dict.fromkeys(name.split(".")[0] for name in names))
    return difflib.get_close_matches(pattern, names, 3) or [leaves[part] for part in leaf] or top


# ------------------------------------------------------------------------------------ adapters


def add_adapter(network: nn.Module, config: LoRAConfig) -> None:
    """Put a new adapter on a network, in place; it alone is left to train.

    Its answers stay what they were: B is zero at first.

    Raises:
        ValueError: a target names no linear layer or convolution of the network.
    """
    layers = [name for name, module in network.named_modules() if isinstance(module, LAYERS)]
    if config.targets is not None:
        targets = chosen("lora.targets", config.targets, layers, network)
    else:
        targets = {name for pattern in DEFAULT_TARGETS for name in below(pattern, layers)}
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=sorted(targets),
    )
    peft.inject_adapter_in_model(settings, network)


def has_adapter(network: nn.Module) -> bool:
    """Whether a network has an adapter that is not merged."""
    return hasattr(network, "peft_config")


def save_adapter(network: Any, folder: Path) -> None:
    """Write the adapter of a network into a folder, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    settings = copy.copy(network.peft_config["default"])
    settings.target_modules = sorted(settings.target_modules)
    settings.inference_mode = True
    tensors = peft.get_peft_model_state_dict(network)
    with written_whole(folder) as temporary:
        settings.save_pretrained(str(temporary))
        save_weights({f"{PREFIX}{k}": v for k, v in tensors.items()}, temporary / WEIGHTS_NAME)


def merge_adapter(network: Any, folder: Path) -> None:
    """Add the adapter in a folder to a network's weights, in place.

    Raises:
        FileNotFoundError: the folder holds no whole adapter.
        ValueError: a file is damaged, or the adapter was trained on a network of other sizes.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{folder / CONFIG_NAME} is missing: the folder is not a whole adapter; copy it again"
        )
    tensors = load_weights(folder / WEIGHTS_NAME)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    trained = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        settings = peft.LoraConfig.from_pretrained(str(folder))
        adapted = peft.LoraModel(network, settings, "default")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the adapter in {folder} does not fit the {type(network).__name__} of its base: "
            f"{' '.join(str(error).split())[:400]}"
        ) from error
    wanted = {name: list(t.shape) for name, t in peft.get_peft_model_state_dict(network).items()}
    got = {name: list(tensor.shape) for name, tensor in tensors.items()}
    faults = [
        f"{name} {got.get(name, 'is missing')} for {wanted.get(name, 'nothing')}"
        for name in sorted({*wanted, *got})
        if wanted.get(name) != got.get(name)
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if faults[3:] else ""
        raise ValueError(
            f"the adapter in {folder} does not fit the {type(network).__name__} of its base "
            f"({'; '.join(faults[:3])}{more}): it was trained on another model; name that as the "
            "base"
        )
    peft.set_peft_model_state_dict(network, tensors)
    adapted.merge_and_unload()
    vars(network).pop("peft_config", None)  # not every release of peft does
    for parameter, requires_grad in trained:  # peft has frozen them all
        parameter.requires_grad_(requires_grad)
