"""The metrics' maths, their resize and their networks: against the libraries' own values, closed
forms, and what must happen as pictures get worse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_tiny_clip
from PIL import Image
from torch import Tensor, nn

from unclip.clip import load_clip
from unclip.data.embeddings import sha256
from unclip.data.shapes import ShapesConfig, draw_scene, render
from unclip.evaluation import metrics
from unclip.evaluation.encoders import (
    LPIPS,
    CLIPConfig,
    CLIPEncoder,
    DINOConfig,
    DINOv2,
    Inception,
    InceptionConfig,
    LPIPSConfig,
    Network,
    NetworkConfig,
    Unavailable,
    load_clip_encoder,
    weights_sha256,
)
from unclip.evaluation.prior import recall
from unclip.evaluation.resize import ResizeConfig, fitted, quantised, resized


def normal(count: int, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def scenes(count: int, size: int = 32, start: int = 0) -> Tensor:
    world = ShapesConfig(split="train")
    return render([draw_scene(world, start + k)[0] for k in range(count)], size)


# ----------------------------------------------------------------------------------- closed forms


def test_frechet_distance_of_two_known_gaussians() -> None:
    a = normal(4000, 4)
    centred = a - a.mean(0)
    # |mu|^2 for a shift, (2 - 1)^2 times the variance in each dimension for twice the deviation.
    assert metrics.frechet(centred, centred + torch.tensor([3.0, 0, 0, 4])) == pytest.approx(25)
    spread = torch.cov(centred.double().T).trace().item()
    assert metrics.frechet(centred, 2 * centred) == pytest.approx(spread, rel=1e-5)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_is_biased_upwards_by_few_pictures() -> None:
    """Both sets are of one Gaussian: the true distance is 0, and what is found is the bias."""

    def found_of(n: int) -> float:
        pairs = [(normal(n, 16, seed), normal(n, 16, 99 + seed)) for seed in range(5)]
        return float(np.mean([metrics.frechet(a, b) for a, b in pairs]))

    found = [found_of(n) for n in (50, 200, 800)]
    assert found[0] > 2.5 * found[1] > 6 * found[2] > 0


def test_cmmd_of_known_points() -> None:
    # Two points a distance d apart in one set, the same point twice in the other.
    a, b = torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0], [0.0]])
    kernel = np.exp(-9 / (2 * 10**2))
    expected = 1000 * ((1 + kernel) / 2 + 1 - 2 * (1 + kernel) / 2)
    assert metrics.cmmd(a, b) == pytest.approx(expected, abs=1e-9)
    # A set of another size, and another kernel.
    assert metrics.cmmd(a, b[[0, 0, 0, 0, 0]]) == pytest.approx(expected, abs=1e-9)
    kernel = np.exp(-9 / 2)
    assert metrics.cmmd(a, b, sigma=1, scale=1) == pytest.approx((1 - kernel) / 2, abs=1e-12)


def test_cmmd_is_the_librarys_mmd_of_sets_of_one_size() -> None:
    from torch_fidelity.metric_kid import kernel_rbf, mmd2

    a, b = (F.normalize(normal(60, 8, seed), dim=-1) for seed in (0, 1))
    x, y = a.double().numpy(), b.double().numpy()
    kernels = (kernel_rbf(*pair, kid_kernel_rbf_sigma=10) for pair in ((x, x), (x, y), (y, y)))
    theirs = 1000 * mmd2(*kernels, mmd_est="biased")
    assert metrics.cmmd(a, b) == pytest.approx(theirs, rel=1e-6)


def test_inception_score_of_certain_and_of_even_verdicts() -> None:
    certain = 100 * torch.eye(5).repeat(4, 1)
    assert metrics.inception_score(certain, splits=1)[0] == pytest.approx(5)
    assert metrics.inception_score(torch.zeros(20, 5), splits=2) == pytest.approx((1, 0))


def test_precision_and_recall_see_what_is_missing_and_what_is_made_up() -> None:
    real = normal(300, 4)
    one_mode = real[:1] + 0.1 * normal(300, 4, 1)
    precision, recall = metrics.precision_recall(one_mode, real)
    assert precision > 0.9 and recall < 0.1
    assert metrics.precision_recall(real + 50, real) == (0, 0)


def test_r_precision_counts_the_nearest_caption_and_no_tie() -> None:
    pool = torch.eye(4)
    images = torch.tensor([[1.0, 0.2, 0, 0], [0.9, 1.0, 0, 0], [0, 1.0, 1.0, 0], [1.0, 0, 0, 0.5]])
    others = torch.tensor([[1, 2], [0, 3], [1, 3], [1, 2]])
    assert metrics.r_precision(images, pool, pool, others).tolist() == [True, True, False, True]
    others[3] = torch.tensor([0, 1])
    assert not metrics.r_precision(images, pool, pool, others)[3]


def test_mismatched_captions_are_fixed_by_the_seed_and_never_the_true_one() -> None:
    pool = [f"caption {k % 40}" for k in range(60)] + ["Caption  7"]  # 40 distinct texts
    captions = pool[:30]
    chosen = metrics.mismatched(captions, pool, 39, seed=1)
    assert torch.equal(chosen, metrics.mismatched(captions, pool, 39, seed=1))
    assert not torch.equal(chosen, metrics.mismatched(captions, pool, 39, seed=2))
    # The first ones are as they were when fewer pictures are drawn.
    assert torch.equal(chosen[:5], metrics.mismatched(captions[:5], pool, 39, seed=1))
    for caption, rows in zip(captions, chosen.tolist(), strict=True):
        texts = {" ".join(pool[row].casefold().split()) for row in rows}
        assert len(texts) == 39 and caption not in texts
    with pytest.raises(ValueError, match="must not exceed the distinct captions, 40; got 41"):
        metrics.mismatched(captions, pool, 40, seed=1)


def test_face_distances_are_the_l1_distance_and_the_cosine() -> None:
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    distance, likeness = metrics.face_distances(a, b)
    assert distance.tolist() == [0, 3] and likeness.tolist() == pytest.approx([1, 0])


def test_diversity_is_the_mean_over_pairs() -> None:
    samples = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1)

    def gap(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().flatten(1).sum(1)

    assert metrics.diversity([samples], gap) == [pytest.approx(2)]
    with pytest.raises(ValueError, match="samples_per_caption must be at least 2"):
        metrics.diversity([samples[:1]], gap)


def test_a_bootstrap_interval_is_that_of_the_mean() -> None:
    values = normal(2000, 1).flatten().tolist()
    found = metrics.mean_of(values)
    low, high = found["interval"]
    assert low < found["value"] < high
    assert high - low == pytest.approx(2 * 1.96 / 2000**0.5, rel=0.1)


# ------------------------------------------------------------------------- what all of them must do

SETS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "fid": metrics.frechet,
    "kid": lambda a, b: metrics.kid(a, b, subsets=1, subset_size=len(a))[0],
    "cmmd": metrics.cmmd,
    "precision": lambda a, b: metrics.precision_recall(a, b)[0],
    "recall": lambda a, b: metrics.precision_recall(a, b)[1],
}


@pytest.mark.parametrize("name", SETS)
def test_the_order_of_pictures_has_no_say(name: str) -> None:
    a, b = normal(120), normal(120, seed=1) + 0.5
    order = torch.randperm(120, generator=torch.Generator().manual_seed(2))
    assert SETS[name](a[order], b) == pytest.approx(SETS[name](a, b), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", SETS)
def test_features_that_are_not_finite_are_refused(name: str) -> None:
    a, b = normal(20), normal(20)
    a[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"drawn pictures.* must be finite; got NaN"):
        SETS[name](a, b)


@pytest.mark.parametrize(
    ("measure", "least"),
    [
        (lambda a: metrics.frechet(a[:1], a), 2),
        (lambda a: metrics.kid(a[:9], a, subset_size=10), 10),
        (lambda a: metrics.inception_score(a[:9], splits=10), 10),
        (lambda a: metrics.precision_recall(a[:3], a), 4),
        (lambda a: metrics.cmmd(a[:1], a), 2),
    ],
)
def test_too_few_pictures_are_refused(measure: Callable[[Tensor], Any], least: int) -> None:
    with pytest.raises(ValueError, match=f"drawn pictures.* must be at least {least}; got"):
        measure(normal(20))


@pytest.mark.parametrize("spoil", ["blur", "noise"])
def test_distances_grow_with_blur_and_with_noise(spoil: str) -> None:
    """Over means of random filters: the features of a network that was never trained."""
    filters = torch.randn(24, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    pictures = scenes(192)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))

    def features(pictures: Tensor) -> Tensor:
        return F.conv2d(pictures / 127.5 - 1, filters).relu().square().mean((2, 3)).sqrt()

    def spoilt(level: int) -> Tensor:
        if spoil == "noise":
            return (pictures + 40 * level * noise).round().clamp(0, 255).byte()
        small = resized(pictures, 32 // 2**level, "torch").round().byte()
        return resized(small, 32, "torch").round().byte()

    real = features(scenes(192, start=1000))
    levels = [features(spoilt(level)) for level in range(4)]
    for distance in (metrics.frechet, metrics.cmmd, SETS["kid"]):
        found = [distance(one, real) for one in levels]
        assert found == sorted(found) and found[-1] > 2 * abs(found[0])


# ---------------------------------------------------------------------------------------- libraries


def test_precision_and_recall_are_the_priors_own() -> None:
    """Two implementations, the library's and that of `unclip.evaluation.prior`."""
    drawn, real = normal(150), normal(200, seed=1) + 0.5
    assert metrics.precision_recall(drawn, real) == pytest.approx(
        (recall(real, drawn), recall(drawn, real))
    )


def test_fid_is_torchmetrics_own() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(nn.Module):
        num_features = 48

        def forward(self, pictures: Tensor) -> Tensor:
            return F.avg_pool2d(pictures.float(), 8).flatten(1)

    a, b = scenes(100), scenes(120, start=1000)
    theirs = FrechetInceptionDistance(feature=Flat()).set_dtype(torch.float64)
    theirs.update(a, real=False)
    theirs.update(b, real=True)
    ours = metrics.frechet(Flat()(a), Flat()(b))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-4)


def test_clip_score_is_torchmetrics_own(tmp_path: Path) -> None:
    from torchmetrics.functional.multimodal import clip_score

    write_tiny_clip(tmp_path / "clip")
    clip = load_clip(str(tmp_path / "clip"))
    encoder = CLIPEncoder(clip, "tiny", CLIPConfig())
    pictures, captions = scenes(6), [f"a red circle {k}" for k in range(6)]

    class Model:
        config = None

        def to(self, device: Any) -> "Model":
            return self

        def get_image_features(self, pixels: Tensor) -> Tensor:
            return 3 * clip.encode_image(pixels)  # of any length: a cosine is what is asked for

        def get_text_features(self, ids: list[str], mask: Any) -> Tensor:
            return clip.encode_text(ids).text_embed

    class Words(list[str]):
        def to(self, device: Any) -> "Words":
            return self

    def processor(text: Any = None, images: Any = None, **_: Any) -> dict[str, Any]:
        if images is not None:
            return {"pixel_values": torch.stack(images).float() / 127.5 - 1}
        return {"input_ids": Words(text), "attention_mask": torch.ones(len(text), 1)}

    ours = metrics.clip_scores(encoder.features(pictures), encoder.texts(captions))
    each = [
        clip_score(picture, caption, lambda: (Model(), processor)).item()
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    assert ours.tolist() == pytest.approx(each, rel=1e-4)
    assert len(set(each)) > 1


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception at random weights, in torch-fidelity's layout."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    class Unloaded(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
            return None

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    net = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # or all features are nearly the same
    torch.save(net.state_dict(), path)
    return path


def test_inception_is_torch_fidelitys_own(inception_file: Path, tmp_path: Path) -> None:
    import torch_fidelity

    folders = []
    sets = scenes(8), scenes(8, start=1000)
    for name, pictures in zip("ab", sets, strict=True):
        (folder := tmp_path / name).mkdir()
        folders.append(str(folder))
        for k, picture in enumerate(pictures):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{k:02d}.png")
    given: dict[str, Any] = {"kid_subsets": 5, "kid_subset_size": 6, "rng_seed": 3}
    theirs = torch_fidelity.calculate_metrics(
        input1=folders[0],
        input2=folders[1],
        cuda=False,
        kid=True,
        feature_extractor="inception-v3-compat",
        isc=True,
        isc_splits=2,
        samples_shuffle=True,
        cache=False,
        save_cpu_ram=True,  # which reads without worker processes
        verbose=False,
        feature_extractor_weights_path=str(inception_file),
        **given,
    )
    encoder = Inception(InceptionConfig(weights=inception_file, resize="tensorflow"), "cpu")
    a, b = (encoder.features(pictures) for pictures in sets)
    assert a.shape == (8, 2048) and a.std(0).mean() > 1e-3
    mean, deviation = metrics.kid(a, b, subsets=5, subset_size=6, seed=3)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
    score = metrics.inception_score(encoder.logits(a), splits=2, seed=3)
    assert score[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert score[1] == pytest.approx(theirs["inception_score_std"], rel=1e-2)


# ------------------------------------------------------------------------------------------- resize


def test_clean_resize_is_pillows_bicubic_in_floating_point_clamped_and_not_rounded() -> None:
    # A white line on black: bicubic overshoots beside it, to below 0.
    picture = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    picture[..., 32] = 255
    clean = resized(picture, 24, "clean")
    channel = Image.fromarray(picture[0, 0].numpy().astype(np.float32))
    known = np.asarray(channel.resize((24, 24), Image.Resampling.BICUBIC))
    assert known.min() < -1
    np.testing.assert_array_equal(clean[0, 0].numpy(), known.clip(0, 255))
    assert not torch.equal(clean, clean.round())
    rounded = resized(picture, 24, "pil")
    assert torch.equal(rounded, rounded.round()) and (rounded - clean).abs().max() <= 0.51


def test_resizes_differ_where_they_are_known_to() -> None:
    """Stripes of a pixel must become grey; without antialiasing they become stripes again."""
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    clean, by_torch = (resized(stripes, 20, name) for name in ("clean", "torch"))
    inner = (..., slice(2, -2), slice(2, -2))
    assert (clean[inner] - 127.5).abs().max() < 8
    assert (clean - by_torch).abs().max() < 1.0
    for name in ("torch_aliased", "tensorflow"):
        assert (resized(stripes, 20, name)[inner] - 127.5).abs().max() > 40  # type: ignore[arg-type]
    assert torch.equal(resized(stripes, 64, "tensorflow"), stripes.float())


def test_tensorflows_resize_is_known_by_its_corner() -> None:
    # Its grid begins at the corner of the first pixel: enlarged by two, every other pixel is kept.
    row = torch.tensor([[0, 100, 200, 50]], dtype=torch.uint8)
    picture = row.expand(4, 4)[None, None].expand(1, 3, 4, 4)
    assert resized(picture, 8, "tensorflow")[0, 0, 0].tolist() == [
        0,
        50,
        100,
        150,
        200,
        125,
        50,
        50,
    ]
    half = resized(picture, 8, "torch_aliased")[0, 0, 0].tolist()
    assert half == [0, 25, 75, 125, 175, 162.5, 87.5, 50]


def test_pictures_are_rounded_to_8_bits_before_any_network() -> None:
    images = torch.tensor([-1.2, -1, 0, 0.999, 1.5]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert quantised(images)[0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(
        ValueError, match="pictures must be finite; got NaN or infinity in number 1"
    ):
        quantised(torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), float("nan"))]))
    with pytest.raises(ValueError, match=r"pictures must be uint8; got torch.float32"):
        resized(images, 8, "clean")


def test_the_longer_side_is_cut_or_pressed() -> None:
    picture = torch.zeros(3, 32, 64, dtype=torch.uint8)
    picture[:, :, :16] = 255  # a band that the middle square leaves out
    config = ResizeConfig(side=16)
    cut = fitted(picture, config)
    assert cut.shape == (3, 16, 16) and cut.dtype == torch.uint8 and cut.float().mean() < 5
    pressed = fitted(picture, ResizeConfig(side=16, crop="none"))
    assert pressed.float().mean() == pytest.approx(255 / 4, abs=3)
    assert fitted(picture, ResizeConfig()) is picture
    with pytest.raises(ValueError, match=r"resize.side must be at least 1; got 0"):
        ResizeConfig(side=0)


# ----------------------------------------------------------------------------------------- encoders


def test_weights_that_are_not_there_name_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(Unavailable, match=r"is not there: python -c .*InceptionV3.*downloads it"):
        Inception(InceptionConfig(), "cpu")
    with pytest.raises(Unavailable, match=r"lpips.weights: alexnet.* python -c .*alexnet"):
        LPIPS(LPIPSConfig(), "cpu")
    with pytest.raises(Unavailable, match="hf download facebook/dinov2-large"):
        DINOv2(DINOConfig(weights=tmp_path), "cpu")
    with pytest.raises(Unavailable, match=r"face.weights names no network: --face.weights FILE"):
        Network(NetworkConfig(), "cpu")
    with pytest.raises(Unavailable, match=r"clip.name is that of the model, and no model"):
        load_clip_encoder(CLIPConfig(), None, "", "cpu")
    with pytest.raises(Unavailable, match="nowhere"):
        load_clip_encoder(CLIPConfig(name="nowhere"), None, "", "cpu")


def test_weights_of_another_hash_are_refused_and_both_hashes_named(
    tmp_path: Path, inception_file: Path
) -> None:
    found = sha256(inception_file)
    right = InceptionConfig(weights=inception_file, sha256=found[:8].upper())
    assert Inception(right, "cpu").weights == {"weights.pth": found}
    wrong = InceptionConfig(weights=inception_file, sha256="0" * 64)
    with pytest.raises(Unavailable, match=f"got {'0' * 64} for weights.pth, whose hash is {found}"):
        Inception(wrong, "cpu")
    write_tiny_clip(tmp_path / "clip")
    clip = load_clip(str(tmp_path / "clip"))
    assert CLIPEncoder(clip, "tiny", CLIPConfig()).weights == {"tiny": weights_sha256(clip)}
    with pytest.raises(Unavailable, match=r"clip.sha256 must be that of the weights; got abcd"):
        CLIPEncoder(clip, "tiny", CLIPConfig(sha256="abcd"))


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"<html>")
    with pytest.raises(Unavailable, match="holds no tensors that can be read"):
        Inception(InceptionConfig(weights=path), "cpu")
    torch.save({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(Unavailable, match="is no Inception of torch-fidelity's"):
        Inception(InceptionConfig(weights=path), "cpu")
    with pytest.raises(Unavailable, match=r"lacks features.0.bias of torchvision's alexnet"):
        LPIPS(LPIPSConfig(weights=path), "cpu")
    with pytest.raises(Unavailable, match="is no TorchScript"):
        Network(NetworkConfig(weights=str(path)), "cpu")
    with pytest.raises(Unavailable, match="cannot be imported"):
        Network(NetworkConfig(weights="no_such_module:net"), "cpu")
    with pytest.raises(Unavailable, match="must be a file that is there or module:name"):
        Network(NetworkConfig(weights="face.pt"), "cpu")


def test_lpips_is_torchmetrics_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as theirs

    torch.manual_seed(0)
    trunk = torchvision.models.alexnet(weights=None)
    torch.save(trunk.state_dict(), tmp_path / "alexnet.pth")
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights: trunk)
    lpips = LPIPS(LPIPSConfig(weights=tmp_path / "alexnet.pth"), "cpu")
    a, b = scenes(3, 64), scenes(3, 64, start=1000)
    ours = lpips.distances(a, b)
    expected = theirs(a / 127.5 - 1, b / 127.5 - 1, net_type="alex", reduction="none")
    assert ours.tolist() == pytest.approx(expected.flatten().tolist(), rel=1e-4)
    assert ours.min() > 0 and lpips.distances(a, a).max() == 0


def test_dinov2_gives_its_class_token(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(image_size=28, **sizes)).eval()
    model.save_pretrained(tmp_path / "dino")
    encoder = DINOv2(DINOConfig(weights=tmp_path / "dino", side=28), "cpu")
    pictures = scenes(2, 28)
    x = (pictures / 255 - encoder.mean) / encoder.std
    with torch.no_grad():
        expected = model(pixel_values=x).pooler_output
    torch.testing.assert_close(encoder.features(pictures), expected, atol=1e-5, rtol=0)
    assert list(encoder.weights) == ["model.safetensors"]


def pooled() -> nn.Module:
    """A feature network, as a user would name it: `test_metrics:pooled`."""
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten())


def test_a_network_of_the_users_is_a_file_or_a_function(tmp_path: Path) -> None:
    pictures = scenes(3)
    path = tmp_path / "face.pt"
    torch.jit.trace(pooled(), torch.zeros(1, 3, 16, 16)).save(str(path))
    by_file = Network(NetworkConfig(weights=str(path), side=16), "cpu")
    by_name = Network(NetworkConfig(weights=f"{__name__}:pooled", side=16), "cpu")
    expected = F.avg_pool2d(resized(pictures, 16, "pil") / 127.5 - 1, 8).flatten(1)
    for network in (by_file, by_name):
        torch.testing.assert_close(network.features(pictures), expected)
    assert by_file.weights == {"face.pt": sha256(path)}
