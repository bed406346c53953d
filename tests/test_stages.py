"""The picture stages: sampling and checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.clip import Text
from unclip.diffusion import make_generators
from unclip.stages import Conditions, DecoderStage, SamplingOptions, UpsamplerStage

GENERATOR = torch.Generator().manual_seed(0)
IMAGE_EMBED = F.normalize(torch.randn(2, 16, generator=GENERATOR), dim=-1)
TEXT = Text(
    F.normalize(torch.randn(2, 16, generator=GENERATOR), dim=-1),
    torch.randn(2, 4, 32, generator=GENERATOR),
    torch.tensor([[True] * 4, [True, True, False, False]]),
)


@pytest.fixture
def decoder(tiny_model: Path) -> DecoderStage:
    return DecoderStage.load(tiny_model / "decoder")


@pytest.fixture
def upsampler(tiny_model: Path) -> UpsamplerStage:
    return UpsamplerStage.load(tiny_model / "upsampler_64")


def decode(decoder: DecoderStage, text: Text | None = TEXT, **options: Any) -> Tensor:
    settings = SamplingOptions(**{"num_inference_steps": 3} | options)
    conditions = Conditions(image_embed=IMAGE_EMBED, text=text)
    return decoder.sample(conditions, make_generators(3, 2), settings)


def enlarge(upsampler: UpsamplerStage, side: int = 16) -> Tensor:
    low_res = 2 * torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) - 1
    options = SamplingOptions(num_inference_steps=2)
    return upsampler.sample(Conditions(low_res=low_res), make_generators(3, 2), options)


def test_pictures_have_their_size_and_range(
    decoder: DecoderStage, upsampler: UpsamplerStage
) -> None:
    assert (decoder.image_size, upsampler.image_size) == (16, 64)
    for pictures, side in ((decode(decoder), 16), (enlarge(upsampler), 64)):
        assert pictures.shape == (2, 3, side, side)
        assert pictures.abs().max() <= 1
        assert pictures.dtype == torch.float32


def test_an_upsampler_runs_on_crops_and_on_pictures_larger_than_its_own(
    upsampler: UpsamplerStage,
) -> None:
    assert enlarge(upsampler, side=8).shape == (2, 3, 32, 32)
    assert enlarge(upsampler, side=24).shape == (2, 3, 96, 96)


@pytest.mark.parametrize(
    ("kind", "name", "draw"),
    [(DecoderStage, "decoder", decode), (UpsamplerStage, "upsampler_64", enlarge)],
)
def test_saving_and_loading_changes_no_picture(
    kind: Any, name: str, draw: Callable[[Any], Tensor], tiny_model: Path, tmp_path: Path
) -> None:
    stage = kind.load(tiny_model / name)
    stage.save(tmp_path / "again")
    again = kind.load(tmp_path / "again")
    assert again.config == stage.config
    assert not again.training
    assert torch.equal(draw(again), draw(stage))


def test_a_folder_of_another_stage_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="must describe the stage 'decoder'; got 'upsampler'"):
        DecoderStage.load(tiny_model / "upsampler_64")
    with pytest.raises(ValueError, match="must describe the stage 'upsampler'; got 'decoder'"):
        UpsamplerStage.load(tiny_model / "decoder")


def test_guidance_1_is_no_guidance(decoder: DecoderStage, monkeypatch: pytest.MonkeyPatch) -> None:
    nearly = decode(decoder, guidance_scale=1 + 1e-6)
    assert (decode(decoder, guidance_scale=3.0) - nearly).abs().max() > 1e-2
    encode, calls = decoder.network.encode_context, []
    monkeypatch.setattr(
        decoder.network, "encode_context", lambda **options: calls.append(1) or encode(**options)
    )
    torch.testing.assert_close(decode(decoder, guidance_scale=1.0), nearly, atol=1e-4, rtol=0)
    assert len(calls) == 1  # the null context is not even computed


def test_embedding_and_caption_both_decide_the_picture(decoder: DecoderStage) -> None:
    drawn = decode(decoder)
    other = Text(TEXT.text_embed, -TEXT.text_encodings, TEXT.text_mask)
    assert (decode(decoder, other) - drawn).abs().max() > 1e-3
    options = SamplingOptions(num_inference_steps=3)
    conditions = Conditions(image_embed=IMAGE_EMBED.flip(0), text=TEXT)
    swapped = decoder.sample(conditions, make_generators(3, 2), options)
    assert (swapped - drawn).abs().max() > 1e-3


def test_given_noise_is_where_sampling_starts(decoder: DecoderStage) -> None:
    x_T = torch.randn(2, 3, 16, 16)
    options = SamplingOptions(num_inference_steps=3)
    given = Conditions(image_embed=IMAGE_EMBED, text=TEXT)
    one, two = (decoder.sample(given, make_generators(s, 2), options, x_T) for s in (1, 2))
    assert torch.equal(one, two)  # DDIM with eta 0 draws nothing else
