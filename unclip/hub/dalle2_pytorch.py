"""Diffusion priors of DALLE2-pytorch (`laion/DALLE2-PyTorch`, `nousr/...`), from its files.

Its checkpoints are pickles. They are read with `weights_only`, and the few classes that its trainer
left in them beside the weights become empty shells: nothing in a file is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from unclip.checkpoint import cast, fill, unfilled
from unclip.config import from_dict
from unclip.diffusion import DiffusionConfig, make_scheduler
from unclip.diffusion.schedule import BetaSchedule
from unclip.hub.pickles import load_pickle
from unclip.priors import MultiQueryDiffusionPrior, MultiQueryDiffusionPriorConfig

CONFIG_NAME = "prior_config.json"
WEIGHTS_SUFFIXES = (".pth", ".pt")
CLIP_CONTEXT_LENGTH = 77  # of every CLIP that DALLE2-pytorch could load

# Schedules of noise, which are worked out again, and a CLIP that lay within the prior.
NOT_OURS = ("clip.", "noise_scheduler.")

TRANSFORMER = "net.causal_transformer."
LAYERS = f"{TRANSFORMER}layers."

Release = tuple[int, ...]


def is_checkpoint(path: Path) -> bool:
    """Whether a path may be one of DALLE2-pytorch's: a pickle, or a folder that holds one."""
    files = path.iterdir() if path.is_dir() else [path]
    return any(file.suffix in WEIGHTS_SUFFIXES for file in files)


def load_dalle2_pytorch_prior(
    path: str | Path, dtype: torch.dtype = torch.float32, *, version: str | None = None
) -> MultiQueryDiffusionPrior:
    """Read a prior from a checkpoint of DALLE2-pytorch 0.11 to 0.15 and 0.23.3 to 1.15.

    Sampling it with `sampler="ddpm"` and as many steps as training had is the original's own
    sampling; with fewer steps the original strides differently. Captions must be encoded with the
    start and end tokens of CLIP, as training did (`unclip.clip` does so); the original's tokenizer
    left them out when sampling. Of several candidates a prior keeps the one with the
    highest dot product with the text, the original the one with the highest cosine.

    Args:
        path: a `.pth` or `.pt` file, or a folder with one. A `prior_config.json` beside it is read;
            without it, what the weights do not tell is as DALLE2-pytorch has it by default: x_0
            is predicted, embeddings are scaled by sqrt(dim), samples keep their length. The
            weights' moving average is taken where there is one.
        dtype: of the network's weights.
        version: DALLE2-pytorch's, such as `1.0.2`, for a file that does not say. Weights that fit
            several versions mean something else in each.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: the file holds no such prior, does not fit its config or its version, or asks
            for more than tensors and the trainer's known classes.
    """
    weights, config_path = _find(Path(path))
    payload = _read(weights)
    state = _state(payload, weights)
    source = _Source(
        path=weights,
        tensors={k: v for k, v in state.items() if not k.startswith(NOT_OURS)},
        betas=state.get("noise_scheduler.betas"),
        release=_release(payload, version, weights),
        config=_read_config(config_path),
    )
    config = from_dict(
        MultiQueryDiffusionPriorConfig,
        {
            "network": _network(source),
            "diffusion": _diffusion(source),
            "unit_norm": source.flag("sampling_final_clamp_l2norm") and source.predicts_x_start,
        },
    )
    prior = unfilled(lambda: MultiQueryDiffusionPrior(config))
    renamed = {k: cast(k, v, dtype) for k, v in _renamed(source, prior).items()}
    fill(prior.network, renamed, weights)
    mean = torch.zeros(config.network.embed_dim)
    prior.set_statistics(mean, torch.full_like(mean, 1 / source.embed_scale))
    return prior.eval()


# ------------------------------------------------------------------------------------- reading


def _find(path: Path) -> tuple[Path, Path | None]:
    """The weights, and the config beside them if there is one."""
    weights = path
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in WEIGHTS_SUFFIXES)
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise FileNotFoundError(
                f"{path} must hold one .pth or .pt file; found {names}: pass the file itself"
            )
        weights = found[0]
    elif not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pass a .pth or .pt file, or its folder")
    config = weights.with_name(CONFIG_NAME)
    return weights, config if config.is_file() else None


class _Shell:
    """Stands in for an object of a class that is not wanted; keeps what it would be made of."""

    parts: tuple[Any, ...]
    state: Any

    def __new__(cls, *parts: Any) -> _Shell:  # unpickling does not call __init__
        shell = super().__new__(cls)
        shell.parts, shell.state = parts, None
        return shell

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _plain_dict(*factory: Any) -> dict[Any, Any]:
    """Stands in for `defaultdict`, which `weights_only` may make but not fill."""
    return {}


# What DALLE2-pytorch's tracker and trainer write beside tensors: the version, as a `Version` of
# several releases of packaging, and the warm-up scheduler with the optimizer it holds.
SHELLS = (
    "packaging.version.Version",
    "packaging.version._Version",
    "packaging._structures.InfinityType",
    "packaging._structures.NegativeInfinityType",
    "pytorch_warmup.base.LinearWarmup",
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
)
ALLOWED: list[Any] = [
    *((_Shell, name) for name in SHELLS),
    (_plain_dict, "collections.defaultdict"),  # the optimizer's state
    (dict, "builtins.dict"),
]


def _read(path: Path) -> Mapping[str, Any]:
    payload = load_pickle(path, ALLOWED)
    if not isinstance(payload, Mapping):
        raise ValueError(f"{path} must hold a dictionary; got a {type(payload).__name__}")
    return payload


def _state(payload: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The prior's state dict: of the moving average, of the model, or the file's own."""
    state = payload
    for key in ("ema_model", "model"):
        if isinstance(payload.get(key), Mapping):
            state = payload[key]
            break
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    if not any(name.startswith("net.") for name in tensors):
        names = ", ".join(map(str, list(state)[:5])) or "nothing"
        raise ValueError(
            f"{path} holds no diffusion prior of DALLE2-pytorch, whose weights start with 'net.'; "
            f"it starts with {names}: pass another file"
        )
    return tensors


def _release(payload: Mapping[str, Any], version: str | None, path: Path) -> Release | None:
    """The version that wrote the file, by the file or by the caller."""
    given = _parse(version) if version is not None else None
    written = payload.get("version")
    if isinstance(written, _Shell):
        found = _release_of(written)
    else:
        found = _parse(written) if isinstance(written, str) else None
    if given is not None and found is not None and given != found:
        raise ValueError(
            f"version must be that of {path}, {_dotted(found)}; got {version!r}: leave it out"
        )
    return found or given


def _parse(version: str) -> Release:
    digits = re.match(r"v?(\d+(?:\.\d+)+)", version)
    if digits is None:
        raise ValueError(f"version must be one of DALLE2-pytorch's, such as '1.0.2'; got {version}")
    return tuple(map(int, digits[1].split(".")))


def _release_of(shell: _Shell) -> Release | None:
    """The numbers in a pickled `packaging.version.Version`, which has had three forms."""
    state = shell.state
    match state:
        case {"_version": _Shell(parts=(_, release, *_))}:  # to 25
            pass
        case (None, {"_release": release}):  # 26.0
            pass
        case (_, release, _, _, _, _):  # 26.2
            pass
        case _:
            return None
    whole = isinstance(release, tuple) and all(isinstance(n, int) for n in release)
    return release if whole else None


def _read_config(path: Path | None) -> dict[str, Any]:
    """The section of `prior_config.json` that describes the prior, or nothing."""
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    config = config.get("prior", config) if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(config.get("net"), dict):
        raise ValueError(
            f"{path} must describe a prior and its 'net', as DALLE2-pytorch's training configs do; "
            "move it away to go by the weights alone"
        )
    return config


# ------------------------------------------------------------------------------------ the config


@dataclass
class _Source:
    """All that a checkpoint says of its prior."""

    path: Path
    tensors: dict[str, Tensor]
    betas: Tensor | None
    release: Release | None
    config: dict[str, Any]

    def __post_init__(self) -> None:
        # Up to 0.15 norms have a `gamma`, and a `beta` that stays zero; later ones a `g`.
        self.old_norms = any(name.endswith(".gamma") for name in self.tensors)
        plain = {}
        for name, tensor in self.tensors.items():
            if not (self.old_norms and name.endswith(".beta") and not tensor.any()):
                plain[re.sub(r"\.gamma$", ".g", name)] = tensor
        self.tensors = plain

    @property
    def net(self) -> dict[str, Any]:
        return self.config.get("net", {})

    @property
    def predicts_x_start(self) -> bool:
        return self.flag("predict_x_start", True)

    @property
    def embed_scale(self) -> float:
        return float(
            self.config.get("image_embed_scale") or self.shape("net.learned_query")[0] ** 0.5
        )

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.config.get(name, default))

    def shape(self, name: str) -> torch.Size:
        if name not in self.tensors:
            raise ValueError(
                f"{self.path} must hold {name}, as every prior of DALLE2-pytorch does: the file is "
                "cut short or holds something else; download it again"
            )
        return self.tensors[name].shape


def _network(source: _Source) -> dict[str, Any]:
    """The network's config: sizes from the weights, meanings from the version."""
    tensors, shape = source.tensors, source.shape
    layers = [re.match(rf"{re.escape(LAYERS)}(\d+)\.", name) for name in tensors]
    (D,) = shape("net.learned_query")
    _, K = shape(f"{LAYERS}0.0.null_kv")
    time_table = tensors.get("net.to_time_embeds.0.weight")
    time_mlp = tensors.get("net.to_time_embeds.0.1.net.2.weight")
    if time_table is None and time_mlp is None:
        shape("net.to_time_embeds.0.weight")
    text = tensors.get("net.to_text_embeds.0.weight")
    image = tensors.get("net.to_image_embeds.0.weight")
    config: dict[str, Any] = {
        "embed_dim": D,
        "depth": 1 + max(int(layer[1]) for layer in layers if layer),
        "num_heads": shape(f"{LAYERS}0.0.to_q.weight")[0] // K,
        "head_dim": K,
        "mlp_ratio": shape(f"{LAYERS}0.1.5.weight")[1] // D,
        "num_text_embed_tokens": 1 if text is None else len(text) // D,
        "num_image_embed_tokens": 1 if image is None else len(image) // D,
        "rotary": f"{LAYERS}0.0.rotary_emb.freqs" in tensors,
        "normformer": f"{LAYERS}0.1.3.g" in tensors,
        "norm_in": f"{TRANSFORMER}init_norm.g" in tensors,
        "project_out": f"{TRANSFORMER}project_out.weight" in tensors,
        "reads_text_encodings": source.flag("condition_on_text_encodings", True),
        "self_conditioning": bool(source.net.get("self_cond", False)),
        "attn_dropout": source.net.get("attn_dropout", 0.0),
        "mlp_dropout": source.net.get("ff_dropout", 0.0),
        **_meaning(source),
    }
    if time_table is not None:
        config |= {"num_timesteps": len(time_table), "num_time_tokens": time_table.shape[1] // D}
        config["time_tokens"] = "table"
    elif time_mlp is not None:
        config["num_time_tokens"] = len(time_mlp) // D
    if f"{TRANSFORMER}norm.g" not in tensors:
        config["norm_out"] = "none"
    if not _trained_null(source.config):
        config["null_condition"] = "absent"  # the weights may hold one, as it was drawn
    config["text_drop_prob"] = 0.0 if config["null_condition"] == "absent" else 0.1

    ours = {"dim": "embed_dim", "depth": "depth", "heads": "num_heads", "dim_head": "head_dim"}
    ours |= {"ff_mult": "mlp_ratio", "num_text_embeds": "num_text_embed_tokens"}
    ours |= {"num_time_embeds": "num_time_tokens", "num_image_embeds": "num_image_embed_tokens"}
    ours |= {"normformer": "normformer", "rotary_emb": "rotary", "norm_in": "norm_in"}
    ours |= {"final_proj": "project_out", "max_text_len": "max_text_len"}
    for name, field in ours.items():
        said = source.net.get(name)
        if said is not None and said != config[field]:
            raise ValueError(
                f"net.{name} in {CONFIG_NAME} must be that of {source.path}, {config[field]}; got "
                f"{said}: it belongs to another checkpoint"
            )
    return config


def _meaning(source: _Source) -> dict[str, Any]:
    """What the same weights mean in the version that wrote them."""
    release, tensors = source.release, source.tensors
    continuous = "net.to_time_embeds.0.weight" not in tensors
    learned = "net.null_image_embed" in tensors  # from 1.9.0 on
    name = "net.null_text_encodings" if learned else "net.null_text_embed"
    if source.old_norms:
        _check_release(source, (0, 11), (0, 16))
        # The caption's length is nowhere in these weights.
        max_text_len = source.net.get("max_text_len") or CLIP_CONTEXT_LENGTH
        time = {"time_tokens": "sinusoid"} if continuous else {}
        return {
            "similarity": "dot",
            "norm_out": "plain",
            "padding": "masked",
            "null_condition": "masked",
            "max_text_len": max_text_len,
            **time,
        }
    if release is None and (not learned or continuous):
        raise ValueError(
            f"{source.path} does not say which version of DALLE2-pytorch wrote it, and its weights "
            "mean something else in each: pass version (such as '1.0.2')"
        )
    meaning: dict[str, Any] = {"similarity": "cosine", "max_text_len": source.shape(name)[1]}
    if learned:
        _check_release(source, (1, 9), (2,))
        keeps = release is not None and release < (1, 10, 4)
        meaning["null_condition"] = "keeps_text_embed" if keeps else "learned"
    else:
        _check_release(source, (0, 23, 3), (1, 9))
        meaning["null_condition"] = "absent"
        assert release is not None
        if release < (1, 4, 3):
            meaning |= {"similarity": "dot", "position_bias_scale": 128.0}
    if continuous:
        assert release is not None
        truncated = release < (1, 10, 9)
        meaning["time_tokens"] = "truncated_sinusoid" if truncated else "sinusoid"
    if source.net.get("self_cond") and release is not None and release < (1, 12, 1):
        raise ValueError(
            f"net.self_cond in {CONFIG_NAME} must be false for {source.path}, which is of "
            f"{_dotted(release)}: before 1.12.1 it put the final token out of the sequence"
        )
    return meaning


def _trained_null(config: Mapping[str, Any]) -> bool:
    """Whether training ever dropped text and image; where the config is not there, it did."""
    drop_prob = config.get("cond_drop_prob", 0.0 if config else 0.1)
    own = [config.get(f"{part}_cond_drop_prob") for part in ("text", "image")]
    return all(drop_prob if prob is None else prob for prob in own)


def _check_release(source: _Source, first: Release, end: Release) -> None:
    if source.release is not None and not first <= source.release < end:
        raise ValueError(
            f"the weights in {source.path} are those of DALLE2-pytorch {_dotted(first)} up to, "
            f"without, {_dotted(end)}; got version {_dotted(source.release)}: that version "
            "is not supported, or the wrong one was passed"
        )


def _dotted(release: Release) -> str:
    return ".".join(map(str, release))


def _diffusion(source: _Source) -> dict[str, Any]:
    """The diffusion's config; the schedule is checked against the file's own where it has one."""
    config = source.config
    table = source.tensors.get("net.to_time_embeds.0.weight")
    steps = 1000 if table is None else len(table)
    if source.betas is not None:
        steps = len(source.betas)
    steps = config.get("timesteps") or steps
    # The original's betas, but for a linear schedule below 21 steps: some of those are above 1.
    fits = {
        name: make_scheduler(
            from_dict(DiffusionConfig, {"num_train_timesteps": steps, "beta_schedule": name})
        ).betas.double()
        for name in get_args(BetaSchedule)
    }
    if source.betas is not None:
        betas = source.betas.double()
        fits = {
            name: made
            for name, made in fits.items()
            if made.shape == betas.shape and torch.allclose(made, betas, rtol=1e-4, atol=1e-6)
        }
    schedule = config.get("beta_schedule", next(iter(fits), "cosine"))
    if schedule not in fits:
        raise ValueError(
            f"the noise schedule of {source.path} must be 'cosine' or 'linear' and fit its weights;"
            f" got {schedule!r} over {steps} timesteps: it cannot be sampled here"
        )
    if source.flag("init_image_embed_l2norm"):
        raise ValueError(
            f"init_image_embed_l2norm in {CONFIG_NAME} must be false; got true: training does not "
            "depend on it, so set it to false to sample from plain Gaussian noise"
        )
    prediction = "v" if source.flag("predict_v") else "x_0" if source.predicts_x_start else "eps"
    on_sphere = source.predicts_x_start and source.flag("sampling_clamp_l2norm")
    return {
        "num_train_timesteps": steps,
        "beta_schedule": schedule,
        "prediction_type": prediction,
        # The original clamps x_0 as if it were an image, embeddings scaled or not.
        "clip_range": None if source.predicts_x_start else 1.0,
        "x_0_norm": source.embed_scale if on_sphere else None,
    }


# ----------------------------------------------------------------------------------- the weights


def _names(config: MultiQueryDiffusionPriorConfig, old_nulls: bool) -> dict[str, str]:
    """Our name of every weight -> theirs."""
    c = config.network
    names = {"final_token": "net.learned_query"}
    names["position_bias.weight"] = f"{TRANSFORMER}rel_pos_bias.relative_attention_bias.weight"
    if c.padding == "learned":
        names["null_text_encodings"] = (
            "net.null_text_embed" if old_nulls else "net.null_text_encodings"
        )
    if c.null_condition == "learned":
        names["null_text_embed"] = "net.null_text_embeds"
    if c.null_condition in ("learned", "keeps_text_embed"):
        names["null_image_embed"] = "net.null_image_embed"
    linear = {"text_embed_in": c.num_text_embed_tokens, "image_embed_in": c.num_image_embed_tokens}
    for name, count in linear.items():
        if count > 1:
            for kind in ("weight", "bias"):
                names[f"{name}.{kind}"] = f"net.to_{name.removesuffix('_in')}s.0.{kind}"
    if c.time_tokens == "table":
        names["time_embed.weight"] = "net.to_time_embeds.0.weight"
    else:
        for place, theirs in ((0, "0.0"), (2, "1.0"), (4, "2")):
            for kind in ("weight", "bias"):
                names[f"time_embed.{place}.{kind}"] = f"net.to_time_embeds.0.1.net.{theirs}.{kind}"
    if c.norm_in:
        names["norm_in.weight"] = f"{TRANSFORMER}init_norm.g"
    if c.norm_out != "none":
        names["norm_out.weight"] = f"{TRANSFORMER}norm.g"
    if c.project_out:
        names["out.weight"] = f"{TRANSFORMER}project_out.weight"
    block = {"null_kv": "0.null_kv", "norm1.weight": "0.norm.g", "to_q.weight": "0.to_q.weight"}
    block |= {"to_kv.weight": "0.to_kv.weight", "proj.weight": "0.to_out.0.weight"}
    block |= {"norm_attn.weight": "0.to_out.1.g", "norm2.weight": "1.0.g"}
    block |= {"mlp_in.weight": "1.1.weight", "mlp_out.weight": "1.5.weight"}
    if c.normformer:
        block["norm_mlp.weight"] = "1.3.g"
    for layer in range(c.depth):
        names |= {f"blocks.{layer}.{ours}": f"{LAYERS}{layer}.{k}" for ours, k in block.items()}
    return names


def _renamed(source: _Source, prior: MultiQueryDiffusionPrior) -> dict[str, Tensor]:
    """The network's state dict; raises ValueError unless every weight has its place and shape."""
    config = prior.config
    assert isinstance(config, MultiQueryDiffusionPriorConfig)
    names = _names(config, "net.null_image_embed" not in source.tensors)
    left = dict(source.tensors)
    for name in [name for name in left if name.endswith("rotary_emb.freqs")]:
        R = 2 * len(left[name])
        if not torch.allclose(left.pop(name), 10_000.0 ** -(torch.arange(0, R, 2) / R)):
            raise ValueError(
                f"{name} of {source.path} must be as DALLE2-pytorch sets it, not learned"
            )
    if config.network.null_condition != "learned":
        left.pop("net.null_text_embeds", None)  # never used, or never trained
    if config.network.null_condition == "absent":
        left.pop("net.null_image_embed", None)

    problems: dict[str, list[str]] = {"missing": [], "of another shape": []}
    renamed = {}
    for ours, theirs in names.items():
        expected = prior.network.get_parameter(ours).shape
        if theirs not in left:
            problems["missing"].append(theirs)
            continue
        tensor = left.pop(theirs)
        if tensor.shape == (1, *expected):  # a null carries a batch of one
            tensor = tensor[0]
        if tensor.shape != expected:
            problems["of another shape"].append(
                f"{theirs} ({list(tensor.shape)} for {list(expected)})"
            )
        renamed[ours] = tensor
    problems["unknown"] = list(left)
    said = [
        f"{len(found)} {what}: {', '.join(found[:5])}" for what, found in problems.items() if found
    ]
    if said:
        raise ValueError(
            f"the weights in {source.path} are not a whole prior of DALLE2-pytorch: "
            f"{'; '.join(said)}. The file is cut short, or of a version that is not supported"
        )
    return renamed
