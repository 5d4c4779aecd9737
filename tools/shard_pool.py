"""Pieces of work of tools.prepare_data spread over processes, with their progress added up."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from tools.data_input import InputFile, Piece
from tools.progress import Progress
from tools.shard_writer import Job, encoder, write_unit

POLL_SECONDS = 0.2


def write_in_processes(
    job: Job, files: list[InputFile], units: list[list[Piece]], todo: list[int], workers: int, progress: Progress
) -> None:
    """Write the units `todo`, several at once. The first error stops the rest and is raised.

    Spawned, not forked: the parent may hold threads of the tokenizer. Each process encodes in one thread.
    """
    context = multiprocessing.get_context("spawn")
    counters = [context.Value("q", 0) for _ in range(3)]  # documents, text bytes, input bytes
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job, counters))
    try:
        # each unit's own files travel with it: the whole list may be long
        pending = {pool.submit(_write_one, number, *_own_files(files, units[number])) for number in todo}
        while pending:
            finished, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            progress.update(*(counter.value for counter in counters))
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed (out of memory?); the same command goes on, try --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _own_files(files: list[InputFile], unit: list[Piece]) -> tuple[dict[int, InputFile], list[Piece]]:
    return {piece.file: files[piece.file] for piece in unit}, unit


_worker: dict = {}  # what _start_worker gives this process; written once, before any work


def _start_worker(job: Job, counters: list) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(job=job, counters=counters, tokenizer=encoder(job.tokenizer_file))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and a restarted one must not meet them."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _report(*amounts: int) -> None:
    for counter, amount in zip(_worker["counters"], amounts, strict=True):
        with counter.get_lock():
            counter.value += amount


def _write_one(number: int, files: dict[int, InputFile], unit: list[Piece]) -> None:
    write_unit(_worker["job"], number, files, unit, _worker["tokenizer"], _report)
