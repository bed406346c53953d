"""Train a decoder or an upsampler: what `train_decoder.py` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from unclip.clip import FrozenCLIP
from unclip.config import one_line_errors, parse, to_dict
from unclip.data.degradations import DegradationConfig, degrade, downsample
from unclip.data.images import resize
from unclip.data.shapes import ShapesDataset
from unclip.data.source import SourceConfig, check_pictures, open_source
from unclip.diffusion import NoiseSchedule, diffusion_loss, make_generators
from unclip.glide import GlideStage
from unclip.hub import Stages, check_stages, load_stages, write_run_model
from unclip.lora import LoRAConfig
from unclip.stages import (
    Conditions,
    DecoderStage,
    DecoderStageConfig,
    SamplingOptions,
    UpsamplerStage,
    UpsamplerStageConfig,
)
from unclip.training.batches import collate
from unclip.training.finetune import (
    base_of,
    choose_trained,
    clip_for_training,
    save_trained,
    stage_of,
    start_from,
    warn_of_differences,
)
from unclip.training.fit import FitConfig, Objective, draw, fit
from unclip.training.noise import each, normal, uniform
from unclip.training.validation import held_out_data


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """The sample grid drawn now and then during training."""

    num_images: int = 16
    """Pictures in the grid; as many true ones stand beside them."""
    num_inference_steps: int = 20
    """DDIM steps."""
    guidance_scale: float = 2.0
    """Guidance of the decoder."""

    @property
    def sampling(self) -> SamplingOptions:
        """What a stage that is guided is sampled with."""
        return SamplingOptions(
            num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale
        )


@dataclass(frozen=True, kw_only=True)
class TrainDecoderConfig:
    """Everything `train_decoder.py` needs: exactly one of `decoder` and `upsampler` is set."""

    run: Path = Path("runs/decoder")
    """Folder of this run; the stage lands in its sub-folder `decoder` or `upsampler`."""
    fresh: bool = False
    """Start over, discarding what the run's folder holds."""
    base: str | None = None
    """Model whose CLIP the decoder stands on and whose stages complete it for sampling; None is
    `init`, or `shapes` where the run starts at random."""
    clip: str | None = None
    """Another CLIP: a folder, `hf-hub:org/name`, or an open_clip model/tag."""
    init: str | None = None
    """Model whose decoder or upsampler to start from: a name, a folder, or `org/name` on the Hub;
    None starts at random. Of several upsamplers it is the one to `upsampler`'s image_size. Network
    and diffusion are its own, whatever `decoder` or `upsampler` says; their drop probabilities,
    attention backend, checkpointing and loss weights hold."""
    freeze: tuple[str, ...] | None = None
    """Parts of the network that stay as they are: parameters or modules, `*` for any letters."""
    train_only: tuple[str, ...] | None = None
    """Parts of the network to train, in the same way; the rest stays as it is."""
    lora: LoRAConfig | None = None
    """Train a low-rank adapter of the init's stage instead; it lands in the sub-folder `lora`."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """Captioned pictures; an upsampler's are its large size, with `crop_size` a fourth (paper)."""
    val_data: str | None = None
    """Held-out pictures, read as `source` says; None is the shapes world's held-out split where
    that is trained on, else none."""
    decoder: DecoderStageConfig | None = None
    """Network and diffusion of a decoder; the CLIP's widths are filled in."""
    upsampler: UpsamplerStageConfig | None = None
    """Network and diffusion of an upsampler."""
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    """What is done to the small picture an upsampler is given (paper: blur, BSR at 1024 px)."""
    noise_level: float = 0.0
    """Most Gaussian noise added to the small picture, with `noise_conditioning`; [0, 1]."""
    noise_draws: int = 1
    """Timesteps and noises drawn for each picture of a decoder's batch. Where CLIP and the data
    cost as much as a small network, 2 makes more of each picture."""
    timestep_shift: float = 1.0
    """Above 1: the noisy timesteps, where the conditions tell most, are drawn more often."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """Sample grids."""
    fit: FitConfig = field(default_factory=FitConfig)
    """The loop."""

    def __post_init__(self) -> None:
        if (self.decoder is None) == (self.upsampler is None):
            raise ValueError(
                "exactly one of decoder and upsampler must be set; got "
                f"{'both' if self.decoder else 'neither'}: take a file of configs/decoder or "
                "configs/upsampler"
            )
        if self.noise_draws < 1:
            raise ValueError(f"noise_draws must be at least 1; got {self.noise_draws}: use 1")
        if self.timestep_shift <= 0:
            raise ValueError(f"timestep_shift must be above 0; got {self.timestep_shift}: use 1")
        if not 0 <= self.noise_level <= 1:
            raise ValueError(f"noise_level must lie in [0, 1]; got {self.noise_level}: use 0.2")


def _first_samples(dataset: Dataset[Any], count: int) -> dict[str, Any]:
    if isinstance(dataset, ShapesDataset):  # pictures whose combinations training never shows
        dataset = ShapesDataset(replace(dataset.config, split="held_out"))
        return collate(dataset.__getitems__(range(count)))
    return collate([dataset[i] for i in range(min(count, len(dataset)))])  # type: ignore[arg-type]


class DecoderObjective(Objective):
    """The decoder's loss (paper, section 2.1): denoise x given z_i and y, each dropped at times."""

    stage = "decoder"
    network: DecoderStage
    frozen: tuple[FrozenCLIP]

    def __init__(
        self,
        decoder: DecoderStage,
        clip: FrozenCLIP,
        config: TrainDecoderConfig,
        examples: dict[str, Any],
    ) -> None:
        super().__init__()
        self.network = decoder
        self.schedule = NoiseSchedule(decoder.config.diffusion)
        self.frozen = (clip,)
        self.preview_config = config.preview
        self.noise_draws = config.noise_draws
        self.timestep_shift = config.timestep_shift
        self.examples = examples

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of B captioned pictures."""
        (clip,), decoder = self.frozen, self.network
        image_embed = clip.encode_image(batch["image"])
        text = clip.encode_text(batch["caption"]).trimmed()
        x_0 = resize(batch["image"], decoder.image_size)
        if self.noise_draws > 1:
            rows = torch.arange(len(x_0), device=x_0.device).repeat(self.noise_draws)
            x_0, image_embed, text = x_0[rows], image_embed[rows], text.rows(rows)
        timesteps, noise = draw(x_0, self.schedule, generator, self.timestep_shift)
        dropped = uniform(generator, len(x_0), 2, device=x_0.device).T
        network = decoder.config.network
        context = decoder.encode_context(
            image_embed,
            text,
            drop_image=dropped[0] < network.image_drop_prob,
            drop_text=dropped[1] < network.text_drop_prob,
            empty=clip.null_text(network.null_text),
        )
        x_t = self.schedule.add_noise(x_0, noise, timesteps)
        output = decoder.network(x_t, timesteps, context)
        return _reported(
            diffusion_loss(self.schedule, output, x_0, noise, timesteps), timesteps, self
        )

    @torch.no_grad()
    def preview(self) -> Tensor:
        """True pictures, then what the decoder makes of their embeddings and captions."""
        (clip,) = self.frozen
        images = self.examples["image"].to(clip.device)
        drawn = self.network.sample(
            Conditions(
                image_embed=clip.encode_image(images),
                text=clip.encode_text(self.examples["caption"]),
                empty=clip.null_text(self.network.config.network.null_text),
            ),
            make_generators(0, len(images)),
            self.preview_config.sampling,
        )
        return torch.cat([resize(images, self.network.image_size), drawn])

    def export(self, folder: Path) -> None:
        """Write the decoder's folder, or its adapter's."""
        save_trained(self.network, folder)


class UpsamplerObjective(Objective):
    """An upsampler's loss (paper, section 2.1): denoise a crop given its degraded small version."""

    stage = "upsampler"
    network: UpsamplerStage

    def __init__(
        self, upsampler: UpsamplerStage, config: TrainDecoderConfig, examples: dict[str, Any]
    ) -> None:
        super().__init__()
        self.network = upsampler
        self.schedule = NoiseSchedule(upsampler.config.diffusion)
        self.degradation = config.degradation
        self.noise_level = config.noise_level
        self.timestep_shift = config.timestep_shift
        self.preview_config = config.preview
        self.examples = examples

    def _low_res(self, x_0: Tensor) -> Tensor:
        return downsample(x_0, self.network.config.network.scale)

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of B crops."""
        x_0, network = batch["image"], self.network.network
        timesteps, noise = draw(x_0, self.schedule, generator, self.timestep_shift)
        low_res = degrade(self._low_res(x_0), self.degradation, each(generator, len(x_0)))
        level = None
        if network.config.noise_conditioning:
            level = self.noise_level * uniform(generator, len(x_0), device=x_0.device)
            grain = normal(generator, *low_res.shape, device=x_0.device)
            low_res = low_res + level.view(-1, 1, 1, 1) * grain
        context = network.encode_context(low_res=low_res, noise_level=level)
        x_t = self.schedule.add_noise(x_0, noise, timesteps)
        output = network(x_t, timesteps, context)
        return _reported(
            diffusion_loss(self.schedule, output, x_0, noise, timesteps), timesteps, self
        )

    @torch.no_grad()
    def preview(self) -> Tensor:
        """Small pictures enlarged bicubically, what the upsampler makes of them, and the truth."""
        truth = self.examples["image"].to(next(self.network.parameters()).device)
        low_res = self._low_res(truth)
        drawn = self.network.sample(
            Conditions(low_res=low_res),
            make_generators(0, len(truth)),
            SamplingOptions(num_inference_steps=self.preview_config.num_inference_steps),
        )
        enlarged = F.interpolate(low_res, truth.shape[-1], mode="bicubic").clamp(-1, 1)
        return torch.cat([enlarged, drawn, truth])

    def export(self, folder: Path) -> None:
        """Write the upsampler's folder, or its adapter's."""
        save_trained(self.network, folder)


class GlideObjective(Objective):
    """The loss of one of GLIDE's networks (Nichol et al. 2021, sections 2.2 and 4): denoise a
    picture given its caption, which is dropped at times, and what else the network is shown: its
    small version, or what is left of it after a box has been erased."""

    network: GlideStage

    def __init__(
        self, glide: GlideStage, config: TrainDecoderConfig, examples: dict[str, Any]
    ) -> None:
        super().__init__()
        self.stage = "upsampler" if glide.is_upsampler else "decoder"
        self.network = glide
        self.schedule = NoiseSchedule(glide.config.diffusion)
        self.degradation = config.degradation
        self.timestep_shift = config.timestep_shift
        self.preview_config = config.preview
        self.examples = examples

    def _pictures(self, images: Tensor) -> Tensor:
        """A base network's pictures at its size; an upsampler's are crops as they come."""
        is_upsampler = self.network.is_upsampler
        return images if is_upsampler else resize(images, self.network.image_size)

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of B captioned pictures."""
        x_0, network = self._pictures(batch["image"]), self.network.network
        timesteps, noise = draw(x_0, self.schedule, generator, self.timestep_shift)
        tokens, token_mask = self.network.tokenize(batch["caption"])
        dropped = uniform(generator, len(x_0), device=x_0.device)
        shown: dict[str, Tensor] = {}
        if network.config.scale is not None:
            low_res = downsample(x_0, network.config.scale)
            shown["low_res"] = degrade(low_res, self.degradation, each(generator, len(x_0)))
        if network.config.inpainting:
            shown |= {"image": x_0, "keep": _outside_a_box(x_0, generator)}
        context = network.encode_context(
            tokens=tokens,
            token_mask=token_mask,
            drop_text=dropped < network.config.text_drop_prob,
            **shown,
        )
        x_t = self.schedule.add_noise(x_0, noise, timesteps)
        output = network(x_t, timesteps, context)
        return _reported(
            diffusion_loss(self.schedule, output, x_0, noise, timesteps), timesteps, self
        )

    @torch.no_grad()
    def preview(self) -> Tensor:
        """True pictures, then what the network makes of their captions (and small versions)."""
        truth = self._pictures(self.examples["image"].to(next(self.network.parameters()).device))
        conditions = Conditions(captions=self.examples["caption"])
        if (scale := self.network.config.network.scale) is not None:
            conditions = replace(conditions, low_res=downsample(truth, scale))
        drawn = self.network.sample(
            conditions,
            make_generators(0, len(truth)),
            self.preview_config.sampling,
        )
        return torch.cat([truth, drawn])

    def export(self, folder: Path) -> None:
        """Write the stage's folder, or its adapter's."""
        save_trained(self.network, folder)


def _outside_a_box(x_0: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 1, H, W] bool, False in one random box a picture: what an inpainting network is to
    paint."""

    def between(length: int) -> Tensor:
        ends = uniform(generator, len(x_0), 2, device=x_0.device) * length
        places = torch.arange(length, device=x_0.device)
        return (places >= ends.amin(1)[:, None]) & (places <= ends.amax(1)[:, None])

    rows, columns = (between(length) for length in x_0.shape[-2:])
    return ~(rows[:, None, :, None] & columns[:, None, None, :])


def _reported(losses: dict[str, Tensor], timesteps: Tensor, objective: Any) -> dict[str, Tensor]:
    """Per-sample losses as `fit` wants them."""
    means = {name: value.mean() for name, value in losses.items()}
    return means | {
        "per_sample": losses["loss"].detach(),
        "timesteps": timesteps / objective.schedule.config.num_train_timesteps,
    }


def resolve(config: TrainDecoderConfig, clip: FrozenCLIP) -> TrainDecoderConfig:
    """The config with the widths of its CLIP filled in."""
    assert config.decoder is not None
    network = config.decoder.network
    # None means that the decoder is to see no captions; any number stands for the CLIP's own.
    text_width = None if network.text_encodings_dim is None else clip.text_width
    embed_width = None if network.text_embed_dim is None else clip.embed_dim
    network = replace(
        network,
        image_embed_dim=clip.embed_dim,
        text_encodings_dim=text_width,
        text_embed_dim=embed_width,
    )
    return replace(config, decoder=replace(config.decoder, network=network))


def _upsampler_of(name: str, image_size: int) -> UpsamplerStage | GlideStage:
    """The upsampler to `image_size` of a model, or the only one it has."""
    upsamplers = load_stages(name, only=["upsamplers"]).upsamplers
    for upsampler in upsamplers:
        if upsampler.image_size == image_size or len(upsamplers) == 1:
            assert isinstance(upsampler, UpsamplerStage | GlideStage)
            return upsampler
    sizes = " and ".join(str(upsampler.image_size) for upsampler in upsamplers) or "none"
    raise ValueError(
        f"init must have an upsampler to {image_size} px; got {name}, which has {sizes}: leave "
        "init out, or change upsampler.network.unet.image_size"
    )


def main(argv: Sequence[str] | None = None, default_config: Path | None = None) -> None:
    """Parse the command line and train."""
    config = parse(TrainDecoderConfig, argv, default_config=default_config, description=__doc__)
    with one_line_errors():
        train(config)


def train(config: TrainDecoderConfig) -> None:
    """Train what `config` describes, into its run's folder."""
    torch.manual_seed(config.fit.seed)
    base = base_of(config.base, config.init, config.run, config.lora)
    config = replace(config, base=base)
    objective: DecoderObjective | UpsamplerObjective | GlideObjective
    own: DecoderStageConfig | UpsamplerStageConfig
    clip, initial = None, None
    if config.decoder is not None:
        if config.init is not None:
            initial = stage_of(config.init, "decoder")
        if not isinstance(initial, GlideStage):
            clip = clip_for_training(config.clip, base, config.init)
            config = resolve(config, clip)
        assert config.decoder is not None
        own = config.decoder
    else:
        assert config.upsampler is not None
        own = config.upsampler
        if config.init is not None:
            initial = _upsampler_of(config.init, own.network.unet.image_size)
    check_pictures(config.source, "to train a decoder on")
    dataset = open_source(config.source)
    examples = _first_samples(dataset, config.preview.num_images)
    if isinstance(initial, GlideStage):
        objective = GlideObjective(start_from(initial, own), config, examples)
    elif isinstance(own, DecoderStageConfig):
        assert clip is not None
        decoder = DecoderStage(own) if initial is None else start_from(initial, own)
        check_stages(Stages(clip=clip, decoder=decoder), str(config.init))
        objective = DecoderObjective(decoder, clip, config, examples)
    else:
        upsampler = UpsamplerStage(own) if initial is None else start_from(initial, own)
        objective = UpsamplerObjective(upsampler, config, examples)
    stage, section, adapts = objective.network, objective.stage, None
    fingerprint = None if clip is None else clip.fingerprint()
    choose_trained(
        stage.network,
        freeze=config.freeze,
        train_only=config.train_only,
        lora=config.lora,
        init=config.init,
    )
    if config.lora is not None:
        adapts = section if section == "decoder" else f"upsampler_{stage.image_size}"
        objective.stage = "lora"

    def prepare_run(run: Path) -> None:
        write_run_model(run, objective.stage, base, config.clip, fingerprint, adapts)
        if config.init is not None:
            warn_of_differences(own, stage.config, section, config.init)

    fit(
        objective,
        dataset,
        config.fit,
        config.run,
        resolved={**to_dict(config), section: to_dict(stage.config)},
        fresh=config.fresh,
        prepare_run=prepare_run,
        validation=held_out_data(config.source, config.val_data),
    )
