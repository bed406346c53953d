"""What several tests share: a whole model at random weights, small enough to draw in no time."""

import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

# A test that asks the Hub for anything but what it put into a local cache is a mistake.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts beside the package

CLIP_CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    "text_cfg": {"context_length": 20, "width": 32, "heads": 2, "layers": 2},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate's state is one a process; each test may ask for another precision."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@contextmanager
def full_disk(room: int = 10_000) -> Iterator[None]:
    """Within the block no file can grow beyond `room` bytes: a write that fails half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_parity(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Ours is theirs to 2e-5 in fp32. `pytest -s -k parity` prints the table of docs/interop.md."""
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    print(f"\n| {what} | {error:.1e} | {scale:.1f} |", end="")
    assert scale > 0.1, "an answer of nothing agrees with everything"
    assert error <= 2e-5, f"{what}: off by {error:.1e}"


def write_tiny_clip(folder: Path, embed_dim: int = 16, seed: int = 0, **text: int) -> None:
    """A CLIP folder at random weights, in open_clip's layout; `text` sizes its text tower."""
    from unclip.checkpoint import save_weights
    from unclip.clip import BPE_NAME, new_clip, write_clip_config, write_vocabulary

    folder.mkdir(parents=True)
    write_vocabulary(folder / BPE_NAME, 1024)
    torch.manual_seed(seed)
    text_cfg = {**CLIP_CFG["text_cfg"], **text}
    config = {**CLIP_CFG, "embed_dim": embed_dim, "text_cfg": text_cfg}
    model, tokenizer = new_clip(config, folder / BPE_NAME)
    write_clip_config(folder, config, tokenizer.vocab_size)
    save_weights(model.state_dict(), folder / "open_clip_model.safetensors")


def liven(network: nn.Module) -> None:
    """Random weights where the network starts at zero: a fresh one answers nothing to anything."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: CLIP of width 16, prior, decoder of 16 px, upsampler to 64 px.

    Treat it as read-only; copy it to change it.
    """
    from unclip.clip import load_clip
    from unclip.diffusion import DiffusionConfig
    from unclip.hub import Stages, save_stages
    from unclip.models import (
        DecoderConfig,
        PriorTransformerConfig,
        UNetConfig,
        UpsamplerConfig,
    )
    from unclip.priors import DiffusionPrior, DiffusionPriorConfig
    from unclip.stages import (
        DecoderStage,
        DecoderStageConfig,
        UpsamplerStage,
        UpsamplerStageConfig,
    )

    root = tmp_path_factory.mktemp("tiny")
    write_tiny_clip(root / "clip")
    clip = load_clip(str(root / "clip"))
    torch.manual_seed(0)
    prior = DiffusionPrior(
        DiffusionPriorConfig(
            network=PriorTransformerConfig(
                embed_dim=16,
                text_encodings_dim=32,
                max_text_len=20,
                width=32,
                depth=2,
                head_dim=16,
            )
        )
    )
    prior.fit_statistics(torch.nn.functional.normalize(torch.randn(64, 16), dim=-1))
    decoder = DecoderStage(
        DecoderStageConfig(
            network=DecoderConfig(
                unet=UNetConfig(
                    image_size=16,
                    width=32,
                    channel_mult=(1, 2),
                    num_res_blocks=1,
                    attention_resolutions=(4,),
                    head_dim=32,
                    patch_size=2,
                    context_dim=32,
                ),
                image_embed_dim=16,
                text_encodings_dim=32,
            ),
        )
    )
    upsampler = UpsamplerStage(
        UpsamplerStageConfig(
            network=UpsamplerConfig(
                unet=UNetConfig(
                    image_size=64,
                    in_channels=6,
                    width=32,
                    channel_mult=(1, 1),
                    num_res_blocks=1,
                    attention_resolutions=(),
                    patch_size=4,
                )
            ),
            diffusion=DiffusionConfig(),
        )
    )
    for stage in (prior, decoder, upsampler):
        liven(stage.network)
        stage.eval()
    folder = root / "model"
    save_stages(Stages(clip, prior, decoder, [upsampler]), folder, dtype=None)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten captioned pictures in a folder."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for k in range(10):
        pixels = noise.integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"picture {k}")
    return folder


@pytest.fixture(scope="session")
def clip_folder(tiny_model: Path) -> Path:
    """The tiny model's CLIP."""
    return tiny_model / "clip"


def embed_flags(pictures: Path, clip: Path, out: Path, *more: str) -> list[str]:
    """The command line that embeds a folder's pictures in pieces of four."""
    return [
        *("--data", str(pictures), "--clip", str(clip), "--out", str(out)),
        *("--rows-per-piece", "4", "--batch-size", "3", "--num-workers", "0", *more),
    ]


@pytest.fixture(scope="session")
def written(pictures: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embeddings of the ten, in pieces of four; treat as read-only."""
    from unclip.training.embed import main

    out = tmp_path_factory.mktemp("written") / "embeddings"
    main(embed_flags(pictures, clip_folder, out, "--text"))
    return out


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    """The same, to spoil."""
    return Path(shutil.copytree(written, tmp_path / "copied"))
