from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "llmcourse"
PYPROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements() -> list[Requirement]:
    texts = [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    found = [Requirement(text) for text in texts]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


# ------------------------------------------------------------------------------------------ one list of versions


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_is_pinned_to_a_version_of_its_range(requirement: Requirement) -> None:
    assert requirement.specifier, "a range is needed: the oldest version that is known to do"
    assert Version(pins()[canonicalize_name(requirement.name)]) in requirement.specifier


def test_pins_carry_no_local_tag_so_that_any_build_of_torch_satisfies_them() -> None:
    assert [name for name, version in pins().items() if Version(version).local] == []


def test_the_conda_environment_is_pyprojects_under_the_constraints() -> None:
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == PROJECT["name"]
    *plain, by_pip = environment["dependencies"]
    assert f"python{PROJECT['requires-python']}" in plain
    assert {re.split("[<>=]", name)[0] for name in plain} == {"python", "pip"}, "versions belong to pyproject"
    constraint, editable = by_pip["pip"]
    assert (REPOSITORY / constraint.removeprefix("-c ")).samefile(REPOSITORY / "constraints.txt")
    assert editable.removeprefix("-e .[").removesuffix("]") in EXTRAS


def test_the_dev_extra_holds_every_other_extra() -> None:
    (own,) = [Requirement(text) for text in EXTRAS["dev"] if Requirement(text).name == PROJECT["name"]]
    assert own.extras == set(EXTRAS) - {"dev"}


def test_the_licence_and_the_changelog_are_there() -> None:
    licence = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith(f"{PROJECT['license']} License")
    assert PROJECT["authors"][0]["name"] in licence
    assert "## Unreleased" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------ imports point one way

MEASURES = {"exercise", "counting", "finding", "interrupts", "racing", "machine", "sizing", "stepping"}
MODELS = {"appraisal", "configuration", "model", "text", "training", "zoo"}
JUDGES = {
    *(
        "judging",
        "auditing",
        "checking",
        "report",
        "agreement",
        "engine",
        "mutants",
        "services",
        "source",
        "submission",
    ),
    *("jail", "observations", "track", "wall", "wire", "worker", "zygote"),
}
# From a class's folder to the gradebook; nobody but the command line and the benchmarks knows of them.
GRADERS = {
    *("feedback", "graded", "gradebook", "grader", "grading", "intake", "likeness", "preprocessor"),
    *("kit", "pools", "rebuilding", "shaping"),
}
INTERVIEWS = {"interview", "interview_plan", "interview_record", "interview_words", "standing"}
BUILDERS = {"notebook", "lesson_text", "interview_source", "leaks"} | INTERVIEWS
EXPERIMENTS = {"compression", "kernels", "optimizing"}
PICTURES = {"figures", "optimizer_figures", "precision_figures", "widgets"}
PLACED = (
    MEASURES
    | MODELS
    | JUDGES
    | BUILDERS
    | EXPERIMENTS
    | PICTURES
    | GRADERS
    | {"workspace", "lessons", "cli", "benchmarks", "grading_benchmarks"}
)


def forbidden(importer: str) -> set[str]:
    """Modules of llmcourse that `importer` may not import, nor reach through a function's own import."""
    everyone = {"cli", "widgets"}
    if importer in MEASURES:
        return everyone | MODELS | JUDGES - {"source"} | BUILDERS | {"lessons", "workspace"}
    if importer in MODELS:
        return everyone | {"exercise"} | JUDGES | BUILDERS | {"lessons", "workspace"}
    if importer in JUDGES:
        return everyone | MODELS | BUILDERS | GRADERS | {"lessons"}
    if importer in EXPERIMENTS:
        return everyone | JUDGES | BUILDERS | {"lessons", "workspace"}
    if importer == "lessons":
        return PLACED - MEASURES - MODELS - {"lessons", "agreement"}  # a judge compares as others do
    if importer in PICTURES | {"workspace"}:
        return everyone | JUDGES | BUILDERS | {"lessons"}
    return everyone


def imported(source: str) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def trespasses(importer: str, source: str) -> list[str]:
    """Imports of `importer` that point the wrong way."""
    found = []
    for name in imported(source):
        first, _, rest = name.partition(".")
        if first in ("grading", "tests") or (
            first == "llmcourse" and rest.split(".")[0] in forbidden(importer)
        ):
            found.append(name)
    return found


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def place_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    assert place_of(path) in PLACED, "a new module: give it a place in this file"
    assert trespasses(place_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("counting", "from llmcourse.model import Decoder"),
        ("model", "def late():\n    from llmcourse import exercise"),
        ("judging", "import llmcourse.lessons.parameter_loading"),
        ("report", "from llmcourse import figures, lessons"),
        ("notebook", "from llmcourse.widgets import slider"),
        ("cli", "import grading.jail"),
        ("lessons", "from llmcourse.judging import check"),
        ("workspace", "from tests import peers"),
    ],
)
def test_an_import_that_points_the_other_way_is_found(importer: str, source: str) -> None:
    assert len(trespasses(importer, source)) == 1


def test_every_module_uses_annotations_that_cost_nothing_at_import() -> None:
    without = [
        path.name
        for path in MODULES
        if (text := path.read_text(encoding="utf-8")).strip()
        and "from __future__ import annotations" not in text
    ]
    assert without == []


# --------------------------------------------------------------------------------------- nothing heavy at import


def loaded_by(program: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after `program`."""
    code = (
        f"import sys\n{program}\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


HEAVY = {
    "torch",
    "numpy",
    "matplotlib",
    "nbgrader",
    "nbformat",
    "ipywidgets",
    "IPython",
    "transformers",
    "jupyterlab",
}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import llmcourse") & HEAVY == set()


@pytest.mark.parametrize("command", ["--help", "check --help", "progress --json", "interview 01 --json"])
def test_help_progress_and_a_new_interview_load_nothing_heavy(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOURSE_WORKSPACE", str(tmp_path))
    program = (
        f"try:\n    from llmcourse.cli import main; main({command.split()!r})\nexcept SystemExit:\n    pass"
    )
    assert loaded_by(program) & HEAVY == set()


def test_check_and_hint_are_found_on_first_use() -> None:
    assert "torch" in loaded_by("from llmcourse import check, hint")


def test_another_name_is_an_attribute_error() -> None:
    import llmcourse

    with pytest.raises(AttributeError, match="no attribute 'chekc'"):
        _ = llmcourse.chekc


# ------------------------------------------------------------------------------------------------- the two commands


def needed(tool: str) -> str:
    """Path of a program, or a skip that says what to install; under LLMCOURSE_REQUIRE=all, a failure."""
    found = shutil.which(tool)
    if found is None:
        message = f"needs {tool}; install it with: apt-get install {tool}"
        (pytest.fail if os.environ.get("LLMCOURSE_REQUIRE") == "all" else pytest.skip)(message)
    assert found is not None
    return found


FAKE_PYTHON = """#!/bin/sh
# Stands for Python, in the clone and in its .venv: notes what it is asked, and fails where FAIL matches.
case "$*" in
    *"import sys; v ="*) exit 0 ;;
    *"import venv"*) exit 0 ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
echo "$*" >> asked.txt
case "$*" in *"${FAIL:-nothing at all}"*) exit 1 ;; esac
"""


class Clone:
    """The Makefile in a folder whose path has spaces, with a Python that only notes what it is asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stamp = root / ".venv" / ".installed"
        root.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(REPOSITORY / name, root)
        (root / "python").write_text(FAKE_PYTHON)
        (root / "python").chmod(0o755)

    def make(self, *arguments: str, fail: str = "") -> tuple[int, list[str], str]:
        """Exit code, what Python was asked, and what was printed."""
        (self.root / "asked.txt").write_text("")
        outside = {
            name: value
            for name, value in os.environ.items()
            # A make around this one hands down its variables.
            if name
            not in (
                "MAKEFLAGS",
                "MFLAGS",
                "MAKELEVEL",
                "MAKEOVERRIDES",
                "AUDIT",
                "BROWSER",
                "PYTEST",
                "SLOW",
                "LAB",
            )
        }
        command = [needed("make"), "PYTHON=./python", *arguments]
        environment = {**outside, "FAIL": fail or "nothing at all"}
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        return done.returncode, (self.root / "asked.txt").read_text().splitlines(), done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "a clone")


INSTALLS = [
    "-m venv .venv",
    "-m pip install torch==",
    "-m pip install --no-build-isolation -c constraints.txt -e .[dev]",
]
STAGES = [
    ("ruff check", "-m ruff check ."),
    ("ruff format --check", "-m ruff format --check ."),
    ("mypy", "-m mypy"),
    ("pytest", "-m pytest"),
    ("audit --sample", "-m llmcourse.cli audit --sample --mutants 4 --seed 0"),
    ("notebooks", "-m llmcourse.notebook --check"),
    ("browser", "-m pytest -m browser tests/browser/test_lesson.py"),
]


def test_setting_up_installs_torch_first_and_happens_once(clone: Clone) -> None:
    code, asked, _ = clone.make("setup")
    assert code == 0
    assert [line.startswith(start) for line, start in zip(asked, INSTALLS, strict=True)] == [True] * 3
    assert clone.make("setup")[:2] == (0, [])


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_setting_up_happens_again_when_the_dependencies_change(clone: Clone, changed: str) -> None:
    clone.make("setup")
    later_ns = clone.stamp.stat().st_mtime_ns + 10**9
    os.utime(clone.root / changed, ns=(later_ns, later_ns))
    assert len(clone.make("setup")[1]) == 3


def test_setting_up_happens_again_when_the_folder_was_moved(clone: Clone) -> None:
    clone.make("setup")
    clone.root = clone.root.rename(clone.root.with_name("elsewhere"))
    assert len(clone.make("setup")[1]) == 3


@pytest.mark.parametrize("step", range(3), ids=["venv", "torch", "the rest"])
def test_a_set_up_that_fails_leaves_no_stamp_and_is_finished_by_the_next(clone: Clone, step: int) -> None:
    code, asked, _ = clone.make("test", fail=INSTALLS[step])
    assert code != 0
    assert len(asked) == step + 1
    assert not clone.stamp.exists()
    assert clone.make("setup")[0] == 0
    assert clone.stamp.exists()


def with_browser_tests(clone: Clone) -> None:
    folder = clone.root / "tests" / "browser"
    folder.mkdir(parents=True)
    for name in ("test_lesson.py", "test_run_all.py"):
        (folder / name).touch()


def test_make_test_runs_every_stage_in_order_and_names_it(clone: Clone) -> None:
    with_browser_tests(clone)
    clone.make("setup")
    code, asked, shown = clone.make("test")
    assert code == 0
    assert [line.startswith(start) for line, (_, start) in zip(asked, STAGES, strict=True)] == [True] * len(
        STAGES
    )
    names = [line.removeprefix("== ") for line in shown.splitlines() if line.startswith("== ")]
    assert all(title in name for name, (title, _) in zip(names, STAGES, strict=False))
    assert names[-1] == "all passed"


@pytest.mark.parametrize("stage", range(len(STAGES)), ids=[title for title, _ in STAGES])
def test_the_first_stage_that_fails_stops_make_test(clone: Clone, stage: int) -> None:
    with_browser_tests(clone)
    clone.make("setup")
    code, asked, shown = clone.make("test", fail=STAGES[stage][1])
    assert code != 0
    assert len(asked) == stage + 1
    assert "all passed" not in shown


def test_executed_notebooks_are_tested_with_nbval_where_there_are_some(clone: Clone) -> None:
    clone.make("setup")
    assert "--nbval-lax" not in "".join(clone.make("test")[1])
    lesson = clone.root / "solutions" / "01_parameter_loading"
    lesson.mkdir(parents=True)
    (lesson / "01_parameter_loading.ipynb").touch()
    tests, notebooks = [line for line in clone.make("test")[1] if line.startswith("-m pytest")]
    assert notebooks.endswith("--nbval-lax solutions/01_parameter_loading/01_parameter_loading.ipynb")
    assert "--nbval-lax" not in tests


def test_run_all_of_every_lesson_waits_for_ci(clone: Clone) -> None:
    with_browser_tests(clone)
    clone.make("setup")
    assert clone.make("test")[1][-1] == "-m pytest -m browser tests/browser/test_lesson.py"
    assert clone.make("test", "BROWSER=tests/browser")[1][-1] == "-m pytest -m browser tests/browser"


def test_slow_tests_wait_for_ci(clone: Clone) -> None:
    clone.make("setup")
    for given, selected in (((), "not browser and not slow"), (("SLOW=",), "not browser ")):
        (tests,) = [line for line in clone.make("test", *given)[1] if line.startswith("-m pytest")]
        assert f"-m {selected} tests" in tests


def test_all_mutants_are_audited_when_asked(clone: Clone) -> None:
    clone.make("setup")
    assert "-m llmcourse.cli audit --all --seed 0" in clone.make("test", "AUDIT=--all")[1]


def test_an_unsuitable_python_is_refused_before_anything_is_made(clone: Clone) -> None:
    (clone.root / "old").write_text(
        '#!/bin/sh\n[ "$1" = -c ] && echo "expected Python 3.11 to 3.13" >&2\nexit 1\n'
    )
    (clone.root / "old").chmod(0o755)
    assert clone.make("setup", "PYTHON=./old")[0] != 0
    assert not (clone.root / ".venv").exists()


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 13), (3, 14)])
def test_the_makefile_accepts_the_pythons_that_pyproject_accepts(version: tuple[int, int]) -> None:
    (check,) = re.findall(r"\$\(PYTHON\) -c '(import sys; v = .*)'", (REPOSITORY / "Makefile").read_text())
    code = check.replace("import sys; v = sys.version_info", f"import sys; v = {version}")
    accepted = subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert accepted == (
        f"{version[0]}.{version[1]}" in Requirement(f"x{PROJECT['requires-python']}").specifier
    )


def test_ci_needs_nothing_but_bash_to_begin_and_ends_in_make_test() -> None:
    path = REPOSITORY / ".ci" / "run"
    text = path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash") and "set -euo pipefail" in text
    assert "export LLMCOURSE_REQUIRE=all" in text
    assert (
        text.rstrip().splitlines()[-1].startswith("exec make test AUDIT=--all SLOW= BROWSER=tests/browser ")
    )
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_a_learners_and_a_teachers_records_are_ignored_by_git() -> None:
    kept_out = [
        "work/progress.json",
        "grading/submitted/a/b.ipynb",
        "grading/gradebook.db",
        "grading/.llmcourse/secret",
        ".venv/x",
    ]
    command = [needed("git"), "-C", str(REPOSITORY), "check-ignore", "--no-index", *kept_out]
    assert subprocess.run(command, capture_output=True, text=True).stdout.split() == kept_out


# -------------------------------------------------------------------------------------------------- tests' own


CONFTEST_TRIALS = """
import pytest

def test_fails(seed):
    assert seed < 0

def test_passes(seed):
    assert seed >= 0

@pytest.mark.gpu
def test_on_a_gpu():
    pass
"""


def pytest_in(folder: Path, *arguments: str) -> str:
    """What pytest prints of the trials above, under this repository's conftest and no other setting."""
    shutil.copy(REPOSITORY / "tests" / "conftest.py", folder)
    (folder / "test_trials.py").write_text(CONFTEST_TRIALS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu")
    # An empty list of devices stands for a machine without one.
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout


def test_a_failure_prints_its_drawn_seed_and_the_seed_repeats_it(tmp_path: Path) -> None:
    (drawn,) = set(re.findall(r"drawn seed (\d+); repeat with --seed \1", pytest_in(tmp_path)))
    assert f"drawn seed {drawn};" in pytest_in(tmp_path, "--seed", drawn)


def test_a_gpu_test_is_skipped_with_its_reason_where_there_is_none(tmp_path: Path) -> None:
    assert "needs a CUDA device, and torch finds none" in pytest_in(tmp_path)


# -------------------------------------------------------------------------------------------------- CONTRIBUTING


@pytest.fixture(scope="module")
def contributing() -> str:
    return (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_contributing_is_short(contributing: str) -> None:
    assert len(contributing.splitlines()) <= 60


def test_contributing_names_files_that_exist(contributing: str) -> None:
    for name in re.findall(r"\S+/\S+\.py\b|\.ci/run", contributing.partition("Save this as")[0]):
        assert (REPOSITORY / name).is_file(), name


def test_an_exercise_added_as_contributing_says_is_proven(contributing: str, tmp_path: Path) -> None:
    (name,) = re.findall(r"Save this as `(\S+)`", contributing)
    (text,) = re.findall(r"```python\n(.*?)```", contributing, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", contributing, re.DOTALL)
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    # The text assumes that .venv/bin is on the path; this runs the same command from this Python.
    program = f'set -euo pipefail\nllmcourse() {{ "{sys.executable}" -m llmcourse.cli "$@"; }}\n{commands}'
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Clip first" in done.stdout
    assert "clipped_mean" in done.stdout and "NOT proven" not in done.stdout


# ----------------------------------------------------------------------------------------------------------- wheel


def test_a_wheel_carries_the_lessons_and_their_data(tmp_path: Path) -> None:
    root = tmp_path / "source"
    shutil.copytree(PACKAGE, root / "llmcourse", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"):
        shutil.copy(REPOSITORY / name, root)
    (root / "README.md").touch()
    lesson = root / "notebooks" / "01_parameter_loading"
    lesson.mkdir(parents=True)
    (lesson / "01_parameter_loading.ipynb").write_text("a lesson")
    (root / "solutions" / lesson.name).mkdir(parents=True)
    (root / "solutions" / lesson.name / "interview.toml").write_text("its questions")
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    command = [sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", str(tmp_path), str(root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("llmcourse-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "llmcourse/notebooks/01_parameter_loading/01_parameter_loading.ipynb" in names
    assert "llmcourse/notebooks/01_parameter_loading/interview.toml" in names
    assert {f"llmcourse/{path.relative_to(PACKAGE).as_posix()}" for path in MODULES} <= names
    zoo = [path for path in PACKAGE.glob("checkpoints/**/*") if path.is_file()]
    assert zoo and {f"llmcourse/{path.relative_to(PACKAGE).as_posix()}" for path in zoo} <= names
    assert not any(name.startswith(("tests/", "grading/", "solutions/")) for name in names)
