"""The loss on a sharded vocabulary, chunk by chunk, against torch's cross-entropy over full logits: values and gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from recipes.common.engine.startup import start_distributed
from recipes.common.model.gradient_sums import GradientSums, StepSums
from recipes.common.model.linears import defer_weight_gradients, route_products
from recipes.common.model.main_grads import give_main_grad
from recipes.common.model.sharding import ShardSpec
from recipes.common.parallel.cross_entropy import IGNORED, vocabulary_loss
from tools.common.forked_ranks import run_ranks

SEQS, SEQ_LEN, WIDTH = 3, 7, 8
CHUNKS, KINDS = (1, 4, 21, 1000), ("plain", "soft-cap", "tanh", "bias")
# chunk, z-loss, logits: all pairs
CASES = [(chunk, (0.0, 1e-2)[(i + j) % 2], kind) for i, chunk in enumerate(CHUNKS) for j, kind in enumerate(KINDS)]


def _logits(kind, hidden, weight, bias):
    logits = hidden @ weight.t() + (bias if kind == "bias" else 0.0)
    if kind == "tanh":  # autograd keeps these logits: their gradient must not take their place
        return torch.tanh(logits)
    return 5 * torch.tanh(logits / 5) if kind == "soft-cap" else logits


def _compare(vocab, ignored):
    """Largest differences from the oracle, for every case: {case: {what: difference}}."""
    start_distributed("cpu")
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(size))) if size > 1 else None
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(SEQS, SEQ_LEN, WIDTH, generator=generator)
    weight, bias = torch.randn(vocab, WIDTH, generator=generator), torch.randn(vocab, generator=generator)
    targets = torch.randint(0, vocab, (SEQS, SEQ_LEN), generator=generator)
    targets[0, :ignored] = IGNORED
    shard = ShardSpec(0)
    return {case: _differences(case, hidden, weight, bias, targets, shard, rank, size, group) for case in CASES}


def _differences(case, hidden, weight, bias, targets, shard, rank, size, group):
    chunk_tokens, z_loss, kind = case
    vocab = len(weight)
    mine = [shard.take(whole, rank, size).requires_grad_() for whole in (weight, bias)]
    received = hidden.clone().requires_grad_()
    total, (cross_entropy, log_z_squared, log_z), largest = vocabulary_loss(
        lambda x: _logits(kind, x, *mine),
        received,
        targets,
        mine if kind == "bias" else mine[:1],
        vocab_size=vocab,
        first_row=rank * len(mine[0]),
        group=group,
        chunk_tokens=chunk_tokens,
        z_loss=z_loss,
    )
    (total * 0.5).backward()
    plain = [whole.clone().requires_grad_() for whole in (hidden, weight, bias)]
    logits = _logits(kind, *plain).flatten(0, 1)
    wanted = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    scored = targets.flatten() != IGNORED
    squares = (logits.logsumexp(-1).square() * scored).sum()
    ((wanted + z_loss * squares) * 0.5).backward()
    pairs = {
        "cross-entropy": (cross_entropy, wanted),
        "log(Z)^2": (log_z_squared, squares),
        "log(Z)": (log_z, (logits.logsumexp(-1) * scored).sum()),
        "largest logit": (largest, logits[scored].max()),
        "total": (total, wanted + z_loss * squares),
        "gradient of hidden": (received.grad, plain[0].grad),
        "gradient of the head": (mine[0].grad, shard.take(plain[1].grad, rank, size)),  # zero in the padding
    }
    if kind == "bias":
        pairs["gradient of the bias"] = (mine[1].grad, shard.take(plain[2].grad, rank, size))
    return {name: ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item() for name, (a, b) in pairs.items()}


# over 3 ranks, 4 tokens are 2, 2 and none: a rank that holds padding only
@pytest.mark.parametrize(("size", "vocab", "ignored"), [(1, 131, 5), (2, 131, 0), (3, 131, 5), (2, 130, 5), (3, 4, 0)])
def test_equals_cross_entropy_over_full_logits(size, vocab, ignored):
    for rank, found in enumerate(run_ranks(_compare, size, vocab, ignored)):
        for case, differences in found.items():
            worst = max(differences, key=differences.get)
            assert differences[worst] <= 2e-6, (rank, case, worst, differences[worst])


def test_nothing_to_score():
    """All targets ignored: zero, with a gradient of zeros rather than NaN."""
    assert run_ranks(_ignored, 1) == [(0.0, 0.0, 0.0)]


def _ignored():
    hidden = torch.randn(1, 4, WIDTH, requires_grad=True)
    weight = torch.randn(11, WIDTH, requires_grad=True)
    total, *_ = _loss(hidden, weight, torch.full((1, 4), IGNORED))
    total.backward()
    return total.item(), hidden.grad.abs().max().item(), weight.grad.abs().max().item()


def _loss(hidden, weight, targets, chunk_tokens=3):
    options = {"vocab_size": len(weight), "first_row": 0, "group": None, "chunk_tokens": chunk_tokens, "z_loss": 1e-3}
    return vocabulary_loss(lambda x: x @ weight.t(), hidden, targets, [weight], **options)


def test_large_logits_neither_overflow_nor_vanish():
    assert run_ranks(_large, 1) == [True]


def _large():
    hidden, targets = torch.eye(4).view(1, 4, 4) * 1e4, torch.tensor([[0, 1, 2, 0]])
    _, (cross_entropy, *_), _ = _loss(hidden.requires_grad_(), torch.eye(4).requires_grad_(), targets)
    return cross_entropy.item() == pytest.approx(1e4)  # three right with certainty, one wrong by 1e4


def test_without_gradients_nothing_is_kept():
    assert run_ranks(_evaluation, 1) == [(True, False)]


def _evaluation():
    hidden, weight = torch.randn(2, 3, WIDTH), torch.randn(11, WIDTH, requires_grad=True)
    targets = torch.randint(0, 11, (2, 3))
    _, (learning, *_), _ = _loss(hidden.clone().requires_grad_(), weight, targets)
    with torch.no_grad():
        total, (cross_entropy, *_), _ = _loss(hidden, weight, targets)
    return cross_entropy.equal(learning), total.requires_grad


def test_full_logits_never_exist():
    """The largest logits that the head is asked for are those of one chunk."""
    assert run_ranks(_widths, 1) == [[3, 3, 3, 3, 2]]


def _widths():
    weight, seen = torch.randn(11, WIDTH, requires_grad=True), []

    def logits_of(x):
        seen.append(x.shape[1])
        return x @ weight.t()

    options = {"vocab_size": 11, "first_row": 0, "group": None, "chunk_tokens": 3, "z_loss": 0.0}
    vocabulary_loss(logits_of, torch.randn(2, 7, WIDTH), torch.zeros(2, 7, dtype=torch.long), [weight], **options)
    return seen


def test_a_chunk_asks_the_other_ranks_for_its_maximum_and_its_sums():
    assert run_ranks(_asked, 2) == [["MAX", "SUM"] * 2 + ["SUM"]] * 2  # two chunks, and the gradient of their hidden states


def _asked():
    start_distributed("cpu")
    rank, group, asked, all_reduce = dist.get_rank(), dist.new_group([0, 1]), [], dist.all_reduce

    def recorded(tensor, op=dist.ReduceOp.SUM, **options):
        asked.append(str(op).rpartition(".")[2])
        return all_reduce(tensor, op, **options)

    dist.all_reduce = recorded
    options = {"vocab_size": 22, "first_row": 11 * rank, "group": group, "chunk_tokens": 7, "z_loss": 1e-3}
    weight, hidden = torch.randn(11, WIDTH, requires_grad=True), torch.randn(2, 7, WIDTH, requires_grad=True)
    total, *_ = vocabulary_loss(lambda x: x @ weight.t(), hidden, torch.zeros(2, 7, dtype=torch.long), [weight], **options)
    total.backward()
    return asked


def _with_factor(known, given, late=False):
    """The gradients of hidden states and head, whose sums are a step's, where the loss's gradient is `given`.

    late: the head's last products come after the backward pass; what the sums had before them is returned too.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, WIDTH, generator=generator, requires_grad=True)
    head, targets = nn.Linear(WIDTH, 11, bias=False), torch.randint(0, 11, (2, 7), generator=generator)
    head.weight.data = torch.randn(11, WIDTH, generator=generator)
    route_products(head)
    sums, total = StepSums(late=late) if known is not None else GradientSums(), torch.ones(11, WIDTH)
    give_main_grad(head.weight, total, lambda: False)
    defer_weight_gradients(head, sums)
    options = {"vocab_size": 11, "first_row": 0, "group": None, "chunk_tokens": 4, "z_loss": 1e-3, "head_sums": sums}
    factor = None if known is None else torch.tensor(known)
    loss, *_ = vocabulary_loss(head, hidden, targets, [head.weight], factor=factor, **options)
    (loss * given).backward()
    assert head.weight.grad is None
    if late:
        before = total.clone()
        assert sums.waiting == {head.weight}
        sums.finish()
        assert not sums.waiting
        return hidden.grad, total, before
    return hidden.grad, total


def _known_factors():
    (hidden, head), (hidden_before, head_before) = _with_factor(0.3, 0.3), _with_factor(None, 0.3)
    wrong = [_with_factor(0.3, given) for given in (0.6, float("nan"), float("inf"))]
    close = [torch.testing.assert_close(*pair) is None for pair in ((hidden, hidden_before), (head, head_before))]
    return close, [(of_hidden.isnan().all().item(), of_head.isnan().any().item()) for of_hidden, of_head in wrong]


def test_with_a_known_factor_the_head_adds_to_the_steps_sum_at_once_and_another_makes_all_nan():
    assert run_ranks(_known_factors, 1) == [([True, True], [(True, True)] * 3)]


def _late_products():
    (hidden, head), (hidden_late, head_late, before) = _with_factor(0.3, 0.3), _with_factor(0.3, 0.3, late=True)
    wrong = _with_factor(0.3, 0.6, late=True)[1].isnan().any().item()
    # of 14 tokens in parts of 4 the last 2 wait: the others are in the sum already
    return hidden.equal(hidden_late), head.equal(head_late), before.equal(head), (before != 1.0).any().item(), wrong


def test_the_last_parts_products_can_come_after_the_backward_pass():
    """The same to the last bit, and in a pass that multiplies by another factor as NaN."""
    assert run_ranks(_late_products, 1) == [(True, True, False, True, True)]
