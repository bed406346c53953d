"""The sampling loop, one for prior vectors and decoder images, and its way back to the noise.

Legend: B batch, ... data dimensions ([D] or [C, H, W]).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm.auto import tqdm

from unclip.diffusion.analytic import variance_fraction
from unclip.diffusion.guidance import (
    UNLIMITED,
    Context,
    GuidanceLimits,
    Network,
    check_guidance_scale,
    guided,
)
from unclip.diffusion.objective import NoiseSchedule
from unclip.diffusion.resampling import Resampling, renoise
from unclip.diffusion.schedule import DiffusionConfig, make_scheduler, sampling_timesteps


@torch.no_grad()
def sample(
    network: Network,
    schedule_config: DiffusionConfig,
    shape: Sequence[int],
    *,
    context: Context,
    null_context: Context | None = None,
    guidance_scale: float = 1.0,
    guidance_limits: GuidanceLimits = UNLIMITED,
    sampler: str = "ddim",
    num_inference_steps: int = 50,
    eta: float = 0.0,
    generators: Sequence[torch.Generator],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    x_T: Tensor | None = None,
    constrain: Callable[[Tensor], Tensor] | None = None,
    resampling: Resampling | None = None,
    progress: str | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Draw x_0 from noise.

    Each step turns the guided network output into an estimate of x_0, clamps it, and hands it to
    a diffusers scheduler; the scheduler's arithmetic is fp32 whatever the network runs in.

    Args:
        network: `network(x_t, timesteps, context)`; sees x_t in `dtype` and timesteps [B].
        schedule_config: the config that the network was trained with.
        shape: of the result, [B, D] or [B, C, H, W].
        context: the condition, batch B.
        null_context: the absent condition, for guidance; see `guided`.
        guidance_scale: 0 or more; 1 is off.
        guidance_limits: what keeps it from overdoing it.
        sampler: one of `SAMPLERS`. Only `ddpm` uses a learned variance; the others drop it.
            `analytic` is `ddpm` with the variance that suits the network best, for configs that
            have an `eps_power`.
        num_inference_steps: 1 .. num_train_timesteps.
        eta: noise of a `ddim` step, from 0 (none) to 1 (as much as DDPM's).
        generators: one a sample. All noise of sample k comes from generator k, so it is the same
            alone and in a batch; CPU generators make it the same on every device.
        device: where to sample; by default where x_T or the context lies.
        x_T: starting noise [B, ...]; by default drawn from the generators.
        constrain: applied to each step's estimate of x_0 after the clamp, to hold what is known.
        resampling: how often to go back up the chain, so that what is drawn comes to fit what
            `constrain` holds; for `ddpm` and `ddim`. None: straight down.
        progress: text of a progress bar; None shows none.
        callback: called each step as `callback(step, timestep, x_t, x_0)` with the step's input
            and the clamped estimate of x_0.

    Returns:
        x_0, fp32 [B, ...].

    Raises:
        ValueError: an argument is out of its range, or the counts of `shape`, `generators` and
            `x_T` differ.
    """
    check_guidance_scale(guidance_scale)
    _check_eta(eta, sampler)
    if len(generators) != shape[0]:
        raise ValueError(
            "generators must hold one generator a sample; "
            f"got {len(generators)} for a batch of {shape[0]}: "
            f"use make_generators(seed, {shape[0]})"
        )
    if x_T is not None and x_T.shape != tuple(shape):
        raise ValueError(
            f"x_T must have the shape of the result; got {list(x_T.shape)} for {list(shape)}: "
            "pass x_T=None to draw it"
        )
    device = torch.device(device) if device is not None else _device_of(x_T, *context.values())
    rngs = list(generators)

    schedule = NoiseSchedule(schedule_config)
    timesteps = sampling_timesteps(schedule_config, num_inference_steps)
    # The scheduler is always told x_0, so that the clamped estimate needs no way back into eps or
    # v, which at the noisy end would divide by alpha = 5e-5.
    scheduler = make_scheduler(replace(schedule_config, prediction_type="x_0"), sampler, timesteps)
    analytic = None
    if sampler == "analytic":
        assert schedule_config.eps_power is not None  # make_scheduler has seen to it
        analytic = variance_fraction(
            scheduler.alphas_cumprod,
            timesteps[::-1],
            schedule_config.eps_power,
            schedule_config.num_train_timesteps,
        )
    step_options: dict[str, Any] = {} if sampler == "unipc" else {"generator": rngs}
    if sampler == "ddim":
        step_options["eta"] = eta

    if x_T is None:
        x_T = randn_tensor(tuple(shape), generator=rngs, device=device, dtype=torch.float32)
    x_t = x_T.to(device, torch.float32)

    # Places on the scheduler's chain, which counts down to 0 and calls x_0 itself -1.
    places = list(range(num_inference_steps))[::-1]
    if resampling is not None:
        _check_resampling(sampler)
        places = resampling.places(num_inference_steps)
    bar = tqdm(pairwise([*places, -1]), desc=progress, total=len(places), disable=progress is None)
    for step, (place, next_place) in enumerate(bar):
        timestep = timesteps[num_inference_steps - 1 - place]
        x_0, variance = _estimate_x_0(
            network,
            schedule,
            x_t,
            timestep,
            context,
            null_context,
            guidance_scale,
            dtype,
            guidance_limits,
        )
        if constrain is not None:
            x_0 = constrain(x_0)
        if callback is not None:
            callback(step, timestep, x_t, x_0)

        estimate = x_0
        if analytic is not None:
            variance = torch.full_like(x_0, analytic[place].item())
        if variance is not None and sampler in ("ddpm", "analytic"):
            estimate = torch.cat([x_0, variance.float()], dim=1)
        x_t = scheduler.step(estimate, place, x_t, **step_options).prev_sample
        if next_place >= place:
            x_t = renoise(x_t, scheduler.alphas_cumprod, place - 1, next_place, rngs)
    return x_t


@torch.no_grad()
def invert(
    network: Network,
    schedule_config: DiffusionConfig,
    x_0: Tensor,
    *,
    context: Context,
    null_context: Context | None = None,
    guidance_scale: float = 1.0,
    guidance_limits: GuidanceLimits = UNLIMITED,
    num_inference_steps: int = 50,
    num_iterations: int = 1,
    dtype: torch.dtype = torch.float32,
    progress: str | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """The noise x_T from which `sample` by `ddim` with eta 0 leads back to x_0 (Song et al. 2021,
    section 4.3; Dhariwal & Nichol 2021, appendix F), by the same timesteps the other way round.

    A step of DDIM from x_t needs eps(x_t, t), which on the way up is not known before x_t is.
    Inversion takes eps(x_{t-1}, t) for it, where x_{t-1} is the sample one step below; further
    iterations take eps of the x_t found so far, and converge on the exact inverse where steps are
    small (Pan et al. 2023, section 3.1).

    Args:
        network, schedule_config, context, null_context, guidance_scale, guidance_limits, dtype,
            progress, callback: as `sample` has them.
        x_0: clean samples [B, ...].
        num_inference_steps: 1 .. num_train_timesteps; of both ways.
        num_iterations: network evaluations of a step, at least 1.

    Returns:
        x_T, fp32 [B, ...].

    Raises:
        ValueError: an argument is out of its range.
    """
    check_guidance_scale(guidance_scale)
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1; got {num_iterations}: use 1")
    schedule = NoiseSchedule(schedule_config)
    timesteps = sampling_timesteps(schedule_config, num_inference_steps)
    scheduler = make_scheduler(
        replace(schedule_config, prediction_type="eps"), "ddim_inverse", timesteps
    )
    below = x_0.float()  # the sample one step below x_t; at first the clean one
    bar = tqdm(timesteps[::-1], desc=progress, disable=progress is None)
    for place, timestep in enumerate(bar):
        x_t = below
        t = torch.full((len(x_t),), timestep, device=x_t.device)
        for _ in range(num_iterations):
            estimate, _ = _estimate_x_0(
                network,
                schedule,
                x_t,
                timestep,
                context,
                null_context,
                guidance_scale,
                dtype,
                guidance_limits,
            )
            eps = schedule.eps_of(x_t, estimate, t)
            x_t = scheduler.step(eps, place, below).prev_sample
        if callback is not None:
            callback(place, timestep, below, estimate)
        below = x_t
    return below


def _estimate_x_0(
    network: Network,
    schedule: NoiseSchedule,
    x_t: Tensor,
    timestep: int,
    context: Context,
    null_context: Context | None,
    guidance_scale: float,
    dtype: torch.dtype,
    limits: GuidanceLimits = UNLIMITED,
) -> tuple[Tensor, Tensor | None]:
    """The guided network's x_0, within the config's range, and the variance half or None."""
    config = schedule.config
    t = torch.full((len(x_t),), timestep, device=x_t.device)
    model_output = guided(
        network,
        x_t.to(dtype),
        t,
        context,
        null_context,
        limits.scale_at(guidance_scale, timestep / config.num_train_timesteps),
        learned_variance=config.variance == "learned_range",
        rescale=limits.rescale,
    )
    prediction, variance = schedule.split_output(model_output, x_t)
    x_0 = schedule.predict_x_0(x_t, prediction, t)
    if config.clip_range is not None:
        x_0 = limits.clamp(x_0, config.clip_range)
    if config.x_0_norm is not None:
        x_0 = F.normalize(x_0.flatten(1), dim=1).view_as(x_0) * config.x_0_norm
    return x_0, variance


def make_generators(seed: int, count: int) -> list[torch.Generator]:
    """`count` CPU generators; the k-th depends on (seed, k) alone: picture k of a seed is stable.

    Torch's CPU generator keeps 32 bits of its seed. Generator k is seeded with hash(seed) + k
    modulo 2^32: within a seed no two are alike, and neighbouring seeds share no pictures, as they
    would with seed + k.

    Raises:
        ValueError: `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count must not be negative; got {count}: use the number of samples")
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
    return [torch.Generator("cpu").manual_seed((start + k) % 2**32) for k in range(count)]


def _check_eta(eta: float, sampler: str) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1; got {eta}: use 0 for no added noise")
    if eta != 0 and sampler != "ddim":
        raise ValueError(
            f"eta must be 0 unless sampler is 'ddim'; got {eta} with {sampler!r}: "
            "leave eta out or use sampler='ddim'"
        )


def _check_resampling(sampler: str) -> None:
    if sampler not in ("ddpm", "ddim"):
        raise ValueError(
            f"sampler must be 'ddpm' or 'ddim' for resampling; got {sampler!r}, whose steps "
            "remember the ones before: use 'ddim'"
        )


def _device_of(*tensors: Tensor | None) -> torch.device:
    return next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))
