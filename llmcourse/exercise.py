"""What an exercise is: one file with a reference answer and, under it, what proves the checks of that answer.

    @exercise(points=3, minutes=10)
    def scale_rows(weight: Tensor) -> Tensor:        # name, signature, docstring: the statement a student sees
        '''...'''
        ### BEGIN SOLUTION
        ...                                          # the reference, removed from the student's copy
        ### END SOLUTION

    @case(scale_rows)                                # inputs -> answer -> observations, plain data
    def one_loud_row(answer, rng): ...

    @cost(scale_rows, share=1 / 6)                   # {name: (counted, at most)}
    def one_temporary(answer, rng): ...

    @mistake(scale_rows, "One scale serves every row.")
    def per_tensor(weight): ...

    @alternative(scale_rows, "Loops over the rows")
    def looped(weight): ...

The file's name is the exercise's. The decorators return what they were given, so the reference stays a plain
function or class. CONTRIBUTING.md walks through adding one; `llmcourse audit` proves it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmcourse.finding import LESSONS, exercise_paths

T = TypeVar("T")
MAX_COST_SHARE = 1 / 3
MAX_RACE_SHARE = 1 / 4
AUTHORITIES = ("worker", "protocol", "outside")


class Rng:
    """The inputs of one case: one stream for learner and reference, and `spawn` for an answer's own randomness.

    `seed` makes the inputs. `answer_seed` differs between learner and reference, so an answer that is given
    `spawn()` cannot be compared draw by draw, only by its law.
    """

    def __init__(self, seed: int, answer_seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._choices = random.Random(seed)
        self._answer_seed = answer_seed
        self._spawned = 0

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal values [*shape], drawn in float32 (float64 for float64) and then cast."""
        drawn = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(shape, generator=self.generator, dtype=drawn).to(dtype)

    def uniform(self, low: float, high: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform values in [low, high), [*shape]; without a shape a tensor of no dimensions."""
        return (torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low).to(
            dtype
        )

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers low..high, both included, [*shape]."""
        return torch.randint(low, high + 1, shape, generator=self.generator).to(dtype)

    def integer(self, low: int, high: int) -> int:
        """One integer low..high, both included."""
        return self._choices.randint(low, high)

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return self._choices.choice(options)

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """The items in another order."""
        found = list(items)
        self._choices.shuffle(found)
        return found

    def bytes(self, count: int) -> bytes:
        """`count` bytes."""
        return self._choices.randbytes(count)

    def spawn(self) -> torch.Generator:
        """A generator for the answer's own draws; another stream for learner and reference."""
        self._spawned += 1
        return torch.Generator().manual_seed(derive_seed(self._answer_seed, "spawn", self._spawned))


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the parts' text: the same on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def raised(call: Callable[..., object], *arguments: object, **options: object) -> str:
    """Name of the builtin exception a call raises, or of the builtin base of one; "nothing" when it returns.

    For a case that also observes a value (so that refusing everything fails). An answer that is not written yet
    (NotImplementedError) is not a refusal and goes through.
    """
    try:
        call(*arguments, **options)
    except Exception as error:  # noqa: BLE001 - whatever an answer raises is what is observed
        if isinstance(error, NotImplementedError) and not error.args:
            raise
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return "nothing"


@dataclass(frozen=True)
class Item:
    """One case or cost: a function `(answer, rng[, saved][, service]) -> observations | counts`.

    tol scales the float tolerance (`because` says why); `judge(observed, expected) -> None | reason` replaces the
    comparison; `after` names the case whose observation "saved" this one is given, in a process of its own.
    """

    name: str
    kind: str
    function: Callable[..., Any]
    tol: float = 1.0
    because: str = ""
    judge: Callable[[Any, Any], str | None] | None = None
    free_shapes: bool = False
    service: Callable[[Rng], Any] | None = None
    after: str | None = None
    share: float = 0.0
    authority: str = "worker"

    @property
    def title(self) -> str:
        """First line of the docstring: what is tried."""
        return (inspect.getdoc(self.function) or self.name.replace("_", " ")).splitlines()[0]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer people give, with the misconception in one sentence; `fails` names the items it can fail."""

    name: str
    sentence: str
    function: Callable[..., Any]
    fails: frozenset[str] | None = None


@dataclass(frozen=True)
class Alternative:
    """An unusual right answer; `meets_costs=False` where it is right and dearer than the bounds allow."""

    name: str
    sentence: str
    function: Callable[..., Any]
    meets_costs: bool = True


@dataclass(frozen=True)
class Race:
    """A comparison of speed, run once an answer is right: how it is set up, what it is fed, what must be beaten.

    function: `(answer, rng) -> run`, the setup, untimed, in each contender's own process; `run(x) -> output` is a lap.
    inputs: `(rng) -> x`, fresh for each lap, plain data. baseline: an answer in the exercise's shape that the
    reference beats. keeps: part of the reference's gain, in logarithms, that an answer must keep. judge as in a case.
    bytes_moved: bytes that the reference has to read in a lap, 0 where that says nothing.
    """

    name: str
    function: Callable[..., Callable[[Any], Any]]
    inputs: Callable[[Rng], Any]
    baseline: Callable[..., Any]
    share: float
    keeps: float
    tol: float = 1.0
    because: str = ""
    judge: Callable[[Any, Any], str | None] | None = None
    bytes_moved: int = 0

    @property
    def title(self) -> str:
        """First line of the docstring: what is raced."""
        return (inspect.getdoc(self.function) or self.name.replace("_", " ")).splitlines()[0]


@dataclass
class Exercise:
    """A reference answer with everything that proves its checks; built by the decorators, read by the judge."""

    name: str
    reference: Callable[..., Any]
    path: Path
    points: float
    minutes: int
    extension: bool = False
    hints: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    mutates: bool = False
    ranks: int = 1
    items: dict[str, Item] = field(default_factory=dict)
    mistakes: dict[str, Mistake] = field(default_factory=dict)
    alternatives: dict[str, Alternative] = field(default_factory=dict)
    excuses: dict[str, str] = field(default_factory=dict)
    race: Race | None = None

    @property
    def topic(self) -> str:
        """Folder of the exercise's file: the lesson's name without its number."""
        return self.path.parent.name

    @property
    def source(self) -> str:
        """Text of the exercise's file."""
        return self.path.read_text(encoding="utf-8")

    @property
    def cases(self) -> list[Item]:
        return [item for item in self.items.values() if item.kind == "case"]

    @property
    def costs(self) -> list[Item]:
        return [item for item in self.items.values() if item.kind == "cost"]

    @property
    def statement(self) -> str:
        """First paragraph of the reference's docstring."""
        return (inspect.getdoc(self.reference) or "").split("\n\n")[0]

    def check_new(self, name: str) -> None:
        """ValueError where a name is taken: in one file, the later definition would replace the earlier one."""
        races = [] if self.race is None else [self.race.name]
        if name in {self.name, *self.items, *self.mistakes, *self.alternatives, *races}:
            raise ValueError(f"{self.name}: two definitions are named {name!r}; rename one")

    def add(self, item: Item) -> None:
        """Register a case or cost; ValueError where it breaks a rule of the contract."""
        self.check_new(item.name)
        if item.tol != 1.0 and not item.because:
            raise ValueError(f"{self.name}.{item.name}: tol={item.tol} needs because='...' with its reason")
        if self.ranks > 1 and (item.after is not None or item.service is not None):
            raise ValueError(
                f"{self.name}.{item.name}: an exercise of {self.ranks} ranks takes neither after= nor service=; "
                "every rank gets a link"
            )
        if item.kind == "cost" and item.share <= 0:
            raise ValueError(
                f"{self.name}.{item.name}: share={item.share}; expected a part of the points above 0"
            )
        if item.after is not None and item.after not in {case.name for case in self.cases}:
            raise ValueError(
                f"{self.name}.{item.name}: comes after {item.after!r}, which is not a case above it"
            )
        if item.authority not in AUTHORITIES:
            raise ValueError(
                f"{self.name}.{item.name}: authority {item.authority!r}; expected one of {AUTHORITIES}"
            )
        shares = item.share + sum(other.share for other in self.items.values())
        if shares > MAX_COST_SHARE + 1e-9:
            raise ValueError(f"{self.name}: costs share {shares:.3f} of the points; at most 1/3 together")
        self.items[item.name] = item

    def add_race(self, race: Race) -> None:
        """Register the race; ValueError where it breaks a rule of the contract."""
        self.check_new(race.name)
        if self.race is not None:
            raise ValueError(f"{self.name}: a second race, {race.name}; expected one at most")
        if self.ranks > 1:
            raise ValueError(f"{self.name}: an exercise of {self.ranks} ranks has no race")
        if not 0 < race.share <= MAX_RACE_SHARE:
            raise ValueError(f"{self.name}.{race.name}: share={race.share}; expected above 0 and at most 1/4")
        if not 0 < race.keeps < 1:
            raise ValueError(f"{self.name}.{race.name}: keeps={race.keeps}; expected between 0 and 1")
        if race.tol != 1.0 and not race.because:
            raise ValueError(f"{self.name}.{race.name}: tol={race.tol} needs because='...' with its reason")
        self.race = race


F = TypeVar("F", bound=Callable[..., Any])


def exercise(
    *,
    points: float,
    minutes: int,
    extension: bool = False,
    hints: tuple[str, ...] = (),
    uses: tuple[Callable[..., Any], ...] = (),
    forbid: tuple[str, ...] = (),
    mutates: bool = False,
    ranks: int = 1,
) -> Callable[[F], F]:
    """Make a function or class the reference of an exercise of its name.

    points: in the notebook; minutes: a learner's; extension: ★, outside the lesson's 100 %; hints: unfolded one at a
    time by `hint(answer)`; uses: references of earlier exercises this answer may call; forbid: dotted names of
    library answers that are switched off ("torch.optim.AdamW"); mutates: the answer may change its arguments;
    ranks: how many processes run it together.
    """

    def register(reference: F) -> F:
        reference.__exercise__ = Exercise(  # type: ignore[attr-defined]
            name=reference.__name__,
            reference=reference,
            # Not through `inspect`: it finds no file for a class whose module a worker made from text.
            path=Path(sys._getframe(1).f_code.co_filename),
            points=points,
            minutes=minutes,
            extension=extension,
            hints=hints,
            uses=tuple(used.__name__ for used in uses),
            forbid=forbid,
            mutates=mutates,
            ranks=ranks,
        )
        return reference

    return register


def of(reference: Callable[..., Any]) -> Exercise:
    """The exercise a reference belongs to; TypeError for anything else."""
    # Of its own, not inherited: a subclass of a reference is another answer.
    found = getattr(reference, "__dict__", {}).get("__exercise__")
    if not isinstance(found, Exercise):
        raise TypeError(f"expected a reference decorated with @exercise, found {reference!r}")
    return found


def case(
    reference: Callable[..., Any],
    *,
    tol: float = 1.0,
    because: str = "",
    judge: Callable[[Any, Any], str | None] | None = None,
    free_shapes: bool = False,
    service: Callable[[Rng], Any] | None = None,
    after: Callable[..., Any] | None = None,
) -> Callable[[F], F]:
    """Add a case: `(answer, rng) -> observations`, plain data, never a verdict.

    judge: `(observed, expected) -> None | reason` instead of the comparison, with free_shapes also for tensors of
    other shapes; service: `service(rng)` lives in the judge's process, and the case gets a stand-in whose calls go
    there, as last argument (`llmcourse.services`); after: the case whose observation "saved"
    is handed on as third argument, in a fresh process; "saved" itself is never compared. Exercises
    of several ranks get a link as argument (`llmcourse.services.Link`).
    """

    def register(function: F) -> F:
        after_name = after.__name__ if after is not None else None
        of(reference).add(
            Item(
                function.__name__,
                "case",
                function,
                tol=tol,
                because=because,
                judge=judge,
                free_shapes=free_shapes,
                service=service,
                after=after_name,
            )
        )
        return function

    return register


def cost(
    reference: Callable[..., Any],
    *,
    share: float,
    authority: str = "worker",
    service: Callable[[Rng], Any] | None = None,
) -> Callable[[F], F]:
    """Add a cost: `(answer, rng) -> {name: (counted, at most)}`; `share` of the points when within its bounds.

    The bound is the one our own run gave. authority: "worker" (counted beside the answer: evidence), "protocol"
    (counted by a service in the judge's process) or "outside" (measured from the judge's process); services add
    their own `counts()`.
    """

    def register(function: F) -> F:
        of(reference).add(
            Item(function.__name__, "cost", function, share=share, authority=authority, service=service)
        )
        return function

    return register


def race(
    reference: Callable[..., Any],
    *,
    inputs: Callable[[Rng], Any],
    baseline: Callable[..., Any],
    share: float,
    keeps: float = 0.75,
    tol: float = 1.0,
    because: str = "",
    judge: Callable[[Any, Any], str | None] | None = None,
    bytes_moved: int = 0,
) -> Callable[[F], F]:
    """Add the race: `(answer, rng) -> run`; a right answer that is fast earns `share` of the points (at most 1/4).

    See `Race` for the arguments and `llmcourse.racing` for how it is run and when it is not scored.
    """

    def register(function: F) -> F:
        of(reference).add_race(
            Race(
                function.__name__, function, inputs, baseline, share, keeps, tol, because, judge, bytes_moved
            )
        )
        return function

    return register


def mistake(
    reference: Callable[..., Any], sentence: str, *, fails: Sequence[str] | None = None
) -> Callable[[F], F]:
    """Add a wrong answer people give; `sentence` is the misconception, as the report will name it.

    fails: the cases and costs it can fail, on any seed. Said where items are slow, it spares a check from trying the
    mistake on all of them; the audit holds it to what is seen.
    """

    def register(function: F) -> F:
        found = of(reference)
        found.check_new(function.__name__)
        found.mistakes[function.__name__] = Mistake(
            function.__name__, sentence, function, None if fails is None else frozenset(fails)
        )
        return function

    return register


def alternative(
    reference: Callable[..., Any], sentence: str, *, meets_costs: bool = True
) -> Callable[[F], F]:
    """Add an unusual right answer; `sentence` says what is unusual."""

    def register(function: F) -> F:
        found = of(reference)
        found.check_new(function.__name__)
        found.alternatives[function.__name__] = Alternative(
            function.__name__, sentence, function, meets_costs
        )
        return function

    return register


def excuse(reference: Callable[..., Any], mutant: str, reason: str) -> None:
    """Say why a mechanical mutant of the reference, by the name the audit prints, survives rightly."""
    of(reference).excuses[mutant] = reason


# ---------------------------------------------------------------------------------------------- finding exercises


def find(name: str) -> Exercise:
    """The exercise of that name; KeyError with the nearest names when there is none."""
    return find_all([name])[0]


def find_all(names: Sequence[str]) -> list[Exercise]:
    """The exercises of those names; KeyError as for one."""
    paths = exercise_paths()
    for name in names:
        if name not in paths:
            import difflib

            near = difflib.get_close_matches(name, paths, n=3) or sorted(paths)
            raise KeyError(f"no exercise is named {name!r}; did you mean {', '.join(near)}?")
    return [load(paths[name]) for name in names]


@functools.cache
def load(path: Path) -> Exercise:
    """The exercise of a file; ValueError when the file does not define one of its own name."""
    module = _module(path)
    reference = getattr(module, path.stem, None)
    if reference is None or "__exercise__" not in getattr(reference, "__dict__", {}):
        raise ValueError(
            f"{path}: expected `@exercise(...)` on a function or class named {path.stem}; found none"
        )
    found = of(reference)
    if not found.cases:
        raise ValueError(f"{path}: the exercise has no @case; nothing would be checked")
    return found


def _module(path: Path) -> ModuleType:
    if path.is_relative_to(LESSONS):
        return importlib.import_module(f"llmcourse.lessons.{path.parent.name}.{path.stem}")
    name = f"llmcourse_lessons_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
