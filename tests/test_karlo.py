"""Karlo's original files: our networks answer what its own code answered."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_parity
from safetensors import safe_open
from torch import Tensor

from unclip.clip import load_clip
from unclip.hub import karlo as karlo_format
from unclip.hub import load_stages
from unclip.models import (
    DecoderConfig,
    PriorTransformer,
    PriorTransformerConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip.priors.text import FilledText
from unclip.stages import (
    DecoderStage,
    DecoderStageConfig,
    UpsamplerStage,
    UpsamplerStageConfig,
)

sys.path.insert(0, str(Path(__file__).parent / "data"))
from record_karlo import weights_of

RECORDED = Path(__file__).parent / "data" / "karlo.safetensors"
FILES = {
    "prior": "prior-ckpt-step=01000000-of-01000000.ckpt",
    "decoder": "decoder-ckpt-step=01000000-of-01000000.ckpt",
    "upsampler": "improved-sr-ckpt-step=1.2M.ckpt",
}


KARLO_DECODER = DecoderConfig(
    unet=UNetConfig(width=320, out_channels=6, context_dim=1536),
    text_encodings_dim=768,
    text_embed_dim=768,
    null_text="empty_prompt",
    learned_variance=True,
)
KARLO_UPSAMPLER = UpsamplerStageConfig(
    network=UpsamplerConfig(
        unet=UNetConfig(
            image_size=256, in_channels=6, width=320, scale_shift=False, attention_resolutions=()
        )
    ),
    final_network=True,
)


def recorded(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a case, and what was put into the network and came out of it."""
    with safe_open(RECORDED, "pt") as file:
        weights = weights_of(json.loads(file.metadata()[case]))
        names = [name for name in file.keys() if name.startswith(f"{case}/")]  # noqa: SIM118
        return weights, {name.removeprefix(f"{case}/"): file.get_tensor(name) for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Karlo's files as they are published, of tiny networks."""
    folder = tmp_path_factory.mktemp("karlo")
    for case, name in FILES.items():
        weights, _ = recorded(case)
        prefixes = ["model_first_steps.", "model_last_step."] if case == "upsampler" else ["model."]
        state_dict = {f"{prefix}{k}": v for prefix in prefixes for k, v in weights.items()}
        torch.save({"state_dict": state_dict}, folder / name)
    torch.save(
        (torch.linspace(-1, 1, 24), torch.linspace(0.5, 2, 24)), folder / "ViT-L-14_stats.th"
    )
    return folder


@torch.no_grad()
def test_parity_of_the_prior_with_karlo(folder: Path) -> None:
    _, case = recorded("prior")
    prior = load_stages(folder, only={"prior"}).prior
    assert prior.config.diffusion.clip_range == 10 and not prior.config.unit_norm
    text = FilledText(case["text_emb"], case["text_enc"], case["mask"])
    y = prior.network(case["x"], case["timesteps"], prior.encode_context(text))
    assert_parity("Karlo's prior", y, case["y_out"])
    x_0 = torch.randn(3, 24)
    expected = x_0 * torch.linspace(0.5, 2, 24) + torch.linspace(-1, 1, 24)
    torch.testing.assert_close(prior.denormalize(x_0), expected)


@torch.no_grad()
def test_parity_of_the_decoder_with_karlo(folder: Path) -> None:
    _, case = recorded("decoder")
    decoder = load_stages(folder, only={"decoder"}).decoder
    assert decoder.config.network.unet.attention_resolutions == (32, 16)
    text = FilledText(case["txt_feat"], case["txt_feat_seq"], case["mask"])
    y = decoder.network(case["x"], case["timesteps"], decoder.encode_context(case["y"], text))
    assert_parity("Karlo's decoder", y, case["y_out"])


@torch.no_grad()
def test_parity_of_the_upsampler_with_karlo(folder: Path) -> None:
    _, case = recorded("upsampler")
    (upsampler,) = load_stages(folder, only={"upsamplers"}).upsamplers
    assert upsampler.final_network is not None
    for network in (upsampler.network, upsampler.final_network):
        context = {"low_res": case["low_res"], "noise_emb": None}  # enlarged by its caller there
        y = network(case["x"], case["timesteps"], context)
        assert_parity("Karlo's super-resolution", y, case["y_out"])


def test_karlos_clip_is_not_normalised(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr(karlo_format, "CLIP_NAME", str(tiny_model / "clip"))
    own, theirs = load_clip(str(tiny_model / "clip")), karlo_format._clip()
    raw = theirs.encode_text(["a red circle"]).text_embed
    assert (raw.norm(dim=-1) - 1).abs() > 1e-3
    direction = torch.nn.functional.normalize(raw, dim=-1)
    torch.testing.assert_close(own.encode_text(["a red circle"]).text_embed, direction)
    image = torch.zeros(1, 3, 64, 64)
    assert (theirs.encode_image(image).norm(dim=-1) - 1).abs() > 1e-3


@pytest.mark.parametrize(
    ("stage", "millions"), [("prior", 1022.0), ("decoder", 893.3), ("upsampler", 2 * 691.6)]
)
def test_published_sizes_have_the_published_counts(stage: str, millions: float) -> None:
    """1,022M; 885.4M and 7.9M for the projections; 691.6M each (interop facts)."""
    with torch.device("meta"):
        if stage == "prior":
            network: Any = PriorTransformer(PriorTransformerConfig(null_text="empty_prompt"))
        elif stage == "decoder":
            network = DecoderStage(DecoderStageConfig(network=KARLO_DECODER)).network
        else:
            network = UpsamplerStage(KARLO_UPSAMPLER)
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.06)


# ----------------------------------------------------------------------------------- bad input


def changed(folder: Path, copy: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, copy)
    values = torch.load(copy / name, weights_only=True)
    change(values["state_dict"])
    torch.save(values, copy / name)
    return copy


def test_a_prior_without_its_statistics_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "ViT-L-14_stats.th").unlink()
    with pytest.raises(ValueError, match=r"needs the statistics .* copy Karlo's ViT-L-14_stats.th"):
        load_stages(copy, only={"prior"})


def test_one_file_is_a_model_of_one_stage(folder: Path) -> None:
    decoder = load_stages(folder / FILES["decoder"], only={"decoder"}).decoder
    assert decoder is not None
    with pytest.raises(FileNotFoundError, match="lacks a prior"):
        load_stages(folder / FILES["decoder"], only={"prior"})


def test_missing_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    def lose(weights: dict[str, Any]) -> None:
        for name in [name for name in weights if "in_layers" in name]:
            del weights[name]

    copy = changed(folder, tmp_path / "copy", FILES["decoder"], lose)
    with pytest.raises(ValueError, match=r"lacks unet\.down\.0\.res\.conv1\.bias, .* more"):
        load_stages(copy, only={"decoder"})


def test_a_file_of_something_else_is_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    torch.save({"state_dict": {"first_stage_model.x": torch.ones(1)}}, copy / "sd.ckpt")
    with pytest.raises(ValueError, match=r"sd.ckpt must hold Karlo's prior, decoder or"):
        load_stages(copy)


class Bomb:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code ran')",))


def test_a_file_with_code_in_it_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    torch.save({"state_dict": {}, "callbacks": Bomb()}, copy / FILES["prior"])
    with pytest.raises(ValueError, match=r"prior-ckpt.* asks for .*exec, which could run code"):
        load_stages(copy)


def test_a_truncated_file_is_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / FILES["decoder"]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"decoder-ckpt.* is truncated or damaged"):
        load_stages(copy)
