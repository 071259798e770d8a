"""A class's kit: `check` works in it as in the full course, and no answer of ours is anywhere in it."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmcourse import exercise, kit, observations, source, workspace
from llmcourse.exercise import Exercise
from llmcourse.finding import exercise_paths
from llmcourse.kit import KitError, Packed

SPECIMENS = Path(__file__).parent / "contract" / "specimens"
NAMES = ("RowAdam", "per_row", "sample_ranking")
SEEDS = (5, 6)
PER_ROW = '''"""Made for this test: a race, a service, comments that tell too much."""

from __future__ import annotations

from torch import Tensor

from llmcourse import exercise as declared
from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake, race


class Counting:
    """Counts what it is asked for."""

    def __init__(self, rng):
        self.asked, self.factor = 0, rng.integer(2, 5)

    def times(self):
        self.asked += 1
        return self.factor

    def counts(self):
        return {"asked": (float(self.asked), 1.0)}


def close(observed, expected):
    return None if abs(observed["sum"] - expected["sum"]) < 1e-3 else "the sum is another"


@exercise(points=4, minutes=5, hints=("One row at a time.",))
def per_row(weight: Tensor, service) -> Tensor:
    """Largest magnitude of each row of weight [out, in], times what the service says: [out]."""
    ### BEGIN SOLUTION
    factor_of_the_service = service.times()
    return weight.abs().amax(dim=1) * factor_of_the_service  # the secret of the reference
    ### END SOLUTION


@case(per_row, service=Counting)
def one_loud_row(answer, rng, service):
    """A loud row must not touch its neighbours."""
    weight = loud(rng)  # only the reference gets this right: weight.abs().amax(dim=1)
    return {"scale": answer(weight, service)}


def loud(rng):
    weight = rng.normal(4, 6)
    weight[rng.integer(0, 3)] *= 100
    return weight


@case(per_row, judge=close, service=Counting)
def summed(answer, rng, service):
    """The sum of all."""
    return {"sum": float(answer(loud(rng), service).sum())}


@cost(per_row, share=1 / 4, authority="protocol", service=Counting)
def asks_once(answer, rng, service):
    """How often the service is asked."""
    answer(loud(rng), service)
    return {}


def drawn(rng):
    return rng.normal(400, 40)


class One:
    def times(self):
        return 1.0


def row_by_row_and_slow(weight, service):
    stacked_rows_of_the_baseline = [row.abs().max() for row in weight]
    return weight.new_tensor(stacked_rows_of_the_baseline) * service.times()


@race(per_row, inputs=drawn, baseline=row_by_row_and_slow, share=1 / 4)
def fast(answer, rng):
    """Many rows."""
    return lambda weight: answer(weight, One())


@mistake(per_row, "One scale serves every row.")
def one_for_all(weight, service):
    largest_of_the_mistake = weight.abs().max()
    return largest_of_the_mistake.expand(weight.shape[0]) * service.times()


@declared.mistake(per_row, "The service is asked for every row.")
def asks_often(weight, service):
    return weight.abs().amax(dim=1) * [service.times() for _ in weight][0]


@alternative(per_row, "Sorts")
def sorted_rows(weight, service):
    rows_of_the_alternative = weight.abs().sort(dim=1).values[:, -1]
    return rows_of_the_alternative * service.times()


excuse(per_row, "amax -> amin", "never seen in this test")
'''

# Runs in a kit: reads {label: source of a module} and prints what `check` says of each one's answer.
DRIVER = """
import contextlib, io, json, sys
from pathlib import Path
import llmcourse
from llmcourse import check, hint
from llmcourse.judging import runner_for

said = {"package": llmcourse.__file__, "hint": str(hint("per_row")), "checks": {}}
for label, (exercise, name, text) in json.load(sys.stdin).items():
    space = {"__name__": "answers"}
    exec(compile(text, label, "exec"), space)
    answer = space[name]
    answer.__name__ = exercise
    for seed in (None, 6, 1234):
        with contextlib.redirect_stdout(io.StringIO()):
            score = check(answer, seed=seed)
        verdict = score.verdict
        said["checks"].setdefault(label, []).append({
            "points": float(score), "verdict": verdict.verdict, "reason": verdict.reason, "seed": verdict.seed,
            "mistakes": [one.sentence for one in verdict.mistakes], "html": score._repr_html_(),
        })
print(json.dumps(said), file=sys.stdout)
"""


class Kit(NamedTuple):
    packed: Packed
    teacher: Path
    unpacked: Path

    def python(self, program: str, given: str = "") -> subprocess.CompletedProcess[str]:
        """A program in a fresh Python that finds the kit's package and not the repository's."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("LLMCOURSE", "PYTHON"))
        }
        environment = inherited | {
            "PYTHONPATH": str(self.unpacked / "package"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, cwd=self.unpacked, env=environment, input=given, capture_output=True, text=True
        )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """A teacher's folder with exercises outside the package, the kit packed from it, and the kit unpacked."""
    teacher = tmp_path_factory.mktemp("teacher")
    mine = teacher / "lessons" / "mine"
    mine.mkdir(parents=True)
    for name in ("RowAdam", "sample_ranking"):
        shutil.copy(SPECIMENS / f"{name}.py", mine)
    (mine / "per_row.py").write_text(PER_ROW, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCOURSE_LESSONS", str(teacher / "lessons"))
        kit.write(kit.shape("00", name="demo", add=NAMES), teacher)
        packed = kit.pack("demo", seeds=SEEDS, folder=teacher)
        unpacked = tmp_path_factory.mktemp("student")
        shutil.unpack_archive(packed.path, unpacked)
        yield Kit(packed, teacher, unpacked / "demo")
    exercise.load.cache_clear()


def answers(one: Exercise) -> dict[str, tuple[str, str, str]]:
    """{label: (exercise, name, module)}: every answer of an exercise's own file, its stub, and one that forges."""
    text = one.source
    names = [one.name, *one.mistakes, *one.alternatives]
    bare = source.case_source(text, names, [], one.path)
    stub = source.stub(source.definition(text, one.name), one.path)
    imports = source.imports_of(text)
    found = {f"{one.name}/{name}": (one.name, name, bare) for name in names}
    found[f"{one.name}/stub"] = (one.name, one.name, f"from __future__ import annotations\n{imports}\n{stub}")
    return found


FORGED = """
import torch

class Agrees(torch.Tensor):
    def __eq__(self, other):
        return torch.ones(self.shape, dtype=torch.bool)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return True

def per_row(weight, service):
    service.times()
    return torch.zeros(weight.shape[0]).as_subclass(Agrees)
"""


@pytest.fixture(scope="module")
def said(demo: Kit) -> dict[str, Any]:
    given = {label: one for name in NAMES for label, one in answers(exercise.find(name)).items()}
    given["per_row/forged"] = ("per_row", "per_row", FORGED)
    done = demo.python(DRIVER, json.dumps(given))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------------------ check in the kit


def test_the_kits_own_package_is_what_runs(demo: Kit, said: dict[str, Any]) -> None:
    assert Path(said["package"]).is_relative_to(demo.unpacked)
    assert "One row at a time." in said["hint"]


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_and_every_alternative_earn_all_points(said: dict[str, Any], name: str) -> None:
    one = exercise.find(name)
    for right in (name, *(other.name for other in one.alternatives.values() if other.meets_costs)):
        for found in said["checks"][f"{name}/{right}"]:
            assert (found["verdict"], found["points"]) == ("right", one.points), found["reason"]


@pytest.mark.parametrize("name", NAMES)
def test_the_stub_earns_nothing(said: dict[str, Any], name: str) -> None:
    for found in said["checks"][f"{name}/stub"]:
        assert (found["verdict"], found["points"]) == ("not attempted", 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_mistake_is_named_by_its_sentence(said: dict[str, Any], name: str) -> None:
    for wrong in exercise.find(name).mistakes.values():
        for found in said["checks"][f"{name}/{wrong.name}"]:
            assert found["mistakes"] == [wrong.sentence]
            assert found["points"] < exercise.find(name).points
            assert wrong.sentence.split("'")[0] in found["html"]


def test_a_forged_result_earns_nothing(said: dict[str, Any]) -> None:
    for found in said["checks"]["per_row/forged"]:
        assert (found["verdict"], found["points"]) == ("wrong", 0)


def test_each_check_takes_a_stored_seed_and_a_seed_repeats(said: dict[str, Any]) -> None:
    for found in said["checks"].values():
        drawn, *repeated = [one["seed"] for one in found]
        assert drawn in SEEDS and repeated == [6, SEEDS[1234 % 2]]


def test_a_race_is_said_not_to_be_run_here(demo: Kit, said: dict[str, Any]) -> None:
    assert "not raced here" in said["checks"]["per_row/per_row"][0]["html"]
    assert "per_row has a race" in demo.packed.notes[0]


def test_the_command_that_needs_our_answers_says_so_in_one_line(demo: Kit) -> None:
    program = "from llmcourse.cli import main; main(['check', 'demo.ipynb'])"
    done = demo.python(program)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "found a kit" in done.stderr and "`check` cells" in done.stderr


def test_a_kit_cannot_be_packed_from_a_kit(demo: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(demo.unpacked / "package" / "llmcourse" / "lessons"))
    with pytest.raises(KitError, match="this is a kit itself: it holds no answer of RowAdam"):
        kit.pack("demo", seeds=[1], folder=demo.teacher)


# ------------------------------------------------------------------------------------------------- what is in it


def test_a_kit_holds_the_notebook_a_readme_and_the_package_with_these_exercises_only(demo: Kit) -> None:
    with zipfile.ZipFile(demo.packed.path) as archive:
        names = archive.namelist()
    assert {"demo/README.md", "demo/demo.ipynb", "demo/package/pyproject.toml"} <= set(names)
    lessons = {name.partition("/lessons/")[2] for name in names if "/lessons/" in name}
    stored = {f"mine/{name}.{seed}.observations" for name in NAMES for seed in SEEDS}
    assert lessons == {"__init__.py", "mine/__init__.py", *(f"mine/{name}.py" for name in NAMES)} | stored
    forbidden = ("solutions", ".git", "__pycache__", "interview.toml", ".md", "tests", "grading/")
    inside = [name for name in names if name != "demo/README.md"]
    assert not [name for name in inside if any(part in name for part in forbidden)]


def texts(packed: Path) -> Iterator[tuple[str, str]]:
    """Every file of a kit as text; of observations also what is packed in them, of notebooks the cells."""
    with zipfile.ZipFile(packed) as archive:
        for name in archive.namelist():
            raw = archive.read(name)
            if name.endswith(observations.SUFFIX):
                raw = observations._payload(raw)
            if name.endswith(".ipynb"):
                raw = "\n".join("".join(cell["source"]) for cell in json.loads(raw)["cells"]).encode()
            yield name, raw.decode("utf-8", errors="replace")


def one_spaced(text: str) -> str:
    return " ".join(text.split())


def lines_of(nodes: list[ast.stmt], text: str) -> set[str]:
    """The lines of some definitions, as their author wrote them and as Python writes them."""
    written = [line for node in nodes for line in text.split("\n")[node.lineno - 1 : node.end_lineno]]
    return {one_spaced(line) for line in (*written, *ast.unparse(ast.Module(nodes, [])).splitlines())}


def secret_lines(one: Exercise) -> set[str]:
    """Lines of 12 characters and more of every answer, and of what only answers reach, that tell something: no import,
    and not what the statement shows, or what a case shows as well."""
    answers = {one.name, *one.mistakes, *one.alternatives}
    public = {f"def {name}(*arguments, **options):" for name in one.mistakes}  # how a kit declares them
    if one.race is not None:
        answers |= {one.race.name, one.race.baseline.__name__}
        public |= {f"def {one.race.name}(answer, rng):", f'"""{one.race.title}"""'}  # what it is called
    kept = {name for node in ast.parse(kit.without_answers(one)).body for name in source.bound_names(node)}
    body = ast.parse(one.source).body
    ours = [node for node in body if not set(source.bound_names(node)) & (kept - answers)]
    stub = source.stub(source.definition(one.source, one.name), one.path)
    public |= lines_of([node for node in body if node not in ours], one.source) | lines_of(
        ast.parse(stub).body, stub
    )
    dull = ("import ", "from ", "###", "raise NotImplementedError", "@")
    return {
        line for line in lines_of(ours, one.source) - public if len(line) >= 12 and not line.startswith(dull)
    }


def shown_in(packed: Path, exercises: list[Exercise]) -> list[tuple[str, str]]:
    """(file, line) for every secret line that a kit shows, as a line of its own."""
    secret = set().union(*map(secret_lines, exercises))
    found = []
    for name, text in texts(packed):
        lines = {one_spaced(line) for line in text.splitlines()}
        found += [(name, line) for line in sorted(secret & lines)]
    return found


def test_nothing_of_the_package_that_a_kit_needs_is_missing(demo: Kit) -> None:
    package = demo.unpacked / "package" / "llmcourse"
    for path in package.rglob("*.py"):
        for module in kit._imported(path.read_text(encoding="utf-8")):
            there = (package / f"{module}.py").is_file() or (package / module).is_dir()
            assert there or not (workspace.PACKAGE / f"{module}.py").is_file(), (
                f"{path.name} imports {module}"
            )
    assert (package / "cli.py").is_file() and not (package / "optimizing.py").exists(), "no lesson 07 here"


def test_answers_are_stubs_in_the_package(demo: Kit) -> None:
    for name in NAMES:
        one = exercise.find(name)
        text = (demo.unpacked / "package" / "llmcourse" / "lessons" / "mine" / f"{name}.py").read_text()
        nodes = {node.name: node for node in ast.parse(text).body if isinstance(node, source.Definition)}
        assert not set(one.alternatives) & set(nodes)
        for wrong in one.mistakes:
            assert ast.unparse(nodes[wrong].body) == "raise NotImplementedError"  # type: ignore[arg-type]


def test_no_line_of_any_answer_is_in_any_file(demo: Kit) -> None:
    exercises = [exercise.find(name) for name in NAMES]
    found = shown_in(demo.packed.path, exercises)
    assert found == []
    everything = "\n".join(text for _, text in texts(demo.packed.path))
    for told in (
        "factor_of_the_service",
        "largest_of_the_mistake",
        "rows_of_the_alternative",
        "stacked_rows_of_the_baseline",
        "the secret of the reference",
        "only the reference gets this right",
        "never seen in this test",
    ):
        assert told in PER_ROW and told not in everything
    assert "One scale serves every row." in everything


def test_the_search_for_leaks_finds_one(demo: Kit, tmp_path: Path) -> None:
    leaking = tmp_path / "leaking.zip"
    shutil.copy(demo.packed.path, leaking)
    with zipfile.ZipFile(leaking, "a") as archive:
        archive.writestr("demo/note.txt", "  largest_of_the_mistake =  weight.abs().max()")
    assert {name for name, _ in shown_in(leaking, [exercise.find("per_row")])} == {"demo/note.txt"}


def test_a_notebook_that_shows_an_answer_is_not_packed(demo: Kit, tmp_path: Path) -> None:
    text = (demo.teacher / "notebooks" / "demo" / "demo.ipynb").read_text(encoding="utf-8")
    notebook = json.loads(text)
    notebook["cells"][0]["source"] = "Hint: `factor_of_the_service = service.times()`"
    path = tmp_path / "notebooks" / "demo" / "demo.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    with pytest.raises(KitError, match="demo.ipynb shows `factor_of_the_service"):
        kit.pack("demo", seeds=[1], folder=tmp_path)
    assert list(tmp_path.glob("*.zip")) == []


@pytest.mark.parametrize("name", ["RowAdam", "sample_ranking", "per_row", *sorted(set(exercise_paths()))])
def test_without_answers_an_exercise_is_declared_as_before(demo: Kit, name: str, tmp_path: Path) -> None:
    one = exercise.find(name)
    path = tmp_path / one.topic / f"{name}.py"
    path.parent.mkdir()
    path.write_text(kit.without_answers(one), encoding="utf-8")
    bare = exercise.load(path)
    same = ("points", "minutes", "extension", "hints", "forbid", "mutates", "ranks", "statement")
    assert [getattr(bare, part) for part in same] == [getattr(one, part) for part in same]
    assert list(bare.items) == list(one.items) and bare.alternatives == {} and bare.uses == ()
    for item in one.items.values():
        told = ("kind", "tol", "free_shapes", "after", "share", "authority", "title")
        found = bare.items[item.name]
        assert [getattr(found, part) for part in told] == [getattr(item, part) for part in told]
        assert (found.judge is None, found.service is None) == (item.judge is None, item.service is None)
    assert {each.name: (each.sentence, each.fails) for each in bare.mistakes.values()} == {
        each.name: (each.sentence, each.fails) for each in one.mistakes.values()
    }
    assert (bare.race is None) == (one.race is None)
    if one.race is not None and bare.race is not None:
        told = ("name", "share", "keeps", "title")
        assert [getattr(bare.race, part) for part in told] == [getattr(one.race, part) for part in told]


# ------------------------------------------------------------------------------------------------- packing itself


def test_the_same_seeds_give_the_same_bytes(demo: Kit, tmp_path: Path) -> None:
    again = kit.pack("demo", tmp_path / "again.zip", seeds=[6, 5], folder=demo.teacher)
    assert again.path.read_bytes() == demo.packed.path.read_bytes()
    assert again.size_bytes == again.path.stat().st_size


def test_another_file_is_never_replaced_unasked(demo: Kit, tmp_path: Path) -> None:
    target = tmp_path / "kit.zip"
    target.write_bytes(b"the teacher's own")
    with pytest.raises(KitError, match="--force"):
        kit.pack("demo", target, seeds=[5], folder=demo.teacher)
    assert target.read_bytes() == b"the teacher's own"
    kit.pack("demo", target, seeds=[5], folder=demo.teacher, force=True)
    assert zipfile.is_zipfile(target) and [path.name for path in tmp_path.iterdir()] == ["kit.zip"]


@pytest.mark.parametrize(
    ("which", "seeds", "told"),
    [
        ("demo", 0, "at least 1"),
        ("demo", [], "expected one or more whole numbers"),
        ("demo", [-1], "expected one or more whole numbers"),
        ("demo", [1 << 40], "expected one or more whole numbers"),
        ("nothing", 1, "no lesson is named 'nothing'"),
        ("", 1, "no lesson is named ''"),
    ],
)
def test_what_cannot_be_packed_is_told_in_one_line(demo: Kit, which: str, seeds: Any, told: str) -> None:
    with pytest.raises((KitError, workspace.WorkspaceError), match=told) as error:
        kit.pack(which, seeds=seeds, folder=demo.teacher)
    assert "\n" not in str(error.value)


def test_drawn_seeds_are_new_each_time() -> None:
    assert len(kit._seeds(3)) == 3 and kit._seeds(3) != kit._seeds(3)


def test_a_deadline_is_told_in_the_readme_and_as_nbgraders_own_command(demo: Kit) -> None:
    due = datetime(2026, 12, 4, 18, 0, tzinfo=timezone(timedelta(hours=2)))
    wanted = 'nbgrader db assignment add demo --duedate="2026-12-04 16:00:00 UTC"'
    assert kit.deadline_command("demo", due) == wanted
    from nbgrader.utils import parse_utc

    assert parse_utc(wanted.split('"')[1]) == due.astimezone(UTC).replace(tzinfo=None)
    assert f"{due.astimezone():%d %B %Y, %H:%M}" in kit._readme("demo", "demo.ipynb", due)


def test_the_readme_says_what_stored_observations_are_worth(demo: Kit) -> None:
    text = (demo.unpacked / "README.md").read_text(encoding="utf-8")
    assert "pip install ./package" in text and "jupyter lab demo.ipynb" in text
    assert "passes here and earns nothing" in text and "secret" in text and "Due:" not in text


@pytest.mark.slow
def test_the_kit_of_a_lesson_of_the_course_shows_no_answer_and_judges_its_references(tmp_path: Path) -> None:
    # In a process of its own, as the command runs: what other tests imported may pickle exceptions in its own way.
    code = (
        "import pickle, sys; from pathlib import Path; from llmcourse import kit; "
        "sys.stdout.buffer.write(pickle.dumps(kit.pack('01', Path(sys.argv[1]), seeds=[11])))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "kit.zip")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        check=True,
    )
    packed = pickle.loads(ran.stdout)
    exercises = [exercise.find(name) for name in packed.exercises]
    assert len(exercises) == 10
    # Another exercise's case may say `return found` as well: each is looked for where it would be told.
    own = [
        (file, line)
        for one in exercises
        for file, line in shown_in(packed.path, [one])
        if Path(file).name.startswith(f"{one.name}.") or file.endswith((".ipynb", "README.md"))
    ]
    assert own == []
    shutil.unpack_archive(packed.path, tmp_path)
    here = Kit(packed, tmp_path, tmp_path / packed.name)
    given = {
        label: each
        for one in exercises
        for label, each in answers(one).items()
        if label.split("/")[1] in (one.name, next(iter(one.mistakes)))
    }
    done = here.python(
        DRIVER.replace('str(hint("per_row"))', '""').replace("(None, 6, 1234)", "(11,)"), json.dumps(given)
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])["checks"]
    for one in exercises:
        (right,), (wrong,) = said[f"{one.name}/{one.name}"], said[f"{one.name}/{next(iter(one.mistakes))}"]
        assert (right["verdict"], right["points"]) == ("right", one.points), right["reason"]
        assert wrong["verdict"] == "wrong" and wrong["points"] == 0
        if not any(item.authority == "outside" for item in one.costs):  # memory: no two runs count the same
            assert wrong["mistakes"] == [next(iter(one.mistakes.values())).sentence]
