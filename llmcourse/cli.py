"""The `llmcourse` command.

Everything beyond typer and rich is imported by the command that needs it, so that `--help` answers at once.
Results go to stdout and are JSON with --json; errors are one line on stderr. Exit codes: 0 done, 1 not passed or
not possible, 2 a wrong command line or a notebook that cannot be judged, 3 a fault of the judge itself,
130 stopped by Ctrl-C.
"""

# ruff: noqa: E402 - what runs before the imports is meant to
from __future__ import annotations

import signal

# Until main() takes over, Ctrl-C ends the process, and Python does not print what it was importing.
_silent = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _silent:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

import llmcourse
from llmcourse import interrupts, workspace

if TYPE_CHECKING:
    from rich.table import Table

    from llmcourse.appraisal import Appraisal
    from llmcourse.checking import NotebookVerdict
    from llmcourse.exercise import Exercise
    from llmcourse.grading import Outcome as GradingOutcome
    from llmcourse.grading import Progress as GradingProgress
    from llmcourse.machine import Machine
    from llmcourse.standing import Standing
    from llmcourse.training import Progress

app = typer.Typer(
    name="llmcourse",
    help="A graded course on how the parameters of large language models are stored, loaded, trained and served.",
    epilog="Example: llmcourse lab",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
HARNESS_FAULT = 3
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # typer exports only classes derived from it
errors = Console(stderr=True, highlight=False, soft_wrap=True)


class UserError(Exception):
    """One line for the user: what was expected, what was found, what to do. `code` is the exit code."""

    def __init__(self, message: str, *, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit; the entry point of the installed `llmcourse`."""
    try:
        # With standalone_mode off, typer raises usage errors instead of printing a panel of several lines.
        code = app(args=arguments, prog_name="llmcourse", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # `llmcourse progress | head`: nobody reads on, and Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UsageError as error:
        _fail_on_usage(error)
    except (UserError, workspace.WorkspaceError) as error:
        _fail(str(error), code=getattr(error, "code", 1))
    if code == INTERRUPTED:  # typer, too, makes this of a KeyboardInterrupt
        _fail("stopped by Ctrl-C; what was finished is kept, nothing is half-written", code=INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _fail_on_usage(error: Any) -> NoReturn:
    message = error.format_message().rstrip(".")
    if not message:  # `llmcourse` alone has printed its help
        sys.exit(error.exit_code)
    command = error.ctx.command_path if error.ctx is not None else "llmcourse"
    _fail(f"{message}; see `{command} --help`", code=error.exit_code)


def _fail(message: str, *, code: int) -> NoReturn:
    line = " ".join(message.split())
    errors.print(f"llmcourse: {line}", markup=False)
    sys.exit(code)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1, ensure_ascii=False))


def _version(wanted: bool) -> None:
    if wanted:
        print(llmcourse.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


# -------------------------------------------------------------------------------------------------- studying


@app.command(epilog="Example: llmcourse doctor --model models/Qwen2.5-0.5B")
def doctor(
    as_json: AsJson = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again; a busy machine measures lower.")
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Say what this checkpoint is, costs, and whether it fits here."),
    ] = None,
) -> None:
    """Measure this computer (seconds, then remembered) and draw its roofline into the workspace."""
    appraised = None if model is None else _appraise(model)
    with errors.status("Measuring this computer …"):
        with interrupts.held():
            from llmcourse import machine

        probed = machine.probe(refresh)
    if appraised is not None:
        _print_appraisal(appraised, probed, as_json=as_json)
        return
    if as_json:
        _print_json(asdict(probed))
        return
    print(probed.describe())
    Console().print(_rates(probed))
    print(f"One thread reads {probed.read_bytes_per_s_one_thread / 1e9:.1f} GB/s.")
    _draw_roofline(probed)


def _rates(probed: Machine) -> Table:
    from rich.table import Table

    table = Table("device", "memory GiB", "reads GB/s", "dtype", "GFLOP/s", "ridge FLOP/byte", box=None)
    for device in probed.devices:
        memory = (device.name, f"{device.memory_bytes / 2**30:.1f}", f"{device.read_bytes_per_s / 1e9:.1f}")
        for dtype, flops_per_s in device.flops_per_s.items():
            ridge = probed.ridge(dtype, device=device.name)
            table.add_row(*memory, dtype, f"{flops_per_s / 1e9:,.0f}", f"{ridge:,.1f}")
            memory = ("", "", "")
    return table


def _appraise(folder: Path) -> Appraisal:
    with interrupts.held():
        from llmcourse import appraisal

    try:
        return appraisal.appraise(folder)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _print_appraisal(appraised: Appraisal, probed: Machine, *, as_json: bool) -> None:
    if as_json:
        content = asdict(appraised)
        content["parameters"]["total"] = appraised.parameters.total
        content["training"]["total_bytes"] = appraised.training.total_bytes
        _print_json(content | {"fits": [asdict(appraised.fit(device)) for device in probed.devices]})
        return
    count = len(appraised.files)
    stored = ", ".join(f"{values:,} in {dtype}" for dtype, values in appraised.stored_values.items())
    print(f"{appraised.folder}: {appraised.architecture} ({appraised.family})")
    print(f"{count} file{'s' * (count > 1)}, {_binary(appraised.stored_bytes)}: values {stored}")
    print(f"Trained for a context of {appraised.context_tokens:,} tokens")
    Console().print(_parameters(appraised))
    Console().print(_costs(appraised, probed))
    print("Room: cached tokens beside the weights, in all of a device's memory; activations come on top.")
    for device in probed.devices:
        if appraised.dtype == "float16" and "float16" not in device.flops_per_s:
            print(f"No fast float16 product on {device.name}: load the files in float32 or bfloat16 there.")


def _parameters(appraised: Appraisal) -> Table:
    from rich.table import Table

    table = Table("part", "parameters", "share", box=None)
    parts = asdict(appraised.parameters) | {"together": appraised.parameters.total}
    for part, count in parts.items():
        table.add_row(part, f"{count:,}", f"{count / appraised.parameters.total:.1%}")
    return table


def _costs(appraised: Appraisal, probed: Machine) -> Table:
    from rich.table import Table

    fits = [appraised.fit(device) for device in probed.devices]
    rooms = [f"room on {fit.device}, {_binary(fit.memory_bytes)}" for fit in fits]
    table = Table("weights in", "memory", "cache a token", *rooms, box=None)
    for each in appraised.serving:
        cells = [fit.cache_tokens[each.dtype] for fit in fits]
        shown = ["does not fit" if tokens is None else f"{tokens:,} tokens" for tokens in cells]
        cache = f"{each.cache_bytes_per_token:,} B ({each.cache_dtype})"
        table.add_row(each.dtype, _binary(each.weight_bytes), cache, *shown)
    trains = ["fits" if fit.trains else "does not fit" for fit in fits]
    training = appraised.training
    table.add_row(f"{training.dtype}, AdamW training", _binary(training.total_bytes), "", *trains)
    return table


def _binary(size_bytes: int) -> str:
    """A size in the largest unit that it has one of: 1536 is 1.5 KiB."""
    exponent = min(max(size_bytes.bit_length() - 1, 0) // 10, 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[exponent]
    return f"{size_bytes / 2 ** (10 * exponent):,.{min(exponent, 1)}f} {unit}"


def _draw_roofline(probed: Machine) -> None:
    from llmcourse import figures

    figure = figures.roofline(probed)
    if figure is None:  # figures are switched off where no one is looking
        return
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    path = workspace.folder() / "roofline.png"
    workspace.write(path, drawn.getvalue())
    print(f"Roofline: {path}")


@app.command(epilog="Example: llmcourse lab --no-browser --port 8899")
def lab(
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the server.")] = None,
) -> None:
    """Copy new lessons into your workspace and open it in JupyterLab."""
    import importlib.util

    if importlib.util.find_spec("jupyterlab") is None:
        raise UserError("expected JupyterLab, found none; install it with: pip install 'llmcourse[lab]'")
    prepared = workspace.prepare()
    work = workspace.folder()
    for path in prepared.offered:
        print(f"A newer version of a lesson lies beside yours: {path}")
    print(f"Your workspace: {work}", flush=True)
    os.environ["LLMCOURSE_WORKSPACE"] = str(work)
    # Becoming the server, instead of waiting for it, leaves Ctrl-C and its question to Jupyter alone.
    os.execv(sys.executable, _server_command(work, no_browser=no_browser, port=port))


def _server_command(work: Path, *, no_browser: bool, port: int | None) -> list[str]:
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={work}"]
    if no_browser:
        command.append("--no-browser")
    if port is not None:
        command += [f"--port={port}", "--ServerApp.port_retries=0"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    return command


@app.command(epilog="Example: llmcourse check work/01_parameter_loading/01_parameter_loading.ipynb --json")
def check(
    notebook: Annotated[
        Path, typer.Argument(metavar="NOTEBOOK", help="The file to judge.", show_default=False)
    ],
    as_json: AsJson = False,
    seed: Annotated[int | None, typer.Option(help="Repeat the inputs of an earlier run.")] = None,
) -> None:
    """Judge a notebook outside of it: each exercise's points, verdict and reason.

    Exits 0 when verdicts were reached, whatever the score, and 2 for a file that cannot be judged.
    """
    from llmcourse import submission
    from llmcourse.zygote import HarnessFault, Zygote

    try:
        read = submission.read(notebook)
    except submission.UnreadableNotebook as error:
        raise UserError(str(error), code=2) from error
    # Started before torch is imported here, so that both processes import it side by side.
    with Zygote() as zygote, errors.status(f"Judging {notebook.name} …"):
        gc.disable()  # torch makes a million objects and drops none of them: looking through them takes 0.3 s
        with interrupts.held():
            from llmcourse import checking, report

        gc.freeze()
        gc.enable()
        try:
            found = checking.check_notebook(read, seed=seed, zygote=zygote)
        except submission.UnreadableNotebook as error:
            raise UserError(str(error), code=2) from error
        except HarnessFault as error:
            raise UserError(
                f"the judge itself failed, so there is no verdict: {error}", code=HARNESS_FAULT
            ) from error
    _record_all(found, notebook)
    if as_json:
        _print_json(found.to_json())
    else:
        print(report.notebook_text(found))


def _record_all(found: NotebookVerdict, notebook: Path) -> None:
    place = notebook.resolve().parent
    notes: set[str] = set()
    for one in found.exercises:
        if one.verdict != "not attempted":
            topic = one.exercise.topic if one.exercise else None
            points = (one.points, one.max_points)
            if note := workspace.record(one.name, one.verdict, *points, lesson=topic, place=place):
                notes.add(note)
    for note in sorted(notes):
        errors.print(note, markup=False)


@app.command(epilog="Example: llmcourse hint read_header --level 2")
def hint(
    exercise: Annotated[str, typer.Argument(metavar="EXERCISE", help="Its name.", show_default=False)],
    level: Annotated[int, typer.Option(min=1, help="How many hints to unfold.")] = 1,
) -> None:
    """Unfold an exercise's hints: first the idea, then the line that usually goes wrong."""
    hints = _find_exercise(exercise).hints
    if not hints:
        raise UserError(
            f"expected hints for {exercise}, found none; read its statement again, then try `check`"
        )
    for number, text in enumerate(hints[:level], 1):
        print(f"{number}. {text}")
    if level < len(hints):
        print(f"One more: llmcourse hint {exercise} --level {level + 1}")


def _find_exercise(name: str) -> Exercise:
    try:
        with interrupts.held():
            from llmcourse import exercise

            return exercise.find(name)
    except KeyError as error:
        raise UserError(str(error.args[0])) from error


@app.command(epilog="Example: llmcourse reset 01_parameter_loading")
def reset(
    lesson: Annotated[
        str, typer.Argument(metavar="LESSON", help="Its name, topic or number: 01.", show_default=False)
    ],
) -> None:
    """Start a lesson afresh; your notebook is kept beside it under a dated name."""
    kept = workspace.reset(lesson)
    for path in kept:
        print(f"Kept: {path}")
    name = workspace.lesson_name(lesson)
    print(f"{'Fresh' if kept else 'Already fresh'}: {workspace.folder() / name}")


@app.command(epilog="Example: llmcourse interview 01 --minutes 20")
def interview(
    lesson: Annotated[
        str | None, typer.Argument(metavar="[LESSON]", help="Its name, topic or number: 01.")
    ] = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="Draw from all lessons instead.")] = False,
    minutes: Annotated[float, typer.Option(help="How long it may take.")] = 20,
    zh: Annotated[bool, typer.Option("--zh", help="Chinese questions and headings.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Draw the same again.")] = None,
    new: Annotated[bool, typer.Option("--new", help="Leave an unfinished one alone.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Report on the latest one instead.")] = False,
    end: Annotated[bool, typer.Option("--end", help="End the latest one, and report on it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a timed interview into your workspace, or go on with the unfinished one.

    Due revisits come first, then what you practised least. Open the notebook in JupyterLab; its second cell starts
    the clock.
    """
    from llmcourse import interview as interviews

    if report or end:
        found = interviews.report(end=end)
        _print_json(found.to_json()) if as_json else print(found)
        return
    taken = interviews.take(lesson, mixed=mixed, minutes=minutes, zh=zh, seed=seed, new=new)
    if as_json:
        _print_json(taken.to_json())
        return
    print(taken)
    print(
        "Open it in JupyterLab (`llmcourse lab`, folder interviews); the clock starts with its second cell."
    )


@app.command(epilog="Example: llmcourse progress --json")
def progress(
    as_json: AsJson = False,
    picture: Annotated[bool, typer.Option("--picture", help="Draw it into the workspace.")] = False,
) -> None:
    """Show the exercises you have tried: points, tries, best time in an interview, when a revisit is due."""
    from llmcourse import standing

    found, notes = standing.standings()
    for note in notes:
        errors.print(note, markup=False)
    if as_json:
        _print_json({one.name: one.to_json() for one in found})
    elif not found:
        print("Nothing tried yet. Open a lesson with `llmcourse lab` and run a check.")
    else:
        _print_progress(found)
    if picture:
        _draw_progress()


def _print_progress(found: list[Standing]) -> None:
    from rich.table import Table

    from llmcourse.standing import as_clock

    table = Table(box=None)
    table.add_column("exercise", no_wrap=True)
    for heading in ("points", "tries", "best time", "solved", "revisit"):
        table.add_column(heading)
    lesson = None
    for one in found:
        if one.lesson != lesson:
            lesson = one.lesson
            table.add_row(lesson)
        points = f"{one.best_points:g} / {one.max_points:g}"
        best = "" if one.best_time_s is None else as_clock(one.best_time_s)
        solved = (one.first_solved or one.last_verdict)[:10]
        revisit = "due" if one.is_due else (one.due or "")[:10]
        table.add_row(f"  {one.name}", points, str(one.attempts), best, solved, revisit)
    exercises = [one for one in found if one.kind == "exercise"]
    best_points = sum(one.best_points for one in exercises)
    at_most = sum(one.max_points for one in exercises)
    table.add_row("exercises together", f"{best_points:g} / {at_most:g}")
    Console().print(table)


def _draw_progress() -> None:
    from llmcourse import standing

    figure = standing.dashboard(workspace.folder())
    if figure is None:  # figures are switched off where no one is looking
        return
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    path = workspace.folder() / "progress.png"
    workspace.write(path, drawn.getvalue())
    errors.print(f"Picture: {path}", markup=False)


# ----------------------------------------------------------------------------------------- proving exercises


@app.command(epilog="Example: llmcourse audit parameter_loading --sample --json")
def audit(
    lessons: Annotated[
        list[str] | None, typer.Argument(metavar="[LESSON]…", help="All unless given.")
    ] = None,
    as_json: AsJson = False,
    every: Annotated[
        bool, typer.Option("--all/--sample", help="All mistakes and mutants, or a seeded sample.")
    ] = True,
    mutants: Annotated[int, typer.Option(min=1, help="In a sample, so many mistakes and mutants each.")] = 8,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds to try each answer on.")] = 3,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The first seed, to repeat an audit; drawn unless given.")
    ] = None,
    jailed: Annotated[
        bool, typer.Option("--jail", help="In the jail, as a class is judged; slower.")
    ] = False,
) -> None:
    """Prove the exercises: their wrong answers, lazy answers and mutants fail, their right answers pass.

    Exits 1 below 100 %.
    """
    from llmcourse.zygote import HarnessFault

    chosen = lessons or []
    try:
        with interrupts.held():
            from llmcourse import auditing

            auditing.exercises_of(chosen)
    except (KeyError, ValueError) as error:
        raise UserError(str(error.args[0]), code=2) from error
    try:
        with errors.status("Auditing …") as status:
            found = auditing.audit(
                chosen,
                mutants=None if every else mutants,
                seeds=seeds,
                seed=seed,
                jailed=jailed,
                progress=lambda name: status.update(f"Auditing {name} …"),
            )
    except HarnessFault as error:
        raise UserError(f"the judge itself failed: {error}", code=HARNESS_FAULT) from error
    if as_json:
        _print_json(found.to_json())
    else:
        print(found.text())
    if not found.complete:
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------ teaching a class


@app.command(epilog="Example: llmcourse grade 01_parameter_loading --csv grades.csv")
def grade(
    assignment: Annotated[
        str, typer.Argument(metavar="ASSIGNMENT", help="The lesson's folder name.", show_default=False)
    ],
    table: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write a row a student, a column an exercise."),
    ] = None,
    students: Annotated[
        list[str] | None, typer.Option("--student", metavar="STUDENT", help="Only this one; may be repeated.")
    ] = None,
    rerun: Annotated[bool, typer.Option("--rerun", help="Judge all again, on fresh inputs.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Judging processes; one a core.")] = None,
    dask: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Judge on this dask.distributed scheduler's workers."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Judge even where there is no jail for students' code.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Grade grading/submitted/STUDENT/ASSIGNMENT/ of the current folder into nbgrader's gradebook.

    Judges only what is new or changed, and goes on where it was stopped. Writes autograded notebooks and feedback.
    """
    import importlib.util

    if importlib.util.find_spec("nbgrader") is None:
        raise UserError("expected nbgrader, found none; install it with: pip install 'llmcourse[grading]'")
    with interrupts.held():
        from llmcourse import grading, intake, pools
        from llmcourse.gradebook import GradebookError
    gc.freeze()  # what is imported stays: looking through it would be each submission's
    course = grading.Course(Path.cwd())
    try:
        with pools.executor_of(dask) as executor, _grading_bar() as tell:
            found = grading.grade(
                course,
                assignment,
                students=students or [],
                rerun=rerun,
                workers=workers,
                insecure=insecure,
                executor=executor,
                tell=tell,
            )
    except (grading.GradingError, pools.PoolError, intake.IntakeError, GradebookError) as error:
        raise UserError(str(error)) from error
    if table is not None:
        workspace.write(table, grading.table(found).encode())
    if as_json:
        _print_json(found.to_json())
    else:
        _print_grades(found)
    for student, fault in found.failed.items():
        errors.print(f"{student} could not be judged: {fault}; run the same command again", markup=False)
    if found.failed:
        raise typer.Exit(HARNESS_FAULT)


@app.command(
    epilog="Example: llmcourse kit 01 --only read_header --only plan_load --points plan_load=5 --spoken 4"
)
def kit(
    lesson: Annotated[
        str,
        typer.Argument(
            metavar="LESSON", help="Its name, topic or number, or one under notebooks/.", show_default=False
        ),
    ],
    only: Annotated[list[str] | None, typer.Option(metavar="EXERCISE", help="Keep only these.")] = None,
    drop: Annotated[list[str] | None, typer.Option(metavar="EXERCISE", help="Leave these out.")] = None,
    points: Annotated[
        list[str] | None, typer.Option(metavar="EXERCISE=POINTS", help="What one is worth.")
    ] = None,
    add: Annotated[
        list[str] | None, typer.Option(metavar="EXERCISE", help="One of your own, of LLMCOURSE_LESSONS.")
    ] = None,
    spoken: Annotated[
        float | None, typer.Option(metavar="POINTS", help="Ask for the spoken answer; you grade it.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the assignment; the lesson's own unless given.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the notebook.")] = None,
    due: Annotated[datetime | None, typer.Option(help="When it is to be handed in.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many sets of inputs `check` has.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="ZIP", help="Where to; NAME-kit.zip.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier one.")] = False,
) -> None:
    """Pack what a class gets: the student notebook and a package without answers.

    With choices, your version is written to notebooks/NAME/NAME.ipynb first: it is what `llmcourse grade` goes by.
    """
    with interrupts.held():
        from llmcourse import kit as kits
        from llmcourse.zygote import HarnessFault
    shapes = any(given is not None for given in (only, drop, points, add, spoken, title, name))
    try:
        which, notes = lesson, []
        if shapes:
            chosen = kits.shape(
                lesson,
                name=name,
                only=only,
                drop=drop or (),
                points=_points(points or []),
                add=add or (),
                spoken=spoken,
                title=title,
            )
            print(f"Your version: {kits.write(chosen, force=force)}")
            which, notes = chosen.name, list(chosen.notes)
        with errors.status("Running our answers …") as status:
            packed = kits.pack(
                which,
                out,
                seeds=seeds,
                due=due,
                force=force,
                done=lambda finished, of: status.update(f"Running our answers … {finished} of {of}"),
            )
    except (kits.ShapeError, kits.KitError, HarnessFault) as error:
        raise UserError(str(error)) from error
    for note in [*notes, *packed.notes]:
        print(f"Note: {note}")
    print(f"{packed.path}: {len(packed.exercises)} exercises, {_binary(packed.size_bytes)}")


def _points(given: list[str]) -> dict[str, float]:
    """EXERCISE=POINTS as a dictionary."""
    points = {}
    for one in given:
        name, equals, number = one.partition("=")
        try:
            points[name] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise UserError(
                f"--points: expected EXERCISE=POINTS, such as read_header=4, found {one!r}", code=2
            )
    return points


@contextmanager
def _grading_bar() -> Iterator[Callable[[GradingProgress], None]]:
    """A bar of the submissions judged, from when the first is."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=errors, transient=True)
    task = bar.add_task("Judging …", total=None)

    def tell(now: GradingProgress) -> None:
        bar.start()
        again = f"{now.again} races again, one at a time …"
        bar.update(task, total=now.total, completed=now.done, description=again if now.again else "Judging …")

    try:
        yield tell
    finally:
        if bar.live.is_started:  # one that was never shown would leave an empty line
            bar.stop()


def _print_grades(found: GradingOutcome) -> None:
    from rich.table import Table

    shown = Table("student", "points", "of", "not right", box=None)
    for student, record in sorted(found.records.items()):
        words = Counter(
            one.verdict for one in record.exercises if one.verdict != "right" and one.name in found.worth
        )
        said = record.refused or ", ".join(f"{count} {word}" for word, count in sorted(words.items()))
        shown.add_row(escape(student), f"{found.total(record):g}", f"{found.max_points:g}", escape(said))
    Console().print(shown)
    for note in found.notes:
        print(f"Note: {note}")
    left = len(found.records) - found.judged
    print(
        f"{found.assignment}: {found.judged} judged {found.level}"
        + (f", {left} had been judged before" if left else "")
    )


# ------------------------------------------------------------------------------------------ training the zoo


@app.command(epilog="Example: llmcourse train draft --into my_draft --tokens 2000000")
def train(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="teacher, student or draft.", show_default=False)
    ],
    into: Annotated[
        Path | None, typer.Option(help="Folder for the files; the installed package's own unless given.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for the state, to go on from.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to see; the recipe's budget unless given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a model of the zoo on the corpus, or go on where it was stopped. Takes an hour or more.

    Ctrl-C saves first. To finish early, create the file begin_decay in the work folder.
    """
    with interrupts.held():
        from llmcourse import text, training, zoo

    try:
        into = zoo.folder(name) if into is None else into  # type: ignore[arg-type]  # refuses other names
        work = work or text.cache_folder() / "training" / name
        with _training_bar() as on_step:
            errors.print(f"State: {work}", markup=False)
            made = zoo.train(name, work, into, tokens=tokens, on_step=on_step)  # type: ignore[arg-type]
    except training.TrainingPaused as paused:
        message = f"{paused}; to go on, run the same command again"
        raise UserError(message, code=INTERRUPTED) from paused
    except (ValueError, OSError, FloatingPointError) as error:
        raise UserError(str(error)) from error
    if as_json:
        _print_json(asdict(made) | {"folder": str(into)})
        return
    print(f"{into}: {made.tokens:,} tokens, {made.tokens_per_parameter:.1f} per parameter")
    print(f"Held-out loss: {made.final_held_out:.3f} nats per token, {made.bits_per_byte:.3f} bits per byte")


@contextmanager
def _training_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar for a training that runs in the block, and a line for each of its evaluations."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bar(*columns, console=errors) as bar:
        task = bar.add_task("Reading the corpus …", total=None)

        def show(now: Progress) -> None:
            phase = "falling rate" if now.decaying else "training"
            shown = f"{phase}, loss {now.train_loss:.3f}, {now.tokens_per_s:,.0f} tokens/s"
            bar.update(task, total=now.total_steps, completed=now.step, description=shown)
            if now.evaluated:
                bar.print(f"{now.tokens:,} tokens: train {now.train_loss:.4f}, held-out {now.held_out:.4f}")

        yield show


if _silent:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    main()
