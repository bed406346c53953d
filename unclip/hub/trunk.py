"""The U-Net trunk's weights under the names of other codebases.

guided-diffusion, GLIDE and Karlo share one set of names, diffusers has another; the numbers are the
same. Both ways start from one table of blocks.

Shapes: A attention heads, K head width, C = A * K channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from einops import rearrange
from torch import Tensor

from unclip.models import UNetConfig

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Block:
    """One residual or attention block under its three names."""

    kind: Literal["res", "attention"]
    ours: str
    diffusers: str
    adm: str
    """In guided-diffusion (Dhariwal and Nichol 2021), GLIDE and Karlo."""


def blocks(config: UNetConfig) -> Iterator[Block]:
    """Every block of a trunk, from the input to the output."""
    grids, depth = config.grids, config.num_res_blocks
    index = 0
    for level, grid in enumerate(grids):
        name = f"down_blocks.{level}"
        for i in range(depth):
            ours, adm = f"down.{index}", f"input_blocks.{index + 1}"
            yield Block("res", f"{ours}.res", f"{name}.resnets.{i}", f"{adm}.0")
            if grid in config.attention_resolutions:
                yield Block("attention", f"{ours}.attention", f"{name}.attentions.{i}", f"{adm}.1")
            index += 1
        if level < len(grids) - 1:
            adm = f"input_blocks.{index + 1}.0"
            yield Block("res", f"down.{index}.res", f"{name}.downsamplers.0", adm)
            index += 1

    yield Block("res", "middle.0.res", "mid_block.resnets.0", "middle_block.0")
    last = 1
    if config.attention_resolutions:
        name, adm = "mid_block.attentions.0", "middle_block.1"
        yield Block("attention", "middle.0.attention", name, adm)
        last = 2
    yield Block("res", "middle.1.res", "mid_block.resnets.1", f"middle_block.{last}")

    index = 0
    for level, grid in enumerate(reversed(grids)):
        name, attends = f"up_blocks.{level}", grid in config.attention_resolutions
        for i in range(depth + 1):
            ours, adm = f"up.{index}", f"output_blocks.{index}"
            yield Block("res", f"{ours}.res", f"{name}.resnets.{i}", f"{adm}.0")
            if attends:
                yield Block("attention", f"{ours}.attention", f"{name}.attentions.{i}", f"{adm}.1")
            if i == depth and level < len(grids) - 1:
                place = 2 if attends else 1
                yield Block("res", f"{ours}.up", f"{name}.upsamplers.0", f"{adm}.{place}")
            index += 1


_ENDS = [  # ours, diffusers', guided-diffusion's
    ("time_embed.0", "time_embedding.linear_1", "time_embed.0"),
    ("time_embed.2", "time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "conv_in", "input_blocks.0.0"),
    ("norm_out", "conv_norm_out", "out.0"),
    ("conv_out", "conv_out", "out.2"),
]
_RES = [
    ("norm1", "norm1", "in_layers.0"),
    ("conv1", "conv1", "in_layers.2"),
    ("emb", "time_emb_proj", "emb_layers.1"),
    ("norm2", "norm2", "out_layers.0"),
    ("conv2", "conv2", "out_layers.3"),
    ("skip", "conv_shortcut", "skip_connection"),
]
_ATTENTION = [
    ("norm", "group_norm", "norm"),
    ("qkv", "", "qkv"),
    ("context_kv", "", "encoder_kv"),
    ("proj", "to_out.0", "proj_out"),
]
_SPLIT = {"qkv": ("to_q", "to_k", "to_v"), "context_kv": ("add_k_proj", "add_v_proj")}
"""What diffusers keeps in several layers and the others in one."""


def names(config: UNetConfig, whose: Literal["diffusers", "adm"]) -> Iterator[tuple[str, str]]:
    """(our layer, their layer) throughout a trunk; layers that diffusers splits are left out."""
    column = 1 if whose == "diffusers" else 2
    for row in _ENDS:
        yield row[0], row[column]
    for block in blocks(config):
        for row in _RES if block.kind == "res" else _ATTENTION:
            if row[column]:
                yield f"{block.ours}.{row[0]}", f"{getattr(block, whose)}.{row[column]}"


def take(theirs: Tensors, pairs: Iterable[tuple[str, str]]) -> Tensors:
    """Move the layers that the pairs (our name, their name) name out of `theirs`, renamed.

    What stays behind in `theirs` has been understood by nobody."""
    ours = {}
    for our_name, their_name in pairs:
        for kind in ("weight", "bias"):
            if f"{their_name}.{kind}" in theirs:
                ours[f"{our_name}.{kind}"] = theirs.pop(f"{their_name}.{kind}")
    return ours


def from_adm(theirs: Tensors, config: UNetConfig, new_attention_order: bool = False) -> Tensors:
    """Move the weights of guided-diffusion's, GLIDE's or Karlo's U-Net out of `theirs` as ours.

    new_attention_order: guided-diffusion's `use_new_attention_order`: all queries, then all keys,
    then all values, rather than the three of each head together."""
    ours = take(theirs, names(config, "adm"))
    for name, tensor in ours.items():
        if ".attention." in name:
            # Their attention's projections are Conv1d of width 1.
            tensor = tensor.squeeze(-1) if tensor.ndim == 3 else tensor
            if new_attention_order and ".qkv." in name:
                tensor = rows_per_head(list(tensor.chunk(3)), config.head_dim)
            ours[name] = tensor
    return ours


def config_of(
    weights: Tensors, source: Path, image_size: int, head_dim: int, **options: Any
) -> UNetConfig:
    """A trunk's sizes, read from its weights under guided-diffusion's names.

    Each level ends, on the way up, in a residual block that enlarges; that tells levels apart.

    Args:
        weights: the trunk's, under guided-diffusion's names.
        source: where they came from, for the error.
        image_size, head_dim: what weights do not tell.
        options: further fields of the config.

    Raises:
        ValueError: the weights are no such trunk's.
    """
    count = len({name.split(".")[1] for name in weights if name.startswith("output_blocks.")})
    place = "output_blocks.{}.{}".format
    ends = [
        i
        for i in range(count)
        if {place(i, f"{j}.out_layers.3.weight") for j in (1, 2)} & weights.keys()
    ]
    per_level = ends[0] + 1 if ends else count
    levels = [*ends, count - 1]
    if count == 0 or levels != [per_level * (n + 1) - 1 for n in range(len(levels))]:
        raise ValueError(
            f"{source}: every level of the U-Net must end in a block that enlarges, after as many "
            f"blocks as the others; got ends after the blocks {levels} of {count}: this is another "
            "model's"
        )
    channels = [weights[place(i, "0.out_layers.3.weight")].shape[0] for i in reversed(levels)]
    attended = [place(i, "1.qkv.weight") in weights for i in reversed(levels)]
    width = weights["input_blocks.0.0.weight"].shape[0]
    return UNetConfig(
        image_size=image_size,
        in_channels=weights["input_blocks.0.0.weight"].shape[1],
        out_channels=weights["out.2.weight"].shape[0],
        width=width,
        channel_mult=tuple(level // width for level in channels),
        num_res_blocks=per_level - 1,
        attention_resolutions=tuple(image_size >> i for i, has in enumerate(attended) if has),
        head_dim=head_dim,
        **options,
    )


# ------------------------------------------------------------- transformers of GLIDE and Karlo


def transformer_depth(weights: Tensors) -> int:
    """Layers of a transformer under the names that GLIDE and Karlo share."""
    return len({k.split(".")[2] for k in weights if k.startswith("transformer.resblocks.")})


def transformer_names(depth: int) -> Iterator[tuple[str, str]]:
    """(our layer, their layer) of its blocks. Its rows of queries, keys and values are grouped per
    head, as ours are."""
    for layer in range(depth):
        ours, theirs = f"blocks.{layer}", f"transformer.resblocks.{layer}"
        yield f"{ours}.norm1", f"{theirs}.ln_1"
        yield f"{ours}.qkv", f"{theirs}.attn.c_qkv"
        yield f"{ours}.proj", f"{theirs}.attn.c_proj"
        yield f"{ours}.norm2", f"{theirs}.ln_2"
        yield f"{ours}.mlp.0", f"{theirs}.mlp.c_fc"
        yield f"{ours}.mlp.2", f"{theirs}.mlp.c_proj"


def rows_per_head(parts: list[Tensor], head_dim: int) -> Tensor:
    """Projections [C, ...] each -> one whose rows are grouped per head, [q_0, k_0, v_0, q_1, ..].

    The order of guided-diffusion, GLIDE and Karlo, and ours."""
    return rearrange(parts, "p (a d) ... -> (a p d) ...", d=head_dim)


def split_rows(joined: Tensor, head_dim: int, count: int) -> list[Tensor]:
    """The inverse of `rows_per_head`."""
    return list(rearrange(joined, "(a p d) ... -> p (a d) ...", d=head_dim, p=count))


def join(theirs: Tensors, pairs: Iterable[tuple[str, list[str]]], head_dim: int) -> Tensors:
    """Move projections that diffusers keeps apart out of `theirs`, each as one layer of ours.

    pairs: (our layer, their layers); those that are not all there stay behind."""
    ours = {}
    for our_name, their_names in pairs:
        for kind in ("weight", "bias"):
            keys = [f"{name}.{kind}" for name in their_names]
            if all(key in theirs for key in keys):
                ours[f"{our_name}.{kind}"] = rows_per_head([theirs.pop(k) for k in keys], head_dim)
    return ours


def split(ours: Tensors, pairs: Iterable[tuple[str, list[str]]], head_dim: int) -> Tensors:
    """The inverse of `join`: move projections out of `ours` as the layers diffusers keeps."""
    theirs = {}
    for our_name, their_names in pairs:
        for kind in ("weight", "bias"):
            if (joined := ours.pop(f"{our_name}.{kind}", None)) is not None:
                parts = split_rows(joined, head_dim, len(their_names))
                for name, part in zip(their_names, parts, strict=True):
                    theirs[f"{name}.{kind}"] = part.contiguous()
    return theirs


def _split_names(config: UNetConfig) -> Iterator[tuple[str, list[str]]]:
    for block in blocks(config):
        for joined, layers in _SPLIT.items() if block.kind == "attention" else ():
            yield f"{block.ours}.{joined}", [f"{block.diffusers}.{layer}" for layer in layers]


def from_diffusers(theirs: Tensors, config: UNetConfig) -> Tensors:
    """Move the weights of diffusers' UNet2D(Condition)Model out of `theirs` as ours."""
    ours = take(theirs, names(config, "diffusers"))
    return ours | join(theirs, _split_names(config), config.head_dim)


def to_diffusers(ours: Tensors, config: UNetConfig) -> Tensors:
    """Move our weights out of `ours` as those of diffusers' UNet2D(Condition)Model."""
    theirs = take(ours, ((theirs, mine) for mine, theirs in names(config, "diffusers")))
    return theirs | split(ours, _split_names(config), config.head_dim)
