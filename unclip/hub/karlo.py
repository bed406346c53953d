"""Karlo's original checkpoints: `.ckpt` files for prior, decoder and super-resolution, and a `.th`
file with the statistics of the embeddings.

Its weights hold their own sizes, all but two that every published file shares: heads 64 wide, and
pictures of 64 and 256 px. Its CLIP is OpenAI's ViT-L/14, whose embeddings it takes as they come.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from unclip.checkpoint import cast, fill, unfilled
from unclip.clip import FrozenCLIP, load_clip
from unclip.diffusion import DiffusionConfig
from unclip.hub import trunk
from unclip.hub.model import Model
from unclip.hub.pickles import load_pickle
from unclip.models import DecoderConfig, PriorTransformerConfig, UpsamplerConfig
from unclip.priors import DiffusionPrior, DiffusionPriorConfig
from unclip.stages import DecoderStage, DecoderStageConfig, UpsamplerStage, UpsamplerStageConfig

CLIP_NAME = "ViT-L-14/openai"
HEAD_DIM = 64
DECODER_SIZE, UPSAMPLER_SIZE = 64, 256

SAMPLING = {
    "guidance_scale": 8.0,
    "prior_guidance_scale": 4.0,
    "num_candidates": 1,
    "prior_steps": 25,
    "sampler": "ddpm",
    "decoder_steps": 25,
    "upsampler_sampler": "ddpm",
    "upsampler_steps": 7,
}
"""How its authors sample it, diffusers' pipeline included."""


def is_checkpoint(path: Path) -> bool:
    """Whether a path is one of Karlo's files, or a folder that holds one."""
    return path.suffix == ".ckpt" or any(path.glob("*.ckpt"))


def read(folder: Path) -> Model:
    """What a folder of Karlo's files, or one of them, holds.

    Raises:
        ValueError: no file is one of Karlo's, or two are of one kind.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.ckpt")) if folder.is_dir() else [folder]:
        kind = _kind(_state_dict(path))
        if kind is None:
            raise ValueError(
                f"{path} must hold Karlo's prior, decoder or super-resolution; got other weights: "
                "take it out of the folder"
            )
        if kind in files:
            raise ValueError(
                f"{folder} must hold one {kind}; got {files[kind].name} and {path.name}: take one "
                "out"
            )
        files[kind] = path
    model = Model(folder, clip=_clip, sampling=dict(SAMPLING))
    if "prior" in files:
        model.prior = partial(read_prior, files["prior"])
    if "decoder" in files:
        model.decoder = partial(read_decoder, files["decoder"])
    if "upsampler" in files:
        model.upsamplers = [partial(read_upsampler, files["upsampler"])]
    return model


def _clip() -> FrozenCLIP:
    clip = load_clip(CLIP_NAME)
    clip.unit_norm = False
    return clip


def _state_dict(path: Path, dtype: torch.dtype | None = None) -> trunk.Tensors:
    values = load_pickle(path)
    weights = values.get("state_dict", values) if isinstance(values, dict) else {}
    return {k: cast(k, v, dtype) for k, v in weights.items() if isinstance(v, Tensor)}


def _kind(weights: trunk.Tensors) -> str | None:
    for kind, name in (
        ("prior", "model.prd_emb"),
        ("decoder", "model.clip_tok_proj.weight"),
        ("upsampler", "model_first_steps.time_embed.0.weight"),
    ):
        if name in weights:
            return kind
    return None


def _under(weights: trunk.Tensors, prefix: str) -> trunk.Tensors:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def read_prior(path: Path, dtype: torch.dtype = torch.float32) -> DiffusionPrior:
    """The prior, with the statistics from the `*stats.th` beside it."""
    stats = sorted(path.parent.glob("*stats*.th"))
    if len(stats) != 1:
        raise ValueError(
            f"{path} needs the statistics of its embeddings beside it, in one *stats.th file; got "
            f"{len(stats)}: copy Karlo's ViT-L-14_stats.th there, or every embedding is wrong"
        )
    weights = _under(_state_dict(path, dtype), "model.")
    width = weights["prd_emb"].shape[-1]
    network = PriorTransformerConfig(
        embed_dim=weights["out_proj.weight"].shape[0],
        text_encodings_dim=weights["text_enc_proj.weight"].shape[1],
        max_text_len=weights["positional_embedding"].shape[1] - 4,
        width=width,
        depth=trunk.transformer_depth(weights),
        head_dim=HEAD_DIM,
        text_drop_prob=0.2,
        null_text="empty_prompt",
    )
    diffusion = DiffusionConfig(prediction_type="x_0", clip_range=10.0, timestep_spacing="linspace")
    config = DiffusionPriorConfig(network=network, diffusion=diffusion, unit_norm=False)
    prior = unfilled(lambda: DiffusionPrior(config))
    fill(prior.network, prior_from_karlo(weights, network.depth), path, weights)
    prior.set_statistics(*load_pickle(stats[0]))
    return prior.eval()


def prior_from_karlo(theirs: trunk.Tensors, depth: int) -> trunk.Tensors:
    """Move the weights of Karlo's prior out of `theirs` as ours. Its rows of queries, keys and
    values are grouped per head already."""
    names = [
        ("text_encodings_in", "text_enc_proj"),
        ("text_embed_in", "text_emb_proj"),
        ("image_embed_in", "clip_img_proj"),
        ("time_embed.0", "time_embed.0"),
        ("time_embed.2", "time_embed.2"),
        ("norm_out", "final_ln"),
        ("out", "out_proj"),
    ]
    weights = trunk.take(theirs, [*names, *trunk.transformer_names(depth)])
    weights["final_token"] = theirs.pop("prd_emb").flatten()
    weights["position_embedding"] = theirs.pop("positional_embedding")[0]
    return weights


def read_decoder(path: Path, dtype: torch.dtype = torch.float32) -> DecoderStage:
    """The decoder."""
    weights = _under(_state_dict(path, dtype), "model.")
    context_dim, embed_dim = weights["text_seq_proj.0.weight"].shape
    network = DecoderConfig(
        unet=trunk.config_of(
            weights, path, DECODER_SIZE, HEAD_DIM, dropout=0.1, context_dim=context_dim
        ),
        image_embed_dim=embed_dim,
        text_encodings_dim=embed_dim,
        text_embed_dim=embed_dim,
        embed_scale=1.0,
        num_image_tokens=weights["clip_tok_proj.weight"].shape[0] // context_dim,
        image_drop_prob=0.1,
        text_drop_prob=0.3,
        null_text="empty_prompt",
        learned_variance=True,
    )
    diffusion = DiffusionConfig(
        prediction_type="eps", variance="learned_range", timestep_spacing="linspace"
    )
    config = DecoderStageConfig(network=network, diffusion=diffusion)
    stage = unfilled(lambda: DecoderStage(config))
    ours = {f"unet.{k}": v for k, v in trunk.from_adm(weights, network.unet).items()}
    names = [
        ("image_to_emb", "clip_emb"),
        ("image_to_tokens", "clip_tok_proj"),
        ("text_to_tokens.0", "text_seq_proj.0"),
        ("text_to_tokens.1", "text_seq_proj.1"),
        ("text_to_emb", "text_feat_proj"),
    ]
    ours |= trunk.take(weights, names)
    ours["null_image_embed"] = weights.pop("cf_param")
    fill(stage.network, ours, path, weights)
    return stage.eval()


def read_upsampler(path: Path, dtype: torch.dtype = torch.float32) -> UpsamplerStage:
    """Both super-resolution networks as one upsampler."""
    weights = _state_dict(path, dtype)
    parts = [_under(weights, f"model_{steps}.") for steps in ("first_steps", "last_step")]
    unet = trunk.config_of(parts[0], path, UPSAMPLER_SIZE, HEAD_DIM, scale_shift=False)
    network = UpsamplerConfig(unet=unet, scale=UPSAMPLER_SIZE // DECODER_SIZE)
    diffusion = DiffusionConfig(prediction_type="eps", timestep_spacing="linspace")
    config = UpsamplerStageConfig(
        network=network, final_network=bool(parts[1]), diffusion=diffusion
    )
    stage = unfilled(lambda: UpsamplerStage(config))
    ours: trunk.Tensors = {}
    for name, theirs in zip(("network", "final_network"), parts, strict=True):
        renamed = trunk.from_adm(theirs, unet) if theirs else {}
        ours |= {f"{name}.unet.{k}": v for k, v in renamed.items()}
    fill(stage, ours, path, [k for theirs in parts for k in theirs])
    return stage.eval()
