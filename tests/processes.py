"""Several processes that train together, forked from one that has imported what they need."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
"""What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` puts into the environment;
a test holds the two together."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["unclip.training.decoder", "unclip.training.prior", "diffusers"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(environment: dict[str, str], log: Path, main: Callable[..., Any], args: Any) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    main(*args)


class Processes:
    """`count` processes that call `main(*args)`, as torchrun would start them.

    Attributes:
        logs: what each has said.
    """

    def __init__(
        self,
        count: int,
        main: Callable[..., Any],
        args: Sequence[Any],
        logs: Path,
        **environment: str,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank-{rank}.txt" for rank in range(count)]
        together = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(count),
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        }
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.unlink(missing_ok=True)
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            process = _context.Process(
                target=_child, args=(together | own if own else environment, log, main, args)
            )
            process.start()
            self.processes.append(process)

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = 300) -> list[int | None]:
        """Exit statuses; what still runs after so long is killed, and its status is -9."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self, *ranks: int) -> None:
        """kill -9, of some or of all."""
        for process in [self.processes[rank] for rank in ranks] or self.processes:
            if process.is_alive():
                process.kill()
                process.join()

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for process in [self.processes[rank] for rank in ranks] or self.processes:
            os.kill(process.pid or 0, number)

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.is_file())


def run(count: int, main: Callable[..., Any], args: Sequence[Any], logs: Path, **env: str) -> str:
    """Have them run to their end, and return what they said."""
    processes = Processes(count, main, args, logs, **env)
    assert processes.wait() == [0] * count, processes.said()
    return processes.said()
