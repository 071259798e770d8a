"""plan_load against a simulation in chunks, tables worked by hand, and the package's own arithmetic."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llmcourse import figures, sizing
from llmcourse.lessons.parameter_loading.plan_load import plan_load

WAYS = ("slices", "everything", "broadcast")


def rates(disk: float, network: float, device: float) -> dict[str, Any]:
    return {"disk_gb_per_s": disk, "network_gbit_per_s": network, "device_gb_per_s": device}


def simulated(
    size_bytes: float, ranks: int, how: str, *, chunks: int, overlap: bool, speeds: tuple[float, float, float]
) -> float:
    """Seconds until the last device has its part; every chunk holds something for every rank.

    Each link serves one request after the other, in the order of the chunks. `speeds`: disk, card, device, bytes/s.
    """
    disk, card, device = speeds
    chunk = size_bytes / chunks
    disk_free, cards_free, devices_free = 0.0, [0.0] * ranks, [0.0] * ranks
    in_memory: list[list[float]] = [[] for _ in range(ranks)]  # when each chunk is in a rank's memory
    for _ in range(chunks):
        for rank in range(1 if how == "broadcast" else ranks):
            disk_free += (chunk / ranks if how == "slices" else chunk) / disk
            in_memory[rank].append(disk_free)
    if how == "broadcast":
        for rank in range(1, ranks):
            for arrived in in_memory[rank - 1]:
                begins = arrived if overlap else max(arrived, disk_free)
                cards_free[rank - 1] = max(cards_free[rank - 1], begins) + chunk / card
                in_memory[rank].append(cards_free[rank - 1])
    everything_there = max(times[-1] for times in in_memory)
    for rank in range(ranks):
        for arrived in in_memory[rank]:
            begins = arrived if overlap else everything_there
            devices_free[rank] = max(devices_free[rank], begins) + chunk / ranks / device
    return max(devices_free)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("how", WAYS)
def test_a_simulation_in_chunks_comes_down_to_the_bound(how: str, overlap: bool, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(10):
        ranks, per_rank = draw.randint(1, 9), draw.randint(1, 10**6)
        disk, card, device = (draw.uniform(0.5, 20) for _ in range(3))
        least, _, _ = plan_load(
            ranks * per_rank, ranks, how, overlap=overlap, **rates(disk, 8 * card, device)
        )
        size_bytes = 2 * ranks * per_rank
        for chunks in (50, 1000):
            found = simulated(
                size_bytes,
                ranks,
                how,
                chunks=chunks,
                overlap=overlap,
                speeds=(disk * 1e9, card * 1e9, device * 1e9),
            )
            # A line of stages with equal chunks ends after one chunk's way through all stages and, for each other
            # chunk, the slowest stage's time: at most that one way later than the bound. Sums round by some eps.
            reading = ranks if how == "everything" else 1
            way_s = size_bytes / chunks * (reading / disk + (ranks - 1) / card + 1 / ranks / device) / 1e9
            assert least * (1 - 1e-9) <= found <= least * (1 + 1e-9) + way_s


def test_the_table_worked_by_hand_for_70_billion_weights() -> None:
    # 141.1 GB over 7 GB/s are 20.2 s; eight ranks that read all of it, 161 s. A device gets 17.6 GB at 50 GB/s.
    parameters = sizing.parameter_breakdown(sizing.PUBLIC_CONFIGS["Llama-3.1-70B"]).total
    assert parameters == 70_553_706_496
    links = rates(7, 400, 50)
    seconds, crossing, slowest = plan_load(parameters, 8, "slices", overlap=True, **links)
    assert (round(seconds, 1), slowest) == (20.2, "disk")
    assert crossing == {"disk": 141_107_412_992, "network": 0, "device": 17_638_426_624}
    seconds, crossing, slowest = plan_load(parameters, 8, "everything", overlap=True, **links)
    assert (round(seconds), slowest, crossing["disk"]) == (161, "disk", 8 * 141_107_412_992)


@pytest.mark.parametrize(
    ("how", "overlap", "network", "seconds", "slowest"),
    [
        ("slices", True, 400, 10.0, "disk"),  # 100 GB / 10
        ("slices", False, 400, 11.0, "disk"),  # and 25 GB / 25
        ("everything", True, 400, 40.0, "disk"),
        ("everything", False, 400, 41.0, "disk"),
        ("broadcast", True, 400, 10.0, "disk"),  # 100 GB / (400/8 GB/s) are 2 s, hidden behind the disk
        ("broadcast", False, 400, 13.0, "disk"),
        ("broadcast", True, 40, 20.0, "network"),
        ("broadcast", False, 40, 31.0, "network"),
    ],
)
def test_a_table_worked_by_hand_for_50_billion_weights_and_4_ranks(
    how: str, overlap: bool, network: float, seconds: float, slowest: str
) -> None:
    found = plan_load(50 * 10**9, 4, how, overlap=overlap, **rates(10, network, 25))
    assert (found[0], found[2]) == (pytest.approx(seconds, rel=1e-12), slowest)


@pytest.mark.parametrize("how", WAYS[:2])
def test_the_figure_of_the_lesson_has_the_same_bytes_and_times(how: str, seed: int) -> None:
    draw = random.Random(seed)
    ranks = draw.randint(1, 16)
    parameters = ranks * draw.randint(1, 10**9)
    disk, device = draw.uniform(1, 10), draw.uniform(10, 60)
    stages = figures.loading_stages(
        2 * parameters,
        ranks=ranks,
        disk_bytes_per_s=disk * 1e9,
        to_device_bytes_per_s=device * 1e9,
        each_reads_everything=how == "everything",
    )
    for overlap, combined in ((True, max), (False, sum)):
        seconds, crossing, _ = plan_load(parameters, ranks, how, overlap=overlap, **rates(disk, 1, device))
        assert [crossing["disk"], crossing["device"]] == [stage.size_bytes for stage in stages]
        assert seconds == pytest.approx(combined(stage.seconds for stage in stages), rel=1e-12)


def test_a_resumed_checkpoint_holds_what_training_holds_without_the_gradients() -> None:
    held = sizing.training_bytes_per_parameter()
    _, crossing, _ = plan_load(1000, 1, "slices", overlap=True, resume=True, **rates(1, 1, 1))
    assert crossing["disk"] == 1000 * (held.total - held.gradient) == 14_000


def test_the_parts_cover_all_parameters_and_the_largest_is_the_one_that_counts(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        parameters, ranks = draw.randint(1, 300), draw.randint(1, 40)
        dealt = [0] * ranks
        for parameter in range(parameters):
            dealt[parameter % ranks] += 1
        _, crossing, _ = plan_load(parameters, ranks, "slices", overlap=True, **rates(1, 1, 1))
        assert crossing["device"] == 2 * max(dealt)


def test_more_than_64_bits_of_bytes_stay_exact() -> None:
    parameters = 10**25 + 7
    _, crossing, _ = plan_load(parameters, 3, "everything", overlap=True, **rates(1, 1, 1))
    assert crossing == {"disk": 6 * parameters, "network": 0, "device": 2 * (parameters // 3 + 1)}


@pytest.mark.parametrize("how", ["slice", "", "Slices"])
def test_another_way_to_read_is_refused(how: str) -> None:
    with pytest.raises(ValueError, match="expected slices, everything or broadcast"):
        plan_load(10, 2, how, overlap=True, **rates(1, 1, 1))
