"""`check`, `hint` and `check_notebook` as a learner meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcourse import checking, engine, jail, report
from llmcourse.submission import UnreadableNotebook
from llmcourse.zygote import Zygote

from .test_submission import ANSWER, EXERCISE, cell, lesson, write

__all__ = ["lesson"]

USES = EXERCISE.replace(
    "from llmcourse.exercise import", "from {other} import scale_rows\nfrom llmcourse.exercise import"
)


def scale_rows(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().amax(dim=1)


def named(function: Any, name: str = "scale_rows") -> Any:
    function.__name__ = name
    return function


def test_a_right_answer_earns_its_points_as_a_number(
    lesson: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score = checking.check(scale_rows)
    assert (float(score), repr(score), score.verdict.verdict) == (2.0, "2.0", "right")
    assert "scale_rows: right, 2 of 2 points" in capsys.readouterr().out


def wrong(body: str) -> Any:
    space: dict[str, Any] = {"torch": torch}
    exec(f"def scale_rows(weight):\n    {body}", space)
    return space["scale_rows"]


@pytest.mark.parametrize(
    ("body", "verdict", "words"),
    [
        ("return weight.abs().max().expand(4)", "wrong", "One scale serves every row."),
        ("raise NotImplementedError", "not attempted", "not written yet"),
        ("raise ValueError('odd')", "wrong", "your answer raised ValueError: odd (line 2 of your cell)"),
        ("return weight.abs().amax(dim=1).double()", "wrong", "expected float32 [4], found float64 [4]"),
        ("return weight.abs().amax(dim=1).to('meta')", "wrong", "found a float32 tensor on meta"),
        (
            "return weight.abs().amax(dim=1) * float('nan')",
            "wrong",
            "4 are NaN or infinite where the answer is finite",
        ),
        (
            "return weight.abs().amax(dim=1, keepdim=True)",
            "wrong",
            "expected float32 [4], found float32 [4, 1]",
        ),
        (
            "return weight.abs().amax(dim=1).tolist()",
            "wrong",
            "expected float32 [4], found a list of 4",
        ),
        ("return weight.abs_().amax(dim=1)", "wrong", "your answer changed its argument `weight`"),
        ("raise KeyboardInterrupt", "wrong", "interrupted while this case ran"),
    ],
)
def test_each_way_to_be_wrong_has_its_own_line(
    lesson: Path, capsys: pytest.CaptureFixture[str], body: str, verdict: str, words: str
) -> None:
    score = checking.check(wrong(body), seed=7)
    out = capsys.readouterr().out
    assert (float(score), score.verdict.verdict) == (0.0, verdict)
    assert words in out, out


def test_a_wrong_signature_is_shown_beside_the_expected_one(
    lesson: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checking.check(named(lambda w, bits: w))
    assert "expected parameters (weight), found (w, bits)" in capsys.readouterr().out


def test_what_is_no_exercise_is_refused_with_the_nearest_names(
    lesson: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert float(checking.check(named(lambda w: w, "scale_row"))) == 0.0
    assert "did you mean scale_rows" in capsys.readouterr().out
    checking.check(5)  # type: ignore[arg-type]
    assert "check takes the function or class itself; found int 5" in capsys.readouterr().out


def test_the_courses_own_answer_earns_nothing(lesson: Path) -> None:
    from llmcourse.exercise import find

    assert float(checking.check(find("scale_rows").reference)) == 0.0


def test_stderr_and_warnings_of_an_answer_go_into_the_report(
    lesson: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(weight: torch.Tensor) -> torch.Tensor:
        print("careful", file=sys.stderr)
        return scale_rows(weight)

    checking.check(named(noisy))
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "your answer wrote to stderr: careful" in captured.out


def test_a_check_leaves_torch_and_its_random_state_as_they_were(lesson: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        checking.check(scale_rows)
        assert torch.get_default_dtype() == torch.float64
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_same_seed_repeats_the_same_report(lesson: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for seed in (5, 5, 6):
        checking.check(wrong("return weight.amax(dim=1)"), seed=seed)
        reports.append(capsys.readouterr().out)
    assert reports[0] == reports[1] != reports[2]


def test_a_name_that_would_not_be_carried_is_warned_of(
    lesson: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = sys.modules["__main__"]
    monkeypatch.setattr(
        main, "In", ["", "factor = torch.ones(1)", "def helper(w):\n    return w"], raising=False
    )
    for name in ("factor", "helper"):
        monkeypatch.setattr(main, name, 1, raising=False)
    checking.check(wrong("return helper(weight) * factor"))
    out = capsys.readouterr().out
    assert "uses `factor`, which will not exist" in out
    assert "uses `helper`" not in out


def test_hints_unfold_one_at_a_time(lesson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcourse.exercise import find

    monkeypatch.setattr(find("scale_rows"), "hints", ("the idea", "the line"))
    monkeypatch.setattr(checking, "_unfolded", {})
    assert checking.hint(scale_rows) == "1. the idea\n(1 more: run it again)"
    assert "2. the line\n(that was the last hint)" in checking.hint("scale_rows")


def test_the_html_report_escapes_what_an_answer_says(lesson: Path) -> None:
    score = checking.check(wrong("raise ValueError('<script>')"))
    assert "<script>" not in score._repr_html_()
    assert "data-verdict='wrong'" in score._repr_html_()


def test_text_and_html_say_the_same_cases(lesson: Path) -> None:
    verdict = checking.check(scale_rows).verdict
    for form in (report.text(verdict), report.html(verdict)):
        assert "A loud row must not touch its neighbours." in form


def test_a_notebook_is_judged_exercise_by_exercise_whatever_one_of_them_does(lesson: Path) -> None:
    path = write(
        lesson,
        [
            cell("import os\ndef scale_again(weight):\n    os._exit(0)", "scale_again"),
            cell(ANSWER, "scale_rows"),
        ],
    )
    found = {entry["name"]: entry for entry in checking.check_notebook(path, seed=1).to_json()["exercises"]}
    assert (found["scale_again"]["verdict"], found["scale_again"]["points"]) == ("crashed", 0.0)
    assert "exit status 0" in found["scale_again"]["reason"]
    assert (found["scale_rows"]["verdict"], found["scale_rows"]["points"]) == ("right", 2.0)


AGAIN = "def scale_again(weight):\n    return weight.abs().amax(dim=1)"
SPOILS = """import torch
def scale_again(weight):
    found = weight.abs().amax(dim=1)
    torch.Tensor.amax = lambda *_, **__: None
    return found
"""


LEAVES_A_THREAD = """import threading
def scale_again(weight):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    return weight.abs().amax(dim=1)
"""
LEAVES_A_PROCESS = """import os, time
def scale_again(weight):
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
    return weight.abs().amax(dim=1)
"""


@pytest.mark.parametrize(
    ("first", "second", "verdicts", "workers"),
    [
        (LEAVES_A_THREAD, ANSWER, ["right", "right"], ["scale_again", "scale_rows"]),
        (LEAVES_A_PROCESS, ANSWER, ["right", "right"], ["scale_again", "scale_rows"]),
        (AGAIN, ANSWER, ["right", "right"], ["scale_again"]),
        (SPOILS, ANSWER, ["right", "right"], ["scale_again", "scale_rows"]),
        (
            AGAIN,
            "def scale_rows(weight):\n    return weight.abs().max().expand(weight.shape[0])",
            ["right", "wrong"],
            ["scale_again", "scale_rows"],
        ),
        (
            AGAIN,
            "def scale_rows(weight):\n    raise NotImplementedError",
            ["right", "not attempted"],
            ["scale_again"],
        ),
        (
            "import os\ndef scale_again(weight):\n    os._exit(0)",
            ANSWER,
            ["crashed", "right"],
            ["scale_again", "scale_rows"],
        ),
        ("x = 1", ANSWER, ["not attempted", "right"], ["scale_again", "scale_rows"]),
    ],
    ids=["a thread", "a process", "both right", "spoilt", "wrong", "a stub", "died", "missing"],
)
def test_what_is_not_right_in_company_is_judged_alone(
    lesson: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    second: str,
    verdicts: list[str],
    workers: list[str],
) -> None:
    started: list[str] = []
    begin = engine.WorkerProcess.__init__

    def noted(
        worker: engine.WorkerProcess, own: Any, exercise: Any, answer: Any, *rest: Any, **options: Any
    ) -> None:
        if not answer.trusted:
            started.append(answer.name)
        begin(worker, own, exercise, answer, *rest, **options)

    monkeypatch.setattr(engine.WorkerProcess, "__init__", noted)
    path = write(lesson, [cell(first, "scale_again"), cell(second, "scale_rows")])
    found = checking.check_notebook(path, seed=1).exercises
    assert [verdict.verdict for verdict in found] == verdicts
    assert started == workers
    assert found[1].verdict != "wrong" or found[1].mistakes


def test_a_cell_that_hangs_is_waited_for_once(lesson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LOAD_LIMIT_S", 1.5)
    stopped: list[tuple[str, bool]] = []
    load = engine.WorkerProcess.load

    def noted(worker: engine.WorkerProcess, cases: str) -> engine.Loaded:
        found = load(worker, cases)
        if not worker._answer.trusted:
            stopped.append((worker._answer.name, found.stopped is not None))
        return found

    monkeypatch.setattr(engine.WorkerProcess, "load", noted)
    hangs = "def scale_again(weight):\n    return weight.abs().amax(dim=1)\nwhile True: pass"
    path = write(lesson, [cell(hangs, "scale_again"), cell(ANSWER, "scale_rows")])
    found = checking.check_notebook(path, seed=1)
    assert [verdict.verdict for verdict in found.exercises] == ["timed out", "right"]
    assert stopped == [("scale_again", True), ("scale_rows", False)]
    assert found.notes[-1] == (
        "cell 1 was left out for every exercise but its own; while it ran: it ran for more than 2 s"
    )


def test_what_references_write_is_closed_to_a_notebook(lesson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writing(engine.Engine):
        """Holds a file, where references are run."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            if not self.closed:
                Path(self.folder, "expected").write_text("what is expected")
                paths.append(str(Path(self.folder, "expected")))

    paths: list[str] = []
    monkeypatch.setattr(checking, "Engine", Writing)
    looks = """
def scale_rows(weight):
    import glob, tempfile
    for path in glob.glob(f"{tempfile.gettempdir()}/../../llmcourse-engine-*/expected"):
        open(path).close()
    return weight.abs().amax(dim=1)
"""
    path, zygote = write(lesson, [cell(looks, "scale_rows")]), Zygote(in_jail=False)
    found = checking.check_notebook(path, seed=1, zygote=zygote).exercises[1]
    assert len(paths) == 1
    assert found.verdict == "wrong" and "closed to an answer that is judged" in found.reason


@pytest.mark.parametrize("in_jail", [True, False])
def test_a_notebook_verdict_says_how_answers_were_kept_apart(lesson: Path, in_jail: bool) -> None:
    path = write(lesson, [cell(ANSWER, "scale_rows")])
    if in_jail and jail.missing() is not None and not os.environ.get("LLMCOURSE_REQUIRE"):
        pytest.skip(str(jail.missing()))
    found = checking.check_notebook(path, seed=1, zygote=Zygote(in_jail=in_jail))
    told = "in a jail (bubblewrap)" if in_jail else "without a jail: it was not asked for"
    assert found.to_json()["judged"] == told and report.notebook_text(found).endswith(f", judged {told}")


def test_a_notebook_verdict_has_the_promised_json(lesson: Path) -> None:
    path = write(
        lesson, [cell("def scale_rows(weight):\n    return weight.abs().max().expand(4)", "scale_rows")]
    )
    verdict = checking.check_notebook(path, seed=1).to_json()
    assert json.loads(json.dumps(verdict)) == verdict
    assert {"notebook", "points", "max_points", "exercises"} <= set(verdict)
    again, rows = verdict["exercises"]
    assert {"name", "points", "max_points", "verdict", "reason", "mistake", "cases", "costs"} <= set(rows)
    assert (again["verdict"], "no `scale_again` was found; found scale_rows" in again["reason"]) == (
        "not attempted",
        True,
    )
    assert rows["mistake"] == "One scale serves every row."
    assert rows["cases"][0]["agrees"] is False


def test_a_cell_with_a_syntax_error_says_where(lesson: Path) -> None:
    path = write(lesson, [cell("def scale_rows(weight):\n    return (", "scale_rows")])
    rows = checking.check_notebook(path, seed=1).exercises[1]
    assert rows.verdict == "wrong"
    assert "SyntaxError" in rows.reason and "line 2" in rows.reason


def test_an_unreadable_notebook_is_refused(lesson: Path) -> None:
    (lesson / "x.ipynb").write_text("{")
    with pytest.raises(UnreadableNotebook):
        checking.check_notebook(lesson / "x.ipynb")


def test_a_seed_that_is_no_number_is_refused(lesson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCOURSE_SEED", "abc")
    with pytest.raises(ValueError, match="LLMCOURSE_SEED"):
        checking.check(scale_rows)


def test_checking_the_lessons_imports_neither_torchs_compiler_nor_its_symbols():
    """Each takes a second or more, in every worker that needs it."""
    code = """
import sys
from llmcourse.auditing import exercises_of
from llmcourse.judging import InProcess, expectations
for exercise in exercises_of(["parameter_loading"]):
    expectations(InProcess(), exercise, 1)
    print(exercise.name, sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
"""
    lines = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert lines.count("[]") == len(lines.splitlines()) >= 5, lines
