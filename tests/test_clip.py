"""The frozen CLIP, and the small one that this code trains."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from unclip.clip import BPE_NAME, FrozenCLIP, load_clip
from unclip.training.clip import main

SIZES = [
    *("--embed-dim", "16", "--clip.image_size", "32", "--source.image_size", "32"),
    *("--image-width", "8", "--image-layers", "[1,1,1,1]", "--text-width", "32"),
    *("--text-layers", "2", "--text-heads", "2", "--context-length", "12", "--num-merges", "300"),
]
FIT = [
    *("--max-steps", "3", "--batch-size", "8", "--warmup-steps", "1", "--num-workers", "0"),
    *("--ema-decay", "0", "--log-every", "1", "--sample-every", "0"),
]
CAPTIONS = ["a red circle", "", "blue"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny CLIP, trained for three steps."""
    run = tmp_path_factory.mktemp("clip") / "run"
    main([*SIZES, *FIT, "--run", str(run)])
    return run


@pytest.fixture
def clip(trained: Path) -> FrozenCLIP:
    return load_clip(str(trained / "clip"))


@pytest.fixture
def images() -> torch.Tensor:
    return 2 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1


def test_a_tiny_clip_trains(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["logit_scale"] == pytest.approx(30, rel=1e-3)
    assert all(0 <= line["accuracy"] <= 1 and line["grad_norm"] > 0 for line in lines)


def test_it_trains_on_captioned_pictures(tmp_path: Path) -> None:
    for k in range(8):
        Image.new("RGB", (40, 48), (30 * k, 0, 0)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(f"picture {k}")
    data = ["--data", str(tmp_path), "--val-data", str(tmp_path), "--validate-every", "3"]
    crops = ["--source.image_size", "36", "--source.crop_size", "32"]
    main([*SIZES, *FIT, *data, *crops, "--run", str(tmp_path / "run")])
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["val/accuracy"] <= 1 and last["val/loss"] > 0
    assert load_clip(str(tmp_path / "run/clip")).image_size == 32


def test_training_again_with_other_sizes_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "clip" / BPE_NAME).read_bytes()
    with pytest.raises(SystemExit):
        main([*SIZES, *FIT, "--run", str(trained), "--num-merges", "200"])
    assert "clip.num_merges: 300 there, 200 here" in capsys.readouterr().err
    assert (trained / "clip" / BPE_NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clip.image_size", "33"], "clip.image_size must be a multiple of 32"),
        (["--source.image_size", "64"], "clip.image_size, 32 px; got 64: set source.image_size to"),
        (["--run", f"{__file__}/run"], "cannot write the run folder"),
    ],
)
def test_training_refuses(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*SIZES, *FIT, *words])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_it_loads_with_open_clips_own_loader_and_agrees(
    trained: Path, clip: FrozenCLIP, images: torch.Tensor
) -> None:
    source = f"local-dir:{trained / 'clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(source)
    tokenizer = open_clip.get_tokenizer(source, bpe_path=str(trained / "clip" / BPE_NAME))
    model.eval()
    normalise = preprocess.transforms[-1]  # what comes before it works on PIL pictures
    with torch.no_grad():
        image_embed = F.normalize(model.encode_image(normalise((images + 1) / 2)), dim=-1)
        text_embed = F.normalize(model.encode_text(tokenizer(CAPTIONS)), dim=-1)
    text = clip.encode_text(CAPTIONS)
    torch.testing.assert_close(clip.encode_image(images), image_embed)
    torch.testing.assert_close(text.text_embed, text_embed)
    assert list(text.text_encodings.shape) == [3, 12, 32]
    assert (clip.embed_dim, clip.text_width, clip.context_length, clip.image_size) == (
        *(16, 32),
        *(12, 32),
    )


def test_encodings_are_the_hidden_states_that_the_embedding_is_read_from(clip: FrozenCLIP) -> None:
    text = clip.encode_text(CAPTIONS)
    last = text.text_mask.sum(dim=1) - 1  # the end token
    read = text.text_encodings[torch.arange(3), last] @ clip.model.text_projection
    torch.testing.assert_close(F.normalize(read, dim=-1), text.text_embed)


def test_mask_is_true_on_the_captions_tokens_alone(clip: FrozenCLIP) -> None:
    text = clip.encode_text(CAPTIONS)
    for caption, mask in zip(CAPTIONS, text.text_mask, strict=True):
        count = len(clip.tokenizer.encode(caption)) + 2  # start and end
        assert mask.tolist() == [True] * count + [False] * (12 - count)
    trimmed = text.trimmed()
    assert (
        trimmed.text_mask.shape[1] == trimmed.text_encodings.shape[1] == text.text_mask.sum(1).max()
    )


def test_a_caption_that_is_too_long_is_cut_with_a_warning(clip: FrozenCLIP) -> None:
    caption = "a b c d e f g h i j k l"
    with pytest.warns(UserWarning, match="more than 12 tokens; cut off: 'k l'"):
        text = clip.encode_text([caption])
    assert text.text_mask.all()
    whole = clip.encode_text(["a b c d e f g h i j"])  # ten tokens fit, and nothing is said
    torch.testing.assert_close(text.text_embed, whole.text_embed)


def test_a_data_set_of_long_captions_does_not_flood_the_log(clip: FrozenCLIP) -> None:
    clip.num_cut = 0
    with pytest.warns(UserWarning, match="more than 12 tokens") as record:
        clip.encode_text([f"a b c d e f g h i j k {n}" for n in range(30)])
    assert len(record) == 10
    assert "without a word" in str(record[-1].message)
    assert "without a word" not in str(record[-2].message)


def test_training_goes_on_from_another_clip(trained: Path, tmp_path: Path) -> None:
    start = ["--init", str(trained / "clip"), "--run", str(tmp_path / "again")]
    main([*SIZES, *FIT, *start, "--max-steps", "1", "--learning-rate", "1e-9"])
    one, other = load_clip(str(trained / "clip")), load_clip(str(tmp_path / "again" / "clip"))
    weights = other.model.state_dict()
    for name, tensor in one.model.named_parameters():
        torch.testing.assert_close(weights[name], tensor.data, atol=1e-6, rtol=0)


def test_training_from_a_clip_of_other_sizes_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--init", str(trained / "clip"), "--run", str(tmp_path / "x"), "--text-layers", "1"]
    with pytest.raises(SystemExit):
        main([*SIZES, *FIT, *words])
    assert "init must have a CLIP of the sizes in clip" in capsys.readouterr().err


def test_captions_must_be_strings(clip: FrozenCLIP) -> None:
    with pytest.raises(TypeError, match="captions must be strings; got int"):
        clip.encode_text([3])  # type: ignore[list-item]


def test_pictures_of_other_sizes_are_resized(clip: FrozenCLIP, images: torch.Tensor) -> None:
    large = F.interpolate(images, (96, 96), mode="nearest")
    embed = clip.encode_image(large)
    torch.testing.assert_close(embed.norm(dim=1), torch.ones(2))
    assert torch.cosine_similarity(embed, clip.encode_image(images)).min() > 0.98


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)])
def test_pictures_of_another_layout_are_refused(clip: FrozenCLIP, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\]; got \["):
        clip.encode_image(torch.zeros(shape))


def test_it_stays_frozen(clip: FrozenCLIP, images: torch.Tensor) -> None:
    nn.ModuleList([clip]).train()
    assert not any(module.training for module in clip.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    embed = clip.encode_image(images.requires_grad_())
    assert not embed.requires_grad
    assert not clip.encode_text(CAPTIONS).text_embed.requires_grad


def test_another_clip_has_another_fingerprint(clip: FrozenCLIP, trained: Path) -> None:
    assert clip.fingerprint() == load_clip(str(trained / "clip")).fingerprint()
    before = clip.fingerprint()
    with torch.no_grad():
        clip.model.text_projection[0, 0] += 1
    assert clip.fingerprint() != before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ViT-L14/openai", "got 'ViT-L14/openai': for example ViT-L-14/openai"),
        ("no/such/folder", "clip must be a folder, hf-hub:org/name, or an open_clip model/tag"),
        ("ViT-B-32/nothing", r"no weights 'nothing' for ViT-B-32: use \['.*'openai'"),
        ("ViT-B-32", "no weights '' for ViT-B-32"),
    ],
)
def test_a_name_that_is_nothing(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_clip(name)


def test_a_folder_that_is_no_whole_clip(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no CLIP folder"):
        load_clip(str(tmp_path))
    folder = tmp_path / "clip"
    shutil.copytree(trained / "clip", folder)
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"the CLIP in {folder} cannot be loaded"):
        load_clip(str(folder))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors is missing"):
        load_clip(str(folder))


@pytest.mark.parametrize("name", ["ViT-L-14/openai", "hf-hub:nobody/nothing"])
def test_a_clip_that_cannot_be_fetched_is_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"{name} is not on this computer and cannot be"):
        load_clip(name)
