"""How long a checkpoint takes to load at least: bytes over rates, link by link."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from llmcourse.exercise import Rng, alternative, case, exercise, mistake, raised


@exercise(
    points=3,
    minutes=8,
    hints=(
        "First the bytes of each link, then bytes over rate for each, then one number of the three. The disk is one "
        "for all ranks; a network card and a device link serve one rank.",
        "A network is sold in bits, and G is 10^9, not 2^30. The rank with the largest part is the one that is waited "
        "for, so a division rounds up, and it counts parameters, not bytes.",
    ),
)
def plan_load(
    parameters: int,
    ranks: int,
    how: str,
    *,
    overlap: bool,
    resume: bool = False,
    disk_gb_per_s: float,
    network_gbit_per_s: float,
    device_gb_per_s: float,
) -> tuple[float, dict[str, int], str]:
    """Least seconds until every rank holds its part of a checkpoint, and what sets
    them; about 15 lines.

    The checkpoint has `parameters` weights in bfloat16. With resume=True it also has
    AdamW's state, three float32 values a parameter: a master copy of the weight and two
    moments. No gradients are in it. It is divided into `ranks` parts that differ by at
    most one parameter, each parameter together with its state.

    Three links: one disk, which all ranks share; a network card for each rank, which
    sends and receives at full speed at once; for each rank a link from its host's
    memory to its device. Rates are as on data sheets: disk and device in GB/s, the card
    in Gb/s. G is 10^9, B a byte, b a bit.

    how = "slices"      each rank reads its own part from the disk
          "everything"  each rank reads the whole checkpoint from the disk, and nothing is cached
          "broadcast"   rank 0 reads the whole checkpoint; in small chunks all of it
                        goes from rank 0 to rank 1, from there to rank 2, and so on to
                        the last rank
    Whatever it has read or received, a rank copies only its own part to its device.
    ValueError for another `how`.

    overlap=True: disk, network and device work at the same time, on chunks so small
    that filling and draining the pipeline takes no time. overlap=False: first the disk,
    then the network, then the devices, each beginning when the one before has moved
    everything. All ranks work at the same time.

    Returns (seconds, crossing, bottleneck). crossing has three exact integers: "disk",
    the bytes that the disk delivers to all ranks together; "network", the bytes that
    the busiest card sends; "device", the bytes that cross the busiest device link.
    bottleneck is which of these three names takes longest, the first of them on a tie.
    """
    ### BEGIN SOLUTION
    if how not in ("slices", "everything", "broadcast"):
        raise ValueError(f"how is {how!r}; expected slices, everything or broadcast")
    parameter_bytes = 2 + (4 + 4 + 4 if resume else 0)
    payload_bytes = parameters * parameter_bytes
    crossing = {
        "disk": payload_bytes * (ranks if how == "everything" else 1),
        "network": payload_bytes if how == "broadcast" and ranks > 1 else 0,
        "device": -(-parameters // ranks) * parameter_bytes,
    }
    seconds = {
        "disk": crossing["disk"] / (disk_gb_per_s * 1e9),
        "network": crossing["network"] / (network_gbit_per_s * 1e9 / 8),
        "device": crossing["device"] / (device_gb_per_s * 1e9),
    }
    least = max(seconds.values()) if overlap else sum(seconds.values())
    return least, crossing, max(seconds, key=lambda link: seconds[link])
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


def links(rng: Rng, slowest: str = "disk", ranks: int = 1) -> dict[str, float]:
    """Rates of the three links; `slowest` decides, by a wide margin, however the `ranks` read."""
    disk = rng.integer(20, 90) / 10
    if slowest == "device":
        return {
            "disk_gb_per_s": 10 * ranks * ranks * disk,
            "network_gbit_per_s": 80.0 * ranks * rng.integer(20, 50),
            "device_gb_per_s": disk,
        }
    network = rng.integer(40, 120) / 10 if slowest == "network" else 100.0 * rng.integer(1, 8)
    return {
        "disk_gb_per_s": disk,
        "network_gbit_per_s": network,
        "device_gb_per_s": 10.0 * rng.integer(2, 6),
    }


def weights(rng: Rng, ranks: int) -> int:
    """Parameters of a large model, which the ranks cannot divide evenly unless there is one."""
    return rng.integer(10**8, 10**10) * ranks + rng.integer(1, max(ranks - 1, 1))


@case(plan_load)
def own_slices(answer, rng):
    """Every rank reads its own part, overlapped: from a slow disk, to slow devices, to devices little slower."""
    found = {
        f"{ranks} ranks": answer(
            weights(rng, ranks), ranks, "slices", overlap=True, **links(rng, "device", ranks)
        )
        for ranks in (1, 2)
    }
    ranks = rng.integer(3, 16)
    parameters = weights(rng, ranks)
    found |= {
        slowest: answer(parameters, ranks, "slices", overlap=True, **links(rng, slowest, ranks))
        for slowest in ("disk", "device")
    }
    # The device link has the lowest rate, and still the disk takes longest: at least three ranks share it.
    shared = links(rng)
    shared["device_gb_per_s"] = shared["disk_gb_per_s"] * rng.integer(5, 8) / 10
    return {**found, "shared": answer(parameters, ranks, "slices", overlap=True, **shared)}


@case(plan_load)
def everyone_reads_everything(answer, rng):
    """Every rank reads the whole checkpoint, overlapped: from a slow disk, and to slow devices."""
    few = {
        f"{ranks} ranks": answer(weights(rng, ranks), ranks, "everything", overlap=True, **links(rng))
        for ranks in (1, 2)
    }
    ranks = rng.integer(3, 16)
    parameters = weights(rng, ranks)
    return few | {
        slowest: answer(parameters, ranks, "everything", overlap=True, **links(rng, slowest, ranks))
        for slowest in ("disk", "device")
    }


@case(plan_load)
def one_reads_and_broadcasts(answer, rng):
    """Rank 0 reads and broadcasts, overlapped: to many ranks, to two, and with no other rank there."""
    found = {}
    for ranks in (rng.integer(4, 16), 2, 1):
        parameters = weights(rng, ranks)
        for slowest in ("disk", "network", "device"):
            rates = links(rng, slowest, ranks)
            found[f"{slowest}, {min(ranks, 3)}"] = answer(
                parameters, ranks, "broadcast", overlap=True, **rates
            )
    return found


@case(plan_load)
def one_after_another(answer, rng):
    """Nothing overlaps: the three ways to read, to many ranks, to two, and to one, whichever link is slow."""
    found = {}
    for ranks in (rng.integer(3, 16), 2, 1):
        parameters = weights(rng, ranks)
        for slowest in ("disk", "network", "device"):
            for how in ("slices", "everything", "broadcast"):
                found[f"{how}, {slowest}, {min(ranks, 3)}"] = answer(
                    parameters, ranks, how, overlap=False, **links(rng, slowest, ranks)
                )
    return found


@case(plan_load)
def training_resumed(answer, rng):
    """AdamW's state is loaded with the weights, overlapped and not."""
    ranks = rng.integer(3, 16)
    parameters = weights(rng, ranks)
    return {
        f"{how}, {slowest}, overlap={overlap}": answer(
            parameters, ranks, how, overlap=overlap, resume=True, **links(rng, slowest, ranks)
        )
        for how in ("slices", "everything", "broadcast")
        for slowest in ("disk", "network", "device")
        for overlap in (True, False)
    }


@case(plan_load)
def hardly_any_parameters(answer, rng):
    """A few parameters more than ranks, or fewer."""
    ranks = rng.integer(5, 12)
    rates = links(rng, "device", ranks)
    return {
        "one more": answer(ranks + 1, ranks, "slices", overlap=True, **rates),
        "two fewer": answer(ranks - 2, ranks, "slices", overlap=False, resume=True, **rates),
        "as many": answer(ranks, ranks, "everything", overlap=True, **rates),
    }


@case(plan_load)
def more_than_a_float_counts(answer, rng):
    """So many parameters that a float rounds their number: the bytes are integers, and exact."""
    ranks = rng.integer(3, 9)
    parameters = (1 << 62) + ranks * rng.integer(1, 99) + 1
    ways = ("slices", "everything", "broadcast")
    return {how: answer(parameters, ranks, how, overlap=True, resume=True, **links(rng)) for how in ways}


@case(plan_load)
def as_long_as_another(answer, rng):
    """Two links that take exactly as long: the first of them is named."""
    parameters, rate = weights(rng, 1), float(rng.integer(2, 9))
    slow, fast = {"disk": rate, "network": 8 * rate, "device": rate}, {"network": 800.0, "device": 100.0}
    found = {}
    for quick in ((), ("device",), ("network",)):
        rates = slow | {link: fast[link] for link in quick}
        disk, network, device = rates.values()
        options = {"disk_gb_per_s": disk, "network_gbit_per_s": network, "device_gb_per_s": device}
        found[f"quick: {quick}"] = [
            answer(2 * parameters, 2, "broadcast", overlap=overlap, **options) for overlap in (True, False)
        ]
        found[f"quick: {quick}, one rank"] = answer(parameters, 1, "slices", overlap=True, **options)
    halves = {"disk_gb_per_s": 2 * rate, "network_gbit_per_s": 8 * rate, "device_gb_per_s": rate / 2}
    return {**found, "network and device": answer(2 * parameters, 2, "broadcast", overlap=True, **halves)}


@case(plan_load)
def other_ways(answer, rng):
    """Ways to read that do not exist, beside one that does."""
    ranks = rng.integer(3, 16)
    parameters, rates = weights(rng, ranks), links(rng)
    other = rng.choice(["slice", "all", "scatter", "ring", "", "Broadcast", "slices "])
    new = f"way_{rng.bytes(3).hex()}"
    return {
        "other": raised(answer, parameters, ranks, other, overlap=True, **rates),
        "new": raised(answer, parameters, ranks, new, overlap=False, **rates),
        "slices": answer(parameters, ranks, "slices", overlap=True, **rates),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Planning:
    """A right plan in small steps; a mistake replaces one of them."""

    giga = 10**9
    bits_per_byte = 8
    state_bytes = 12
    known = ("slices", "everything", "broadcast")

    def payload(self, parameters: int, per_parameter: int) -> int:
        return parameters * per_parameter

    def part(self, parameters: int, ranks: int, per_parameter: int) -> int:
        return -(-parameters // ranks) * per_parameter

    def disk(self, payload: int, part: int, ranks: int, how: str) -> int:
        return payload * ranks if how == "everything" else payload

    def network(self, payload: int, part: int, ranks: int, how: str) -> int:
        return payload if how == "broadcast" and ranks > 1 else 0

    def device(self, payload: int, part: int, ranks: int, how: str) -> int:
        return part

    def rates(self, disk: float, network: float, device: float, ranks: int, how: str) -> tuple[float, ...]:
        return disk, network, device

    def least(self, seconds: list[float], overlap: bool) -> float:
        return max(seconds) if overlap else sum(seconds)

    def bottleneck(self, crossing: dict[str, int], seconds: list[float]) -> str:
        return list(crossing)[seconds.index(max(seconds))]

    def plan(
        self,
        parameters: int,
        ranks: int,
        how: str,
        *,
        overlap: bool,
        resume: bool = False,
        disk_gb_per_s: float,
        network_gbit_per_s: float,
        device_gb_per_s: float,
    ) -> tuple[float, dict[str, int], str]:
        if how not in self.known:
            raise ValueError(how)
        per_parameter = 2 + self.state_bytes * resume
        payload, part = self.payload(parameters, per_parameter), self.part(parameters, ranks, per_parameter)
        crossing = {
            link: getattr(self, link)(payload, part, ranks, how) for link in ("disk", "network", "device")
        }
        network = network_gbit_per_s / self.bits_per_byte
        rates = self.rates(disk_gb_per_s, network, device_gb_per_s, ranks, how)
        seconds = [size / (rate * self.giga) for size, rate in zip(crossing.values(), rates, strict=True)]
        return self.least(seconds, overlap), crossing, self.bottleneck(crossing, seconds)


def variant(**steps: Any) -> Callable[..., tuple[float, dict[str, int], str]]:
    """A plan with some steps replaced."""
    return type("Variant", (Planning,), steps)().plan


@mistake(plan_load, "Adds the stages up although they work at the same time.")
def summed_though_overlapped(*arguments, **options):
    return variant(least=lambda self, seconds, overlap: sum(seconds))(*arguments, **options)


@mistake(plan_load, "Takes the slowest stage although each waits for the one before.")
def slowest_though_in_turn(*arguments, **options):
    return variant(least=lambda self, seconds, overlap: max(seconds))(*arguments, **options)


@mistake(plan_load, "Swaps the two: overlapped stages are added, stages in turn cost the slowest.")
def overlap_swapped(*arguments, **options):
    return variant(least=lambda self, seconds, overlap: sum(seconds) if overlap else max(seconds))(
        *arguments, **options
    )


@mistake(plan_load, "Takes the network's Gb/s for GB/s, eight times too fast.")
def bits_for_bytes(*arguments, **options):
    return variant(bits_per_byte=1)(*arguments, **options)


@mistake(plan_load, "Takes G for 2^30: every rate is 7.4 % too high.")
def gibibytes(*arguments, **options):
    return variant(giga=2**30)(*arguments, **options)


@mistake(plan_load, "Gives every rank the disk's full rate, although all of them share it.")
def disk_for_each_rank(*arguments, **options):
    def rates(self, disk, network, device, ranks, how):
        return (disk if how == "broadcast" else disk * ranks), network, device

    return variant(rates=rates)(*arguments, **options)


@mistake(
    plan_load,
    "Divides the disk's rate by the ranks after all their bytes were added up: sharing counts twice.",
)
def disk_shared_twice(*arguments, **options):
    def rates(self, disk, network, device, ranks, how):
        return (disk if how == "broadcast" else disk / ranks), network, device

    return variant(rates=rates)(*arguments, **options)


@mistake(plan_load, "Counts what one rank reads from the disk, not what all of them read.")
def one_rank_s_reading(*arguments, **options):
    def disk(self, payload, part, ranks, how):
        return part if how == "slices" else payload

    return variant(disk=disk)(*arguments, **options)


@mistake(plan_load, "Lets the disk deliver the checkpoint once although every rank reads all of it.")
def everything_read_once(*arguments, **options):
    return variant(disk=lambda self, payload, part, ranks, how: payload)(*arguments, **options)


@mistake(plan_load, "Forgets the optimizer's state when training is resumed.")
def state_forgotten(*arguments, **options):
    return variant(state_bytes=0)(*arguments, **options)


@mistake(plan_load, "Forgets the master copy: of AdamW's state only the two moments are counted.")
def master_copy_forgotten(*arguments, **options):
    return variant(state_bytes=8)(*arguments, **options)


@mistake(
    plan_load, "Counts 16 bytes a parameter, which is what training holds: gradients are in no checkpoint."
)
def gradients_counted(*arguments, **options):
    return variant(state_bytes=14)(*arguments, **options)


@mistake(plan_load, "Counts AdamW's state in bfloat16, as the weights are.")
def state_in_bfloat16(*arguments, **options):
    return variant(state_bytes=6)(*arguments, **options)


@mistake(plan_load, "Copies the whole checkpoint to every device, not the rank's part of it.")
def whole_to_the_device(*arguments, **options):
    return variant(device=lambda self, payload, part, ranks, how: payload)(*arguments, **options)


@mistake(plan_load, "Copies whatever a rank has read to its device: the whole, unless it read a slice.")
def all_it_read_to_the_device(*arguments, **options):
    def device(self, payload, part, ranks, how):
        return part if how == "slices" else payload

    return variant(device=device)(*arguments, **options)


@mistake(plan_load, "Lets all ranks share one link to their devices.")
def one_device_link(*arguments, **options):
    def rates(self, disk, network, device, ranks, how):
        return disk, network, device / ranks

    return variant(rates=rates)(*arguments, **options)


@mistake(plan_load, "Rounds the parts down: the rank with the largest part is waited for.")
def parts_rounded_down(*arguments, **options):
    def part(self, parameters, ranks, per_parameter):
        return parameters // ranks * per_parameter

    return variant(part=part)(*arguments, **options)


@mistake(plan_load, "Divides bytes, not parameters, and so splits a parameter between two ranks.")
def bytes_divided(*arguments, **options):
    def part(self, parameters, ranks, per_parameter):
        return -(-parameters * per_parameter // ranks)

    return variant(part=part)(*arguments, **options)


@mistake(plan_load, "Takes the mean of the parts for the largest: bytes that are no integer.")
def parts_not_rounded(*arguments, **options):
    def part(self, parameters, ranks, per_parameter):
        return parameters * per_parameter / ranks

    return variant(part=part)(*arguments, **options)


@mistake(plan_load, "Lets rank 0 send the checkpoint to every other rank, not only to the next.")
def root_sends_to_all(*arguments, **options):
    def network(self, payload, part, ranks, how):
        return payload * (ranks - 1) if how == "broadcast" else 0

    return variant(network=network)(*arguments, **options)


@mistake(plan_load, "Sends the rank's part over the network, not the whole: that is a scatter.")
def scattered(*arguments, **options):
    def network(self, payload, part, ranks, how):
        return part if how == "broadcast" and ranks > 1 else 0

    return variant(network=network)(*arguments, **options)


@mistake(plan_load, "Counts what a card receives and what it sends one after the other.")
def half_duplex(*arguments, **options):
    def network(self, payload, part, ranks, how):
        return payload * min(ranks - 1, 2) if how == "broadcast" else 0

    return variant(network=network)(*arguments, **options)


@mistake(plan_load, "Broadcasts over the network although there is no other rank.")
def broadcast_to_nobody(*arguments, **options):
    def network(self, payload, part, ranks, how):
        return payload if how == "broadcast" else 0

    return variant(network=network)(*arguments, **options)


@mistake(plan_load, "Forgets the network of the broadcast.")
def network_forgotten(*arguments, **options):
    return variant(network=lambda self, payload, part, ranks, how: 0)(*arguments, **options)


@mistake(
    plan_load, "Sends what is read from the disk over the network as well, where no rank sends anything."
)
def network_always(*arguments, **options):
    def network(self, payload, part, ranks, how):
        return {"slices": part, "everything": payload, "broadcast": payload if ranks > 1 else 0}[how]

    return variant(network=network)(*arguments, **options)


@mistake(plan_load, "Names the link with the most bytes, which need not be the one that takes longest.")
def most_bytes_named(*arguments, **options):
    def bottleneck(self, crossing, seconds):
        return max(crossing, key=lambda link: crossing[link])

    return variant(bottleneck=bottleneck)(*arguments, **options)


@mistake(plan_load, "Names the link with the lowest rate, however few bytes cross it.")
def lowest_rate_named(*arguments, **options):
    def bottleneck(self, crossing, seconds):
        rates = {
            link: size / second if second else math.inf
            for (link, size), second in zip(crossing.items(), seconds, strict=True)
        }
        return min(rates, key=lambda link: rates[link])

    return variant(bottleneck=bottleneck)(*arguments, **options)


@mistake(plan_load, "Plans a way to read that does not exist as if it were slices.")
def any_way(*arguments, **options):
    class Everything:
        def __contains__(self, how):
            return True

    return variant(known=Everything())(*arguments, **options)


@mistake(plan_load, "Knows some ways that do not exist, and takes every other for slices.")
def some_ways_refused(*arguments, **options):
    class Others:
        def __contains__(self, how):
            return how not in ("slice", "all", "scatter", "ring", "", "Broadcast", "slices ")

    return variant(known=Others())(*arguments, **options)


@mistake(plan_load, "Names the last of the links that take longest, not the first.")
def last_of_a_tie(*arguments, **options):
    def bottleneck(self, crossing, seconds):
        return max(zip(seconds, range(3), crossing, strict=True))[2]

    return variant(bottleneck=bottleneck)(*arguments, **options)


@mistake(plan_load, "Divides with / and rounds up what that gives: a float counts exactly to 2^53 only.")
def divided_in_floats(*arguments, **options):
    def part(self, parameters, ranks, per_parameter):
        return math.ceil(parameters / ranks) * per_parameter

    return variant(part=part)(*arguments, **options)


@mistake(plan_load, "Takes the slowest stage in any case where one rank has everything for itself.")
def one_rank_overlaps(parameters, ranks, how, *, overlap, **options):
    return variant()(parameters, ranks, how, overlap=overlap or ranks == 1, **options)


@mistake(plan_load, "Names the disk, which comes first, wherever the stages come in turn.")
def first_stage_named(parameters, ranks, how, *, overlap, **options):
    seconds, crossing, link = variant()(parameters, ranks, how, overlap=overlap, **options)
    return seconds, crossing, link if overlap else "disk"


@alternative(plan_load, "Reasons with exact fractions of seconds and turns them into floats at the end")
def in_fractions(
    parameters,
    ranks,
    how,
    *,
    overlap,
    resume=False,
    disk_gb_per_s,
    network_gbit_per_s,
    device_gb_per_s,
):
    per_parameter = 14 if resume else 2
    whole, part = parameters * per_parameter, (parameters + ranks - 1) // ranks * per_parameter
    match how:
        case "slices":
            crossing = {"device": part, "network": 0, "disk": whole}
        case "everything":
            crossing = {"device": part, "network": 0, "disk": whole * ranks}
        case "broadcast":
            crossing = {"device": part, "network": whole * bool(ranks - 1), "disk": whole}
        case _:
            raise ValueError(how)
    gigabits = {"disk": 8 * disk_gb_per_s, "network": network_gbit_per_s, "device": 8 * device_gb_per_s}
    times = {link: Fraction(8 * size) / (Fraction(gigabits[link]) * 10**9) for link, size in crossing.items()}
    ordered = sorted(times, key=times.get)
    return float(times[ordered[-1]] if overlap else sum(times.values())), crossing, ordered[-1]


@alternative(plan_load, "Deals the parameters out and adds up rank by rank")
def rank_by_rank(*arguments, **options):
    class Dealt(Planning):
        def part(self, parameters, ranks, per_parameter):
            return (
                max(parameters // ranks + (rank < parameters % ranks) for rank in range(ranks))
                * per_parameter
            )

        def disk(self, payload, part, ranks, how):
            reading = {"slices": [payload], "everything": [payload] * ranks, "broadcast": [payload]}[how]
            return sum(reading)

    return Dealt().plan(*arguments, **options)
