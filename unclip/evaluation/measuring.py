"""From pictures to numbers: which metric wants which features of which pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.data.oracle import Oracle
from unclip.data.shapes import draw_scene
from unclip.evaluation import metrics as maths
from unclip.evaluation import prior as prior_alone
from unclip.evaluation.captions import Item, list_sha256, shapes_index
from unclip.evaluation.drawing import image_name
from unclip.evaluation.encoders import (
    BATCH,
    LPIPS,
    CLIPConfig,
    CLIPEncoder,
    DINOv2,
    Encoder,
    Inception,
    Network,
    Unavailable,
    load_clip_encoder,
)
from unclip.evaluation.intervals import wilson
from unclip.evaluation.protocol import ENCODERS, METRICS, Protocol
from unclip.evaluation.references import RealPictures, batches, plain_id, read_bits
from unclip.evaluation.resize import fitted
from unclip.evaluation.shapes import score_picture, tabulate
from unclip.pipeline import UnCLIP

OF_ENCODER = {
    "fid": "inception",
    "kid": "inception",
    "inception_score": "inception",
    "clip_score": "clip",
    "r_precision": "clip",
    "cmmd": "clip",
    "fsd": "face",
    "fss": "face",
    **{f"fd_{name}": name for name in ENCODERS},
}
OF_REFERENCE = ("fid", "kid", "precision", "recall", "cmmd", *(f"fd_{name}" for name in ENCODERS))
"""Metrics that hold drawn pictures against a set of real ones."""


@dataclass
class Measured:
    """What a result folder says of its pictures."""

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, list[float | bool | None]] = field(default_factory=dict)
    """Metric -> a score a picture."""
    features: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Encoder -> `features`, and `reference` where there is one."""


class Repeats:
    """Counts pictures that are the same as one before, to the last bit."""

    def __init__(self, what: str) -> None:
        self.what, self.seen, self.count = what, set[bytes](), 0
        self.all = hashlib.sha256()

    def watch(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        for part in parts:
            for picture in part:
                self.count += 1
                one = hashlib.sha256(picture.numpy().tobytes()).digest()
                self.seen.add(one)
                self.all.update(one)
            yield part

    def check(self, allowed: float) -> None:
        """Raise ValueError where more than that share is repeated."""
        again = self.count - len(self.seen)
        if again > allowed * self.count:
            raise ValueError(
                f"{self.what} must differ, all but max_repeated {allowed} of them; got {again} of "
                f"{self.count} that repeat another: draw each with its own seed, or raise "
                "max_repeated"
            )


def encoder_of(metric: str, protocol: Protocol) -> str | None:
    """Whose features a metric is made of."""
    if metric in ("precision", "recall"):
        return protocol.settings.precision_recall_encoder
    return OF_ENCODER.get(metric)


def check_counts(
    protocol: Protocol, pictures: int, captions: Sequence[Item], reference: int | None
) -> None:
    """Raise ValueError where a metric needs more than there will be: before hours of drawing.

    Args:
        protocol: what is to be measured.
        pictures: how many will be drawn.
        captions: all of the protocol's, drawn or not.
        reference: how many real ones there are.
    """
    if protocol.num is not None and protocol.num > len(captions):
        raise ValueError(
            f"num must not exceed the captions, {len(captions)}; got {protocol.num}: lower it, or "
            "give more captions"
        )
    settings = protocol.settings
    texts = len({" ".join(item.caption.casefold().split()) for item in captions})
    fewest = pictures if reference is None else min(pictures, reference)
    needs = (
        ("kid", "settings.kid_subset_size", settings.kid_subset_size, fewest, 0),
        ("inception_score", "settings.inception_splits", settings.inception_splits, pictures, 0),
        ("precision", "settings.neighbours", settings.neighbours, fewest, 1),
        ("recall", "settings.neighbours", settings.neighbours, fewest, 1),
        ("r_precision", "settings.r_precision_captions", settings.r_precision_captions, texts, 0),
    )
    for metric, name, value, there, spare in needs:
        if metric in protocol.metrics and value + spare > there:
            what = "distinct captions" if metric == "r_precision" else "pictures"
            what = what if there in (pictures, texts) else "reference pictures"
            raise ValueError(
                f"{name} must not exceed {there - spare} for {metric} of {there} {what}; got "
                f"{value}: use more {what}, or lower it"
            )
    sets = [name for name in protocol.metrics if name in OF_REFERENCE]
    if sets and pictures < 2:
        raise ValueError(
            f"num must give at least 2 pictures for {sets[0]}; got {pictures}: use 500"
        )
    if "prior_frechet" in protocol.metrics and pictures // protocol.samples_per_caption < 8:
        raise ValueError(
            "num must be at least 8 for prior_frechet; got "
            f"{pictures // protocol.samples_per_caption}: use 500"
        )


def reference_ids(protocol: Protocol, reference: RealPictures, items: Sequence[Item]) -> list[str]:
    """Of the real pictures that sets of drawn ones are held against; raises ValueError where there
    are fewer than `reference.count`."""
    config = protocol.reference
    if config.which == "captions":
        return list(dict.fromkeys(item.id for item in items))[: config.count]
    return reference.some(config.start, config.count)


class Measuring:
    """One folder's pictures under one protocol."""

    def __init__(
        self,
        protocol: Protocol,
        folder: Path,
        items: Sequence[Item],
        captions: Sequence[Item],
        reference: RealPictures | None,
        pipe: UnCLIP | None,
        model: str,
        device: str,
    ) -> None:
        """Look at the pictures' size.

        Args:
            protocol: what is measured.
            folder: with the pictures.
            items: of each picture. captions: all of the protocol's.
            reference: real pictures, where there are some.
            pipe: the model, where there is one. model: its name.
            device: where networks run.
        """
        self.protocol, self.folder = protocol, folder
        self.items, self.captions = items, captions
        self.pipe, self.model, self.device = pipe, model, device
        self.out = Measured()
        first = fitted(read_bits(folder / image_name(0)), protocol.resize)
        self.size = (first.shape[-2], first.shape[-1])
        self._reference = reference
        if reference is not None:
            reference.side = self.size[0]
        self._reference_sha256 = ""
        self._encoders: dict[str, Encoder | Unavailable] = {}

    # ------------------------------------------------------------------------------- pictures

    def drawn(self) -> Iterator[Tensor]:
        """The pictures [B, 3, H, W] of 8 bits."""
        names = [image_name(k) for k in range(len(self.items))]

        def read(name: str) -> Tensor:
            return read_bits(self.folder / name)

        return batches(names, read, self.protocol.resize, self.size, "pictures", BATCH)

    @property
    def reference(self) -> RealPictures:
        """Where real pictures come from."""
        if self._reference is None:
            raise Unavailable(
                "reference.data names no real pictures: --reference.data FOLDER, tars or a data set"
            )
        return self._reference

    def real(self, ids: Sequence[str], source: RealPictures | None = None) -> Iterator[Tensor]:
        """Real pictures by id [B, 3, H, W] of 8 bits."""
        read = (source or self.reference).read
        return batches(ids, read, self.protocol.resize, self.size, "reference", BATCH)

    # ------------------------------------------------------------------------------- features

    def encoder(self, name: str) -> Encoder:
        """One of the protocol's; raises Unavailable, each time it is asked for."""
        if name not in self._encoders:
            try:
                self._encoders[name] = self._load(name)
            except Unavailable as reason:
                self._encoders[name] = reason
        found = self._encoders[name]
        if isinstance(found, Unavailable):
            raise found
        return found

    def _load(self, name: str) -> Encoder:
        protocol, device = self.protocol, self.device
        if name == "inception":
            return Inception(protocol.inception, device)
        if name == "dinov2":
            return DINOv2(protocol.dinov2, device)
        if name == "face":
            return Network(protocol.face, device)
        own = None if self.pipe is None else self.pipe.clip
        return load_clip_encoder(protocol.clip, own, self.model, device)

    def encode(self) -> None:
        """All features that the metrics want, each set of pictures read once."""
        wanted = {encoder_of(metric, self.protocol) for metric in self.protocol.metrics}
        of_sets = {
            encoder_of(metric, self.protocol)
            for metric in self.protocol.metrics
            if metric in OF_REFERENCE
        }
        usable = {
            name: found for name in sorted(filter(None, wanted)) if (found := self._try(name))
        }
        repeats = Repeats("pictures")
        parts = _encoded(repeats.watch(self.drawn()), usable)
        repeats.check(self.protocol.max_repeated)
        self.out.features = {name: {"features": tensor} for name, tensor in parts.items()}
        of_sets &= usable.keys()
        if of_sets and self._reference is not None:
            repeats = Repeats("reference")
            ids = reference_ids(self.protocol, self._reference, self.items)
            seen = repeats.watch(self.real(ids))
            real = _encoded(seen, {name: usable[name] for name in usable if name in of_sets})
            repeats.check(self.protocol.max_repeated)
            self._check_reference(repeats.all.hexdigest())
            for name, tensor in real.items():
                self.out.features[name]["reference"] = tensor

    def _check_reference(self, found: str) -> None:
        expected = self.protocol.reference.sha256
        if expected is not None and not found.startswith(expected.lower()):
            raise ValueError(
                f"reference.sha256 must be that of the set; got {expected} for "
                f"{self.reference.data!r}, whose pictures have {found}: take the protocol's own "
                "set, or state another hash"
            )
        self._reference_sha256 = found

    def _try(self, name: str) -> Encoder | None:
        try:
            return self.encoder(name)
        except Unavailable:
            return None

    def sets(self, name: str) -> tuple[Tensor, Tensor]:
        """Features of drawn and of real pictures."""
        self.encoder(name)
        _ = self.reference
        return self.out.features[name]["features"], self.out.features[name]["reference"]

    # -------------------------------------------------------------------------------- metrics

    def measure(self) -> Measured:
        """All of the protocol's metrics; those that cannot be had carry a reason.

        Raises:
            ValueError: the pictures are at fault: they repeat, differ in size, are too few.
        """
        self.encode()
        for metric in self.protocol.metrics:
            entry: dict[str, Any] = {
                "value": None,
                "better": METRICS[metric],
                "count": len(self.items),
                "settings": {},
            }
            try:
                if (name := encoder_of(metric, self.protocol)) is not None:
                    encoder = self.encoder(name)
                    entry |= {"settings": dict(encoder.settings), "weights": encoder.weights}
                found = self._metric(metric)
                settings = {**entry["settings"], **found.pop("settings", {})}
                self.out.metrics[metric] = {**entry, **found, "settings": settings}
            except Unavailable as reason:
                self.out.metrics[metric] = {**entry, "reason": str(reason)}
        return self.out

    def _metric(self, metric: str) -> dict[str, Any]:
        family = metric.partition("_")[0]
        if family in ("oracle", "fd"):
            return getattr(self, f"_{family}")(metric)
        if metric in ("precision", "recall"):
            return self._precision_recall(metric)
        if metric in ("fsd", "fss"):
            return self._face(metric)
        measure: Callable[[], dict[str, Any]] = getattr(self, f"_{metric}")
        return measure()

    def _against(self, real: Tensor) -> dict[str, Any]:
        return {
            "reference_count": len(real),
            "reference_sha256": self._reference_sha256,
            "resize_to": self.protocol.resize.side,
        }

    def _fd(self, metric: str) -> dict[str, Any]:
        drawn, real = self.sets(metric.removeprefix("fd_"))
        return {"value": _fidelity(maths.frechet, drawn, real), "settings": self._against(real)}

    def _fid(self) -> dict[str, Any]:
        return self._fd("fd_inception")

    def _kid(self) -> dict[str, Any]:
        drawn, real = self.sets("inception")
        s = self.protocol.settings
        given = {"subsets": s.kid_subsets, "subset_size": s.kid_subset_size, "seed": s.seed}
        mean, deviation = _fidelity(maths.kid, drawn, real, **given)
        return {"value": mean, "settings": {**given, "std": deviation, **self._against(real)}}

    def _inception_score(self) -> dict[str, Any]:
        encoder, s = self.encoder("inception"), self.protocol.settings
        assert isinstance(encoder, Inception)
        logits = encoder.logits(self.out.features["inception"]["features"])
        given = {"splits": s.inception_splits, "seed": s.seed}
        mean, deviation = _fidelity(maths.inception_score, logits, **given)
        return {"value": mean, "settings": {**given, "std": deviation}}

    @cached_property
    def _two(self) -> tuple[float, float, dict[str, Any]]:
        drawn, real = self.sets(self.protocol.settings.precision_recall_encoder)
        given = {"neighbours": self.protocol.settings.neighbours}
        found = _fidelity(maths.precision_recall, drawn, real, **given)
        return (*found, {**given, **self._against(real)})

    def _precision_recall(self, metric: str) -> dict[str, Any]:
        precision, recall, settings = self._two
        return {"value": precision if metric == "precision" else recall, "settings": settings}

    def _cmmd(self) -> dict[str, Any]:
        drawn, real = self.sets("clip")
        given = {
            "sigma": self.protocol.settings.cmmd_sigma,
            "scale": self.protocol.settings.cmmd_scale,
        }
        # On the unit sphere whatever the CLIP's own stages were trained on.
        drawn, real = (torch.nn.functional.normalize(x, dim=-1) for x in (drawn, real))
        return {
            "value": maths.cmmd(drawn, real, **given),
            "settings": {**given, **self._against(real)},
        }

    @cached_property
    def _texts(self) -> Tensor:
        encoder = self.encoder("clip")
        assert isinstance(encoder, CLIPEncoder)
        return encoder.texts([item.caption for item in self.captions])

    @cached_property
    def _own_texts(self) -> Tensor:
        rows = {item.id: row for row, item in enumerate(self.captions)}
        return self._texts[[rows[item.id] for item in self.items]]

    def _clip_score(self) -> dict[str, Any]:
        images = self.out.features["clip"]["features"]
        scores = maths.clip_scores(images, self._own_texts).tolist()
        self.out.scores["clip_score"] = scores
        return {**maths.mean_of(scores), "settings": {"scale": 100}}

    def _r_precision(self) -> dict[str, Any]:
        s = self.protocol.settings
        pool = [item.caption for item in self.captions]
        others = maths.mismatched(
            [item.caption for item in self.items], pool, s.r_precision_captions - 1, s.seed
        )
        images = self.out.features["clip"]["features"]
        hits = maths.r_precision(images, self._own_texts, self._texts, others).tolist()
        self.out.scores["r_precision"] = hits
        return {
            **_share(hits),
            "settings": {
                "captions": s.r_precision_captions,
                "pool": len(pool),
                "pool_sha256": list_sha256(self.captions),
                "seed": s.seed,
            },
        }

    def _lpips_diversity(self) -> dict[str, Any]:
        lpips, each = LPIPS(self.protocol.lpips, self.device), self.protocol.samples_per_caption
        groups = (
            torch.stack(
                [
                    fitted(read_bits(self.folder / image_name(k)), self.protocol.resize)
                    for k in range(start, start + each)
                ]
            )
            for start in range(0, len(self.items), each)
        )
        means = [maths.diversity([group], lpips.distances)[0] for group in groups]
        settings = {**lpips.settings, "samples_per_caption": each}
        return {**maths.mean_of(means), "settings": settings, "weights": lpips.weights}

    @cached_property
    def _faces(self) -> tuple[Tensor, Tensor]:
        encoder = self.encoder("face")
        true = _encoded(self.real([item.id for item in self.items]), {"face": encoder})["face"]
        return maths.face_distances(self.out.features["face"]["features"], true)

    def _face(self, metric: str) -> dict[str, Any]:
        _ = self.reference
        distances, likenesses = self._faces
        scores = (distances if metric == "fsd" else likenesses).tolist()
        self.out.scores[metric] = scores
        return dict(maths.mean_of(scores))

    @cached_property
    def _verdicts(self) -> list[dict[str, Any]]:
        oracle = Oracle.load().to(self.device)
        world = self.protocol.captions.shapes
        told = [draw_scene(world, shapes_index(item.id)) for item in self.items]
        scenes, captions = zip(*told, strict=True)
        floats = (pictures.float().div(127.5).sub(1) for pictures in self.drawn())
        readings = [reading for images in floats for reading in oracle.read(images)]
        verdicts = [*map(score_picture, readings, scenes, captions)]
        self.out.tables["oracle"] = tabulate(verdicts, scenes)
        return verdicts

    def _oracle(self, metric: str) -> dict[str, Any]:
        name = metric.removeprefix("oracle_")
        said = [verdict[name] for verdict in self._verdicts]
        self.out.scores[metric] = said
        counted = [one for one in said if one is not None]
        if not counted:
            raise Unavailable(f"no caption tells the {name}: take others, with captions.count")
        return _share(counted)

    @cached_property
    def _prior(self) -> dict[str, Any]:
        if self.pipe is None or self.pipe.prior is None or self.pipe.clip is None:
            raise Unavailable("there is no prior to measure: --model one that has it")
        prior, clip = self.pipe.prior, self.pipe.clip
        encode = partial(_encoded, encoders={"clip": CLIPEncoder(clip, self.model, CLIPConfig())})
        own = list({item.id: item for item in self.items}.values())
        truth = encode(self.real([item.id for item in own]))["clip"].to(clip.device)
        floor = self._floor(own)
        other = truth if floor is None else encode(floor)["clip"].to(clip.device)
        captions = [item.caption for item in own]
        found = prior_alone.measure(
            prior, clip, captions, truth, other, **self.protocol.cascade.of_prior
        )
        if floor is None:
            found = {name: v for name, v in found.items() if "real_to_real" not in name}
            del found["recall_of_real"]
        self.out.tables["prior"] = found
        return found

    def _floor(self, own: Sequence[Item]) -> Iterator[Tensor] | None:
        """As many other real pictures as captions; None where there are not so many."""
        config = self.protocol.reference
        source = self.reference
        if config.floor is not None:
            source = RealPictures(config.floor, self.protocol.captions, self.size[0])
            ids = source.ids or source.some(config.start, len(own))
        else:
            ids = source.ids or source.some(config.start, config.count or len(own))
        # A file's name is an id with and without its ending.
        taken = {plain_id(item.id) for item in own}
        ids = [id for id in ids if id not in taken]
        if len(ids) < len(own):
            return None
        # Files may come sorted by subject.
        spread = ids[:: len(ids) // len(own)][: len(own)]
        return self.real(spread, source)

    def _prior_frechet(self) -> dict[str, Any]:
        found = self._prior
        return {"value": found["frechet_sampled_to_real"], "count": found["captions"]}

    def _prior_frechet_floor(self) -> dict[str, Any]:
        found = self._prior
        if "frechet_real_to_real" not in found:
            raise Unavailable(
                f"there are fewer than {found['captions']} other real pictures: --reference.floor "
                "names more"
            )
        return {"value": found["frechet_real_to_real"], "count": found["captions"]}


def _share(hits: Sequence[bool]) -> dict[str, Any]:
    return {
        "value": sum(hits) / len(hits),
        "count": len(hits),
        "interval": list(wilson(sum(hits), len(hits))),
    }


def _fidelity(function: Callable[..., Any], *sets: Tensor, **given: Any) -> Any:
    try:
        return function(*sets, **given)
    except ImportError as error:
        raise Unavailable("it needs the extra `metrics`: pip install 'unclip[metrics]'") from error


def _encoded(parts: Iterable[Tensor], encoders: dict[str, Encoder]) -> dict[str, Tensor]:
    """Features by encoder of pictures that are read once."""
    found: dict[str, list[Tensor]] = {name: [] for name in encoders}
    for part in parts:
        for name, encoder in encoders.items():
            found[name].append(encoder.features(part))
    return {name: torch.cat(features) for name, features in found.items()}
