"""A teacher's version of a lesson: what is picked stays whole, what is dropped takes along what needs it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbgrader.utils import compute_checksum

from llmcourse import shaping, workspace
from llmcourse.shaping import ShapeError, shape, write

LESSON = "01_parameter_loading"
SPECIMENS = Path(__file__).parent / "contract" / "specimens"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of exercises outside the package."""
    folder = tmp_path / "lessons" / "mine"
    folder.mkdir(parents=True)
    for name in ("RowAdam", "replace_file"):
        shutil.copy(SPECIMENS / f"{name}.py", folder)
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(tmp_path / "lessons"))
    return tmp_path


def by_id(notebook: Any, name: str) -> Any:
    (cell,) = [cell for cell in notebook.cells if cell.id == name]
    return cell


def sources(notebook: Any) -> str:
    return "\n".join(cell.source for cell in notebook.cells)


def test_without_a_choice_every_lesson_stays_as_it_was_released() -> None:
    for lesson, paths in workspace.lesson_sources().items():
        assert shaping.to_bytes(shape(lesson).notebook) == paths[0].read_bytes()


def test_picked_exercises_stay_whole_and_the_sections_of_the_others_go() -> None:
    shaped = shape("01", only=["parameter_count", "plan_load"])
    assert shaped.exercises == ("parameter_count", "plan_load")
    before = {cell.id: cell for cell in shape("01").notebook.cells}
    for name in ("parameter_count", "check_parameter_count", "plan_load", "check_plan_load"):
        assert by_id(shaped.notebook, name) == before[name]
    text = sources(shaped.notebook)
    assert "### 5.1 How many parameters" in text and "### 5.3 How long must it take?" in text
    assert "### 5.2 What is in the file?" not in text and "Exercise: `read_header`" not in text
    assert "Your function on configurations that their authors publish" in text, "its *See it* stays"
    assert "through a reader that counts" not in text, "that of a dropped one goes"


def test_no_cell_that_stays_reads_what_went() -> None:
    """Whatever one exercise less leaves, each code cell finds the names it reads above, if it found them before."""
    whole = shape("01")
    found_before = unfound(whole.notebook.cells)
    for name in whole.exercises:
        shaped = shape("01", drop=[name])
        assert unfound(shaped.notebook.cells) <= found_before
        assert name not in shaped.exercises
        assert not any(name in shaping._names(cell).reads for cell in shaped.notebook.cells)


def unfound(cells: list[Any]) -> set[str]:
    """Names that a code cell reads and no cell above it makes: builtins, for the most part."""
    made, missing = set[str](), set[str]()
    for cell in cells:
        if cell.cell_type == "code":
            names = shaping._names(cell)
            missing |= names.reads - made
            made |= names.makes
    return missing


def test_a_cell_that_others_need_stays_and_one_that_cannot_run_goes_each_with_a_note() -> None:
    shaped = shape("01", drop=["read_header"])
    assert any("stayed because others need its config" in note for note in shaped.notes)
    assert any("went because it needs read_header" in note for note in shaped.notes)
    assert "config = ModelConfig(" in sources(shaped.notebook)


@pytest.mark.parametrize(
    ("cells", "lost"),
    [
        (["a = gone()", "print(a)", "b = 1"], [0, 1]),
        (["a = gone()", "a = 2", "print(a)"], [0]),
        (["a = 1", "a = gone()", "print(a)"], [1, 2]),
        (["def f():\n    return gone()", "f()", "def gone2(): pass"], [0, 1]),
        (["[gone(x) for x in range(3)]", "for x in range(3):\n    print(x)"], [0]),
        (["def f(gone):\n    return gone", "gone.shape = 1"], [1]),
        (["%time gone()", "(", "x.gone"], []),
    ],
)
def test_what_cannot_run_is_found_through_the_names_cells_make(cells: list[str], lost: list[int]) -> None:
    made = [nbformat.v4.new_code_cell(text) for text in cells]
    assert list(shaping._lost(made, [shaping._names(cell) for cell in made], {"gone"})) == lost


def test_points_change_in_the_check_the_heading_and_the_checksum() -> None:
    shaped = shape("01", points={"plan_load": 2.5, "save_sharded": 6})
    for name, points in (("plan_load", 2.5), ("save_sharded", 6)):
        check = by_id(shaped.notebook, f"check_{name}")
        assert (check.metadata.nbgrader.grade, check.metadata.nbgrader.points) == (True, points)
        assert f"### Exercise: `{name}` · {points:g} points · about" in sources(shaped.notebook)
    assert "★ Exercise: `save_sharded`" not in sources(shaped.notebook), "it counts now"


def test_every_checksum_is_nbgraders_own(own: Path) -> None:
    shaped = shape(
        "01", drop=["plan_load"], points={"read_header": 9}, add=["replace_file"], spoken=4, title="T"
    )
    graded = [cell for cell in shaped.notebook.cells if "nbgrader" in cell.metadata]
    assert len(graded) == 2 * len(shaped.exercises) + 1
    assert all(cell.metadata.nbgrader.checksum == compute_checksum(cell) for cell in graded)
    ids = [cell.id for cell in shaped.notebook.cells]
    assert len(ids) == len(set(ids))


def test_an_exercise_of_ones_own_comes_with_heading_imports_stub_and_check(own: Path) -> None:
    shaped = shape("00_start_here", name="mine", add=["RowAdam", "replace_file"])
    assert shaped.exercises[-2:] == ("RowAdam", "replace_file")
    at = [cell.id for cell in shaped.notebook.cells].index("replace_file")
    heading, imports, answer, check = shaped.notebook.cells[at - 2 : at + 2]
    assert heading.source.startswith("### Exercise: `replace_file` · 2 points · about 10 minutes")
    assert imports.source.splitlines() == ["from collections.abc import Iterable", "from pathlib import Path"]
    assert answer.source.rstrip().endswith("raise NotImplementedError") and "SOLUTION" not in answer.source
    assert check.source == "check(replace_file)" and check.metadata.nbgrader.points == 2
    space: dict[str, Any] = {}
    exec(f"{imports.source}\n{answer.source}", space)  # the signature finds every name it needs
    assert callable(space["replace_file"])


def test_a_spoken_answer_replaces_the_model_answer_and_shows_the_rubric() -> None:
    shaped = shape("01", spoken=4)
    cell = by_id(shaped.notebook, shaping.SPOKEN)
    found = cell.metadata.nbgrader
    assert cell.cell_type == "markdown" and cell.source == "YOUR ANSWER HERE"
    assert (found.grade, found.solution, found.locked, found.points) == (True, True, False, 4)
    text = sources(shaped.notebook)
    assert "| 2 | States the bound first:" in text and "· 4 points" in text
    assert "<summary>In one minute</summary>" not in text and "<summary>How an answer is scored" not in text
    assert "### Follow-ups" in text


def test_the_title_is_the_first_heading() -> None:
    assert shape("01", title="Week  2").notebook.cells[0].source.startswith("# Week 2\n\nSixty to ninety")


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"only": ["plan_lod"]}, "01_parameter_loading has no exercise 'plan_lod'"),
        ({"drop": ["nothing"]}, "has no exercise 'nothing'"),
        ({"points": {"nothing": 3}}, "not in this notebook"),
        ({"points": {"plan_load": 3}, "drop": ["plan_load"]}, "not in this notebook"),
        ({"points": {"plan_load": 0}}, "expected a number above 0"),
        ({"points": {"plan_load": float("nan")}}, "expected a number above 0"),
        ({"add": ["plan_load"]}, "in the lesson already"),
        ({"add": ["nothing"]}, "LLMCOURSE_LESSONS"),
        ({"spoken": -1}, "expected a number above 0"),
        ({"name": "../x"}, "expected letters"),
        ({"language": "fr"}, "no edition in 'fr'"),
    ],
)
def test_a_choice_that_cannot_be_followed_is_told_in_one_line(choice: dict[str, Any], told: str) -> None:
    with pytest.raises(ShapeError, match=told.replace("(", r"\(")) as error:
        shape("01", **choice)
    assert "\n" not in str(error.value)


def test_an_exercise_that_builds_on_a_dropped_one_is_named() -> None:
    with pytest.raises(ShapeError, match="accumulate builds on clip_by_global_norm"):
        shape("07", drop=["clip_by_global_norm"])


def test_no_spoken_answer_without_a_rubric() -> None:
    with pytest.raises(ShapeError, match=r"no interview\.toml"):
        shape("00", spoken=3)


def test_it_is_written_where_nbgrader_looks_and_another_file_is_never_replaced_unasked(
    tmp_path: Path,
) -> None:
    shaped = shape("00", name="week_1")
    path = write(shaped, tmp_path)
    assert path == tmp_path / "notebooks" / "week_1" / "week_1.ipynb"
    assert write(shaped, tmp_path) == path, "the same again is no conflict"
    path.write_text("the teacher's own")
    with pytest.raises(ShapeError, match="--force"):
        write(shaped, tmp_path)
    assert path.read_text() == "the teacher's own"
    write(shaped, tmp_path, force=True)
    assert nbformat.read(path, as_version=4).cells
    assert [one.name for one in path.parent.iterdir()] == ["week_1.ipynb"]
