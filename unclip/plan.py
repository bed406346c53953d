"""What a training run will cost, before it is paid for: `python -m unclip.plan CONFIG --gpus 64`.

CONFIG is any file of configs/prior, configs/decoder or configs/upsampler. The stage is built of
fake tensors, which have shapes and no memory, and one training step is run on them: torch's counter
adds up its FLOPs, and the storages that are alive at a time add up to its memory. Nothing is
downloaded: of open_clip's models only the sizes are read.

Shapes: B samples, N caption tokens, W text width, D width of CLIP's joint space.
"""

from __future__ import annotations

import json
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from unclip.clip import Text
from unclip.config import from_dict, one_line_errors, parse
from unclip.data.embeddings import is_embedding_folder
from unclip.diffusion import NoiseSchedule, diffusion_loss
from unclip.hub import load_clip_of
from unclip.models.layers import TransformerBlock
from unclip.models.unet import UNetBlock
from unclip.priors import AutoregressivePrior, OneStepPrior
from unclip.stages import DecoderStage, UpsamplerStage
from unclip.training.decoder import TrainDecoderConfig
from unclip.training.decoder import resolve as resolve_decoder
from unclip.training.prior import SECTIONS, TrainPriorConfig
from unclip.training.prior import resolve as resolve_prior
from unclip.training.prior_objectives import OBJECTIVES

GB = 10**9
DAY = 24 * 3600
JPEG_BYTES_PER_PIXEL = 0.25
"""Two bits a pixel, a common JPEG; `--sample-kilobytes` says it better."""


@dataclass(frozen=True)
class GPU:
    """What a GPU has: memory in GB and peak bf16 FLOP/s of dense matrix products."""

    memory_gb: float
    peak_flops: float


GPUS = {
    "a100": GPU(80, 312e12),  # NVIDIA A100 80GB SXM data sheet: 312 TFLOPS BF16, dense
    "h100": GPU(80, 989.4e12),  # NVIDIA H100 SXM data sheet: 1,979 TFLOPS BF16 with sparsity, half
    "h200": GPU(141, 989.4e12),  # NVIDIA H200 SXM data sheet: as the H100, with 141 GB
}
Strategy = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp", "zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """On what a run is planned."""

    gpus: int = 8
    """How many GPUs share the run."""
    gpu: Literal["a100", "h100", "h200"] = "h100"
    """Which ones."""
    gpu_memory_gb: float | None = None
    """Memory of a GPU of another kind, GB."""
    gpu_tflops: float | None = None
    """Peak bf16 TFLOP/s of a GPU of another kind, dense."""
    utilisation: float = 0.35
    """Share of the peak that training reaches, (0, 1]: measure it, or take what others reached."""
    micro_batch: int | None = None
    """Samples on a GPU at a time; None: batch_size over GPUs and accumulation steps."""
    sample_kilobytes: float | None = None
    """Stored size of a sample; None: a JPEG of image_size at 2 bits a pixel."""
    dataset_samples: float | None = None
    """Samples in the data set, to tell how often each is seen."""
    steps: int | None = None
    """Sampling steps; None: the paper's (Table 3): diffusion prior 64, decoder 250, upsamplers 27
    and 15."""
    guided: bool | None = None
    """Whether sampling is guided, which doubles its network calls; None: the decoder alone is."""
    out: Path | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
                raise ValueError(
                    f"{f.name} must be above 0; got {value}: leave it out, or raise it"
                )
        if self.utilisation > 1:
            raise ValueError(f"utilisation must lie in (0, 1]; got {self.utilisation}: use 0.35")

    @property
    def hardware(self) -> GPU:
        """One GPU."""
        known = GPUS[self.gpu]
        flops = known.peak_flops if self.gpu_tflops is None else self.gpu_tflops * 1e12
        return GPU(self.gpu_memory_gb or known.memory_gb, flops)


# --- one step on tensors without memory -----------------------------------------------------------


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operations made and that are still alive, each once
    however many tensors share it; `peak` is their most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: Any) -> None:
            del self.known[key]
            self.live -= size

        self.known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The sizes of a CLIP, and what it costs to run it, frozen, on one sample."""

    name: str
    embed_dim: int
    text_width: int
    context_length: int
    image_size: int
    parameters: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage as its training config describes it.

    Attributes:
        build: makes it. loss: its loss on B samples. encode: what is done once for B pictures
            before their first step. call: `steps_a_call` steps of sampling them, at full size.
    """

    name: str
    config: TrainPriorConfig | TrainDecoderConfig
    clip: Clip | None
    build: Callable[[], nn.Module]
    loss: Callable[[Any, int], Tensor]
    call: Callable[[Any, dict[str, Any]], Tensor]
    encode: Callable[[Any, int], dict[str, Any]]
    steps: int
    guided: bool
    candidates: int = 1
    steps_a_call: int = 1


@contextmanager
def fake() -> Iterator[None]:
    """Within the block tensors have shapes and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def open_stage(path: Path) -> Stage:
    """The stage that a training config describes.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no such config.
    """
    values = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must hold a training config; got {values!r}: use configs/*/*.yaml"
        )
    if "decoder" in values or "upsampler" in values:
        config = from_dict(TrainDecoderConfig, values)
        return _decoder(config) if config.decoder is not None else _upsampler(config)
    return _prior(from_dict(TrainPriorConfig, values))


def _captions(clip: Clip, count: int) -> dict[str, Tensor]:
    """Captions as long as the text encoder reads: the most that a batch can cost."""
    return {
        "text_encodings": torch.empty(count, clip.context_length, clip.text_width),
        "text_mask": torch.ones(count, clip.context_length, dtype=torch.bool),
    }


def _noised(schedule: NoiseSchedule, x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    timesteps = torch.zeros(len(x_0), dtype=torch.long)
    noise = torch.randn_like(x_0)
    return schedule.add_noise(x_0, noise, timesteps), noise, timesteps


def _prior(config: TrainPriorConfig) -> Stage:
    if config.linear is not None:
        raise ValueError(
            "a linear prior is solved in seconds, not trained: there is no plan to make"
        )
    clip = read_clip(config.clip or config.init or config.base or "shapes")
    config = resolve_prior(config, clip)  # type: ignore[arg-type]
    kind, own = SECTIONS[config.section], getattr(config, config.section)
    if kind is AutoregressivePrior and own.network.num_components is None:
        # The paper's share; how many a data set's embeddings need is not known before it is read.
        components = max(1, round(319 / 1024 * clip.embed_dim))
        own = replace(own, network=replace(own.network, num_components=components))
    tokens = getattr(own.network, "num_components", 1)

    def build() -> nn.Module:
        prior = kind(own)
        prior.require_statistics = lambda: None  # type: ignore[method-assign]  # they are unknown
        return prior

    def encode(prior: Any, count: int, **drop: Any) -> dict[str, Any]:
        context: dict[str, Any] = prior.network.encode_context(
            text_embed=torch.empty(count, clip.embed_dim), **_captions(clip, count), **drop
        )
        return context

    def loss(prior: Any, count: int) -> Tensor:
        objective = OBJECTIVES[kind](prior, None)  # type: ignore[arg-type]
        dropped = torch.rand(count) < own.network.text_drop_prob
        drop = {"drop_text": dropped} if own.network.null_text == "learned" else {}
        embeds = [torch.empty(count, clip.embed_dim) for _ in range(2)]
        text = Text(embeds[0], *_captions(clip, count).values())
        context = encode(prior, count, **drop)
        losses = objective.losses(embeds[1], text, dropped, context, None)  # type: ignore[arg-type]
        return losses["loss"]

    def call(prior: Any, context: dict[str, Any]) -> Tensor:
        count = len(context["prefix_mask"])
        given = (torch.empty(count, clip.embed_dim), _timesteps(count))
        if kind is AutoregressivePrior:  # all tokens at once cost what they cost one by one
            given = (_timesteps(count), torch.zeros(count, tokens, dtype=torch.long))
        drawn: Tensor = prior.network(*given, context)
        return drawn

    return Stage(
        name=f"{kind.kind} prior",
        config=config,
        clip=clip,
        build=build,
        loss=loss,
        call=call,
        encode=encode,
        steps=tokens if kind is AutoregressivePrior else 1 if kind is OneStepPrior else 64,
        steps_a_call=tokens,
        guided=False,
        candidates=2,
    )


def _decoder(config: TrainDecoderConfig) -> Stage:
    clip = read_clip(config.clip or config.init or config.base or "shapes")
    config = resolve_decoder(config, clip)  # type: ignore[arg-type]
    assert config.decoder is not None
    own = config.decoder
    network, schedule = own.network, NoiseSchedule(own.diffusion)
    side = network.unet.image_size

    def encode(decoder: DecoderStage, count: int, **drop: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"image_embed": torch.empty(count, clip.embed_dim), **drop}
        if network.text_encodings_dim is not None:
            given |= _captions(clip, count)
        if network.text_embed_dim is not None:
            given["text_embed"] = torch.empty(count, clip.embed_dim)
        return decoder.network.encode_context(**given)

    def loss(decoder: DecoderStage, count: int) -> Tensor:
        count *= config.noise_draws
        x_0 = torch.empty(count, 3, side, side)
        x_t, noise, timesteps = _noised(schedule, x_0)
        drop = {"drop_image": torch.rand(count) < network.image_drop_prob}
        if network.null_text == "learned" and (
            network.text_encodings_dim or network.text_embed_dim
        ):
            drop["drop_text"] = torch.rand(count) < network.text_drop_prob
        output = decoder.network(x_t, timesteps, encode(decoder, count, **drop))
        return diffusion_loss(schedule, output, x_0, noise, timesteps)["loss"].mean()

    def call(decoder: DecoderStage, context: dict[str, Any]) -> Tensor:
        count = len(context["emb"])
        return decoder.network(torch.empty(count, 3, side, side), _timesteps(count), context)

    return Stage(
        name="decoder",
        config=config,
        clip=clip,
        build=lambda: DecoderStage(own),
        loss=loss,
        call=call,
        encode=encode,
        steps=250,
        guided=True,
    )


def _upsampler(config: TrainDecoderConfig) -> Stage:
    assert config.upsampler is not None
    own = config.upsampler
    network, schedule = own.network, NoiseSchedule(own.diffusion)
    full = network.unet.image_size
    crop = config.source.crop_size or config.source.image_size

    def enlarged(upsampler: UpsamplerStage, count: int, side: int) -> dict[str, Any]:
        level = torch.rand(count) if network.noise_conditioning else None
        low_res = torch.empty(count, 3, side // network.scale, side // network.scale)
        return upsampler.network.encode_context(low_res=low_res, noise_level=level)

    def loss(upsampler: UpsamplerStage, count: int) -> Tensor:
        x_0 = torch.empty(count, 3, crop, crop)
        x_t, noise, timesteps = _noised(schedule, x_0)
        output = upsampler.network(x_t, timesteps, enlarged(upsampler, count, crop))
        return diffusion_loss(schedule, output, x_0, noise, timesteps)["loss"].mean()

    def call(upsampler: UpsamplerStage, context: dict[str, Any]) -> Tensor:
        count = len(context["low_res"])
        return upsampler.network(torch.empty(count, 3, full, full), _timesteps(count), context)

    return Stage(
        name=f"upsampler to {full} px",
        config=config,
        clip=None,
        build=lambda: UpsamplerStage(own),
        loss=loss,
        call=call,
        encode=lambda upsampler, count: enlarged(upsampler, count, full),
        steps=27 if full <= 256 else 15,
        guided=False,
    )


def _timesteps(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.long)


def read_clip(name: str) -> Clip:
    """The sizes of a CLIP; one of open_clip's by tag is not downloaded."""
    architecture = name.partition("/")[0]
    if architecture in open_clip.list_models():
        sizes = open_clip.get_model_config(architecture)
        image_size, text = sizes["vision_cfg"]["image_size"], sizes["text_cfg"]
        if "width" not in text:
            raise ValueError(
                f"the CLIP {name} has a text tower of transformers' whose sizes open_clip does not "
                "list: name a folder that holds it"
            )
        length = text.get("context_length", 77)
        with torch.device("meta"), torch.no_grad():
            logging.disable(logging.WARNING)  # that there are no weights is what is wanted
            try:
                model: Any = open_clip.create_model(architecture, device="meta")
            finally:
                logging.disable(logging.NOTSET)
            tokens = torch.zeros(1, length, dtype=torch.long)
            picture = torch.empty(1, 3, image_size, image_size)
            flops = count_flops(lambda: (model.encode_image(picture), model.encode_text(tokens)))
        width, embed_dim = text["width"], sizes["embed_dim"]
        parameters = count_parameters(model)
    else:
        clip = load_clip_of(name)
        length, width, embed_dim = clip.context_length, clip.text_width, clip.embed_dim
        image_size = clip.required_image_size()
        picture = torch.zeros(1, 3, image_size, image_size)
        flops = count_flops(lambda: (clip.encode_image(picture), clip.encode_text(["a"])))
        parameters = count_parameters(clip)
    return Clip(
        name=name,
        embed_dim=embed_dim,
        text_width=width,
        context_length=length,
        image_size=image_size,
        parameters=parameters,
        flops=flops,
    )


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of what `run` does: two for each multiplication and addition of a matrix product."""
    # Fused attention has a kernel for each device, and torch counts not all of them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def step_memory(stage: Stage, module: Any, batch: int, gradients: bool) -> int:
    """Bytes that a training step on `batch` samples needs at its peak beyond the weights: what is
    kept for the backward pass, what is made on the way, and, if they are counted, the gradients
    that are there by then.
    """
    autocast = torch.autocast(
        "cpu", torch.bfloat16, enabled=stage.config.fit.mixed_precision in ("bf16", "fp16")
    )
    memory = LiveMemory()
    for tensor in (*module.parameters(), *module.buffers()):
        memory.see(tensor)
    before = memory.live
    memory.peak = 0
    hooks = []
    if not gradients:  # each is let go of as soon as it is whole
        trained = [p for p in module.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained]
    with memory:
        with autocast:
            loss = stage.loss(module, batch)
        loss.backward()
    del loss
    module.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return memory.peak - before


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


# --- the plan -------------------------------------------------------------------------------------


def memory_parts(
    stage: Stage, module: nn.Module, batch: int, plan: PlanConfig
) -> dict[Strategy, dict[str, float]]:
    """Bytes a GPU by part under each strategy.

    Weights, gradients, Adam's two moments and the average are fp32 (4 bytes each) under DDP and
    FSDP. ZeRO counts as its paper does (Rajbhandari et al. 2020, section 3.1): bf16 weights and
    gradients, and an fp32 copy of the weights with the moments. What is sharded is divided by the
    number of GPUs; a sharded model gathers two blocks at a time.
    """
    config, gpus = stage.config.fit, plan.gpus
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    whole = 4.0 * count
    average = whole if config.ema_decay > 0 else 0.0
    blocks = [m for m in module.modules() if isinstance(m, (TransformerBlock, UNetBlock))]
    gathered = 2 * 2.0 * max(map(count_parameters, blocks), default=0) if gpus > 1 else 0.0
    # Where gradients are whole they are counted by their own part, all of them; at the step's peak
    # only some are there.
    activations = {
        True: max(step_memory(stage, module, batch, gradients=True) - whole, 0.0),
        False: float(step_memory(stage, module, batch, gradients=False)),
    }
    frozen = 4.0 * stage.clip.parameters if stage.clip is not None else 0.0
    shard = 1 / gpus
    parts: dict[Strategy, dict[str, float]] = {
        "ddp": {
            "weights": whole,
            "gradients": whole,
            "optimizer": 2 * whole,
            "ema": average,
            "buckets": whole if gpus > 1 else 0.0,  # DDP's copy of the gradients, in transit
        },
        "fsdp": {
            "weights": whole * shard,
            "gradients": whole * shard,
            "optimizer": 2 * whole * shard,
            "ema": average * shard,
            "buckets": gathered,
        },
        "zero1": {
            "weights": whole / 2,
            "gradients": whole / 2,
            "optimizer": 3 * whole * shard,
            "ema": average,
            "buckets": 0.0,
        },
    }
    parts["zero2"] = {**parts["zero1"], "gradients": whole / 2 * shard}
    parts["zero3"] = {
        **parts["zero2"],
        "weights": whole / 2 * shard,
        "ema": average * shard,
        "buckets": gathered,
    }
    for name, part in parts.items():
        part |= {"clip": frozen, "activations": activations[name == "ddp"]}
        part["total"] = sum(part.values())
    return parts


def micro_batch(stage: Stage, plan: PlanConfig) -> int:
    """Samples on a GPU at a time; raises ValueError where the batch cannot be shared out."""
    if plan.micro_batch is not None:
        return plan.micro_batch
    fit = stage.config.fit
    shares = plan.gpus * fit.gradient_accumulation_steps
    if fit.batch_size % shares:
        raise ValueError(
            f"fit.batch_size must be a multiple of gpus x gradient_accumulation_steps = {shares}; "
            f"got {fit.batch_size}: change --gpus, or set --micro-batch"
        )
    return fit.batch_size // shares


def make_plan(path: Path, plan: PlanConfig) -> dict[str, Any]:
    """Everything that the command prints, in plain numbers: bytes, FLOPs, seconds."""
    stage = open_stage(path)
    fit, source, gpu = stage.config.fit, stage.config.source, plan.hardware
    batch = micro_batch(stage, plan)
    with fake():
        module = stage.build()
        network_flops = count_flops(lambda: stage.loss(module, 1).backward())
        module.zero_grad(set_to_none=True)
        one, two = (step_memory(stage, module, n, gradients=False) for n in (batch, 2 * batch))
        with torch.no_grad():
            encode_flops = count_flops(lambda: stage.encode(module, 1))
            context = stage.encode(module, 1)
            call_flops = count_flops(lambda: stage.call(module, context))
        memory = memory_parts(stage, module, batch, plan)
        parameters = count_parameters(module)
    has_embeddings = any(map(is_embedding_folder, source.names))
    clip_flops = 0 if stage.clip is None or has_embeddings else stage.clip.flops
    sample_flops = network_flops + clip_flops
    samples = fit.max_steps * fit.batch_size
    seconds = samples * sample_flops / (plan.gpus * gpu.peak_flops * plan.utilisation)
    kilobytes = plan.sample_kilobytes or source.image_size**2 * JPEG_BYTES_PER_PIXEL / 1000
    slope = (two - one) / batch
    steps = plan.steps or stage.steps
    twice = 2 if (stage.guided if plan.guided is None else plan.guided) else 1
    picture_flops = twice * (
        encode_flops + steps / stage.steps_a_call * stage.candidates * call_flops
    )
    return {
        "config": str(path),
        "stage": stage.name,
        "parameters": parameters,
        "clip": None if stage.clip is None else stage.clip.name,
        "clip_parameters": 0 if stage.clip is None else stage.clip.parameters,
        "gpus": plan.gpus,
        "gpu_memory_bytes": gpu.memory_gb * GB,
        "utilisation": plan.utilisation,
        "micro_batch": batch,
        "training": {
            "network_flops_a_sample": network_flops,
            "clip_flops_a_sample": clip_flops,
            "samples": samples,
            "epochs": None if plan.dataset_samples is None else samples / plan.dataset_samples,
            "flops": samples * sample_flops,
            "days": seconds / DAY,
            "gpu_hours": plan.gpus * seconds / 3600,
            "bytes_read": samples * kilobytes * 1000,
            "samples_a_second": samples / seconds,
            "bytes_a_second": samples * kilobytes * 1000 / seconds,
        },
        "memory": {
            name: {**parts, "micro_batch_that_fits": _most(parts, gpu, batch, slope)}
            for name, parts in memory.items()
        },
        "sampling": {
            "steps": steps,
            "network_calls": steps * twice * stage.candidates,
            "flops_a_picture": picture_flops,
            "seconds_a_picture": picture_flops / (gpu.peak_flops * plan.utilisation),
        },
    }


def _most(parts: dict[str, float], gpu: GPU, batch: int, slope: float) -> int:
    """Samples that a GPU holds at a time, with a tenth of it left for the library's own."""
    room = 0.9 * gpu.memory_gb * GB - parts["total"]
    return max(0, batch + int(room // slope)) if slope else batch


def describe(result: dict[str, Any]) -> str:
    """The plan for people."""
    training, sampling = result["training"], result["sampling"]
    network, clip = training["network_flops_a_sample"], training["clip_flops_a_sample"]
    lines = [
        f"{result['config']}: {result['stage']}, {result['parameters'] / 1e6:,.1f}M parameters",
        f"training    {network / 1e9:,.1f} GFLOPs a sample"
        + (f", and {clip / 1e9:,.1f} of the frozen CLIP" if clip else ""),
        f"            {training['samples'] / 1e6:,.1f}M samples"
        + (f", {training['epochs']:.2f} epochs" if training["epochs"] else "")
        + f"; {training['flops']:.2e} FLOPs",
        f"time        {training['days']:,.1f} days, {training['gpu_hours']:,.0f} GPU-hours on "
        f"{result['gpus']} GPUs at {100 * result['utilisation']:.0f}% of their peak",
        f"data        {training['bytes_read'] / 1e12:,.2f} TB read; "
        f"{training['samples_a_second']:,.0f} samples and "
        f"{training['bytes_a_second'] / 1e6:,.1f} MB a second",
        f"memory      GB a GPU at {result['micro_batch']} samples",
    ]
    names = [name for name in next(iter(result["memory"].values())) if name[:5] != "micro"]
    lines.append(" " * 12 + "".join(f"{name:>12}" for name in (*names, "samples fit")))
    for strategy, parts in result["memory"].items():
        cells = "".join(f"{parts[name] / GB:>12.2f}" for name in names)
        lines.append(f"  {strategy:<10}{cells}{parts['micro_batch_that_fits']:>12}")
    lines.append(
        f"sampling    {sampling['steps']} steps, {sampling['network_calls']} network calls, "
        f"{sampling['flops_a_picture'] / 1e12:,.2f} TFLOPs and "
        f"{sampling['seconds_a_picture']:.3g} s a picture"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan of one training config."""
    words = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors():
        if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
            raise ValueError("name a training config first: python -m unclip.plan CONFIG --gpus 64")
        flags = words if words[0] in ("-h", "--help") else words[1:]
        plan = parse(PlanConfig, flags, description=__doc__)
        result = make_plan(Path(words[0]), plan)
        if plan.out is not None:
            plan.out.parent.mkdir(parents=True, exist_ok=True)
            plan.out.write_text(json.dumps(result, indent=2) + "\n")
        print(describe(result))


if __name__ == "__main__":
    main()
