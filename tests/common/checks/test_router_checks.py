"""What is asked of routers is checked before a run: values, what the family has, and that the loss is the family's own."""

import pytest
from transformers.models.mixtral import modeling_mixtral

from recipes.common.checks.router_checks import router_problems, router_value_problems
from recipes.common.checks.run_notes import router_lines
from recipes.common.model.decoder import PlanError, find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.model.routers import plan_routers
from recipes.common.recipe import Router
from tests.support.tiny import tiny_config, tiny_recipe
from tools.common.forked_ranks import run_ranks

LEAST = "router.{}={} must be 0 or more"
ABSENT = "router.{}: model_type=llama has no routers; leave it out"
ANOTHER = "router.loss='{}': model_type=mixtral defines its router loss in another way"


@pytest.mark.parametrize(
    ("router", "problems"),
    [
        (Router(), []),
        (Router(loss=None), []),
        (Router(loss="sequence", coefficient=0.0, z_loss=1e-3, bias_rate=1e-3, fp32=True), []),
        (Router(loss="batch"), ["router.loss='batch' must be 'micro_batch', 'sequence', 'global_batch' or None"]),
        (Router(coefficient=-1.0, z_loss=-2.0), [LEAST.format("coefficient", -1.0), LEAST.format("z_loss", -2.0)]),
        (Router(loss=None, coefficient=0.1),
         ["router.coefficient=0.1 weighs no loss with router.loss=None; choose one, or leave it out"]),
    ],
)  # fmt: skip
def test_values(router, problems):
    assert router_value_problems(router) == problems


def _problems(family, router, wrong):
    config = tiny_config(family)
    if wrong:
        own = modeling_mixtral.load_balancing_loss_func

        def twice(gate_logits, num_experts=None, top_k=2, attention_mask=None):
            return 2 * own(gate_logits, num_experts, top_k, attention_mask)

        modeling_mixtral.load_balancing_loss_func = twice
    causal = build_empty(config)
    try:
        plan = plan_routers(causal, find_stack(causal), router)
    except PlanError as error:
        plan = error
    return router_problems(config, router, plan, "eager")


@pytest.mark.parametrize(
    ("family", "router", "wrong", "beginnings"),
    [
        ("llama", Router(), False, []),
        ("llama", Router(coefficient=0.1, z_loss=0.2), False, [ABSENT.format("coefficient=0.1"), ABSENT.format("z_loss=0.2")]),
        ("mixtral", Router(), False, []),
        ("mixtral", Router(loss="sequence", coefficient=0.1, z_loss=0.2), False, []),
        ("mixtral", Router(bias_rate=0.1), False, ["router: router.bias_rate=0.1: model_type=mixtral has no bias"]),
        ("mixtral", Router(), True, [ANOTHER.format("micro_batch")]),
        ("mixtral", Router(loss="global_batch"), True, [ANOTHER.format("global_batch")]),
    ],
)  # fmt: skip
def test_a_model_and_what_is_asked_of_it(family, router, wrong, beginnings):
    problems = run_ranks(_problems, 1, family, router, wrong)[0]
    assert len(problems) == len(beginnings)
    assert all(problem.startswith(beginning) for problem, beginning in zip(problems, beginnings, strict=True))


def test_the_dry_run_says_what_balances(tmp_path):
    def lines(family="mixtral", **fields):
        recipe = tiny_recipe(tmp_path, model=tiny_config(family, router_aux_loss_coef=0.02), **fields)
        return router_lines(recipe, build_empty(recipe.model))

    assert lines("llama") == []
    assert lines() == ["routers     4, 2 of 4 experts a token: 0.02 x transformers' loss of each micro batch"]
    assert lines(router=Router(loss=None)) == ["routers     4, 2 of 4 experts a token: no balancing loss"]
    (line,) = lines(router=Router(loss="global_batch", z_loss=1e-3, fp32=True))
    assert line.endswith("0.02 x transformers' loss of the global batch, 0.001 x the mean of (log Z)^2, computed in fp32")
