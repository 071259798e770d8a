"""accumulate against one padded batch, autograd in float64, and answers that are wrong at an edge."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse import judging
from llmcourse.counting import Counted
from llmcourse.exercise import Rng, find
from llmcourse.lessons.optimizers.accumulate import Small, Step, Watched, uneven, variant

exercise = find("accumulate")
accumulate = exercise.reference
Batches = list[tuple[Tensor, Tensor]]


def model_and_batches(seed: int) -> tuple[Small, Batches]:
    rng = Rng(seed)
    model = Small(rng, torch.float64)
    return model, uneven(rng, model.classes)


def reference_gradients(model: Small, batches: Batches) -> tuple[float, list[Tensor]]:
    """Mean loss over all valid places, and its gradients, from the probabilities of all places laid end to end."""
    logits = torch.cat([model(inputs).flatten(0, 1) for inputs, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets in batches])
    kept = [place for place, target in enumerate(targets.tolist()) if target != -100]
    losses = [logits[p].logsumexp(0) - logits[p, int(targets[p])] for p in kept]
    loss = torch.stack(losses).mean()
    used = [p for p in model.parameters() if p is not model.unused]
    return loss.item(), list(torch.autograd.grad(loss, used))


def gradients(model: Small) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_loss_gradient_and_step_are_those_of_one_batch(seed: int) -> None:
    model, batches = model_and_batches(seed)
    loss, exact = reference_gradients(model, batches)
    before = [p.detach().clone() for p in model.parameters() if p is not model.unused]
    found_loss, norm = accumulate(model, torch.optim.SGD(model.parameters(), lr=0.5), batches, math.inf)
    assert (type(found_loss), type(norm)) == (float, float)
    assert found_loss == pytest.approx(loss, rel=1e-13)
    assert norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in exact)), rel=1e-12)
    used = [p for p in model.parameters() if p is not model.unused]
    for p, old, found, g in zip(used, before, gradients(model), exact, strict=True):
        torch.testing.assert_close(found, g, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(p.detach(), old - 0.5 * g, rtol=1e-12, atol=1e-15)
    assert model.unused.grad is None


def test_order_of_the_micro_batches_and_their_cut_do_not_matter(seed: int) -> None:
    results = []
    for cut in (False, True):
        model, batches = model_and_batches(seed)
        if cut:
            batches = [(i[r : r + 1], t[r : r + 1]) for i, t in batches for r in range(len(i))]
            random.Random(seed).shuffle(batches)
        result = accumulate(model, torch.optim.SGD(model.parameters(), lr=0.5), batches, 0.01)
        results.append([*result, *(p.detach() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)


def test_clipping_is_that_of_torch_on_the_whole_gradient(seed: int) -> None:
    model, batches = model_and_batches(seed)
    _, exact = reference_gradients(model, batches)
    carriers = [torch.zeros_like(g, requires_grad=True) for g in exact]
    for carrier, g in zip(carriers, exact, strict=True):
        carrier.grad = g.clone()
    theirs = torch.nn.utils.clip_grad_norm_(carriers, 1e-2)
    _, norm = accumulate(model, torch.optim.SGD(model.parameters(), lr=0.5), batches, 1e-2)
    assert norm == pytest.approx(theirs.item(), rel=1e-12)
    for mine, carrier in zip(gradients(model), carriers, strict=True):
        assert carrier.grad is not None
        # torch divides by the norm plus 1e-6.
        torch.testing.assert_close(mine, carrier.grad, rtol=2e-6 / norm + 1e-11, atol=0)


def test_the_mean_of_means_is_another_gradient_where_lengths_differ() -> None:
    """One micro-batch of 1 token and one of 9, by hand: weights 1/10 and 9/10 against 1/2 and 1/2."""
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def model(inputs: Tensor) -> Tensor:
        return weight.expand(*inputs.shape, 2)

    def batch(length: int, target: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, length, dtype=torch.int64), torch.full((1, length), target)

    optimizer = torch.optim.SGD([weight], lr=1.0)
    # Both classes have probability 1/2: a token of class 0 has the gradient (-1/2, 1/2), one of class 1 its negative.
    loss, norm = accumulate(model, optimizer, [batch(1, 0), batch(9, 1)], math.inf)
    assert loss == pytest.approx(math.log(2))
    assert weight.tolist() == pytest.approx([-0.4, 0.4])
    assert norm == pytest.approx(0.4 * math.sqrt(2))
    with torch.no_grad():
        weight.zero_()
    means = exercise.mistakes["mean_of_means"].function
    means(model, torch.optim.SGD([weight], lr=1.0), [batch(1, 0), batch(9, 1)], math.inf)
    assert weight.tolist() == pytest.approx([0.0, 0.0])


def test_ignored_targets_have_no_gradient_and_no_weight(seed: int) -> None:
    model, batches = model_and_batches(seed)
    loss, norm = accumulate(model, torch.optim.SGD(model.parameters(), lr=0.0), batches, math.inf)
    padded = [(F.pad(i, (0, 3)), F.pad(t, (0, 3), value=-100)) for i, t in batches]
    padded.append((torch.zeros(2, 4, dtype=torch.int64), torch.full((2, 4), -100)))
    found = accumulate(model, torch.optim.SGD(model.parameters(), lr=0.0), padded, math.inf)
    assert found == pytest.approx((loss, norm), rel=1e-12)


def test_parts_of_longer_sequences_are_those_of_copies(seed: int) -> None:
    results = []
    for copied in (False, True):
        model, _ = model_and_batches(seed)
        tokens = torch.arange(21).view(3, 7) % model.classes
        batches = [(tokens[:, :-1], tokens[:, 1:])]
        if copied:
            batches = [(inputs.contiguous(), targets.contiguous()) for inputs, targets in batches]
        results.append(accumulate(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, math.inf))
    assert results[0] == pytest.approx(results[1], rel=1e-13)


def test_old_gradients_are_dropped_and_an_unused_parameter_stays(seed: int) -> None:
    model, batches = model_and_batches(seed)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    kept = model.unused.detach().clone()
    _, exact = reference_gradients(model, batches)
    accumulate(model, torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1), batches, math.inf)
    assert torch.equal(model.unused.detach(), kept)
    for found, g in zip(gradients(model), exact, strict=True):
        torch.testing.assert_close(found, g, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_nothing_valid_is_refused_and_nothing_changes(seed: int, count: int) -> None:
    model, _ = model_and_batches(seed)
    model.bias.grad = torch.ones_like(model.bias)
    before = [p.detach().clone() for p in model.parameters()]
    nothing = [(torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), -100))] * count
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    counted = Counted(model)
    with pytest.raises(ValueError, match="no valid target"):
        accumulate(counted, optimizer, nothing, 1.0)
    assert counted.calls == 0
    assert all(torch.equal(p.detach(), old) for p, old in zip(model.parameters(), before, strict=True))
    assert torch.equal(gradients(model)[0], torch.ones_like(model.bias))
    assert not optimizer.state


def test_a_gradient_that_is_not_finite_stops_before_the_step(seed: int) -> None:
    model, batches = model_and_batches(seed)
    with torch.no_grad():
        model.head[0, 0] = math.nan
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    with pytest.raises(ValueError, match="expected no NaN or Inf"):
        accumulate(model, optimizer, batches, 1.0)
    assert not optimizer.state
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=0, equal_nan=True)


def test_activations_of_one_micro_batch_are_held_at_a_time(seed: int) -> None:
    model, batches = model_and_batches(seed)
    watched = Watched(model)
    accumulate(watched, torch.optim.SGD(model.parameters(), lr=0.5), batches, math.inf)
    assert (watched.calls, watched.held) == (3, 0)
    together = Watched(model)
    losses = [together(inputs).square().sum() for inputs, _ in batches]
    assert together.held == 2
    torch.stack(losses).sum().backward()


def finishing(before: Callable[[Step, Any, float], None]) -> Callable[..., tuple[float, float]]:
    def finish(self: Step, optimizer: Any, max_norm: float) -> float:
        before(self, optimizer, max_norm)
        return Step.finish(self, optimizer, max_norm)

    return variant(finish=finish)


def with_divisor(count: Callable[[Batches], float]) -> Callable[..., tuple[float, float]]:
    return variant(divisor=lambda self, batches, index: count(batches))


def signs(self: Step, optimizer: Any, max_norm: float) -> None:
    for p in self.parameters(optimizer):
        if p.grad is not None:
            p.grad.sign_()


def first_only(model: Any, optimizer: Any, batches: Batches, max_norm: float) -> tuple[float, float]:
    Step().refuse(batches)
    kept = next(batch for batch in batches if Step().count(batch[1]))
    return variant()(model, optimizer, [kept], max_norm)


def steps_by_itself(model: Any, optimizer: Any, batches: Batches, max_norm: float) -> tuple[float, float]:
    """Plain gradient descent instead of optimizer.step()."""

    class Own(Step):
        def finish(self, optimizer: Any, max_norm: float) -> float:
            norm = self.clipped(optimizer, max_norm)
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            p -= group["lr"] * p.grad
            return norm

    return Own().step(model, optimizer, batches, max_norm)


ATTACKS: dict[str, Callable[..., Any]] = {
    "does nothing": lambda model, optimizer, batches, max_norm: (0.0, 0.0),
    "steps only": lambda model, optimizer, batches, max_norm: optimizer.step() or (0.0, 0.0),
    "signs": finishing(signs),
    "first micro-batch only": first_only,
    "plain descent": steps_by_itself,
    "count of the largest": with_divisor(lambda batches: max(Step().count(t) for _, t in batches)),
    "one token too many": with_divisor(lambda batches: 1 + sum(Step().count(t) for _, t in batches)),
    "count without class 0": with_divisor(
        lambda batches: max(1, sum(int((t > 0).sum()) for _, t in batches))
    ),
    "targets of 0 and more lists": variant(
        summed=lambda self, x, t: F.cross_entropy(x.flatten(0, 1), t.flatten())
    ),
    "label smoothing": variant(
        summed=lambda self, x, t: F.cross_entropy(
            x.flatten(0, 1), t.flatten(), reduction="sum", label_smoothing=0.01
        )
    ),
    "clipped twice, tighter": finishing(
        lambda self, optimizer, bound: (
            [p.grad.mul_(0.999) for p in self.parameters(optimizer) if p.grad is not None] and None
        )
    ),
    "as tensors": lambda *given: tuple(map(torch.tensor, variant()(*given))),
    "as a list": lambda *given: list(variant()(*given)),
    "gradients dropped at the end": lambda model, optimizer, batches, bound: (
        variant()(model, optimizer, batches, bound),
        optimizer.zero_grad(),
    )[0],
    "the model's own zero_grad": lambda model, optimizer, batches, bound: (
        model.zero_grad(),
        variant()(model, optimizer, batches, bound),
    )[1],
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_is_wrong_at_the_edge_loses_points(name: str, seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, ATTACKS[name], seed, expected, naming=False)
    assert verdict.points < exercise.points


def test_the_answer_that_the_attacks_are_made_of_is_right(seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, variant(), seed, expected, naming=False)
    assert verdict.points == exercise.points, verdict.reason
