from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from llmcourse import cli, workspace

REPOSITORY = Path(__file__).parents[1]
COMMANDS = [
    "doctor",
    "lab",
    "check",
    "hint",
    "reset",
    "interview",
    "progress",
    "audit",
    "grade",
    "kit",
    "train",
]


@pytest.fixture(autouse=True)
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with one lesson, and no workspace yet: no test touches the developer's own."""
    root = tmp_path / "clone"
    lesson = root / "notebooks" / "01_parameter_loading"
    lesson.mkdir(parents=True)
    (lesson / "01_parameter_loading.ipynb").write_text("first version")
    (root / "solutions").mkdir()
    (root / "pyproject.toml").touch()
    monkeypatch.setattr(workspace, "PACKAGE", root / "llmcourse")
    monkeypatch.delenv("LLMCOURSE_WORKSPACE", raising=False)
    monkeypatch.chdir(root)
    return root


def run(*arguments: str) -> int:
    """Exit code of the command line, run in this process."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(arguments))
    return int(exit_info.value.code or 0)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """Put a module in the place of llmcourse.<name>: these tests are about the command line alone."""
    module = ModuleType(f"llmcourse.{name}")
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, f"llmcourse.{name}", module)
    monkeypatch.setattr(sys.modules["llmcourse"], name, module, raising=False)


class HarnessFault(Exception):
    pass


class UnreadableNotebook(Exception):
    pass


# --------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"Example: llmcourse {command}" in capsys.readouterr().out


def test_the_help_lists_these_commands_and_no_other() -> None:
    names = [info.name or info.callback.__name__ for info in cli.app.registered_commands if info.callback]
    assert names == COMMANDS


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    import llmcourse

    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == llmcourse.__version__


def test_without_a_command_the_help_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    shown = capsys.readouterr()
    assert shown.out.count("Usage:") == 1
    assert shown.err == ""


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chek"], "'chek'"),
        (["check"], "'NOTEBOOK'"),
        (["reset"], "'LESSON'"),
        (["lab", "--port", "0"], "--port"),
        (["lab", "--port", "x"], "--port"),
        (["progress", "--wrong"], "--wrong"),
        (["audit", "--seeds", "0"], "--seeds"),
        (["interview", "01", "--minutes", "many"], "--minutes"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_one_line_that_names_the_help(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert says in shown.err and "--help`" in shown.err


def test_an_error_of_the_workspace_is_one_line_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("reset", "07") == 1
    assert capsys.readouterr().err == (
        "llmcourse: no lesson is named '07'; expected one of 01_parameter_loading\n"
    )


def test_a_long_error_stays_one_line_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    run("reset", "a lesson that nobody has written, [bold]with a name[/bold] of many words")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "[bold]with a name[/bold]" in shown


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(workspace, "progress", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["progress"])


def test_ctrl_c_ends_with_130_and_one_line(clone: Path) -> None:
    (clone / "work").mkdir()
    pipe = clone / "work" / "progress.json"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "llmcourse.cli", "progress"],
        cwd=REPOSITORY,
        env={**os.environ, "LLMCOURSE_WORKSPACE": str(clone / "work")},
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs this in the background has interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with pipe.open("wb"):  # returns once the command has begun to read, and keeps it waiting
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate()
    assert process.returncode == 130
    assert shown.count("\n") == 1 and "Ctrl-C" in shown


@pytest.mark.parametrize("delay_s", [0.1, 0.6, 1.2, 2.0])
def test_ctrl_c_while_modules_are_imported_ends_the_command_without_a_traceback(delay_s: float) -> None:
    notebook = REPOSITORY / "notebooks" / "01_parameter_loading" / "01_parameter_loading.ipynb"
    # As the installed command begins; the delay counts from there: what Python does before is not ours.
    code = "import re, sys; print('begun', flush=True); from llmcourse.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "check", str(notebook)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate()
    assert process.returncode in (130, -signal.SIGINT), errors
    assert shown == "" and "Traceback" not in errors and "Error" not in errors


def test_importing_the_command_line_leaves_ctrl_c_as_it_was() -> None:
    code = """
import signal
before = signal.signal(signal.SIGINT, signal.default_int_handler)
import llmcourse.cli
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_output_that_nobody_reads_is_not_an_error(clone: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "llmcourse.cli", "progress", "--json"],
        cwd=REPOSITORY,
        env={**os.environ, "LLMCOURSE_WORKSPACE": str(clone / "work"), "PYTHONUNBUFFERED": "1"},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# ---------------------------------------------------------------------------------------------------------- lab


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of the server that `lab` would have become."""
    command: list[str] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: command.extend(arguments))
    monkeypatch.setenv("LLMCOURSE_WORKSPACE", "")  # restored afterwards: `lab` sets it for the server
    return command


def test_lab_copies_the_lessons_and_becomes_jupyterlab_there(
    clone: Path, became: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("lab", "--no-browser", "--port", "8899") == 0
    assert (clone / "work" / "01_parameter_loading" / "01_parameter_loading.ipynb").is_file()
    assert became[:3] == [sys.executable, "-m", "jupyterlab"]
    assert f"--ServerApp.root_dir={clone / 'work'}" in became
    assert {"--no-browser", "--port=8899"} <= set(became)
    assert os.environ["LLMCOURSE_WORKSPACE"] == str(clone / "work")
    assert str(clone / "work") in capsys.readouterr().out


@pytest.mark.parametrize(("user", "allowed"), [(0, True), (1000, False)], ids=["root", "user"])
def test_lab_may_be_run_by_root_and_only_then_says_so(
    became: list[str], monkeypatch: pytest.MonkeyPatch, user: int, allowed: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    run("lab")
    assert ("--allow-root" in became) == allowed
    assert "--no-browser" not in became


def test_lab_names_a_newer_version_of_a_lesson(
    clone: Path, became: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run("lab")
    (clone / "notebooks" / "01_parameter_loading" / "01_parameter_loading.ipynb").write_text("second version")
    capsys.readouterr()
    run("lab")
    assert "01_parameter_loading.new.ipynb" in capsys.readouterr().out


def test_lab_without_jupyterlab_says_what_to_install(
    became: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("lab") == 1
    assert "pip install 'llmcourse[lab]'" in capsys.readouterr().err
    assert became == []


# -------------------------------------------------------------------------------------------------------- check


def verdict_of(name: str, verdict: str, points: float) -> SimpleNamespace:
    exercise = SimpleNamespace(topic="parameter_loading")
    return SimpleNamespace(name=name, verdict=verdict, points=points, max_points=3.0, exercise=exercise)


VERDICTS = (verdict_of("read_header", "right", 2.0), verdict_of("load_parallel", "not attempted", 0.0))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the judge was asked; it answers with one right exercise and one not attempted."""
    asked: dict[str, object] = {}

    def read(path: Path) -> Path:
        if path.suffix != ".ipynb":
            raise UnreadableNotebook(f"expected a notebook, found {path.name}; give the .ipynb file")
        return path

    def check_notebook(path: Path, *, seed: int | None, zygote: object) -> SimpleNamespace:
        asked.update(path=path, seed=seed)
        if path.stem == "fault":
            raise HarnessFault("the zygote died")
        return SimpleNamespace(exercises=VERDICTS, to_json=lambda: {"points": 2.0})

    stand_in(monkeypatch, "checking", check_notebook=check_notebook)
    stand_in(monkeypatch, "zygote", HarnessFault=HarnessFault, Zygote=nullcontext)
    stand_in(monkeypatch, "submission", UnreadableNotebook=UnreadableNotebook, read=read)
    stand_in(monkeypatch, "report", notebook_text=lambda verdict: "the report")
    return asked


def test_check_prints_the_report_and_passes_whatever_the_score(
    judged: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", "some/lesson.ipynb", "--seed", "7") == 0
    assert capsys.readouterr().out == "the report\n"
    assert judged == {"path": Path("some/lesson.ipynb"), "seed": 7}


def test_check_as_json_prints_nothing_else(
    judged: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", "lesson.ipynb", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"points": 2.0}


def test_a_file_that_cannot_be_judged_exits_2_with_one_line(
    judged: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", "notes.txt") == 2
    assert capsys.readouterr() == (
        "",
        "llmcourse: expected a notebook, found notes.txt; give the .ipynb file\n",
    )
    assert judged == {}


@pytest.mark.parametrize(
    "content", [None, "[]", '{"nbformat": 4, "cells": []}'], ids=["none", "list", "empty"]
)
def test_a_file_that_cannot_be_judged_is_refused_before_anything_heavy_is_begun(
    clone: Path, content: str | None
) -> None:
    path = clone / "x.ipynb"
    if content is not None:
        path.write_text(content)
    code = f"""
import sys
from llmcourse import cli
try:
    cli.main(["check", {str(path)!r}])
finally:
    print(sorted({{"torch", "numpy", "llmcourse.checking"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "[]\n") and done.stderr.count("\n") == 1


def test_a_fault_of_the_judge_is_an_exit_code_and_never_a_verdict(
    judged: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", "fault.ipynb") == 3
    shown = capsys.readouterr()
    assert shown.out == "" and "the zygote died" in shown.err


def test_check_records_what_was_attempted_in_the_workspace(judged: dict[str, object], clone: Path) -> None:
    workspace.prepare()
    run("check", "work/01_parameter_loading/01_parameter_loading.ipynb")
    entries, _ = workspace.progress()
    assert list(entries) == ["read_header"]
    assert entries["read_header"].best_points == 2
    assert entries["read_header"].lesson == "parameter_loading"


def test_check_of_a_notebook_elsewhere_records_nothing(judged: dict[str, object], clone: Path) -> None:
    workspace.prepare()
    run("check", "notebooks/01_parameter_loading/01_parameter_loading.ipynb")
    assert workspace.progress() == ({}, None)


def test_check_says_once_that_progress_could_not_be_saved(
    judged: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workspace, "record", lambda *arguments, **options: "Progress was not saved: full.")
    assert run("check", "lesson.ipynb", "--json") == 0
    shown = capsys.readouterr()
    assert shown.err == "Progress was not saved: full.\n"
    json.loads(shown.out)


# --------------------------------------------------------------------------------------------------------- hint


@pytest.fixture
def hinted(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> SimpleNamespace:
        if name not in ("read_header", "without"):
            raise KeyError(f"no exercise is named {name!r}; did you mean read_header?")
        return SimpleNamespace(hints=("The idea.", "The line.") if name == "read_header" else ())

    stand_in(monkeypatch, "exercise", find=find)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], "1. The idea.\nOne more: llmcourse hint read_header --level 2\n"),
        (["--level", "2"], "1. The idea.\n2. The line.\n"),
        (["--level", "9"], "1. The idea.\n2. The line.\n"),
    ],
    ids=["one", "both", "beyond"],
)
def test_hints_unfold_one_level_at_a_time(
    hinted: None, capsys: pytest.CaptureFixture[str], arguments: list[str], shown: str
) -> None:
    assert run("hint", "read_header", *arguments) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("name", "says"), [("red_header", "did you mean read_header?"), ("without", "found none")]
)
def test_a_hint_that_does_not_exist_is_one_line(
    hinted: None, capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    assert run("hint", name) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and says in shown.err


# ------------------------------------------------------------------------------------------- reset and progress


def test_reset_names_what_it_kept(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.prepare()
    own = clone / "work" / "01_parameter_loading" / "01_parameter_loading.ipynb"
    own.write_text("my answer")
    assert run("reset", "1") == 0
    kept = Path(capsys.readouterr().out.splitlines()[0].removeprefix("Kept: "))
    assert kept.read_text() == "my answer"
    assert run("reset", "1") == 0
    assert "Already fresh" in capsys.readouterr().out


@pytest.fixture
def questions(clone: Path) -> None:
    """Give the clone's lesson an import cell and a question."""
    (clone / "notebooks" / "01_parameter_loading" / "01_parameter_loading.ipynb").write_text(
        json.dumps({"cells": [{"cell_type": "code", "source": ["import math"]}]})
    )
    source = REPOSITORY / "solutions" / "01_parameter_loading" / "interview.toml"
    folder = clone / "solutions" / "01_parameter_loading"
    folder.mkdir()
    (folder / "interview.toml").write_bytes(source.read_bytes())


def test_interview_writes_a_notebook_names_it_and_goes_on_with_it(
    questions: None, clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("interview", "01", "--minutes", "9", "--json") == 0
    taken = json.loads(capsys.readouterr().out)
    assert Path(taken["notebook"]).is_file() and not taken["resumed"]
    assert [part["name"] for part in taken["parts"]] == ["parameter_loading"]
    assert run("interview", "1", "--minutes", "9") == 0
    shown = capsys.readouterr().out
    assert taken["notebook"] in shown and "unfinished" in shown and "llmcourse lab" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["01", "--minutes", "2"], "2 minutes are too few: the shortest part takes 5"),
        (["01", "--minutes", "nan"], "expected a number above 0, such as 20; found nan"),
        (["07"], "no lesson is named '07'"),
        ([], "expected a lesson, such as 01, or a mixed interview"),
        (["--report"], "begin with `llmcourse interview 01`"),
    ],
    ids=" ".join,
)
def test_an_interview_that_cannot_be_is_one_line(
    questions: None, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run("interview", *arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and says in shown.err


def test_the_report_of_an_interview_is_text_or_json_and_can_end_it(
    questions: None, clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("interview", "01", "--minutes", "9")
    path = clone / "work" / "interviews.json"
    found = json.loads(path.read_text())
    (name,) = found["interviews"]
    found["interviews"][name] |= {"begun": "2026-11-23T18:00:00+00:00", "elapsed_s": 60.0}
    path.write_text(json.dumps(found))
    capsys.readouterr()
    assert run("interview", "--report") == 0
    assert "1:00 of 9:00 gone" in capsys.readouterr().out
    assert run("interview", "--end", "--json") == 0
    assert json.loads(capsys.readouterr().out)["finished"]


def test_progress_before_anything_was_tried_says_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("progress") == 0
    assert "llmcourse lab" in capsys.readouterr().out


def test_progress_shows_points_attempts_and_their_sum(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.prepare()
    for name, points in (("read_header", 2.0), ("load_parallel", 1.5)):
        workspace.record(name, "right", points, 3, lesson="01_parameter_loading", place=clone / "work")
    assert run("progress") == 0
    shown = capsys.readouterr().out
    assert "read_header" in shown and "2 / 3" in shown and "3.5 / 6" in shown
    assert run("progress", "--json") == 0
    found = json.loads(capsys.readouterr().out)["load_parallel"]
    assert (found["best_points"], found["attempts"], found["best_time_s"], found["due"]) == (
        1.5,
        1,
        None,
        None,
    )


def test_progress_is_drawn_into_the_workspace_when_asked(
    questions: None, clone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NBGRADER_EXECUTION", "LLMCOURSE_GRADING"):
        monkeypatch.delenv(name, raising=False)
    workspace.prepare()
    assert run("progress", "--picture") == 0
    assert str(clone / "work" / "progress.png") in capsys.readouterr().err
    assert (clone / "work" / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_progress_is_a_warning_on_stderr_and_not_in_the_json(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.prepare()
    (clone / "work" / "progress.json").write_text("{")
    assert run("progress", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {}
    assert shown.err.count("\n") == 1 and "damaged" in shown.err


# -------------------------------------------------------------------------------------------------------- audit


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the audit was asked; it is complete unless `asked["complete"]` says otherwise."""
    asked: dict[str, object] = {"complete": True}

    def exercises_of(lessons: list[str]) -> None:
        if "nope" in lessons:
            raise KeyError("no lesson or exercise is named 'nope'; lessons with exercises: parameter_loading")

    def audit(lessons: list[str], *, progress: object, **options: object) -> SimpleNamespace:
        asked.update(lessons=lessons, **options)
        return SimpleNamespace(
            to_json=lambda: {"kill_rate": 1.0}, text=lambda: "the table", complete=asked["complete"]
        )

    stand_in(monkeypatch, "zygote", HarnessFault=HarnessFault)
    stand_in(monkeypatch, "auditing", audit=audit, exercises_of=exercises_of)
    return asked


@pytest.mark.parametrize(
    ("arguments", "mutants"),
    [([], None), (["--all"], None), (["--sample"], 8), (["--sample", "--mutants", "3"], 3)],
)
def test_audit_tries_every_mutant_unless_a_sample_is_asked_for(
    audited: dict[str, object], capsys: pytest.CaptureFixture[str], arguments: list[str], mutants: int | None
) -> None:
    assert run("audit", "parameter_loading", "--seeds", "4", *arguments) == 0
    assert capsys.readouterr().out == "the table\n"
    assert (audited["lessons"], audited["mutants"], audited["seeds"]) == (["parameter_loading"], mutants, 4)


@pytest.mark.parametrize(("arguments", "seed"), [([], None), (["--seed", "7"], 7)])
def test_an_audit_draws_its_seeds_unless_it_repeats_one(
    audited: dict[str, object], arguments: list[str], seed: int | None
) -> None:
    assert run("audit", *arguments) == 0
    assert audited["seed"] == seed


def test_an_incomplete_audit_fails_after_its_report(
    audited: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    audited["complete"] = False
    assert run("audit", "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"kill_rate": 1.0}


def test_an_audit_of_an_unknown_lesson_is_one_line(
    audited: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("audit", "nope") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "lessons with exercises: parameter_loading" in shown.err
    assert "lessons" not in audited


# ------------------------------------------------------------------------------------------------------- doctor


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcourse import machine

    cpu = machine.Device("cpu", "A processor", 8 * 2**30, 20e9, {"float32": 100e9, "bfloat16": 200e9})
    found = machine.Machine("Linux x86_64", "2.13.0", 4, 10e9, (cpu,))
    monkeypatch.setattr(machine, "probe", lambda refresh=False: found)

    def roofline(given: machine.Machine) -> SimpleNamespace:
        assert given is found
        return SimpleNamespace(savefig=lambda file, format: file.write(b"a picture"))

    stand_in(monkeypatch, "figures", roofline=roofline)


def test_doctor_prints_the_rates_and_draws_the_roofline(
    probed: None, clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    assert "A processor" in shown
    assert "20.0" in shown and "bfloat16" in shown and "10.0" in shown, (
        "bandwidth, dtype, 200 GFLOP/s over 20 GB/s"
    )
    assert (clone / "work" / "roofline.png").read_bytes() == b"a picture"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Qwen2 of 2 layers in bfloat16, in several files."""
    import torch

    from llmcourse.model import Decoder, ModelConfig, save_checkpoint

    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        qkv_bias=True,
        max_position_embeddings=4096,
    )
    model = Decoder(config).to(torch.bfloat16)
    save_checkpoint(model, tmp_path / "model", max_shard_bytes=16_000)
    return tmp_path / "model"


# By hand: q and o are 32 x 64, k and v 32 x 32, with biases on q, k and v; norms are 2 a layer and 1 at the end.
ATTENTION = 2 * (2 * 32 * 64 + 2 * 32 * 32 + 64 + 2 * 32)
TOTAL = 64 * 32 + ATTENTION + 2 * 3 * 32 * 48 + 5 * 32 + 64 * 32


def test_doctor_says_what_a_checkpoint_is_costs_and_where_it_fits(
    probed: None, clone: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor", "--model", str(checkpoint), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["architecture"]) == ("qwen2", "Qwen2ForCausalLM")
    assert found["parameters"]["attention"] == ATTENTION and found["parameters"]["total"] == TOTAL
    assert found["stored_values"] == {"bfloat16": TOTAL} and found["stored_bytes"] == 2 * TOTAL
    assert found["files"] == sorted(path.name for path in checkpoint.glob("*.safetensors"))
    assert len(found["files"]) > 1
    assert (found["dtype"], found["context_tokens"]) == ("bfloat16", 4096)
    costs = {
        each["dtype"]: (each["weight_bytes"], each["cache_bytes_per_token"]) for each in found["serving"]
    }
    # A key and a value of 16, for 2 heads in 2 layers: 128 values a token; bfloat16 beside integers.
    assert costs == {
        "bfloat16": (2 * TOTAL, 256),
        "float32": (4 * TOTAL, 512),
        "int8": (TOTAL, 256),
        "int4": (TOTAL // 2, 256),
    }
    assert found["training"]["total_bytes"] == 16 * TOTAL
    (fit,) = found["fits"]
    assert (fit["device"], fit["memory_bytes"], fit["trains"]) == ("cpu", 8 * 2**30, True)
    assert fit["cache_tokens"]["bfloat16"] == (8 * 2**30 - 2 * TOTAL) // 256
    assert not (clone / "work").exists()


def test_doctor_shows_a_checkpoint_as_tables(
    probed: None, clone: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor", "--model", str(checkpoint)) == 0
    shown = capsys.readouterr().out
    assert f"{checkpoint}: Qwen2ForCausalLM (qwen2)" in shown
    assert f"{TOTAL:,} in bfloat16" in shown and "context of 4,096 tokens" in shown
    assert f"{2 * TOTAL / 1024:.1f} KiB" in shown and "room on cpu, 8.0 GiB" in shown
    assert f"{(8 * 2**30 - 2 * TOTAL) // 256:,} tokens" in shown
    assert "does not fit" not in shown and "No fast float16" not in shown
    assert not (clone / "work").exists()


def test_doctor_says_what_does_not_fit(
    probed: None, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcourse import machine

    # Room for bfloat16 weights and 3 tokens, not for float32 ones, and not for training.
    cpu = machine.Device("cpu", "A processor", 2 * TOTAL + 3 * 256 + 255, 20e9, {"float32": 100e9})
    gpu = machine.Device("cuda:0", "A board", 16 * TOTAL, 1e12, {"float16": 1e14}, 10e9)
    found = machine.Machine("Linux x86_64", "2.13.0", 4, 10e9, (cpu, gpu))
    monkeypatch.setattr(machine, "probe", lambda refresh=False: found)
    assert run("doctor", "--model", str(checkpoint), "--json") == 0
    on_cpu, on_gpu = json.loads(capsys.readouterr().out)["fits"]
    assert (on_cpu["cache_tokens"]["bfloat16"], on_cpu["cache_tokens"]["float32"]) == (3, None)
    assert (on_cpu["trains"], on_gpu["trains"]) == (False, True)
    assert run("doctor", "--model", str(checkpoint)) == 0
    assert capsys.readouterr().out.count("does not fit") == 2


def test_doctor_warns_of_float16_where_it_is_slow(
    probed: None, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from llmcourse.model import load_checkpoint, save_checkpoint

    save_checkpoint(load_checkpoint(checkpoint, dtype=torch.float16), tmp_path / "half")
    assert run("doctor", "--model", str(tmp_path / "half")) == 0
    assert "No fast float16 product on cpu: load the files in float32 or bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json; a checkpoint folder holds"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
            "'gpt2' is not known; known are LlamaForCausalLM",
        ),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "which is not in the folder"),
        (
            lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"cut"),
            "not a sound safetensors file",
        ),
    ],
    ids=["no config", "damaged config", "another architecture", "missing shard", "damaged shard"],
)
def test_doctor_of_no_sound_checkpoint_is_one_line_and_measures_nothing(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    says: str,
) -> None:
    from llmcourse import machine

    monkeypatch.setattr(machine, "probe", lambda refresh=False: pytest.fail("measured"))
    damage(checkpoint)
    assert run("doctor", "--model", str(checkpoint)) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and says in shown.err


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**30, "1.0 GiB"),
        (2**52, "4,096.0 TiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit_they_fill(size_bytes: int, shown: str) -> None:
    assert cli._binary(size_bytes) == shown


def test_doctor_as_json_prints_the_measurement_and_draws_nothing(
    probed: None, clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["read_bytes_per_s"] == 20e9
    assert not (clone / "work").exists()


# ---------------------------------------------------------------------------------------------------- teaching a class


def test_a_folder_without_submissions_is_one_line(
    clone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcourse import jail

    monkeypatch.setattr(jail, "refusal", lambda: None)
    (clone / "notebooks" / "01_parameter_loading" / "01_parameter_loading.ipynb").write_text(
        '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    )
    assert run("grade", "01_parameter_loading") == 1
    said = capsys.readouterr().err
    assert "expected the folder of what students handed in" in said and said.count("\n") == 1


def test_no_jail_is_one_line_that_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcourse import jail

    monkeypatch.setattr(jail, "refusal", lambda: "there is no bubblewrap here")
    assert run("grade", "01_parameter_loading") == 1
    said = capsys.readouterr().err
    assert "there is no bubblewrap here" in said and "--insecure" in said and said.count("\n") == 1


@pytest.mark.parametrize("given", ["read_header", "read_header=", "read_header=many", "=3x"])
def test_points_that_are_none_are_a_wrong_command_line(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("kit", "01", "--points", given) == 2
    assert "expected EXERCISE=POINTS" in capsys.readouterr().err
