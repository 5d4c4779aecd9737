"""Numbers spelled in other ways are read rightly, and what is left out of a table is named with its count and the reason."""

import json
import math

import numpy as np
import pytest

from tools.common.console import UsageError
from tools.common.logs.cells import number_of, step_of
from tools.common.logs.reader import read_log

NUMBERS = {
    "2.5": 2.5,
    " 1e-3 ": 1e-3,
    "1,000": 1000.0,
    "1,234,567.5": 1234567.5,
    "1 000": 1000.0,
    "12\u202f000": 12000.0,
    "-nan(ind)": math.nan,
    "nan(snan)": math.nan,
    "1.#QNAN": math.nan,
    "-1.#IND00": math.nan,
    "1.#INF": math.inf,
    "-1.#INF": -math.inf,
    "\u221e": math.inf,
    "Infinity": math.inf,
    "0,5": None,
    "abc": None,
    "N/A": None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_read_however_it_is_spelled(text):
    np.testing.assert_equal(number_of(text), NUMBERS[text])


def test_a_comma_is_a_decimal_point_where_the_column_says_so():
    assert number_of("2,891", decimal_comma=True) == 2.891 and number_of("2,891790E+00", decimal_comma=True) == 2.89179
    assert step_of("1,000") == 1000 and step_of("0,1") == 0.1 and math.isnan(step_of("0.1M"))


READ = {
    "thousands in steps": ('step,loss\n"900",3.5\n"1,000",3.25\n', [900, 1000], [3.5, 3.25]),
    "thousands by blanks": ("step;loss\n900;3.5\n1 000;3.25\n", [900, 1000], [3.5, 3.25]),
    "thousands in losses": ('step,loss\n1,"1,250.5"\n2,"1,000"\n', [1, 2], [1250.5, 1000]),
    "decimal commas": ("step;loss;grad_norm\n1;3,5000;1,023\n2;3,2500;1,100\n", [1, 2], [3.5, 3.25]),
    "decimal commas below one": ("step;loss\n1;0,125\n2;0,250\n", [1, 2], [0.125, 0.25]),
    "decimal commas in JSON": ('{"step": 1, "loss": "3,5"}\n{"step": 2, "loss": "3,25"}\n', [1, 2], [3.5, 3.25]),
    "empty last cells": ("step,loss\n1,3.5,\n2,,\n3,3.25,\n", [1, 3], [3.5, 3.25]),
    "another compiler's NaN": ("step,loss\n1,3.5\n2,1.#QNAN\n3,-nan(ind)\n", [1, 2, 3], [3.5, math.nan, math.nan]),
    "steps among fractions": ("step,iteration,loss\n0.1,1,3.5\n0.2,2,3.25\n", [1, 2], [3.5, 3.25]),
}


@pytest.mark.parametrize("name", READ)
def test_a_table_with_other_spellings_is_read_whole(tmp_path, name):
    text, steps, losses = READ[name]
    path = tmp_path / "log.csv"
    path.write_text(text, encoding="utf-8")
    log = read_log(path)
    assert (log.steps.tolist(), log.notes) == (steps, ())
    np.testing.assert_equal(log.columns["loss"], losses)


LEFT_OUT = {
    "a fraction": ("step,loss\n1,3.5\n1.5,9\n2,3.25\n", "1 rows with a loss are left out: their step is a fraction"),
    "no step": ("step,loss\n1,3.5\n,9\n2,3.25\n", "1 rows with a loss are left out: they have no step"),
    "beyond": ("step,loss\n1,3.5\n1e300,9\n2,3.25\n", "their step is beyond 1125899906842624, the first 1e+300"),
    "text": ("step,loss\n1,3.5\n9,lost\n2,3.25\n", "1 of 3 rows have a loss that is no number, the first 'lost'"),
    "a list": ('{"step": 1, "loss": 3.5}\n{"step": 9, "loss": [1]}\n{"step": 2, "loss": 3.25}\n', "the first '[1]'"),
    "cells": ("step,loss\n1,3.5\n# restarted\n2,3.25\n", "1 of 3 rows are left out: they do not have the header's 2 cells"),
    "a comma": ("step,loss\n1,3.5\n2,3.25\n1,000,9.5\n", "the first is row 3, '1,000,9.5' with 3; put numbers with a comma in"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_rows_that_are_left_out_are_named(tmp_path, name):
    text, note = LEFT_OUT[name]
    path = tmp_path / "log.csv"
    path.write_text(text)
    log = read_log(path)
    assert (log.steps.tolist(), log.columns["loss"].tolist()) == ([1, 2], [3.5, 3.25])
    assert any(note in line for line in log.notes) and all(line.startswith(str(path)) for line in log.notes)


REFUSED = {
    "fractions": ("step,loss\n" + "".join(f"{i / 10},2\n" for i in range(1, 31)), r"fractions \(0.1, 0.2, 0.3\): epochs"),
    "units": ("step,loss\n0.1M,2\n0.2M,2\n", "without any step that has a loss .*the first '0.1M'"),
    "commas not in quotes": ("step,loss\n1,9,8712\n2,9,7\n", "row 1, '1,9,8712' with 3; put numbers with a comma in quotes"),
    "either": ("step;loss\n1;2,891\n2;2,790\n", "'2,891', which may be 2.891 or 2891; write decimal points"),
    "both": ("step;loss\n1;2,8\n2;2.7\n", "'2,8' and '2.7': what its commas are cannot be told"),
    "either in JSON": (json.dumps([{"step": 1, "loss": "2,891"}]), "may be 2.891 or 2891"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_with_the_cure(tmp_path, name):
    text, words = REFUSED[name]
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as error:
        read_log(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
