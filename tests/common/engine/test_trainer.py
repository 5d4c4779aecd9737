"""A batch that grows trains what plain transformers trains; an evaluation drops nothing and counts its rows."""

import inspect
import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER

from recipes.common.engine.trainer import NONFINITE
from recipes.common.monitor import optimizer_sums
from recipes.common.monitor.parameter_stats import ParameterStats
from recipes.common.monitor.replica_drift import find_drift
from recipes.common.recipe import SGD
from tests.support.parity import trial_of
from tests.support.tiny import ds_config, tiny_config
from tests.support.waits import Waits
from tools.common.forked_ranks import run_ranks
from tools.common.parity import batches, build_trial_trainer, initial_model, rank_batches

ROWS = [[True, False], [True, True], [False, True], [True, True]]  # of each micro batch, those that count


def _evaluate(trial):
    """The loss of two evaluations with a training step between, and whether the model trains in that step's passes."""
    trainer, modes = build_trial_trainer(trial), []
    micro = list(zip(batches(trial)[0].split(trial.micro_seqs), map(torch.tensor, ROWS), strict=True))
    own, scored = micro[trainer.grid.data_rank :: trainer.grid.data], sum(map(sum, ROWS)) * trial.seq_len
    before = trainer.evaluate(own, scored)
    hook = trainer.stage.register_forward_pre_hook(lambda stage, args: modes.append(stage.training))
    trainer.train_step([tokens for tokens, _ in own], 1e-2, trial.global_seqs * trial.seq_len)
    hook.remove()
    return before, trainer.evaluate(own, scored), modes


def _evaluate_plain(trial):
    model, tokens, rows = initial_model(trial).eval(), batches(trial)[0], torch.tensor(ROWS).view(-1)
    with torch.no_grad():
        logits = model(input_ids=tokens[rows, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[rows, 1:].flatten()).item()


def _evaluate_both(trials):
    """Of each trial: the loss that plain transformers has, computed by the first rank, and this rank's."""
    plain = [_evaluate_plain(trial) if os.environ["RANK"] == "0" else None for trial in trials]
    return [*zip(plain, map(_evaluate, trials), strict=True)]


def test_an_evaluation_drops_nothing_and_counts_its_rows():
    config = tiny_config("llama", attention_dropout=0.5)
    layouts = [
        ((1, 1, 1), "1f1b"),
        ((1, 2, 2), "1f1b"),
        ((2, 1, 2), "zero_bubble"),
        ((2, 1, 1), "1f1b"),
        ((2, 1, 1), "zero_bubble_v"),
    ]
    fields = {"micro_seqs": 2, "global_seqs": 8, "z_loss": 1e-2}
    trials = [trial_of(config, *sizes, pipeline_schedule=schedule, **fields) for sizes, schedule in layouts]
    for world_size in (1, 2, 4):
        some = [trial for trial in trials if trial.world_size == world_size]
        for of_ranks in zip(*run_ranks(_evaluate_both, world_size, some), strict=True):
            wanted, ranks = of_ranks[0][0], [own for _, own in of_ranks]
            assert [before for before, _, _ in ranks] == pytest.approx([wanted] * len(ranks), rel=1e-6)
            assert all(after < before and modes and all(modes) for before, after, modes in ranks)


GROWING = (4, 8)  # sequences of two steps, in micro batches of two; the trainer is built for the second, as in a run


def _grow(trial):
    """Losses and gradient norms of two steps, the second with more micro batches."""
    trainer, batch, found = build_trial_trainer(trial), batches(trial)[0], []
    for seqs in GROWING:
        trainer.set_global_seqs(seqs)
        micro = list(batch[:seqs].split(trial.micro_seqs))[trainer.grid.data_rank :: trainer.grid.data]
        result = trainer.train_step(micro, trial.optimizer.lr, seqs * trial.seq_len)
        found += [result.loss, result.grad_norm]
    return found


def _grow_plain(trial):
    model, batch, found = initial_model(trial), batches(trial)[0], []
    optimizer = torch.optim.SGD(model.parameters(), lr=trial.optimizer.lr)
    for seqs in GROWING:
        logits = model(input_ids=batch[:seqs, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:seqs, 1:].flatten())
        loss.backward()
        found += [loss.item(), sum(p.grad.double().square().sum().item() for p in model.parameters()) ** 0.5]
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize(("pipeline", "data"), [(1, 2), (2, 1)])
def test_a_batch_that_grows(pipeline, data):
    trial = trial_of(tiny_config("llama"), pipeline, 1, data, micro_seqs=2, global_seqs=GROWING[1], optimizer=SGD(lr=0.1))
    wanted = run_ranks(_grow_plain, 1, trial)[0]
    for found in run_ranks(_grow, trial.world_size, trial):
        assert found == pytest.approx(wanted, rel=1e-6)


def _break(trial):
    """(loss, gradient norm, skip reason) of a good step and one whose logits are NaN, and whether the latter moved a weight."""
    trainer, micro = build_trial_trainer(trial), list(batches(trial)[0].split(trial.micro_seqs))
    logits, found, kept = trainer.stage.logits, [], {}
    for factor in (1.0, math.nan):
        trainer.stage.logits = lambda hidden, factor=factor: logits(hidden) * factor
        kept = {name: shard.clone() for name, shard in trainer.hf_shards().items()}
        result = trainer.train_step(micro, trial.optimizer.lr, trial.global_seqs * trial.seq_len)
        found.append((result.loss, result.grad_norm, result.skip_reason))
    return found, all(kept[name].equal(shard) for name, shard in trainer.hf_shards().items())


@pytest.mark.parametrize(("pipeline", "deepspeed"), [(1, "zero1_fp32.json"), (1, "zero1_bf16.json"), (2, "zero1_bf16.json")])
def test_a_step_that_is_no_number_says_so(pipeline, deepspeed):
    """Its norm is not that of the step before, on any rank, and no weight moves."""
    trial = trial_of(tiny_config("llama"), pipeline, 1, 1, deepspeed=ds_config(deepspeed), global_seqs=4)
    for (good, bad), unmoved in run_ranks(_break, trial.world_size, trial):
        assert math.isfinite(good[0]) and math.isfinite(good[1]) and good[2] is None
        assert not math.isfinite(bad[0]) and not math.isfinite(bad[1]) and bad[2] == NONFINITE
        assert unmoved


def _waits(trial, planted=False):
    """Where the host waits in a monitored step, an evaluation and a comparison of copies, of 2 and of 8 micro batches.

    planted: the model's first own layer asks for a value, in each micro batch.
    """
    trainer, found = build_trial_trainer(trial), []
    stats = ParameterStats(trainer, trial.optimizer.clip)
    if planted:
        layer = trainer.stage.causal.get_submodule(trainer.stage.stack.layers)[trainer.stage.own_layers[0]]
        layer.register_forward_hook(lambda *_: print(end=str(trainer.stage.max_logit.item())[:0]))
    for count in (2, 2, 8):  # the first step also does what a run does once
        trainer.set_global_seqs(count * trial.micro_seqs * trainer.grid.readers)
        micro = [tokens[: trial.micro_seqs] for tokens in batches(replace(trial, steps=count))]
        with Waits() as step:
            stats.begin(parameters=True, layers=True)
            stats.read(trainer.train_step(micro, 1e-3, count * trial.seq_len, (True, False), 1e9))
        with Waits() as evaluation:
            trainer.evaluate([(tokens, torch.ones(len(tokens), dtype=torch.bool)) for tokens in micro], 100)
        with Waits() as drift:
            assert not find_drift(trainer)
        found.append((_of_a_gpu(step.by_line), dict(evaluation.by_line), dict(drift.by_line)))
    return found[1:]


def _of_a_gpu(waits):
    """Leave out what is computed on CPUs alone, and asks for values there; tests/rehearsal has what stands for it on a GPU."""
    lines, first = inspect.getsourcelines(optimizer_sums._terms_on_cpu)
    own = {f"recipes/common/monitor/optimizer_sums.py:{line}" for line in range(first, first + len(lines))}
    return {line: count for line, count in waits.items() if line not in own}


MEASURED = [  # those of one rank before those of two
    ("mixtral", (1, 1, 1), {"document_end": 5}),
    ("llama", (1, 1, 2), {"recompute": "full"}),
    ("gemma2", (2, 1, 1), {"document_end": 5, "attention": "eager"}),
    ("gpt2", (2, 1, 1), {"pipeline_schedule": "zero_bubble"}),
    ("qwen3", (2, 1, 1), {"pipeline_schedule": "zero_bubble_v", "document_end": 5}),
    ("llama", (1, 1, 2), {"context": 2, "document_end": 5}),
]


def _measured(family, layout, options):
    options = {"attention": "sdpa", "deepspeed": ds_config("zero1_bf16.json")} | options
    depth = 4 if options.get("pipeline_schedule") == "zero_bubble_v" else 2  # a layer for each chunk
    return trial_of(tiny_config(family, num_hidden_layers=depth), *layout, **options)


def _waits_of_each(trials):
    return [_waits(trial) for trial in trials]


@pytest.fixture(scope="module")
def waits():
    """Of each of MEASURED, all ranks' waits."""
    trials = [_measured(*measured) for measured in MEASURED]
    by_size = [
        zip(*run_ranks(_waits_of_each, size, [trial for trial in trials if trial.world_size == size]), strict=True)
        for size in (1, 2)
    ]
    return [of_ranks for trials in by_size for of_ranks in trials]


@pytest.mark.parametrize("index", range(len(MEASURED)), ids=["-".join(map(str, (m[0], *m[2]))) for m in MEASURED])
def test_no_micro_batch_waits_for_a_value(waits, index):
    """8 micro batches wait as often as 2, with everything that a run measures, and where the device would be asked is known."""
    for few, many in waits[index]:
        assert many == few
        step, evaluation, drift = many
        on_device = {line: count for line, count in step.items() if "optimizer_sums.py" not in line}  # another path on a CPU
        assert 0 < sum(on_device.values()) <= 6, on_device
        assert not evaluation
        assert sum(drift.values()) <= 2


def test_a_layer_that_asks_for_a_value_is_counted():
    trial = trial_of(tiny_config("llama", num_hidden_layers=1), 1, 1, 1, deepspeed=ds_config("zero1_bf16.json"))
    few, many = run_ranks(_waits, 1, trial, True)[0]
    assert sum(many[0].values()) - sum(few[0].values()) == 6
    assert (sum(few[1].values()), sum(many[1].values())) == (2, 8)


def _timers(trial):
    trainer = build_trial_trainer(trial)
    for batch in rank_batches(trial, trainer):
        trainer.train_step(batch, 1e-3, trial.global_seqs * trial.seq_len)
    timer = trainer.engine.timers(TRAIN_BATCH_TIMER)
    return len(getattr(timer, "event_timers", []))


def test_deepspeed_keeps_no_times_of_past_steps():
    assert run_ranks(_timers, 2, trial_of(tiny_config("llama"), 2, 1, 1, global_seqs=2)) == [0, 0]
