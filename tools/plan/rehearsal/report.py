"""Writes what a rehearsal found, for people and for programs, beside what the planner predicts."""

from __future__ import annotations

from typing import Any

from tools.common.console import table
from tools.common.devices import GIB, Device
from tools.plan.rehearsal.kernels import GRADIENT_SUMS, LAYERS, PARTS, PRODUCTS
from tools.plan.rehearsal.memory_log import ACTIVATIONS, STATES
from tools.plan.rehearsal.memory_log import LOSS as LOSS_MEMORY
from tools.plan.rehearsal.predicted import Prediction
from tools.plan.rehearsal.rehearsal_case import Rehearsal
from tools.plan.rehearsal.step_summary import Growth, StepSummary

NEAR = 0.05  # rehearsed and planned figures that differ by less agree
_LARGEST = 3  # lines that a hint names
GB, TERA = 1e9, 1e12


def compared(summary: StepSummary, prediction: Prediction) -> dict[str, tuple[float, float]]:
    """Return {figure: (rehearsed, planned)} of what both know: bytes and FLOPs of a step."""
    count = summary.micro_batches
    elementwise = sum(summary.work[part].of(count)[1] for part in (LAYERS,) if part in summary.work)
    products = summary.work[PRODUCTS].of(count)[2] if PRODUCTS in summary.work else 0.0
    summed = summary.work[GRADIENT_SUMS].of(count)[1] if GRADIENT_SUMS in summary.work else 0.0
    reduced = sum(growth.of(count)[1] for (group, _, _), growth in summary.traffic.items() if group == "data")
    return {
        "peak": (summary.peak, prediction.peak),
        "states": (summary.held_for(STATES), prediction.all_states),
        "activations": (summary.held_for(ACTIVATIONS), prediction.activations),
        "loss": (summary.held_for(LOSS_MEMORY), prediction.loss),
        "products": (products, prediction.products),
        "elementwise": (elementwise, prediction.elementwise),
        "summed": (summed, prediction.summed),
        "reduced": (reduced, prediction.reduced),
    }


_MEANINGS = {
    "peak": ("memory at its peak", GIB, "GiB"),
    "states": ("  weights, gradients, optimizer", GIB, "GiB"),
    "activations": ("  activations", GIB, "GiB"),
    "loss": ("  logits and their gradients", GIB, "GiB"),
    "products": ("matrix products", TERA, "TFLOP"),
    "elementwise": ("elementwise work of the layers", GB, "GB moved"),
    "summed": ("sums of gradients, outside products", GB, "GB moved"),
    "reduced": ("exchanged by data ranks", GB, "GB"),
}


def hints(summary: StepSummary, prediction: Prediction) -> dict[str, str]:
    """Return {figure: why it may differ from the plan}, for those that do: the lines of source that it comes from."""
    found = {}
    for name, (rehearsed, planned) in compared(summary, prediction).items():
        of_peak = name in (STATES, ACTIVATIONS, LOSS_MEMORY)
        scale = prediction.peak if of_peak else max(planned, 1.0)
        if abs(rehearsed - planned) <= NEAR * scale or name == "peak":
            continue
        if of_peak:
            largest = [f"{each['bytes'] / GIB:.2f} GiB {each['line']}" for each in summary.held if each["of"] == name]
        elif name == "elementwise":
            moved = sorted(summary.layer_work.items(), key=lambda item: -item[1].of(summary.micro_batches)[1])
            largest = [f"{growth.of(summary.micro_batches)[1] / GB:.0f} GB {line}" for line, growth in moved]
        else:
            largest = []
        words = f"{'more' if rehearsed > planned else 'less'} than planned"
        found[name] = "; ".join([words, *largest[:_LARGEST]])
    return found


def report_json(
    rehearsal: Rehearsal, summary: StepSummary, prediction: Prediction, device: Device, stand_in: str
) -> dict[str, Any]:
    count = summary.micro_batches
    once, each = summary.waits_of_step()

    def rows(figures: dict[Any, Growth], keys: tuple[str, ...], names: tuple[str, ...]) -> list[dict[str, Any]]:
        found = []
        for key, growth in figures.items():
            words = key if isinstance(key, tuple) else (key,)
            of_step = dict(zip(names, growth.of(count), strict=True))
            found.append(dict(zip(keys, words, strict=True)) | of_step | {"once": growth.once, "each": growth.each})
        return found

    return {
        "recipe": rehearsal.recipe.name, "gpus": rehearsal.world_size, "rank": summary.rank, "stage": summary.stage,
        "layers": summary.own_layers, "layout": vars(rehearsal.layout), "gpu_type": device.name, "micro_batches": count,
        "rehearsed_micro_batches": summary.rehearsed, "stand_ins": {"cuda": stand_in, "ranks": rehearsal.world_size - 1},
        "memory": {"peak": summary.peak, "between_steps": summary.between_steps, "at_start": summary.at_start,
                   "capacity": device.memory, "held": summary.held},
        "compared": {name: {"rehearsed": a, "planned": b} for name, (a, b) in compared(summary, prediction).items()},
        "hints": hints(summary, prediction), "work": rows(summary.work, ("part",), ("kernels", "bytes", "flops")),
        "layer": dict(zip(("kernels", "bytes"), summary.layer_share(), strict=True)),
        "waits": {"once": once, "each": each, "lines": rows(summary.waits, ("what", "line"), ("times",))},
        "traffic": rows(summary.traffic, ("group", "op", "dtype"), ("calls", "bytes", "beside_products")),
        "group_calls": summary.group_calls,
        "broken": summary.broken, "unanswered": summary.unanswered,
    }  # fmt: skip


def report_text(
    rehearsal: Rehearsal, summary: StepSummary, prediction: Prediction, device: Device, stand_in: str, *, lines: int
) -> str:
    layout, count = rehearsal.layout, summary.micro_batches
    data = rehearsal.world_size // (layout.tensor * layout.pipeline)
    first, last = summary.own_layers[0], summary.own_layers[-1]
    sizes = f"tensor={layout.tensor} pipeline={layout.pipeline} data={data}"
    title = f"{rehearsal.recipe.name}, rank {summary.rank} of {rehearsal.world_size} ({sizes}): stage {summary.stage}, "
    title += f"layers {first} to {last}, {summary.parameters / 1e9:.3f}e9 parameters"
    rehearsed = " and ".join(map(str, summary.rehearsed[-2:]))
    steps = f"a step of {count} micro batches, from steps of {rehearsed} that were run"
    others = f"; {rehearsal.world_size - 1} ranks that send nothing" if rehearsal.world_size > 1 else ""
    parts = [
        f"{title}\n{steps}",
        f"stand-ins: {stand_in}; kernels and memory that are only counted{others}",
        _compared_text(summary, prediction, device),
        _memory_text(summary, lines),
        _work_text(summary),
        _waits_text(summary, lines),
        _traffic_text(summary),
        *_problems_text(summary),
    ]
    return "\n\n".join(parts)


def _compared_text(summary: StepSummary, prediction: Prediction, device: Device) -> str:
    told, rows = hints(summary, prediction), []
    for name, (rehearsed, planned) in compared(summary, prediction).items():
        if not rehearsed and not planned:
            continue
        meaning, unit, unit_name = _MEANINGS[name]
        off = f"{rehearsed / planned - 1:+.1%}" if planned else ""
        rows.append([meaning, f"{rehearsed / unit:,.2f}", f"{planned / unit:,.2f}", unit_name, off, told.get(name, "")])
    fits = "" if summary.peak <= device.memory else f"\nDOES NOT FIT: {device.name} has {device.memory / GIB:.1f} GiB"
    note = "(`explain` adds to the memory what libraries hold and what the allocator keeps unused)"
    return table(rows, ["a step", "rehearsed", "planned", "", "off", "hint"]) + f"\n{note}{fits}"


def _memory_text(summary: StepSummary, lines: int) -> str:
    rows = [
        [f"{each['bytes'] / GIB:.3f}", each["count"], each["of"], each["dtype"], "x".join(map(str, each["shape"])), each["line"]]
        for each in summary.held[:lines]
    ]
    rest = sum(each["bytes"] for each in summary.held[lines:])
    rows += [[f"{rest / GIB:.3f}", sum(each["count"] for each in summary.held[lines:]), "", "", "", "all others"]] if rest else []
    title = f"held at the peak, {summary.peak / GIB:.2f} GiB ({summary.between_steps / GIB:.2f} between steps, "
    return f"{title}{summary.at_start / GIB:.2f} at most while it is built)\n" + table(
        rows, ["GiB", "tensors", "for", "dtype", "shape", "line"]
    )


def _work_text(summary: StepSummary) -> str:
    rows = []
    for part, growth in sorted(summary.work.items(), key=lambda item: list(PARTS).index(item[0])):
        kernels, moved, flops = growth.of(summary.micro_batches)
        rows.append([PARTS[part], f"{kernels:,.0f}", f"{moved / GB:,.1f}", f"{flops / TERA:,.1f}" if flops else ""])
    kernels, moved = summary.layer_share()
    per_layer = f"a layer, for each micro batch, beside products and attention: {kernels:.0f} kernels, {moved / GB:.3f} GB"
    return table(rows, ["work of a step", "kernels", "GB moved", "TFLOP"]) + f"\n{per_layer}"


def _waits_text(summary: StepSummary, lines: int) -> str:
    once, each = summary.waits_of_step()
    count = summary.micro_batches
    title = f"the host waits for the device {once:.0f} times a step and {each:.0f} times a micro batch: {once + each * count:.0f}"
    rows = [
        [f"{growth.once[0]:.0f}", f"{growth.each[0]:.0f}", what, line]
        for (what, line), growth in sorted(summary.waits.items(), key=lambda item: -item[1].of(count)[0])
    ]
    return f"{title}\n" + table(rows[: 2 * lines], ["a step", "a micro batch", "for", "line"])


def _traffic_text(summary: StepSummary) -> str:
    rows = []
    for (group, op, dtype), growth in sorted(summary.traffic.items(), key=lambda item: -item[1].of(summary.micro_batches)[1]):
        calls, moved, beside = growth.of(summary.micro_batches)
        each = f"{moved / calls / 1e6:,.3f}" if calls else ""
        share = f"{beside / moved:.0%}" if moved else ""
        rows.append([group, op, dtype, f"{calls:,.0f}", f"{moved / GB:,.3f}", each, share])
    header = ["group", "operator", "dtype", "calls", "GB", "MB a call", "beside products"]
    return f"messages of a step (groups made in {summary.group_calls} calls)\n" + (table(rows, header) if rows else "none")


def _problems_text(summary: StepSummary) -> list[str]:
    broken = [f"  {times} x {problem}" for problem, times in summary.broken.items()]
    open_ends = [f"  {times} x {line}" for line, times in summary.unanswered.items()]
    found = ["NCCL WOULD REFUSE OR HANG\n" + "\n".join(broken)] if broken else []
    text = "how many elements there are depends on data, and none was taken: memory and work behind these lines are missing\n"
    return found + ([text + "\n".join(open_ends)] if open_ends else [])
