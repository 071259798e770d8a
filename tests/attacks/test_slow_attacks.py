"""Attacks on resources and on the race, each class beside honest neighbours."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from llmcourse.grading import Course, grade
from tests.attacks.attacks import Attack, by_number
from tests.attacks.course import WORTH, build, notebook, shrunk
from tests.attacks.slow_attacks import RACES, RESOURCES
from tests.attacks.test_attacks import HONEST, OURS, SECRET, Class, digests, hostile_files, hostile_processes
from tests.jailed import needs_jail

pytestmark = [
    pytest.mark.attack,
    pytest.mark.slow,
    needs_jail,
]


def graded_class(folder, assignment: str, attacks: list[Attack]) -> Iterator[Class]:
    place = build(folder, SECRET)
    for student in HONEST:
        place.hand_in(student, notebook(assignment), assignment)
    for attack in attacks:
        made = attack.make(place, attack.student)
        if made is not None:
            place.hand_in(attack.student, made, assignment)
    before = digests(place.root, OURS)
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=shrunk) as pool,
    ):
        patch.setenv("LLMCOURSE_LESSONS", str(place.lessons))
        patch.setenv("HOME", str(place.home))
        began = time.monotonic()
        outcome = grade(Course(place.course), assignment, workers=2, executor=pool)
        yield Class(place, outcome, before, time.monotonic() - began)


@pytest.fixture(scope="module")
def used_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Class]:
    yield from graded_class(tmp_path_factory.mktemp("used_up"), "A", RESOURCES)


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Class]:
    yield from graded_class(tmp_path_factory.mktemp("raced"), "R", RACES)


def told(graded: Class, student: str) -> str:
    record = graded.outcome.records[student]
    return "\n".join(
        [record.refused or "", *record.notes, *(f"{one.reason}\n{one.text}" for one in record.exercises)]
    )


@pytest.mark.parametrize("attack", by_number(RESOURCES), ids=lambda attack: attack.student)
def test_what_uses_up_a_resource_earns_nothing(used_up: Class, attack: Attack):
    said = told(used_up, attack.student)
    record = used_up.outcome.records[attack.student]
    assert "ESCAPED" not in said and attack.said in said, said
    assert {one.name: one.points for one in record.exercises} == attack.earns, said


@pytest.mark.parametrize("attack", by_number(RACES), ids=lambda attack: attack.student)
def test_a_race_is_won_by_computing_what_was_asked_for_and_in_no_other_way(raced: Class, attack: Attack):
    said = told(raced, attack.student)
    record = raced.outcome.records[attack.student]
    assert {one.name: one.points for one in record.exercises} == attack.earns, said
    busy = any(one.verdict == "inconclusive" for one in record.exercises)
    assert attack.said in said or busy, said


def test_honest_neighbours_keep_what_they_earn(used_up: Class, raced: Class):
    for graded, assignment in ((used_up, "A"), (raced, "R")):
        assert graded.outcome.failed == {}
        for student in HONEST:
            record = graded.outcome.records[student]
            # On a busy machine the race is the teacher's to decide; it is never simply lost.
            waits = [one for one in record.exercises if one.needs_teacher]
            assert graded.outcome.total(record) == WORTH[assignment] - len(waits), told(graded, student)
            assert all(one.verdict in ("right", "inconclusive") for one in record.exercises)
        assert digests(graded.place.root, OURS) == graded.before


def test_nothing_survives(used_up: Class, raced: Class):
    assert hostile_processes() == [] and hostile_files() == []
