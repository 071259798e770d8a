"""What grading a class costs: seconds outside the cases, throughput beside stock nbgrader, and a grader that is killed.

Part of `make bench`; every class is made here from the lesson's own answers and mistakes, in a temporary folder.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

from llmcourse.benchmarks import REPOSITORY, Row

LESSON = "01_parameter_loading"
WORKERS = 2
KINDS = ("right", "wrong", "unwritten", "hostile")
SHARES = (12, 5, 2, 1)  # of twenty
# It replaces what an in-process check might compare with; nothing of it hangs, since stock would wait for it.
HOSTILE = (
    "import torch, builtins\n"
    "torch.allclose = lambda *_, **__: True\n"
    "torch.equal = lambda *_: True\n"
    "builtins.abs = lambda x: 0\n"
)
STOCK = """
c = get_config()
c.CourseDirectory.root = {root!r}
c.CourseDirectory.submitted_directory = "submitted"
c.CourseDirectory.source_directory = "source"
c.CourseDirectory.release_directory = "release"
c.Execute.timeout = 600
"""


def submissions(count: int, lesson: str, draw: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, notebook) of a mixed class: the shares of KINDS in random order, no two wrong ones alike by design."""
    from llmcourse.exercise import find
    from llmcourse.source import definition

    solved = nbformat.read(REPOSITORY / "solutions" / lesson / f"{lesson}.ipynb", as_version=4)
    answers = {
        cell.metadata.nbgrader.grade_id: cell.source
        for cell in solved.cells
        if cell.metadata.get("nbgrader", {}).get("solution")
    }
    kinds = [
        kind
        for kind, share in zip(KINDS, SHARES, strict=True)
        for _ in range(max(1, round(count * share / 20)))
    ]
    draw.shuffle(kinds)
    for kind in kinds[:count]:
        given = nbformat.read(REPOSITORY / "notebooks" / lesson / f"{lesson}.ipynb", as_version=4)
        wrong = draw.choice(sorted(answers))
        for cell in given.cells:
            name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
            if name not in answers or kind == "unwritten":
                continue
            cell.source = answers[name]
            if kind == "wrong" and name == wrong:
                exercise = find(name)
                mistake = draw.choice([*exercise.mistakes])
                text = definition(exercise.source, mistake, exercise.path)
                cell.source = text.replace(mistake, name)
            elif kind == "hostile":
                cell.source = f"{HOSTILE}{cell.source}"
        yield kind, given


def make_class(root: Path, count: int, lesson: str, seed: int, submitted: str) -> dict[str, str]:
    """A folder a student under `root / submitted`; what kind each is."""
    kinds = {}
    for number, (kind, notebook) in enumerate(submissions(count, lesson, random.Random(seed))):
        student = f"s{number:04}"
        place = root / submitted / student / lesson
        place.mkdir(parents=True)
        (place / f"{lesson}.ipynb").write_text(nbformat.writes(notebook), encoding="utf-8")
        kinds[student] = kind
    return kinds


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def graded(root: Path, assignment: str, *, workers: int = WORKERS) -> tuple[float, float, dict[str, Any]]:
    """Wall and CPU seconds of `llmcourse grade`, and what it printed."""
    command = [
        sys.executable,
        "-m",
        "llmcourse.cli",
        "grade",
        assignment,
        "--json",
        "--workers",
        str(workers),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    before, began = cpu_s(), time.perf_counter()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    taken = time.perf_counter() - began
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return taken, cpu_s() - before, json.loads(done.stdout)


def stock_s(root: Path, lesson: str) -> float:
    """Wall seconds of stock nbgrader's autograde and feedback of a class, on WORKERS processes side by side."""
    students = sorted((root / "submitted").iterdir())
    parts = [root / f"part{number}" for number in range(WORKERS)]
    # nbgrader starts `alembic` by its bare name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    environment["LLMCOURSE_WORKSPACE"] = str(root / "work")
    nbgrader = [sys.executable, "-m", "nbgrader"]
    for number, part in enumerate(parts):
        source = part / "source" / lesson
        source.mkdir(parents=True)
        shutil.copy(REPOSITORY / "solutions" / lesson / f"{lesson}.ipynb", source)
        (part / "nbgrader_config.py").write_text(STOCK.format(root=str(part)), encoding="utf-8")
        for student in students[number::WORKERS]:
            shutil.copytree(student, part / "submitted" / student.name)
        subprocess.run(
            [*nbgrader, "generate_assignment", lesson],
            cwd=part,
            env=environment,
            check=True,
            capture_output=True,
        )
    began = time.perf_counter()
    steps = f"{sys.executable} -m nbgrader autograde {lesson}; {sys.executable} -m nbgrader generate_feedback {lesson}"
    running = [
        subprocess.Popen(
            ["sh", "-c", steps],
            cwd=part,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for part in parts
    ]
    for process in running:
        process.wait()
    return time.perf_counter() - began


def grading_rows(count: int) -> Iterator[Row]:
    """Lesson 01: seconds outside the cases, and a mixed class beside stock nbgrader."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        # One process: what a few submissions more cost is what a submission costs, whatever starting does.
        few, many = folder / "few", folder / "many"
        for root, size in ((few, 4), (many, 16)):
            for number in range(size):
                place = root / "grading" / "submitted" / f"s{number:04}" / LESSON
                place.mkdir(parents=True)
                shutil.copy(REPOSITORY / "solutions" / LESSON / f"{LESSON}.ipynb", place)
        costs = [graded(root, LESSON, workers=1) for root in (few, many)]

        def each(*parts: str) -> float:
            """What a submission more adds to these parts."""
            return sum(costs[1][2]["seconds"][part] - costs[0][2]["seconds"][part] for part in parts) / 12

        # bubblewrap does not wait for what it started, so what is inside the jail is not among our children's time.
        cpu = (costs[1][1] - costs[0][1]) / 12 + each("workers on the CPU")
        cases, served = each("cases on the CPU"), each("serving cases on the CPU")
        outside = cpu - cases - served
        yield Row(
            "grade: CPU a right submission of lesson 01 takes outside its cases, feedback written",
            f"{outside:.2f} s of {cpu:.2f} s (cases {cases:.2f} s, and {served:.2f} s of the judge serving what they "
            "call: supplied readers, counters)",
            "≤ 0.3 s",
            outside <= 0.3,
        )
        ours = folder / "ours"
        kinds = make_class(ours, count, LESSON, 1, "grading/submitted")
        taken, cpu, told = graded(ours, LESSON)
        wrong_points = [
            student
            for student, kind in kinds.items()
            if kind == "right"
            and told["students"][student]["points"] < told["students"][student]["max_points"] - 2
        ]
        split = ", ".join(
            f"{part} {seconds / count:.2f}" for part, seconds in sorted(told["seconds"].items())
        )
        sample = folder / "stock"
        size = min(count, 6)
        make_class(sample, size, LESSON, 1, "submitted")
        stock = stock_s(sample, LESSON)
        ratio = (stock / size) / (taken / count)
        yield Row(
            f"grade: {count} mixed submissions of lesson 01 on {WORKERS} workers beside stock nbgrader",
            f"{ratio:.1f}× its throughput ({taken / count:.2f} s a submission, stock {stock / size:.2f} s of {size}); "
            f"seconds a submission: {split}; {len(wrong_points)} right ones short of points",
            "≥ 4×",
            ratio >= 4 and not wrong_points,
        )


# --------------------------------------------------------------------------------------------------- a killed grader

EXERCISE = '''from torch import Tensor

from llmcourse.exercise import case, exercise, mistake


@exercise(points=2, minutes=5)
def loudest_of_rows(weight: Tensor) -> Tensor:
    """Largest magnitude of each row of weight [out, in]: [out], same dtype."""
    ### BEGIN SOLUTION
    return weight.abs().amax(dim=1)
    ### END SOLUTION


@case(loudest_of_rows)
def rows(answer, rng):
    """Rows of both signs."""
    return answer(rng.normal(4, 6))


@mistake(loudest_of_rows, "The sign stays.")
def signed(weight):
    return weight.amax(dim=1)
'''
ANSWERS = (
    "def loudest_of_rows(weight):\n    return weight.abs().max(dim=1).values",
    "def loudest_of_rows(weight):\n    return weight.amax(dim=1)",
    "def loudest_of_rows(weight):\n    raise NotImplementedError",
)


def small_class(root: Path, count: int) -> None:
    """An assignment of one exercise of one's own, and a class of it."""
    lessons = root / "lessons" / "rows"
    lessons.mkdir(parents=True)
    (lessons / "loudest_of_rows.py").write_text(EXERCISE, encoding="utf-8")
    answer = {"grade": False, "solution": True, "locked": False, "grade_id": "loudest_of_rows"}
    check = {
        "grade": True,
        "solution": False,
        "locked": True,
        "grade_id": "check_loudest_of_rows",
        "points": 2,
    }
    common = {"schema_version": 3, "task": False}

    def notebook(text: str) -> str:
        cells = [
            nbformat.v4.new_code_cell("import torch", id="imports"),
            nbformat.v4.new_code_cell(text, id="answer", metadata={"nbgrader": answer | common}),
            nbformat.v4.new_code_cell(
                "check(loudest_of_rows)", id="check", metadata={"nbgrader": check | common}
            ),
        ]
        return str(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))

    places = {root / "notebooks" / "rows" / "rows.ipynb": ANSWERS[2]}
    for number in range(count):
        places[root / "grading" / "submitted" / f"s{number:04}" / "rows" / "rows.ipynb"] = ANSWERS[number % 3]
    for path, text in places.items():
        path.parent.mkdir(parents=True)
        path.write_text(notebook(text), encoding="utf-8")


def killed_rows(count: int, kills: int) -> Iterator[Row]:
    """A class of one exercise, graded undisturbed, and by a grader that is killed at random moments."""
    from llmcourse.gradebook import dump

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in ("quiet", "killed"):
            small_class(folder / name, count)
        os.environ["LLMCOURSE_LESSONS"] = str(folder / "quiet" / "lessons")
        try:
            taken, cpu, _ = graded(folder / "quiet", "rows")
            command = [sys.executable, "-m", "llmcourse.cli", "grade", "rows", "--workers", str(WORKERS)]
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
            draw, again = random.Random(0), 0
            for _ in range(kills):
                with subprocess.Popen(
                    command,
                    cwd=folder / "killed",
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                ) as run:
                    time.sleep(draw.uniform(2, 2 + 2 * taken / kills))
                    if run.poll() is None:
                        again += 1
                        os.kill(run.pid, signal.SIGKILL)
            graded(folder / "killed", "rows")
        finally:
            del os.environ["LLMCOURSE_LESSONS"]
        books = [dump(folder / name / "grading" / "gradebook.db") for name in ("quiet", "killed")]
        students = [{row[2] for row in book["submitted_assignment"]} for book in books]
        lost = len(students[0] - students[1])
        double = len(books[1]["submitted_assignment"]) - len(students[1])
        pages = len(list((folder / "killed" / "grading" / "feedback").rglob("*.html")))
        yield Row(
            f"grade: {count} submissions of one exercise, the grader killed {kills} times",
            f"{again} kills while it ran, {lost} lost, {double} double, gradebook "
            f"{'the same' if books[0] == books[1] else 'another'}, {pages} pages; undisturbed {taken:.0f} s, "
            f"{cpu / count:.2f} s of CPU each",
            "0 lost, 0 double, the same",
            lost == double == 0 and books[0] == books[1] and pages == count,
        )
