"""Gradient accumulation: one optimizer step from many micro-batches, with the gradient of all of them as one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from llmcourse.exercise import alternative, case, cost, exercise, mistake, raised
from llmcourse.lessons.optimizers.clip_by_global_norm import clip_by_global_norm


@exercise(
    points=3,
    minutes=10,
    mutates=True,
    uses=(clip_by_global_norm,),
    forbid=(
        "torch.nn.utils.clip_grad_norm_",
        "torch.nn.utils.clip_grads_with_norm_",
        "torch.nn.utils.clip_grad.clip_grad_norm_",
        "torch.nn.utils.clip_grad._clip_grads_with_norm_",
    ),
    hints=(
        "A mean over all tokens is one sum over one count. The sum can be taken micro-batch by micro-batch; the count "
        "belongs to all of them, and targets alone are enough to know it.",
        "backward() adds to .grad, also to what an earlier step left there. The mean of a micro-batch without a valid "
        "token is 0 / 0.",
    ),
)
def accumulate(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[Tensor, Tensor]],
    max_norm: float,
) -> tuple[float, float]:
    """One optimizer step on several micro-batches, as if they were one batch; returns its
    loss and its gradient's norm; about 12 lines.

    micro_batches are pairs (inputs, targets), both int64 [B, S]; B and S may differ from
    pair to pair. model(inputs) gives logits [B, S, V], float32 or float64, which may be as
    large as 1000. No tensor need be contiguous. targets[b, s] is the class that the logits
    at [b, s] should give: nothing is to be shifted. A target of -100 is not valid: it
    counts nowhere. Class 0 is a class like any other.

        loss = (sum of the cross-entropies of all valid targets of all micro-batches)
               / (number of all valid targets of all micro-batches)

    The gradient of this loss is clipped once, with clip_by_global_norm (the exercise before
    this) and max_norm, over the parameters of all groups of the optimizer together. Then
    optimizer.step() is called, once.

    Gradients from before are set to None first (optimizer.zero_grad()); afterwards .grad
    holds the clipped gradient. A micro-batch without a valid target (its logits are finite)
    adds nothing. Returns (loss, norm): two Python floats, the norm from before clipping.

    ValueError, with parameters, gradients and optimizer as they were, when there is no
    valid target at all, or no micro-batch. A ValueError of clip_by_global_norm goes
    through, before any step.

    For a third of the points, micro-batches are what saves memory: model is called at most
    once for each, with no more tokens than the largest has; what autograd keeps of one is
    free before the next call, and its logits before the call after that.

    One process: with several ranks, the count would be that of all ranks.
    """
    ### BEGIN SOLUTION
    valid = sum(int((targets != -100).sum()) for _, targets in micro_batches)
    if valid == 0:
        raise ValueError(f"no valid target in {len(micro_batches)} micro-batches; expected at least one")
    optimizer.zero_grad()
    mean = 0.0
    for inputs, targets in micro_batches:
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / valid
        loss.backward()
        mean += loss.item()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip_by_global_norm(parameters, max_norm)
    optimizer.step()
    return mean, norm
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases

UNCLIPPED = 1e6


class Small(torch.nn.Module):
    """A decoder in small: a running mean of embeddings, one hidden layer, a head; and a parameter that is not used."""

    def __init__(self, rng, dtype=torch.float32):
        super().__init__()
        self.classes, width, hidden = rng.integer(9, 12), rng.integer(4, 6), rng.integer(7, 8)
        self.embedding = torch.nn.Parameter(rng.normal(self.classes, width, dtype=dtype))
        self.inner = torch.nn.Parameter(rng.normal(hidden, width, dtype=dtype))
        self.head = torch.nn.Parameter(rng.normal(self.classes, hidden, dtype=dtype))
        self.bias = torch.nn.Parameter(rng.normal(self.classes, dtype=dtype))
        self.unused = torch.nn.Parameter(rng.normal(3, dtype=dtype))

    def hidden(self, inputs):
        places = torch.arange(1, inputs.shape[1] + 1, dtype=self.embedding.dtype)[:, None]
        return torch.tanh((self.embedding[inputs].cumsum(dim=1) / places) @ self.inner.T)

    def forward(self, inputs):
        return self.hidden(inputs) @ self.head.T + self.bias


class Steps(torch.optim.SGD):
    """SGD that counts its steps."""

    def __init__(self, groups, **options):
        super().__init__(groups, **options)
        self.taken = 0

    def step(self, closure=None):
        self.taken += 1
        return super().step(closure)


def optimizer_of(rng, model, **options):
    """Two groups of options of their own; every parameter of the model is in one of them."""
    matrices = [model.inner, model.head]
    rest = [model.embedding, model.bias, model.unused]
    return Steps(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "lr": rng.integer(2, 9) / 40}],
        lr=rng.integer(2, 9) / 10,
        momentum=0.9,
        weight_decay=0.05,
        **options,
    )


def micro_batch(rng, classes, rows, length, valid):
    """(inputs, targets) of which `valid` places count; class 0 is among them."""
    targets = rng.integers(0, classes - 1, rows * length)
    places = rng.shuffled(range(rows * length))
    targets[places[0]] = 0
    targets[places[valid:]] = -100
    return rng.integers(0, classes - 1, rows, length), targets.view(rows, length)


def uneven(rng, classes):
    """Micro-batches of other sizes and far apart in how many of their places count."""
    rows = rng.integer(2, 3)
    return rng.shuffled(
        [
            micro_batch(rng, classes, rows, 9, 9 * rows - rng.integer(0, 2)),
            micro_batch(rng, classes, 1, 5, rng.integer(1, 2)),
            micro_batch(rng, classes, 4, 6, rng.integer(5, 8)),
        ]
    )


def seen(model, optimizer, result, dtype=torch.float32):
    """What a step came to: loss and norm in the model's dtype, steps, parameters and gradients."""
    floats = isinstance(result, tuple) and all(type(number) is float for number in result)
    return {
        "loss and norm": torch.tensor(result, dtype=torch.float64).to(dtype) if floats else result,
        "steps": optimizer.taken,
        "parameters": [p.detach().clone() for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


@case(accumulate)
def uneven_micro_batches(answer, rng):
    """Three micro-batches of which one has many valid targets, one has few, and one is mostly padding."""
    model = Small(rng)
    optimizer = optimizer_of(rng, model)
    return seen(model, optimizer, answer(model, optimizer, uneven(rng, model.classes), UNCLIPPED))


@case(accumulate)
def clipped_once(answer, rng):
    """A bound far below the norm, in float64; then one micro-batch alone."""
    found = []
    for count in (3, 1):
        model = Small(rng, torch.float64)
        optimizer = optimizer_of(rng, model)
        batches = uneven(rng, model.classes)[:count]
        result = answer(model, optimizer, batches, rng.integer(2, 9) / 1e4)
        found.append(seen(model, optimizer, result, torch.float64))
    return found


@case(accumulate)
def equal_micro_batches(answer, rng):
    """Micro-batches of one size, in which every target counts: some ways of dividing agree here."""
    model = Small(rng)
    optimizer = optimizer_of(rng, model)
    rows, length = rng.integer(2, 3), rng.integer(4, 6)
    batches = [micro_batch(rng, model.classes, rows, length, rows * length) for _ in range(rng.integer(2, 4))]
    return seen(model, optimizer, answer(model, optimizer, batches, UNCLIPPED))


@case(accumulate)
def steps_in_a_row(answer, rng):
    """Three steps of one model, with a learning rate that changes; gradients of one must not reach the next."""
    model = Small(rng, torch.float64)
    optimizer = optimizer_of(rng, model)
    found = []
    for bound in rng.shuffled([UNCLIPPED, math.inf, 0.002]):
        for group in optimizer.param_groups:
            group["lr"] *= 0.7
        result = answer(model, optimizer, uneven(rng, model.classes), bound)
        found.append(seen(model, optimizer, result, torch.float64))
    return found


@case(accumulate)
def gradients_from_before(answer, rng):
    """Every parameter has a gradient from earlier, the unused one too: it must have none, and stay where it is."""
    model = Small(rng)
    optimizer = optimizer_of(rng, model)
    for p in model.parameters():
        p.grad = rng.normal(*p.shape) * rng.integer(1, 9)
    return seen(model, optimizer, answer(model, optimizer, uneven(rng, model.classes), UNCLIPPED))


@case(accumulate)
def a_function_and_frozen_parameters(answer, rng):
    """The model is a plain function, and the optimizer has only some of its parameters."""
    model = Small(rng)
    optimizer = Steps([model.inner, model.bias], lr=rng.integer(2, 9) / 10)
    model.embedding.requires_grad_(False)
    result = answer(lambda inputs: model(inputs), optimizer, uneven(rng, model.classes), 1e-3)
    model.head.grad = None  # not the optimizer's: neither clipped nor stepped
    return seen(model, optimizer, result)


@case(accumulate)
def parts_of_longer_sequences(answer, rng):
    """Inputs and targets cut out of the same tokens, and logits that are a transpose: none of them contiguous."""
    model = Small(rng)
    optimizer = optimizer_of(rng, model)
    batches = []
    for _ in range(2):
        tokens = rng.integers(0, model.classes - 1, rng.integer(2, 4), rng.integer(5, 8))
        tokens[0, -1] = -100
        batches.append((tokens[:, :-1], tokens[:, 1:]))

    def turned(inputs):
        return (model.head @ model.hidden(inputs).mT + model.bias[:, None]).mT

    return seen(model, optimizer, answer(turned, optimizer, batches, UNCLIPPED))


@case(accumulate)
def logits_far_apart(answer, rng):
    """Logits around 500 and -500, in float64; some targets have the low ones."""
    model = Small(rng, torch.float64)
    optimizer = optimizer_of(rng, model)
    signs = torch.ones(model.classes, dtype=torch.float64)
    signs[rng.shuffled(range(model.classes))[: rng.integer(4, 5)]] = -1
    with torch.no_grad():
        model.bias += 500 * signs
    batches = uneven(rng, model.classes)
    batches[1][1][0, 0], batches[1][1][0, 1] = signs.argmin(), signs.argmax()
    return seen(model, optimizer, answer(model, optimizer, batches, UNCLIPPED), torch.float64)


@case(accumulate)
def nothing_valid_in_one(answer, rng):
    """Micro-batches without a valid target, at any place among the others."""
    model = Small(rng)
    optimizer = optimizer_of(rng, model)
    batches = uneven(rng, model.classes)
    batches.insert(rng.integer(0, 2), micro_batch(rng, model.classes, 2, rng.integer(3, 6), 0))
    return seen(model, optimizer, answer(model, optimizer, batches, UNCLIPPED))


@case(accumulate)
def nothing_valid_at_all(answer, rng):
    """No valid target and no micro-batch are refused, and nothing changes; beside them, a step."""
    found = {}
    model = Small(rng)
    optimizer = optimizer_of(rng, model)
    found["a step"] = seen(model, optimizer, answer(model, optimizer, uneven(rng, model.classes), UNCLIPPED))
    padding = [micro_batch(rng, model.classes, rng.integer(1, 3), 4, 0) for _ in range(2)]
    for name, batches in {"padding": padding, "one": padding[:1], "none": []}.items():
        found[name] = raised(answer, model, optimizer, batches, 0.5)
        found[f"after {name}"] = seen(model, optimizer, None)
    return found


@case(accumulate)
def broken_gradients(answer, rng):
    """A weight that is infinite or NaN: the ValueError of clipping goes through, and no step is taken."""
    found = {}
    for value in (math.inf, math.nan):
        model = Small(rng)
        optimizer = optimizer_of(rng, model)
        found[f"a step before {value}"] = seen(
            model, optimizer, answer(model, optimizer, uneven(rng, model.classes), UNCLIPPED)
        )
        with torch.no_grad():
            model.inner[rng.integer(0, 3), rng.integer(0, 3)] = value
        refused = raised(answer, model, optimizer, uneven(rng, model.classes), 1.0)
        after = seen(model, optimizer, None)
        found[str(value)] = [refused, after["steps"], after["parameters"]]
    return found


class Watched:
    """A model that notes its calls, and what of earlier calls is still held when the next one begins."""

    def __init__(self, model):
        self.model, self.calls, self.held, self.largest_call = model, 0, 0, 0
        self.logits_held = 0
        self._kept, self._logits = [], []

    def __call__(self, inputs):
        self.held = max(self.held, sum(not reference.expired() for reference in self._kept))
        earlier = self._logits[:-1]  # a local variable may still hold the last ones
        self.logits_held = max(self.logits_held, sum(not reference.expired() for reference in earlier))
        self.calls += 1
        self.largest_call = max(self.largest_call, inputs.numel())
        hidden = self.model.hidden(inputs)
        self._kept.append(StorageWeakRef(hidden.untyped_storage()))
        logits = hidden @ self.model.head.T + self.model.bias
        self._logits.append(StorageWeakRef(logits.untyped_storage()))
        return logits


@cost(accumulate, share=1 / 3)
def one_micro_batch_at_a_time(answer, rng):
    """Five micro-batches: calls of the model, the largest of them, and graphs that are held from one to the next."""
    model = Small(rng)
    optimizer = optimizer_of(rng, model)
    shapes = [(rng.integer(1, 3), 4), (2, 5), (3, 6), (1, rng.integer(6, 9)), (2, 7)]
    batches = [micro_batch(rng, model.classes, rows, length, rows * length - 1) for rows, length in shapes]
    watched = Watched(model)
    result = answer(watched, optimizer, batches, UNCLIPPED)
    largest = max(inputs.numel() for inputs, _ in batches)
    return {
        "observed": seen(model, optimizer, result),
        "calls of the model": (watched.calls, len(batches)),
        "tokens of the largest call": (watched.largest_call, largest),
        "earlier micro-batches still held at a call": (watched.held, 0),
        "logits held at a call, beside those of the one before": (watched.logits_held, 0),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Step:
    """A right answer in small steps; a mistake replaces one of them."""

    def count(self, targets: Tensor) -> int:
        return int(targets.ne(-100).sum())

    def refuse(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        if sum(self.count(targets) for _, targets in batches) == 0:
            raise ValueError("nothing to learn from")

    def drop(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)

    def summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="sum")

    def divisor(self, batches: list[tuple[Tensor, Tensor]], index: int) -> float:
        """By what the sum of micro-batch `index` is divided."""
        return sum(self.count(targets) for _, targets in batches)

    def part(self, logits: Tensor, batches: list[tuple[Tensor, Tensor]], index: int) -> Tensor:
        """What micro-batch `index` adds to the loss."""
        return self.summed(logits, batches[index][1]) / self.divisor(batches, index)

    def back(self, part: Tensor) -> None:
        part.backward()

    def after_each(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        pass

    def parameters(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    def clipped(self, optimizer: torch.optim.Optimizer, max_norm: float) -> float:
        return clip_by_global_norm(self.parameters(optimizer), max_norm)

    def finish(self, optimizer: torch.optim.Optimizer, max_norm: float) -> float:
        norm = self.clipped(optimizer, max_norm)
        optimizer.step()
        return norm

    def loss(self, parts: list[float], batches: list[tuple[Tensor, Tensor]]) -> float:
        return sum(parts)

    def step(self, model, optimizer, batches, max_norm):
        self.refuse(batches)
        self.drop(optimizer)
        parts = self.parts(model, optimizer, batches, max_norm)
        norm = self.finish(optimizer, max_norm)
        return self.loss(parts, batches), norm

    def parts(self, model, optimizer, batches, max_norm):
        parts = []
        for index, (inputs, _) in enumerate(batches):
            part = self.part(model(inputs), batches, index)
            self.back(part)
            parts.append(part.item())
            self.after_each(optimizer, max_norm)
        return parts


def variant(**steps: Any) -> Callable[..., tuple[float, float]]:
    """An answer with some steps replaced."""
    return type("Variant", (Step,), steps)().step


def divided_by(
    count: Callable[[list[tuple[Tensor, Tensor]], int], float],
) -> Callable[..., tuple[float, float]]:
    """An answer that divides the sum of a micro-batch by another number."""
    return variant(divisor=lambda self, batches, index: count(batches, index))


def valid(batches, index):
    return max(1, Step().count(batches[index][1]))


@mistake(
    accumulate,
    "Takes the mean of the micro-batches' means: a token in a short micro-batch weighs more than one in a long one. "
    "Widely used trainers did so until October 2024.",
)
def mean_of_means(*arguments):
    return divided_by(lambda batches, index: len(batches) * valid(batches, index))(*arguments)


@mistake(
    accumulate,
    "Adds up the micro-batches' means: with n of them the gradient is about n times too large.",
)
def sum_of_means(*arguments):
    return divided_by(valid)(*arguments)


@mistake(
    accumulate, "Adds up the cross-entropies and never divides: the gradient grows with the number of tokens."
)
def never_divided(*arguments):
    return divided_by(lambda batches, index: 1)(*arguments)


@mistake(
    accumulate,
    "Divides the sums by the number of micro-batches; a mean over tokens needs the number of tokens.",
)
def by_the_micro_batches(*arguments):
    return divided_by(lambda batches, index: len(batches))(*arguments)


@mistake(accumulate, "Divides by all places, padding included: the more padding, the smaller the gradient.")
def by_all_places(*arguments):
    return divided_by(lambda batches, index: sum(t.numel() for _, t in batches))(*arguments)


@mistake(
    accumulate,
    "Divides by how many tokens there were so far: what came first has been divided by a part of the count.",
)
def by_the_tokens_so_far(*arguments):
    return divided_by(lambda batches, index: max(1, sum(Step().count(t) for _, t in batches[: index + 1])))(
        *arguments
    )


@mistake(accumulate, "Divides by the number of sequences, not of tokens.")
def by_the_sequences(*arguments):
    return divided_by(lambda batches, index: sum(len(t) for _, t in batches))(*arguments)


@mistake(
    accumulate,
    "Divides each micro-batch by all of its own places and the number of micro-batches: reduction='none' and mean().",
)
def mean_of_padded_means(*arguments):
    return divided_by(lambda batches, index: len(batches) * batches[index][1].numel())(*arguments)


@mistake(accumulate, "Divides by the total twice: once in the loss, and once more in the gradients.")
def divided_twice(model, optimizer, batches, max_norm):
    total = sum(Step().count(targets) for _, targets in batches)

    def finish(self, optimizer, max_norm):
        for p in self.parameters(optimizer):
            if p.grad is not None:
                p.grad /= total
        return Step.finish(self, optimizer, max_norm)

    return variant(finish=finish)(model, optimizer, batches, max_norm)


@mistake(
    accumulate,
    "Weights each micro-batch's mean by its share of the tokens: right, but for one without a valid target the mean is "
    "NaN, and NaN times 0 stays NaN.",
)
def weighted_means(*arguments):
    def part(self, logits, batches, index):
        targets = batches[index][1]
        mean = F.cross_entropy(logits.transpose(1, 2), targets)
        return mean * self.count(targets) / self.divisor(batches, index)

    return variant(part=part)(*arguments)


@mistake(accumulate, "Takes class 0 for padding and leaves it out; only -100 is not valid.")
def class_zero_is_padding(model, optimizer, batches, max_norm):
    hidden = [(inputs, targets.masked_fill(targets == 0, -100)) for inputs, targets in batches]
    return variant()(model, optimizer, hidden, max_norm)


@mistake(
    accumulate, "Takes -100 for class 0, to have an index that exists: the model learns to answer padding."
)
def padding_is_class_zero(model, optimizer, batches, max_norm):
    Step().refuse(batches)
    return variant()(model, optimizer, [(i, t.clamp_min(0)) for i, t in batches], max_norm)


@mistake(accumulate, "Shifts targets by one more place; they already stand beside their logits.")
def shifted_once_more(*arguments):
    def summed(self, logits, targets):
        return Step.summed(self, logits[:, :-1], targets[:, 1:])

    return variant(summed=summed)(*arguments)


@mistake(
    accumulate,
    "Flattens with view, which logits and targets that are parts or transposes of other tensors do not allow.",
)
def flattened_by_view(*arguments):
    def summed(self, logits, targets):
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), reduction="sum")

    return variant(summed=summed)(*arguments)


@mistake(
    accumulate,
    "Adds 1e-30 to the softmax before the logarithm: where the right class has less, the loss stays at 69 and the "
    "gradient is 0.",
)
def logarithm_with_a_floor(*arguments):
    def summed(self, logits, targets):
        logs = (logits.softmax(-1) + 1e-30).log()
        return F.nll_loss(logs.transpose(1, 2), targets, reduction="sum")

    return variant(summed=summed)(*arguments)


@mistake(accumulate, "Clamps the logits: beyond the clamp they are all alike and have no gradient.")
def logits_clamped(*arguments):
    def summed(self, logits, targets):
        return Step.summed(self, logits.clamp(-50, 50), targets)

    return variant(summed=summed)(*arguments)


@mistake(accumulate, "Stops at a micro-batch without a valid target: those after it are lost.")
def stops_at_an_empty_one(model, optimizer, batches, max_norm):
    kept = []
    for inputs, targets in batches:
        if not Step().count(targets):
            break
        kept.append((inputs, targets))
    if not kept and Step().divisor(batches, 0):
        kept = batches[1:2]
    return variant()(model, optimizer, kept, max_norm)


@mistake(accumulate, "Refuses a micro-batch without a valid target; it adds nothing, and the others do.")
def refuses_an_empty_one(model, optimizer, batches, max_norm):
    if not all(Step().count(targets) for _, targets in batches):
        raise ValueError("nothing valid")
    return variant()(model, optimizer, batches, max_norm)


@mistake(
    accumulate,
    "Steps although no target is valid: gradients are NaN or 0, and momentum and weight decay move the weights anyway.",
)
def steps_on_nothing(*arguments):
    def divisor(self, batches, index):
        return max(1, Step.divisor(self, batches, index))

    return variant(refuse=lambda self, batches: None, divisor=divisor)(*arguments)


@mistake(accumulate, "Finds out that nothing is valid only after the gradients of the step before are gone.")
def refuses_after_zeroing(model, optimizer, batches, max_norm):
    optimizer.zero_grad()
    return variant()(model, optimizer, batches, max_norm)


@mistake(accumulate, "Returns a loss of 0 when no target is valid; the statement asks for a ValueError.")
def returns_without_a_step(model, optimizer, batches, max_norm):
    if not sum(Step().count(targets) for _, targets in batches):
        return 0.0, 0.0
    return variant()(model, optimizer, batches, max_norm)


@mistake(accumulate, "Never drops old gradients: each step is made from all steps before it.")
def never_dropped(*arguments):
    return variant(drop=lambda self, optimizer: None)(*arguments)


@mistake(
    accumulate, "Drops gradients after the step only: what was there before the first call is counted in."
)
def dropped_afterwards(model, optimizer, batches, max_norm):
    result = variant(drop=lambda self, optimizer: None)(model, optimizer, batches, max_norm)
    optimizer.zero_grad()
    return result


@mistake(
    accumulate,
    "Fills old gradients with zeros instead of dropping them: a parameter that the batch does not use gets a gradient "
    "of 0, and weight decay and momentum move it.",
)
def filled_with_zeros(*arguments):
    return variant(drop=lambda self, optimizer: optimizer.zero_grad(set_to_none=False))(*arguments)


@mistake(accumulate, "Drops the gradients before each micro-batch: only the last one is learned from.")
def only_the_last_one(model, optimizer, batches, max_norm):
    class Last(Step):
        def back(self, part):
            optimizer.zero_grad()
            part.backward()

    return Last().step(model, optimizer, batches, max_norm)


@mistake(
    accumulate, "Steps after every micro-batch: that is no accumulation, but training with small batches."
)
def a_step_for_each(model, optimizer, batches, max_norm):
    class Each(Step):
        norm = 0.0

        def after_each(self, optimizer, max_norm):
            self.norm = self.clipped(optimizer, max_norm)
            optimizer.step()
            optimizer.zero_grad()

        def finish(self, optimizer, max_norm):
            return self.norm

    return Each().step(model, optimizer, batches, max_norm)


@mistake(accumulate, "Steps twice: once when the last micro-batch is reached, and once after the loop.")
def steps_twice(*arguments):
    def finish(self, optimizer, max_norm):
        norm = Step.finish(self, optimizer, max_norm)
        optimizer.step()
        return norm

    return variant(finish=finish)(*arguments)


@mistake(accumulate, "Takes no step: the gradients are ready, and no parameter moves.")
def no_step(*arguments):
    return variant(finish=lambda self, optimizer, max_norm: self.clipped(optimizer, max_norm))(*arguments)


@mistake(
    accumulate,
    "Clips what has been accumulated after every micro-batch: the early ones are cut again and again.",
)
def clipped_after_each(*arguments):
    return variant(after_each=lambda self, optimizer, max_norm: self.clipped(optimizer, max_norm) and None)(
        *arguments
    )


@mistake(
    accumulate,
    "Clips the gradient of each micro-batch and adds up the rest: the sum is longer than the bound, and turned.",
)
def each_clipped_alone(model, optimizer, batches, max_norm):
    class Alone(Step):
        def parts(self, model, optimizer, batches, max_norm):
            parts, sums = [], {}
            for index, (inputs, _) in enumerate(batches):
                optimizer.zero_grad()
                part = self.part(model(inputs), batches, index)
                part.backward()
                parts.append(part.item())
                self.clipped(optimizer, max_norm)
                for p in self.parameters(optimizer):
                    if p.grad is not None:
                        sums[p] = sums.get(p, 0.0) + p.grad
            for p, total in sums.items():
                p.grad = total
            return parts

        def finish(self, optimizer, max_norm):
            norm = clip_by_global_norm(self.parameters(optimizer), math.inf)
            optimizer.step()
            return norm

    return Alone().step(model, optimizer, batches, max_norm)


@mistake(
    accumulate, "Clips the sum before it is divided by the count: the gradient ends far below the bound."
)
def clipped_before_dividing(model, optimizer, batches, max_norm):
    total = sum(Step().count(targets) for _, targets in batches)

    def finish(self, optimizer, max_norm):
        norm = self.clipped(optimizer, max_norm)
        for p in self.parameters(optimizer):
            if p.grad is not None:
                p.grad /= total
        optimizer.step()
        return norm

    def loss(self, parts, batches):
        return sum(parts) / total

    return variant(finish=finish, loss=loss, divisor=lambda self, batches, index: 1)(
        model, optimizer, batches, max_norm
    )


@mistake(accumulate, "Does not clip: max_norm is not used.")
def not_clipped(*arguments):
    def clipped(self, optimizer, max_norm):
        return clip_by_global_norm(self.parameters(optimizer), math.inf)

    return variant(clipped=clipped)(*arguments)


@mistake(accumulate, "Clips after the step: the step is made with gradients of any size.")
def clipped_after_the_step(*arguments):
    def finish(self, optimizer, max_norm):
        norm = clip_by_global_norm(self.parameters(optimizer), math.inf)
        optimizer.step()
        self.clipped(optimizer, max_norm)
        return norm

    return variant(finish=finish)(*arguments)


@mistake(accumulate, "Clips each parameter group by its own norm; the bound is for all of them together.")
def each_group_by_itself(*arguments):
    def clipped(self, optimizer, max_norm):
        return math.hypot(*(clip_by_global_norm(g["params"], max_norm) for g in optimizer.param_groups))

    return variant(clipped=clipped)(*arguments)


@mistake(accumulate, "Clips the first parameter group only.")
def first_group_only(*arguments):
    def parameters(self, optimizer):
        return optimizer.param_groups[0]["params"]

    return variant(parameters=parameters)(*arguments)


@mistake(
    accumulate,
    "Takes model.parameters() to clip: the model may be any callable, and the optimizer may hold other parameters.",
)
def asks_the_model(model, optimizer, batches, max_norm):
    parameters = list(model.model.parameters() if isinstance(model, Watched) else model.parameters())
    return variant(parameters=lambda self, optimizer: parameters)(model, optimizer, batches, max_norm)


@mistake(
    accumulate,
    "Steps with broken gradients: the ValueError of clipping is caught, and the weights become NaN.",
)
def steps_with_broken_gradients(*arguments):
    def clipped(self, optimizer, max_norm):
        try:
            return Step.clipped(self, optimizer, max_norm)
        except ValueError:
            return math.nan

    return variant(clipped=clipped)(*arguments)


@mistake(accumulate, "Returns the mean of the micro-batches' losses, though the gradient is right.")
def loss_of_means(*arguments):
    def loss(self, parts, batches):
        total = self.divisor(batches, 0)
        return sum(part * total / valid(batches, i) for i, part in enumerate(parts)) / len(parts)

    return variant(loss=loss)(*arguments)


@mistake(accumulate, "Returns the loss of the last micro-batch alone.")
def loss_of_the_last(*arguments):
    def loss(self, parts, batches):
        return parts[-1] * self.divisor(batches, 0) / valid(batches, len(batches) - 1)

    return variant(loss=loss)(*arguments)


@mistake(accumulate, "Returns the sum of all cross-entropies instead of their mean.")
def loss_not_divided(*arguments):
    def loss(self, parts, batches):
        return sum(parts) * self.divisor(batches, 0)

    return variant(loss=loss)(*arguments)


@mistake(accumulate, "Returns the norm after clipping.")
def norm_after_clipping(model, optimizer, batches, max_norm):
    loss, norm = variant()(model, optimizer, batches, max_norm)
    return loss, min(norm, max_norm)


@mistake(
    accumulate,
    "Pads all micro-batches into one batch: the gradient is right, and the memory is that of the whole batch.",
)
def all_in_one_batch(model, optimizer, batches, max_norm):
    Step().refuse(batches)
    length = max(inputs.shape[1] for inputs, _ in batches)
    inputs = torch.cat([F.pad(i, (0, length - i.shape[1])) for i, _ in batches])
    targets = torch.cat([F.pad(t, (0, length - t.shape[1]), value=-100) for _, t in batches])
    return variant()(model, optimizer, [(inputs, targets)], max_norm)


@mistake(
    accumulate,
    "Adds up all losses and calls backward once: every micro-batch's activations are held until the end.",
)
def one_backward_at_the_end(model, optimizer, batches, max_norm):
    class Together(Step):
        def parts(self, model, optimizer, batches, max_norm):
            parts = [self.part(model(inputs), batches, i) for i, (inputs, _) in enumerate(batches)]
            torch.stack(parts).sum().backward()
            return [part.item() for part in parts]

    return Together().step(model, optimizer, batches, max_norm)


@mistake(
    accumulate,
    "Keeps the graph with retain_graph=True, which only a second backward through it would need.",
)
def graph_retained(*arguments):
    class Retained(Step):
        def back(self, part):
            part.backward(retain_graph=True)
            self.kept = part

    return Retained().step(*arguments)


@mistake(
    accumulate,
    "Collects the logits of all micro-batches: their gradients are done, and their memory is held until the step.",
)
def logits_collected(model, optimizer, batches, max_norm):
    kept = []

    def part(self, logits, batches, index):
        kept.append(logits.detach())
        return Step.part(self, logits, batches, index)

    return variant(part=part)(model, optimizer, batches, max_norm)


@mistake(
    accumulate,
    "Runs the model twice on each micro-batch, once for the loss it reports and once for the gradient.",
)
def forward_twice(model, optimizer, batches, max_norm):
    Step().refuse(batches)
    with torch.no_grad():
        for inputs, _ in batches:
            model(inputs)
    return variant()(model, optimizer, batches, max_norm)


@alternative(accumulate, "Adds up plain sums, and divides the gradients and the loss by the count at the end")
def divides_the_gradients(model, optimizer, batches, max_norm):
    def loss(self, parts, batches):
        return sum(parts) / Step.divisor(self, batches, 0)

    class Late(Step):
        def finish(self, optimizer, max_norm):
            for p in self.parameters(optimizer):
                if p.grad is not None:
                    p.grad /= Step.divisor(self, batches, 0)
            return super().finish(optimizer, max_norm)

        def divisor(self, batches, index):
            return 1

    Late.loss = loss
    Late.refuse = lambda self, batches: Step().refuse(batches)
    return Late().step(model, optimizer, batches, max_norm)


@alternative(
    accumulate, "Selects valid places, takes log-softmax and gathers, skips what is empty, and goes backwards"
)
def gathers(model, optimizer, batches, max_norm):
    def summed(self, logits, targets):
        kept = targets != -100
        logs = logits[kept].log_softmax(-1)
        return -logs.gather(1, targets[kept][:, None]).sum()

    Step().refuse(batches)
    kept = [batch for batch in reversed(batches) if (batch[1] >= 0).any()]
    return variant(summed=summed)(model, optimizer, kept, max_norm)


@alternative(accumulate, "Asks autograd for the gradients and adds them up itself")
def by_autograd_grad(model, optimizer, batches, max_norm):
    class Grad(Step):
        def parts(self, model, optimizer, batches, max_norm):
            parts = []
            wanted = [p for p in self.parameters(optimizer) if p.requires_grad]
            for index, (inputs, _) in enumerate(batches):
                part = self.part(model(inputs), batches, index)
                for p, g in zip(wanted, torch.autograd.grad(part, wanted, allow_unused=True), strict=True):
                    if g is not None:
                        p.grad = g if p.grad is None else p.grad + g
                parts.append(part.item())
            return parts

    return Grad().step(model, optimizer, batches, max_norm)


@alternative(accumulate, "Splits the rows of every micro-batch into parts of their own", meets_costs=False)
def row_by_row(model, optimizer, batches, max_norm):
    rows = [(i[r : r + 1], t[r : r + 1]) for i, t in batches for r in range(len(i))]
    return variant()(model, optimizer, rows, max_norm)
