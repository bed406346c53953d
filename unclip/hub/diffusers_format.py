"""Folders in diffusers' layout: Karlo as `UnCLIPPipeline` saves it, read and written.

Since 0.38 diffusers itself cannot load such a folder. Its parts are read by name here, so how
`model_index.json` lists them (before 0.38 and since) makes no difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from unclip.checkpoint import fill, load_weights, save_weights, unfilled, written_whole
from unclip.clip import HuggingFaceCLIP, load_clip
from unclip.config import from_dict, to_dict
from unclip.diffusion import DiffusionConfig
from unclip.glide import GlideStage
from unclip.hub import trunk
from unclip.hub.karlo import SAMPLING
from unclip.hub.model import Model, Stages
from unclip.models import DecoderConfig, PriorTransformerConfig, UNetConfig, UpsamplerConfig
from unclip.priors import DiffusionPrior, DiffusionPriorConfig
from unclip.stages import DecoderStage, DecoderStageConfig, UpsamplerStage, UpsamplerStageConfig

INDEX_NAME = "model_index.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline", "KandinskyV22PriorPipeline")
"""Pipelines whose folders are read here. Kandinsky's has a prior and no decoder of this kind."""

_PREDICTIONS = {"sample": "x_0", "epsilon": "eps"}
_VARIANCES = {"fixed_small_log": "fixed_small", "learned_range": "learned_range"}
"""UnCLIPScheduler's words and ours."""


# ------------------------------------------------------------------------------------ reading


def read(folder: Path) -> Model:
    """What a folder in diffusers' layout holds.

    Raises:
        ValueError: it holds a pipeline of another kind.
    """
    kind = _json(folder / INDEX_NAME).get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(
            f"{folder / INDEX_NAME} must be of one of {', '.join(PIPELINES)}; got {kind!r}: pass "
            "the folder of an unCLIP model"
        )
    model = Model(folder, clip=lambda: load_clip(str(folder)), sampling=dict(SAMPLING))
    if (folder / "prior").is_dir():
        model.prior = partial(read_prior, folder)
    if (folder / "decoder").is_dir():
        model.decoder = partial(read_decoder, folder)
    if (folder / "super_res_first").is_dir():
        model.upsamplers = [partial(read_upsampler, folder)]
    return model


def read_prior(folder: Path, dtype: torch.dtype = torch.float32) -> DiffusionPrior:
    """The prior of a pipeline's folder; raises ValueError where its statistics are unset."""
    config = _config(folder / "prior")
    _expect(
        folder / "prior",
        config,
        additional_embeddings=4,
        time_embed_act_fn="silu",
        norm_in_type=None,
        embedding_proj_norm_type=None,
        encoder_hid_proj_type="linear",
        added_emb_type="prd",
        time_embed_dim=None,
        embedding_proj_dim=None,
        clip_embed_dim=None,
    )
    width = config["num_attention_heads"] * config["attention_head_dim"]
    network = PriorTransformerConfig(
        embed_dim=config["embedding_dim"],
        text_encodings_dim=config["embedding_dim"],
        max_text_len=config["num_embeddings"],
        width=width,
        depth=config["num_layers"],
        head_dim=config["attention_head_dim"],
        dropout=config.get("dropout", 0.0),
        text_drop_prob=0.2,  # Karlo's
        null_text="empty_prompt",
    )
    diffusion = _diffusion(folder / "prior_scheduler", folder / "scheduler")
    stage_config = DiffusionPriorConfig(network=network, diffusion=diffusion, unit_norm=False)
    stage_config = _noted(config, stage_config)
    prior = unfilled(lambda: DiffusionPrior(stage_config))
    tensors = _weights(folder / "prior", dtype, keep=("clip_mean", "clip_std"))
    mean, std = tensors.pop("clip_mean", None), tensors.pop("clip_std", None)
    if mean is None or std is None or not bool((std != 0).all()):
        raise ValueError(
            f"{folder / 'prior'}: clip_mean and clip_std must be set, std above 0; got none: every "
            "embedding would collapse to one. Set them from the embeddings the prior was trained on"
        )
    ours = prior_from_diffusers(tensors, network)
    fill(prior.network, ours, folder / "prior", tensors)
    prior.set_statistics(mean, std)
    return prior.eval()


def read_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> DecoderStage:
    """The decoder of a pipeline's folder, its text projection included."""
    config, projection = _config(folder / "decoder"), _config(folder / "text_proj")
    _expect(
        folder / "decoder",
        config,
        class_embed_type="identity",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        only_cross_attention=False,
        flip_sin_to_cos=True,
        freq_shift=0,
        act_fn="silu",
    )
    embed_dim = projection.get("clip_embeddings_dim", 768)
    network = DecoderConfig(
        unet=_unet(folder / "decoder", config, context_dim=config["cross_attention_dim"]),
        image_embed_dim=embed_dim,
        text_encodings_dim=embed_dim,
        text_embed_dim=embed_dim,
        embed_scale=1.0,
        num_image_tokens=projection.get("clip_extra_context_tokens", 4),
        image_drop_prob=0.1,  # Karlo's, as the next
        text_drop_prob=0.3,
        null_text="empty_prompt",
        learned_variance=config["out_channels"] == 6,
    )
    diffusion = _diffusion(folder / "decoder_scheduler")
    stage_config = _noted(config, DecoderStageConfig(network=network, diffusion=diffusion))
    stage = unfilled(lambda: DecoderStage(stage_config))
    unet, extra = _weights(folder / "decoder", dtype), _weights(folder / "text_proj", dtype)
    ours = {f"unet.{k}": v for k, v in trunk.from_diffusers(unet, network.unet).items()}
    ours |= trunk.take(extra, _TEXT_PROJECTION)
    if (null := extra.pop("learned_classifier_free_guidance_embeddings", None)) is not None:
        ours["null_image_embed"] = null
    fill(stage.network, ours, folder / "decoder", {**unet, **extra})
    return stage.eval()


def read_upsampler(folder: Path, dtype: torch.dtype = torch.float32) -> UpsamplerStage:
    """The two super-resolution networks of a pipeline's folder as one upsampler."""
    config = _config(folder / "super_res_first")
    _expect(folder / "super_res_first", config, flip_sin_to_cos=True, freq_shift=0, act_fn="silu")
    low = _config(folder / "decoder")["sample_size"]
    network = UpsamplerConfig(
        unet=_unet(folder / "super_res_first", config), scale=config["sample_size"] // low
    )
    stage_config = _noted(
        config,
        UpsamplerStageConfig(
            network=network,
            final_network=(folder / "super_res_last").is_dir(),
            diffusion=_diffusion(folder / "super_res_scheduler"),
        ),
    )
    stage = unfilled(lambda: UpsamplerStage(stage_config))
    parts = {"super_res_first": stage.network, "super_res_last": stage.final_network}
    for name, part in parts.items():
        if part is not None:
            theirs = _weights(folder / name, dtype)
            ours = trunk.from_diffusers(theirs, network.unet)
            ours = {f"unet.{k}": v for k, v in ours.items()}
            fill(part, ours, folder / name, theirs)
    return stage.eval()


def _unet(folder: Path, config: Mapping[str, Any], context_dim: int | None = None) -> UNetConfig:
    width = config["block_out_channels"][0]
    if any(channels % width for channels in config["block_out_channels"]):
        raise ValueError(
            f"{folder}: block_out_channels must be multiples of the first; got "
            f"{config['block_out_channels']}: no published model of this family has others"
        )
    known = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}
    if unknown := set(config["down_block_types"]) - set(known):
        raise ValueError(
            f"{folder}: down_block_types must be among {', '.join(known)}; got "
            f"{', '.join(sorted(unknown))}: this is another family's U-Net"
        )
    if config.get("add_attention", True) and context_dim is None:
        raise ValueError(
            f"{folder}: add_attention must be false; got true: the upsamplers of this family have "
            "no attention"
        )
    grids = [config["sample_size"] >> level for level in range(len(config["down_block_types"]))]
    attended = (
        grid for grid, kind in zip(grids, config["down_block_types"], strict=True) if known[kind]
    )
    return UNetConfig(
        image_size=config["sample_size"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        width=width,
        channel_mult=tuple(channels // width for channels in config["block_out_channels"]),
        num_res_blocks=config["layers_per_block"],
        attention_resolutions=tuple(attended),
        head_dim=config.get("attention_head_dim") or 64,
        dropout=config.get("dropout", 0.0),
        scale_shift=config.get("resnet_time_scale_shift", "default") == "scale_shift",
        context_dim=context_dim,
    )


def _diffusion(*folders: Path) -> DiffusionConfig:
    """The schedule of an UnCLIPScheduler, in the first of the folders that is there."""
    for folder in folders:
        if (folder / "scheduler_config.json").is_file():
            break
    config = _json(folder / "scheduler_config.json")
    values = {
        "num_train_timesteps": config.get("num_train_timesteps", 1000),
        "prediction_type": _PREDICTIONS[config.get("prediction_type", "epsilon")],
        "variance": _VARIANCES[config.get("variance_type", "fixed_small_log")],
        "clip_range": config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None,
        "timestep_spacing": "linspace",
    }
    return from_dict(DiffusionConfig, values)


def _noted(config: Mapping[str, Any], derived: Any) -> Any:
    """The stage's own config where this project wrote the folder, else what was derived."""
    return from_dict(type(derived), config["_unclip"]) if "_unclip" in config else derived


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy or download the folder again")
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or download it again") from error
    return values


def _config(folder: Path) -> dict[str, Any]:
    return _json(folder / "config.json")


def _expect(folder: Path, config: Mapping[str, Any], **values: Any) -> None:
    """Refuse what diffusers' classes can be told and this family of models never is."""
    for name, value in values.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{folder / 'config.json'}: {name} must be {value!r}; got {config[name]!r}: no "
                "published unCLIP model has it, and it is not built here"
            )


def _weights(
    folder: Path, dtype: torch.dtype | None = None, keep: Collection[str] = ()
) -> trunk.Tensors:
    """Copies, because queries, keys and values are put together anew."""
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if index.is_file():
        shards = sorted(set(_json(index)["weight_map"].values()))
        parts = [load_weights(folder / shard, dtype, keep, mapped=False) for shard in shards]
        return {name: tensor for part in parts for name, tensor in part.items()}
    half = folder / WEIGHTS_NAME.replace(".safetensors", ".fp16.safetensors")
    whole = folder / WEIGHTS_NAME
    path = half if half.is_file() and not whole.is_file() else whole
    return load_weights(path, dtype, keep, mapped=False)


# ------------------------------------------------------------------------------------ writing


def write(stages: Stages, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write stages as a folder whose parts load in diffusers, whole or not at all.

    The parts' configs carry this project's own beside diffusers', which ignores it: reading the
    folder back gives the same model.

    Args:
        stages: those that are there are written.
        folder: where to; it must not be there yet.
        dtype: of the stored weights; None keeps each tensor's own.

    Raises:
        FileExistsError: the folder is there.
        ValueError: naming every setting that diffusers' classes cannot be told.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: choose a new folder to export into")
    if reasons := list(_unsayable(stages)):
        raise ValueError(
            "diffusers' unCLIP classes cannot be told of this model's " + "; ".join(reasons)
        )
    with written_whole(folder) as temporary:
        index: dict[str, Any] = {
            "_class_name": "UnCLIPPipeline",
            "_diffusers_version": diffusers.__version__,
        }
        if stages.clip is not None:
            stages.clip.save(temporary, dtype)
            index["text_encoder"] = ["transformers", "CLIPTextModelWithProjection"]
            index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        parts = []
        if stages.prior is not None:
            assert isinstance(stages.prior, DiffusionPrior)
            parts += _prior_parts(stages.prior)
        if isinstance(stages.decoder, DecoderStage):
            parts += _decoder_parts(stages.decoder)
        for upsampler in stages.upsamplers:
            if isinstance(upsampler, UpsamplerStage):
                parts += _upsampler_parts(upsampler)
        for name, (class_name, config, tensors) in parts:
            config = {
                "_class_name": class_name,
                "_diffusers_version": diffusers.__version__,
            } | config
            is_model = tensors is not None
            (temporary / name).mkdir()
            file = temporary / name / ("config.json" if is_model else "scheduler_config.json")
            file.write_text(json.dumps(config, indent=2) + "\n")
            if tensors is not None:
                save_weights(tensors, temporary / name / WEIGHTS_NAME, dtype)
            index[name] = ["diffusers", class_name]
        (temporary / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


Part = tuple[str, tuple[str, dict[str, Any], trunk.Tensors | None]]
"""Sub-folder, diffusers' class, its config, its weights (None: a scheduler)."""


def _unsayable(stages: Stages) -> Iterator[str]:
    """What of a model diffusers' classes have no words for, and what to do."""
    if stages.clip is not None and not isinstance(stages.clip, HuggingFaceCLIP):
        yield "clip: it is open_clip's, not transformers' (leave it out: --parts prior,decoder)"
    if stages.prior is not None:
        prior, network = stages.prior.config, stages.prior.config.network
        if stages.prior.kind == DiffusionPrior.kind:
            yield from _differing(
                "prior",
                {
                    "unit_norm": (prior.unit_norm, False),
                    "network.text_encodings_dim": (network.text_encodings_dim, network.embed_dim),
                    "network.mlp_ratio": (network.mlp_ratio, 4),
                    "network.null_text": (network.null_text, "empty_prompt"),
                },
            )
        else:
            yield (
                f"prior: of kind {stages.prior.kind}, not {DiffusionPrior.kind} (leave it out: "
                "--parts clip,decoder)"
            )
    for stage in (stages.decoder, *stages.upsamplers):
        if isinstance(stage, GlideStage):
            yield "network with a text transformer, GLIDE's (use --to unclip)"
    if isinstance(stages.decoder, DecoderStage):
        decoder = stages.decoder.config.network
        unet = decoder.unet
        yield from _differing(
            "decoder.network",
            {
                "unet.patch_size": (unet.patch_size, 1),
                "unet.position_embedding": (unet.position_embedding, False),
                "layout_size": (decoder.layout_size, 0),
                "null_text": (decoder.null_text, "empty_prompt"),
                "text_encodings_dim": (decoder.text_encodings_dim, decoder.image_embed_dim),
                "text_embed_dim": (decoder.text_embed_dim, decoder.image_embed_dim),
            },
        )
        if decoder.num_image_tokens == 0:
            yield "decoder.network.num_image_tokens 0 (it must be above 0)"
    if len(stages.upsamplers) > 1:
        yield f"{len(stages.upsamplers)} upsamplers (it must be one)"
    for upsampler in stages.upsamplers:
        network_config = upsampler.config.network
        if not isinstance(network_config, UpsamplerConfig):
            continue
        yield from _differing(
            f"upsampler_{upsampler.image_size}.network",
            {
                "unet.patch_size": (network_config.unet.patch_size, 1),
                "noise_conditioning": (network_config.noise_conditioning, False),
                "learned_variance": (network_config.learned_variance, False),
            },
        )
    parts = (stages.prior, stages.decoder, *stages.upsamplers)
    schedules = (getattr(part.config, "diffusion", None) for part in parts if part is not None)
    for schedule in filter(None, schedules):
        for name, sayable in (
            ("beta_schedule", ["cosine"]),
            ("prediction_type", list(_PREDICTIONS.values())),
            ("variance", list(_VARIANCES.values())),
        ):
            if (value := getattr(schedule, name)) not in sayable:
                yield f"diffusion.{name} {value!r} (it must be {' or '.join(map(repr, sayable))})"


def _differing(where: str, settings: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    for name, (value, sayable) in settings.items():
        if value != sayable:
            yield f"{where}.{name} {value!r} (it must be {sayable!r})"


def _prior_parts(prior: DiffusionPrior) -> list[Part]:
    network = prior.config.network
    assert isinstance(network, PriorTransformerConfig)
    config = {
        "num_attention_heads": network.width // network.head_dim,
        "attention_head_dim": network.head_dim,
        "num_layers": network.depth,
        "embedding_dim": network.embed_dim,
        "num_embeddings": network.max_text_len,
        "dropout": network.dropout,
        "_unclip": to_dict(prior.config),
    }
    tensors = prior_to_diffusers(dict(prior.network.state_dict()), network)
    tensors |= {"clip_mean": prior.mean[None], "clip_std": prior.std[None]}
    schedule = _scheduler_part("prior_scheduler", prior.config.diffusion)
    return [("prior", ("PriorTransformer", config, tensors)), schedule]


def _decoder_parts(decoder: DecoderStage) -> list[Part]:
    network = decoder.config.network
    scale = network.embed_scale or network.image_embed_dim**0.5
    weights = dict(decoder.network.state_dict())
    if scale != 1:  # diffusers' projection takes embeddings as they are: the layers do the scaling
        for layer in ("image_to_emb", "image_to_tokens", "text_to_emb"):
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] * scale
        weights["null_image_embed"] = weights["null_image_embed"] / scale
    noted = replace(decoder.config, network=replace(network, embed_scale=1.0))
    unet = {k.removeprefix("unet."): weights.pop(k) for k in list(weights) if k[:5] == "unet."}
    projection = trunk.take(weights, [(theirs, ours) for ours, theirs in _TEXT_PROJECTION])
    projection["learned_classifier_free_guidance_embeddings"] = weights.pop("null_image_embed")
    config = {
        **_unet_config(network.unet),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "cross_attention_dim": network.unet.context_dim,
        "attention_head_dim": network.unet.head_dim,
        "class_embed_type": "identity",
        "_unclip": to_dict(noted),
    }
    projection_config = {
        "clip_extra_context_tokens": network.num_image_tokens,
        "clip_embeddings_dim": network.image_embed_dim,
        "time_embed_dim": network.unet.emb_dim,
        "cross_attention_dim": network.unet.context_dim,
    }
    unet = trunk.to_diffusers(unet, network.unet)
    return [
        ("decoder", ("UNet2DConditionModel", config, unet)),
        ("text_proj", ("UnCLIPTextProjModel", projection_config, projection)),
        _scheduler_part("decoder_scheduler", decoder.config.diffusion),
    ]


def _upsampler_parts(upsampler: UpsamplerStage) -> list[Part]:
    unet = upsampler.config.network.unet
    config = {**_unet_config(unet), "add_attention": False, "_unclip": to_dict(upsampler.config)}
    parts = []
    # Their pipeline wants two networks: without one for the last step, the one there is serves.
    for name, network in (
        ("super_res_first", upsampler.network),
        ("super_res_last", upsampler.final_network or upsampler.network),
    ):
        weights = {k.removeprefix("unet."): v for k, v in network.state_dict().items()}
        parts.append((name, ("UNet2DModel", config, trunk.to_diffusers(weights, unet))))
    return [*parts, _scheduler_part("super_res_scheduler", upsampler.config.diffusion)]


def _unet_config(unet: UNetConfig) -> dict[str, Any]:
    attends = [grid in unet.attention_resolutions for grid in unet.grids]
    down = ["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends]
    up = ["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)]
    return {
        "sample_size": unet.image_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": [unet.width * mult for mult in unet.channel_mult],
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": down,
        "up_block_types": up,
        "dropout": unet.dropout,
        "norm_num_groups": math.gcd(32, unet.width),
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift else "default",
    }


def _scheduler_part(name: str, diffusion: DiffusionConfig) -> Part:
    config = {
        "num_train_timesteps": diffusion.num_train_timesteps,
        "prediction_type": {v: k for k, v in _PREDICTIONS.items()}[diffusion.prediction_type],
        "variance_type": {v: k for k, v in _VARIANCES.items()}[diffusion.variance],
        "clip_sample": diffusion.clip_range is not None,
        "clip_sample_range": diffusion.clip_range or 1.0,
    }
    return name, ("UnCLIPScheduler", config, None)


# -------------------------------------------------------------------------------------- names

_TEXT_PROJECTION = [
    ("image_to_emb", "clip_image_embeddings_project_to_time_embeddings"),
    ("image_to_tokens", "clip_extra_context_tokens_proj"),
    ("text_to_tokens.0", "encoder_hidden_states_proj"),
    ("text_to_tokens.1", "text_encoder_hidden_states_norm"),
    ("text_to_emb", "embedding_proj"),
]


def _prior_names(depth: int) -> list[tuple[str, str]]:
    names = [
        ("text_encodings_in", "encoder_hidden_states_proj"),
        ("text_embed_in", "embedding_proj"),
        ("image_embed_in", "proj_in"),
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("norm_out", "norm_out"),
        ("out", "proj_to_clip_embeddings"),
    ]
    for layer in range(depth):
        ours, theirs = f"blocks.{layer}", f"transformer_blocks.{layer}"
        names += [
            (f"{ours}.norm1", f"{theirs}.norm1"),
            (f"{ours}.proj", f"{theirs}.attn1.to_out.0"),
            (f"{ours}.norm2", f"{theirs}.norm3"),
            (f"{ours}.mlp.0", f"{theirs}.ff.net.0.proj"),
            (f"{ours}.mlp.2", f"{theirs}.ff.net.2"),
        ]
    return names


def _prior_qkv(depth: int) -> list[tuple[str, list[str]]]:
    return [
        (f"blocks.{i}.qkv", [f"transformer_blocks.{i}.attn1.to_{part}" for part in "qkv"])
        for i in range(depth)
    ]


def prior_from_diffusers(theirs: trunk.Tensors, config: PriorTransformerConfig) -> trunk.Tensors:
    """Move the weights of diffusers' PriorTransformer out of `theirs` as ours."""
    ours = trunk.take(theirs, _prior_names(config.depth))
    ours |= trunk.join(theirs, _prior_qkv(config.depth), config.head_dim)
    if (token := theirs.pop("prd_embedding", None)) is not None:
        ours["final_token"] = token.flatten()
    if (positions := theirs.pop("positional_embedding", None)) is not None:
        ours["position_embedding"] = positions[0]
    theirs.pop("causal_attention_mask", None)  # older versions saved it; it holds nothing learned
    return ours


def prior_to_diffusers(ours: trunk.Tensors, config: PriorTransformerConfig) -> trunk.Tensors:
    """Move our weights out of `ours` as those of diffusers' PriorTransformer."""
    theirs = trunk.take(ours, [(theirs, mine) for mine, theirs in _prior_names(config.depth)])
    theirs["prd_embedding"] = ours.pop("final_token")[None, None]
    theirs["positional_embedding"] = ours.pop("position_embedding")[None]
    return theirs | trunk.split(ours, _prior_qkv(config.depth), config.head_dim)
