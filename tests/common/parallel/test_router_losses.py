"""Router losses equal transformers' own, and short references, in one process: loss and every gradient, in every layout."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from recipes.common.model.decoder import PlanError, find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.model.routers import plan_routers
from recipes.common.parallel.grid import one_process
from recipes.common.parallel.tiny_model import shrink
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Layout, Router
from tests.support.parity import assert_same, both_of_each, trial_of
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import build_trial_trainer, gradient_trial, rank_batches

STRONG = Router(coefficient=0.5)  # so that a wrong gradient cannot hide behind the model's own
SEQUENCE = Router(loss="sequence", coefficient=0.5, z_loss=0.05)
GLOBAL = Router(loss="global_batch", coefficient=0.5)
SO_FAR = Router(loss="global_batch", coefficient=0.5, count_ahead=False)
# layout (pipeline, tensor, data), accumulation, kind of loss, options: every value beside every other of another column
PAIRS = [
    ((1, 1, 1), 1, STRONG, {"recompute": "full"}),
    ((1, 1, 2), 2, STRONG, {"mlp_chunk_tokens": 5}),
    ((1, 2, 2), 2, SEQUENCE, {"recompute": "selective"}),
    ((2, 1, 1), 4, STRONG, {"pipeline_schedule": "1f1b"}),
    ((2, 1, 2), 1, GLOBAL, {"pipeline_schedule": "zero_bubble"}),
    ((2, 2, 1), 2, GLOBAL, {"pipeline_schedule": "1f1b", "recompute": "full"}),
    ((2, 2, 1), 2, STRONG, {"pipeline_schedule": "zero_bubble_v", "recompute": "selective"}),
    ((2, 1, 2), 2, SEQUENCE, {"pipeline_schedule": "zero_bubble_v", "mlp_chunk_tokens": 5}),
    ((2, 2, 1), 1, STRONG, {"pipeline_schedule": "zero_bubble", "recompute": "full"}),
    ((2, 1, 1), 4, GLOBAL, {"pipeline_schedule": "zero_bubble_v"}),
    ((1, 2, 1), 1, GLOBAL, {"recompute": "full", "mlp_chunk_tokens": 5}),
    ((2, 1, 2), 4, SO_FAR, {"pipeline_schedule": "1f1b"}),
    ((1, 1, 4), 2, STRONG, {"context": 2}),
    ((2, 1, 2), 2, SEQUENCE, {"context": 2}),
    ((1, 1, 4), 2, GLOBAL, {"context": 2}),
]


BIASED = Router(loss="sequence", coefficient=0.01, bias_rate=0.01)


def pair_of(layout, accumulation, router, options):
    pipeline, _, data = layout
    readers = data // options.get("context", 1)
    sizes = {"micro_seqs": 2, "global_seqs": 2 * accumulation * readers}
    chunks = 2 * pipeline if options.get("pipeline_schedule") == "zero_bubble_v" else 2
    return gradient_trial(trial_of(tiny_config("mixtral", num_hidden_layers=chunks), *layout, router=router, **sizes, **options))


def family_trial(family):
    fields = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32, "kv_channels": 16}
    return gradient_trial(trial_of(tiny_config(family, num_hidden_layers=2, **fields), 2, 1, 1, global_seqs=2, router=STRONG))


def shrunk(family, layout=Layout(), **fields):  # noqa: B008  a layout is frozen
    return shrink(AutoConfig.for_model(family, **fields), layout)


PAIR_TRIALS = {f"{'x'.join(map(str, p[0]))}-{p[1]}-{p[2].loss}-{'-'.join(map(str, p[3].values()))}": pair_of(*p) for p in PAIRS}
FAMILY_TRIALS = {family: family_trial(family) for family in ("qwen3_moe", "granitemoe", "gpt_oss", "jetmoe")}
# sigmoids that start at zero, or are given for all experts, one chosen; more choices than experts; weights by expert
HARD_TRIALS = {
    family: gradient_trial(trial_of(shrunk(family), 1, 1, 1, global_seqs=2, router=SEQUENCE, recompute=recompute))
    for family, recompute in {"afmoe": "selective", "llama4_text": "full", "zaya": "none", "jetmoe": "none"}.items()
}
DEEPSEEK = shrunk("deepseek_v3", Layout(pipeline=2, tensor=2), n_routed_experts=6)
BIAS_TRIALS = {layout: trial_of(DEEPSEEK, *layout, global_seqs=4, router=BIASED, steps=4) for layout in ((2, 1, 2), (1, 2, 2))}
KEPT_BIAS_TRIALS = {
    family: trial_of(
        shrunk(family, Layout(pipeline=2)), 2, 1, 1, global_seqs=2, router=Router(loss=None, bias_rate=0.001), steps=2
    )
    for family in ("afmoe", "ernie4_5_moe", "laguna", "minimax_m2")
}
STRONGLY = trial_of(tiny_config("mixtral", num_hidden_layers=2), 2, 1, 1, global_seqs=4, router=STRONG)
EFFECT_TRIALS = {
    "AdamW": STRONGLY,
    "with": gradient_trial(STRONGLY),
    "without": gradient_trial(replace(STRONGLY, router=Router(loss=None))),
}
GROUPS = {
    "pair": PAIR_TRIALS, "family": FAMILY_TRIALS, "hard": HARD_TRIALS, "bias": BIAS_TRIALS, "kept": KEPT_BIAS_TRIALS,
    "effect": EFFECT_TRIALS,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """(group, name) -> (what the layout left, what the oracle left), of all trials."""
    return both_of_each({(group, name): trial for group, trials in GROUPS.items() for name, trial in trials.items()})


@pytest.mark.parametrize("name", PAIR_TRIALS)
def test_losses_and_gradients_in_every_layout(trained, name):
    assert_same(*trained["pair", name])


@pytest.mark.parametrize("family", FAMILY_TRIALS)
def test_families(trained, family):
    assert_same(*trained["family", family])


@pytest.mark.parametrize("family", HARD_TRIALS)
def test_routers_that_are_hard_to_read(trained, family):
    assert_same(*trained["hard", family])


def test_the_loss_is_not_for_nothing_and_adamw_keeps_pace(trained):
    assert_same(*trained["effect", "AdamW"])
    with_loss, without = (trained["effect", name][1] for name in ("with", "without"))
    name = "model.layers.0.mlp.gate.weight"
    assert (with_loss.parameters[name] - without.parameters[name]).abs().max() > 1e-4
    assert with_loss.losses[0] - without.losses[0] > 0.5  # the loss of balanced experts is their number a token, 2


@pytest.mark.parametrize("layout", BIAS_TRIALS)
def test_biases_move_bit_for_bit_alike(trained, layout):
    assert_same(*trained["bias", layout])  # and the buffers, bit for bit
    plain = trained["bias", layout][1]
    assert len(plain.buffers) == 3
    for bias in plain.buffers.values():
        moves = bias / BIASED.bias_rate
        assert moves.abs().max() >= 2 and torch.allclose(moves, moves.round(), atol=1e-5)


@pytest.mark.parametrize("family", KEPT_BIAS_TRIALS)
def test_biases_wherever_a_family_keeps_them(trained, family):
    found, plain = trained["kept", family]
    assert plain.buffers and all(found.buffers[name].equal(bias) for name, bias in plain.buffers.items())
    assert any(bias.count_nonzero() for bias in plain.buffers.values())


def test_weights_of_the_model_and_of_the_recipe():
    def weight(router, **fields):
        causal = build_empty(tiny_config("mixtral", **fields))
        return plan_routers(causal, find_stack(causal), router).coefficient

    assert weight(Router(), router_aux_loss_coef=0.02) == 0.02
    assert weight(Router(coefficient=0.0), router_aux_loss_coef=0.02) == 0.0
    assert weight(Router(coefficient=0.3), router_aux_loss_coef=0.02) == 0.3
    causal = build_empty(tiny_config("llama"))
    assert not plan_routers(causal, find_stack(causal), Router()).routers
    causal = build_empty(tiny_config("mixtral"))
    with pytest.raises(PlanError, match=r"^router\.bias_rate=0\.1: model_type=mixtral has no bias of its 4 experts"):
        plan_routers(causal, find_stack(causal), Router(bias_rate=0.1))


def _skipped(trial):
    trainer = build_trial_trainer(trial)
    (micro,) = rank_batches(trial, trainer)
    result = trainer.train_step(micro, 1.0, trial.global_seqs * trial.seq_len, norm_ceiling=1e-9)
    return result.skipped, [float(buffer.abs().max()) for _, buffer in trainer.stage.persistent_buffers()]


def test_a_skipped_step_moves_no_bias():
    config = shrink(AutoConfig.for_model("deepseek_v3"), Layout())
    trial = gradient_trial(trial_of(config, 1, 1, 1, global_seqs=2, router=Router(bias_rate=0.1)))
    skipped, biases = run_ranks(_skipped, 1, trial)[0]
    assert skipped and biases and not any(biases)


def _so_far():
    """Return (ours, reference) of the weight by which the second of two micro batches' probabilities are pulled down."""
    router = Router(loss="global_batch", coefficient=1.0, count_ahead=False)
    stage = build_stage(plan_model(tiny_config("mixtral"), attention="eager", router=router), one_process(), seq_len=8)
    losses, logits = stage.router_losses, []
    for module in losses.own.values():
        module.register_forward_pre_hook(lambda module, args: logits.append((args[0] @ module.weight.T).detach()))
    losses.begin_step(1.0)
    values = []
    for start in (3, 60):
        before = float(losses.sums[0])
        ids = torch.arange(start, start + 16).view(2, 8)
        stage(ids, labels=(ids, torch.tensor(1.0))).backward()
        values.append(float(losses.sums[0]) - before)
    rows = [torch.cat([each.view(-1, 4) for each in logits[i : i + 4]]).softmax(-1) for i in (0, 4)]
    counts = [torch.nn.functional.one_hot(r.topk(2).indices, 4).sum((0, 1)).double() for r in rows]
    shares = [counts[0] / len(rows[0]), (counts[0] + counts[1]) / (2 * len(rows[0]))]
    return values, [float(4 * (share * r.double().mean(0)).sum()) for share, r in zip(shares, rows, strict=True)]


def test_counts_of_the_step_so_far():
    ours, reference = run_ranks(_so_far, 1)[0]
    assert ours == pytest.approx(reference, rel=1e-6)
    assert abs(ours[1] - ours[0]) > 1e-4


def _evaluate(router):
    stage = build_stage(plan_model(tiny_config("mixtral"), attention="eager", router=router), one_process(), seq_len=8)
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        loss = stage(ids, labels=(ids, torch.tensor(1.0)))
    return float(loss), stage.router_losses.sums.tolist(), float(stage.router_losses.counted.sum())


def _evaluate_each(routers):
    return [_evaluate(router) for router in routers]


def test_an_evaluation_knows_no_router_loss():
    ((with_loss, without),) = run_ranks(_evaluate_each, 1, [STRONG, Router(loss=None)])
    assert with_loss == without
    assert with_loss[1:] == ([0.0, 0.0], 0.0)
