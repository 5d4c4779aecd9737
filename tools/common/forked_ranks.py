"""Runs a function on several ranks of this machine: imports once, then forks.

Eight ranks start in a second instead of a minute, because torch, DeepSpeed and transformers are imported by the parent. The
parent must not have run tensor code (a fork that inherits autograd or OpenMP threads hangs), so everything that computes,
references too, goes through `run_ranks`.
"""

from __future__ import annotations

import datetime
import gc
import io
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from recipes.common.runtime.network import free_port


class RankError(RuntimeError):
    """A rank raised or died; the message holds the first one's own traceback."""


def run_ranks(work: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 300.0) -> list[Any]:
    """Call work(*args) on `world_size` forked ranks, in a launcher's environment, and return their results by rank.

    Results may hold tensors, plain values, lists and dicts of them. Raises RankError when a rank fails or time is up, and
    leaves no process behind.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks, pipes = [], []
    for rank in range(world_size):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(work, args, rank, world_size, port, send, timeout_seconds, os.getpid())
        )
        process.start()
        send.close()
        ranks.append(process)
        pipes.append(receive)
    try:
        return _collect(pipes, timeout_seconds)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout_seconds)
        if not ready:
            missing = sorted(set(range(len(pipes))) - set(results))
            raise RankError(f"no result from ranks {missing} in {timeout_seconds:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                failed, payload = pipe.recv_bytes().split(b"\n", 1)
            except EOFError:
                raise RankError(f"rank {rank} died without a message") from None
            if failed == b"failed":
                raise RankError(f"rank {rank} failed:\n{payload.decode()}")
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)  # our own child's bytes
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    work: Callable[..., Any],
    args: tuple,
    rank: int,
    world_size: int,
    port: int,
    send: Connection,
    timeout_seconds: float,
    parent: int,
) -> None:
    gc.freeze()  # a collection, of which DeepSpeed asks for six in bf16, looks at nothing that the parent had imported
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    _shorten_waits(timeout_seconds)
    try:
        buffer = io.BytesIO()
        torch.save(work(*args), buffer)
        message = b"done\n" + buffer.getvalue()
    except BaseException:
        message = b"failed\n" + traceback.format_exc().encode()
    send.send_bytes(message)
    sys.stdout.flush()
    sys.stderr.flush()
    # Rank 0 serves the store that the others may still be joining by: stay until the parent, which then has every result, kills
    # this process; end if the parent itself is gone.
    while os.getppid() == parent:
        time.sleep(0.05)
    os._exit(0)  # gloo's threads may abort an orderly exit


def _shorten_waits(timeout_seconds: float) -> None:
    """Give every sub-group this timeout: on gloo they would wait 30 minutes for a lost rank, whatever is set elsewhere."""
    new_group = dist.new_group

    def bounded(ranks: list[int] | None = None, timeout: datetime.timedelta | None = None, **options: Any) -> Any:
        return new_group(ranks, timeout=datetime.timedelta(seconds=timeout_seconds), **options)

    dist.new_group = bounded
