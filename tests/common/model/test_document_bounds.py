"""What a run answers in transformers' place is what transformers would have found in the positions, and asks no device."""

import pytest
import torch
from transformers import masking_utils
from transformers import modeling_flash_attention_utils as flash

from recipes.common.data.document_masking import document_positions
from recipes.common.model.document_bounds import no_questions, positions_on, sequence_indices
from tests.support.waits import Waits
from tools.common.forked_ranks import run_ranks

END = 2
CASES = {
    "one document": [[5, 6, 7, 8, 9, 5]],
    "two": [[5, 6, END, 8, 9, 5]],
    "one that ends with the sequence": [[5, 6, 7, 8, 9, END]],
    "ends in a row": [[END, END, END, 7, END, 8]],
    "two sequences, one of them whole": [[5, 6, END, 8, 9, 5], [5, 6, 7, 8, 9, 5]],
    "two whole sequences": [[5, 6, 7, 8, 9, 5], [9, 8, 7, 6, 5, 4]],
}


def _asked(tokens):
    """Transformers' answers about positions: its own, and those of a run that masks documents, with the run's waits."""
    positions = document_positions(torch.tensor(tokens), END)
    theirs = _answers(positions)
    noted = positions_on(torch.device("cpu"), positions)
    with no_questions(documents=True):
        with Waits() as waits:
            ours = _answers(noted)
        other = _answers(positions.clone())  # without a note: asked as ever
    return theirs, ours, other, sequence_indices(noted), waits.total, _answers(positions) == theirs


def _answers(positions):
    indices = masking_utils.find_packed_sequence_indices(positions)
    packed = bool(flash._is_packed_sequence(positions, len(positions)))
    (starts, keys), (longest, _) = flash.prepare_fa_kwargs_from_position_ids(positions)
    assert starts is keys or starts.equal(keys)
    return None if indices is None else indices.tolist(), packed, starts.tolist(), int(longest)


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_transformers(case):
    theirs, ours, other, indices, waits, restored = run_ranks(_asked, 1, CASES[case])[0]
    assert ours == other == theirs
    assert (None if indices is None else indices.tolist()) == theirs[0]
    assert waits == 0
    assert restored


def _plain():
    with no_questions(documents=False), Waits() as waits:
        found = (
            masking_utils.find_packed_sequence_indices(torch.arange(6).unsqueeze(0)),
            flash._is_packed_sequence(torch.arange(6).unsqueeze(0), 1),
        )
    return found, waits.total


def test_without_documents_nothing_is_packed_and_nobody_asked():
    assert run_ranks(_plain, 1)[0] == ((None, False), 0)
