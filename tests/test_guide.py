"""The operator's guide names only commands, options and files that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from nbgrader.apps.nbgraderapp import NbGraderApp
from traitlets.config import Application

from llmcourse import cli, gradebook, grading
from llmcourse.grading import Outcome

GUIDE = Path(__file__).parents[1] / "grading" / "README.md"
TEXT = GUIDE.read_text(encoding="utf-8")
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def commands(text: str) -> list[str]:
    """Commands of the fences for a shell, and those in the text that have arguments."""
    lines = [line for kind, body in FENCE.findall(text) if kind == "sh" for line in body.splitlines()]
    prose = FENCE.sub("", text)
    inline = re.findall(r"`((?:llmcourse|nbgrader) [a-z_]+ [^`]*)`", prose)
    return list(dict.fromkeys([*lines, *inline]))


COMMANDS = commands(TEXT)


def demand_llmcourse(words: list[str]) -> None:
    """Parse the words as the command itself would, without running it."""
    name, *arguments = words
    command = typer.main.get_command(cli.app)
    known = command.commands  # type: ignore[attr-defined]
    assert name in known, f"llmcourse has no command {name}"
    known[name].make_context(name, arguments)


def demand_nbgrader(words: list[str], app: type[Application] = NbGraderApp) -> None:
    while words and words[0] in (known := app().subcommands):
        found: Any = known[words[0]][0]
        app, words = found if isinstance(found, type) else _imported(found), words[1:]
    assert app is not NbGraderApp, f"nbgrader has no command {words[0]}"
    made = app()
    assert not made.subcommands, f"{app.__name__} needs one of {sorted(made.subcommands)}"
    for word in words:
        option = word.split("=")[0].removeprefix("--")
        if not word.startswith("-"):
            continue
        assert word.startswith("--") and (option in made.flags or option in made.aliases), (
            f"{app.__name__} has no {word}"
        )


def _imported(name: str) -> type[Application]:
    from traitlets.utils.importstring import import_item

    return import_item(name)


def demand_dask(words: list[str]) -> None:
    scheduler = pytest.importorskip("distributed.cli.dask_scheduler").main
    worker = pytest.importorskip("distributed.cli.dask_worker").main
    {"scheduler": scheduler, "worker": worker}[words[0]].make_context(words[0], words[1:])


DEMANDED = {"llmcourse": demand_llmcourse, "nbgrader": demand_nbgrader, "dask": demand_dask}
OTHERS = {"git", "python3", ".", "pip", "mkdir", "cp", "cd", "rm", "jupyter"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_of_the_guide_is_there(command: str) -> None:
    program, *words = shlex.split(command)
    assert program in DEMANDED or program in OTHERS
    if program in DEMANDED:
        DEMANDED[program](words)


@pytest.mark.parametrize(
    "command",
    [
        "llmcourse marks week_2",
        "llmcourse grade week_2 --fast",
        "llmcourse grade week_2 --workers none",
        "llmcourse kit",
        "nbgrader grade week_2",
        "nbgrader collect week_2 --newer",
        "nbgrader db assignment week_2",
        "dask worker tcp://SCHEDULER:8786 --nproc 8",
    ],
)
def test_a_command_that_is_not_there_is_noticed(command: str) -> None:
    program, *words = shlex.split(command)
    with pytest.raises((AssertionError, cli.UsageError, click.UsageError)):
        DEMANDED[program](words)


def test_the_guide_has_the_commands_that_it_is_about() -> None:
    said = {" ".join(shlex.split(command)[:2]) for command in COMMANDS}
    assert {"llmcourse kit", "llmcourse grade", "dask worker", "nbgrader collect"} <= said
    assert {"nbgrader release_assignment", "nbgrader generate_feedback", "nbgrader release_feedback"} <= said


def test_every_option_of_grade_is_explained() -> None:
    grade = typer.main.get_command(cli.app).commands["grade"]  # type: ignore[attr-defined]
    options = [name for parameter in grade.params for name in parameter.opts if name.startswith("--")]
    assert [name for name in options if name not in TEXT and name != "--help"] == []


def test_the_columns_of_the_table_are_those_of_the_guide() -> None:
    header = grading.table(Outcome("week_2", "", worth={"an_exercise": 1})).splitlines()[0].split(",")
    (listed,) = re.findall(r"The columns of the CSV: (.*?\.) `same_as`", TEXT, re.DOTALL)
    assert [name for name in header if name != "an_exercise"] == re.findall(r"`(\w+)`", listed)


@pytest.mark.parametrize("words", ["another program has held it", "is being graded by another process"])
def test_what_the_guide_says_is_printed_is_in_the_code(words: str) -> None:
    assert words in TEXT
    code = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (gradebook, grading))
    assert words in code


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", TEXT):
        assert (GUIDE.parent / target).exists(), target
