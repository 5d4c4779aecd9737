"""Text logs with records written into one line, decimal commas, thousands separators and other compilers' NaN are read whole."""

import numpy as np
import pytest

from tests.tools.common.test_logs import DEEPSPEED, FACE, LLMC, LLMC_MAIN, MODDED, NANOGPT, NANOTRON, NEMO, TITAN, line
from tools.common.console import UsageError
from tools.common.logs.reader import read_log


def read(tmp_path, text):
    path = tmp_path / "train.log"
    path.write_text(text)
    return read_log(path)


GLUED = {
    "Megatron": "".join(line(step, f"{3 + step / 8:.6E}") for step in range(1, 10)),
    "llm.c": LLMC,
    "llm.c main.log": "".join(LLMC_MAIN.splitlines(keepends=True)[1:]),
    "nanoGPT": NANOGPT,
    "modded": "".join(MODDED.splitlines(keepends=True)[1:]),
    "titan": "".join(TITAN.format(rank="", step=step, loss=9 - step) for step in range(1, 5)),
    "nanotron": "".join(NANOTRON.format(step=step, loss=9 - step) for step in range(1, 5)),
    "NeMo": "".join(NEMO.format(step=step, loss=9 - step) for step in range(1, 5)),
    "Hugging Face": "".join(f"  {n}/60{FACE % (9 - n)}\n" for n in range(4)),
    "DeepSpeed": "".join(text for text in DEEPSPEED.splitlines(keepends=True) if text.startswith("steps")),
}


@pytest.mark.parametrize("name", GLUED)
def test_records_without_newlines_between_are_all_read(tmp_path, name):
    whole, glued = read(tmp_path, GLUED[name]), read(tmp_path, GLUED[name].replace("\n", "") + "\n")
    assert len(whole.steps) > 1 and glued.steps.tolist() == whole.steps.tolist()
    for column, values in whole.columns.items():
        np.testing.assert_equal(glued.columns[column], values)


def test_records_of_several_ranks_in_a_line_keep_their_ranks(tmp_path):
    texts = [f"[rank{rank}]:{line(step, 10 * rank + step)}".replace("\n", "") for step in (1, 2, 3) for rank in (1, 0)]
    log = read(tmp_path, "".join(texts) + "\n")
    assert (log.steps.tolist(), log.columns["loss"].tolist()) == ([1, 2, 3], [11, 12, 13])


def test_decimal_commas_are_read_where_they_cannot_be_mistaken(tmp_path):
    log = read(tmp_path, "".join(line(step, "2.891790E+00", "1.023") for step in (1, 2)).replace(".", ","))
    assert log.columns["loss"].tolist() == [2.89179] * 2 and log.columns["grad_norm"].tolist() == [1.023] * 2
    assert log.columns["seconds"].tolist() == [0.1] * 2 and log.columns["lr"].tolist() == [1e-4] * 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("iter 1: loss 2,891, time 3,785ms\n", "'2,891', which may be 2.891 or 2891; write decimal points"),
        ("iter 1: loss 2,8917, time 3.785ms\n", "'2,8917' and '3.785': what its commas are cannot be told"),
    ],
)
def test_commas_that_cannot_be_told_are_refused(tmp_path, text, words):
    with pytest.raises(UsageError, match=words):
        read(tmp_path, text)


def test_thousands_in_steps_and_numbers_are_read(tmp_path):
    log = read(tmp_path, line(1, "2.5", "1,250.5").replace(f"{1:8d}/  100000", "1,000/ 100,000").replace("100.0", "1,100.0"))
    assert (log.steps.tolist(), log.columns["grad_norm"].tolist(), log.columns["seconds"].tolist()) == ([1000], [1250.5], [1.1])


@pytest.mark.parametrize("nan", ["-nan(ind)", "1.#QNAN", "-1.#IND00", "NaN", "-nan"])
def test_a_loss_that_is_not_finite_is_seen_however_it_is_spelled(tmp_path, nan):
    log = read(tmp_path, line(1, "2.5") + line(2, nan, "1.#INF") + line(3, "1.#INF"))
    np.testing.assert_equal(log.columns["loss"], [2.5, np.nan, np.inf])
    assert log.columns["grad_norm"].tolist() == [0.5, np.inf, 0.5]


def test_lines_without_a_loss_that_is_a_number_are_counted(tmp_path):
    log = read(tmp_path, line(1, "2.5") + line(2, "lost") + line(3, "2.25"))
    assert log.steps.tolist() == [1, 3]
    assert log.notes == (f"{tmp_path / 'train.log'}: 1 of 3 steps are left out: their lines have no loss that is a number",)
