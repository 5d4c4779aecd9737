"""Asks one DeepSpeed release, the one that this process imports, whether it trains what plain torch trains.

    PYTHONPATH=FOLDER_OF_A_RELEASE python -m tools.replay.release_trial [QUESTION ...]

Each question is a few cases: a small model under DeepSpeed's own engine, on two or three ranks, against the same steps in plain
torch, in one process. Trifold's engine takes no part: a release that it refuses can be asked too. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from recipes.common.parallel.grid import build_grid
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Layout
from tools.common.console import GOOD, UsageError, exit_code, quiet_transformers
from tools.common.forked_ranks import RankError, run_ranks
from tools.replay.release_cases import (
    CLIP,
    MICRO_SEQS,
    QUESTIONS,
    SEQ_LEN,
    Case,
    Weights,
    build_optimizer,
    initial_model,
    micro_batches,
    micro_loss,
    token_loss,
    train_plain,
)

with redirect_stdout(sys.stderr):  # DeepSpeed logs on what is stdout when it is imported
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from deepspeed.utils import safe_get_full_fp32_param

    from recipes.common.engine.startup import quiet_deepspeed, start_distributed

RIGHT, WRONG, NO_RUN = "right", "wrong", "does not run"
SECONDS = 300.0  # for the ranks of a case
# the distance between the weights and plain torch's, in parts of the way that plain torch's have gone, by tensor. In bf16 both
# sides round their weights and activations alike; what is summed in bf16 over ranks or micro batches is rounded besides
ALLOWED = {"fp32": 1e-4, "bf16": 4e-2}


@dataclass(frozen=True)
class CaseAnswer:
    """What a release made of a case."""

    case: str
    verdict: str
    step: int  # the first that is wrong, or the last
    difference: float  # the largest after that step, as a share of the way
    where: str  # the parameter of it, or the error
    scale: float  # how many times plain torch's way that parameter's is, in its direction
    digest: str  # of the weights after the last step, bit for bit


@dataclass(frozen=True)
class TrialAnswer:
    """What a release answers to a question."""

    verdict: str
    words: str  # the first case of a wrong answer, the end of an error
    digest: str
    cases: tuple[CaseAnswer, ...] = ()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.replay.release_trial", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", metavar="QUESTION", nargs="*", help=f"of {', '.join(QUESTIONS)} (default: all)")
    flags = parser.parse_args(argv)
    return exit_code(lambda: _run(flags.questions))


def _run(names: list[str]) -> int:
    unknown = [name for name in names if name not in QUESTIONS]
    if unknown:
        raise UsageError(f"unknown questions {', '.join(unknown)}; known are {', '.join(QUESTIONS)}")
    quiet_transformers()
    answers = {name: asdict(ask(name)) for name in names or QUESTIONS}
    print(json.dumps({"deepspeed": version("deepspeed"), "answers": answers}))
    return GOOD


def ask(question: str) -> TrialAnswer:
    """Let this process's DeepSpeed answer a question, in forked ranks: each case in its own, as one may hang."""
    plain = run_ranks(_plain_paths, 1, QUESTIONS[question])[0]
    return _answer_of([_ask_case(case, path) for case, path in zip(QUESTIONS[question], plain, strict=True)])


def _ask_case(case: Case, plain: list[Weights]) -> CaseAnswer:
    try:
        return _over_ranks(run_ranks(_on_this_rank, case.ranks, case, plain, timeout_seconds=SECONDS))
    except RankError as error:
        return CaseAnswer(case.name, NO_RUN, 0, 0.0, _last_line(str(error)), 0.0, "")


def _answer_of(cases: list[CaseAnswer]) -> TrialAnswer:
    verdicts = [case.verdict for case in cases]
    verdict = next((each for each in (WRONG, NO_RUN) if each in verdicts), RIGHT)
    words = f"at most {max(case.difference for case in cases):.0e} of the way"
    if verdict != RIGHT:
        first = cases[verdicts.index(verdict)]
        words = f"{first.case}: {first.where}"
        if verdict == WRONG:
            words += f" is off by {first.difference:.1%} of its way, which is {first.scale:.3g} times the right one"
    return TrialAnswer(verdict, words, _digest_of(case.digest.encode() for case in cases), tuple(cases))


def _over_ranks(rows: list[CaseAnswer]) -> CaseAnswer:
    """Return the case as the rank saw it that was wrong first and by most (NaN counts as most), with the digest of all ranks."""
    worst = max(rows, key=lambda row: (row.verdict != RIGHT, -row.step, row.difference != row.difference, row.difference))
    return replace(worst, digest=_digest_of(row.digest.encode() for row in rows))


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:300]


def _digest_of(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _plain_paths(cases: tuple[Case, ...]) -> list[list[Weights]]:
    return [train_plain(case) for case in cases]


def _on_this_rank(case: Case, plain: list[Weights]) -> CaseAnswer:
    """Train a case on this rank and compare. plain: the weights of plain torch before the first step and after each."""
    start_distributed("cpu")
    with quiet_deepspeed(), redirect_stdout(sys.stderr):
        trained = _train(case)
    allowed = ALLOWED[case.precision]
    for step in range(len(trained)):  # the first that is wrong tells most
        ours, theirs = trained[step], plain[step + 1]
        shares = {name: _share(ours[name], theirs[name], plain[0][name]) for name in ours}
        where = max(shares, key=lambda name: (shares[name] != shares[name], shares[name]))
        verdict = RIGHT if shares[where] <= allowed else WRONG
        if verdict == WRONG:
            break
    scale = _scale(ours[where], theirs[where], plain[0][where])
    digest = _digest_of(trained[-1][name].numpy().tobytes() for name in sorted(trained[-1]))
    return CaseAnswer(case.name, verdict, step + 1, shares[where], where, scale, digest)


def _share(trained: torch.Tensor, plain: torch.Tensor, start: torch.Tensor) -> float:
    way = (plain - start).double().norm().item()
    return (trained - plain).double().norm().item() / max(way, 1e-30)


def _scale(trained: torch.Tensor, plain: torch.Tensor, start: torch.Tensor) -> float:
    """Return how many times plain torch's way the trained one is, in its direction."""
    way = (plain - start).double()
    return ((trained - start).double() * way).sum().item() / max(way.square().sum().item(), 1e-30)


def _config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_SEQS,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": CLIP if case.optimizer == "adamw" else 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.zero, "reduce_bucket_size": 4096, **dict(case.options)},
    }
    if case.precision == "bf16":
        config["bf16"] = {"enabled": True, **dict(case.bf16_options)}
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return config


def _train(case: Case) -> list[Weights]:
    """Train with DeepSpeed on this rank. Returns the weights that this rank's stage holds after each step."""
    initial = initial_model(case)
    if case.stages > 1:
        return _train_pipeline(case, initial)
    engine = deepspeed.initialize(
        model=initial, optimizer=build_optimizer(case, list(initial.parameters())), config=_config(case)
    )[0]
    path = []
    for step in micro_batches(case):
        for micro in step[dist.get_rank()]:
            engine.backward(micro_loss(case, engine, engine.module, micro))
            with torch.no_grad():  # 0.18.7 to 0.18.9 forget it, and torch refuses what they do to views
                engine.step()
        path.append(_masters(engine.optimizer, dict(engine.module.named_parameters())))
    return path


def _train_pipeline(case: Case, initial: nn.Module) -> list[Weights]:
    layout = Layout(pipeline=case.stages)
    grid = build_grid(layout, torch.device("cpu"))
    planned = plan_model(initial.causal.config, layout, attention="eager")
    stage = build_stage(planned, grid, layout, seq_len=SEQ_LEN, torch_linears=True)
    weights = dict(initial.causal.named_parameters())
    with torch.no_grad():
        for name, parameter in stage.hf_named_parameters():
            parameter.copy_(weights[name])
    topology = PipeModelDataParallelTopology(num_pp=case.stages, num_mp=1, num_dp=case.data)
    parts = [_WithHead(stage) if grid.is_last_stage else stage] * case.stages  # one for each stage; this rank's is built
    module = PipelineModule(parts, topology=topology, loss_fn=_scored, partition_method="uniform")
    config = _config(case) | {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}}
    engine = deepspeed.initialize(model=module, optimizer=build_optimizer(case, list(stage.parameters())), config=config)[0]
    named, path = {f"causal.{name}": parameter for name, parameter in stage.hf_named_parameters()}, []
    for step in micro_batches(case):
        engine.train_batch(iter([(ids, (targets, weight)) for ids, targets, weight in step[grid.data_rank]]))
        path.append(_masters(engine.optimizer, named))
    return path


class _WithHead(nn.Module):
    """The last stage with its head. Were the head in the loss, its gradient would be gone: DeepSpeed's bf16 optimizer clears
    gradients when that of the stage's output arrives.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.stage.logits(self.stage(hidden))


def _scored(logits: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    targets, weight = labels
    return token_loss(logits, targets) * weight


def _masters(optimizer: Any, parameters: dict[str, nn.Parameter]) -> Weights:
    """Return the whole fp32 weights. Without ZeRO, which some releases leave out unasked, each rank has them all."""
    pairs = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
    unsharded = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=False)}
    found = {}
    for name, parameter in parameters.items():
        whole = safe_get_full_fp32_param(parameter)
        found[name] = (unsharded.get(id(parameter), parameter) if whole is None else whole).detach().float().clone()
    return found


if __name__ == "__main__":
    sys.exit(main())
