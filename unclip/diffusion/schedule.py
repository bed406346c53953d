"""The noise schedule: one config, and the diffusers scheduler that every user of it shares.

Legend: T training timesteps, N inference steps.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

BetaSchedule = Literal["cosine", "linear"]
PredictionType = Literal["eps", "x_0", "v"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]
Weighting = Literal["uniform", "min_snr"]
TimestepSpacing = Literal["trailing", "linspace", "fast27"]

SAMPLERS = ("ddpm", "ddim", "dpm++", "dpm++sde", "unipc", "euler", "analytic")
INVERSE = "ddim_inverse"


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What a diffusion model was trained with; its checkpoint cannot be sampled without it."""

    num_train_timesteps: int = 1000
    """Length T of the chain."""

    beta_schedule: BetaSchedule = "cosine"
    """`cosine` (Nichol & Dhariwal 2021) or `linear` (Ho et al. 2020, stretched to T steps)."""

    prediction_type: PredictionType = "x_0"
    """What the network outputs: the noise, the clean sample, or v (Salimans & Ho 2022)."""

    variance: Variance = "fixed_small"
    """Variance of a `ddpm` step. `learned_range`: the network outputs 2C channels and the second
    half interpolates between the log of the small and of the large variance, from -1 to 1."""

    weighting: Weighting = "uniform"
    """Loss weight over timesteps; `min_snr` is Hang et al. 2023."""

    min_snr_gamma: float = 5.0
    """Signal-to-noise ratio above which `min_snr` stops giving a timestep more weight."""

    vlb_weight: float = 0.001
    """Weight of the variational bound, in bits per dimension summed over the T steps, beside the
    MSE (`learned_range` only): the lambda of Nichol & Dhariwal 2021, eq. 16."""

    clip_range: float | None = 1.0
    """The x_0 estimate is clamped to +- this at each sampling step; None leaves it free. 1 suits
    images in [-1, 1], not scaled embeddings."""

    x_0_norm: float | None = None
    """The x_0 estimate is scaled to this length at each sampling step; None leaves it as it is. For
    embeddings on a sphere: what `clip_range` is to images."""

    timestep_spacing: TimestepSpacing = "trailing"
    """Which N of the T timesteps sampling visits. `trailing`: a stride down from T - 1. `linspace`:
    both ends included, as Karlo's and GLIDE's published samplers do. `fast27`: at 27 steps those
    that GLIDE found for its upsampler, more of them at the clean end; at any other number
    `linspace`."""

    eps_power: tuple[float, ...] | None = None
    """Mean square of the network's noise estimate at evenly spaced timesteps from 0 to T - 1, which
    the `analytic` sampler needs; `python -m unclip.training.analytic` measures it."""

    def __post_init__(self) -> None:
        if self.eps_power is not None and (
            len(self.eps_power) < 2 or not all(0 <= power <= 1 for power in self.eps_power)
        ):
            raise ValueError(
                "diffusion.eps_power must be two or more numbers from 0 to 1; got "
                f"{list(self.eps_power)}: measure it, or use null"
            )
        _check_choice("diffusion.beta_schedule", self.beta_schedule, get_args(BetaSchedule))
        _check_choice("diffusion.prediction_type", self.prediction_type, get_args(PredictionType))
        _check_choice("diffusion.variance", self.variance, get_args(Variance))
        _check_choice("diffusion.weighting", self.weighting, get_args(Weighting))
        _check_choice(
            "diffusion.timestep_spacing", self.timestep_spacing, get_args(TimestepSpacing)
        )
        if self.num_train_timesteps < 2:
            raise ValueError(
                "diffusion.num_train_timesteps must be at least 2; "
                f"got {self.num_train_timesteps}: use 1000, the paper's value"
            )
        if not self.min_snr_gamma > 0:
            raise ValueError(
                "diffusion.min_snr_gamma must be positive; "
                f"got {self.min_snr_gamma}: use 5, the published value"
            )
        if not self.vlb_weight >= 0:
            raise ValueError(
                "diffusion.vlb_weight must not be negative; "
                f"got {self.vlb_weight}: use 0.001, the published value"
            )
        if self.clip_range is not None and not self.clip_range > 0:
            raise ValueError(
                "diffusion.clip_range must be positive or null; "
                f"got {self.clip_range}: use null to leave x_0 unclamped"
            )
        if self.x_0_norm is not None and not self.x_0_norm > 0:
            raise ValueError(
                "diffusion.x_0_norm must be positive or null; "
                f"got {self.x_0_norm}: use null to leave the length of x_0 free"
            )


def make_scheduler(
    config: DiffusionConfig, sampler: str = "ddpm", timesteps: Sequence[int] | None = None
) -> Any:
    """The diffusers scheduler of `config` for one of `SAMPLERS`, or for `ddim_inverse`, which goes
    up the chain.

    With `timesteps` (descending, from `sampling_timesteps`) the scheduler lives on the sub-chain
    of those N steps alone and counts them N - 1 .. 0, the respacing of Nichol & Dhariwal 2021.
    A strided diffusers scheduler is not used because it misplaces steps whenever N does not divide
    T: DDIM takes t - T // N for the next timestep (15 steps of 1000 never arrive at x_0), and DDPM
    adds noise to its last step unless that is t = 0. On its own chain every sampler is exact.

    The scheduler never clamps x_0: not all of them can, so `sample` does it for all.

    Raises:
        ValueError: the sampler is not one of `SAMPLERS`.
    """
    if sampler != INVERSE:
        _check_choice("sampler", sampler, SAMPLERS)
    scheduler_class, options = _SCHEDULERS[sampler]
    if sampler == "analytic":
        if config.eps_power is None:
            raise ValueError(
                "sampler must not be 'analytic' for a model without diffusion.eps_power; got "
                "null: measure it by python -m unclip.training.analytic, or use 'ddpm'"
            )
        config = replace(config, variance="learned_range")
    if scheduler_class is DDPMScheduler:
        options = options | {"variance_type": config.variance}
    num_steps = config.num_train_timesteps
    # Ho et al.'s betas are for T = 1000; this keeps the end of a shorter chain as noisy.
    betas: dict[str, Any] = {
        "beta_schedule": {"cosine": "squaredcos_cap_v2", "linear": "linear"}[config.beta_schedule],
        "beta_start": min(0.1 / num_steps, 0.999),
        "beta_end": min(20.0 / num_steps, 0.999),
    }
    if timesteps is not None:
        num_steps = len(timesteps)
        alpha_bar = alpha_bars(config)[list(timesteps)].flip(0)
        alpha = alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        betas = {"trained_betas": (1 - alpha).tolist()}
    scheduler = scheduler_class(
        num_train_timesteps=num_steps,
        prediction_type={"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}[
            config.prediction_type
        ],
        timestep_spacing="trailing",
        **betas,
        **options,
    )
    # diffusers multiplies alpha_bar up in fp32, where 1 - alpha_bar cancels near t = 0.
    if timesteps is None:
        alpha_bar = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    scheduler.alphas_cumprod = alpha_bar
    scheduler.set_timesteps(num_steps)
    return scheduler


def alpha_bars(config: DiffusionConfig) -> Tensor:
    """alpha_bar of every training timestep, fp64 on the CPU, [T], decreasing within (0, 1)."""
    return make_scheduler(config).alphas_cumprod


def sampling_timesteps(config: DiffusionConfig, num_inference_steps: int) -> list[int]:
    """The N timesteps that sampling visits, descending and distinct; the first is T - 1 (T - 3 for
    `fast27`).

    Raises:
        ValueError: `num_inference_steps` is outside 1 .. T.
    """
    T, N = config.num_train_timesteps, num_inference_steps
    if not 1 <= N <= T:
        raise ValueError(
            f"num_inference_steps must be between 1 and num_train_timesteps = {T}; "
            f"got {N}: use {min(max(N, 1), T)}"
        )
    if config.timestep_spacing == "fast27" and N == 27:
        # A section for each fifth of the chain.
        fifth = T // 5
        sections = [_both_ends(fifth, count) for count in (10, 10, 3, 2, 2)]
        visited = [i * fifth + t for i, section in enumerate(sections) for t in section]
        # DDIM blurs less when it starts a little below the noisiest timestep.
        return [visited[-1] - 2, *reversed(visited[:-1])]
    if config.timestep_spacing != "trailing" and N > 1:
        return _both_ends(T, N)[::-1]
    return [round(T * k / N) - 1 for k in range(N, 0, -1)]


def _both_ends(length: int, count: int) -> list[int]:
    """`count` of the numbers below `length`, evenly spaced, 0 and length - 1 among them."""
    stride = (length - 1) / (count - 1)
    # Summed as GLIDE and Karlo do: where a place falls between two numbers, rounding decides.
    return [round(place) for place in itertools.accumulate([0.0] + [stride] * (count - 1))]


_SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    INVERSE: (DDIMInverseScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    # Euler's method on the probability flow in x / alpha is DDIM (Song et al. 2021, section 4.3).
    "euler": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    "analytic": (DDPMScheduler, {"clip_sample": False}),
    "dpm++": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"},
    ),
    "dpm++sde": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"},
    ),
    "unipc": (UniPCMultistepScheduler, {"final_sigmas_type": "zero"}),
}


def _check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.3)
        mend = f"did you mean {nearest[0]!r}?" if nearest else f"use {choices[0]!r}"
        raise ValueError(f"{field} must be one of {', '.join(choices)}; got {value!r}: {mend}")
