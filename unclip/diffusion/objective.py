"""What the network learns: the forward process, its three targets, and the loss.

Legend: B batch, ... data dimensions ([D] for embeddings, [C, H, W] for images), T timesteps.
With alpha_bar from the schedule, alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar):

    x_t = alpha x_0 + sigma eps             (Ho et al. 2020, eq. 4)
    v   = alpha eps - sigma x_0             (Salimans & Ho 2022, appendix D)
    snr = alpha^2 / sigma^2

Everything here is fp32, whatever autocast made of the network's output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unclip.diffusion.schedule import DiffusionConfig, make_scheduler


class NoiseSchedule:
    """The forward process of `config` and the conversions between eps, x_0 and v.

    Its numbers are those of `make_scheduler(config)`, kept in `scheduler`. Sample tensors are
    [B, ...] and timesteps integer [B] in 0 .. T - 1, on one device; results are fp32.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.scheduler = make_scheduler(config)

        # Tables [T], worked out in fp64: both 1 - alpha_bar and 1 - alpha_bar_prev cancel in fp32.
        alpha_bar = self.scheduler.alphas_cumprod
        alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        beta = 1 - alpha_bar / alpha_bar_prev
        self._alpha = alpha_bar.sqrt().float()
        self._sigma = (1 - alpha_bar).sqrt().float()
        self._snr = (alpha_bar / (1 - alpha_bar)).float()

        # q(x_{t-1} | x_t, x_0), Ho et al. 2020, eq. 6-7.
        self._posterior_x_0 = (alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)).float()
        self._posterior_x_t = ((1 - beta).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)).float()
        posterior_variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
        posterior_variance[0] = posterior_variance[1]  # it is 0 at t = 0, where it has no log
        self._log_variance_min = posterior_variance.log().float()
        self._log_variance_max = beta.log().float()

    def add_noise(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t [B, ...]: the clean sample with `noise` ~ N(0, 1) mixed in to level `timesteps`."""
        alpha, sigma = self._levels(timesteps, x_0)
        return alpha * x_0.float() + sigma * noise.float()

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), [B]."""
        return self._snr.to(timesteps.device)[timesteps]

    def target(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should output, [B, ...]: eps, x_0 or v by the config."""
        alpha, sigma = self._levels(timesteps, x_0)
        x_0, noise = x_0.float(), noise.float()
        match self.config.prediction_type:
            case "eps":
                return noise
            case "x_0":
                return x_0
            case "v":
                return alpha * noise - sigma * x_0

    def predict_x_0(self, x_t: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        """The x_0 estimate [B, ...] that a network output (without a variance half) stands for."""
        alpha, sigma = self._levels(timesteps, x_t)
        x_t, model_output = x_t.float(), model_output.float()
        match self.config.prediction_type:
            case "eps":
                return (x_t - sigma * model_output) / alpha
            case "x_0":
                return model_output
            case "v":
                return alpha * x_t - sigma * model_output

    def predict_eps(self, x_t: Tensor, model_output: Tensor, timesteps: Tensor) -> Tensor:
        """The noise estimate [B, ...] that a network output (without variance half) stands for."""
        alpha, sigma = self._levels(timesteps, x_t)
        x_t, model_output = x_t.float(), model_output.float()
        match self.config.prediction_type:
            case "eps":
                return model_output
            case "x_0":
                return self.eps_of(x_t, model_output, timesteps)
            case "v":
                return sigma * x_t + alpha * model_output

    def eps_of(self, x_t: Tensor, x_0: Tensor, timesteps: Tensor) -> Tensor:
        """The noise [B, ...] that x_t holds beside an estimate of x_0."""
        alpha, sigma = self._levels(timesteps, x_t)
        return (x_t.float() - alpha * x_0.float()) / sigma

    def split_output(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """A network output as (prediction, variance half or None), each shaped like `x_t`.

        Raises:
            ValueError: the output's shape is not the one that `x_t` and `config.variance` ask for.
        """
        learned = self.config.variance == "learned_range"
        expected = (x_t.shape[0], x_t.shape[1] * (2 if learned else 1), *x_t.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"model_output must have shape {list(expected)} with diffusion.variance = "
                f"{self.config.variance!r}; got {list(model_output.shape)}: set the network's "
                f"output width to {expected[1]}"
            )
        if not learned:
            return model_output, None
        prediction, variance = model_output.chunk(2, dim=1)
        return prediction, variance

    def vlb(
        self, prediction: Tensor, variance: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """One term of the variational bound, bits per dimension, [B].

        The KL between q(x_{t-1} | x_t, x_0) and the model's Gaussian, whose log variance is
        interpolated by `variance` (Nichol & Dhariwal 2021, eq. 15); at t = 0 the negative log
        likelihood of 8-bit pixels in [-1, 1].
        """
        x_0, x_t = x_0.float(), x_t.float()
        log_variance_min = _gather(self._log_variance_min, t, x_t)
        log_variance_max = _gather(self._log_variance_max, t, x_t)
        c_x_0, c_x_t = _gather(self._posterior_x_0, t, x_t), _gather(self._posterior_x_t, t, x_t)

        fraction = (variance.float() + 1) / 2
        log_variance = fraction * log_variance_max + (1 - fraction) * log_variance_min
        mean = c_x_0 * self.predict_x_0(x_t, prediction, t) + c_x_t * x_t
        true_mean = c_x_0 * x_0 + c_x_t * x_t

        log_ratio = log_variance_min - log_variance
        squared_distance = (true_mean - mean).square() * (-log_variance).exp()
        kl = 0.5 * (log_ratio.exp() - 1 - log_ratio + squared_distance)
        nll = -_log_likelihood_of_pixels(x_0, mean, (0.5 * log_variance).exp())
        first = (t == 0).reshape(-1, *[1] * (x_0.ndim - 1))
        return _mean_per_sample(torch.where(first, nll, kl)) / math.log(2.0)

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return _gather(self._alpha, timesteps, like), _gather(self._sigma, timesteps, like)


def diffusion_loss(
    schedule: NoiseSchedule, model_output: Tensor, x_0: Tensor, noise: Tensor, timesteps: Tensor
) -> dict[str, Tensor]:
    """The training loss of one batch, kept per sample so that it can be logged by timestep.

    The MSE in the space of the prediction, weighted by the config, plus with a learned variance
    `vlb_weight` times the variational bound (Nichol & Dhariwal 2021, eq. 16), in which the mean
    is detached so that the bound trains the variance alone. They sum the bound over the T
    timesteps; T times the term drawn here is its estimate, so at T = 1000 and the default weight
    the two factors cancel.

    Args:
        schedule: the forward process that made the network's input.
        model_output: [B, ...], or [B, 2C, ...] with a learned variance; any float dtype.
        x_0: clean samples [B, ...].
        noise: the N(0, 1) sample mixed into them, [B, ...].
        timesteps: integer [B] in 0 .. T - 1.

    Returns:
        `loss` [B] fp32, and for the log, detached: `x_0_mse` [B], the unweighted error of the x_0
        estimate, comparable over prediction types; `vlb` [B] with a learned variance, in bits per
        dimension.

    Raises:
        ValueError: the output's shape does not fit `x_0` and `config.variance`.
    """
    config = schedule.config
    prediction, variance = schedule.split_output(model_output, x_0)
    prediction = prediction.float()
    x_t = schedule.add_noise(x_0, noise, timesteps)

    error = _mean_per_sample((prediction - schedule.target(x_0, noise, timesteps)).square())
    loss = loss_weight(schedule, timesteps) * error
    logged = {}
    if variance is not None:
        vlb = schedule.vlb(prediction.detach(), variance, x_0, x_t, timesteps)
        loss = loss + config.vlb_weight * config.num_train_timesteps * vlb
        logged["vlb"] = vlb.detach()
    x_0_error = schedule.predict_x_0(x_t, prediction.detach(), timesteps) - x_0.float()
    return {"loss": loss, "x_0_mse": _mean_per_sample(x_0_error.square()), **logged}


def loss_weight(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """The weight [B] of the MSE at each timestep.

    `min_snr` (Hang et al. 2023, section 3.4) weighs the x_0 error by min(snr, gamma); an error in
    eps is snr times the one in x_0, and one in v is snr + 1 times it, hence the divisors.
    """
    snr = schedule.snr(timesteps)
    if schedule.config.weighting == "uniform":
        return torch.ones_like(snr)
    weight = snr.clamp(max=schedule.config.min_snr_gamma)
    match schedule.config.prediction_type:
        case "eps":
            return weight / snr
        case "x_0":
            return weight
        case "v":
            return weight / (snr + 1)


def _log_likelihood_of_pixels(x_0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log of the Gaussian mass in each pixel's 8-bit bin; the two end bins reach to infinity."""
    offset, half_bin = x_0 - mean, 1 / 255
    # Measured from the mean outwards: the mass above is small where the CDF is all but 1, and
    # torch's fp32 ndtr is 1 + erf, which has no digits left in either tail.
    distance = offset.abs()
    mass = _mass_above((distance - half_bin) / std) - _mass_above((distance + half_bin) / std)
    mass = torch.where(x_0 > 0.999, _mass_above((offset - half_bin) / std), mass)
    mass = torch.where(x_0 < -0.999, _mass_above((-offset - half_bin) / std), mass)
    return mass.clamp(min=1e-12).log()


def _mass_above(z: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(z * math.sqrt(0.5))


def _gather(table: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """Entries of a [T] table at `timesteps`, shaped [B, 1, ...] to broadcast over `like`."""
    return table.to(like.device)[timesteps].reshape(-1, *[1] * (like.ndim - 1))


def _mean_per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)  # [B, ...] -> [B]
