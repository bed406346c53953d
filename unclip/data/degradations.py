"""How the low-resolution picture that conditions an upsampler is made slightly worse in training.

An upsampler sees clean downsampled pictures in training, but a decoder's pictures when sampling.
Degrading the former makes it robust to the latter.  unCLIP (Ramesh et al. 2022, section 2.3) uses
a Gaussian blur for 64 -> 256 and the more diverse BSR degradation (Zhang et al. 2021, in the light
form of latent diffusion) for 256 -> 1024.

Pictures are float tensors [B, 3, H, W] in [-1, 1] and stay on their device.  Random numbers come
from the given generator (one for the batch, or one a picture, so that picture k is the same alone
or in a batch) and are drawn on the generator's own device; a CPU generator avoids GPU waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

Generators = torch.Generator | Sequence[torch.Generator]
T = TypeVar("T")

# The light BSR degradation of latent diffusion, which lowers every strength of Zhang et al. It was
# written for a picture that is then shrunk 4 times; ours are shrunk already, so its total shrinking
# of up to 8 is a factor of up to 2 here.
ISOTROPIC_SIGMA = (0.1, 0.7)  # pixels
ANISOTROPIC_VARIANCE = (0.01, 2.0)  # pixels^2, along each axis of the ellipse
BLUR_KERNEL_SIZES = (5, 7)
RESIZE_SCALE = (0.5, 1.0)
RESIZE_MODES: tuple[Literal["bilinear", "bicubic", "area"], ...] = ("bilinear", "bicubic", "area")
NOISE_LEVEL = (1.0, 2.0)  # standard deviation in 8-bit grey levels
JPEG_QUALITY = (80, 95)


@dataclass(frozen=True, kw_only=True)
class DegradationConfig:
    """What is done to an upsampler's conditioning pictures in training."""

    kind: Literal["none", "blur", "bsr"] = "none"
    """`blur` is a Gaussian blur (64 -> 256 in the paper), `bsr` the random chain (256 -> 1024)."""

    kernel_size: int = 3
    """Side of the blur's kernel in pixels; odd. Used by `blur`."""

    sigma: float = 0.6
    """Standard deviation of the blur in pixels (0.6 in the paper). Used by `blur`."""

    sigma_range: tuple[float, float] | None = None
    """If set, each picture draws its own sigma uniformly from (low, high) in place of `sigma`."""

    def __post_init__(self) -> None:
        if self.kind not in ("none", "blur", "bsr"):
            raise ValueError(
                f"degradation.kind must be none, blur or bsr; got {self.kind!r}: choose one of them"
            )
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"degradation.kernel_size must be odd and positive; got {self.kernel_size}: "
                f"use {max(self.kernel_size, 0) + 1}"
            )
        if not self.sigma > 0:
            raise ValueError(
                f"degradation.sigma must be positive; got {self.sigma}: "
                "use kind: none to leave the pictures as they are"
            )
        if self.sigma_range is not None:
            low, high = self.sigma_range
            if not 0 < low <= high:
                raise ValueError(
                    f"degradation.sigma_range must be 0 < low <= high; got {self.sigma_range}: "
                    "give the smaller sigma first, for example [0.4, 0.8]"
                )


def degrade(images: Tensor, config: DegradationConfig, generator: Generators) -> Tensor:
    """Degrade [B, 3, H, W] in [-1, 1] as `config` says; the shape and the range stay, and so does
    fp32 within autocast, in which a blur would leave pictures of 8 bits' precision."""
    if config.kind == "none":
        return images
    with torch.autocast(images.device.type, enabled=False):
        if config.kind == "bsr":
            return bsr_degradation(images, generator=generator)
        if config.sigma_range is None:
            return gaussian_blur(images, config.kernel_size, config.sigma)
        sigmas = [_uniform(*config.sigma_range, g) for g in _one_each(generator, len(images))]
        return gaussian_blur(images, config.kernel_size, torch.tensor(sigmas))


def gaussian_blur(images: Tensor, kernel_size: int = 3, sigma: float | Tensor = 0.6) -> Tensor:
    """Blur [B, 3, H, W] with a normalised Gaussian kernel of `kernel_size` pixels.

    `sigma` is in pixels, one for all pictures or [B] for one each.  The border is reflected, so a
    flat picture stays flat.  Raises ValueError if the kernel is even or wider than the reflection.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive; got {kernel_size}")
    sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=images.device)
    sigmas = sigmas.clamp(min=1e-3)  # so that 0 is no blur, not 0 / 0
    offsets = torch.arange(kernel_size, device=images.device) - kernel_size // 2
    weights = torch.exp(-0.5 * (offsets / sigmas.reshape(-1, 1)) ** 2)  # [B or 1, K]
    weights = weights / weights.sum(dim=1, keepdim=True)
    return _convolve(images, weights[:, :, None] * weights[:, None, :])


def downsample(images: Tensor, factor: int) -> Tensor:
    """Shrink [B, 3, H, W] in [-1, 1] `factor` times: antialiased bicubic, clamped to [-1, 1].

    Raises ValueError unless `factor` divides the height and the width.
    """
    height, width = images.shape[-2:]
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"factor must divide the size {height}x{width}; got {factor}")
    if factor == 1:
        return images
    size = (height // factor, width // factor)
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)


def bsr_degradation(images: Tensor, *, generator: Generators) -> Tensor:
    """Degrade each picture by its own random chain; [B, 3, H, W] in [-1, 1] in and out.

    Two blurs, a shrinking, noise and a JPEG compression follow in random order; then the picture
    returns to its size and is compressed once more, as in Zhang et al. 2021 with the strengths of
    latent diffusion's light form.  Deterministic given the generator; no gradient flows through.
    """
    generators = _one_each(generator, len(images))
    with torch.no_grad():
        pairs = zip(images.split(1), generators, strict=True)
        return torch.cat([_bsr_chain(image, g) for image, g in pairs])


def _bsr_chain(image: Tensor, generator: torch.Generator) -> Tensor:
    size = image.shape[-2:]
    steps: list[Callable[[Tensor, torch.Generator], Tensor]] = [
        _random_blur,
        _random_blur,
        _random_shrink,
        _random_noise,
        _random_jpeg,
    ]
    for k in torch.randperm(len(steps), generator=generator, device=generator.device).tolist():
        image = steps[k](image, generator)
    image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1, 1)
    return _random_jpeg(image, generator)


def _random_blur(image: Tensor, generator: torch.Generator) -> Tensor:
    """Blur one picture by a round or, as often, an elliptic Gaussian."""
    kernel_size = _choice(BLUR_KERNEL_SIZES, generator)
    if _uniform(0, 1, generator) < 0.5:
        return gaussian_blur(image, kernel_size, _uniform(*ISOTROPIC_SIGMA, generator))
    angle = _uniform(0, math.pi, generator)
    variances = (
        _uniform(*ANISOTROPIC_VARIANCE, generator),
        _uniform(*ANISOTROPIC_VARIANCE, generator),
    )
    return _convolve(image, _elliptic_kernel(kernel_size, angle, variances).to(image.device)[None])


def _random_shrink(image: Tensor, generator: torch.Generator) -> Tensor:
    scale = _uniform(*RESIZE_SCALE, generator)
    mode = _choice(RESIZE_MODES, generator)
    height, width = (max(1, round(side * scale)) for side in image.shape[-2:])
    # No antialiasing here: aliasing is one of the faults that a real small picture may have.
    return F.interpolate(image, (height, width), mode=mode).clamp(-1, 1)


def _random_noise(image: Tensor, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise, as often the same in the three channels (grey) as not (coloured)."""
    level = _uniform(*NOISE_LEVEL, generator) / 127.5  # 8-bit levels to [-1, 1]
    channels = 1 if _uniform(0, 1, generator) < 0.5 else 3
    shape = (1, channels, *image.shape[-2:])
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return (image + level * noise.to(image)).clamp(-1, 1)


def _random_jpeg(image: Tensor, generator: torch.Generator) -> Tensor:
    low, high = JPEG_QUALITY
    quality = _choice(range(low, high + 1), generator)
    pixels = image[0].float().add(1).mul(127.5).round().clamp(0, 255).byte().cpu()
    pixels = decode_jpeg(encode_jpeg(pixels, quality), mode=ImageReadMode.RGB)
    return pixels.to(image).div(127.5).sub(1)[None]


def _elliptic_kernel(size: int, angle: float, variances: tuple[float, float]) -> Tensor:
    """A normalised Gaussian [size, size] whose principal axes are turned by `angle` radians."""
    offsets = torch.arange(size, dtype=torch.float32) - size // 2
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    weights = torch.exp(-0.5 * (along**2 / variances[0] + across**2 / variances[1]))
    return weights / weights.sum()


def _convolve(images: Tensor, kernels: Tensor) -> Tensor:
    """Correlate [B, C, H, W] with kernels [B or 1, K, K], reflecting the border."""
    batch, channels, height, width = images.shape
    radius = kernels.shape[-1] // 2
    if radius >= min(height, width):
        raise ValueError(
            f"a kernel of {kernels.shape[-1]} pixels does not fit pictures of {height}x{width}: "
            f"use a kernel_size of at most {2 * min(height, width) - 1}"
        )
    kernels = kernels.to(images.dtype).expand(batch, -1, -1)  # [B, K, K]
    kernels = kernels.repeat_interleave(channels, dim=0)[:, None]  # [B * C, 1, K, K]
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    blurred = F.conv2d(padded.flatten(0, 1)[None], kernels, groups=batch * channels)
    return blurred.reshape(batch, channels, height, width)


def _one_each(generator: Generators, count: int) -> Sequence[torch.Generator]:
    """One generator a picture; a single generator serves the pictures one after the other."""
    if isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise ValueError(
            f"generator must be one, or one a picture; got {len(generator)} for {count} pictures"
        )
    return generator


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    draw = torch.rand((), generator=generator, device=generator.device)
    return low + (high - low) * draw.item()


def _choice(options: Sequence[T], generator: torch.Generator) -> T:
    draw = torch.randint(len(options), (), generator=generator, device=generator.device)
    return options[int(draw)]
