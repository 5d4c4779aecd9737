"""Attention without masks is attention with them: documents, windows, divided queries; one by one and by the kernel's rules."""

from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recipes.common.model import varlen_attention
from recipes.common.model.decoder import PlanError
from recipes.common.model.document_bounds import find_bounds, positions_on
from recipes.common.model.recompute import product_ops
from recipes.common.model.varlen_attention import attend, built_as, kernel_refusal, segments
from tests.support.dense_attention import CASES, HEADS, KV_HEADS, LENGTH, SEQS, attended, dense, positions, tensors
from tests.support.waits import Waits
from tools.common.forked_ranks import run_ranks

SCALE = 0.3
CPU = torch.device("cpu")
MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=HEADS // KV_HEADS)


def of(documents, window, spans=1, span=0):
    noted = positions_on(CPU, positions()) if documents else None
    return segments(noted, seqs=SEQS, length=LENGTH, device=CPU, window=window, spans=spans, span=span)


def _stand_in(query, key, value, query_starts, key_starts, longest_query, longest_key, *, scale, window_size, enable_gqa):
    """Computes what torch's varlen_attn documents: a segment's last query belongs to its last key, with left keys before it."""
    assert enable_gqa and query_starts.dtype == key_starts.dtype == torch.int32
    out = []
    for i in range(len(query_starts) - 1):
        q = query[query_starts[i] : query_starts[i + 1]]
        k, v = (t[key_starts[i] : key_starts[i + 1]].repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (key, value))
        assert len(q) <= longest_query and len(k) <= longest_key
        left, right = window_size
        distance = torch.arange(len(q)).unsqueeze(1) + len(k) - len(q) - torch.arange(len(k))
        seen = (distance >= -right) & ((distance <= left) | (left < 0))
        scores = torch.einsum("qhw,khw->hqk", q, k).mul(scale).masked_fill(~seen, -torch.inf)
        out.append(torch.einsum("hqk,khw->qhw", scores.softmax(-1), v))
    return torch.cat(out)


def _differences(by_kernel):
    """Return (case, span) -> the largest differences of the output and the three gradients, and the waits of the host."""
    found = {}
    for name, (documents, window, spans) in CASES.items():
        mask = attended(documents, window)
        for span in range(spans):
            here = slice(span * LENGTH // spans, (span + 1) * LENGTH // spans)
            *given, gradient = tensors("cpu", torch.float32)
            theirs, ours = ([t.clone().requires_grad_() for t in given] for _ in range(2))
            wanted = dense(theirs[0][:, :, here], *theirs[1:], mask[:, :, here], SCALE)
            wanted.backward(gradient[:, here])
            instead = of(documents, window, spans, span)
            inputs = ours[0][:, :, here], *ours[1:]
            with Waits() as waits:
                if by_kernel:
                    varlen_attention.varlen_attn = _stand_in
                    out = varlen_attention._by_kernel(*inputs, instead, SCALE)
                else:
                    out, _ = attend(MODULE, *inputs, instead, scaling=SCALE)
            out.backward(gradient[:, here])
            pairs = zip((out, *(t.grad for t in ours)), (wanted, *(t.grad for t in theirs)), strict=True)
            rows = instead.rows(SEQS, torch.arange(LENGTH // spans), LENGTH)
            same = rows.equal(mask[:, :, here])
            found[name, span] = [(a - b).abs().max().item() for a, b in pairs], same, 0 if by_kernel else waits.total
    return found


@pytest.mark.parametrize("by_kernel", [False, True])
def test_outputs_and_gradients_are_those_of_a_dense_mask(by_kernel):
    found = run_ranks(_differences, 1, by_kernel)[0]
    assert len(found) == 11
    for case, (differences, same_rows, waits) in found.items():
        assert max(differences) < 2e-6, (case, differences)
        assert same_rows and waits == 0, case


def _lengths(documents, window, spans=1, span=0):
    found = of(documents, window, spans, span)
    if found is None:
        return None
    starts = [found.query_starts.tolist(), found.key_starts.tolist()]
    counts = [[0, *torch.tensor(each).cumsum(0).tolist()] for each in (found.queries, found.keys)]
    assert starts == counts
    return found.queries, found.keys, found.first_query, found.window


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((True, None), ((5, 11, 1, 7, 24), (5, 11, 1, 7, 24), 0, None)),
        ((False, None), None),  # causality is all
        ((False, 24), None),  # a window that hides nothing
        ((False, 23), ((24, 24), (24, 24), 0, 23)),
        ((True, 24), ((5, 11, 1, 7, 24), (5, 11, 1, 7, 24), 0, None)),
        # queries 8 to 15: keys of the document that begins before them, and nothing of what follows
        ((True, 4, 3, 1), ((0, 8, 0, 0, 8, 0), (5, 11, 1, 7, 16, 8), 8, 4)),
        ((True, None, 3, 0), ((5, 3, 0, 0, 0, 8, 0), (5, 3, 8, 1, 7, 8, 16), 0, None)),
        ((False, None, 2, 1), ((12, 12), (24, 24), 12, None)),
    ],
    ids=str,
)
def test_segments(arguments, wanted):
    assert run_ranks(_lengths, 1, *arguments) == [wanted]


def _bounds():
    whole = positions()
    noted, asked = (find_bounds(p) for p in (positions_on(CPU, whole), whole))
    return noted.starts.tolist(), asked.starts.tolist(), noted.host.tolist()


def test_bounds_without_a_note_are_found():
    assert run_ranks(_bounds, 1)[0] == ([0, 5, 16, 17, 24, 48],) * 3


@pytest.mark.parametrize(
    ("dtype", "widths", "reason"),
    [
        (torch.bfloat16, (128, 128), None),
        (torch.float16, (256, 256), None),
        (torch.float32, (64, 64), "it computes in 16 bits, not in float32"),
        (torch.bfloat16, (192, 128), "it needs equal widths of keys and values, not 192 and 128"),
        (torch.bfloat16, (264, 264), "it needs heads of a multiple of 8 up to 256, not 264"),
        (torch.bfloat16, (60, 60), "it needs heads of a multiple of 8 up to 256, not 60"),
    ],
)
def test_what_the_kernel_takes(dtype, widths, reason):
    assert kernel_refusal(dtype, *widths) == reason
    assert kernel_refusal(dtype, *widths, dropout=0.1) == "it drops no attention out"


def _refused():
    query, key, value, _ = tensors("cpu", torch.float32)
    instead, said = of(True, None), []
    for mask, options, module in (
        (attended(True, None), {}, MODULE),
        (instead, {"softcap": 30.0}, MODULE),
        (instead, {"position_bias": torch.zeros(1)}, MODULE),
        (instead, {"is_causal": False}, MODULE),
        (instead, {}, SimpleNamespace(is_causal=False)),
    ):
        with pytest.raises(PlanError) as error:
            attend(module, query, key, value, mask, **options)
        said.append(str(error.value))
    return said


def test_an_attention_that_is_more_is_refused():
    scores = "SimpleNamespace changes the scores by a soft cap or adds a bias to them"
    mask, causal = "SimpleNamespace makes a mask of its own", "SimpleNamespace is not causal"
    assert run_ranks(_refused, 1) == [[mask, scores, scores, causal, causal]]


def test_without_a_mask_it_is_sdpa():
    assert (built_as("varlen"), built_as("sdpa"), built_as("eager")) == ("sdpa", "sdpa", "eager")
    assert run_ranks(_plain, 1) == [True]


def _plain():
    query, key, value, _ = tensors("cpu", torch.float32)
    ours, _ = attend(MODULE, query, key, value, None, scaling=SCALE)
    theirs, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](MODULE, query, key, value, None, scaling=SCALE)
    return ours.equal(theirs)


def test_selective_recomputation_keeps_its_results():
    assert torch.ops.torch_attn._varlen_attn.default in product_ops()
