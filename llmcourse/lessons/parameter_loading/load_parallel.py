"""Read the shards of a checkpoint several at a time, with one result whatever the timing."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, as_completed, wait
from typing import Any

import torch
from torch import Tensor

from llmcourse.exercise import Rng, alternative, case, cost, exercise, mistake


@exercise(
    points=4,
    minutes=12,
    mutates=True,
    hints=(
        "A pool of threads that take the next shard when they are free; its results are looked at in the order "
        "of `shards`, not of arrival, and `into` is touched once, at the end.",
        "An error inside a pool is kept until somebody asks for the result. Leaving a `with ThreadPoolExecutor` "
        "block waits for every read that was handed in, begun or not, unless it was cancelled.",
    ),
)
def load_parallel(
    read: Callable[[str], dict[str, Tensor]],
    shards: Sequence[str],
    workers: int,
    into: dict[str, Tensor],
) -> int:
    """Read every shard of a checkpoint, `workers` of them at a time, and put the
    tensors into `into`.

    Returns how many bytes the tensors have.

    `read(shard)` gives the tensors of one shard by name. It takes a while, for some
    shards far longer than for others, and may be called from several threads. Call it
    once for each shard (distinct, perhaps none; `workers` is at least 1): begin in the
    order of `shards`, and begin the next one as soon as one of the workers is free.

    What comes out is the same for any number of workers and any order in which reads
    end. Names new to `into` are added in the order of `shards`, those of a shard in the
    order of its dict; names it has already are replaced and keep their places. It gets
    the very tensors that `read` gave, of whatever dtype, and old ones are not written
    to. `into` changes only after the last read has ended, and not at all when something
    is raised:

    - RuntimeError when `read` raises an Exception of any kind: the message names that
      shard and no other, and `__cause__` is what `read` raised. Of several shards that
      fail, the first in the order of `shards`. Reads under way are waited for; after a
      failure at most `workers` more begin.
    - ValueError when two shards hold a tensor of the same name: the message names the
      tensor and both shards, and nothing else. (Both at once do not occur.)

    About 15 lines.
    """
    ### BEGIN SOLUTION
    with ThreadPoolExecutor(workers) as pool:
        reads = {shard: pool.submit(read, shard) for shard in shards}
        wait(reads.values(), return_when=FIRST_EXCEPTION)
        for future in reads.values():
            future.cancel()  # leaves those alone that have begun: the pool waits for them

    loaded: dict[str, Tensor] = {}
    holder: dict[str, str] = {}
    # Reads begin in this order: a cancelled one comes after the one that failed.
    for shard, future in reads.items():
        error = future.exception()
        if error is not None:
            raise RuntimeError(f"{shard} could not be read: {error}") from error
        for name, tensor in future.result().items():
            if name in holder:
                raise ValueError(f"{name} is in {holder[name]} and in {shard}; one of them must go")
            holder[name] = shard
            loaded[name] = tensor
    into.update(loaded)
    return sum(tensor.nbytes for tensor in loaded.values())
    ### END SOLUTION


# ------------------------------------------------------------------------------------------------ a slow storage

# How many turns of the scheduler may pass without a new call before the clock of `Storage` moves on: few where no
# right answer has anything more to ask, more where it is about to. Turns and not seconds, for on a busy machine, or
# one that stood still, whoever counts them waits as long for each as the answer's threads wait to go on.
TURN_S = 0.001
SOON, FAILED, LATER = 2, 12, 32


class Storage:
    """Shards whose reads take a stated number of ticks on a logical clock, not of seconds.

    The clock stands still while calls come in, and moves to the end of the next read when none has come for a
    while. held: tensors of each shard; ticks: how long each read takes; errors: what a read raises at its end.
    """

    calls = ("read",)

    def __init__(
        self,
        held: Mapping[str, dict[str, Tensor]],
        ticks: Sequence[int],
        workers: int,
        errors: Mapping[int, Exception] | None = None,
    ) -> None:
        self.shards, self.workers = list(held), workers
        self.attributes = {"shards": self.shards, "workers": workers}
        self._held, self._ticks = held, dict(zip(held, ticks, strict=True))
        self._errors = {self.shards[index]: error for index, error in (errors or {}).items()}
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []
        self._begun: Counter[str] = Counter()
        self._now = self._events = self._most = self._begun_after_failure = 0
        self._failed = False

    def read(self, shard: str) -> dict[str, Tensor]:
        """Tensors of a shard, when its ticks have passed; what `errors` says for it instead."""
        with self._changed:
            if shard not in self._held:
                raise FileNotFoundError(f"no shard is named {shard!r}")
            self._begun[shard] += 1
            self._begun_after_failure += self._failed
            end = (self._now + self._ticks[shard], self._begun.total())
            self._waiting.append(end)
            self._most = max(self._most, len(self._waiting))
            self._tell()
            self._wait_for(end)
            self._now = end[0]
            self._waiting.remove(end)
            self._failed = self._failed or shard in self._errors
            self._tell()
        if shard in self._errors:
            raise self._errors[shard]
        return self._held[shard]

    def observed(self, observed: Any) -> Any:
        """What the case saw and what was seen here: reads under way together, how often each shard was read."""
        if not isinstance(observed, dict) or self._errors or "observed" in observed:
            return observed
        reads = [self._begun[shard] for shard in self.shards]
        return {**observed, "reads at once": self._most, "reads of each": reads}

    def counts(self) -> dict[str, tuple[float | None, float | None]]:
        """Ticks beside what any order of work on `workers` may take (Graham 1966), and what was read how often."""
        ticks, workers = self._ticks.values(), self.workers
        counted: dict[str, tuple[float | None, float | None]] = {
            "reads at once": (self._most, workers),
            "reads of one shard": (max(self._begun.values(), default=0), 1),
        }
        if self._errors:
            return counted | {"reads begun after a failure": (self._begun_after_failure, workers)}
        at_most = sum(ticks) / workers + (workers - 1) / workers * max(ticks)
        return counted | {
            "shards never read": (len(self._held) - len(self._begun), 0),
            "ticks until the last read ended": (self._now, at_most),
        }

    def _tell(self) -> None:
        self._events += 1
        self._changed.notify_all()

    def _wait_for(self, end: tuple[int, int]) -> None:
        """Wait until this read is the next to end and nothing has happened for a while."""
        turns, events = 0, self._events
        while end != min(self._waiting) or turns < self._patience():
            self._changed.wait(TURN_S if end == min(self._waiting) else None)
            turns = turns + 1 if events == self._events else 0
            events = self._events

    def _patience(self) -> int:
        """Turns to wait with the reads that are under way now."""
        busy = len(self._waiting) >= self.workers
        if self._failed:
            return FAILED if busy else SOON
        return SOON if busy or len(self._begun) == len(self._held) else LATER


def checkpoint(rng: Rng, count: int) -> dict[str, dict[str, Tensor]]:
    """Shards in no order of their names, each with one to three small tensors."""
    tensors = iter(
        rng.shuffled(f"block_{a}{b}{c}.weight" for a in "abcdefgh" for b in "stuvwxyz" for c in "kmpq")
    )
    codes = rng.shuffled(a + b + c for a in "bcdf" for b in "aeiou" for c in "lmnr")[:count]
    return {
        f"part-{code}.safetensors": {next(tensors): rng.normal(2, 3) for _ in range(rng.integer(1, 3))}
        for code in codes
    }


def any_error(rng: Rng) -> Exception:
    """What reading a file may raise."""
    return rng.choice([OSError, ValueError, EOFError, KeyError])("unreadable")


def rare_error(rng: Rng) -> Exception:
    """What reading a file raises as well, now and then."""
    return rng.choice([MemoryError, AttributeError, ZeroDivisionError, AssertionError])("unreadable")


def slow_first(rng: Rng) -> Storage:
    """The first shard takes longer than the others together."""
    ticks = [40, *(rng.integer(2, 6) for _ in range(5))]
    return Storage(checkpoint(rng, 6), ticks, workers=rng.integer(3, 4))


def failing_last(rng: Rng) -> Storage:
    """The last shard cannot be read."""
    ticks = [rng.integer(2, 6) for _ in range(6)]
    return Storage(checkpoint(rng, 6), ticks, rng.integer(2, 3), {5: any_error(rng)})


def failing_twice(rng: Rng) -> Storage:
    """Two shards cannot be read; the first of them fails last."""
    ticks = [rng.integer(2, 4), 40, *(rng.integer(2, 4) for _ in range(4))]
    return Storage(checkpoint(rng, 6), ticks, rng.integer(2, 3), {1: rare_error(rng), 3: any_error(rng)})


def many_workers(rng: Rng) -> Storage:
    """More workers than a processor has cores, and more shards than workers."""
    workers = rng.integer(34, 36)
    ticks = [rng.integer(2, 3) for _ in range(workers + rng.integer(2, 4))]
    return Storage(checkpoint(rng, len(ticks)), ticks, workers)


def twice_the_same_name(rng: Rng) -> Storage:
    """Two shards hold a tensor of one name; the later one is read first."""
    held = checkpoint(rng, 6)
    shards = list(held)
    held[shards[rng.integer(2, 5)]][next(iter(held[shards[0]]))] = rng.normal(2, 3)
    return Storage(held, [40, *(rng.integer(2, 6) for _ in range(5))], workers=2)


def uneven(rng: Rng) -> Storage:
    """Two long reads, which equal runs, every n-th shard and rounds of `workers` all put one after the other.

    A third, shorter one costs rounds some more and every n-th shard nothing, so that the two can be told apart.
    """
    workers = rng.integer(2, 3)
    ticks = [rng.integer(1, 2) for _ in range(4 * workers)]
    ticks[0], ticks[workers], ticks[2 * workers + 1] = rng.integer(30, 40), rng.integer(30, 40), 10
    return Storage(checkpoint(rng, len(ticks)), ticks, workers)


def failing_early(rng: Rng) -> Storage:
    """The second of many shards cannot be read, while the first takes long."""
    workers = rng.integer(2, 3)
    ticks = [40, *(rng.integer(2, 4) for _ in range(6 * workers))]
    return Storage(checkpoint(rng, len(ticks)), ticks, workers, {1: any_error(rng)})


# ---------------------------------------------------------------------------------------------------------- cases


def before(rng: Rng, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """What `into` holds before anything is loaded: a tensor of another name, and old values for the names."""
    return {**{name: rng.normal(2, 3) for name in names}, "optimizer.step": rng.normal(1)}


def loads(
    answer: Callable[..., int],
    read: Callable[[str], dict[str, Tensor]],
    shards: Sequence[str],
    workers: int,
    into: dict[str, Tensor],
    names: Iterable[str] = (),
) -> dict[str, object]:
    """What came of a load: `into` in its order, whether reads saw it change, what was returned or raised.

    Of an error its kind, that of its cause, and which of the shards and names its message has.
    """
    kept = {name: id(tensor) for name, tensor in into.items()}
    changed: list[bool] = []
    begun: list[str] = []
    ended_reads: list[str] = []

    def watched(shard: str) -> dict[str, Tensor]:
        begun.append(shard)
        changed.append({name: id(tensor) for name, tensor in into.items()} != kept)
        try:
            return read(shard)
        finally:
            changed.append({name: id(tensor) for name, tensor in into.items()} != kept)
            ended_reads.append(shard)

    try:
        ended: dict[str, object] = {"returned": answer(watched, list(shards), workers, into)}
    except NotImplementedError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever an answer raises is what is observed
        named = [name for name in [*shards, *names] if name in str(error)]
        cause = type(error.__cause__).__name__
        ended = {"raised": type(error).__name__, "cause": cause, "its message names": named}
    still_reading = len(begun) - len(ended_reads)
    return {
        "into": list(into.items()),
        "changed while reading": any(changed),
        "reads that go on afterwards": still_reading,
        "ended": ended,
    }


def loads_at_once(
    answer: Callable[..., int],
    held: dict[str, dict[str, Tensor]],
    workers: int,
    into: dict[str, Tensor],
    names: Iterable[str] = (),
) -> dict[str, object]:
    """What came of a load whose reads take no time; `into` by name, since nothing says which read ends first.

    Also the names that were first in `into` and are, the old tensors' values, which tensors are those that were read,
    and with one worker the order of the reads.
    """
    first, old, begun = list(into), list(into.values()), []

    def read(shard: str) -> dict[str, Tensor]:
        begun.append(shard)
        return held[shard]

    observed = loads(answer, read, list(held), workers, into, names)
    given = {id(tensor) for tensors in held.values() for tensor in tensors.values()}
    return {
        "into": dict(sorted(into.items())),
        "ended": observed["ended"],
        "first": list(into)[: len(first)],
        "old tensors": old,
        "given by read": sorted(name for name, tensor in into.items() if id(tensor) in given),
        "order of reads": begun if workers == 1 else [],
    }


@case(load_parallel)
def any_number_of_workers(answer, rng):
    """One worker, a few, and more than there are shards."""
    held = checkpoint(rng, 5)
    replaced = rng.choice([name for tensors in held.values() for name in tensors])
    observed = {}
    for workers in (1, rng.integer(2, 4), 9):
        into = before(rng, [replaced])
        observed[f"{workers} workers"] = loads_at_once(answer, held, workers, into)
    kinds = [
        rng.normal(5, 4)[:, 1:3],
        rng.normal(3).to(torch.bfloat16),
        rng.integers(-9, 9, 2, 2, dtype=torch.int8),
        rng.normal(),
        rng.normal(6, dtype=torch.float64)[::2],
        torch.zeros(0, 3),
        rng.normal(2, 3).T,
    ]
    several = {f"part-{i}": {f"tensor_{i}": kind} for i, kind in enumerate(rng.shuffled(kinds))}
    observed["several dtypes"] = loads_at_once(
        answer, {**several, "part-empty": {}}, 2, before(rng, ["tensor_0"])
    )
    return {**observed, "no shards": loads_at_once(answer, {}, 2, before(rng))}


@case(load_parallel, service=slow_first)
def first_shard_ends_last(answer, rng, storage):
    """The first shard takes longer than all others together."""
    return loads(answer, storage.read, storage.shards, storage.workers, before(rng))


@case(load_parallel, service=many_workers)
def as_many_as_workers(answer, rng, storage):
    """Some thirty-five workers: as many reads are under way at a time."""
    return loads(answer, storage.read, storage.shards, storage.workers, before(rng))


@case(load_parallel, service=failing_last)
def last_shard_fails(answer, rng, storage):
    """Everything has been read but the last shard, which cannot be; then another checkpoint is loaded."""
    observed = loads(answer, storage.read, storage.shards, storage.workers, before(rng))
    return {
        **observed,
        "another": loads_at_once(answer, checkpoint(rng, 3), 2, before(rng)),
    }


@case(load_parallel, service=failing_twice)
def two_shards_fail(answer, rng, storage):
    """Two shards cannot be read, and the second of them fails first; then another checkpoint is loaded."""
    observed = loads(answer, storage.read, storage.shards, storage.workers, before(rng))
    return {**observed, "another": loads_at_once(answer, checkpoint(rng, 3), 2, before(rng))}


@case(load_parallel, service=twice_the_same_name)
def one_name_in_two_shards(answer, rng, storage):
    """A tensor's name is in two shards, of which the later is read first; then another checkpoint is loaded."""
    names: dict[str, str] = {}

    def read(shard: str) -> dict[str, Tensor]:
        tensors = storage.read(shard)
        names.update(dict.fromkeys(tensors, ""))
        return tensors

    observed = loads(answer, read, storage.shards, storage.workers, before(rng), names)
    held = checkpoint(rng, 4)
    name, tensor = next(iter(held[min(held)].items()))
    held[max(held)][name] = tensor.clone()  # of equal values, and still twice
    equal = loads_at_once(answer, held, 1, before(rng), {n for tensors in held.values() for n in tensors})
    return {
        **observed,
        "of equal values": equal,
        "another": loads_at_once(answer, checkpoint(rng, 3), 2, before(rng)),
    }


@cost(load_parallel, share=1 / 6, authority="protocol", service=uneven)
def work_is_pulled(answer, rng, storage):
    """Two of the shards take far longer than the others."""
    return {"observed": loads(answer, storage.read, storage.shards, storage.workers, before(rng))}


@cost(load_parallel, share=1 / 6, authority="protocol", service=failing_early)
def failure_stops_reading(answer, rng, storage):
    """The second of many shards cannot be read."""
    return {"observed": loads(answer, storage.read, storage.shards, storage.workers, before(rng))}


# ------------------------------------------------------------------------------------------------------- mistakes


def put(into: dict[str, Tensor], tensors: dict[str, Tensor]) -> int:
    into.update(tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


def merged(shards: Sequence[str], loaded: Mapping[str, dict[str, Tensor] | Exception]) -> dict[str, Tensor]:
    """All tensors in the order of the shards; raises as the exercise says."""
    holder: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        found = loaded[shard]
        if isinstance(found, Exception):
            raise RuntimeError(f"reading {shard} failed") from found
        for name, tensor in found.items():
            if holder.setdefault(name, shard) != shard:
                raise ValueError(f"{name} is in {holder[name]} and {shard}")
            tensors[name] = tensor
    return tensors


def attempt(read: Callable[[str], dict[str, Tensor]], shard: str) -> dict[str, Tensor] | Exception:
    """What a read gave or raised."""
    try:
        return read(shard)
    except Exception as error:  # noqa: BLE001 - whatever a read raises belongs into the report
        return error


@mistake(
    load_parallel,
    "Everything is read one after the other; only what is in memory is shared out to threads.",
    fails=[
        "first_shard_ends_last",
        "one_name_in_two_shards",
        "work_is_pulled",
        "any_number_of_workers",
        "as_many_as_workers",
    ],
)
def read_then_split(read, shards, workers, into):
    loaded: dict[str, dict[str, Tensor] | Exception] = {}
    for shard in shards:
        loaded[shard] = attempt(read, shard)
        if isinstance(loaded[shard], Exception):
            break
    tensors = merged(shards, loaded)
    with ThreadPoolExecutor(workers) as pool:
        placed = pool.map(torch.Tensor.contiguous, tensors.values())
    return put(into, dict(zip(tensors, placed, strict=True)))


@mistake(
    load_parallel,
    "Every shard gets a thread of its own, however many there are.",
    fails=[
        "first_shard_ends_last",
        "one_name_in_two_shards",
        "work_is_pulled",
        "failure_stops_reading",
        "as_many_as_workers",
    ],
)
def thread_per_shard(read, shards, workers, into):
    return load_by_pool(read, shards, max(len(shards), 1), into)


def ended(future: Future[dict[str, Tensor]]) -> dict[str, Tensor] | Exception:
    """What the read of a future gave or raised."""
    return attempt(lambda _: future.result(), "")


def load_by_pool(read, shards, workers, into):
    with ThreadPoolExecutor(workers) as pool:
        futures = {shard: pool.submit(read, shard) for shard in shards}
        wait(futures.values(), return_when=FIRST_EXCEPTION)
        for future in futures.values():
            future.cancel()
    return put(
        into,
        merged(shards, {s: ended(f) for s, f in futures.items() if not f.cancelled()}),
    )


def load_otherwise(read, shards, workers, into, *, put=put):
    """A right load, but for how what was read is put into `into`."""
    loaded: dict[str, Tensor] = {}
    load_by_pool(read, shards, workers, loaded)
    return put(into, loaded)


@mistake(
    load_parallel,
    "However many workers are asked for, no more than 32 threads are begun.",
    fails=["as_many_as_workers"],
)
def at_most_32_threads(read, shards, workers, into):
    return load_by_pool(read, shards, min(workers, 32), into)


@mistake(
    load_parallel,
    "Shards are read in the order of their names.",
    fails=["any_number_of_workers", "last_shard_fails", "two_shards_fail", "one_name_in_two_shards"],
)
def sorted_before_reading(read, shards, workers, into):
    with ThreadPoolExecutor(workers) as pool:
        futures = {shard: pool.submit(read, shard) for shard in sorted(shards)}
        wait(futures.values(), return_when=FIRST_EXCEPTION)
        for future in futures.values():
            future.cancel()
    return put(into, merged(shards, {s: {} if f.cancelled() else ended(f) for s, f in futures.items()}))


@mistake(
    load_parallel,
    "Bytes are counted at 4 a value, whatever the dtype.",
    fails=["any_number_of_workers"],
)
def four_bytes_a_value(read, shards, workers, into):
    def counted(into, tensors):
        into.update(tensors)
        return 4 * sum(tensor.numel() for tensor in tensors.values())

    return load_otherwise(read, shards, workers, into, put=counted)


@mistake(
    load_parallel,
    "Bytes are counted by storage: those of a view are not the tensor's.",
    fails=["any_number_of_workers"],
)
def bytes_of_storages(read, shards, workers, into):
    def counted(into, tensors):
        into.update(tensors)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())

    return load_otherwise(read, shards, workers, into, put=counted)


@mistake(
    load_parallel,
    "Copies what was read, so that the checkpoint is in memory twice.",
    fails=["any_number_of_workers", "last_shard_fails", "two_shards_fail", "one_name_in_two_shards"],
)
def copied_once_more(read, shards, workers, into):
    def copied(into, tensors):
        return put(into, {name: tensor.clone() for name, tensor in tensors.items()})

    return load_otherwise(read, shards, workers, into, put=copied)


@mistake(
    load_parallel,
    "Writes the new values into the old tensors, where their shape is the same.",
    fails=["any_number_of_workers"],
)
def written_into_old_tensors(read, shards, workers, into):
    def written(into, tensors):
        for name, tensor in tensors.items():
            if name in into:
                into[name].resize_(tensor.shape).copy_(tensor)
        return put(into, {name: tensor for name, tensor in tensors.items() if name not in into}) + sum(
            tensor.nbytes for name, tensor in tensors.items() if name in into and into[name] is not tensor
        )

    return load_otherwise(read, shards, workers, into, put=written)


@mistake(
    load_parallel,
    "Takes replaced names out and puts them in again, at the end.",
    fails=["any_number_of_workers"],
)
def replaced_at_the_end(read, shards, workers, into):
    def moved(into, tensors):
        for name in tensors:
            into.pop(name, None)
        return put(into, tensors)

    return load_otherwise(read, shards, workers, into, put=moved)


@mistake(
    load_parallel,
    "Expects the errors that files are known for, and lets every other out as it is.",
    fails=["two_shards_fail", "failure_stops_reading"],
)
def known_errors_only(read, shards, workers, into):
    try:
        return load_by_pool(read, shards, workers, into)
    except RuntimeError as error:
        if isinstance(error.__cause__, OSError | ValueError | EOFError | KeyError):
            raise
        raise error.__cause__ from None


@mistake(
    load_parallel,
    "A name that occurs twice passes where the values are equal.",
    fails=["one_name_in_two_shards"],
)
def equal_ones_pass(read, shards, workers, into):
    parts: dict[str, dict[str, Tensor]] = {}

    def kept_apart(shard: str) -> dict[str, Tensor]:
        parts[shard] = read(shard)
        return {}

    load_by_pool(kept_apart, shards, workers, {})
    seen: dict[str, Tensor] = {}
    for shard in shards:
        for name in [name for name in parts[shard] if name in seen]:
            if parts[shard][name].equal(seen[name]):
                del parts[shard][name]
        seen |= parts[shard]
    return put(into, merged(shards, parts))


@mistake(
    load_parallel,
    "Nobody asks the threads how they ended, so a shard that fails is just not there.",
    fails=["last_shard_fails", "two_shards_fail", "failure_stops_reading"],
)
def errors_swallowed(read, shards, workers, into):
    stopped = threading.Event()

    def one(shard: str) -> dict[str, Tensor]:
        found = {} if stopped.is_set() else attempt(read, shard)
        if isinstance(found, Exception):
            stopped.set()
            return {}
        return found

    with ThreadPoolExecutor(workers) as pool:
        loaded = dict(zip(shards, pool.map(one, shards), strict=True))
    return put(into, merged(shards, loaded))


@mistake(
    load_parallel,
    "Tensors are written as their shard arrives, so a late failure leaves a mixture of two models.",
    fails=[
        "first_shard_ends_last",
        "last_shard_fails",
        "two_shards_fail",
        "one_name_in_two_shards",
        "work_is_pulled",
        "failure_stops_reading",
        "as_many_as_workers",
    ],
)
def written_on_arrival(read, shards, workers, into):
    arrived: dict[str, str] = {}
    lock, stopped = threading.Lock(), threading.Event()

    def one(shard: str) -> dict[str, Tensor] | Exception:
        if stopped.is_set():
            return {}
        found = attempt(read, shard)
        with lock:
            if isinstance(found, Exception):
                stopped.set()
            else:
                into.update({name: tensor for name, tensor in found.items() if name not in arrived})
                arrived.update(dict.fromkeys(found, shard))
        return found

    with ThreadPoolExecutor(workers) as pool:
        tensors = merged(shards, dict(zip(shards, pool.map(one, shards), strict=True)))
    return sum(tensor.nbytes for tensor in tensors.values())


@mistake(
    load_parallel,
    "Results are taken in the order in which they arrive, so timing decides order and error.",
    fails=["first_shard_ends_last", "two_shards_fail", "work_is_pulled", "as_many_as_workers"],
)
def order_of_arrival(read, shards, workers, into):
    tensors: dict[str, Tensor] = {}
    holder: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(read, shard): shard for shard in shards}
        for future in as_completed(futures):
            shard, error = futures[future], future.exception()
            if error is not None:
                pool.shutdown(wait=True, cancel_futures=True)
                raise RuntimeError(f"reading {shard} failed") from error
            for name, tensor in future.result().items():
                if name in holder:
                    raise ValueError(f"{name} is in {holder[name]} and {shard}")
                holder[name], tensors[name] = shard, tensor
    return put(into, tensors)


@mistake(
    load_parallel,
    "A name that occurs twice silently takes the later shard's values.",
    fails=["one_name_in_two_shards"],
)
def last_one_wins(read, shards, workers, into):
    parts: dict[str, dict[str, Tensor]] = {}

    def kept_apart(shard: str) -> dict[str, Tensor]:
        parts[shard] = read(shard)
        return {}

    load_by_pool(kept_apart, shards, workers, {})
    return put(into, {name: tensor for shard in shards for name, tensor in parts[shard].items()})


@mistake(
    load_parallel,
    "Work goes in rounds of `workers` shards, and each round waits for its slowest.",
    fails=["work_is_pulled"],
)
def rounds(read, shards, workers, into):
    loaded: dict[str, dict[str, Tensor] | Exception] = {}
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(shards), workers):
            part = shards[start : start + workers]
            loaded.update(zip(part, pool.map(lambda shard: attempt(read, shard), part), strict=True))
            if any(isinstance(found, Exception) for found in loaded.values()):
                break
    return put(into, merged(shards, loaded))


@mistake(
    load_parallel,
    "Each worker gets its share of the shards beforehand, and idles when its own are done.",
    fails=["work_is_pulled"],
)
def shares_beforehand(read, shards, workers, into):
    loaded: dict[str, dict[str, Tensor] | Exception] = {}
    stopped = threading.Event()

    def run(rank: int) -> None:
        for shard in shards[rank::workers]:
            if not stopped.is_set():
                loaded[shard] = attempt(read, shard)
                if isinstance(loaded[shard], Exception):
                    stopped.set()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, range(workers)))
    return put(into, merged([shard for shard in shards if shard in loaded], loaded))


@mistake(
    load_parallel,
    "Every shard is read twice: once to look for names that occur twice, once to load it.",
    fails=["first_shard_ends_last", "work_is_pulled", "any_number_of_workers", "as_many_as_workers"],
)
def read_twice(read, shards, workers, into):
    load_by_pool(read, shards, workers, {})
    return load_by_pool(read, shards, workers, into)


@mistake(
    load_parallel,
    "The error that reading raised goes out as it is, without the shard's name.",
    fails=["last_shard_fails", "two_shards_fail", "failure_stops_reading"],
)
def shard_not_named(read, shards, workers, into):
    try:
        return load_by_pool(read, shards, workers, into)
    except RuntimeError as error:
        raise error.__cause__ or error from None


@mistake(
    load_parallel,
    "Raises at the first failure and leaves other reads running behind it.",
    fails=["last_shard_fails", "two_shards_fail", "failure_stops_reading"],
)
def does_not_wait(read, shards, workers, into):
    pool = ThreadPoolExecutor(workers)
    futures = {shard: pool.submit(read, shard) for shard in shards}
    wait(futures.values(), return_when=FIRST_EXCEPTION)
    done = {shard: ended(future) for shard, future in futures.items() if future.done()}
    pool.shutdown(wait=False, cancel_futures=True)
    return put(into, merged(shards, done))


@mistake(
    load_parallel,
    "Tensors are written once every read has begun, and taken back when one fails.",
    fails=[
        "first_shard_ends_last",
        "last_shard_fails",
        "two_shards_fail",
        "one_name_in_two_shards",
        "work_is_pulled",
        "as_many_as_workers",
    ],
)
def written_too_early(read, shards, workers, into):
    kept, lock, begun = dict(into), threading.Lock(), []
    arrived: dict[str, Tensor] = {}

    def one(shard: str) -> dict[str, Tensor]:
        with lock:
            begun.append(shard)
        found = read(shard)
        with lock:
            arrived.update(found)
            if len(begun) == len(shards):
                into.update(arrived)
        return found

    try:
        return load_by_pool(one, shards, workers, into)
    except (RuntimeError, ValueError):
        into.clear()
        into.update(kept)
        raise


@mistake(
    load_parallel,
    "After a failure everything that was handed to the pool is still read.",
    fails=["failure_stops_reading"],
)
def reads_on(read, shards, workers, into):
    with ThreadPoolExecutor(workers) as pool:
        futures = {shard: pool.submit(attempt, read, shard) for shard in shards}
    return put(into, merged(shards, {shard: future.result() for shard, future in futures.items()}))


# --------------------------------------------------------------------------------------------------- alternatives


@alternative(load_parallel, "Threads by hand that take the next shard from a queue")
def threads_and_queue(read, shards, workers, into):
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for shard in shards:
        todo.put(shard)
    loaded: dict[str, dict[str, Tensor] | Exception] = {}
    failed = threading.Event()

    def run() -> None:
        while not failed.is_set():
            try:
                shard = todo.get_nowait()
            except queue.Empty:
                return
            loaded[shard] = attempt(read, shard)
            if isinstance(loaded[shard], Exception):
                failed.set()

    threads = [threading.Thread(target=run) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return put(into, merged(shards, loaded))


@alternative(load_parallel, "An event loop that hands reads to threads, with a semaphore")
def event_loop(read, shards, workers, into):
    loaded: dict[str, dict[str, Tensor] | Exception] = {}

    async def one(shard: str, free: asyncio.Semaphore) -> None:
        async with free:
            if not any(isinstance(found, Exception) for found in loaded.values()):
                loaded[shard] = await asyncio.to_thread(attempt, read, shard)

    async def every() -> None:
        free = asyncio.Semaphore(workers)
        asyncio.get_running_loop().set_default_executor(
            ThreadPoolExecutor(workers)
        )  # its own has few threads
        await asyncio.gather(*(one(shard, free) for shard in shards))

    asyncio.run(every())
    return put(into, merged(shards, loaded))
