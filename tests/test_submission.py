"""What of a notebook runs when it is judged, and every file that cannot be judged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmcourse import submission
from llmcourse.submission import Cell, UnreadableNotebook

EXERCISE = '''from __future__ import annotations

from torch import Tensor

from llmcourse.exercise import case, exercise, mistake


@exercise(points=2, minutes=5)
def {name}(weight: Tensor) -> Tensor:
    """Largest magnitude of each row of weight [out, in]: [out], same dtype."""
    ### BEGIN SOLUTION
    return weight.abs().amax(dim=1)
    ### END SOLUTION


@case({name})
def one_loud_row(answer, rng):
    """A loud row must not touch its neighbours."""
    weight = rng.normal(4, 6)
    weight[rng.integer(0, 3)] *= 100
    return {{"scale": answer(weight)}}


@mistake({name}, "One scale serves every row.")
def per_tensor(weight):
    return weight.abs().max().expand(weight.shape[0])
'''


@pytest.fixture
def lesson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lesson of two exercises outside the package; returns a folder for notebooks."""
    folder = tmp_path / "lessons" / "demo_lesson"
    folder.mkdir(parents=True)
    for name in ("scale_rows", "scale_again"):
        (folder / f"{name}.py").write_text(EXERCISE.format(name=name), encoding="utf-8")
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(tmp_path / "lessons"))
    return tmp_path


def cell(text: str | list[str], grade_id: str | None = None, kind: str = "code") -> dict[str, Any]:
    metadata = {"nbgrader": {"grade_id": grade_id, "solution": True}} if grade_id else {}
    return {"cell_type": kind, "source": text, "metadata": metadata, "outputs": []}


def write(folder: Path, cells: list[Any], name: str = "demo_lesson.ipynb", **changes: Any) -> Path:
    path = folder / name
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells} | changes
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


ANSWER = "def scale_rows(weight):\n    return weight.abs().amax(dim=1)"


def test_imports_definitions_and_literal_constants_are_carried_and_nothing_else() -> None:
    text = "import os; print(1)\nK = [1, None]\nM = compute()\n@decorated\ndef f():\n    return K\nprint(f())"
    found, notes = submission.carried(Cell("cell 1", text, None, False))
    assert found.split("\n") == [
        "import os",
        "K = [1, None]",
        "",
        "@decorated",
        "def f():",
        "    return K",
        "",
    ]
    assert notes == []


def test_a_definition_after_a_semicolon_keeps_its_own_text_only() -> None:
    found, _ = submission.carried(Cell("cell 1", "print('é'); K = 3; print(2)\n", None, False))
    assert found.strip() == "K = 3"


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("%matplotlib inline", "pass"),
        ("  !ls", "  pass"),
        ("files = !ls", "pass"),
        ("torch.chunk?", "pass"),
        ("x = 7 % 3", "x = 7 % 3"),
        ("assert x != 3", "assert x != 3"),
    ],
)
def test_magics_become_pass_on_their_own_line(line: str, left: str) -> None:
    found, dropped = submission.without_magics(f"if True:\n    y = 1\n{line}\nz = 2")
    assert found.splitlines()[2] == left
    assert dropped == ([line.strip()] if "pass" in left else [])


def test_a_percent_line_inside_a_string_is_no_magic() -> None:
    text = 'TEMPLATE = """\n%d rows\n!important\n"""\n'
    assert submission.without_magics(text) == (text.rstrip("\n"), [])


def test_a_cell_of_another_language_is_dropped_and_a_timed_cell_is_kept() -> None:
    assert submission.without_magics("%%bash\nrm -rf x") == ("", ["%%bash"])
    assert submission.without_magics("%%time\nK = 1")[0] == "pass\nK = 1"


def test_an_exercise_cell_runs_whole_but_for_check_and_hint() -> None:
    text = f"{ANSWER}\nprint(1)\ncheck(scale_rows)\nhint(\n    scale_rows)\n"
    found, _ = submission.whole(Cell("cell 1", text, "scale_rows", True))
    assert found.splitlines() == [*ANSWER.splitlines(), "print(1)", "", ""]


def test_a_helper_an_import_and_a_constant_of_the_learners_own_come_along(lesson: Path) -> None:
    own = "import math\nBASE = 2\ndef helper(x):\n    return x.abs()"
    found = submission.read(
        write(lesson, [cell(own), cell(ANSWER, "scale_rows"), cell("text", kind="markdown")])
    )
    assert [label for label, _ in found.parts] == ["cell 1", "cell 2"]
    assert found.parts[0][1] == own
    assert found.names == ("scale_again", "scale_rows")
    assert found.own == {"scale_rows": "cell 2"}


def test_a_cell_that_is_not_python_is_left_out_and_named(lesson: Path) -> None:
    found = submission.read(write(lesson, [cell("def ("), cell(ANSWER, "scale_rows")]))
    assert [label for label, _ in found.parts] == ["cell 2"]
    assert any("cell 1 is not valid Python (line 1)" in note for note in found.notes)


@pytest.mark.parametrize("odd", ["x = '\ud800'", "x = 1\0", "(" * 5000])
def test_odd_text_in_a_cell_never_stops_the_reading(lesson: Path, odd: str) -> None:
    found = submission.read(write(lesson, [cell(odd), cell(ANSWER, "scale_rows")]))
    assert "scale_rows" in found.own


def test_two_cells_of_one_exercise_are_named_and_the_later_one_counts(lesson: Path) -> None:
    found = submission.read(write(lesson, [cell("x = 1", "scale_rows"), cell(ANSWER, "scale_rows")]))
    assert found.own["scale_rows"] == "cell 2"
    assert any("both the cell of scale_rows" in note for note in found.notes)


STUB = 'def scale_rows(weight: Tensor) -> Tensor:\n    """An older statement."""\n    raise NotImplementedError\n'


def test_a_later_cell_that_is_not_written_yet_does_not_replace_an_answer(lesson: Path) -> None:
    found = submission.read(
        write(lesson, [cell(ANSWER, "scale_rows"), cell(f"{STUB}\ncheck(scale_rows)", "scale_rows")])
    )
    assert found.own == {"scale_rows": "cell 1"} and found.parts == (("cell 1", ANSWER),)
    assert [note for note in found.notes if "both the cell of scale_rows" in note] == [
        "cell 1 and cell 2 are both the cell of scale_rows; cell 2 is not written yet, so cell 1 counts"
    ]


@pytest.mark.parametrize("more", ["def helper():\n    pass\n", "scale_rows = 3\n"])
def test_a_later_cell_with_anything_beside_the_statement_counts(lesson: Path, more: str) -> None:
    found = submission.read(write(lesson, [cell(ANSWER, "scale_rows"), cell(STUB + more, "scale_rows")]))
    assert found.own == {"scale_rows": "cell 2"}


def test_a_part_that_is_left_out_stays_for_its_own_exercise(lesson: Path) -> None:
    found = submission.read(write(lesson, [cell("x = 1", "scale_again"), cell(ANSWER, "scale_rows")]))
    left_out = {"cell 1": "it ran for more than 10 s"}
    assert [label for label, _ in found.answer("scale_rows", without=left_out).parts] == ["cell 2"]
    assert [label for label, _ in found.answer("scale_again", without=left_out).parts] == ["cell 1", "cell 2"]


def test_an_answer_whose_cell_lost_its_metadata_is_still_carried(lesson: Path) -> None:
    found = submission.read(write(lesson, [cell(ANSWER)]))
    assert found.parts == (("cell 1", ANSWER),)
    assert any("the cell of scale_rows is gone" in note for note in found.notes)


def test_check_cells_and_forged_points_are_not_believed(lesson: Path) -> None:
    forged = cell("check(scale_rows)", "check_scale_rows")
    forged["metadata"]["nbgrader"] |= {"points": 99, "locked": False}
    found = submission.read(write(lesson, [cell(ANSWER, "scale_rows"), forged]))
    assert [label for label, _ in found.parts] == ["cell 1"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"not json", "expected a notebook in JSON"),
        (b"\xff\xfe\x00", "expected a notebook in JSON"),
        (b"[" * 100_000, "expected a notebook in JSON"),
        (b"[]", "expected a notebook, found JSON of another kind (list)"),
        (b'{"nbformat": 3, "worksheets": []}', "expected notebook format 4, found 3"),
        (b"{}", "expected notebook format 4, found None"),
        (b'{"nbformat": 4}', "expected a list of cells"),
        (b'{"nbformat": 4, "cells": [7]}', "cell 1 is not a cell but int"),
        (b'{"nbformat": 4, "cells": [{"cell_type": "code", "source": 7}]}', "cell 1 has no text"),
        (b'{"nbformat": 4, "cells": []}', "found no exercise in it"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_no_notebook_of_the_course_is_refused_in_one_line(
    lesson: Path, content: bytes, expected: str
) -> None:
    path = lesson / "work.ipynb"
    path.write_bytes(content)
    with pytest.raises(UnreadableNotebook) as refused:
        submission.read(path)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_files_folders_pipes_and_huge_files_are_refused(
    lesson: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnreadableNotebook, match="there is no such file"):
        submission.read(lesson / "none.ipynb")
    with pytest.raises(UnreadableNotebook, match="not a plain file"):
        submission.read(lesson)
    os.mkfifo(lesson / "pipe.ipynb")
    with pytest.raises(UnreadableNotebook, match="not a plain file"):
        submission.read(lesson / "pipe.ipynb")
    monkeypatch.setattr(submission, "MAX_BYTES", 10)
    with pytest.raises(UnreadableNotebook, match="clear the outputs"):
        submission.read(write(lesson, [cell(ANSWER, "scale_rows")]))


def test_cells_without_metadata_or_with_odd_metadata_are_read(lesson: Path) -> None:
    bare = {"cell_type": "code", "source": ["K = 1\n", "J = 2"]}
    odd = {"cell_type": "code", "source": ANSWER, "metadata": {"nbgrader": ["?"]}}
    assert [text for _, text in submission.read(write(lesson, [bare, odd])).parts] == ["K = 1\nJ = 2", ANSWER]


def test_names_the_rule_carries_from_a_history() -> None:
    assert submission.carried_names(
        ["import torch as t", "x = f()", "y = 3", "def g(): pass", "%ls", "def ("]
    ) == {"t", "y", "g"}
