"""Finds, draws and plants wrong lines: small changes to the code that shapes numbers, each one that a hand could have made."""

from __future__ import annotations

import ast
import builtins
import hashlib
from dataclasses import dataclass
from pathlib import Path

# Where lines are planted, and functions there that shape no number: refusals, reports, times, and what a schedule costs.
SCOPE: dict[str, tuple[str, ...]] = {
    "recipes/common/config/placement.py": ("rank_coordinates",),
    "recipes/common/data/batches.py": ("recipe_data_problems",),
    "recipes/common/data/document_masking.py": ("masking_problem",),
    "recipes/common/data/order.py": (),
    "recipes/common/model/decoder.py": (),
    "recipes/common/model/expert_banks.py": (),
    "recipes/common/model/fused_ops.py": (),
    "recipes/common/model/fusion.py": (),
    "recipes/common/model/gradient_sums.py": (),
    "recipes/common/model/host_activations.py": (),
    "recipes/common/model/initial_weights.py": (),
    "recipes/common/model/input_gradients.py": (),
    "recipes/common/model/linears.py": ("deferrable_fraction",),
    "recipes/common/model/look_ups.py": (),
    "recipes/common/model/main_grads.py": (),
    "recipes/common/model/recompute.py": (),
    "recipes/common/model/routers.py": (),
    "recipes/common/model/shard_draws.py": ("drawn_elements",),
    "recipes/common/model/shared_inputs.py": (),
    "recipes/common/model/sharding.py": (),
    "recipes/common/model/token_chunks.py": (),
    "recipes/common/model/weight_grad_store.py": (),
    "recipes/common/parallel/collectives.py": (),
    "recipes/common/parallel/context_parallel.py": (),
    "recipes/common/parallel/cross_entropy.py": (),
    "recipes/common/parallel/expert_parallel.py": (),
    "recipes/common/parallel/experts.py": (),
    "recipes/common/parallel/flat_collectives.py": (),
    "recipes/common/parallel/gradient_buckets.py": (),
    "recipes/common/parallel/grid.py": (),
    "recipes/common/parallel/kept_rows.py": (),
    "recipes/common/parallel/router_losses.py": (),
    "recipes/common/parallel/sequence_parallel.py": (),
    "recipes/common/parallel/summed_inputs.py": (),
    "recipes/common/parallel/tensor_parallel.py": ("_check_lengths",),
    "recipes/common/parallel/tensor_plans.py": (),
    "recipes/common/parallel/tensor_styles.py": (),
    "recipes/common/parallel/weight_gathers.py": (),
    "recipes/common/pipeline/carrier.py": (),
    "recipes/common/pipeline/crossings.py": (),
    "recipes/common/pipeline/executor.py": (),
    "recipes/common/pipeline/last_passes.py": (),
    "recipes/common/pipeline/layer_options.py": (),
    "recipes/common/pipeline/packing.py": (),
    "recipes/common/pipeline/partition.py": ("pass_costs", "balance_folded", "balance_rounds", "balance_stages", "_lengths"),
    "recipes/common/pipeline/placeholders.py": (),
    "recipes/common/pipeline/places.py": (),
    "recipes/common/pipeline/schedules.py": ("finish_times", "of"),
    "recipes/common/pipeline/stage.py": (),
    "recipes/common/pipeline/stage_messages.py": (),
    "recipes/common/pipeline/stage_weights.py": (),
    "recipes/common/pipeline/tied_embeddings.py": (),
    "recipes/common/engine/build_trainer.py": (),
    "recipes/common/engine/gradient_norm.py": (),
    "recipes/common/engine/gradient_path.py": (),
    "recipes/common/engine/optimizers.py": (),
    "recipes/common/engine/trainer.py": (),
    "recipes/common/engine/untouched.py": (),
    "recipes/common/engine/zero_state.py": (),
    "recipes/common/checkpoint/reader.py": ("damaged_parts", "_part_checksum"),
    "recipes/common/checkpoint/resume.py": ("_newest_intact", "_check_same_model"),
    "recipes/common/checkpoint/position.py": (),
}

_MOVES = frozenset(
    {"all_reduce", "copy_to", "reduce_from", "gather_from", "split_to", "sum_gradient", "gather_sequence", "scatter_sequence",
     "all_gather_sequence", "sum_over_ranks", "_all_gather_last", "_own_part", "_own_sequence", "_reduce_scatter_sequence",
     "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "copy_shared", "gather_shared", "sum_together"}
)  # fmt: skip
_SWAPPED_NAMES = {
    "tensor_rank": "data_rank", "data_rank": "tensor_rank", "pipeline_rank": "data_rank",
    "tensor_group": "data_group", "data_group": "tensor_group", "model_group": "tensor_group", "kv_group": "tensor_group",
    "down_group": "up_group", "up_group": "down_group", "tie_group": "pipeline_group", "pipeline_group": "tie_group",
    "is_first": "is_last", "is_last": "is_first", "is_first_stage": "is_last_stage", "is_last_stage": "is_first_stage",
    "local_start": "global_start", "global_start": "local_start", "embedding": "head", "head": "embedding",
    "MAX": "SUM", "SUM": "MAX", "min": "max", "max": "min", "any": "all", "all": "any", "amax": "amin",
    "popleft": "pop", "appendleft": "append",
}  # fmt: skip
_NOT_NUMBERS = ("strict", "encoding", "flush", "timeout", "async_op", "non_blocking")  # keywords whose values are left alone
_OPERATORS = {ast.Add: "-", ast.Sub: "+"}
_FACTORS = (ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
_BOUNDS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
_TESTS = {ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One wrong line: where, of what kind, and the text that replaces bytes [start, stop) of the file."""

    file: str
    kind: str
    function: str  # the qualified name of the innermost one around it; "" at the top of a module or class
    line: int
    start: int
    stop: int
    text: str
    before: str  # the lines as they are
    after: str  # and as they are with the fault

    def planted(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.stop :]

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.file, self.function, self.before, self.after


def draw(root: Path, count: int, seed: int) -> list[Mutation]:
    """Draw mutations from all of the scope, as many of each kind, at most one of a kind a line.

    Each has its own random number, of the seed and its text: a change of the code elsewhere leaves it drawn.
    """
    by_kind: dict[str, list[Mutation]] = {}
    for mutation in (mutation for file in SCOPE for mutation in find(root, file)):
        by_kind.setdefault(mutation.kind, []).append(mutation)
    for mutations in by_kind.values():
        mutations.sort(key=lambda each: hashlib.blake2b(repr((seed, each.key)).encode()).digest(), reverse=True)
    drawn: list[Mutation] = []
    taken: set[tuple[str, str, int]] = set()
    while len(drawn) < count and any(by_kind.values()):
        for kind in sorted(kind for kind, left in by_kind.items() if left):
            mutation = by_kind[kind].pop()
            if (kind, mutation.file, mutation.line) not in taken and _is_another_program(root, mutation):
                taken.add((kind, mutation.file, mutation.line))
                drawn.append(mutation)
    return drawn[:count]


def _is_another_program(root: Path, mutation: Mutation) -> bool:
    source = (root / mutation.file).read_bytes()
    try:
        return ast.dump(ast.parse(mutation.planted(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def find(root: Path, file: str) -> list[Mutation]:
    """Return every mutation of a file."""
    source = (root / file).read_bytes()
    found = _Finder(source, file, SCOPE.get(file, ()))
    found.visit(ast.parse(source))
    return found.mutations


class _Finder(ast.NodeVisitor):
    """Walks a module and writes down what could be wrong in each place."""

    def __init__(self, source: bytes, file: str, left_alone: tuple[str, ...]) -> None:
        self.source, self.file, self.left_alone = source, file, left_alone
        self.mutations: list[Mutation] = []
        self._around: list[ast.FunctionDef | ast.ClassDef] = []
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    # what shapes no number: annotations, messages, refusals, time
    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in self.left_alone or node.name.startswith("__repr"):
            return
        self._visit_inside(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_inside(node)

    def _visit_inside(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        self._around.append(node)
        for statement in node.body:
            self.visit(statement)
        self._around.pop()

    def _function(self) -> str:
        """Return the qualified name of the function around, as Python gives it to its code."""
        if not self._around or isinstance(self._around[-1], ast.ClassDef):
            return ""
        words = [f"{n.name}.<locals>" if isinstance(n, ast.FunctionDef) else n.name for n in self._around]
        return ".".join(words).removesuffix(".<locals>")

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if not ast.unparse(item).startswith("CLOCK."):
                self.visit(item)
        for statement in node.body:
            self.visit(statement)

    def _leave_alone(self, node: ast.AST) -> None:
        pass

    visit_Assert = visit_Raise = visit_JoinedStr = visit_Import = visit_ImportFrom = _leave_alone  # noqa: N815

    # wrong lines
    def visit_If(self, node: ast.If) -> None:
        refuses = all(isinstance(s, ast.Raise) for s in node.body) and not node.orelse
        if refuses or ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            self._add("swapped branch", node.test, f"not ({self._text(node.test)})")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        body, test, orelse = (self._text(part) for part in (node.body, node.test, node.orelse))
        self._add("swapped branch", node, f"({orelse} if {test} else {body})")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        word = " or " if isinstance(node.op, ast.And) else " and "
        self._add("swapped branch", node, "(" + word.join(f"({self._text(value)})" for value in node.values) + ")")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._add("swapped branch", node, f"({self._text(node.operand)})")
        elif isinstance(node.op, ast.USub):
            self._add("sign", node, f"({self._text(node.operand)})")
        if not isinstance(node.operand, ast.Constant):
            self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        left, right = self._text(node.left), self._text(node.right)
        if type(node.op) in _OPERATORS:
            self._add("sign", node, f"({left} {_OPERATORS[type(node.op)]} {right})")
        elif isinstance(node.op, _FACTORS):
            self._add("scale", node, f"({left})")
            if isinstance(node.op, ast.Mult):
                self._add("scale", node, f"({right})")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            comparison = type(node.ops[0])
            for kind, words in (("bound", _BOUNDS), ("swapped branch", _TESTS)):
                if comparison in words:
                    self._add(kind, node, f"{self._text(node.left)} {words[comparison]} {self._text(node.comparators[0])}")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._add("flag", node, str(not node.value))
        elif isinstance(node.value, int):
            self._add("bound", node, str(node.value + 1))
            if node.value > 0:
                self._add("bound", node, str(node.value - 1))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._add("sum", node, f"{self._text(node.target)} = {self._text(node.value)}")
        self._add("sum", node, "pass")
        self.visit(node.value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _SWAPPED_NAMES and isinstance(node.ctx, ast.Load) and self._text(node.value) not in ("grads", "torch"):
            kind = "group or operation" if node.attr.endswith("group") or node.attr.isupper() else "coordinate"
            self._add(kind, node, f"{self._text(node.value)}.{_SWAPPED_NAMES[node.attr]}")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in _SWAPPED_NAMES and isinstance(node.ctx, ast.Load) and hasattr(builtins, _SWAPPED_NAMES[node.id]):
            self._add("coordinate", node, _SWAPPED_NAMES[node.id])

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant) or ast.unparse(node).startswith(("CLOCK.", "print(")):
            return
        if isinstance(node.value, ast.Call):
            if self._called(node.value) in _MOVES:
                self._add("collective", node, "pass")
                self._add("collective", node, f"{self._text(node)}, {self._text(node)}")
                for child in (*node.value.args, *node.value.keywords):
                    self.visit(child)
                return
            self._add("hook or call left out", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, ast.Attribute) and target.attr == "forward" for target in node.targets):
            self._add("hook or call left out", node, "pass")
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if self._called(node) in _MOVES and node.args:
            first, whole = node.args[0], self._text(node)
            self._add("collective", node, f"({self._text(first)})")
            at, origin = self._span(first), self._span(node)[0]
            inside = whole.encode()
            doubled = inside[: at[0] - origin] + inside + inside[at[1] - origin :]
            self._add("collective", node, doubled.decode())
        for keyword in node.keywords:
            if keyword.arg in ("group", "op", "partial", "dim"):
                others = [self._text(each) for each in (*node.args, *(k for k in node.keywords if k is not keyword))]
                self._add("group or operation", node, f"{self._text(node.func)}({', '.join(others)})")
        for child in (node.func, *node.args, *(k.value for k in node.keywords if k.arg not in _NOT_NUMBERS)):
            self.visit(child)

    @staticmethod
    def _called(node: ast.Call) -> str:
        return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        start, stop = self._span(node)
        return self.source[start:stop].decode()

    def _add(self, kind: str, node: ast.AST, text: str) -> None:
        start, stop = self._span(node)
        planted = self.source[:start] + text.encode() + self.source[stop:]
        first, last = self._starts[node.lineno - 1], self._starts[node.end_lineno]
        after = planted[first : last + len(planted) - len(self.source)]
        self.mutations.append(
            Mutation(
                file=self.file,
                kind=kind,
                function=self._function(),
                line=node.lineno,
                start=start,
                stop=stop,
                text=text,
                before=" ".join(self.source[first:last].decode().split()),
                after=" ".join(after.decode().split()),
            )
        )
