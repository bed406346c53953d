"""Peak memory and time of loading a model of Karlo's size (3.3B parameters, random).

    python benchmarks/load_memory.py --work DIR

Writes the model into DIR (40 GB in all), once for each format and stored dtype, and loads each in
a process of its own, in bf16, every weight touched. The peak is what the process held at most
beyond what it held after its imports, mapped files included. `diffusers` loads the same parts
through diffusers' own classes, for comparison.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from unclip.checkpoint import unfilled
from unclip.diffusion import DiffusionConfig
from unclip.hub import Stages, load_stages, save_stages
from unclip.hub.__main__ import DTYPES
from unclip.hub.diffusers_format import write
from unclip.models import DecoderConfig, PriorTransformerConfig, UNetConfig, UpsamplerConfig
from unclip.priors import DiffusionPrior, DiffusionPriorConfig
from unclip.stages import (
    DecoderStage,
    DecoderStageConfig,
    UpsamplerStage,
    UpsamplerStageConfig,
)

FORMATS = ("unclip", "diffusers")
CASES = [
    ("unclip", "bfloat16", "unclip"),
    ("unclip", "float32", "unclip"),
    ("diffusers", "bfloat16", "unclip"),
    ("diffusers", "float32", "unclip"),
    ("diffusers", "bfloat16", "diffusers"),
    ("diffusers", "float32", "diffusers"),
]
"""Format, stored dtype, and who loads it."""
PARTS = ("prior", "decoder", "upsamplers")


def karlo(dtype: torch.dtype) -> Stages:
    """Prior, decoder and both super-resolution networks at Karlo's sizes, random."""
    eps = DiffusionConfig(prediction_type="eps")
    prior = DiffusionPriorConfig(
        network=PriorTransformerConfig(null_text="empty_prompt"), unit_norm=False
    )
    decoder = DecoderStageConfig(
        network=DecoderConfig(
            unet=UNetConfig(width=320, out_channels=6, context_dim=1536),
            text_encodings_dim=768,
            text_embed_dim=768,
            null_text="empty_prompt",
            learned_variance=True,
        ),
        diffusion=DiffusionConfig(prediction_type="eps", variance="learned_range"),
    )
    unet = UNetConfig(
        image_size=256, in_channels=6, width=320, scale_shift=False, attention_resolutions=()
    )
    upsampler = UpsamplerStageConfig(
        network=UpsamplerConfig(unet=unet), final_network=True, diffusion=eps
    )

    def filled(make: Callable[[], nn.Module]) -> nn.Module:
        module = unfilled(make).to(dtype).to_empty(device="cpu")
        noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) / 50
        for parameter in module.parameters():
            flat = parameter.data.view(-1)
            for start in range(0, len(flat), len(noise)):
                part = flat[start : start + len(noise)]
                part.copy_(noise[: len(part)])
        return module

    stages = Stages(
        prior=filled(lambda: DiffusionPrior(prior)),  # type: ignore[arg-type]
        decoder=filled(lambda: DecoderStage(decoder)),  # type: ignore[arg-type]
        upsamplers=[filled(lambda: UpsamplerStage(upsampler))],  # type: ignore[list-item]
    )
    assert stages.prior is not None
    stages.prior.set_statistics(torch.zeros(768), torch.ones(768))
    return stages


def memory(field: str) -> int:
    """Bytes of this process, now (`VmRSS`) or at most (`VmHWM`); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def loaded(folder: Path, loader: str) -> Iterator[nn.Module]:
    """The model's networks, in bf16."""
    if loader == "unclip":
        stages = load_stages(folder, dtype=torch.bfloat16, only=PARTS)
        yield from (part for part in (stages.prior, stages.decoder, *stages.upsamplers) if part)
        return
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    for name, (_, class_name) in ((k, v) for k, v in index.items() if isinstance(v, list)):
        if (folder / name / "config.json").is_file():
            if class_name == "UnCLIPTextProjModel":
                from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel as part_class
            else:
                part_class = getattr(diffusers, class_name)
            yield part_class.from_pretrained(folder / name, torch_dtype=torch.bfloat16)


def measure(folder: Path, loader: str) -> None:
    """Load and print figures as JSON."""
    import diffusers
    import diffusers.models  # noqa: F401

    baseline, start = memory("VmRSS"), time.perf_counter()
    modules = list(loaded(folder, loader))
    seconds = time.perf_counter() - start
    weights = [t for module in modules for t in module.state_dict().values()]
    size = sum(t.nbytes for t in weights)
    for tensor in weights:
        tensor.float().sum() if tensor.numel() < 2**24 else tensor.view(-1)[::16].sum()
    peak = memory("VmHWM") - baseline
    count = sum(t.numel() for t in weights)
    print(json.dumps({"parameters": count, "bytes": size, "peak": peak, "seconds": seconds}))


def main() -> None:
    """Parse the command line; write, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "LOADER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(Path(args.measure[0]), args.measure[1])
        return
    print("| format, stored as | loaded by | weights, GB | peak, GB | ratio | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for format_name, stored, loader in CASES:
        folder = args.work / f"{format_name}-{stored}"
        if not folder.is_dir():
            stages = karlo(DTYPES[stored])
            (save_stages if format_name == "unclip" else write)(stages, folder, None)
            del stages
        command = [sys.executable, __file__, "--work", str(args.work)]
        command += ["--measure", str(folder), loader]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        size, peak = found["bytes"] / 1e9, found["peak"] / 1e9
        print(
            f"| {format_name}, {stored} | {loader} | {size:.2f} | {peak:.2f} | {peak / size:.2f} "
            f"| {found['seconds']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
