"""The search over releases, the judges' reading, and one release that trains wrongly, planted beside the installed one."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.version import Version

from tools.common.console import UsageError
from tools.replay import compare, release_judges, release_trial
from tools.replay import releases as module
from tools.replay.__main__ import main
from tools.replay.bisection import choose_judge
from tools.replay.compare import BITWISE
from tools.replay.release_cases import QUESTIONS
from tools.replay.release_judges import Judge, ask, bisect, gate, step, trials
from tools.replay.releases import DIFFERS, NO_RUN, RIGHT, WRONG, Answer, Answers, History, Turn, parse_range, search

RELEASES = tuple(f"0.{minor}.{patch}" for minor in (17, 18, 19) for patch in range(7))


def history_of(windows: dict[str, tuple[str, str]], *, everything: bool = False) -> History:
    """Search releases of which those from the first to the last of a question's window are wrong."""

    def answers(release: str) -> Answers:
        return {
            question: Answer(WRONG if Version(first) <= Version(release) <= Version(last) else RIGHT)
            for question, (first, last) in windows.items()
        }

    found = {release: answers(release) for release in RELEASES} if everything else search(RELEASES, answers)
    return History("thing", RELEASES, found, by_bits=False)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("window", "turns"),
    [
        (("0.18.3", "0.19.6"), [("0.18.2", "0.18.3")]),  # still wrong
        (("0.17.0", "0.17.0"), [("0.17.0", "0.17.1")]),
        (("0.18.3", "0.19.2"), [("0.18.2", "0.18.3"), ("0.19.2", "0.19.3")]),  # both ends right
        (("0.17.5", "0.17.5"), [("0.17.4", "0.17.5"), ("0.17.5", "0.17.6")]),  # one release alone
        (("1.0", "1.1"), []),
    ],
)
def test_a_window_is_found_to_the_release(window: tuple[str, str], turns: list, everything: bool) -> None:
    history = history_of({"q": window}, everything=everything)
    assert history.turns() == [Turn("q", before, after) for before, after in turns]
    assert history.is_clean == (not turns)
    if everything or not turns:  # that nothing changed anywhere is known only when everyone was asked
        assert history.asked == list(RELEASES)


@pytest.mark.parametrize(
    ("verdicts", "is_clean", "words"),
    [
        ((NO_RUN, NO_RUN), False, "no release could be asked: q (pip cannot install it)"),
        ((DIFFERS, DIFFERS), False, "no release of thing from 1.0 to 1.1 changed an answer"),
        ((BITWISE, BITWISE), True, "no release of thing from 1.0 to 1.1 changed an answer"),
        ((NO_RUN, RIGHT), False, "thing 1.1 changed it"),
    ],
)
def test_what_was_not_answered_or_differs_everywhere_is_no_success(verdicts, is_clean, words) -> None:
    assert DIFFERS == compare.DIFFERS
    answers = {
        release: {"q": Answer(verdict, "pip cannot install it" if verdict == NO_RUN else "")}
        for release, verdict in zip(("1.0", "1.1"), verdicts, strict=True)
    }
    history = History("thing", ("1.0", "1.1"), answers, by_bits=False)
    assert history.is_clean == is_clean and words in history.text()


@pytest.mark.parametrize(("number", "words"), [("3", "is no run directory: it has no recipe.json"), ("0", "steps count from 1")])
def test_a_step_that_cannot_be_computed_is_told_before_a_release_is_installed(
    tmp_path, monkeypatch, capsys, number, words
) -> None:
    monkeypatch.setattr("tools.replay.bisection.bisect", lambda *_, **__: pytest.fail("a release was asked"))
    words_given = [str(tmp_path), "--step", number, "--bisect", "deepspeed=0.18.2,0.19.8"]
    assert main(words_given) == 2 and words in capsys.readouterr().err


def test_few_are_asked_where_the_ends_differ() -> None:
    history = history_of({"q": ("0.18.3", "0.19.6")})
    assert len(history.asked) <= 7  # 2 ends, and the binary logarithm of 21
    assert "14 releases were not asked" in history.text()


def test_each_question_finds_its_own_window() -> None:
    windows = {"a": ("0.17.2", "0.18.1"), "b": ("0.18.2", "0.19.2"), "c": ("0.19.1", "0.19.6"), "d": ("0.17.0", "0.17.3")}
    history = history_of(windows)
    assert {(turn.question, turn.after) for turn in history.turns()} == {
        ("a", "0.17.2"), ("a", "0.18.2"), ("b", "0.18.2"), ("b", "0.19.3"), ("c", "0.19.1"), ("d", "0.17.4"),
    }  # fmt: skip
    assert re.search(r"^c: thing 0\.19\.1 changed it, 0\.19\.0 did not have it: right -> wrong", history.text(), re.MULTILINE)


def test_bits_change_where_verdicts_do_not() -> None:
    def answers(release: str) -> Answers:
        return {"q": Answer(RIGHT, "", "old" if Version(release) < Version("0.18.5") else "new")}

    def turns(by_bits: bool) -> list[Turn]:
        return History("thing", RELEASES, search(RELEASES, answers, by_bits=by_bits), by_bits).turns()

    assert turns(by_bits=False) == []
    assert turns(by_bits=True) == [Turn("q", "0.18.4", "0.18.5")]


def test_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "deepspeed (0.19.8)\nAvailable versions: 0.19.8, 0.19.3, 0.19.10, 0.19.2rc1, 0.18.2, 0.17.6\n  INSTALLED: 0.19.8"
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listed, stderr=""))
    assert parse_range("deepspeed=0.18.2..0.19.10") == ("deepspeed", ["0.18.2", "0.19.3", "0.19.8", "0.19.10"])
    assert parse_range("x=1.0,1.2,1.10") == ("x", ["1.0", "1.2", "1.10"])
    with pytest.raises(UsageError, match=r"pip knows no release 0\.18\.1 of deepspeed"):
        parse_range("deepspeed=0.18.1..0.19.8")
    for text in ("deepspeed", "deepspeed=0.19.8", "deepspeed=0.19.8..0.18.2", "=0.1..0.2", "deepspeed=a..b", "x=1.0,1.0"):
        with pytest.raises(UsageError, match=re.escape(f"--bisect {text}: ")):
            parse_range(text)
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="", stderr="ERROR: no network"))
    with pytest.raises(UsageError, match=r"cannot list the releases of deepspeed \(ERROR: no network\)"):
        parse_range("deepspeed=0.18.2..0.19.8")


def test_judges_read_what_the_tools_print() -> None:
    row = {"what": "gradient, fp32", "where": "lm_head.weight", "difference": 0.5, "bound": 1e-6}
    judge = gate(Path("recipes/quickstart.py"), "pipeline=2")
    assert "--any-release" in judge.command
    assert judge.read(json.dumps({"rows": [row | {"difference": 0.0}]}))["gate"].verdict == RIGHT
    found = judge.read(json.dumps({"rows": [row, row | {"what": "loss", "difference": 0.0}]}))["gate"]
    assert (found.verdict, found.words) == (WRONG, "gradient, fp32 of lm_head.weight is off by 5.0e-01, allowed 1.0e-06")
    replayed = {"verdict": "differs", "first": {"quantity": "grad_norm", "step": 3}, "replayed": {"loss": 1.0}}
    assert step(Path("RUN"), 3, None).read(json.dumps(replayed))["step"].words == "grad_norm of step 3 differs first"
    cases = [{"case": "a", "verdict": RIGHT}, {"case": "b", "verdict": WRONG}]
    answers = {"zero2": {"verdict": RIGHT, "words": "w", "digest": "d", "cases": cases}}
    assert trials(["zero2"]).read(json.dumps({"deepspeed": "1", "answers": answers})) == {
        "zero2": Answer(RIGHT, "w", "d", ("b",))
    }


def test_the_subject_chooses_the_judge(tmp_path: Path) -> None:
    recipe = tmp_path / "r.py"
    recipe.touch()
    assert choose_judge(None, None, None, "zero2,pipeline").questions == ("zero2", "pipeline")
    assert choose_judge(recipe, None, "pipeline=2", None).command[:4] == ("tools.verify", str(recipe), "--layout", "pipeline=2")
    assert choose_judge(tmp_path, 7, None, None).command == ("tools.replay", str(tmp_path), "--step", "7", "--json")
    for arguments, message in {
        (None, None, None, "zero3"): "there is no question zero3; there are zero2, pipeline",
        (None, 7, None, None): "--step belongs to a run",
        (recipe, 7, None, None): "is a recipe, which has no steps yet",
        (tmp_path, None, None, None): "--step N is missing",
        (recipe, None, None, "zero2"): "--ask chooses among DeepSpeed's trials",
    }.items():
        with pytest.raises(UsageError, match=re.escape(message)):
            choose_judge(*arguments)


def test_one_fault_in_anothers_place_is_a_change() -> None:
    def answers(release: str) -> Answers:
        return {"q": Answer(WRONG, "", "", ("a",) if Version(release) < Version("0.18.5") else ("a", "b"))}

    history = History("thing", RELEASES, search(RELEASES, answers), by_bits=False)
    assert history.turns() == [Turn("q", "0.18.4", "0.18.5")]
    assert "wrong in other cases" in history.text()


def test_what_prints_no_answer_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "deepspeed-1.0").mkdir()
    answer = ask("deepspeed", "1.0", Judge(("q",), ("no_such_module",), json.loads), tmp_path)["q"]
    assert answer.verdict == NO_RUN
    assert "no_such_module" in answer.words


def plant_repeated_scaling(folder: Path) -> None:
    """Write a copy of the installed DeepSpeed whose pipeline stages each divide by the accumulation, as 0.18.3 did."""
    installed = Path(find_spec("deepspeed").submodule_search_locations[0])
    shutil.copytree(installed, folder / "deepspeed", copy_function=os.symlink)
    engine = folder / "deepspeed" / "runtime" / "pipe" / "engine.py"
    for compiled in (engine.parent / "__pycache__").glob("engine.*"):
        compiled.unlink()
    text = engine.read_text()
    engine.unlink()
    engine.write_text(f"{text}\n\nPipelineEngine._backward_prologue_per_tensor = DeepSpeedEngine._backward_prologue_per_tensor\n")


def answer_here(questions: tuple[str, ...]) -> Answers:
    """Ask the installed release, which this process has imported."""
    answers = {question: asdict(release_trial.ask(question)) for question in questions}
    return trials(questions).read(json.dumps({"deepspeed": "installed", "answers": answers}))


# cases of each question that the installed release is asked here, of each kind one; the planted one is asked all
ASKED_HERE = {"zero2": (1,), "pipeline": (2, 3), "last_micro_batch": (1,), "reused_submodule": (1, 2)}


def test_a_planted_release_is_found_and_the_installed_one_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_repeated_scaling(tmp_path / "deepspeed-1.1")
    for question, cases in ASKED_HERE.items():
        monkeypatch.setitem(QUESTIONS, question, tuple(QUESTIONS[question][case] for case in cases))

    def ask_either(package: str, release: str, judge: Judge, within: Path | None) -> Answers:
        return answer_here(judge.questions) if release == "1.0" else ask(package, release, judge, within)

    monkeypatch.setattr(release_judges, "ask", ask_either)
    history = bisect("deepspeed", ["1.0", "1.1"], trials(["pipeline"]), within=tmp_path)
    assert history.turns() == [Turn("pipeline", "1.0", "1.1")], history.text()
    others = answer_here(tuple(name for name in QUESTIONS if name != "pipeline"))
    assert {answer.verdict for answer in others.values()} == {RIGHT} and len(others) == 3, others
    wrong = history.answers["1.1"]["pipeline"]
    # each stage but the last divides by the accumulation of 2 again
    assert re.match(r"SGD, accumulation 2: .* is off by 75\.0% of its way, which is 0\.25 times the right one$", wrong.words), (
        wrong
    )
    assert wrong.wrong_in == ("SGD, accumulation 2", "AdamW, clipped, accumulation 4", "bf16, SGD, accumulation 2")
