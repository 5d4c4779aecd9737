"""Runs units of work of tools.data prepare, in this process or in several, with a progress bar over all."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from tools.common.console import progress_bar
from tools.data.shard_writer import Encoders, Job, Work

POLL_SECONDS = 0.2
Do = Callable[[Job, Work, Encoders, Callable[[int, int, int], None]], None]


def do_all(do: Do, job: Job, todo: list[Work], workers: int, name: str) -> None:
    """Do every unit of `todo`, several at once. The first error stops the rest and is raised."""
    with progress_bar(name, sum(part.bytes for work in todo for part in work.ranges)) as bar:
        if workers == 1 or len(todo) == 1:
            encoders, done = Encoders(job), [0, 0, 0]

            def report(*amounts: int) -> None:
                done[:] = (total + amount for total, amount in zip(done, amounts, strict=True))
                _show(bar, *done)

            for work in todo:
                do(job, work, encoders, report)
        elif todo:
            _do_in_processes(do, job, todo, min(workers, len(todo)), bar)


def _show(bar: tqdm, documents: int, text_bytes: int, input_bytes: int) -> None:
    """Move the bar to these totals."""
    bar.set_postfix_str(f"{documents} documents, {text_bytes / 1e6:.1f} MB of text", refresh=False)
    bar.update(input_bytes - bar.n)


def _do_in_processes(do: Do, job: Job, todo: list[Work], workers: int, bar: tqdm) -> None:
    """Spawn, not fork, the processes: this one may hold threads of the tokenizer. Each encodes in one thread."""
    context = multiprocessing.get_context("spawn")
    counters = [context.Value("q", 0) for _ in range(3)]  # documents, text bytes, input bytes
    threads = {name: os.environ.get(name) for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")}
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")  # the children are started with these
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job, counters))
    try:
        pending = {pool.submit(_do_one, do, work) for work in todo}
        while pending:
            finished, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            _show(bar, *(counter.value for counter in counters))
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed (out of memory?); the same command continues; try fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in threads.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


_worker: dict = {}  # set once by _start_worker, before any work


def _start_worker(job: Job, counters: list) -> None:
    _worker.update(job=job, counters=counters, encoders=Encoders(job))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with its parent: a killed parent cannot stop its workers, and a restarted one must not meet them."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _report(*amounts: int) -> None:
    for counter, amount in zip(_worker["counters"], amounts, strict=True):
        with counter.get_lock():
            counter.value += amount


def _do_one(do: Do, work: Work) -> None:
    do(_worker["job"], work, _worker["encoders"], _report)
