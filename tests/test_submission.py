"""What of a notebook runs when it is judged, and every file that cannot be judged."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcourse import submission, workspace
from llmcourse.submission import Cell, Submission, TeacherNotebook, UnreadableNotebook

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
        (b'{"nbformat": 4, "cells": {"0": 1}}', "expected a list of cells"),
        ("{}".encode("utf-16"), "it is UTF-16; open it in JupyterLab and save it as UTF-8"),
        (b'{"nbformat": 4, \0}', "expected a notebook in JSON"),
        (b'{"nbformat": ' + b"9" * 5000 + b"}", "expected a notebook in JSON"),
        (b'{"nbformat": ' + b"9" * 4000 + b"}", "found 99999999999999999999…;"),
        (b'{"nbformat": ' + b"[" * 300 + b"]" * 300 + b"}", "expected notebook format 4, found a list"),
        (b'{"nbformat": NaN}', "expected notebook format 4, found nan"),
        (b'{"nbformat": "\\ud800\\u001b"}', "found '\\ud800\\x1b'"),
        (b'{"nbformat": 4, "cells": [' + b"{}," * 5_000 + b"{}]}", "5,001 cells; at most 5,000"),
        (b"[" + b"[]," * 1_000_000 + b"[]]", "more than 1,000,000 lists and objects"),
        (
            b'{"nbformat": 4, "cells": [{"cell_type": "code", "source": ["a", 7]}]}',
            "cell 1 has no text but list",
        ),
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


def test_statements_that_share_a_line_are_all_carried() -> None:
    text = 'import os; import sys; print(1); K = """a\n  b"""; J = 2\nL = 3'
    found, _ = submission.carried(Cell("cell 1", text, None, False))
    assert found == 'import os; import sys; K = """a\n  b"""; J = 2\nL = 3'


@pytest.mark.parametrize("odd", ["\x0c", "\x85", "\u2028", "\x1c"], ids=ascii)
def test_what_is_no_line_end_in_python_does_not_cut_a_string(odd: str) -> None:
    text = f"K = 'a{odd}b'\n%ls\nJ = 2"
    assert submission.without_magics(text) == (f"K = 'a{odd}b'\npass\nJ = 2", ["%ls"])
    found, _ = submission.carried(Cell("cell 1", text, None, False))
    assert found == f"K = 'a{odd}b'\n\nJ = 2"


def test_a_literal_that_cannot_be_computed_is_not_carried(lesson: Path) -> None:
    huge = f"K = 0x{'f' * 1000} + 1j"
    assert submission.carried(Cell("cell 1", huge, None, False)) == ("", [])


# -------------------------------------------------------------------------------------------- the teacher's version


def teachers(folder: Path) -> TeacherNotebook:
    """Two exercises in an order of the teacher's own, a question a person grades, and a locked cell."""
    imports = cell("import math\nprint(math.pi)")
    setup = cell("def given(x):\n    return x", "setup")
    setup["metadata"]["nbgrader"] |= {"solution": False, "locked": True}
    check = cell("check(scale_rows)", "check_scale_rows")
    check["metadata"]["nbgrader"] |= {"solution": False, "locked": True, "grade": True, "points": 2}
    why = cell("Why?", "why", "markdown")
    why["metadata"]["nbgrader"] |= {"grade": True, "points": 5}
    statement = cell(STUB, "scale_rows")
    path = write(
        folder, [imports, setup, statement, check, cell("x = 1", "scale_again"), why], "teacher.ipynb"
    )
    return TeacherNotebook.from_path(path)


def read_with(teacher: TeacherNotebook, cells: list[Any], **changes: Any) -> Submission:
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells} | changes
    return submission.read_bytes(json.dumps(notebook).encode(), Path("demo.ipynb"), teacher)


def test_the_teachers_notebook_gives_exercises_imports_and_cells_of_other_kinds(lesson: Path) -> None:
    found = teachers(lesson)
    assert found.names == ("scale_rows", "scale_again")
    assert found.imports == "import math\n"
    assert found.manual == ("why",)
    assert found.locked == {"setup": "def given(x):\n    return x", "check_scale_rows": "check(scale_rows)"}


def test_a_teachers_notebook_that_is_none_is_refused_in_one_line(lesson: Path) -> None:
    with pytest.raises(UnreadableNotebook, match="there is no such file"):
        TeacherNotebook.from_path(lesson / "none.ipynb")


def test_the_teacher_says_what_the_exercises_are_and_not_the_students_cells(lesson: Path) -> None:
    teacher = TeacherNotebook(("scale_again",), "import torch")
    found = read_with(teacher, [cell(ANSWER, "scale_rows"), cell("x = 1", "scale_rows_2")])
    assert found.names == ("scale_again",) and found.topic == "demo_lesson"
    assert found.own == {} and found.answers == {}
    assert found.parts[0] == ("the lesson's imports", "import torch")
    assert read_with(TeacherNotebook(()), []).topic == ""


def test_answers_are_as_written_and_helpers_name_the_exercise_that_follows(lesson: Path) -> None:
    answer = f"{ANSWER}\n%ls\ncheck(scale_rows)"
    found = read_with(
        teachers(lesson),
        [
            cell("import math\nprint(math.pi)"),  # the teacher's own, which the notebook has already
            cell("print(1)\nBASE = 2"),
            cell(answer, "scale_rows"),
            cell("def helper():\n    pass"),
            cell("print('nothing is carried of it')"),
            cell("Because.", "why", "markdown"),
        ],
    )
    assert found.answers == {"scale_rows": answer, "why": "Because."}
    assert found.helpers == (("cell 2", "BASE = 2", "scale_rows"), ("cell 4", "def helper():\n    pass", ""))
    assert [label for label, _ in found.parts] == [
        *("the lesson's imports", "the lesson's cell setup", "cell 1", "cell 2", "cell 4", "cell 3"),
    ]


def test_an_edited_locked_cell_counts_as_the_teacher_wrote_it(lesson: Path) -> None:
    edited = cell("def given(x):\n    return 7", "setup")
    forged = cell("def scale_rows(weight):\n    return 7", "check_scale_rows")
    found = read_with(teachers(lesson), [edited, cell(ANSWER, "scale_rows"), forged])
    assert ("the lesson's cell setup", "def given(x):\n    return x") in found.parts
    assert not any("return 7" in text for _, text in found.parts)
    assert [note for note in found.notes if "is a locked cell and was edited" in note] == [
        "cell 1: setup is a locked cell and was edited; the teacher's version counts",
        "cell 3: check_scale_rows is a locked cell and was edited; the teacher's version counts",
    ]


def test_deleted_check_cells_change_nothing_and_a_deleted_answer_is_named(lesson: Path) -> None:
    found = read_with(teachers(lesson), [cell(ANSWER, "scale_rows")])
    assert found.notes == (
        "the cell of scale_again is gone; an answer of that name anywhere else counts",
        "the cell of why is gone",
    )


def test_what_a_file_says_of_itself_changes_nothing(lesson: Path) -> None:
    teacher = teachers(lesson)
    plain = [cell(ANSWER, "scale_rows"), cell("x = 1", "scale_again"), cell("Because.", "why", "markdown")]
    forged = copy.deepcopy(plain)
    for one in forged:
        one["metadata"]["nbgrader"] |= {
            "grade": True,
            "points": 99,
            "solution": False,
            "locked": True,
            "checksum": "0",
            "task": True,
            "schema_version": -1,
            "cell_type": "markdown",
        }
        one |= {
            "outputs": [{"output_type": "execute_result", "data": {"text/plain": "99.0"}}],
            "execution_count": {},
        }
    kernel = {"kernelspec": {"name": "malicious", "language": 7}, "language_info": None}
    assert read_with(teacher, forged, metadata=kernel) == read_with(teacher, plain)
    assert read_with(teacher, plain, metadata=[float("nan")]) == read_with(teacher, plain)


def test_an_answer_cell_that_is_no_code_cell_any_more_is_named_and_not_run(lesson: Path) -> None:
    found = read_with(teachers(lesson), [cell(ANSWER, "scale_rows", "markdown")])
    assert "cell 1: the cell of scale_rows is no code cell any more, and is not run" in found.notes
    assert "scale_rows" not in found.own and ANSWER not in dict(found.parts).values()


def test_of_two_texts_a_person_grades_the_later_one_that_is_not_empty_counts(lesson: Path) -> None:
    texts = ("First.", "Second.", " ")
    found = read_with(teachers(lesson), [cell(text, "why", "markdown") for text in texts])
    assert found.answers == {"why": "Second."}
    assert "cell 1 and cell 2 are both the cell of why; the later one counts" in found.notes


@pytest.mark.parametrize("odd", [7, None, ["why"], {"why": 1}, float("inf")], ids=str)
def test_odd_types_anywhere_but_in_a_code_cells_text_are_as_nothing(lesson: Path, odd: Any) -> None:
    cells = [
        {"cell_type": odd, "source": odd, "metadata": odd},
        {"cell_type": "markdown", "source": odd, "metadata": {"nbgrader": {"grade_id": odd}}},
        {"cell_type": "code", "source": "K = 1", "metadata": {"nbgrader": odd}, "outputs": odd},
        {"cell_type": "code", "source": "J = 1", "metadata": {"nbgrader": {"grade_id": odd}}},
        cell(ANSWER, "scale_rows"),
    ]
    found = read_with(teachers(lesson), cells, metadata=odd, nbformat_minor=odd)
    assert [text for _, text in found.parts[2:]] == ["K = 1", "J = 1", ANSWER]


def test_a_byte_order_mark_is_skipped_with_a_note(lesson: Path) -> None:
    raw = write(lesson, [cell(ANSWER, "scale_rows")]).read_bytes()
    plain, marked = (
        submission.read_bytes(start + raw, Path("demo.ipynb")) for start in (b"", b"\xef\xbb\xbf")
    )
    assert marked.parts == plain.parts
    assert marked.notes == ("the file starts with a byte-order mark, which was skipped", *plain.notes)


def test_of_a_key_that_comes_twice_the_last_counts(lesson: Path) -> None:
    raw = b'{"nbformat": 3, "nbformat": 4, "cells": 7, "cells": [{"cell_type": "code", "source": "", "source": "K=1"}]}'
    found = submission.read_bytes(raw, Path("demo.ipynb"), teachers(lesson))
    assert found.parts[-1] == ("cell 1", "K=1")


def assert_it_can_be_written(found: Submission) -> None:
    """Nothing holds what UTF-8, a notebook or a database cannot."""
    texts = [*found.notes, *found.answers.values(), *(text for part in found.parts for text in part)]
    texts += [text for helper in found.helpers for text in helper]
    for text in texts:
        text.encode("utf-8")
        assert "\0" not in text
    for note in found.notes:
        assert note.isprintable()


def test_what_is_no_text_is_replaced_and_noted(lesson: Path) -> None:
    own = "K = 'a\0b\ud800c'\n%ls \udfff\x1b[2J"
    answer = f"# \ud83d\n{ANSWER}"
    found = read_with(
        teachers(lesson),
        [cell(own, "\ud800"), cell(answer, "scale_rows"), cell("\0 Why", "why", "markdown")],
    )
    assert_it_can_be_written(found)
    assert ("cell 1", "K = 'a�b�c'\n") in found.parts
    assert found.answers == {"scale_rows": f"# �\n{ANSWER}", "why": "� Why"}
    assert [note[:6] for note in found.notes if "no text were replaced" in note] == [
        "cell 1",
        "cell 2",
        "cell 3",
    ]
    whole_emoji = json.loads(json.dumps("'😀'"))  # two escapes in the file, one character
    assert read_with(teachers(lesson), [cell(f"K = {whole_emoji}")]).parts[-1] == ("cell 1", "K = '😀'")


def test_a_cell_that_is_too_long_is_left_out_and_the_others_are_judged(lesson: Path) -> None:
    long = "x = 1\n" * 350_000
    found = read_with(
        teachers(lesson),
        [cell(long), cell(ANSWER, "scale_rows"), cell(long, "scale_again"), cell(long, "why", "markdown")],
    )
    assert found.own == {"scale_rows": "cell 2"}
    assert found.notes == (
        "cell 1 has over 200,000 characters and was left out",
        "cell 3 has over 200,000 characters and was left out",
    )
    assert found.answers["scale_again"].endswith("# ... and 1,900,000 characters more, left out here")
    assert len(found.answers["scale_again"]) < 200_100 and len(found.answers["why"]) < 200_100


def test_too_much_code_in_all_is_refused_and_text_is_not_counted(lesson: Path) -> None:
    many = [cell("# " + "x" * 190_000) for _ in range(6)]
    with pytest.raises(UnreadableNotebook, match="1,140,012 characters of code; at most 1,000,000"):
        read_with(teachers(lesson), many)
    for one in many:
        one["cell_type"] = "markdown"
    assert read_with(teachers(lesson), many).own == {}


def test_more_bytes_than_are_judged_are_refused_before_they_are_read(lesson: Path) -> None:
    with pytest.raises(UnreadableNotebook, match="more than 20,971,520 bytes"):
        submission.read_bytes(b" " * (submission.MAX_BYTES + 1), Path("demo.ipynb"))


def test_notes_without_end_are_cut(lesson: Path) -> None:
    found = read_with(teachers(lesson), [cell("%ls\n" * 1_000)])
    assert len(found.notes) == submission.MAX_NOTES + 1
    assert found.notes[-1] == "and 803 more notes like these"


def test_pythons_own_warnings_of_a_learners_text_are_not_shown(lesson: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_with(teachers(lesson), [cell("K = '\\d'"), cell("x = 1if 1else 2", "scale_rows")])
    assert caught == []


# ------------------------------------------------------------------------------------------------------ hostile text

HOSTILE = {
    "parentheses": "(" * 10_000,
    "closed parentheses": "(" * 10_000 + ")" * 10_000,
    "brackets": "x = " + "[" * 190 + "]" * 190,
    "unary minus": "x = " + "-" * 100_000 + "1",
    "not": "x = " + "not " * 40_000 + "1",
    "attributes": "a" + ".a" * 10_000,
    "calls": "a" + "()" * 6_000,
    "sums": "x = 1" + "+1" * 20_000,
    "sums that parse and cannot be written out": "x = 1" + "+1" * 2_500,
    "powers": "x = 1" + "**1" * 60_000,
    "comparisons": "x = 1" + "<1" * 5_000,
    "lambdas": "x = " + "lambda:" * 20_000 + "1",
    "conditions": "x = " + "1 if 1 else " * 15_000 + "1",
    "indents": "".join(f"{' ' * depth}if 1:\n" for depth in range(150)) + " " * 150 + "pass",
    "elif": "if 1:\n pass\n" + "elif 1:\n pass\n" * 10_000,
    "f-strings": """x = f'{f"{f'''{1}'''}"}'""" + "\ny = f'{" + "(" * 5_000 + "}'",
    "format specifications": "x = f'{x:" + "{x:" * 100 + "}" * 101 + "'",
    "a decimal number": "x = " + "9" * 190_000,
    "a hexadecimal number": "x = 0x" + "f" * 190_000,
    "loops of one comprehension": "x = [x" + " for x in y" * 4_000 + "]",
    "spaces before a word": " " * 190_000 + "x",
    "spaces in an assignment": "a" + " ," * 90_000 + "= x",
    "statements of one line": "%ls\n" + "a=1;" * 4_000,
    "long statements": "%ls\n" + ("x = (1" + "\n+1" * 900 + ")\n") * 8,
    "carriage returns": "x = 1\r" * 4_000,
}


def test_no_text_can_end_or_hold_up_the_process_that_reads_it(lesson: Path) -> None:
    program = """
import json, sys, time
from pathlib import Path
from llmcourse.submission import read_bytes
for label, text in json.load(sys.stdin).items():
    cells = [
        {"cell_type": "code", "source": text, "metadata": {"nbgrader": {"grade_id": name}}}
        for name in (None, "scale_rows", "scale_rows")
    ]
    raw = json.dumps({"nbformat": 4, "cells": cells}).encode()
    print(label, end=" ", flush=True)
    start = time.process_time()
    read_bytes(raw, Path("demo.ipynb"))
    print(f"{time.process_time() - start:.2f}", flush=True)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(HOSTILE),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ran.returncode, ran.stderr) == (0, ""), f"while reading: {ran.stdout.splitlines()[-1:]}"
    assert [line.rpartition(" ")[0] for line in ran.stdout.splitlines()] == list(HOSTILE)


# -------------------------------------------------------------------------------------------------------------- fuzz

LEAVES: list[Any] = [
    *(None, True, -1, 1e400, float("nan"), 10**4000, "", "\ud800", "\0", "check_affine_parameters", "code"),
    *("markdown", "affine_parameters", "((((", "def f(:", "\x1b[2J", "x" * 300_000),
    *([], {}, [[]], ["a", 1], {"nbgrader": {"grade_id": "affine_parameters"}}, {"": None}),
]


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON tree: (container, key)."""
    found: list[tuple[Any, Any]] = []
    queue = [tree]
    while queue:
        container = queue.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                queue.append(container[key])
    return found


def delete(places: list[tuple[Any, Any]], draw: random.Random) -> None:
    container, key = draw.choice(places)
    del container[key]


def duplicate(places: list[tuple[Any, Any]], draw: random.Random) -> None:
    container, key = draw.choice([(c, k) for c, k in places if isinstance(c, list)])
    container.insert(draw.randrange(len(container) + 1), copy.deepcopy(container[key]))


def retype(places: list[tuple[Any, Any]], draw: random.Random) -> None:
    container, key = draw.choice(places)
    container[key] = copy.deepcopy(draw.choice(LEAVES))


def swap(places: list[tuple[Any, Any]], draw: random.Random) -> None:
    (one, first), (other, second) = draw.choice(places), draw.choice(places)
    one[first], other[second] = copy.deepcopy(other[second]), copy.deepcopy(one[first])


def mutated_bytes(raw: bytes, draw: random.Random) -> bytes:
    content = bytearray(raw)
    for _ in range(draw.choice([1, 1, 3, 30])):
        start = draw.randrange(len(content))
        size = draw.choice([1, 1, 5, 2_000])
        content[start : start + size] = draw.choice(
            [
                b"",
                draw.randbytes(size),
                content[start : start + size] * 2,
                bytes(content[start : start + size]).swapcase(),
                draw.choice([b'"', b"\\", b"{", b"}", b"[", b"\\ud800", b"\\u0000", b"\0", b"\xef\xbb\xbf"]),
            ]
        )
        if not content:
            break
    return bytes(content)


CHANGES: list[Callable[[list[tuple[Any, Any]], random.Random], None]] = [delete, duplicate, retype, swap]


def test_a_mangled_notebook_is_read_or_refused_and_nothing_else(seed: int) -> None:
    draw = random.Random(seed)
    released = workspace.lesson_sources()["03_quantization"][0]
    teacher = TeacherNotebook.from_path(released)
    whole_notebook = json.loads(released.read_bytes())
    whole_notebook["cells"] = whole_notebook["cells"][20:34]
    text = json.dumps(whole_notebook)
    outcomes = {"read": 0, "refused": 0}
    end = time.monotonic() + 2
    while time.monotonic() < end or not all(outcomes.values()):
        if draw.random() < 0.3:
            raw = mutated_bytes(text.encode(), draw)
        else:
            notebook = json.loads(text)
            for _ in range(draw.choice([1, 2, 8])):
                # Cells are a few of very many places, so they are drawn as often as all others.
                cells = notebook.get("cells")
                inside = isinstance(cells, list) and cells and draw.random() < 0.5
                places = nodes({"": draw.choice(cells)} if inside else notebook)
                if any(isinstance(container, list) for container, _ in places):
                    draw.choice(CHANGES)(places, draw)
            raw = json.dumps(notebook).encode()
        try:
            found = submission.read_bytes(raw, Path("demo.ipynb"), draw.choice([teacher, None]))
        except UnreadableNotebook as refused:
            assert str(refused).isprintable()
            outcomes["refused"] += 1
        else:
            assert_it_can_be_written(found)
            outcomes["read"] += 1
