"""DDIM inversion and resampling, against known answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unclip.diffusion import (
    DiffusionConfig,
    Resampling,
    alpha_bars,
    invert,
    make_generators,
    sample,
)
from unclip.diffusion.resampling import renoise

CONFIG = DiffusionConfig(clip_range=None, prediction_type="eps")
VARIANCE = 0.25


def constant(x_t: Tensor, timesteps: Tensor, context: object) -> Tensor:
    """The same noise whatever it sees: DDIM is exact for it, both ways."""
    return torch.linspace(-1, 1, x_t[0].numel()).view_as(x_t[0]).expand_as(x_t)


def gaussian(x_t: Tensor, timesteps: Tensor, context: object) -> Tensor:
    """The true noise where the data are N(0, 1/4)."""
    alpha_bar = alpha_bars(CONFIG)[timesteps].float()[:, None]
    return (1 - alpha_bar).sqrt() * x_t / (alpha_bar * VARIANCE + 1 - alpha_bar)


def there_and_back(network, steps: int, **options) -> tuple[Tensor, Tensor, Tensor]:
    x_0 = 0.5 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    chosen = {"context": {}, "num_inference_steps": steps}
    x_T = invert(network, CONFIG, x_0, **chosen, **options)
    again = sample(network, CONFIG, x_0.shape, generators=make_generators(0, 3), x_T=x_T, **chosen)
    return x_0, x_T, again


def test_inversion_is_exact_where_the_noise_does_not_depend_on_the_sample() -> None:
    # Not on the cosine schedule's last step, whose alpha of 5e-5 leaves no digits of x_0.
    x_0, x_T, again = there_and_back(constant, 10)
    torch.testing.assert_close(x_T, constant(x_0, x_0, None), atol=1e-3, rtol=0)
    torch.testing.assert_close(again, x_0, atol=2e-2, rtol=0)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_more_iterations_and_more_steps_come_nearer(
    spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    monkeypatch.setattr(f"{__name__}.CONFIG", replace(CONFIG, timestep_spacing=spacing))

    def error(steps: int, iterations: int) -> float:
        x_0, _, again = there_and_back(gaussian, steps, num_iterations=iterations)
        return (again - x_0).abs().max().item()

    assert error(10, 8) < error(10, 2) < error(10, 1)
    assert error(100, 1) < error(10, 1)
    assert error(50, 8) < 2e-2


def test_inversion_of_unit_gaussians_gives_their_noise() -> None:
    """Where the data are N(0, 1/4), DDIM's map is x_T = 2 x_0."""
    x_0, x_T, _ = there_and_back(gaussian, 500, num_iterations=3)
    torch.testing.assert_close(x_T, 2 * x_0, atol=0.05, rtol=0)


def test_the_callback_may_stop_it() -> None:
    seen = []

    def stop(step: int, *_: object) -> None:
        seen.append(step)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        there_and_back(constant, 10, callback=stop)
    assert seen == [0, 1, 2]


def test_at_least_one_iteration() -> None:
    with pytest.raises(ValueError, match="num_iterations must be at least 1; got 0: use 1"):
        there_and_back(constant, 10, num_iterations=0)


# ------------------------------------------------------------------------------------- resampling


def test_the_way_of_resampling() -> None:
    assert Resampling(jump_length=2, num_resamples=2).places(4) == [3, 2, 3, 2, 1, 0, 1, 0]
    assert Resampling(jump_length=3, num_resamples=2).places(4) == [3, 2, 1, 3, 2, 1, 0, 0]
    assert Resampling(jump_length=5, num_resamples=1).places(3) == [2, 1, 0]


def test_noise_is_added_as_the_chain_has_it() -> None:
    alpha_bar = torch.tensor([0.9, 0.5, 0.1])
    x = torch.full((1, 100_000), 2.0)
    up = renoise(x, alpha_bar, 0, 2, make_generators(0, 1))
    assert abs(up.mean().item() - 2 * (0.1 / 0.9) ** 0.5) < 0.01
    assert abs(up.var().item() - (1 - 0.1 / 0.9)) < 0.02
    from_clean = renoise(x, alpha_bar, -1, 1, make_generators(0, 1))
    assert abs(from_clean.var().item() - 0.5) < 0.02


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_resampling_draws_what_fits_the_known(sampler: str) -> None:
    """Two dimensions that are always equal: knowing one tells the other, if sampling goes back."""

    def equal(x_t: Tensor, timesteps: Tensor, context: object) -> Tensor:
        alpha_bar = alpha_bars(CONFIG)[timesteps].float()[:, None]
        signal = 2 * alpha_bar * VARIANCE
        mean = x_t.mean(dim=1, keepdim=True).expand_as(x_t)
        x_0 = signal / (signal + 1 - alpha_bar) * mean / alpha_bar.sqrt()
        return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()

    def hold(x_0: Tensor) -> Tensor:
        return torch.stack([torch.full_like(x_0[:, 0], 0.8), x_0[:, 1]], dim=1)

    def distance(resampling: Resampling | None) -> float:
        drawn = sample(
            equal,
            CONFIG,
            (64, 2),
            context={},
            generators=make_generators(0, 64),
            sampler=sampler,
            num_inference_steps=20,
            constrain=hold,
            resampling=resampling,
        )
        assert torch.allclose(drawn[:, 0], torch.tensor(0.8), atol=1e-4)
        return (drawn[:, 1] - 0.8).abs().mean().item()

    assert distance(Resampling(jump_length=5, num_resamples=8)) < 0.7 * distance(None)


def test_resampling_needs_a_sampler_without_memory() -> None:
    with pytest.raises(ValueError, match=r"'ddpm' or 'ddim' for resampling; got 'dpm\+\+'"):
        sample(
            constant,
            CONFIG,
            (1, 2),
            context={},
            generators=make_generators(0, 1),
            sampler="dpm++",
            resampling=Resampling(),
        )


@pytest.mark.parametrize("name", ["jump_length", "num_resamples"])
def test_bad_resampling(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0: use 5"):
        Resampling(**{name: 0})
