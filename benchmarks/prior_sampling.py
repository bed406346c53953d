"""Milliseconds a prior's sample takes, here and in diffusers, with the same weights in one run.

    python benchmarks/prior_sampling.py [--width 512] [--depth 6] [--tokens 77] [--batch 4]

diffusers' PriorTransformer runs the whole sequence at each step; here the caption's keys and values
are computed once, with and without the caption, and each step runs three tokens. Both draw 25 steps
with guidance from the same noise: diffusers by its UnCLIPScheduler, here by the `ddpm` sampler with
the same noise at each step, so that the answers can be held against each other.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from diffusers import PriorTransformer as TheirTransformer
from diffusers import UnCLIPScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from unclip.clip import Text
from unclip.diffusion import DiffusionConfig, alpha_bars, make_generators
from unclip.hub.diffusers_format import prior_to_diffusers
from unclip.models import PriorTransformerConfig
from unclip.priors import DiffusionPrior, DiffusionPriorConfig
from unclip.priors.base import split

STEPS, GUIDANCE = 25, 4.0


def theirs(
    network: Any,
    text: Text,
    empty: Text,
    generators: list[torch.Generator],
    alpha_bar: Tensor | None = None,
) -> Tensor:
    """diffusers' sampling of normalised embeddings, as its Karlo pipeline does it."""
    scheduler = UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=False
    )
    if alpha_bar is not None:
        scheduler.alphas_cumprod = alpha_bar
    scheduler.set_timesteps(STEPS)
    generators = split(generators, 1)  # as a prior here does it
    both = [torch.cat([none.expand_as(one), one]) for none, one in zip(empty, text, strict=True)]
    x_t = randn_tensor(text.text_embed.shape, generator=generators)
    for step, t in enumerate(scheduler.timesteps):
        out = network(
            torch.cat([x_t, x_t]),
            timestep=t,
            proj_embedding=both[0],
            encoder_hidden_states=both[1],
            attention_mask=both[2],
        ).predicted_image_embedding
        uncond, cond = out.chunk(2)
        following = None
        if step + 1 < len(scheduler.timesteps):
            following = scheduler.timesteps[step + 1]
        x_t = scheduler.step(
            uncond + GUIDANCE * (cond - uncond),
            timestep=t,
            sample=x_t,
            generator=generators,
            prev_timestep=following,
        ).prev_sample
    return x_t


def main() -> None:
    """Build both, hold them together, time them in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 512), ("depth", 6), ("tokens", 77), ("batch", 4), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cpu-time", action="store_true", help="count processor time alone")
    a = parser.parse_args()
    clock = time.process_time if a.cpu_time else time.perf_counter
    torch.manual_seed(0)
    dim = 768
    network = PriorTransformerConfig(
        embed_dim=dim,
        text_encodings_dim=dim,
        max_text_len=a.tokens,
        width=a.width,
        depth=a.depth,
        null_text="empty_prompt",
    )
    diffusion = DiffusionConfig(prediction_type="x_0", clip_range=None, timestep_spacing="linspace")
    prior = DiffusionPrior(
        DiffusionPriorConfig(network=network, diffusion=diffusion, unit_norm=False)
    ).eval()
    prior.set_statistics(torch.zeros(dim), torch.ones(dim))
    for parameter in prior.network.parameters():  # a fresh network answers nothing to anything
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    their = TheirTransformer(
        num_attention_heads=a.width // network.head_dim,
        attention_head_dim=network.head_dim,
        num_layers=a.depth,
        embedding_dim=dim,
        num_embeddings=a.tokens,
    ).eval()
    weights = prior_to_diffusers(dict(prior.network.state_dict()), network)
    missing = their.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"clip_mean", "clip_std"}, missing
    lengths = torch.randint(5, a.tokens + 1, (a.batch, 1))
    mask = torch.arange(a.tokens)[None] < lengths
    text = Text(torch.randn(a.batch, dim), torch.randn(a.batch, a.tokens, dim), mask)
    empty = Text(torch.randn(1, dim), torch.randn(1, a.tokens, dim), mask[:1])

    def run_theirs() -> Tensor:
        return theirs(their, text, empty, make_generators(0, a.batch))

    def run_ours() -> Tensor:
        return prior.sample(
            text,
            generators=make_generators(0, a.batch),
            empty=empty,
            guidance_scale=GUIDANCE,
            num_candidates=1,
            num_inference_steps=STEPS,
        )

    with torch.no_grad():
        drawn, scale = run_ours(), run_ours().abs().max().item()
        error = (drawn - run_theirs()).abs().max().item()
        alpha_bar = alpha_bars(diffusion)
        same = theirs(their, text, empty, make_generators(0, a.batch), alpha_bar)
        error_64 = (drawn - same).abs().max().item()
        seconds: dict[str, list[float]] = {"ours": [], "diffusers": []}
        for _ in range(a.runs):
            for name, run in (("ours", run_ours), ("diffusers", run_theirs)):
                began = clock()
                run()
                seconds[name].append(clock() - began)
    best = {name: min(values) for name, values in seconds.items()}
    for name, value in best.items():
        print(f"{name:>9}: {1000 * value / a.batch:.1f} ms a sample (best of {a.runs})")
    print(f"ratio {best['diffusers'] / best['ours']:.1f}")
    print(
        f"largest difference {error:.1e} of {scale:.1f}; with its alpha_bar, which diffusers "
        f"multiplies up in fp32, replaced by that of fp64: {error_64:.1e}"
    )


if __name__ == "__main__":
    main()
