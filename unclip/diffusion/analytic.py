"""Analytic-DPM (Bao et al. 2022): the variance of a reverse step that is best for a network, from
the mean square of its noise estimates, which is measured once.

Legend: T training timesteps, N steps of a chain, K knots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unclip.diffusion.guidance import Context, Network
from unclip.diffusion.objective import NoiseSchedule


@torch.no_grad()
def measure_eps_power(
    network: Network,
    schedule: NoiseSchedule,
    x_0: Tensor,
    context: Context,
    generator: torch.Generator,
    num_knots: int = 32,
) -> tuple[float, ...]:
    """Mean square of the noise estimate at K evenly spaced timesteps, both ends included.

    Args:
        network: what is sampled from.
        schedule: what it was trained with.
        x_0: true samples [B, ...]; context: theirs.
        generator: of the noise.
        num_knots: K, 2 or more.
    """
    power = []
    for timestep in torch.linspace(0, schedule.config.num_train_timesteps - 1, num_knots):
        t = torch.full((len(x_0),), round(timestep.item()), device=x_0.device)
        noise = torch.randn(x_0.shape, generator=generator, device=generator.device).to(x_0.device)
        x_t = schedule.add_noise(x_0, noise, t)
        prediction, _ = schedule.split_output(network(x_t, t, dict(context)), x_t)
        eps = schedule.predict_eps(x_t, prediction, t)
        # An estimate of less than all the noise leaves the rest to the variance; never the reverse.
        power.append(min(eps.square().mean().item(), 1.0))
    return tuple(power)


def variance_fraction(
    alpha_bar: Tensor,
    timesteps: Sequence[int],
    eps_power: Sequence[float],
    num_train_timesteps: int,
) -> Tensor:
    """Where the best variance of each step lies between the log of the smallest and of the largest,
    from -1 to 1, [N]: what a network of learned variance would say (Nichol & Dhariwal 2021,
    equation 15).

    With alpha_n of the chain's own steps, a_n = alpha_1 ... alpha_n and b_n = 1 - a_n, Bao et al.'s
    theorem 1 is

        lambda_n^2 + (sqrt(b_n / alpha_n) - sqrt(b_{n-1} - lambda_n^2))^2 (1 - E eps^2)

    for DDPM's lambda_n^2 = b_{n-1} (1 - alpha_n) / b_n, the smallest variance; 1 - alpha_n is the
    largest.

    Args:
        alpha_bar: [N] of the chain, fp64, from x_0 up.
        timesteps: N, the same way round.
        eps_power: from `measure_eps_power`.
        num_train_timesteps: T.
    """
    knots = torch.tensor(eps_power, dtype=torch.float64)
    place = torch.tensor(timesteps, dtype=torch.float64) / (num_train_timesteps - 1)
    place = place * (len(knots) - 1)
    below = place.long().clamp(max=len(knots) - 2)
    power = torch.lerp(knots[below], knots[below + 1], place - below)

    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    alpha, beta_bar, beta_bar_before = alpha_bar / before, 1 - alpha_bar, 1 - before
    largest = 1 - alpha
    smallest = beta_bar_before * largest / beta_bar
    rest = (beta_bar / alpha).sqrt() - (beta_bar_before - smallest).clamp(min=0).sqrt()
    best = smallest + rest.square() * (1 - power)
    fraction = (best / smallest).log() / (largest / smallest).log()
    fraction[0] = 0  # the step to x_0 adds no noise
    return 2 * fraction.clamp(0, 1) - 1
