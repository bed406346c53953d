"""GLIDE's checkpoints (`glide-text2im`): `.pt` files of its base, upsampling and inpainting
networks, each with its own text transformer.

Its weights hold their own sizes, all but three that every published file shares: heads 64 wide,
pictures of 64 px, and of 256 px from an upsampler.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.checkpoint import cast, fill, unfilled
from unclip.diffusion import DiffusionConfig
from unclip.glide import TOKENIZER_FILES, GlideStage, GlideStageConfig
from unclip.hub import trunk
from unclip.hub.model import Model
from unclip.hub.pickles import load_pickle
from unclip.models import GlideConfig, TextTransformerConfig

HEAD_DIM = 64
BASE_SIZE, UPSAMPLER_SIZE = 64, 256

SAMPLING = {
    "guidance_scale": 3.0,
    "sampler": "ddpm",
    "decoder_steps": 100,
    "upsampler_sampler": "ddim",
    "upsampler_steps": 27,
}
"""How its authors' notebooks sample."""

# What tells its networks apart: channels of x_t, of the small picture, of the known one and mask.
KINDS = {3: "base", 6: "upsampler", 7: "inpainting base", 10: "inpainting upsampler"}


def is_checkpoint(path: Path) -> bool:
    """Whether a path is one of GLIDE's files, or a folder that holds one."""
    return bool(_files(path))


def _files(path: Path) -> dict[str, Path]:
    """Kind -> file. What is not GLIDE's is passed over, as its noised CLIP's two files are."""
    found: dict[str, Path] = {}
    for file in sorted(path.glob("*.pt")) if path.is_dir() else [path]:
        kind = _kind_in(file) if file.suffix == ".pt" else None
        if kind is None:
            continue
        if kind in found:
            raise ValueError(
                f"{path} must hold one {kind} network of GLIDE's; got {found[kind].name} and "
                f"{file.name}: take one out, or pass the file itself"
            )
        found[kind] = file
    return found


def _kind_in(file: Path) -> str | None:
    try:
        return _kind(load_pickle(file))
    except ValueError:  # other formats may hold more than tensors; their readers know what
        return None


def _kind(weights: Any) -> str | None:
    needed = ("token_embedding.weight", "input_blocks.0.0.weight")
    if not isinstance(weights, dict) or not all(name in weights for name in needed):
        return None
    return KINDS.get(weights["input_blocks.0.0.weight"].shape[1])


def read(path: Path) -> Model:
    """What a file, or a folder of files, of GLIDE's holds. Where plain and inpainting networks lie
    together the plain ones are taken; pass a file to choose.

    Raises:
        ValueError: two files are of one kind.
    """
    files = _files(path)
    model = Model(path, sampling=dict(SAMPLING))
    for inpainting in ("", "inpainting "):
        base, upsampler = files.get(f"{inpainting}base"), files.get(f"{inpainting}upsampler")
        if base is not None and model.decoder is None:
            model.decoder = partial(read_network, base)
        if upsampler is not None and not model.upsamplers:
            model.upsamplers = [partial(read_network, upsampler)]
    return model


def read_network(
    path: Path,
    dtype: torch.dtype = torch.float32,
    *,
    image_size: int | None = None,
    head_dim: int = HEAD_DIM,
) -> GlideStage:
    """One of GLIDE's networks.

    Args:
        path: the file.
        dtype: of its weights.
        image_size: side of its pictures, px; None: of the published ones.
        head_dim: width of attention's heads.

    Raises:
        ValueError: the file does not hold such a network, whole.
    """
    stored = load_pickle(path)
    kind = _kind(stored)
    if kind is None:
        raise ValueError(
            f"{path} must hold one of GLIDE's networks; got other weights: pass another file"
        )
    weights = {k: cast(k, v, dtype) for k, v in stored.items() if isinstance(v, Tensor)}
    is_upsampler = kind.endswith("upsampler")
    size = image_size or (UPSAMPLER_SIZE if is_upsampler else BASE_SIZE)
    vocab_size, width = weights["token_embedding.weight"].shape
    network = GlideConfig(
        unet=trunk.config_of(weights, path, size, head_dim, dropout=0.1, context_dim=width),
        text=TextTransformerConfig(
            vocab_size=vocab_size,
            context_length=weights["positional_embedding"].shape[0],
            width=width,
            depth=trunk.transformer_depth(weights),
            head_dim=head_dim,
        ),
        scale=UPSAMPLER_SIZE // BASE_SIZE if is_upsampler else None,
        inpainting=kind.startswith("inpainting"),
        learned_variance=weights["out.2.weight"].shape[0] == 6,
    )
    diffusion = DiffusionConfig(
        prediction_type="eps",
        variance="learned_range" if network.learned_variance else "fixed_small",
        beta_schedule="linear" if is_upsampler else "cosine",
        timestep_spacing="fast27" if is_upsampler else "linspace",
    )
    config = GlideStageConfig(network=network, diffusion=diffusion)
    if all((path.parent / name).is_file() for name in TOKENIZER_FILES):
        config = GlideStageConfig(network=network, diffusion=diffusion, tokenizer=str(path.parent))
    stage = unfilled(lambda: GlideStage(config))
    fill(stage.network, from_glide(weights, network), path, weights)
    return stage.eval()


def from_glide(theirs: trunk.Tensors, config: GlideConfig) -> trunk.Tensors:
    """Move the weights of one of GLIDE's networks out of `theirs` as ours."""
    ours = {f"unet.{k}": v for k, v in trunk.from_adm(theirs, config.unet).items()}
    names = [
        ("token_embedding", "token_embedding"),
        ("norm_out", "final_ln"),
        *trunk.transformer_names(config.text.depth),
    ]
    ours |= {f"text.{k}": v for k, v in trunk.take(theirs, names).items()}
    ours |= trunk.take(theirs, [("text_to_emb", "transformer_proj")])
    for name, place in (("position_embedding", "positional"), ("padding_embedding", "padding")):
        if f"{place}_embedding" in theirs:
            ours[f"text.{name}"] = theirs.pop(f"{place}_embedding")
    return ours
