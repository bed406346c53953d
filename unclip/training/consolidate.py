"""One folder from a checkpoint that many processes wrote: `python -m unclip.training.consolidate`.

A run exports its averaged weights with each checkpoint; this is for the other checkpoints, and for
the weights in training.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from unclip.checkpoint import load_weights, save_weights, written_whole
from unclip.config import one_line_errors
from unclip.training.checkpoints import damage, latest, read_weights

RUN_CONFIG = "unclip.yaml"


def consolidate(run: Path, out: Path, step: int | None = None, weights: str = "ema") -> str:
    """Write a model that `sample.py --model` reads from one of a run's checkpoints.

    Args:
        run: folder of the run.
        out: where to; what was there is replaced.
        step: of the checkpoint; None is the newest.
        weights: `ema`, the averages, or `model`, the weights in training.

    Returns:
        The name of the stage.

    Raises:
        FileNotFoundError: there is no such checkpoint, or the run has exported nothing.
        ValueError: the checkpoint is damaged, has no averages, or is of a LoRA adapter.
    """
    folder = latest(run) if step is None else run / "checkpoints" / f"step-{step:07d}"
    if folder is None or not folder.is_dir():
        there = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
        raise FileNotFoundError(
            f"{run} has no checkpoint {'' if folder is None else folder.name}: it has "
            f"{', '.join(there) or 'none'}"
        )
    if fault := damage(folder):
        raise ValueError(f"{folder} is damaged ({fault}): take another by --step")
    tensors = read_weights(folder, "model")
    if weights == "ema":
        averages = read_weights(folder, "ema")
        if not averages:
            raise ValueError(f"{folder} has no averages: pass --weights model")
        tensors |= averages
    own = {name.removeprefix("network."): tensor for name, tensor in tensors.items()}
    exported = next(run.glob("*/*.safetensors"), None)
    if exported is None:
        raise FileNotFoundError(f"{run} has no stage's folder beside its checkpoints")
    whole = load_weights(exported, mapped=False)
    known = {name: own[name] for name in whole if name in own}
    if not known:
        raise ValueError(
            f"{run} must be the run of a whole stage; got an adapter: export it by "
            f"`python -m unclip.hub export --to unclip --out {out} {run}`"
        )
    with written_whole(out) as temporary:
        shutil.copytree(exported.parent, temporary / exported.parent.name)
        save_weights(whole | known, temporary / exported.parent.name / exported.name)
        if (run / RUN_CONFIG).is_file():
            _copy_config(run, out, temporary)
    return exported.parent.name


def _copy_config(run: Path, out: Path, temporary: Path) -> None:
    """The run's `unclip.yaml`, with the folders that it names beside the run as seen from `out`."""
    values = yaml.safe_load((run / RUN_CONFIG).read_text())
    for named, key in ((values, "base"), (values["stages"], "clip")):
        name = named.get(key)
        if name is not None and (run / name).exists():
            named[key] = Path(os.path.relpath((run / name).resolve(), out.resolve())).as_posix()
    (temporary / RUN_CONFIG).write_text(yaml.safe_dump(values, sort_keys=False))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--step", type=int, help="of the checkpoint; by default the newest")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        stage = consolidate(arguments.run, arguments.out, arguments.step, arguments.weights)
        print(f"wrote {arguments.out / stage}")


if __name__ == "__main__":
    main()
