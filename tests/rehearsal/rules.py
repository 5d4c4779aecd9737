"""What a rehearsed step must hold. The limits are written here, to be lowered when the trainer does better."""

from dataclasses import dataclass

from tools.plan.rehearsal.kernels import LOSS
from tools.plan.rehearsal.predicted import Prediction
from tools.plan.rehearsal.step_summary import StepSummary

# Where the host may wait for the device: (what, file) -> times a step, and times a micro batch. By file, not by line: lines move
# with every edit, and the counts say when another wait comes to a file.
WAITS_ONCE = {
    ("copy from device to host", "recipes/common/engine/gradient_norm.py"): 1,  # the norm, which decides whether to step
    ("copy from device to host", "recipes/common/engine/trainer.py"): 1,  # the step's results
}
WAITS_EACH: dict[tuple[str, str], int] = {}
MEMORY = 0.05  # the peak's distance from the planner's


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a family's layer may cost in a micro batch beside products and attention, and its loss."""

    kernels: int
    bytes_per_token: int  # of the layer's tokens on one rank
    loss_bytes_per_logit: float = 0.0  # on a rank with the head


# by variant, as measured and rounded up: to be lowered by what makes a layer cheaper
BUDGETS: dict[str, Budget] = {}


def wait_problems(summary: StepSummary) -> list[str]:
    """Return the waits that no rule allows."""
    problems = []
    for index, allowed in enumerate((WAITS_ONCE, WAITS_EACH)):
        by_file, lines = {}, {}
        for (what, line), growth in summary.waits.items():
            times = (growth.once, growth.each)[index][0]
            if times > 0:
                key = (what, line.rpartition(":")[0])
                by_file[key] = by_file.get(key, 0) + times
                lines.setdefault(key, []).append(line)
        for key, times in by_file.items():
            if times > allowed.get(key, 0):
                per = ("a step", "a micro batch")[index]
                problems.append(f"{key[0]}: {times:.0f} {per}, allowed {allowed.get(key, 0)}, at {', '.join(lines[key])}")
    return problems


def memory_problems(summary: StepSummary, prediction: Prediction) -> list[str]:
    off = summary.peak / prediction.peak - 1
    if abs(off) <= MEMORY:
        return []
    return [f"peak {summary.peak / 2**30:.2f} GiB, planned {prediction.peak / 2**30:.2f}: {off:+.1%}"]


def budget_problems(summary: StepSummary, budget: Budget, *, tokens: int, logits: int) -> list[str]:
    """tokens: of a micro batch in a layer on this rank. logits: of a micro batch on this rank."""
    kernels, moved = summary.layer_share()
    problems = []
    if kernels > budget.kernels:
        problems.append(f"{kernels:.1f} kernels a layer, the budget is {budget.kernels}")
    if moved / tokens > budget.bytes_per_token:
        problems.append(f"{moved / tokens:.0f} bytes a token and layer, the budget is {budget.bytes_per_token}")
    loss = summary.work[LOSS].each[1] / logits if LOSS in summary.work else 0.0
    if loss > budget.loss_bytes_per_logit:
        problems.append(f"{loss:.1f} bytes a logit in the loss, the budget is {budget.loss_bytes_per_logit}")
    return problems
