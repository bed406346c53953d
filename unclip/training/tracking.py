"""What a run reports: means since the last line, `metrics.jsonl`, and an experiment tracker."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from unclip.checkpoint import written_file

log = logging.getLogger(__name__)

WANDB_ID = "wandb_run_id"
"""File of the run's folder by which a run that goes on continues its own record at wandb."""
WANDB_TIMEOUT = 60
"""Seconds to wait for wandb's server before the run is tracked offline."""

TrackerName = Literal["none", "wandb", "tensorboard"]


class Meter:
    """Means of logged values since the last line, and of the loss by timestep quartile.

    The values themselves are kept, and summed without rounding: a mean does not depend on which
    process saw which sample, or on a resume between two lines.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)

    def add(self, out: Mapping[str, Tensor], weight: int = 1) -> None:
        """Take up what an objective returned; its means count `weight` times."""
        for name, value in out.items():
            if value.ndim == 0:
                self.values[name] += [value.item()] * weight
        if "timesteps" in out and "per_sample" in out:
            quartile = (out["timesteps"] * 4).long().clamp(max=3).tolist()
            for q, value in zip(quartile, out["per_sample"].tolist(), strict=True):
                self.values[f"loss_q{q + 1}"].append(value)

    def gather(self) -> dict[str, list[float]]:
        """The values of all processes; each has to ask for them at the same time."""
        merged: dict[str, list[float]] = defaultdict(list)
        for values in gather_object([dict(self.values)]):
            for name, numbers in values.items():
                merged[name].extend(numbers)
        return dict(merged)

    def read(self) -> dict[str, float]:
        """Means over all processes; starts again from nothing."""
        merged = self.gather()
        self.values.clear()
        return {name: math.fsum(numbers) / len(numbers) for name, numbers in sorted(merged.items())}


class Tracking:
    """Where the metrics of a run go: `metrics.jsonl` always, and the tracker that is named.

    Raises:
        ValueError: the tracker is not installed.
    """

    def __init__(
        self, accelerator: Accelerator, run: Path, tracker: TrackerName, resolved: Mapping[str, Any]
    ) -> None:
        self.accelerator = accelerator
        self.path = run / "metrics.jsonl"
        if tracker == "none":
            return
        if not accelerator.log_with:  # Accelerate would drop it silently
            raise ValueError(
                f"fit.tracker needs {tracker}, which is not installed: "
                f"pip install {tracker}, or use none"
            )
        options: dict[str, Any] = {}
        if tracker == "wandb" and accelerator.is_main_process:
            options = {"wandb": _wandb_options(run)}
        try:
            accelerator.init_trackers("unclip", _flat(resolved), options)
        except Exception as error:  # wandb's own, of several kinds: no server, no account
            if tracker != "wandb" or os.environ.get("WANDB_MODE") == "offline":
                raise
            log.warning(
                "wandb cannot be reached (%s): the run is tracked offline; afterwards "
                "`wandb sync %s` sends it",
                " ".join(str(error).split()),
                run / "wandb" / "offline-run-*",
            )
            import wandb

            # Or wandb's service takes the run for one that is still on its way, in this process and
            # where another has started the service.
            wandb.teardown()
            os.environ.pop("WANDB_SERVICE", None)
            os.environ["WANDB_MODE"] = "offline"
            options["wandb"]["mode"] = "offline"
            accelerator.init_trackers("unclip", _flat(resolved), options)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a line to `metrics.jsonl`, and to the tracker."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.accelerator.log(dict(metrics), step=step)

    def log_images(self, name: str, images: Tensor, step: int) -> None:
        """Send a grid [B, 3, H, W] in [0, 1] to the tracker, on the main process."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: images.numpy()}, step=step)
            elif tracker.name == "wandb":
                pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
                tracker.log_images({name: list(pixels)}, step=step)


def offline_without_an_account() -> None:
    """Have wandb keep its record on this machine where nobody is logged in."""
    if not (os.environ.get("WANDB_API_KEY") or Path("~/.netrc").expanduser().exists()):
        os.environ.setdefault("WANDB_MODE", "offline")


def _wandb_options(run: Path) -> dict[str, Any]:
    import wandb

    path = run / WANDB_ID
    if not path.is_file():
        with written_file(path) as aside:
            aside.write_text(secrets.token_hex(4))
    return {
        "dir": str(run),
        "name": run.name,
        "id": path.read_text().strip(),
        "resume": "allow",
        "settings": wandb.Settings(init_timeout=WANDB_TIMEOUT),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one level with dotted names, each a type every tracker takes."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (int, float, str)) else str(value)
    return flat
