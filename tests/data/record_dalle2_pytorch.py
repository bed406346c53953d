"""How dalle2_pytorch_<version>.safetensors beside this file were made: by DALLE2-pytorch itself.

    pip install --no-deps --target ORIGINAL dalle2-pytorch==<version>
    pip install --no-deps --target ORIGINAL einops-exts==0.0.4 rotary-embedding-torch==0.1.5
    python tests/data/record_dalle2_pytorch.py ORIGINAL

torch and einops come from the environment. What the package imports besides has no part in its
prior (CLIPs, the VQGAN, augmentations) and is replaced by stand-ins. The files that are here were
recorded with torch 2.15 on a CPU.

Each file holds some cases, `<case>/...`: a tiny prior with random numbers in every parameter, its
state dict under `state.`, inputs, and what the original made of them. The metadata has the version
and the arguments of each case's two constructors, as `prior_config.json` would.
"""

import importlib
import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from torch import Tensor

BATCH, TEXT_TOKENS = 3, 6
LENGTHS = [6, 4, 1]  # of the captions
GUIDANCE_SCALE = 1.5
STAND_INS = ("kornia", "kornia.filters", "kornia.augmentation", "x_clip", "coca_pytorch")
STAND_INS += ("resize_right", "dalle2_pytorch.tokenizer", "dalle2_pytorch.vqgan_vae")

# As LAION's releases, but for the sizes; a head wider than the rotary part.
RELEASED_NET = {
    "dim": 24,
    "depth": 2,
    "num_timesteps": 8,
    "max_text_len": 8,
    "dim_head": 36,
    "heads": 2,
    "ff_mult": 2,
    "normformer": True,
}
RELEASED_PRIOR = {"image_embed_dim": 24, "timesteps": 8, "cond_drop_prob": 0.1}
# All that can be otherwise.
OTHER_NET = {
    "dim": 16,
    "depth": 2,
    "max_text_len": 6,
    "num_time_embeds": 2,
    "num_image_embeds": 3,
    "num_text_embeds": 2,
    "dim_head": 8,
    "heads": 3,
    "ff_mult": 1,
    "norm_in": True,
    "norm_out": False,
    "final_proj": False,
    "rotary_emb": False,
}
OTHER_PRIOR = {
    "image_embed_dim": 16,
    "timesteps": 24,  # the linear schedule needs 21
    "cond_drop_prob": 0.1,
    "sampling_clamp_l2norm": True,
    "sampling_final_clamp_l2norm": True,
    "beta_schedule": "linear",
}
# What only later versions have.
SMALL_NET = {"dim": 16, "depth": 1, "max_text_len": 6, "dim_head": 8, "heads": 2, "ff_mult": 1}
NEWEST_CASES = {
    "self_cond": (SMALL_NET | {"num_timesteps": 24, "self_cond": True}, OTHER_PRIOR),
    "v": (SMALL_NET, {**OTHER_PRIOR, "predict_v": True, "sampling_clamp_l2norm": False}),
    # Long enough for every bucket of the relative position bias.
    "eps": (SMALL_NET | {"max_text_len": 150}, {**OTHER_PRIOR, "predict_x_start": False}),
}


def load_original(folder: Path) -> Any:
    """The package's module with the prior, without running its `__init__`."""
    sys.path.insert(0, str(folder))
    for name in STAND_INS:
        sys.modules[name] = MagicMock()
    package = types.ModuleType("dalle2_pytorch")
    package.__path__ = [str(folder / "dalle2_pytorch")]
    sys.modules["dalle2_pytorch"] = package
    return importlib.import_module("dalle2_pytorch.dalle2_pytorch")


def known(function: Any, arguments: dict[str, Any], *more: Any) -> dict[str, Any]:
    """The arguments that this version of `function` (or those it passes them on to) takes."""
    names = {name for f in (function, *more) for name in inspect.signature(f).parameters}
    return {name: value for name, value in arguments.items() if name in names}


@torch.no_grad()
def randomise(module: torch.nn.Module, bias_scale: float) -> None:
    """Random numbers in every parameter: what starts at one or zero would hide errors."""
    for name, parameter in module.named_parameters():
        if name.endswith((".g", ".gamma")):
            parameter.normal_(1.0, 0.2)
        elif "relative_attention_bias" in name:
            parameter.normal_(0.0, 1 / bias_scale)
        elif parameter.dim() == 2 and "null" not in name and name != "to_time_embeds.0.weight":
            parameter.normal_(0.0, parameter.shape[1] ** -0.5)
        else:
            parameter.normal_()


class RecordedNoise:
    """Stands in for torch while the original samples, and keeps what it draws."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randn(self, *args: Any, **options: Any) -> Tensor:
        self.drawn.append(torch.randn(*args, **options))
        return self.drawn[-1]

    def randn_like(self, x: Tensor) -> Tensor:
        return self.randn(x.shape)


@torch.no_grad()
def record(
    original: Any, net: dict[str, Any], prior: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of one case, and the arguments that made it."""
    net = known(original.DiffusionPriorNetwork, net, original.CausalTransformer)
    prior = known(original.DiffusionPrior, prior)
    network = original.DiffusionPriorNetwork(**net)
    module = original.DiffusionPrior(net=network, clip=None, **prior).eval()
    relaxed = "pb_relax_alpha" in inspect.signature(original.Attention).parameters
    randomise(network, bias_scale=128.0 if relaxed else 1.0)

    mask = torch.arange(TEXT_TOKENS)[None] < torch.tensor(LENGTHS)[:, None]
    embed = torch.nn.functional.normalize(torch.randn(BATCH, net["dim"]), dim=-1)
    encodings = torch.randn(BATCH, TEXT_TOKENS, net["dim"])
    takes_mask = "mask" in inspect.signature(network.forward).parameters
    condition = {"text_embed": embed}
    if takes_mask:
        # 0.15 clears the mask it is given in its unconditional pass, for all later steps: a defect
        # that guidance is better recorded without.
        forward = network.forward
        network.forward = lambda *a, mask, **options: forward(*a, mask=mask.clone(), **options)
        condition |= {"text_encodings": encodings, "mask": mask}
    else:
        condition |= {"text_encodings": encodings * mask[..., None]}
    x_t, timesteps = torch.randn(BATCH, net["dim"]), torch.tensor([0, 3, prior["timesteps"] - 1])
    self_cond = torch.randn(BATCH, net["dim"]) if net.get("self_cond") else None

    def call(**options: Any) -> Tensor:
        last = {} if self_cond is None else {"self_cond": self_cond}
        return network.forward_with_cond_scale(x_t, timesteps, **condition, **last, **options)

    drops = ("cond_drop_prob", "text_cond_drop_prob", "image_cond_drop_prob")
    drops = known(original.DiffusionPriorNetwork.forward, dict.fromkeys(drops, 1.0))
    tensors = {f"state.{name}": tensor for name, tensor in module.state_dict().items()}
    tensors |= {"text_embed": embed, "text_encodings": encodings, "text_mask": mask}
    tensors |= {"x_t": x_t, "timesteps": timesteps, "output": call()}
    tensors |= {"output_null": call(**drops), "output_guided": call(cond_scale=GUIDANCE_SCALE)}
    if self_cond is not None:
        tensors |= {"self_cond": self_cond}
    tensors |= {"alpha_bars": module.noise_scheduler.alphas_cumprod}

    # Before 1.6.5 the loop's result still has the scale of the network.
    unscaled = "/= self.image_embed_scale" in inspect.getsource(original.DiffusionPrior)
    for name, scale in (("sample", 1.0), ("sample_guided", GUIDANCE_SCALE)):
        original.torch = noise = RecordedNoise()
        drawn = module.p_sample_loop((BATCH, net["dim"]), text_cond=condition, cond_scale=scale)
        original.torch = torch
        tensors[name] = drawn / module.image_embed_scale if unscaled else drawn
        tensors[f"{name}_noise"] = torch.stack(noise.drawn)
    return tensors, {"prior": {**prior, "net": net}}


def main() -> None:
    folder = Path(sys.argv[1])
    original = load_original(folder)
    version = importlib.import_module("dalle2_pytorch.version").__version__
    torch.manual_seed(0)
    cases = {"released": (RELEASED_NET, RELEASED_PRIOR), "other": (OTHER_NET, OTHER_PRIOR)}
    if "predict_v" in inspect.signature(original.DiffusionPrior).parameters:
        cases |= NEWEST_CASES
    tensors, configs = {}, {}
    for case, (net, prior) in cases.items():
        recorded, configs[case] = record(original, net, prior)
        tensors |= {f"{case}/{name}": value.contiguous() for name, value in recorded.items()}
    metadata = {"version": version, "cases": json.dumps(configs)}
    path = Path(__file__).with_name(f"dalle2_pytorch_{version}.safetensors")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    print(f"{path.name}: {path.stat().st_size} bytes, cases {', '.join(cases)}")


if __name__ == "__main__":
    main()
