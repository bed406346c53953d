"""Degradations of the upsamplers' conditioning pictures."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur as torchvision_blur

from unclip.data import degradations
from unclip.data.degradations import (
    DegradationConfig,
    bsr_degradation,
    degrade,
    downsample,
    gaussian_blur,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(batch: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=seeded(0)) * 2 - 1


@pytest.mark.parametrize(("kernel_size", "sigma"), [(3, 0.6), (7, 1.5), (5, 0.01)])
def test_blur_is_torchvisions(kernel_size, sigma):
    images = random_images(2, 20, 31)
    expected = torchvision_blur(images, [kernel_size] * 2, [sigma] * 2)
    torch.testing.assert_close(gaussian_blur(images, kernel_size, sigma), expected)


def test_blur_with_a_sigma_for_each_image_equals_the_images_alone():
    images, sigmas = random_images(3), torch.tensor([0.4, 0.6, 1.1])
    alone = [gaussian_blur(images[k : k + 1], 5, float(sigmas[k])) for k in range(3)]
    torch.testing.assert_close(gaussian_blur(images, 5, sigmas), torch.cat(alone))


def test_blur_of_a_point_is_the_kernel_and_keeps_its_sum():
    image = torch.zeros(1, 3, 9, 9)
    image[:, 0, 4, 4] = 1
    blurred = gaussian_blur(image, 3, 0.6)
    side = math.exp(-0.5 / 0.6**2)
    assert blurred[0, 0, 4, 5] / blurred[0, 0, 4, 4] == pytest.approx(side)
    assert blurred[0, 0, 5, 5] / blurred[0, 0, 4, 4] == pytest.approx(side**2)
    assert blurred[0, 0].sum() == pytest.approx(1)
    assert blurred[0, 1:].abs().sum() == 0  # channels do not mix


def test_blur_keeps_flat_pictures_and_sigma_zero_is_no_blur():
    flat = torch.full((1, 3, 8, 8), -0.3)
    torch.testing.assert_close(gaussian_blur(flat, 5, 2.0), flat)
    images = random_images(2)
    torch.testing.assert_close(gaussian_blur(images, 3, torch.tensor([0.0, 0.0])), images)


def test_blur_refuses_kernels_that_are_even_or_too_wide():
    with pytest.raises(ValueError, match="odd"):
        gaussian_blur(random_images(1), 4)
    with pytest.raises(ValueError, match="at most 7"):
        gaussian_blur(random_images(1, 4, 4), 9)


def test_an_elliptic_kernel_has_the_variances_and_the_direction_asked_for():
    angle, variances = 0.5, (4.0, 1.0)
    kernel = degradations._elliptic_kernel(31, angle, variances)
    offsets = torch.arange(31.0) - 15
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    covariance = torch.tensor(
        [[(kernel * x * x).sum(), (kernel * x * y).sum()], [0, (kernel * y * y).sum()]]
    )
    cos, sin = math.cos(angle), math.sin(angle)
    assert kernel.sum() == pytest.approx(1)
    assert covariance[0, 0] == pytest.approx(4 * cos**2 + 1 * sin**2, rel=1e-3)
    assert covariance[1, 1] == pytest.approx(4 * sin**2 + 1 * cos**2, rel=1e-3)
    assert covariance[0, 1] == pytest.approx((4 - 1) * sin * cos, rel=1e-3)


def test_downsample_antialiases_and_keeps_the_mean():
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    checkerboard = ((x + y) % 2 * 2.0 - 1).expand(1, 3, 16, 16)
    small = downsample(checkerboard, 4)
    assert small.shape == (1, 3, 4, 4)
    assert small.abs().max() < 0.05  # grey, not black or white
    images = random_images(2)
    assert downsample(images, 2).mean() == pytest.approx(float(images.mean()), abs=0.01)
    assert downsample(images, 1) is images


def test_downsample_refuses_a_factor_that_does_not_divide():
    with pytest.raises(ValueError, match="divide the size 32x32; got 3"):
        downsample(random_images(1), 3)


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (7, 7)])
def test_bsr_keeps_size_and_range_and_changes_the_picture(size):
    images = random_images(3, *size)
    degraded = bsr_degradation(images, generator=seeded(1))
    assert degraded.shape == images.shape and degraded.dtype == images.dtype
    assert degraded.min() >= -1 and degraded.max() <= 1
    assert (degraded - images).abs().mean() > 0.02


def test_bsr_is_deterministic_and_every_image_has_its_own_chain():
    images = random_images(1).expand(4, -1, -1, -1)
    first = bsr_degradation(images, generator=seeded(1))
    assert torch.equal(first, bsr_degradation(images, generator=seeded(1)))
    assert not torch.equal(first, bsr_degradation(images, generator=seeded(2)))
    assert not torch.equal(first[0], first[1])


def test_with_a_generator_for_each_image_it_is_the_same_alone_or_in_a_batch():
    images = random_images(3)
    for config in (
        DegradationConfig(kind="bsr"),
        DegradationConfig(kind="blur", sigma_range=(0.2, 2)),
    ):
        batch = degrade(images, config, [seeded(k) for k in range(3)])
        alone = degrade(images[2:], config, [seeded(2)])
        torch.testing.assert_close(batch[2:], alone)
    with pytest.raises(ValueError, match="got 2 for 3"):
        bsr_degradation(images, generator=[seeded(0), seeded(1)])


def test_bsr_is_mild_on_a_smooth_picture():
    ramp = torch.linspace(-0.9, 0.9, 64).expand(8, 3, 64, 64)
    degraded = bsr_degradation(ramp, generator=seeded(0))
    assert (degraded - ramp).abs().mean() < 0.04  # about five grey levels of 255
    torch.testing.assert_close(degraded.mean(dim=(1, 2, 3)), torch.zeros(8), atol=0.02, rtol=0)


def test_noise_has_the_level_asked_for_and_both_kinds(monkeypatch):
    monkeypatch.setattr(degradations, "NOISE_LEVEL", (10.0, 10.0))
    grey = torch.zeros(1, 3, 64, 64)
    kinds = set()
    for seed in range(8):
        noise = degradations._random_noise(grey, seeded(seed))
        assert float(noise.std()) * 127.5 == pytest.approx(10, rel=0.05)
        kinds.add(torch.equal(noise[:, 0], noise[:, 1]))
    assert kinds == {True, False}


def test_degrade_does_what_the_config_says():
    images = random_images(2)
    assert degrade(images, DegradationConfig(), seeded(0)) is images
    blurred = degrade(images, DegradationConfig(kind="blur"), seeded(0))
    assert torch.equal(blurred, gaussian_blur(images, 3, 0.6))
    bsr = degrade(images, DegradationConfig(kind="bsr"), seeded(0))
    assert torch.equal(bsr, bsr_degradation(images, generator=seeded(0)))


def test_a_sigma_range_gives_each_image_a_sigma_within_it():
    images = random_images(1).expand(8, -1, -1, -1)
    config = DegradationConfig(kind="blur", kernel_size=5, sigma_range=(0.4, 0.9))
    rest = (degrade(images, config, seeded(0)) - images).pow(2).mean(dim=(1, 2, 3))
    low, high = (F.mse_loss(gaussian_blur(images[:1], 5, s), images[:1]) for s in (0.4, 0.9))
    assert rest.min() >= low and rest.max() <= high
    assert rest.std() > 0


@pytest.mark.parametrize(
    "field",
    [
        {"kind": "blurr"},
        {"kernel_size": 4},
        {"kernel_size": -1},
        {"sigma": 0.0},
        {"sigma_range": (0.9, 0.4)},
        {"sigma_range": (0.0, 0.4)},
    ],
)
def test_the_config_names_what_is_wrong(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"degradation.{name} must be .*; got .*: "):
        DegradationConfig(**field)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives():
    images = random_images(4)
    for config in (DegradationConfig(kind="blur"), DegradationConfig(kind="bsr")):
        here = degrade(images, config, seeded(0))
        there = degrade(images.cuda(), config, seeded(0))
        assert there.is_cuda
        # JPEG rounds: a tiny difference before it may be a grey level or two after it
        assert (there.cpu() - here).abs().mean() < 0.01


@pytest.mark.parametrize("kind", ["blur", "bsr"])
def test_autocast_changes_nothing(kind):
    images, config = random_images(2), DegradationConfig(kind=kind)
    plain = degrade(images, config, torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        cast = degrade(images, config, torch.Generator().manual_seed(3))
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
