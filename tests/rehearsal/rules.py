"""What a rehearsed step must hold. The limits are written here, to be lowered when the trainer does better."""

from recipes.common.recipe import Layout
from tests.rehearsal.cases import Budget
from tools.plan.rehearsal.kernels import LOSS
from tools.plan.rehearsal.predicted import Prediction
from tools.plan.rehearsal.report import compared
from tools.plan.rehearsal.step_summary import StepSummary
from tools.plan.tensor_sums import tensor_sums

# Where the host may wait for the device: (what, file) -> times a step, and times a micro batch. By file, not by line: lines move
# with every edit, and the counts say when another wait comes to a file.
WAITS_ONCE = {
    ("copy from device to host", "recipes/common/engine/gradient_norm.py"): 1,  # the norm, which decides whether to step
    ("copy from device to host", "recipes/common/engine/trainer.py"): 1,  # the step's results
    ("item", "deepspeed/runtime/zero/stage_1_and_2.py"): 1,  # whether ZeRO's own optimizers overflow (fp16, fp32, ZeRO 2)
}
WAITS_EACH: dict[tuple[str, str], int] = {}
MOST_WAITS = 6  # a step, whatever is listed
MEMORY = 0.05  # the peak's distance from the planner's
PRODUCTS = 0.08  # of the products' FLOPs: a layer that runs again stops before its last one, 7 % of Llama 70B's
SUMS = 0.05  # of what adding up gradients outside products moves
COMPILED_TRAFFIC = 0.15  # of what compiled kernels of dense layers move; the planner's figure of all others stands for more


def wait_problems(summary: StepSummary, exchanges: int = 0) -> list[str]:
    """Return the waits that no rule allows. exchanges: layers that spread experts, each of which asks how many tokens travel."""
    problems, each = [], WAITS_EACH | {("copy from device to host", "recipes/common/parallel/expert_parallel.py"): exchanges}
    for index, allowed in enumerate((WAITS_ONCE, each)):
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
    assert sum(WAITS_ONCE.values()) <= MOST_WAITS and not WAITS_EACH
    return problems


def memory_problems(summary: StepSummary, prediction: Prediction) -> list[str]:
    off = summary.peak / prediction.peak - 1
    if abs(off) <= MEMORY:
        return []
    return [f"peak {summary.peak / 2**30:.2f} GiB, planned {prediction.peak / 2**30:.2f}: {off:+.1%}"]


def overlap_problems(summary: StepSummary, layout: Layout, *, experts: bool, activation: float) -> list[str]:
    """Return where tensor ranks exchange less beside products than the planner counts. activation: bytes of a micro batch's."""
    repeated = 1.0 / layout.recompute_every if layout.recompute != "none" else 0.0
    planned = tensor_sums(layout, repeated, experts=experts)["sums_beside"] * (2 if layout.sequence_parallel else 1)
    moved = sum(growth.each[2] for (group, _, _), growth in summary.traffic.items() if group == "tensor")
    found = moved / activation / len(summary.own_layers)
    return [] if found >= planned else [f"{found:.2f} of a layer's tensor messages go beside products, planned {planned:.2f}"]


def work_problems(
    summary: StepSummary, prediction: Prediction, *, compiled: bool, by_parts: bool, sums_inside: bool
) -> list[str]:
    """by_parts: MLPs run by parts, and again in the backward pass, which the planner leaves out. sums_inside: products add up
    gradients."""
    planned = compared(summary, prediction)
    limits = ({} if by_parts else {"products": PRODUCTS}) | ({"elementwise": COMPILED_TRAFFIC} if compiled else {})
    limits |= {"summed": SUMS} if sums_inside else {}
    off = {name: planned[name][0] / planned[name][1] - 1 for name in limits}
    return [f"{name}: {off[name]:+.1%} of the plan" for name, limit in limits.items() if abs(off[name]) > limit]


def budget_problems(summary: StepSummary, budget: Budget, *, tokens: int, logits: float) -> list[str]:
    """tokens: of a micro batch. logits: of a micro batch on this rank."""
    kernels, moved = summary.layer_share()
    loss = summary.work[LOSS].each[1] / logits if LOSS in summary.work else 0.0
    used = {"kernels a layer": kernels, "kB a token and layer": moved / tokens / 1e3, "bytes a logit": loss}
    limits = zip(used.items(), (budget.kernels, budget.kilobytes, budget.logit_bytes), strict=True)
    return [f"{figure:.1f} {name}, the budget is {limit}" for (name, figure), limit in limits if figure > limit]
