"""The clock: a step's parts add up to it, communication is counted to the byte, and nothing that is learned changes."""

import json

import pytest
import torch

from recipes.common.config.placement import coordinates
from recipes.common.monitor.phases import Phases
from recipes.common.recipe import AdamW, Layout
from recipes.common.run_dir.timing_files import FIRST_COMM_ROWS, THIN_AFTER, THIN_STEPS, TimingWriter, read_timing, read_trace
from recipes.common.runtime.step_clock import (
    BACKWARD,
    CLOCK,
    COOL_DOWN,
    DATA,
    DATA_PARALLEL,
    FORWARD,
    HOST,
    OTHER,
    PARTS,
    PIPELINE,
    RECOMPUTE,
    TENSOR,
    WARM_UP,
    WEIGHTS,
    Clock,
    CommKey,
    StepTimes,
    account,
)
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, build_trial_trainer, rank_batches

SPANS = {part: CLOCK.span(part) for part in PARTS}
RECEIVE = CLOCK.message("recv", 100, 1)


def test_each_moment_goes_to_the_innermost_span():
    marks = [
        (DATA, 0), (OTHER, 5), (RECEIVE, 6), (None, 10), (SPANS[FORWARD], 11), (SPANS[RECOMPUTE], 12), (SPANS[TENSOR], 13),
        (None, 15), (None, 16), (None, 20), (RECEIVE, 21), (None, 24), (SPANS[BACKWARD], 25), (SPANS[RECOMPUTE], 26), (None, 30),
        (None, 33), (RECEIVE, 35), (None, 40), (HOST, 42), (OTHER, 50),
    ]  # fmt: skip
    parts, comms = account(marks, pipelined=True)
    assert sum(parts.values()) == 50
    # what is recomputed is told apart only inside the backward pass: in the forward pass it is run for the first time
    assert parts == dict.fromkeys(PARTS, 0) | {
        DATA: 5, WARM_UP: 4, FORWARD: 7, TENSOR: 2, PIPELINE: 3, BACKWARD: 4, RECOMPUTE: 4, COOL_DOWN: 5, HOST: 8, OTHER: 8,
    }  # fmt: skip
    assert comms == {CommKey("pipeline", "recv", 100, 2, 1): [3, 12, 3]}


class FakeEvent:
    """A CUDA event on a device whose work takes 3 ms a mark and ends when somebody waits."""

    clock, done = 0.0, False

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        FakeEvent.clock += 3.0
        self.stamp = FakeEvent.clock

    def query(self):
        return FakeEvent.done

    def synchronize(self):
        FakeEvent.done = True

    def elapsed_time(self, later):
        return later.stamp - self.stamp


def test_on_a_gpu_a_step_is_read_once_the_device_has_done_it(monkeypatch):
    main, side = object(), object()
    stream = [main]
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream[0])
    clock = Clock()
    clock.start(coordinates(0, 1, Layout()), torch.device("cuda"), {})
    clock.begin_step(7)
    clock.phase(OTHER)
    with clock.span(FORWARD):
        stream[0] = side  # beside the computation: hidden, so no time of the step
        with clock.span(DATA_PARALLEL):
            pass
        stream[0] = main
    clock.end_step()
    clock.settle()
    assert clock.taken() == []
    clock.settle(wait=True)
    (step,) = clock.taken()
    assert (step.step, step.micro_batches) == (7, 1)
    assert step.parts == dict.fromkeys(PARTS, 0) | {DATA: 3_000_000, OTHER: 6_000_000, FORWARD: 3_000_000}


def test_an_exception_closes_its_spans():
    marks = [(DATA, 0), (SPANS[FORWARD], 1), (SPANS[TENSOR], 2), (None, 3), (None, 3), (OTHER, 9)]
    assert sum(account(marks, pipelined=False)[0].values()) == 9


def test_long_runs_write_a_row_for_ten_steps_and_a_cut_line_is_not_read(tmp_path):
    writer = TimingWriter(tmp_path, 0, {"world": 1})
    steps = THIN_AFTER + 5 * THIN_STEPS
    comm = CommKey("data", "all_reduce", 8, 2, -1)
    for step in range(1, steps + 1):
        parts = dict.fromkeys(PARTS, 0) | {FORWARD: 2000, BACKWARD: 1000 * step}
        writer.step(StepTimes(step, 0, 4, parts, {comm: [3, 3000, 500 + step]}, []))
    writer.close()
    path = tmp_path / "timing/rank_00000.jsonl"
    path.write_bytes(path.read_bytes() + b"[1234,1,4,")
    timing = read_timing(tmp_path)[0]
    assert len(timing.rows) == THIN_AFTER + 5
    assert timing.rows[-1][:3] == [steps, THIN_STEPS, 4]
    forward, backward = (3 + PARTS.index(part) for part in (FORWARD, BACKWARD))
    assert timing.rows[-1][forward] == 2 * THIN_STEPS
    assert timing.rows[-1][backward] == sum(range(steps - THIN_STEPS + 1, steps + 1))
    assert sum(row[1] for row in timing.rows) == steps
    # the first steps warm up: their communication is left out
    assert timing.comm_steps == steps - FIRST_COMM_ROWS
    assert sum(count for _, count, _, _ in timing.comms) == 3 * timing.comm_steps
    assert min(least for _, _, _, least in timing.comms) == round((500 + FIRST_COMM_ROWS + 1) / 1e3, 1)
    assert path.stat().st_size < 150_000


def test_a_later_start_is_the_one_that_is_read(tmp_path):
    for world, step in ((2, 7), (1, 9)):
        for rank in range(world):
            writer = TimingWriter(tmp_path, rank, {"world": world})
            writer.step(StepTimes(step, 0, 1, dict.fromkeys(PARTS, 5000), {}, []))
            writer.close()
    found = read_timing(tmp_path)
    assert [(each.start["rank"], [row[0] for row in each.rows]) for each in found] == [(0, [9])]


LAYOUTS = {
    "tensor": (Layout(tensor=2, recompute="full"), 2),
    "zero bubble": (Layout(pipeline=2, pipeline_schedule="zero_bubble"), 2),
    "pipeline x tensor": (Layout(tensor=2, pipeline=2), 4),
    "data": (Layout(), 2),
}
STEPS, MICRO, SEQ, HIDDEN, LAYERS, PARAMS = 4, 4, 16, 64, 2, 78_528


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def timed(request, tmp_path_factory):
    """(layout's name, run directory, of each rank: whether the weights are bitwise the untimed ones, seconds a step)"""
    layout, world = LAYOUTS[request.param]
    out = tmp_path_factory.mktemp("timed")
    return request.param, out, run_ranks(_twice, world, layout, world, str(out))


def _twice(layout, world, out):
    """Train without the clock and with it."""
    import time
    from pathlib import Path

    import torch.distributed as dist

    trial = Trial(
        model=tiny_config("llama", num_hidden_layers=LAYERS),
        layout=layout,
        world_size=world,
        optimizer=AdamW(lr=1e-3),
        deepspeed=ds_config("zero1_fp32.json"),
        steps=STEPS,
        seq_len=SEQ,
        global_seqs=MICRO * world // (layout.tensor * layout.pipeline),
    )
    weights, seconds, phases = [], [], None
    for timed in (False, True):
        trainer = build_trial_trainer(trial)
        if timed:
            phases = Phases(Path(out), dist.get_rank(), range(3, 4))
            phases.start(trainer)
        for step, micro_batches in enumerate(rank_batches(trial, trainer), start=1):
            if timed:
                phases.enter(step, "data")
                phases.enter(step, "step")
            began = time.perf_counter()
            trainer.train_step(micro_batches, 1e-3, trial.global_seqs * SEQ)
            seconds.append(time.perf_counter() - began)
        weights.append({name: shard.clone() for name, shard in trainer.hf_shards().items()})
    phases.enter(STEPS, "log")
    phases.enter(STEPS, "end")
    same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return same, seconds[STEPS:]


def test_weights_are_bitwise_those_of_an_untimed_run(timed):
    assert all(same for same, _ in timed[2])


def test_the_parts_are_the_whole_step(timed):
    _, out, ranks = timed
    for timing, (_, seconds) in zip(read_timing(out), ranks, strict=True):
        assert [row[0] for row in timing.rows] == list(range(1, STEPS + 1))
        for row, measured in zip(timing.rows, seconds, strict=True):
            parts = dict(zip(PARTS, row[3:], strict=True))
            assert sum(parts.values()) / 1e6 >= 0.98 * measured
            assert row[2] == MICRO
        newest = dict(zip(PARTS, timing.rows[-1][3:], strict=True))
        assert min(newest[part] for part in (FORWARD, BACKWARD)) > 0


def test_parts_are_those_that_the_layout_has(timed):
    name, out, _ = timed
    for timing in read_timing(out):
        parts = dict(zip(PARTS, timing.rows[-1][3:], strict=True))
        assert (parts[TENSOR] > 0) == ("tensor" in name)
        assert (parts[RECOMPUTE] > 0) == (name == "tensor")
        assert (parts[WEIGHTS] > 0) == (name == "zero bubble")
        assert (parts[PIPELINE] > 0) == ("bubble" in name or "pipeline" in name)


def _calls(timing, **wanted):
    """Calls a step of what matches."""
    matching = (
        count for comm, count, _, _ in timing.comms if all(getattr(comm, name) == value for name, value in wanted.items())
    )
    return sum(matching) / timing.comm_steps


def test_bytes_are_those_of_the_formulas(timed):
    """Of a micro batch an activation, seq x hidden in fp32; of a step each gradient reduced and each weight gathered (ZeRO-1)."""
    name, out, _ = timed
    activation, weights = SEQ * HIDDEN * 4, PARAMS * 4
    for timing in read_timing(out):
        rank, ((start, stop),) = timing.start["rank"], timing.start["layers"]
        if "tensor" in name:
            first, last = start == 0, stop == LAYERS
            # a layer: two row-cut outputs forward, the two inputs of its column-cut linears backward, and forward again where it
            # recomputes (whose last sum is not needed); the embedding's output; the head's input
            forward = 2 + (1 if name == "tensor" else 0)
            calls = (stop - start) * (forward + 2) + first + last
            wanted = {"group": "tensor", "bytes": activation, "ranks": 2}
            beside = _calls(timing, op="all_reduce, awaited", **wanted)  # weight gradients
            assert beside == MICRO * 2 * (stop - start)
            assert beside + _calls(timing, op="all_reduce", **wanted) == MICRO * calls
        if name == "pipeline x tensor":
            sends, receives = (_calls(timing, op=op, bytes=activation, peer=(rank + 2) % 4) for op in ("isend", "irecv"))
            assert sends == receives == MICRO
        if name == "zero bubble":
            assert _calls(timing, op="isend", bytes=activation) == _calls(timing, op="irecv", bytes=activation) == MICRO
        if name == "data":
            for op in ("reduce_scatter_tensor, awaited", "all_gather_into_tensor, awaited"):
                moved = [comm.bytes for comm, *_ in timing.comms if comm.op == op]
                assert sum(set(moved)) == weights, op
            assert dict(zip(PARTS, timing.rows[-1][3:], strict=True))[DATA_PARALLEL] > 0


def test_traced_steps_keep_every_span(timed):
    _, out, ranks = timed
    traces = read_trace(out)
    assert sorted(traces) == list(range(len(ranks)))
    for rank, timing in enumerate(read_timing(out)):
        (step,) = traces[rank]
        assert step["step"] == 3
        spans = step["spans"]
        assert sum(part == FORWARD for part, *_ in spans) == MICRO
        row = dict(zip(PARTS, timing.rows[2][3:], strict=True))
        assert max(began + length for _, _, began, length in spans) / 1e3 == pytest.approx(sum(row.values()), abs=len(PARTS))


def test_rank_files_are_json_lines(timed):
    for path in (timed[1] / "timing").glob("*.jsonl"):
        assert all(json.loads(line) for line in path.read_text().splitlines())
