"""The diffusion room: conversions, losses, guidance, and samplers against known answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from unclip.diffusion import (
    SAMPLERS,
    DiffusionConfig,
    GuidanceLimits,
    NoiseSchedule,
    diffusion_loss,
    guided,
    make_generators,
    make_scheduler,
    measure_eps_power,
    sample,
    sampling_timesteps,
)

PREDICTION_TYPES = ("eps", "x_0", "v")
T_ALL = torch.arange(1000)


def config(**changes) -> DiffusionConfig:
    return DiffusionConfig(**{"clip_range": None, "eps_power": (1.0, 1.0), **changes})


def batch(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=rng) * 2 - 1, torch.randn(shape, generator=rng)


def oracle(cfg: DiffusionConfig, x_0: torch.Tensor, guess_variance: float = 0.0):
    """A network that knows x_0 and answers in the space that `cfg` asks for."""
    alpha_bar = make_scheduler(cfg).alphas_cumprod

    def network(x_t, timesteps, context):
        a = alpha_bar[timesteps].reshape(-1, *[1] * (x_t.ndim - 1))
        eps = (x_t.double() - a.sqrt() * x_0) / (1 - a).sqrt()
        answers = {"eps": eps, "x_0": x_0.double(), "v": a.sqrt() * eps - (1 - a).sqrt() * x_0}
        out = answers[cfg.prediction_type].float()
        if cfg.variance == "learned_range":
            out = torch.cat([out, torch.full_like(out, guess_variance)], dim=1)
        return out

    return network


# --- schedule ---------------------------------------------------------------------------------


def test_cosine_schedule_is_the_published_one():
    t = torch.arange(1000, dtype=torch.float64)
    f = [torch.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, t + 1)]
    expected = torch.cumprod(1 - (1 - f[1] / f[0]).clamp(max=0.999), dim=0)
    actual = make_scheduler(config()).alphas_cumprod
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)
    # The fp64 table keeps the digits of 1 - alpha_bar at the clean end.
    assert math.isclose(1 - actual[0], 1 - expected[0], rel_tol=1e-6)


def test_a_shorter_linear_chain_ends_as_noisy():
    ends = [
        make_scheduler(config(beta_schedule="linear", num_train_timesteps=n)).alphas_cumprod[-1]
        for n in (100, 1000)
    ]
    assert all(end < 1e-4 for end in ends)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_sampling_timesteps_are_distinct_and_start_at_the_last(spacing):
    cfg = config(timestep_spacing=spacing)
    for count in range(1, 1001):
        steps = sampling_timesteps(cfg, count)
        assert len(set(steps)) == count and steps == sorted(steps, reverse=True)
        assert steps[0] == 999 and steps[-1] >= 0
    assert sampling_timesteps(config(timestep_spacing="linspace"), 7)[-3:] == [333, 166, 0]


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"one of ddpm, .*; got 'dppm'.*did you mean 'ddpm'"):
        make_scheduler(config(), "dppm")
    with pytest.raises(ValueError, match=r"diffusion\.beta_schedule .*'cosin'.*'cosine'"):
        config(beta_schedule="cosin")


@pytest.mark.parametrize(
    "field",
    [
        {"num_train_timesteps": 1},
        {"min_snr_gamma": 0.0},
        {"vlb_weight": -1.0},
        {"clip_range": 0.0},
        {"x_0_norm": 0.0},
        {"vlb_weight": math.nan},
    ],
)
def test_config_ranges(field):
    with pytest.raises(ValueError, match=rf"diffusion\.{next(iter(field))} must .*; got .*: use"):
        DiffusionConfig(**field)


# --- targets and losses -----------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("beta_schedule", ["cosine", "linear"])
def test_targets_round_trip_to_x_0_and_eps(prediction_type, beta_schedule):
    schedule = NoiseSchedule(config(prediction_type=prediction_type, beta_schedule=beta_schedule))
    x_0, noise = batch(1000, 3, 2, 2)
    x_t = schedule.add_noise(x_0, noise, T_ALL)
    target = schedule.target(x_0, noise, T_ALL)
    # Rounding is amplified by 1 / alpha where x_0 is all but gone, by 1 / sigma where eps is.
    snr = schedule.snr(T_ALL).sqrt().reshape(-1, 1, 1, 1)
    x_0_error = (schedule.predict_x_0(x_t, target, T_ALL) - x_0).abs()
    eps_error = (schedule.predict_eps(x_t, target, T_ALL) - noise).abs()
    assert (x_0_error < 2e-6 * (1 + 1 / snr)).all()
    assert (eps_error < 2e-6 * (1 + snr)).all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_a_perfect_output_has_no_error(prediction_type, variance):
    schedule = NoiseSchedule(
        config(prediction_type=prediction_type, variance=variance, vlb_weight=0.0)
    )
    x_0, noise = batch(4, 3, 2, 2)
    t = torch.tensor([0, 1, 500, 900])
    output = schedule.target(x_0, noise, t)
    if variance == "learned_range":
        output = torch.cat([output, torch.zeros_like(output)], dim=1)
    result = diffusion_loss(schedule, output, x_0, noise, t)
    assert result["loss"].shape == result["x_0_mse"].shape == (4,)
    assert result["loss"].max() < 1e-10 and result["x_0_mse"].max() < 1e-10


def test_min_snr_weighs_the_same_x_0_error_alike_in_every_space():
    losses = []
    for prediction_type in PREDICTION_TYPES:
        schedule = NoiseSchedule(config(prediction_type=prediction_type, weighting="min_snr"))
        x_0, noise = batch(1000, 4)
        wrong = batch(1000, 4, seed=1)[0].double()
        x_t = schedule.add_noise(x_0, noise, T_ALL)
        # The same wrong guess of x_0, said in each space (the noise that would explain x_t).
        alpha_bar = schedule.scheduler.alphas_cumprod[:, None]
        eps = (x_t - alpha_bar.sqrt() * wrong) / (1 - alpha_bar).sqrt()
        output = schedule.target(wrong.float(), eps.float(), T_ALL)
        result = diffusion_loss(schedule, output, x_0, noise, T_ALL)
        losses.append(result["loss"])
        if prediction_type == "x_0":
            expected = schedule.snr(T_ALL).clamp(max=5.0) * result["x_0_mse"]
            torch.testing.assert_close(result["loss"], expected)
    visible = slice(0, 980)  # beyond, eps holds too few fp32 digits of x_0 to compare
    for loss in losses:
        torch.testing.assert_close(loss[visible], losses[1][visible], rtol=2e-2, atol=1e-9)


def test_uniform_loss_is_the_plain_mse_in_fp32():
    schedule = NoiseSchedule(config(prediction_type="v"))
    x_0, noise = batch(5, 3, 4, 4)
    t = torch.tensor([0, 10, 400, 800, 999])
    output = torch.randn(5, 3, 4, 4).bfloat16()
    loss = diffusion_loss(schedule, output, x_0, noise, t)["loss"]
    expected = (output.float() - schedule.target(x_0, noise, t)).square().mean(dim=(1, 2, 3))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_a_wrong_output_width_is_refused():
    schedule = NoiseSchedule(config(variance="learned_range"))
    x_0, noise = batch(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"model_output must have shape \[2, 6, 4, 4\].*output"):
        diffusion_loss(schedule, x_0, x_0, noise, torch.tensor([1, 2]))


def naive_vlb(alpha_bar, t: int, x_0, noise, x_0_guess, variance) -> float:
    """Bits per dimension by torch.distributions, in fp64, one timestep at a time."""
    now, prev = alpha_bar[t], alpha_bar[t - 1] if t > 0 else torch.ones((), dtype=torch.float64)
    beta = 1 - now / prev
    x_t = now.sqrt() * x_0 + (1 - now).sqrt() * noise

    def posterior_mean(x):
        return (prev.sqrt() * beta * x + (now / prev).sqrt() * (1 - prev) * x_t) / (1 - now)

    small = (1 - prev) / (1 - now) * beta
    if t == 0:
        small = (1 - alpha_bar[0]) / (1 - alpha_bar[1]) * (1 - alpha_bar[1] / alpha_bar[0])
    fraction = (variance + 1) / 2
    model_std = (beta.log() * fraction + small.log() * (1 - fraction)).exp().sqrt()
    p = torch.distributions.Normal(posterior_mean(x_0_guess), model_std)
    if t > 0:
        q = torch.distributions.Normal(posterior_mean(x_0), small.sqrt())
        return (torch.distributions.kl_divergence(q, p).mean() / math.log(2)).item()
    mass = torch.where(x_0 > 0.999, 1.0, p.cdf(x_0 + 1 / 255))
    mass = mass - torch.where(x_0 < -0.999, 0.0, p.cdf(x_0 - 1 / 255))
    return (-mass.clamp(min=1e-12).log().mean() / math.log(2)).item()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_vlb_agrees_with_a_naive_computation(prediction_type):
    schedule = NoiseSchedule(config(prediction_type=prediction_type, variance="learned_range"))
    t = torch.tensor([0, 0, 1, 17, 500, 999])
    x_0, noise = batch(6, 3, 4, 4)
    x_0[0, 0], x_0[0, 1] = 1.0, -1.0  # the end bins
    variance = torch.linspace(-1, 1, 6 * 3 * 16).reshape(6, 3, 4, 4)
    table = schedule.scheduler.alphas_cumprod
    alpha_bar = table[t].reshape(-1, 1, 1, 1)
    target = schedule.target(x_0, noise, t)
    output = target + 0.01 * batch(6, 3, 4, 4, seed=2)[1]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    guess = {
        "eps": (x_t - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt(),
        "x_0": output.double(),
        "v": alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * output,
    }[prediction_type]

    result = diffusion_loss(schedule, torch.cat([output, variance], 1), x_0, noise, t)
    expected = torch.tensor(
        [
            naive_vlb(table, int(t[i]), *(a[i].double() for a in (x_0, noise, guess, variance)))
            for i in range(6)
        ]
    )
    torch.testing.assert_close(result["vlb"], expected, rtol=1e-3, atol=1e-5)
    mse = (output - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(result["loss"], mse + result["vlb"])  # 0.001 * T = 1


def test_the_bound_trains_the_variance_only_and_survives_bf16():
    schedule = NoiseSchedule(config(prediction_type="eps", variance="learned_range"))
    rng = torch.Generator().manual_seed(0)
    x_0, noise = batch(1000, 3, 2, 2)
    output = (3 * torch.randn(1000, 6, 2, 2, generator=rng)).bfloat16().requires_grad_()
    result = diffusion_loss(schedule, output, x_0.bfloat16(), noise.bfloat16(), T_ALL)
    assert result["loss"].dtype == torch.float32
    assert all(value.isfinite().all() for value in result.values())
    (grad,) = torch.autograd.grad(result["loss"].sum(), output)
    assert grad.isfinite().all() and grad[1:, 3:].abs().amax(dim=(1, 2, 3)).min() > 0
    mse = (output[:, :3].float() - noise.bfloat16().float()).square().mean(dim=(1, 2, 3)).sum()
    (mse_grad,) = torch.autograd.grad(mse, output)
    torch.testing.assert_close(grad[:, :3], mse_grad[:, :3])


# --- guidance ---------------------------------------------------------------------------------


class Recorder:
    """A network whose output is its context, and which remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, timesteps, context):
        self.calls.append((x_t, timesteps, context))
        return context["y"] + 0 * x_t


def test_guidance_identities_and_batch_order():
    x_t, t = torch.randn(2, 4), torch.tensor([5, 5])
    y, null_y = torch.full((2, 4), 3.0), torch.full((2, 4), 1.0)
    cond, null = {"y": y, "mask": None}, {"y": null_y, "mask": None}

    def run(scale, null_context=null, **options):
        network = Recorder()
        out = guided(network, x_t, t, cond, null_context, scale, **options)
        assert len(network.calls) == 1
        return out, network.calls[0]

    out, (seen, _, _) = run(1.0)
    assert torch.equal(out, y) and len(seen) == 2
    out, (seen, _, _) = run(4.0, None)
    assert torch.equal(out, y) and len(seen) == 2
    out, (seen, _, _) = run(0.0)
    assert torch.equal(out, null_y) and len(seen) == 2

    out, (seen, timesteps, context) = run(4.0)
    assert torch.equal(out, torch.full((2, 4), 1.0 + 4.0 * 2.0))
    assert torch.equal(context["y"], torch.cat([null_y, y])) and context["mask"] is None
    assert torch.equal(seen, torch.cat([x_t, x_t])) and timesteps.shape == (4,)

    out, _ = run(4.0, learned_variance=True)
    assert torch.equal(out, torch.tensor([[9.0, 9.0, 3.0, 3.0]]).expand(2, 4))


def test_guidance_errors():
    x_t, t = torch.randn(1, 2), torch.tensor([0])
    context = {"y": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match=r"guidance_scale must not be negative; got -1.*: use 1"):
        guided(Recorder(), x_t, t, context, context, -1.0)
    with pytest.raises(ValueError, match="null_context must have the keys of context"):
        guided(Recorder(), x_t, t, context, {"z": torch.zeros(1, 2)}, 2.0)
    with pytest.raises(ValueError, match="must be None exactly where"):
        guided(Recorder(), x_t, t, context, {"y": None}, 2.0)


# --- sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("beta_schedule", ["cosine", "linear"])
def test_a_perfect_predictor_recovers_x_0(sampler, prediction_type, variance, beta_schedule):
    cfg = config(prediction_type=prediction_type, variance=variance, beta_schedule=beta_schedule)
    x_0 = batch(2, 3, 4, 4)[0]
    # 15 and 27 are the paper's DDIM steps: neither divides 1000.
    for steps in (1, 2, 15, 27, 50):
        out = sample(
            oracle(cfg, x_0, guess_variance=0.3),
            cfg,
            x_0.shape,
            context={},
            sampler=sampler,
            num_inference_steps=steps,
            generators=make_generators(0, 2),
        )
        # One step lands straight from t = T - 1, where eps divides by alpha = 5e-5.
        tolerance = 2e-2 if steps == 1 and prediction_type == "eps" else 2e-4
        torch.testing.assert_close(out, x_0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_intermediate_samples_keep_the_schedules_noise_level(sampler):
    """With x_0 known, x_t must sit at its own noise level: no step is misplaced."""
    cfg = config()
    x_0 = torch.full((1, 20_000), 0.5)
    alpha_bar = make_scheduler(cfg).alphas_cumprod
    seen = []
    sample(
        oracle(cfg, x_0),
        cfg,
        x_0.shape,
        context={},
        sampler=sampler,
        num_inference_steps=15,
        generators=make_generators(1, 1),
        callback=lambda step, t, x_t, x_0: seen.append((t, x_t)),
    )
    for t, x_t in seen:
        assert x_t.mean().item() == pytest.approx(0.5 * alpha_bar[t].sqrt().item(), abs=0.03)
        assert x_t.std().item() == pytest.approx((1 - alpha_bar[t]).sqrt().item(), rel=0.03)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", [(3, 5), (3, 3, 4, 4)])
def test_a_sample_is_the_same_alone_and_in_a_batch(sampler, shape):
    cfg = config(prediction_type="v", variance="learned_range")

    def network(x_t, timesteps, context):
        return torch.cat([torch.sin(3 * x_t), torch.cos(x_t)], dim=1)

    options = {"context": {}, "sampler": sampler, "num_inference_steps": 7}
    options["eta"] = 0.7 if sampler == "ddim" else 0.0
    together = sample(network, cfg, shape, generators=make_generators(4, 3), **options)
    for k in range(3):
        rng = make_generators(4, 3)[k]
        alone = sample(network, cfg, (1, *shape[1:]), generators=[rng], **options)
        assert torch.equal(alone[0], together[k])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "dpm++sde", "unipc"])
def test_samples_of_a_gaussian_have_its_mean_and_variance(sampler):
    """The optimal denoiser of N(mean, std^2) is known, so the samples must follow it."""
    mean, std = 0.3, 0.4
    cfg = config()
    alpha_bar = make_scheduler(cfg).alphas_cumprod

    def network(x_t, timesteps, context):
        a = alpha_bar[timesteps][:, None].float()
        return mean + a.sqrt() * std**2 / (a * std**2 + 1 - a) * (x_t - a.sqrt() * mean)

    ancestral = sampler == "ddpm"  # first order: needs the full chain
    out = sample(
        network,
        cfg,
        (4, 5_000),
        context={},
        sampler=sampler,
        num_inference_steps=1000 if ancestral or sampler == "ddim" else 100,
        generators=make_generators(0, 4),
    )
    assert out.mean().item() == pytest.approx(mean, abs=0.01)
    assert out.std().item() == pytest.approx(std, rel=0.025)


@pytest.mark.parametrize("steps", [3, 7, 30])
def test_the_analytic_variance_is_right_for_a_gaussian_in_any_number_of_steps(steps):
    """There the reverse steps are Gaussian, so that the best Gaussian is the true one (Bao et al.
    2022); DDPM's own variance is too small where steps are few."""
    mean, std = 0.3, 0.4
    cfg = config()
    alpha_bar = make_scheduler(cfg).alphas_cumprod

    def network(x_t, timesteps, context):
        a = alpha_bar[timesteps][:, None].float()
        return mean + a.sqrt() * std**2 / (a * std**2 + 1 - a) * (x_t - a.sqrt() * mean)

    x_0 = mean + std * torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0))
    power = measure_eps_power(
        network, NoiseSchedule(cfg), x_0, {}, torch.Generator().manual_seed(1), num_knots=200
    )
    cfg = replace(cfg, eps_power=power)

    def error(sampler):
        """Of the standard deviation on the way, where the step to x_0 has no part in it."""
        errors = []

        def look(step, t, x_t, x_0):
            true = (alpha_bar[t] * std**2 + 1 - alpha_bar[t]).sqrt().item()
            errors.append(abs(x_t.std().item() - true) / true)

        sample(
            network,
            cfg,
            (4, 20_000),
            context={},
            sampler=sampler,
            num_inference_steps=steps,
            generators=make_generators(0, 4),
            callback=look,
        )
        return max(errors)

    assert error("analytic") < 0.03
    assert error("ddpm") > 2 * error("analytic")


def test_euler_is_ddim_as_diffusers_own_in_x_over_alpha():
    cfg = config(prediction_type="eps")
    alpha_bar = make_scheduler(cfg).alphas_cumprod
    x_T = batch(1, 3, 4, 4)[1]
    options = {"context": {}, "num_inference_steps": 20, "generators": make_generators(0, 1)}

    def network(x_t, t, context):
        return torch.tanh(x_t)

    ours = sample(network, cfg, x_T.shape, x_T=x_T, sampler="euler", **options)
    theirs = EulerDiscreteScheduler(
        trained_betas=make_scheduler(cfg).betas.tolist(), timestep_spacing="trailing"
    )
    theirs.set_timesteps(20)
    x = x_T / alpha_bar[999].sqrt().float()
    for t in theirs.timesteps:
        alpha = alpha_bar[int(t)].sqrt().float()
        theirs.scale_model_input(x, t)
        x = theirs.step(torch.tanh(x * alpha), t, x).prev_sample
    scale = x.abs().max()
    torch.testing.assert_close(ours / scale, x / scale, rtol=2e-3, atol=2e-4)


def test_limits_of_guidance():
    x_t, t = torch.randn(2, 4), torch.tensor([5, 5])
    cond = {"y": torch.randn(2, 4, generator=torch.Generator().manual_seed(0))}
    null = {"y": torch.zeros(2, 4)}

    def network(x_t, timesteps, context):
        return context["y"]

    plain, strong = cond["y"], guided(network, x_t, t, cond, null, 5.0)
    torch.testing.assert_close(strong, 5 * plain)
    back = guided(network, x_t, t, cond, null, 5.0, rescale=1.0)
    torch.testing.assert_close(back, plain)
    half = guided(network, x_t, t, cond, null, 5.0, rescale=0.5)
    torch.testing.assert_close(half, 3 * plain)

    limits = GuidanceLimits(interval=(0.2, 0.6))
    assert [limits.scale_at(4.0, level) for level in (0.1, 0.2, 0.5, 0.7)] == [1, 4, 4, 1]
    x_0 = torch.linspace(-4, 4, 101)[None].repeat(2, 1)
    x_0[1] /= 8  # within range already
    assert torch.equal(GuidanceLimits().clamp(x_0, 1.0), x_0.clamp(-1, 1))
    dynamic = GuidanceLimits(dynamic_threshold=0.5).clamp(x_0, 1.0)
    torch.testing.assert_close(dynamic[0], (x_0[0] / 2).clamp(-1, 1))  # half lie within 2
    assert torch.equal(dynamic[1], x_0[1])


def test_guidance_acts_within_its_interval_alone():
    sizes = []

    def network(x_t, timesteps, context):
        sizes.append((int(timesteps[0]), len(x_t)))
        return x_t * 0.5

    sample(
        network,
        config(),
        (2, 6),
        context={"y": torch.zeros(2, 1)},
        null_context={"y": torch.ones(2, 1)},
        guidance_scale=2.0,
        guidance_limits=GuidanceLimits(interval=(0.3, 0.8)),
        num_inference_steps=4,
        generators=make_generators(0, 2),
    )
    assert sizes == [(999, 2), (749, 4), (499, 4), (249, 2)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interval": (0.5, 0.2)}, "guidance_interval must be two numbers from 0 to 1"),
        ({"interval": (-0.1, 0.2)}, "guidance_interval must be two numbers"),
        ({"rescale": 1.5}, "guidance_rescale must lie in"),
        ({"dynamic_threshold": 0.0}, "dynamic_threshold must lie in"),
    ],
)
def test_limits_of_guidance_have_ranges(changes, message):
    with pytest.raises(ValueError, match=message):
        GuidanceLimits(**changes)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_where_n_divides_t_the_loop_is_diffusers_own(sampler):
    """On its sub-chain a scheduler walks as diffusers' strided one does where that one is right."""
    cfg = config(prediction_type="eps")
    x_T = batch(1, 3, 4, 4)[1]
    ours = sample(
        lambda x_t, t, context: torch.tanh(x_t),
        cfg,
        x_T.shape,
        context={},
        sampler=sampler,
        num_inference_steps=20,
        generators=make_generators(0, 1),
        x_T=x_T,
    )
    if sampler == "analytic":  # diffusers has none; the test of a Gaussian holds it
        return
    scheduler = make_scheduler(cfg, sampler)
    scheduler.set_timesteps(20)
    (rng,) = make_generators(0, 1)
    options = {} if sampler == "unipc" else {"generator": rng}
    theirs = x_T
    for t in scheduler.timesteps:
        theirs = scheduler.step(torch.tanh(theirs), t, theirs, **options).prev_sample
    scale = theirs.abs().max()  # thousands: eps is not a clean answer at t = 999
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-3, atol=1e-4)


def test_a_learned_variance_spans_the_fixed_ones_under_ddpm_alone():
    x_0 = batch(2, 3, 4, 4)[0]

    def third_input(variance, guess, sampler):
        cfg, seen = config(variance=variance), []
        sample(
            oracle(cfg, x_0, guess),
            cfg,
            x_0.shape,
            context={},
            sampler=sampler,
            num_inference_steps=10,
            generators=make_generators(0, 2),
            callback=lambda step, t, x_t, x_0: seen.append(x_t),
        )
        return seen[2]

    for guess, fixed in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        learned = third_input("learned_range", guess, "ddpm")
        torch.testing.assert_close(learned, third_input(fixed, 0.0, "ddpm"))
    assert not torch.allclose(learned, third_input("fixed_small", 0.0, "ddpm"), atol=1e-2)
    dropped = [third_input("learned_range", guess, "ddim") for guess in (-1.0, 1.0)]
    assert torch.equal(*dropped)


def test_ddpm_and_ddim_with_eta_1_are_the_same_process():
    cfg = config()

    def network(x_t, timesteps, context):
        return torch.tanh(x_t)

    out = [
        sample(
            network,
            cfg,
            (2, 8),
            context={},
            sampler=sampler,
            eta=eta,
            num_inference_steps=27,
            generators=make_generators(0, 2),
        )
        for sampler, eta in (("ddpm", 0.0), ("ddim", 1.0))
    ]
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_clamps_and_an_untrained_network_stays_finite(sampler):
    cfg = config(prediction_type="eps", clip_range=0.7)
    out = sample(
        lambda x_t, t, context: torch.zeros_like(x_t),
        cfg,
        (2, 3, 4, 4),
        context={},
        sampler=sampler,
        num_inference_steps=9,
        generators=make_generators(0, 2),
    )
    assert out.isfinite().all() and out.abs().max() <= 0.7


def test_network_runs_in_its_dtype_and_the_scheduler_in_fp32():
    seen = []

    def network(x_t, timesteps, context):
        seen.append((x_t.dtype, timesteps.tolist(), context["y"].shape))
        return x_t * 0.5

    with torch.inference_mode():
        out = sample(
            network,
            DiffusionConfig(),
            (2, 6),
            context={"y": torch.zeros(2, 1)},
            null_context={"y": torch.ones(2, 1)},
            guidance_scale=2.0,
            num_inference_steps=4,
            generators=make_generators(0, 2),
            dtype=torch.bfloat16,
            x_T=torch.ones(2, 6),
        )
    assert out.dtype == torch.float32
    assert [t[0] for _, t, _ in seen] == [999, 749, 499, 249]
    assert all(d == torch.bfloat16 and len(t) == 4 and y == (4, 1) for d, t, y in seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be between 1 and .*; got 0: use 1"),
        ({"num_inference_steps": 1001}, "got 1001: use 1000"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta must be 0 unless sampler is 'ddim'"),
        ({"eta": 1.5}, "eta must be between 0 and 1"),
        ({"guidance_scale": -0.1}, "guidance_scale must not be negative"),
        ({"sampler": "dpm"}, "sampler must be one of"),
        ({"sampler": "analytic"}, "must not be 'analytic' for a model without diffusion.eps_power"),
        ({"generators": make_generators(0, 3)}, "got 3 for a batch of 2"),
        ({"x_T": torch.zeros(2, 5)}, "x_T must have the shape"),
    ],
)
def test_sample_refuses_what_it_cannot_do(changes, message):
    arguments = {"context": {}, "generators": make_generators(0, 2), **changes}
    with pytest.raises(ValueError, match=message):
        sample(lambda x_t, t, context: x_t, DiffusionConfig(), (2, 4), **arguments)


def test_generators_are_stable_and_distinct():
    def first(generators):
        return [torch.randint(2**62, (1,), generator=g).item() for g in generators]

    assert first(make_generators(7, 5))[:3] == first(make_generators(7, 3))
    values = [v for seed in range(20) for v in first(make_generators(seed, 20))]
    assert len(set(values)) == 400  # seed + k would repeat along the diagonals
