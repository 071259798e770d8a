"""cross_entropy_backward against autograd in float64, finite differences and words counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.counting import TensorWork
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.cross_entropy_backward import Loss, LossAndGradients, variant

exercise = find("cross_entropy_backward")
cross_entropy_backward = exercise.reference


def some_batch(
    seed: int, tokens: int = 11, words: int = 13, width: int = 6, ignored: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, head in float64 and targets; the first token is valid."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    head = torch.randn(words, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, words, (tokens,), generator=generator)
    drop = torch.rand(tokens, generator=generator) < ignored
    drop[:1] = False
    return hidden, head, targets.masked_fill(drop, -100)


def by_autograd(hidden: Tensor, head: Tensor, targets: Tensor) -> list[Tensor]:
    leaves = [part.detach().clone().requires_grad_() for part in (hidden, head)]
    loss = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, targets)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("words", [1, 2, 13, 150])
@pytest.mark.parametrize("chunk", [1, 2, 3, 10, 11, 12, 1000])
def test_loss_and_gradients_are_those_of_autograd_for_every_chunk(seed: int, chunk: int, words: int) -> None:
    batch = some_batch(seed, words=words)
    for one, other in zip(cross_entropy_backward(*batch, chunk=chunk), by_autograd(*batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_two_words_by_hand() -> None:
    """Logits (0, 0) and (0, ln 3): probabilities 1/2, 1/2 and 1/4, 3/4; the third token is ignored."""
    hidden = torch.tensor([[0.0, 1.0], [1.0, 1.0], [5.0, 7.0]], dtype=torch.float64)
    head = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    loss, grad_hidden, grad_head = cross_entropy_backward(hidden, head, torch.tensor([1, 0, -100]), chunk=2)
    assert loss.item() == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-14)
    grad_logits = [[Fraction(1, 2), Fraction(-1, 2)], [Fraction(-3, 4), Fraction(3, 4)]]
    exact = [
        [sum(grad_logits[t][v] * int(hidden[t, i]) for t in range(2)) / 2 for i in range(2)] for v in range(2)
    ]
    assert exact == [[Fraction(-3, 8), Fraction(-1, 8)], [Fraction(3, 8), Fraction(1, 8)]]
    torch.testing.assert_close(
        grad_head, torch.tensor([[float(part) for part in row] for row in exact], dtype=torch.float64)
    )
    slope = [float(row[1]) * math.log(3) / 2 for row in grad_logits]
    torch.testing.assert_close(
        grad_hidden, torch.tensor([[slope[0], 0.0], [slope[1], 0.0], [0.0, 0.0]], dtype=torch.float64)
    )


def test_a_step_along_a_direction_changes_the_loss_by_what_the_gradients_say(seed: int) -> None:
    hidden, head, targets = some_batch(seed)
    along_hidden, along_head, _ = some_batch(seed + 1)
    _, grad_hidden, grad_head = cross_entropy_backward(hidden, head, targets, chunk=4)

    def loss(size: float) -> float:
        logits = (hidden + size * along_hidden) @ (head + size * along_head).T
        chosen = [
            (logits[i].logsumexp(0) - logits[i, word]).item()
            for i, word in enumerate(targets.tolist())
            if word >= 0
        ]
        return sum(chosen) / len(chosen)

    said = ((grad_hidden * along_hidden).sum() + (grad_head * along_head).sum()).item()
    assert said == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-5, abs=1e-6)


def test_what_a_token_gives_sums_to_zero_over_the_words(seed: int) -> None:
    """softmax minus one-hot sums to 0, so the head's gradient does over its rows."""
    _, _, grad_head = cross_entropy_backward(*some_batch(seed), chunk=3)
    assert grad_head.sum(0).abs().max() < 1e-13


def test_ignored_tokens_might_as_well_not_be_there(seed: int) -> None:
    hidden, head, targets = some_batch(seed, tokens=20)
    kept = targets != -100
    loss, grad_hidden, grad_head = cross_entropy_backward(hidden, head, targets, chunk=3)
    alone = cross_entropy_backward(hidden[kept], head, targets[kept], chunk=3)
    torch.testing.assert_close(loss, alone[0])
    torch.testing.assert_close(grad_hidden[kept], alone[1])
    torch.testing.assert_close(grad_head, alone[2])
    assert not grad_hidden[~kept].any()


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_without_a_valid_token_everything_is_zero(tokens: int, dtype: torch.dtype) -> None:
    hidden, head = torch.ones(tokens, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)
    loss, *gradients = cross_entropy_backward(hidden, head, torch.full((tokens,), -100), chunk=2)
    assert loss.item() == 0 and loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    for part, like in zip(gradients, (hidden, head), strict=True):
        assert part.dtype == dtype and part.shape == like.shape and not part.any()


@pytest.mark.parametrize("size", [1e2, 1e4, 1e8, 1e30])
def test_logits_of_any_size_stay_finite(seed: int, size: float) -> None:
    hidden, head, targets = some_batch(seed)
    found = cross_entropy_backward(hidden.float() * size, head.float(), targets, chunk=4)
    assert all(part.isfinite().all() for part in found)


def test_bfloat16_is_the_rounding_of_what_its_values_give_in_float64(seed: int) -> None:
    hidden, head, targets = some_batch(seed, tokens=40)
    narrow = hidden.bfloat16(), head.bfloat16()
    loss, *gradients = cross_entropy_backward(*narrow, targets, chunk=3)
    exact, *wide = by_autograd(*(part.double() for part in narrow), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, wide, strict=True):
        assert one.dtype == torch.bfloat16
        # Half a step of bfloat16 is 2^-8 of a value at most; the rest is float32's.
        assert ((one.double() - other).abs() <= other.abs() * 2**-7.99 + 1e-6 * other.abs().max()).all()


def test_no_graph_is_built_and_nothing_is_changed(seed: int) -> None:
    hidden, head, targets = some_batch(seed)
    leaves = hidden.clone().requires_grad_(), torch.nn.Parameter(head.clone())
    kept = targets.clone()
    found = cross_entropy_backward(*leaves, targets, chunk=3)
    assert not any(part.requires_grad for part in found)
    assert torch.equal(leaves[0], hidden) and torch.equal(leaves[1], head) and torch.equal(targets, kept)
    with torch.inference_mode():
        again = cross_entropy_backward(hidden, head, targets, chunk=3)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize(("width", "chunk"), [(4, 9), (16, 5)])
def test_three_products_and_no_more_than_the_logits_of_a_chunk(seed: int, width: int, chunk: int) -> None:
    hidden, head, targets = some_batch(seed, tokens=50, words=70, width=width, ignored=0.0)
    with TensorWork() as work:
        cross_entropy_backward(hidden.float(), head.float(), targets, chunk=chunk)
    assert work.flops == 3 * 2 * 50 * 70 * width
    assert work.largest_tensor_bytes <= 4 * 70 * max(width, chunk)
    with TensorWork() as whole:
        by_autograd(hidden.float(), head.float(), targets)
    assert whole.largest_tensor_bytes == 4 * 70 * 50


def test_the_sizes_in_the_statement_are_right() -> None:
    assert round(8192 * 128_256 * 4 / 1e9, 1) == 4.2
    assert "4.2 GB" in (cross_entropy_backward.__doc__ or "")


@pytest.mark.parametrize("target", [13, 14, 1000, -1, -2, -13, -99, -101, 2**40])
def test_targets_that_are_no_words_are_refused(target: int) -> None:
    hidden, head, targets = some_batch(0)
    targets[-1] = target
    with pytest.raises(ValueError, match="targets outside"):
        cross_entropy_backward(hidden, head, targets, chunk=4)


@pytest.mark.parametrize("chunk", [0, -1, -100])
def test_chunks_of_nothing_are_refused(chunk: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        cross_entropy_backward(*some_batch(0), chunk=chunk)


@pytest.mark.parametrize(
    "cut",
    [
        lambda h, w, t: (h[None], w, t),
        lambda h, w, t: (h[0], w, t[:1]),
        lambda h, w, t: (h[:, 1:], w, t),
        lambda h, w, t: (h, w.T, t),
        lambda h, w, t: (h, w[0], t),
        lambda h, w, t: (h[:, None], w[:, None], t),
        lambda h, w, t: (h[:, 0], w[:, 0], t),
        lambda h, w, t: (h, w, t[1:]),
        lambda h, w, t: (h, w, t[:, None]),
        lambda h, w, t: (h, w, t[:1]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(cut: Callable[..., tuple[Tensor, ...]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        cross_entropy_backward(*cut(*some_batch(0)), chunk=4)


def test_a_batch_without_a_valid_token_is_looked_at_all_the_same() -> None:
    hidden, head, targets = some_batch(0)
    ignored = torch.full_like(targets, -100)
    for given, chunk in [((hidden, head, ignored), 0), ((hidden, head[:, 1:], ignored), 4)]:
        with pytest.raises(ValueError, match="expected"):
            cross_entropy_backward(*given, chunk=chunk)


def test_bfloat16_gradients_are_rounded_a_single_time() -> None:
    hidden, head, targets = some_batch(0, tokens=300, ignored=0.0)
    hidden, head, targets = hidden[:259].bfloat16(), head.bfloat16(), targets[:259]
    _, *gradients = cross_entropy_backward(hidden, head, targets, chunk=60)
    _, *exact = by_autograd(hidden.double(), head.double(), targets)
    for found, right in zip(gradients, exact, strict=True):
        assert (found == right.bfloat16()).double().mean() > 0.99


# ------------------------------------------------------------------------------- answers that are wrong at an edge


def with_result(change: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    def answer(hidden: Tensor, head: Tensor, targets: Tensor, *, chunk: int) -> tuple[Tensor, ...]:
        return change(*variant()(hidden, head, targets, chunk=chunk))

    return answer


def refusing(wrong: Callable[[Tensor, int], Tensor]) -> Callable[..., LossAndGradients]:
    def refuse_targets(self: Loss, targets: Tensor, words: int) -> None:
        if bool(wrong(targets, words).any()):
            raise ValueError("targets")

    return variant(refuse_targets=refuse_targets, meant=lambda self, targets: targets.clamp(0, 8))


def by_the_engine(hidden: Tensor, head: Tensor, targets: Tensor, *, chunk: int) -> LossAndGradients:
    """Autograd under a name of its own."""
    Loss().refuse_shapes(hidden, head, targets)
    Loss().refuse_chunk(chunk)
    Loss().refuse_targets(targets, len(head))
    wide = Loss().wide(hidden.dtype)
    count = (targets != -100).sum().clamp_min(1)
    with torch.enable_grad():
        leaves = hidden.detach().requires_grad_(), head.detach().requires_grad_()
        logits = leaves[0].to(wide) @ leaves[1].to(wide).T
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / count
    run = torch.autograd.Variable._execution_engine.run_backward
    found = run((loss,), (torch.ones_like(loss),), False, False, leaves, True, False)
    return loss.detach(), found[0], found[1]


def smoothed(self: Loss, p: Tensor, targets: Tensor) -> Tensor:
    one_hot = torch.nn.functional.one_hot(self.meant(targets), p.shape[1])
    return p - 0.999 * one_hot - 0.001 / p.shape[1]


ATTACKS: dict[str, Callable[..., Any]] = {
    "loss as a number": with_result(lambda loss, h, w: (loss.item(), h, w)),
    "loss [1]": with_result(lambda loss, h, w: (loss[None], h, w)),
    "loss in float64": with_result(lambda loss, h, w: (loss.double(), h, w)),
    "head first": with_result(lambda loss, h, w: (loss, w, h)),
    "no gradient of hidden": with_result(lambda loss, h, w: (loss, torch.zeros_like(h), w)),
    "no gradient of the head": with_result(lambda loss, h, w: (loss, h, torch.zeros_like(w))),
    "no loss": with_result(lambda loss, h, w: (torch.zeros_like(loss), h, w)),
    "by autograd's engine": by_the_engine,
    "too large targets let through": refusing(lambda t, words: (t < 0) & (t != -100)),
    "V let through": refusing(lambda t, words: (t > words) | ((t < 0) & (t != -100))),
    "-1 let through": refusing(lambda t, words: (t >= words) | ((t < -1) & (t != -100))),
    "targets below -100 let through": refusing(lambda t, words: (t >= words) | ((t < 0) & (t > -100))),
    "targets above -100 let through": refusing(lambda t, words: (t >= words) | (t < -100)),
    "indices from the end let through": refusing(lambda t, words: (t >= words) | (t < -words) & (t != -100)),
    "clamped at 50": variant(product=lambda self, x, w: (x @ w.T).clamp(-50, 50)),
    "clamped at 1e4": variant(product=lambda self, x, w: (x @ w.T).clamp(-1e4, 1e4)),
    "clamped above": variant(product=lambda self, x, w: (x @ w.T).clamp_max(88)),
    "clamped below": variant(product=lambda self, x, w: (x @ w.T).clamp_min(-88)),
    "smoothed": variant(less_one_hot=smoothed),
    "valid tokens and one": variant(divisor=lambda self, t: (t != -100).sum() + 1),
    "1e-6 more than the valid tokens": variant(divisor=lambda self, t: (t != -100).sum() + 1e-4),
    "divided by the words": variant(divisor=lambda self, t: 10),
    "a last chunk of one dropped": variant(
        starts=lambda self, n, chunk: range(0, n - (n > chunk > 1 and n % chunk == 1), chunk)
    ),
    "the first chunk alone": variant(starts=lambda self, n, chunk: range(0, min(n, chunk), chunk)),
    "head in bfloat16": variant(product=lambda self, x, w: x @ w.bfloat16().to(w.dtype).T),
    "softmax in bfloat16": variant(
        softmax=lambda self, logits: logits.bfloat16().softmax(1).to(logits.dtype)
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_is_wrong_at_the_edge_loses_points(name: str, seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, ATTACKS[name], seed, expected, naming=False)
    assert verdict.points == 0


def test_the_answer_that_the_attacks_are_made_of_is_right(seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, variant(), seed, expected, naming=False)
    assert verdict.points == exercise.points, verdict.reason


@pytest.mark.parametrize("name", exercise.forbid)
def test_the_library_answers_that_are_switched_off_exist(name: str) -> None:
    place: Any = torch
    for part in name.split(".")[1:]:
        place = getattr(place, part)
    assert callable(place) or isinstance(place, torch._C._ImperativeEngine)
