"""A run's stage on the Hub, while it trains."""

from __future__ import annotations

import logging
from pathlib import Path

from unclip.hub.publish import upload

log = logging.getLogger(__name__)


def push_run(run: Path, stage: str, repo_id: str, checkpoint: Path) -> None:
    """Put a run's stage, its config and its metrics on the Hub in one commit, as a model that
    `--model org/name` reads. What keeps it from getting there is a warning: training goes on.

    Args:
        run: folder of the run.
        stage: its sub-folder that holds the stage.
        repo_id: `org/name`; a private repository is made if it is not there.
        checkpoint: the one that was just written, for the commit's message.
    """
    try:
        address = upload(
            run,
            repo_id,
            private=True,
            message=f"{stage}, {checkpoint.name}",
            allow_patterns=[f"{stage}/*", "*.yaml", "metrics.jsonl"],
        )
    except (ValueError, PermissionError, ConnectionError) as error:
        log.warning("%s of %s is not on the Hub: %s", checkpoint.name, run, error)
    else:
        log.info("pushed %s to %s", checkpoint.name, address)
