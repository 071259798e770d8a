"""Specimen: a stochastic answer that is judged by its joint law."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmcourse.exercise import alternative, case, exercise, mistake, raised

DRAWS = 4_000
# Each judged count fails a right answer with at most this probability, divided by how many counts are judged.
FALSE_FAIL = 1e-6


@exercise(
    points=3, minutes=15, hints=("What is left after the first pick has other probabilities than before.",)
)
def sample_ranking(weights: Tensor, k: int, draws: int, generator: torch.Generator) -> Tensor:
    """Draw the first k places of a ranking, `draws` times: int64 [draws, k], places in order.

    weights [n] >= 0, float32. The first place is i with probability weights[i] / sum; each following place
    is drawn in proportion to the weights of those that are left. Draws are independent of each other. All
    randomness comes from `generator`: the same state gives the same draws. Something of weight 0 is never drawn;
    ValueError when k is larger than the number of weights above 0. About 6 lines.
    """
    ### BEGIN SOLUTION
    if k > int((weights > 0).sum()):
        raise ValueError(f"k = {k} places, but only {int((weights > 0).sum())} weights are above 0")
    return torch.multinomial(weights.expand(draws, -1), k, generator=generator)
    ### END SOLUTION


def allowed(probability: float, count: int, cells: int) -> float:
    """How far a count may lie from its mean: Bernstein's inequality for a sum of independent indicators, no limit law.

    P(|count - mean| > t) <= 2 exp(-t^2 / (2 N p q + 2 t / 3)); solved for t at FALSE_FAIL / cells.
    """
    log = math.log(2 * cells / FALSE_FAIL)
    return log / 3 + math.sqrt((log / 3) ** 2 + 2 * log * count * probability * (1 - probability))


def rankings(weights: list[float], k: int) -> dict[tuple[int, ...], float]:
    """The exact law: probability of every ordered choice of k."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(k):
        longer = {}
        for start, probability in law.items():
            left = sum(w for i, w in enumerate(weights) if i not in start)
            longer |= {(*start, i): probability * w / left for i, w in enumerate(weights) if i not in start}
        law = longer
    return law


def agrees_with(counts: dict[tuple[int, ...], int], law: dict[tuple[int, ...], float], total: int) -> bool:
    if any(law.get(cell, 0.0) == 0.0 for cell in counts):
        return False
    return all(
        abs(counts.get(cell, 0) - total * probability) <= allowed(probability, total, len(law))
        for cell, probability in law.items()
    )


def counted(rows: list[list[int]]) -> dict[tuple[int, ...], int]:
    counts: dict[tuple[int, ...], int] = {}
    for row in rows:
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    return counts


def judged_by_law(observed, expected):
    """Every ordered choice, and pairs of first places of neighbouring draws, at most FALSE_FAIL each."""
    weights, k = expected["weights"].tolist(), expected["draws"].shape[1]
    if not torch.equal(observed["weights"], expected["weights"]):
        return "the weights were changed"
    if not torch.equal(observed["draws"], observed["again"]):
        return "the same state of the generator gave other draws"
    rows = observed["draws"].tolist()
    if any(len(set(row)) < len(row) for row in rows):
        return "one draw holds the same place twice"
    if not agrees_with(counted(rows), rankings(weights, k), len(rows)):
        return "the frequencies are not those of the law"
    pairs = [[rows[i][0], rows[i + 1][0]] for i in range(0, len(rows) - 1, 2)]
    first = rankings(weights, 1)
    law = {(a, b): p * q for (a,), p in first.items() for (b,), q in first.items()}
    if not agrees_with(counted(pairs), law, len(pairs)):
        return "neighbouring draws depend on each other"
    return None


def repeated(answer, weights, k, generator):
    state = generator.get_state()
    first = answer(weights, k, DRAWS, generator)
    return {
        "draws": first,
        "again": answer(weights, k, DRAWS, generator.set_state(state)),
        "weights": weights,
    }


@case(sample_ranking, judge=judged_by_law)
def first_two_of_four(answer, rng):
    """Two places of four, weights far apart."""
    return repeated(answer, torch.tensor(rng.shuffled([8.0, 4.0, 2.0, 1.0])), 2, rng.spawn())


@case(sample_ranking, judge=judged_by_law)
def one_weight_is_zero(answer, rng):
    """All places but one, and one weight is zero."""
    return repeated(answer, torch.tensor(rng.shuffled([0.6, 0.3, 0.0, 0.1])), 3, rng.spawn())


@case(sample_ranking)
def few_and_many(answer, rng):
    """Shape and type for a single draw, and refusals."""
    weights = torch.tensor(rng.shuffled([0.0, 1.0, 0.0, 2.0]))
    one = answer(torch.tensor([0.0, 3.0, 0.0]), 1, rng.integer(1, 4), rng.spawn())
    return {
        "certain": one,
        "refused": raised(answer, weights, 3, 5, rng.spawn()),
        "as many": list(answer(weights, 2, 5, rng.spawn()).shape),
    }


def enough(weights, k):
    if k > int((weights > 0).sum()):
        raise ValueError("too few weights above 0")


@mistake(sample_ranking, "Places are drawn with replacement.")
def with_replacement(weights, k, draws, generator):
    enough(weights, k)
    return torch.multinomial(weights.expand(draws, -1), k, replacement=True, generator=generator)


@mistake(sample_ranking, "The places are sorted, so the order of the draw is lost.")
def sorted_places(weights, k, draws, generator):
    enough(weights, k)
    return torch.multinomial(weights.expand(draws, -1), k, generator=generator).sort(dim=1).values


@mistake(
    sample_ranking,
    "Uniform noise is added to the logarithms and the largest are taken; the noise must be Gumbel's.",
)
def uniform_noise(weights, k, draws, generator):
    enough(weights, k)
    return (weights.log() + torch.rand(draws, len(weights), generator=generator)).topk(k, dim=1).indices


@mistake(sample_ranking, "Two neighbouring draws share their noise.")
def shared_noise(weights, k, draws, generator):
    enough(weights, k)
    noise = torch.rand((draws + 1) // 2, len(weights), generator=generator).repeat_interleave(2, dim=0)[
        :draws
    ]
    return (weights.log() - (-noise.log()).log()).topk(k, dim=1).indices


@mistake(sample_ranking, "The generator is left aside, so the draws cannot be repeated.")
def global_randomness(weights, k, draws, generator):
    enough(weights, k)
    return torch.multinomial(weights.expand(draws, -1), k)


@mistake(
    sample_ranking, "Every ranking of the drawn set is taken to be equally likely: right sets, wrong order."
)
def shuffled_order(weights, k, draws, generator):
    enough(weights, k)
    rows = torch.multinomial(weights.expand(draws, -1), k, generator=generator)
    return rows.gather(1, torch.rand(rows.shape, generator=generator).argsort(dim=1))


@mistake(sample_ranking, "Too few weights above 0 are not refused.")
def draws_anyway(weights, k, draws, generator):
    return torch.multinomial(weights.clamp_min(1e-30).expand(draws, -1), k, generator=generator)


@alternative(sample_ranking, "Exponential clocks: the k that ring first")
def clocks(weights, k, draws, generator):
    enough(weights, k)
    ring = torch.empty(draws, len(weights), dtype=torch.float64).exponential_(generator=generator) / weights
    return ring.argsort(dim=1)[:, :k]


@alternative(
    sample_ranking, "Draws place after place in Python, by cumulative sums, and last place first in memory"
)
def one_by_one(weights, k, draws, generator):
    enough(weights, k)
    left, places = weights.double().repeat(draws, 1), []
    for _ in range(k):
        total = left.cumsum(dim=1)
        mark = torch.rand(draws, 1, dtype=torch.float64, generator=generator) * total[:, -1:]
        places.append(torch.searchsorted(total, mark, right=True))
        left = left.scatter(1, places[-1], 0.0)
    return torch.cat(places, dim=1)
