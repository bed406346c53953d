"""Flow matching (Lipman et al. 2023; Liu et al. 2023): the straight path from data to noise.

Legend: B batch, ... data dimensions, t in [0, 1] from data to noise.

    x_t = (1 - t) x_0 + t eps,    v = d x_t / d t = eps - x_0

The network sees x_t and the timestep 1000 t and predicts v, straight or by way of x_0; sampling
integrates v from t = 1 to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm.auto import tqdm

from unclip.diffusion.guidance import Context, Network, guided

FLOW_SAMPLERS = ("heun", "euler")
TIME_SCALE = 1000.0
"""What a network is told for t = 1, so that a time embedding made for diffusion serves."""
LEAST_TIME = 0.05
"""The t below which an error of x_0 weighs no more in the loss: as one of v it is divided by t."""
TimeDistribution = Literal["uniform", "logit_normal"]
FlowPrediction = Literal["x_0", "v"]


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """What a flow model was trained with."""

    time_distribution: TimeDistribution = "uniform"
    """Which t training sees: all alike, or the middle ones more often (Esser et al. 2024)."""
    prediction_type: FlowPrediction = "v"
    """What the network's output is: the velocity, or x_0, of which the velocity follows. The loss
    is the velocity's either way. v holds the noise, all D numbers of it, which a network narrower
    than D cannot carry; x_0 lies where data lie (Li & He 2025), and is what the recipe takes.
    Priors that were saved before there was a choice predict v."""

    def __post_init__(self) -> None:
        for name, choices, use in (
            ("time_distribution", get_args(TimeDistribution), "uniform"),
            ("prediction_type", get_args(FlowPrediction), "x_0"),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"flow.{name} must be one of {', '.join(choices)}; got "
                    f"{getattr(self, name)!r}: use {use!r}"
                )


def flow_times(config: FlowConfig, u: Tensor) -> Tensor:
    """Times t [B] in [0, 1] for uniform numbers u [B]."""
    if config.time_distribution == "logit_normal":
        # The logit of t is a standard normal number.
        return torch.sigmoid(torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))).to(u.dtype)
    return u


def flow_path(x_0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and its velocity v, both [B, ...], at times t [B]."""
    t = t.reshape(-1, *[1] * (x_0.ndim - 1))
    return (1 - t) * x_0 + t * noise, noise - x_0


def flow_loss(
    config: FlowConfig, output: Tensor, x_0: Tensor, noise: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """The velocity's squared error, and the estimate of x_0.

    Args:
        output: [B, ...] of the network, fp32.
        x_0, noise: [B, ...] that it was trained on.
        t: [B] in [0, 1].

    Returns:
        [B], means over a sample; and [B, ...].
    """
    x_t, v = flow_path(x_0, noise, t)
    t = t.reshape(-1, *[1] * (x_0.ndim - 1))
    if config.prediction_type == "v":
        error, estimate = output - v, x_t - t * output
    else:
        error, estimate = (x_0 - output) / t.clamp(min=LEAST_TIME), output
    return error.square().flatten(1).mean(dim=1), estimate


@torch.no_grad()
def sample_flow(
    network: Network,
    config: FlowConfig,
    shape: Sequence[int],
    *,
    context: Context,
    null_context: Context | None = None,
    guidance_scale: float = 1.0,
    sampler: str = "heun",
    num_inference_steps: int = 25,
    generators: Sequence[torch.Generator],
    dtype: torch.dtype = torch.float32,
    progress: str | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Draw x_0 from noise along the flow.

    Args:
        network: `network(x_t, timesteps, context)`, with timesteps [B] in [0, 1000].
        config: what it was trained with.
        shape: of the result.
        context, null_context, guidance_scale: as `unclip.diffusion.sample` has them.
        sampler: `euler`, or `heun`, which asks the network twice for all steps but the last.
        num_inference_steps: 1 or more.
        generators: one a sample.
        dtype: what the network computes in.
        progress: text of a progress bar; None shows none.
        callback: called each step as `callback(step, timestep, x_t, x_0)`,
            with the estimate of x_0 that the velocity there stands for.

    Returns:
        x_0, fp32, of `shape`.

    Raises:
        ValueError: an argument is out of its range.
    """
    if sampler not in FLOW_SAMPLERS:
        raise ValueError(
            f"sampler must be one of {', '.join(FLOW_SAMPLERS)} for a flow; got {sampler!r}: "
            f"use {FLOW_SAMPLERS[0]!r}"
        )
    if num_inference_steps < 1:
        raise ValueError(
            f"num_inference_steps must be at least 1; got {num_inference_steps}: use 25"
        )
    device = next(part.device for part in context.values() if part is not None)

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        timesteps = (TIME_SCALE * t).expand(shape[0])
        output = guided(network, x_t.to(dtype), timesteps, context, null_context, guidance_scale)
        output = output.float()
        return output if config.prediction_type == "v" else (x_t - output) / t

    # diffusers' own two end at t = 0.001 instead of 0, at the price of a step.
    times = torch.linspace(1, 0, num_inference_steps + 1, device=device)
    x_t = randn_tensor(tuple(shape), generator=list(generators), device=device)
    for step in tqdm(range(num_inference_steps), desc=progress, disable=progress is None):
        t, t_next = times[step], times[step + 1]
        v = velocity(x_t, t)
        if callback is not None:
            callback(step, round(TIME_SCALE * t.item()), x_t, x_t - t * v)
        x_next = x_t + (t_next - t) * v
        if sampler == "heun" and t_next > 0:
            v = (v + velocity(x_next, t_next)) / 2
            x_next = x_t + (t_next - t) * v
        x_t = x_next
    return x_t
