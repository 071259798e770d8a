"""Inputs -> answer -> observations -> verdict, the same in a notebook and in a grader.

A `Runner` turns an answer and an exercise's items into outcomes: `InProcess` in a notebook's own process, `Engine` in
workers. `judge` compares them with the outcomes of the reference, which the same runner produced, and names the
mistake that explains what failed. References, seeds and comparison never enter a worker.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from llmcourse import agreement, track, wire
from llmcourse.exercise import Exercise, Item, Mistake, Race, Rng, derive_seed
from llmcourse.racing import RaceResult
from llmcourse.services import Link
from llmcourse.wire import Data
from llmcourse.worker import UNSENDABLE, describe_error, parameters, perform, reset, switched_off
from llmcourse.zygote import HarnessFault

VERDICTS = ("right", "wrong", "crashed", "timed out", "inconclusive", "not attempted")


@dataclass(frozen=True)
class Outcome:
    """What one item gave: observations, or an error of a kind.

    error kinds: raised, not written, missing (no such name), died, timed out, protocol, interrupted, not run.
    seconds: as the answer's process says. cpu_seconds: of that process, read from outside; 0 where nobody read them.
    served_cpu_seconds: of the judge's process meanwhile, which serves what the case calls and receives what it gives.
    """

    observed: Data = None
    error: Mapping[str, Any] | None = None
    seconds: float = 0.0
    tried: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    counts: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    served_cpu_seconds: float = 0.0

    @property
    def kind(self) -> str:
        return "observed" if self.error is None else str(self.error["kind"])


@dataclass(frozen=True)
class CostResult:
    """One counted cost beside its bound; `agrees` is True where the system cannot count it (counted is None)."""

    name: str
    counted: float | None
    at_most: float | None
    authority: str
    agrees: bool


@dataclass(frozen=True)
class ItemResult:
    """How one item ended: `reason` in words for the learner, `complaint` the part of it that has no numbers."""

    item: Item
    outcome: Outcome
    agrees: bool
    reason: str | None = None
    complaint: str | None = None
    costs: tuple[CostResult, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The judgement of one exercise."""

    exercise: Exercise | None
    name: str
    points: float
    max_points: float
    verdict: str
    reason: str
    results: tuple[ItemResult, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    notes: tuple[str, ...] = ()
    seed: int | None = 0  # None where it is not to be told
    race: RaceResult | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: name, points, verdict, reason, mistake, cases and costs."""
        cases = [
            {"name": r.item.name, "agrees": r.agrees, "reason": r.reason}
            for r in self.results
            if r.item.kind == "case"
        ]
        costs = [
            {
                "name": c.name,
                "counted": c.counted,
                "at_most": c.at_most,
                "authority": c.authority,
                "agrees": c.agrees,
                "item": r.item.name,
            }
            for r in self.results
            for c in r.costs
        ]
        return {
            "name": self.name,
            "points": self.points,
            "max_points": self.max_points,
            "verdict": self.verdict,
            "reason": self.reason,
            "mistake": " / ".join(m.sentence for m in self.mistakes) or None,
            "cases": cases,
            "costs": costs,
            "race": None if self.race is None else self.race.to_json(),
            "notes": list(self.notes),
        }


class Runner(Protocol):
    """Runs answers. `ours` is an answer of the exercise's own file: the reference, a mistake, an alternative."""

    def ours(self, exercise: Exercise, name: str) -> Any: ...

    def run(
        self,
        exercise: Exercise,
        answer: Any,
        items: Sequence[Item],
        seed: int,
        expected: Mapping[str, Outcome] | None,
    ) -> dict[str, Outcome]: ...

    def race(self, exercise: Exercise, answer: Any, seed: int) -> RaceResult: ...


def limit_s(expected: Outcome | None) -> float:
    """Seconds an item may take: 2 + 20 times what the reference took in this run."""
    return 60.0 if expected is None else 2.0 + 20.0 * expected.seconds


def root(exercise: Exercise, item: Item) -> Item:
    """The case a chain of phases begins with: its seed makes the inputs of all."""
    return item if item.after is None else root(exercise, exercise.items[item.after])


def item_seed(exercise: Exercise, item: Item, seed: int) -> int:
    return derive_seed(seed, exercise.name, root(exercise, item).name)


def service_rng(exercise: Exercise, item: Item, seed: int) -> Rng:
    """What a service draws from: nothing that follows from the item's seed, which the answer's process has."""
    return Rng(derive_seed(seed, "service", exercise.name, root(exercise, item).name))


def service_for(exercise: Exercise, item: Item, seed: int, pid: int | None, folder: str | None = None) -> Any:
    """The item's service, None where it has none; it may watch the process `pid`, None for this one, from now on.

    seed: the run's own, which no worker is given; the same for reference and answer. folder: where that process
    writes its files, as it sees it.
    """
    if item.service is None:
        return None
    service: Any = item.service(service_rng(exercise, item, seed))
    if pid is not None and hasattr(service, "pid"):
        service.pid, service.folder = pid, folder
    if hasattr(service, "begin"):
        service.begin()
    return service


def answer_seed(exercise: Exercise, item: Item, seed: int, expected: Mapping[str, Outcome] | None) -> int:
    """Seed of an answer's own randomness: the reference, which runs before anything is expected, has another."""
    return derive_seed(seed, "reference" if expected is None else "answer", exercise.name, item.name)


def saved_by(item: Item, outcomes: Mapping[str, Outcome]) -> tuple[bool, Data]:
    """What the phase before `item` handed on: (whether it did, the data)."""
    before = outcomes[item.after].observed if item.after is not None and item.after in outcomes else None
    return (True, before["saved"]) if isinstance(before, dict) and "saved" in before else (False, None)


# ------------------------------------------------------------------------------------------------ in a notebook


class InProcess:
    """Runs answers in this process: quick, interruptible, and open to whatever the answer does."""

    def ours(self, exercise: Exercise, name: str) -> Any:
        if name == exercise.name:
            return exercise.reference
        wrong = exercise.mistakes.get(name)
        return wrong.function if wrong is not None else exercise.alternatives[name].function

    def run(
        self,
        exercise: Exercise,
        answer: Any,
        items: Sequence[Item],
        seed: int,
        expected: Mapping[str, Outcome] | None,
    ) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}
        with switched_off(exercise.forbid), own_garbage(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for item in items:
                if item.after is not None and not saved_by(item, outcomes)[0]:
                    outcomes[item.name] = Outcome(
                        error={"kind": "not run", "message": f"{item.after} saved nothing"}
                    )
                    continue
                try:
                    outcomes[item.name] = self._one(exercise, answer, item, seed, outcomes, expected)
                except KeyboardInterrupt:
                    outcomes[item.name] = Outcome(error={"kind": "interrupted", "message": "interrupted"})
                    break
        return outcomes

    def race(self, exercise: Exercise, answer: Any, seed: int) -> RaceResult:
        """Race a right answer against our own, everybody in this process."""
        with switched_off(exercise.forbid), kept_torch_state(seed):
            return track.in_process(exercise, answer, seed)

    def _one(
        self,
        exercise: Exercise,
        answer: Any,
        item: Item,
        seed: int,
        outcomes: dict[str, Outcome],
        expected: Mapping[str, Outcome] | None,
    ) -> Outcome:
        seeds = item_seed(exercise, item, seed), answer_seed(exercise, item, seed, expected)
        extra: list[Any] = [wire.copied(saved_by(item, outcomes)[1])] if item.after else []
        if exercise.ranks > 1:
            with kept_torch_state(seeds[1]):
                return self._ranks(exercise, answer, item, seeds)
        service = service_for(exercise, item, seed, None)
        if service is not None:
            extra.append(service)
        with kept_torch_state(seeds[1]):
            happened, observed = perform(
                item.function,
                answer,
                Rng(*seeds),
                extra=extra,
                mutates=exercise.mutates,
                labels=labels_of(answer),
            )
        return seen_by(service, received(happened, observed, {}))

    def _ranks(self, exercise: Exercise, answer: Any, item: Item, seeds: tuple[int, int]) -> Outcome:
        link = Link(exercise.ranks)
        gone = Outcome(error={"kind": "died", "message": "it ended its thread"})
        found = [gone] * exercise.ranks

        def one(rank: int) -> None:
            try:
                happened, observed = perform(
                    item.function,
                    answer,
                    Rng(*seeds),
                    extra=[link.view(rank)],
                    mutates=exercise.mutates,
                    labels=labels_of(answer),
                )
                found[rank] = received(happened, observed, {})
            finally:
                link.rank_ended(rank)

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(exercise.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return together(found, link)


def holds_answers(exercise: Exercise) -> bool:
    """Whether our answers are here; a kit (`llmcourse.kit`) has only what they gave, stored beside the exercise."""
    return next(exercise.path.parent.glob(f"{exercise.name}.*.observations"), None) is None


def runner_for(exercise: Exercise, seed: int) -> tuple[Runner, int]:
    """Who judges an answer in this process, and on which seed: in a kit one that is stored."""
    if holds_answers(exercise):
        return InProcess(), seed
    from llmcourse import observations

    runner = observations.stored(exercise, seed)
    return runner, runner.observations.seed


@contextlib.contextmanager
def own_garbage() -> Iterator[None]:
    """Collect garbage inside among what is made inside, and all of that at the end.

    A cost collects before it measures; looking through the objects that torch and the notebook hold already would
    take longer than the answer.
    """
    if gc.get_freeze_count():  # frozen by the program itself: not ours to thaw
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


@contextlib.contextmanager
def kept_torch_state(seed: int) -> Iterator[None]:
    """Reset what an answer may have set, and give a notebook its own settings back afterwards."""
    import random

    import numpy
    import torch

    threads, dtype, grad = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    device, precision = torch.get_default_device(), torch.get_float32_matmul_precision()
    deterministic, anomaly = torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled()
    torch_state, states = torch.get_rng_state(), (random.getstate(), numpy.random.get_state())
    reset(seed)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_float32_matmul_precision(precision)
        if torch.are_deterministic_algorithms_enabled() != deterministic:  # setting it imports the compiler
            torch.use_deterministic_algorithms(deterministic)
        torch.autograd.set_detect_anomaly(anomaly)
        torch.set_rng_state(torch_state)
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def labels_of(answer: Any) -> list[str]:
    """File name of the code an answer was defined in, so that a traceback's line can be named."""
    code = getattr(answer, "__code__", None)
    if code is None and isinstance(answer, type):
        code = next((f.__code__ for f in vars(answer).values() if hasattr(f, "__code__")), None)
    return [code.co_filename] if code is not None else []


def received(happened: Mapping[str, Any], observed: object, counts: Mapping[str, Any]) -> Outcome:
    """The outcome of an item that ran in this process, its observations copied as the wire would copy them."""
    try:
        return outcome_of(happened, wire.copied(observed), counts)
    except UNSENDABLE as error:
        return outcome_of({**happened, "error": describe_error(error, [])}, None, counts)


def seen_by(service: Any, outcome: Outcome) -> Outcome:
    """The outcome with what a service counted and, where it has `observed(data)`, what it saw for itself."""
    if service is None:
        return outcome
    if outcome.error is None and hasattr(service, "observed"):
        outcome = replace(outcome, observed=service.observed(outcome.observed))
    return replace(outcome, counts=service.counts())


def outcome_of(happened: Mapping[str, Any], observed: Data, counts: Mapping[str, Any]) -> Outcome:
    return Outcome(
        observed=observed,
        error=happened["error"],
        seconds=happened["seconds"],
        tried=tuple(happened["tried"]),
        changed=tuple(happened["changed"]),
        counts=counts,
    )


def together(outcomes: Sequence[Outcome], link: Link) -> Outcome:
    """One outcome of several ranks': the first error that is not just another rank's absence, or all observations."""
    failed = [o for o in outcomes if o.error is not None]
    if failed:
        own = [o for o in failed if o.error is not None and o.error.get("type") != "ConnectionError"]
        return replace((own or failed)[0], seconds=max(o.seconds for o in outcomes))
    return Outcome(
        observed={f"rank {rank}": outcome.observed for rank, outcome in enumerate(outcomes)},
        seconds=max(o.seconds for o in outcomes),
        tried=outcomes[0].tried,
        changed=tuple(name for o in outcomes for name in o.changed),
        counts=link.counts(),
    )


# ---------------------------------------------------------------------------------------------------- the verdict


def compare(exercise: Exercise, item: Item, outcome: Outcome, expected: Outcome) -> ItemResult:
    """How one item ended, beside the reference's outcome."""
    if outcome.error is not None:
        complaint = f"{outcome.kind} {outcome.error.get('type', '')}"
        return ItemResult(item, outcome, False, error_reason(exercise, outcome), complaint)
    if outcome.changed:
        names = " and ".join(f"`{name}`" for name in outcome.changed)
        change = f"your answer changed its argument {names}; work on a copy"
        return ItemResult(item, outcome, False, change, f"changed {names}")
    if item.kind == "cost":
        return compare_costs(item, outcome, expected)
    reason, likeness = disagreement(item, outcome.observed, expected.observed)
    return ItemResult(item, outcome, reason is None, reason, likeness)


def disagreement(item: Item, observed: Data, expected: Data) -> tuple[str | None, str | None]:
    """(reason, complaint) of a case, or (None, None)."""
    observed, expected = without_saved(observed), without_saved(expected)
    if item.judge is None:
        return agreement.difference(observed, expected, tol=item.tol), None
    shapes = not item.free_shapes
    if agreement.structure(observed, shapes=shapes) != agreement.structure(expected, shapes=shapes):
        return agreement.difference(observed, expected) or "the observations have another structure", None
    try:
        reason = item.judge(observed, expected)
    except Exception as error:  # noqa: BLE001 - a judge may fail in any way on odd data
        # A judge that fails on the reference's own observations is our fault; else the observations are odd.
        try:
            item.judge(expected, expected)
        except Exception:  # noqa: BLE001 - a judge may fail in any way on odd data
            raise HarnessFault(
                f"{item.name}: its judge fails on the reference's own observations: {error}"
            ) from error
        reason = "what came back cannot be judged: it lacks what every right answer has"
    return reason, reason


def without_saved(data: Data) -> Data:
    if isinstance(data, dict) and "saved" in data:
        return {key: part for key, part in data.items() if key != "saved"}
    return data


def costs_of(item: Item, outcome: Outcome) -> dict[str, tuple[float | None, float | None]]:
    """Counts of a cost, from the item and from its service: {name: (counted, at most)}."""
    counts: dict[str, tuple[float | None, float | None]] = {}
    observed = outcome.observed if isinstance(outcome.observed, dict) else {}
    ranks = all(key.startswith("rank ") and isinstance(part, dict) for key, part in observed.items())
    for part in observed.values() if ranks else [observed]:
        for name, value in part.items() if isinstance(part, dict) else ():
            if name == "observed":  # what the answer gave while it was counted: compared, not counted
                continue
            pair = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
            counted, at_most = _number(pair[0]), _number(pair[1])
            before = counts.get(name, (None, None))[0]
            # Of several ranks the dearest counts.
            counts[name] = (counted if before is None or counted is None else max(counted, before), at_most)
    for name, (counted, at_most) in outcome.counts.items():
        bound = at_most if at_most is not None else counts.get(name, (None, None))[1]
        counts[name] = (counted, bound)
    return counts


def _number(value: object) -> float | None:
    if not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def compare_costs(item: Item, outcome: Outcome, expected: Outcome) -> ItemResult:
    """Each count beside the bound of our own run; a count missing where ours exists fails."""
    ours, theirs = costs_of(item, expected), costs_of(item, outcome)
    results = []
    for name, (own_count, own_bound) in ours.items():
        bound = own_bound if own_bound is not None else own_count
        counted = theirs.get(name, (None, None))[0]
        if bound == float("inf"):  # shown, not scored
            bound = None
        agrees = bound is None or (counted is not None and counted <= bound)
        results.append(CostResult(name, counted, bound, item.authority, agrees))
    given = [
        outcome.observed.get("observed") if isinstance(outcome.observed, dict) else None
        for outcome in (outcome, expected)
    ]
    reason = agreement.difference(given[0], given[1])
    if reason is not None:
        return ItemResult(item, outcome, False, reason, "cost of another answer", tuple(results))
    bad = next((c for c in results if not c.agrees), None)
    if bad is None:
        return ItemResult(item, outcome, True, costs=tuple(results))
    found = "nothing that could be counted" if bad.counted is None else f"{bad.counted:,.6g}"
    reason = f"{bad.name}: at most {bad.at_most:,.6g}, found {found}"
    return ItemResult(item, outcome, False, reason, f"cost {bad.name}", tuple(results))


def _beside(counted: Data) -> Data:
    """What a cost's item observed of the answer while it was counted: an answer of nothing is cheap."""
    return counted.get("observed") if isinstance(counted, dict) else None


def error_reason(exercise: Exercise, outcome: Outcome) -> str:
    error = outcome.error
    assert error is not None
    kind, message = error["kind"], error.get("message", "")
    if kind == "raised":
        line = f" (line {error['line']} of your cell)" if error.get("line") else ""
        if error.get("type") == "TypeError" and error.get("signature"):
            expected, found = parameters(exercise.reference), list(error["signature"])
            if len(expected) != len(found):
                line += f"; expected parameters ({', '.join(expected)}), found ({', '.join(found)})"
        return f"your answer raised {error['type']}: {message}{line}"
    return {
        "not written": "not written yet",
        "missing": f"no `{exercise.name}` was found{message}",
        "died": f"your answer ended its process: {message}",
        "timed out": f"your answer was stopped: {message}",
        "protocol": f"your answer disturbed the connection: {message}",
        "interrupted": f"interrupted while this case ran; it had not returned{message and ''}",
        "not run": f"not run: {message}",
    }[kind]


def judge(
    runner: Runner,
    exercise: Exercise,
    answer: Any,
    seed: int,
    expected: Mapping[str, Outcome],
    *,
    naming: bool = True,
    racing: bool = True,
    results: Sequence[ItemResult] | None = None,
) -> Verdict:
    """Run every item on the answer, compare with the reference's outcomes, name the mistake, race it, give points.

    Only an answer that is right is raced, and only once its points for everything else stand. results: of items that
    were run already.
    """
    items = list(exercise.items.values())
    if results is None:
        results = compared(exercise, runner.run(exercise, answer, items, seed, expected), expected)
    failed = [result for result in results if not result.agrees]
    named: tuple[Mistake, ...] = ()
    if (
        naming
        and failed
        and not all(result.outcome.kind in ("not written", "missing", "not run") for result in failed)
    ):
        named = recognise(runner, exercise, results, seed, expected)
    verdict = verdict_of(exercise, results, named, seed, complete=len(results) == len(items))
    if exercise.race is None or not racing or verdict.verdict != "right":
        return verdict
    return raced(verdict, exercise.race, runner.race(exercise, answer, seed))


def compared(
    exercise: Exercise, outcomes: Mapping[str, Outcome], expected: Mapping[str, Outcome]
) -> tuple[ItemResult, ...]:
    """How each item that was run ended, in the exercise's order."""
    return tuple(
        compare(exercise, item, outcomes[item.name], expected[item.name])
        for item in exercise.items.values()
        if item.name in outcomes
    )


def raced(verdict: Verdict, race: Race, result: RaceResult) -> Verdict:
    """The verdict with its race: the race's share is kept by an answer that passed, or where nothing is scored."""
    if result.verdict in ("passed", "shown"):
        return replace(verdict, race=result)
    points = round(verdict.points - race.share * verdict.max_points, 6)
    word = "inconclusive" if result.verdict == "inconclusive" else verdict.verdict
    return replace(verdict, race=result, points=points, verdict=word, reason=f"{race.title} {result.reason}")


def verdict_of(
    exercise: Exercise, results: Sequence[ItemResult], named: Sequence[Mistake], seed: int, *, complete: bool
) -> Verdict:
    """Points and the word for them: correctness is all or nothing, shares for costs come on top only when right."""
    kinds = [result.outcome.kind for result in results]
    wrong = [result for result in results if result.item.kind == "case" and not result.agrees]
    dear = [result for result in results if result.item.kind == "cost" and not result.agrees]
    fatal = next(
        (result for result in results if result.outcome.kind in ("died", "protocol", "timed out")), None
    )
    points = 0.0
    if all(kind in ("not written", "missing", "not run") for kind in kinds):
        word, reason = (
            "not attempted",
            next((r.reason for r in results if r.reason), "not written yet"),
        )
    elif fatal is not None:
        word = "timed out" if fatal.outcome.kind == "timed out" else "crashed"
        reason = f"{fatal.item.title} {fatal.reason}"
    elif wrong or not complete:
        first = wrong[0] if wrong else results[-1]
        word, reason = "wrong", f"{first.item.title} {first.reason}"
    else:
        word = "right"
        reason = f"right, but dearer than it needs to be: {dear[0].reason}" if dear else "all cases agree"
        points = exercise.points * (1.0 - sum(result.item.share for result in dear))
    return Verdict(
        exercise,
        exercise.name,
        round(points, 6),
        exercise.points,
        word,
        reason,
        tuple(results),
        tuple(named),
        seed=seed,
    )


def expectations(runner: Runner, exercise: Exercise, seed: int) -> dict[str, Outcome]:
    """The reference's own outcomes; HarnessFault when it does not get through its own items."""
    reference = runner.ours(exercise, exercise.name)
    outcomes = runner.run(exercise, reference, list(exercise.items.values()), seed, None)
    for item in exercise.items.values():
        outcome = outcomes.get(item.name)
        if outcome is None or outcome.error is not None or outcome.changed:
            raise HarnessFault(
                f"{exercise.name}.{item.name}: the reference itself failed: {_failure(outcome)}"
            )
    return outcomes


def _failure(outcome: Outcome | None) -> str:
    if outcome is None:
        return "was not run"
    if outcome.error is None:
        return f"changed {' and '.join(outcome.changed)}"
    return f"{outcome.error.get('type', outcome.kind)}: {outcome.error.get('message', '')}"


def recognise(
    runner: Runner,
    exercise: Exercise,
    results: Sequence[ItemResult],
    seed: int,
    expected: Mapping[str, Outcome],
) -> tuple[Mistake, ...]:
    """Mistakes that best explain what failed: same data, then same complaint, then fewest other differences.

    A mistake must explain every failed case. Where no case failed it must explain every failed cost, and fail no case
    either: right values at too high a price are not a wrong value's fault. Best first: the cheapest items are run
    before the others, and only for mistakes that could still come out on top.
    """
    failed = {result.item.name: result for result in results if not result.agrees}
    wrong = {name for name, result in failed.items() if result.item.kind == "case"}
    must = wrong or set(failed)
    items = cheapest_first(exercise, expected)
    if wrong:  # what must be explained first: most mistakes are out after one item
        items.sort(key=lambda item: item.name not in must)
    mistakes = list(exercise.mistakes.values())
    # (complaints that are only alike, other differences), items left (the furthest first), which mistake
    open_: list[tuple[tuple[int, int], int, int]] = []
    left_of: list[list[Item]] = []
    for index, mistake in enumerate(mistakes):
        fails = mistake.fails
        tried = set(failed) if wrong or fails is None else fails | set(failed)
        left_of.append([item for item in items if fails is None or item.name in tried])
        if fails is None or must <= fails:
            others = 0 if fails is None or not wrong else len(fails - set(failed))
            open_.append(((0, others), len(left_of[-1]), index))
    heapq.heapify(open_)
    best: list[tuple[tuple[int, int], int]] = []
    while open_ and (not best or open_[0][0] == best[0][0]):
        (alike, others), left, index = heapq.heappop(open_)
        if left == 0:
            best.append(((alike, others), index))
            continue
        item = left_of[index][-left]
        answer = runner.ours(exercise, mistakes[index].name)
        theirs = runner.run(exercise, answer, with_earlier_phases(exercise, [item]), seed, expected)
        likeness = likeness_of(exercise, item, theirs.get(item.name), failed.get(item.name), expected)
        if likeness is not None or (item.name not in must and (wrong or item.kind == "cost")):
            rank = (alike + (likeness or 0), others + (likeness is None))
            heapq.heappush(open_, (rank, left - 1, index))
    return tuple(mistakes[index] for _, index in sorted(best, key=lambda found: found[1]))


def likeness_of(
    exercise: Exercise,
    item: Item,
    theirs: Outcome | None,
    failure: ItemResult | None,
    expected: Mapping[str, Outcome],
) -> int | None:
    """0 where a mistake does on an item as the answer did, 1 where only its complaint is the same, None elsewhere."""
    if theirs is None:  # it was stopped before this item
        return None
    if failure is not None:
        return explains(exercise, failure, theirs, expected[item.name])
    return 0 if compare(exercise, item, theirs, expected[item.name]).agrees else None


def cheapest_first(exercise: Exercise, expected: Mapping[str, Outcome]) -> list[Item]:
    """The items by what they and the phases before them took the reference."""

    def price_s(item: Item) -> float:
        return sum(expected[phase.name].seconds for phase in with_earlier_phases(exercise, [item]))

    return sorted(exercise.items.values(), key=price_s)


def with_earlier_phases(exercise: Exercise, items: Iterable[Item]) -> list[Item]:
    """The items and the phases they come after, in the exercise's order."""
    names: set[str] = set()
    for item in items:
        while True:
            names.add(item.name)
            if item.after is None:
                break
            item = exercise.items[item.after]
    return [item for item in exercise.items.values() if item.name in names]


def explains(exercise: Exercise, result: ItemResult, theirs: Outcome, expected: Outcome) -> int | None:
    """0 when a mistake gives the same data, 1 for the same complaint, None when it does not explain the failure."""
    compared = compare(exercise, result.item, theirs, expected)
    if compared.agrees:
        return None
    mine = result.outcome
    if mine.error is None and theirs.error is None and not mine.changed and not theirs.changed:
        if result.item.kind == "cost":
            same_counts = costs_of(result.item, mine) == costs_of(result.item, theirs)
            same = (
                same_counts and agreement.difference(_beside(mine.observed), _beside(theirs.observed)) is None
            )
            return 0 if same else _same(result, compared)
        observed, given = without_saved(mine.observed), without_saved(theirs.observed)
        if agreement.difference(observed, given, tol=result.item.tol) is None:
            return 0
    return _same(result, compared)


def _same(result: ItemResult, compared: ItemResult) -> int | None:
    return 1 if result.complaint is not None and result.complaint == compared.complaint else None


def harness_fault(error: BaseException) -> str:
    """One line for a fault of ours."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({last[0].filename}:{last[0].lineno})" if last else ""
    return f"{type(error).__name__}: {error}{place}"
