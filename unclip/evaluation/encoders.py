"""The networks whose features metrics compare: Inception, any CLIP, DINOv2, one of your own, LPIPS.

Each reads local files, takes pictures of 8 bits and resizes them itself. Where the weights are not
there, or are others than was said, `Unavailable` is raised with the command that fetches them.

Shapes: B pictures, D width of the features.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from unclip.clip import FrozenCLIP
from unclip.data.embeddings import sha256
from unclip.evaluation.resize import Backend, resized
from unclip.hub import load_clip_of

BATCH = 64
"""Pictures a network sees at a time."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that DINOv2 was trained with."""
INSTALL = "it needs the extra `metrics`: pip install 'unclip[metrics]'"


class Unavailable(Exception):
    """What a metric needs is not there; the text says why, and how to get it."""


@dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """Inception-v3 of 2015, whose features are FID's."""

    weights: Path | None = None
    """torch-fidelity's file; None looks where it puts its download."""
    sha256: str | None = None
    """What the file's hash begins with; None takes the part that torch-fidelity's name tells."""
    resize: Backend = "clean"
    """To 299 px: clean-fid's, or `tensorflow` as torch-fidelity and the first FID have it."""


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """The CLIP of CLIPScore, R-precision, CMMD and `fd_clip`."""

    name: str = "model"
    """`model`: that of the model that is measured; else a CLIP's folder, `hf-hub:org/name`, an
    open_clip model/tag, or a model whose CLIP to take."""
    sha256: str | None = None
    """What the hash of its weights begins with, as a result file states it."""
    resize: Backend = "pil"
    """To the side of its image tower."""


@dataclass(frozen=True, kw_only=True)
class DINOConfig:
    """DINOv2, by transformers."""

    weights: Path | None = None
    """A folder in transformers' layout."""
    sha256: str | None = None
    """What the hash of its `model.safetensors` begins with."""
    resize: Backend = "pil"
    """To `side`."""
    side: int = 224
    """What it is shown, px: a multiple of 14."""

    def __post_init__(self) -> None:
        if self.side < 14 or self.side % 14:
            raise ValueError(f"dinov2.side must be a multiple of 14; got {self.side}: use 224")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A feature network of the user's: of faces, say."""

    weights: str | None = None
    """A TorchScript file, or `module:name` of a function without arguments that returns a network.
    It is given [B, 3, side, side] in [-1, 1] and returns [B, D]."""
    sha256: str | None = None
    """What the hash of the TorchScript file begins with."""
    resize: Backend = "pil"
    """To `side`."""
    side: int = 160
    """What it is shown, px."""

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"face.side must be at least 1; got {self.side}: use 160")


@dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """LPIPS (Zhang et al. 2018), by torchmetrics."""

    net: Literal["alex", "vgg"] = "alex"
    """Its trunk."""
    weights: Path | None = None
    """torchvision's file of the trunk; None looks where it puts its download."""
    sha256: str | None = None
    """What the file's hash begins with; None takes the part that torchvision's name tells."""


class Encoder(ABC):
    """Pictures to features.

    Attributes:
        weights: file -> sha256 of what was loaded. settings: what else decides the features.
    """

    weights: dict[str, str]
    settings: dict[str, Any]

    @abstractmethod
    def features(self, pictures: Tensor) -> Tensor:
        """[B, D] fp32 on the CPU, of [B, 3, H, W] of 8 bits."""


class Inception(Encoder):
    """The 2,048 numbers before the classifier, and the classifier's logits of them."""

    def __init__(self, config: InceptionConfig, device: str) -> None:
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        except ImportError as error:
            raise Unavailable(INSTALL) from error
        name = Path(urlparse(fidelity.URL_INCEPTION_V3).path).name
        get = (
            'python -c "from torch_fidelity.feature_extractor_inceptionv3 import '
            "FeatureExtractorInceptionV3 as F; F('inception-v3-compat', ['2048'])\" downloads it"
        )
        path, self.weights = checked_file("inception", config.weights, config.sha256, name, get)
        # torch-fidelity unpickles what it is given: it gets tensors that were read without code.
        buffer = io.BytesIO()
        torch.save(read_tensors(path), buffer)
        buffer.seek(0)
        try:
            net = fidelity.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer
            )
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise Unavailable(f"{path} is no Inception of torch-fidelity's ({reason})") from error
        # Its own forward takes 8 bits alone, and a clean resize gives more: its parts in turn.
        *trunk, self.classifier = net.children()
        self.trunk = nn.Sequential(*trunk).to(device)
        self.device, self.resize = device, config.resize
        self.settings = {"encoder": "inception", "resize": config.resize, "side": 299}

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        x = resized(pictures, 299, self.resize).to(self.device)
        return self.trunk((x - 128) / 128).flatten(1).float().cpu()

    def logits(self, features: Tensor) -> Tensor:
        """[B, 1008] without the classifier's bias, as the Inception Score takes them."""
        return features @ self.classifier.weight.float().cpu().T  # type: ignore[operator]


class CLIPEncoder(Encoder):
    """Embeddings of pictures and of captions in one space."""

    def __init__(self, clip: FrozenCLIP, name: str, config: CLIPConfig) -> None:
        self.clip, self.resize = clip, config.resize
        try:
            self.side = clip.required_image_size()
        except ValueError as error:
            raise Unavailable(str(error)) from error
        digest = weights_sha256(clip)
        compare("clip", name, config.sha256, digest)
        self.weights = {name: digest}
        self.settings = {
            "encoder": "clip",
            "clip": name,
            "resize": config.resize,
            "side": self.side,
        }

    def features(self, pictures: Tensor) -> Tensor:
        x = resized(pictures, self.side, self.resize).div_(127.5).sub_(1)
        return self.clip.encode_image(x.to(self.clip.device)).float().cpu()

    def texts(self, captions: Sequence[str]) -> Tensor:
        """[B, D] of captions."""
        parts = [
            self.clip.encode_text(captions[k : k + 256]).text_embed.float().cpu()
            for k in range(0, len(captions), 256)
        ]
        return torch.cat(parts)


class DINOv2(Encoder):
    """DINOv2's class token after its last LayerNorm (Oquab et al. 2023)."""

    def __init__(self, config: DINOConfig, device: str) -> None:
        get = (
            "hf download facebook/dinov2-large --local-dir dinov2-large fetches one; then "
            "--dinov2.weights dinov2-large"
        )
        folder = config.weights
        if folder is None or not (folder / "model.safetensors").is_file():
            raise Unavailable(f"dinov2.weights is no folder of a DINOv2; got {folder}: {get}")
        self.weights = {"model.safetensors": sha256(folder / "model.safetensors")}
        compare("dinov2", str(folder), config.sha256, self.weights["model.safetensors"])
        from transformers import AutoModel

        try:
            self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval().to(device)
        except (OSError, ValueError) as error:
            raise Unavailable(f"dinov2.weights: {folder} cannot be loaded ({error})") from error
        self.device, self.config = device, config
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)
        self.mean, self.std = mean.to(device), std.to(device)
        self.settings = {"encoder": "dinov2", "resize": config.resize, "side": config.side}

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        x = resized(pictures, self.config.side, self.config.resize).to(self.device) / 255
        out = self.model(pixel_values=(x - self.mean) / self.std)
        features: Tensor = out.last_hidden_state[:, 0]
        return features.float().cpu()


class Network(Encoder):
    """Features of a user's own network."""

    def __init__(self, config: NetworkConfig, device: str) -> None:
        named = config.weights
        if named is None:
            raise Unavailable(
                "face.weights names no network: --face.weights FILE (TorchScript) or module:name"
            )
        self.weights = {}
        if Path(named).is_file():
            self.weights = {Path(named).name: sha256(Path(named))}
            compare("face", named, config.sha256, self.weights[Path(named).name])
            try:
                self.model: Callable[[Tensor], Tensor] = torch.jit.load(named, device).eval()
            except RuntimeError as error:
                reason = str(error).strip().split("\n")[0]
                raise Unavailable(f"face.weights: {named} is no TorchScript ({reason})") from error
        else:
            self.model = _called(named, device)
        self.device, self.config = device, config
        self.settings = {
            "encoder": "face",
            "network": named,
            "resize": config.resize,
            "side": config.side,
        }

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        x = resized(pictures, self.config.side, self.config.resize).to(self.device)
        features = self.model(x / 127.5 - 1)
        if features.ndim != 2 or len(features) != len(x):
            raise ValueError(
                f"face.weights must give [B, D] features; got {list(features.shape)} for "
                f"{len(x)} pictures: flatten them in the network"
            )
        return features.float().cpu()


class LPIPS:
    """The perceptual distance of two pictures."""

    def __init__(self, config: LPIPSConfig, device: str) -> None:
        try:
            from torchmetrics.functional.image.lpips import _NoTrainLpips
        except ImportError as error:
            raise Unavailable(INSTALL) from error
        import torchvision

        builder, weights = {
            "alex": ("alexnet", torchvision.models.AlexNet_Weights.DEFAULT),
            "vgg": ("vgg16", torchvision.models.VGG16_Weights.DEFAULT),
        }[config.net]
        get = (
            f"python -c \"import torchvision; torchvision.models.{builder}(weights='DEFAULT')\" "
            "downloads it"
        )
        name = Path(urlparse(weights.url).path).name
        path, self.weights = checked_file("lpips", config.weights, config.sha256, name, get)
        self.model = _NoTrainLpips(net=config.net, pnet_rand=True)
        stored = read_tensors(path)
        # torchvision numbers the layers of `features`; LPIPS keeps those numbers in its slices.
        trunk: nn.Module = self.model.net
        own = {name: "features." + name.split(".", 1)[1] for name in trunk.state_dict()}
        if missing := sorted(set(own.values()) - stored.keys()):
            raise Unavailable(f"{path} lacks {missing[0]} of torchvision's {builder}: {get}")
        trunk.load_state_dict({name: stored[theirs] for name, theirs in own.items()})
        self.model.to(device)
        self.device = device
        self.settings = {"encoder": "lpips", "net": config.net}

    @torch.no_grad()
    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        """[B] of pictures [B, 3, H, W] of 8 bits, as they are; raises ValueError where they are
        smaller than its trunk can see."""
        if min(a.shape[-2:]) < 32:
            raise ValueError(
                f"pictures must be at least 32 px for lpips_diversity; got {min(a.shape[-2:])}: "
                "set resize.side 64"
            )
        x, y = (pictures.to(self.device).float() / 127.5 - 1 for pictures in (a, b))
        distances: Tensor = self.model(x, y).flatten()
        return distances.float().cpu()


def load_clip_encoder(
    config: CLIPConfig, own: FrozenCLIP | None, name: str, device: str
) -> CLIPEncoder:
    """The CLIP that `config` names, `own` where that is the measured model's."""
    if config.name == "model":
        if own is None:
            raise Unavailable(
                "clip.name is that of the model, and no model with a CLIP is measured: name one, "
                "such as --clip.name ViT-L-14/openai"
            )
        return CLIPEncoder(own, f"{name}'s CLIP", config)
    try:
        clip = load_clip_of(config.name).to(device)
    except FileNotFoundError as error:
        raise Unavailable(f"clip.name: {error}") from error
    return CLIPEncoder(clip, config.name, config)


def weights_sha256(module: nn.Module) -> str:
    """A hash of a network's names, shapes and numbers, whatever files they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def checked_file(
    section: str, path: Path | None, expected: str | None, name: str, get: str
) -> tuple[Path, dict[str, str]]:
    """A weights file and its name -> sha256.

    Args:
        section: of the protocol.
        path: the file; None looks for `name` in torch.hub's folder of downloads.
        expected: what its hash must begin with; None takes what stands in `name` for such files.
        name: of the file as its library downloads it, `...-<first digits of its sha256>.pth`.
        get: the command that downloads it.

    Raises:
        Unavailable: it is not there, or of another hash.
    """
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / name
        expected = expected or name.rpartition("-")[2].removesuffix(".pth")
    if not path.is_file():
        raise Unavailable(
            f"{section}.weights: {path.name} is not there: {get}; or --{section}.weights FILE"
        )
    digest = sha256(path)
    compare(section, path.name, expected, digest)
    return path, {path.name: digest}


def compare(section: str, name: str, expected: str | None, found: str) -> None:
    """Raise Unavailable where a hash does not begin as was said."""
    if expected is not None and not found.startswith(expected.lower()):
        raise Unavailable(
            f"{section}.sha256 must be that of the weights; got {expected} for {name}, whose hash "
            f"is {found}: fetch the protocol's file, or state another hash"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict that torch.save has written; no code in it is run.

    Raises:
        Unavailable: it is something else.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises a dozen types on bad bytes
        reason = str(error).strip().split("\n")[0]
        raise Unavailable(f"{path} holds no tensors that can be read ({reason})") from error
    if not isinstance(stored, dict):
        raise Unavailable(f"{path} holds no state dict; got {type(stored).__name__}")
    return dict(stored)


def _called(named: str, device: str) -> Callable[[Tensor], Tensor]:
    module, _, function = named.partition(":")
    if not function:
        raise Unavailable(
            f"face.weights must be a file that is there or module:name; got {named}: copy it here"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module beside the user
    try:
        model = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"face.weights: {named} cannot be imported ({error})") from error
    return model.eval().to(device) if isinstance(model, nn.Module) else model
