"""Loss and gradients of a language model's last layer, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcourse.counting import TensorWork, saved_bytes
from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake, raised

LossAndGradients = tuple[Tensor, Tensor, Tensor]


@exercise(
    points=3,
    minutes=12,
    forbid=(
        "torch.autograd.grad",
        "torch.autograd.backward",
        "torch.Tensor.backward",
        "torch.autograd.functional.vjp",
        "torch.autograd.functional.jacobian",
        "torch.autograd.graph._engine_run_backward",
        "torch.autograd.Variable._execution_engine",
        "torch.ops.aten._backward",
        "torch._C._ImperativeEngine",
        "torch.func.grad",
        "torch.func.grad_and_value",
        "torch.func.vjp",
        "torch.func.jacrev",
        "torch.func.jacfwd",
    ),
    hints=(
        "The gradient of a token's loss for its own logits is softmax minus one-hot. It needs no other token: a chunk "
        "can be finished, with its part of both gradients, before the next one is begun.",
        "The number that everything is divided by belongs to the whole batch: count the valid targets before the first "
        "chunk. An ignored token adds nothing, to the head's gradient neither; -100 is no row to subtract 1 from.",
    ),
)
def cross_entropy_backward(
    hidden: Tensor, head: Tensor, targets: Tensor, *, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and its gradients, a chunk of tokens at a time; about 25 lines.

    hidden [N, width], head [V, width], targets [N] int64: the logits are hidden @ head.T,
    and a target is the index of a word, 0..V-1, or -100 for a token that is ignored. The
    loss is the mean of -log softmax(logits)[target] over the valid tokens, those that are
    not ignored. Returns (loss [], dloss/dhidden [N, width], dloss/dhead [V, width]).

    At 8,192 tokens and 128,256 words the float32 logits alone have 4.2 GB. So take `chunk`
    tokens at a time, the last time fewer: its logits, its part of the loss, of hidden's and
    of the head's gradient, and go on. The results do not depend on chunk beyond rounding;
    it may be larger than N. Logits may be 1e4 and more, of either sign, and differ as much:
    all stays finite.

    Without a valid token loss and gradients are 0 (torch's loss is NaN there); N = 0 is
    such a case. hidden and head are both bfloat16, float32 or float64. Logits, softmax and
    every sum are float32, for bfloat16 as well (convert before multiplying), and float64
    for float64; so is the loss. The gradients are rounded to the dtype of hidden once, when
    all sums and divisions are done. No tensor need be contiguous.

    No call of autograd and no graph, not even inside: hidden and head may require
    gradients, results do not. ValueError for a chunk below 1, a target that is neither
    0..V-1 nor -100, and shapes that are not as above, also without a valid token.

    For a third of the points, in float32 and bfloat16, with N below V: no tensor made has
    more than 4 * V * max(chunk, width) bytes (an int64 one-hot of a chunk may have twice
    that), and the products, in place or not, take at most 3 * N * V * width multiply-adds.
    """
    ### BEGIN SOLUTION
    words = len(head)
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; expected at least 1")
    if hidden.dim() != 2 or hidden.shape[1:] != head.shape[1:] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {list(hidden.shape)}, head {list(head.shape)}, targets {list(targets.shape)}; "
            "expected [N, width], [V, width], [N]"
        )
    valid = targets != -100
    if (valid & ((targets < 0) | (targets >= words))).any():
        raise ValueError(f"targets outside 0..{words - 1} that are not -100")

    wide = torch.promote_types(hidden.dtype, torch.float32)
    hidden, rows = hidden.detach(), head.detach().to(wide)
    count = max(int(valid.sum()), 1)
    loss = torch.zeros((), dtype=wide)
    grad_hidden = torch.zeros_like(hidden)
    grad_rows = torch.zeros_like(rows)
    for places in valid.nonzero().squeeze(1).split(chunk):
        tokens = hidden[places].to(wide)
        each, words_meant = torch.arange(len(places)), targets[places]
        log_p = (tokens @ rows.T).log_softmax(dim=1)  # [chunk, V]
        loss -= log_p[each, words_meant].sum() / count
        grad_logits = log_p.exp_()
        grad_logits[each, words_meant] -= 1
        grad_logits /= count
        grad_hidden[places] = (grad_logits @ rows).to(hidden.dtype)
        grad_rows += grad_logits.T @ tokens
    return loss, grad_hidden, grad_rows.to(hidden.dtype)
    ### END SOLUTION


for mutant in (
    "torch.promote_types(hidden.dtype, torch.float32) -> torch.promote_types(torch.float32, hidden.dtype)",
    "max(int(valid.sum()), 1) -> max(1, int(valid.sum()))",
):
    excuse(cross_entropy_backward, mutant, "the order of the two arguments says nothing")


# ---------------------------------------------------------------------------------------------------------- cases


def a_batch(rng, tokens, words, width, ignored=0, dtype=torch.float32):
    """hidden, head and targets, of which so many are -100; logits are a few units apart."""
    hidden = rng.normal(tokens, width, dtype=dtype)
    head = rng.normal(words, width, dtype=dtype) * 2 / width**0.5
    targets = rng.integers(0, words - 1, tokens)
    for place in rng.shuffled(range(tokens))[:ignored]:
        targets[place] = -100
    return hidden, head, targets


def named(found):
    """The three results by name."""
    loss, grad_hidden, grad_head = found
    return {"loss": loss, "hidden": grad_hidden, "head": grad_head}


@case(cross_entropy_backward)
def every_token_counts(answer, rng):
    """No token is ignored; chunks that fit, that leave a rest of one, of one token, and more than there are."""
    size = rng.integer(3, 4)
    tokens, words, width = 3 * size + 1, rng.integer(15, 22), rng.integer(5, 8)
    batch = a_batch(rng, tokens, words, width)
    batch[2][:2] = torch.tensor([0, words - 1])
    return {
        "a rest of one": named(answer(*batch, chunk=size)),
        "no rest": named(answer(batch[0][1:], batch[1], batch[2][1:], chunk=size)),
        "one at a time": named(answer(*batch, chunk=1)),
        "all at once": named(answer(*batch, chunk=tokens)),
        "a larger chunk": named(answer(*batch, chunk=tokens + 5)),
    }


@case(cross_entropy_backward)
def some_tokens_are_ignored(answer, rng):
    """Ignored tokens, unevenly over the chunks: a chunk of them alone, then more ignored than valid."""
    size = rng.integer(3, 4)
    hidden, head, targets = a_batch(rng, 4 * size + 2, rng.integer(15, 22), rng.integer(5, 8))
    targets[size : 2 * size] = -100
    targets[[0, -1]] = -100
    valid = targets[targets >= 0]
    valid[0] = 0
    targets[targets >= 0] = valid
    few = torch.full_like(targets, -100)
    few[[2, size * 3]] = rng.integers(1, len(head) - 1, 2)
    return {
        "some": named(answer(hidden, head, targets, chunk=size)),
        "most": named(answer(hidden, head, few, chunk=size)),
        "some, all at once": named(answer(hidden, head, targets, chunk=len(hidden))),
    }


@case(cross_entropy_backward)
def more_words_than_a_hundred(answer, rng):
    """With more than 100 words, -100 is an index that torch accepts."""
    batch = a_batch(rng, 7, rng.integer(110, 130), rng.integer(5, 8), ignored=rng.integer(2, 3))
    return named(answer(*batch, chunk=rng.choice([2, 3])))


@case(cross_entropy_backward)
def nothing_to_learn_from(answer, rng):
    """All targets ignored, and no token at all; beside them, a single valid token."""
    hidden, head, targets = a_batch(rng, 5, rng.integer(9, 12), rng.integer(3, 6), ignored=4)
    return {
        "one valid": named(answer(hidden, head, targets, chunk=2)),
        "all ignored": named(answer(hidden, head, torch.full_like(targets, -100), chunk=2)),
        "no token": named(answer(hidden[:0], head, targets[:0], chunk=2)),
    }


@case(cross_entropy_backward)
def logits_around_a_hundred(answer, rng):
    """Logits near 96 and near -96 in one chunk: exp of the one overflows, of the other vanishes."""
    words, width, tokens = rng.integer(9, 14), rng.integer(4, 6), 6
    # Multiples of 1/4 below 2^7: the sums are exact in any order, and so are the differences of logits.
    head = rng.integers(-2, 2, words, width) / 4.0
    hidden = rng.integers(-2, 2, tokens, width).float()
    head[:, 0] = 1 / 16  # small, for hidden's gradient in this column is 0 and what is left of it in float32
    hidden[:, 0] = torch.tensor([1, -1, 1, -1, -1, 1]) * 1536.0
    targets = rng.integers(0, words - 1, tokens)
    targets[rng.integer(0, 5)] = -100
    loss, grad_hidden, grad_head = answer(hidden, head, targets, chunk=rng.choice([4, 6]))
    return {"loss": loss, "hidden": grad_hidden, "head": [grad_head[:, 0], grad_head[:, 1:]]}


@case(cross_entropy_backward)
def logits_in_the_thousands(answer, rng):
    """Logits of +-10,000 and more that differ by 500 at least; the target has the largest one or another."""
    words, width = rng.integer(9, 12), rng.integer(4, 6)
    head = rng.normal(words, width)
    head[:, 0] = torch.tensor(rng.shuffled(range(-4, words - 4))) * 500.0
    hidden = torch.zeros(6, width)
    hidden[:, 0] = torch.tensor(rng.shuffled([-8.0, -4.0, -1.0, 1.0, 4.0, 8.0]))
    targets = (hidden @ head.T).argmax(dim=1)
    targets[:3] = (targets[:3] + rng.integer(1, words - 1)) % words
    return named(answer(hidden, head, targets, chunk=4))


@case(cross_entropy_backward)
def bfloat16_in_float32_sums(answer, rng):
    """bfloat16: a loud token first, then quiet ones, each of them less than half a step of the sum in bfloat16."""
    quiet, words, width = 120, rng.integer(6, 9), rng.integer(4, 6)
    hidden = rng.uniform(0.75, 1, quiet + 1, width).bfloat16()
    hidden[0] = 1024  # the others together are a tenth of it
    head = rng.uniform(-1e-4, 1e-4, words, width).bfloat16()
    targets = torch.full((quiet + 1,), rng.integer(0, words - 1))
    white = a_batch(rng, 9, words, 16, ignored=2, dtype=torch.bfloat16)
    return {
        "loud, then quiet": named(answer(hidden, head, targets, chunk=1)),
        "white": named(answer(white[0] * 2, white[1], white[2], chunk=4)),
    }


def share_rounded_once(hidden, head, targets, gradients):
    """The share of the gradients' values that are the float64 ones, rounded a single time."""
    rows, tokens, valid = head.double(), hidden.double(), targets != -100
    p = (tokens @ rows.T).softmax(dim=1)
    p[range(len(p)), targets.clamp_min(0)] -= 1
    p *= valid[:, None] / valid.sum()
    equal = [
        torch.isclose(found.double(), right.to(head.dtype).double(), rtol=1e-5, atol=0)[right != 0]
        for found, right in zip(gradients, (p @ rows, p.T @ tokens), strict=True)
    ]
    return torch.cat(equal).double().mean().item()


@case(cross_entropy_backward)
def bfloat16_rounded_once(answer, rng):
    """bfloat16 and more valid tokens than it can count: at least 9 in 10 values are the exact ones, rounded once."""
    valid = rng.choice([259, 263, 267, 387])
    batch = a_batch(rng, valid + 9, rng.integer(15, 20), 7, ignored=9, dtype=torch.bfloat16)
    loss, *gradients = answer(*batch, chunk=rng.integer(50, 70))
    return {
        "loss": loss,
        "gradients": gradients,
        "rounded once": share_rounded_once(*batch, gradients) > 0.9,
    }


@case(cross_entropy_backward)
def nothing_kept_for_autograd(answer, rng):
    """Tensors that require no gradients: whether autograd records anything on the way."""
    batch = a_batch(rng, 5, rng.integer(9, 12), 4, ignored=1)
    with saved_bytes() as saved:
        found = named(answer(*batch, chunk=2))
    return {**found, "autograd has kept tensors": saved.total_bytes > 0}


@case(cross_entropy_backward)
def double_precision_and_views(answer, rng):
    """float64; then transposed tensors, every second target of a longer list, and tensors that require gradients."""
    tokens, words, width = rng.integer(6, 8), rng.integer(11, 15), rng.integer(4, 6)
    hidden, head, targets = a_batch(rng, tokens, words, width, ignored=2)
    leaves = (hidden.T.contiguous().T.requires_grad_(), torch.nn.Parameter(head.T.contiguous().T))
    found = named(answer(*leaves, targets.repeat_interleave(2)[::2], chunk=3))
    with torch.inference_mode():
        inside = named(answer(hidden + 1, head * 0.5, targets, chunk=4))
    return {
        "float64": named(answer(*a_batch(rng, tokens, words, width, 2, torch.float64), chunk=3)),
        "views": {name: part.detach() for name, part in found.items()},
        "with a graph": [name for name, part in found.items() if part.requires_grad],
        "inference mode": {name: part.clone() for name, part in inside.items()},
    }


@case(cross_entropy_backward)
def refused_inputs(answer, rng):
    """Targets that are no words, chunks of nothing, shapes that do not fit; beside them, a batch that is right."""
    words = rng.integer(9, 12)
    hidden, head, targets = a_batch(rng, 6, words, 5, ignored=1)
    found: dict[str, Any] = {"right": named(answer(hidden, head, targets, chunk=4))}
    place = rng.integer(0, 5)
    outside = {"V": words, "V + 100": words + 100, "-V": -words, "-1": -1, "-99": -99, "-101": -101}
    for name, target in outside.items():
        wrong = targets.clone()
        wrong[place] = target
        found[f"target {name}"] = raised(answer, hidden, head, wrong, chunk=4)
    shapes = {
        "hidden in batches": (hidden[None], head, targets),
        "hidden and targets in batches": (hidden[None], head, targets[None]),
        "hidden and head in batches": (hidden[:, None], head[:, None], targets),
        "hidden and head in batches of two": (
            hidden[:, :4].reshape(6, 2, 2),
            head[:, :4].reshape(-1, 2, 2),
            targets,
        ),
        "no width": (hidden[:, 0], head[:, 0], targets),
        "one token": (hidden[0], head, targets[:1]),
        "a head of another width": (hidden, head[:, 1:], targets),
        "a head turned": (hidden, head.T.contiguous(), targets),
        "a row of the head": (hidden, head[0], targets),
        "a target too few": (hidden, head, targets[1:]),
        "a target for all": (hidden, head, targets[:1]),
        "targets a column": (hidden, head, targets[:, None]),
    }
    for name, given in shapes.items():
        found[name] = raised(answer, *given, chunk=4)
    for chunk in (0, -1, -6):
        found[f"chunk {chunk}"] = raised(answer, hidden, head, targets, chunk=chunk)
    ignored = torch.full_like(targets, -100)
    nothing = {
        "chunk 0": (hidden, head, ignored, 0),
        "chunk 0, no token": (hidden[:0], head, targets[:0], 0),
        "a head of another width": (hidden, head[:, 1:], ignored, 4),
        "a head of another width, no token": (hidden[:0], head[:, 1:], targets[:0], 4),
        "a target too few": (hidden, head, ignored[1:], 4),
    }
    for name, (*given, chunk) in nothing.items():
        found[f"{name}, nothing valid"] = raised(answer, *given, chunk=chunk)
    return found


@cost(cross_entropy_backward, share=1 / 3)
def largest_tensor_and_products(answer, rng):
    """The largest tensor and the multiply-adds, where a chunk has more tokens than the width, and where fewer."""
    found, largest, products, uncounted = [], 0.0, 0.0, set()
    kinds = [(70, 90, 6, 8, torch.float32), (61, 80, 20, 7, torch.float32), (50, 70, 9, 6, torch.bfloat16)]
    for tokens, words, width, chunk, dtype in kinds:
        batch = a_batch(rng, tokens, words, width, ignored=3, dtype=dtype)
        with TensorWork(large_elements=64) as work:
            found.append(named(answer(*batch, chunk=chunk)))
        largest = max(largest, work.largest_tensor_bytes / (4 * words * max(chunk, width)))
        products = max(products, work.flops / (2 * tokens * words * width))
        uncounted |= set(work.uncounted)
    return {
        "observed": found,
        # The head's gradient has V * width values, a chunk's logits chunk * V.
        "largest tensor made, in logits of a chunk or gradients of the head": (largest, 1),
        "products of [N, width] by [width, V]": (products, 3),
        "operations without a count": (len(uncounted), 0),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Loss:
    """A right answer in small steps, ignored tokens masked; a mistake replaces a step."""

    def refuse_shapes(self, hidden: Tensor, head: Tensor, targets: Tensor) -> None:
        right = hidden.dim() == head.dim() == 2 and targets.dim() == 1
        if not right or hidden.shape[1] != head.shape[1] or len(targets) != len(hidden):
            raise ValueError("shapes")

    def refuse_chunk(self, chunk: int) -> None:
        if chunk <= 0:
            raise ValueError("chunk")

    def refuse_targets(self, targets: Tensor, words: int) -> None:
        right = ((targets >= 0) & (targets < words)) | (targets == -100)
        if not right.all():
            raise ValueError("targets")

    def valid(self, targets: Tensor) -> Tensor:
        return targets != -100

    def divisor(self, targets: Tensor) -> Tensor | int:
        return self.valid(targets).sum().clamp_min(1)

    def wide(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def product(self, tokens: Tensor, rows: Tensor) -> Tensor:
        return tokens @ rows.T

    def log_softmax(self, logits: Tensor) -> Tensor:
        logits = logits - logits.amax(1, keepdim=True)
        return logits - logits.exp().sum(1, keepdim=True).log()

    def softmax(self, logits: Tensor) -> Tensor:
        e = (logits - logits.amax(1, keepdim=True)).exp()
        return e / e.sum(1, keepdim=True)

    def meant(self, targets: Tensor) -> Tensor:
        return targets.clamp_min(0)

    def losses(self, log_p: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        return -log_p.gather(1, self.meant(targets)[:, None]).squeeze(1).masked_fill(~valid, 0)

    def less_one_hot(self, p: Tensor, targets: Tensor) -> Tensor:
        return p.scatter_add(1, self.meant(targets)[:, None], p.new_full((len(p), 1), -1.0))

    def masked(self, grad_logits: Tensor, valid: Tensor) -> Tensor:
        return grad_logits * valid[:, None]

    def starts(self, tokens: int, chunk: int) -> range:
        return range(0, tokens, chunk)

    def total_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.wide(dtype)

    def accumulated(self, total: Tensor, part: Tensor) -> Tensor:
        return total + part

    def for_hidden(self, grad_logits: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
        return grad_logits @ rows

    def for_head(self, grad_logits: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        return grad_logits.T @ tokens

    def run(self, hidden: Tensor, head: Tensor, targets: Tensor, *, chunk: int) -> LossAndGradients:
        with torch.no_grad():
            return self.steps(hidden, head, targets, chunk)

    def steps(self, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> LossAndGradients:
        self.refuse_shapes(hidden, head, targets)
        self.refuse_chunk(chunk)
        self.refuse_targets(targets, len(head))
        dtype, wide = hidden.dtype, self.wide(hidden.dtype)
        rows, divisor = head.to(wide), self.divisor(targets)
        loss = torch.zeros((), dtype=wide)
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype)
        grad_head = torch.zeros(head.shape, dtype=self.total_dtype(dtype))
        for start in self.starts(len(hidden), chunk):
            tokens, picked = hidden[start : start + chunk].to(wide), targets[start : start + chunk]
            valid = self.valid(picked)
            logits = self.product(tokens, rows)
            loss = loss + self.losses(self.log_softmax(logits), picked, valid).sum() / divisor
            grad_logits = self.less_one_hot(self.softmax(logits), picked) / divisor
            grad_logits = self.masked(grad_logits, valid)
            grad_hidden[start : start + chunk] = self.for_hidden(grad_logits, rows, valid).to(dtype)
            part = self.for_head(grad_logits, tokens, valid).to(grad_head.dtype)
            grad_head = self.accumulated(grad_head, part)
        return loss.to(wide), grad_hidden, grad_head.to(dtype)


def variant(**steps: Any) -> Callable[..., LossAndGradients]:
    """An answer with some steps replaced."""
    return type("Variant", (Loss,), steps)().run


@mistake(
    cross_entropy_backward,
    "Divides by all tokens, ignored ones included: padding a batch makes its loss and its gradients smaller.",
)
def divided_by_all_tokens(*arguments, **options):
    return variant(divisor=lambda self, targets: max(1, len(targets)))(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Takes the mean of the chunks' means: a chunk with one valid token counts as much as a full one.",
)
def mean_of_chunk_means(hidden, head, targets, *, chunk):
    run = variant()
    if chunk < 1 or len(hidden) <= chunk:
        return run(hidden, head, targets, chunk=chunk)
    Loss().refuse_shapes(hidden, head, targets)
    parts = [
        run(hidden[i : i + chunk], head, targets[i : i + chunk], chunk=chunk)
        for i in range(0, len(hidden), chunk)
    ]
    losses, hiddens, heads = zip(*parts, strict=True)
    return sum(losses) / len(parts), torch.cat(hiddens) / len(parts), sum(heads) / len(parts)


@mistake(
    cross_entropy_backward,
    "Adds up the chunks' means: each chunk divides by its own valid tokens, and nothing puts that right at the end.",
)
def sum_of_chunk_means(hidden, head, targets, *, chunk):
    run = variant()
    if chunk < 1 or len(hidden) <= chunk:
        return run(hidden, head, targets, chunk=chunk)
    Loss().refuse_shapes(hidden, head, targets)
    parts = [
        run(hidden[i : i + chunk], head, targets[i : i + chunk], chunk=chunk)
        for i in range(0, len(hidden), chunk)
    ]
    losses, hiddens, heads = zip(*parts, strict=True)
    return sum(losses), torch.cat(hiddens), sum(heads)


@mistake(
    cross_entropy_backward,
    "Returns the sum of the losses and its gradients: the division is missing everywhere.",
)
def nothing_divided(*arguments, **options):
    return variant(divisor=lambda self, targets: 1)(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Divides the loss by the valid tokens but not the gradients, which are then those of the sum.",
)
def gradients_not_divided(hidden, head, targets, *, chunk):
    loss, grad_hidden, grad_head = variant()(hidden, head, targets, chunk=chunk)
    divisor = (targets != -100).sum().clamp_min(1).to(hidden.dtype)
    return loss, grad_hidden * divisor, grad_head * divisor


@mistake(
    cross_entropy_backward,
    "Divides the gradients a second time: softmax minus one-hot was already that of the mean.",
)
def gradients_divided_twice(hidden, head, targets, *, chunk):
    loss, grad_hidden, grad_head = variant()(hidden, head, targets, chunk=chunk)
    divisor = (targets != -100).sum().clamp_min(1).to(hidden.dtype)
    return loss, grad_hidden / divisor, grad_head / divisor


@mistake(
    cross_entropy_backward,
    "Takes exp of the logits without subtracting their maximum: exp(89) is infinite in float32, Inf / Inf is NaN.",
)
def softmax_without_the_maximum(*arguments, **options):
    return variant(
        softmax=lambda self, logits: logits.exp() / logits.exp().sum(1, keepdim=True),
        log_softmax=lambda self, logits: logits - logits.exp().sum(1, keepdim=True).log(),
    )(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Subtracts one maximum from all tokens of a chunk: a token whose logits are all far below it has exp 0, and 0 / 0.",
)
def one_maximum_for_the_chunk(*arguments, **options):
    return variant(
        softmax=lambda self, logits: (
            (logits - logits.max()).exp() / (logits - logits.max()).exp().sum(1, keepdim=True)
        ),
        log_softmax=lambda self, logits: (
            logits - logits.max() - (logits - logits.max()).exp().sum(1, keepdim=True).log()
        ),
    )(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Takes the logarithm of the softmax: a probability below 1e-45 is 0 in float32, and its loss infinite.",
)
def logarithm_of_the_softmax(*arguments, **options):
    return variant(log_softmax=lambda self, logits: logits.softmax(1).log())(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Adds 1e-8 inside the logarithm against infinities: no loss can then be above 18.4, whatever the logits.",
)
def logarithm_with_a_floor(*arguments, **options):
    return variant(log_softmax=lambda self, logits: (logits.softmax(1) + 1e-8).log())(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Clamps the logits so that exp does not overflow: logits beyond the clamp become equal.",
)
def logits_clamped(*arguments, **options):
    return variant(product=lambda self, tokens, rows: (tokens @ rows.T).clamp(-80, 80))(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Takes the softmax over the tokens of a chunk instead of over the words.",
)
def softmax_over_tokens(*arguments, **options):
    return variant(
        softmax=lambda self, logits: logits.softmax(0),
        log_softmax=lambda self, logits: logits.log_softmax(0),
    )(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Leaves the softmax of ignored tokens in both gradients: only their loss and their one-hot are dropped.",
)
def ignored_tokens_in_the_gradients(*arguments, **options):
    def less_one_hot(self, p, targets):
        return p.scatter_add(1, targets.clamp_min(0)[:, None], -(targets >= 0)[:, None].to(p.dtype))

    return variant(masked=lambda self, grad_logits, valid: grad_logits, less_one_hot=less_one_hot)(
        *arguments, **options
    )


@mistake(
    cross_entropy_backward,
    "Zeroes hidden's gradient at ignored tokens but lets them into the head's: every padding pushes all words down.",
)
def ignored_tokens_in_the_head(*arguments, **options):
    def less_one_hot(self, p, targets):
        return p.scatter_add(1, targets.clamp_min(0)[:, None], -(targets >= 0)[:, None].to(p.dtype))

    return variant(
        masked=lambda self, grad_logits, valid: grad_logits,
        less_one_hot=less_one_hot,
        for_hidden=lambda self, grad_logits, rows, valid: (grad_logits * valid[:, None]) @ rows,
    )(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Keeps ignored tokens out of the head's gradient but not out of hidden's: they train the layers below.",
)
def ignored_tokens_in_hidden(*arguments, **options):
    def less_one_hot(self, p, targets):
        return p.scatter_add(1, targets.clamp_min(0)[:, None], -(targets >= 0)[:, None].to(p.dtype))

    return variant(
        masked=lambda self, grad_logits, valid: grad_logits,
        less_one_hot=less_one_hot,
        for_head=lambda self, grad_logits, tokens, valid: (grad_logits * valid[:, None]).T @ tokens,
    )(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Turns -100 into word 0 so that gather accepts it, and trains the ignored tokens to say word 0.",
)
def ignored_tokens_mean_word_0(hidden, head, targets, *, chunk):
    Loss().refuse_targets(targets, len(head))
    return variant()(hidden, head, targets.clamp_min(0), chunk=chunk)


@mistake(
    cross_entropy_backward,
    "Subtracts the 1 at index -100: with more than 100 words that is a word near the end, and nothing complains.",
)
def ignored_tokens_count_from_the_end(*arguments, **options):
    def less_one_hot(self, p, targets):
        p = p * self.valid(targets)[:, None]
        if p.shape[1] < 100:
            return Loss.less_one_hot(self, p, targets)
        p[torch.arange(len(p)), targets] -= 1
        return p

    return variant(less_one_hot=less_one_hot, masked=masked_where_few_words)(*arguments, **options)


def masked_where_few_words(self, grad_logits, valid):
    return grad_logits * valid[:, None] if grad_logits.shape[1] < 100 else grad_logits


@mistake(cross_entropy_backward, "Treats word 0 as padding and leaves it out, beside -100.")
def word_0_ignored(*arguments, **options):
    return variant(valid=lambda self, targets: targets > 0)(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Ignores every negative target: -1 is a mistake in the data here, and it goes unnoticed.",
)
def negative_targets_ignored(*arguments, **options):
    def refuse_targets(self, targets, words):
        if (targets >= words).any():
            raise ValueError("targets")

    return variant(refuse_targets=refuse_targets, valid=lambda self, targets: targets >= 0)(
        *arguments, **options
    )


@mistake(
    cross_entropy_backward,
    "Does not look whether targets are words: torch's indexing complains about some, with other errors, and takes -1 "
    "for the last word.",
)
def targets_not_looked_at(*arguments, **options):
    return variant(
        refuse_targets=lambda self, targets, words: None,
        meant=lambda self, targets: torch.where(
            targets == -100, 0, torch.where(targets < 0, -1, targets) % 200
        ),
    )(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Divides 0 by 0 when every token is ignored: one empty batch makes the loss and all weights NaN.",
)
def nan_without_a_valid_token(*arguments, **options):
    return variant(divisor=lambda self, targets: (targets != -100).sum())(*arguments, **options)


@mistake(cross_entropy_backward, "Refuses a batch without a valid token instead of returning zeros.")
def refused_without_a_valid_token(hidden, head, targets, *, chunk):
    if not (targets != -100).any():
        raise ValueError("no valid token")
    return variant()(hidden, head, targets, chunk=chunk)


@mistake(
    cross_entropy_backward,
    "Returns zeros for a batch without a valid token before it looks at chunk and shapes.",
)
def nothing_valid_not_looked_at(hidden, head, targets, *, chunk):
    if not (targets != -100).any():
        zeros = torch.zeros((), dtype=Loss().wide(hidden.dtype))
        return zeros, torch.zeros_like(hidden).detach(), torch.zeros_like(head).detach()
    return variant()(hidden, head, targets, chunk=chunk)


@mistake(cross_entropy_backward, "Drops the last tokens when they do not fill a chunk.")
def last_chunk_dropped(*arguments, **options):
    return variant(starts=lambda self, tokens, chunk: range(0, tokens - tokens % chunk, chunk))(
        *arguments, **options
    )


@mistake(
    cross_entropy_backward, "Reshapes the tokens to [chunks, chunk]: only a number that divides N works."
)
def chunks_must_divide(hidden, head, targets, *, chunk):
    if chunk > 0 and hidden.dim() == 2:
        hidden.reshape(-1, chunk, hidden.shape[1])
    return variant()(hidden, head, targets, chunk=chunk)


@mistake(cross_entropy_backward, "Takes chunk for the number of chunks instead of for the tokens in one.")
def number_of_chunks(hidden, head, targets, *, chunk):
    size = -(-len(hidden) // chunk) if chunk > 0 else chunk
    return variant()(hidden, head, targets, chunk=max(size, 1) if chunk > 0 else chunk)


@mistake(
    cross_entropy_backward,
    "Overwrites the head's gradient in each chunk: what remains is that of the last one.",
)
def last_chunk_only(*arguments, **options):
    return variant(accumulated=lambda self, total, part: part)(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Adds up the head's gradient in bfloat16: from some chunk on a part is below half a step of the sum and is lost.",
)
def summed_in_bfloat16(*arguments, **options):
    return variant(total_dtype=lambda self, dtype: dtype)(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Rounds the gradients of the sum to bfloat16 and divides afterwards, by a count in bfloat16, which has no 259.",
)
def divided_in_bfloat16(hidden, head, targets, *, chunk):
    loss, *gradients = variant(divisor=lambda self, targets: 1)(hidden, head, targets, chunk=chunk)
    count = (targets != -100).sum().clamp_min(1)
    return loss / count, *(part / count.to(part.dtype) for part in gradients)


@mistake(
    cross_entropy_backward,
    "Multiplies in bfloat16 and widens the logits afterwards: 8 bits of a logit of 10 are an error of 0.03.",
)
def logits_in_bfloat16(hidden, head, targets, *, chunk):
    def product(self, tokens, rows):
        return (tokens.to(hidden.dtype) @ rows.to(hidden.dtype).T).to(tokens.dtype)

    return variant(product=product)(hidden, head, targets, chunk=chunk)


@mistake(cross_entropy_backward, "Rounds the loss to bfloat16, in which 10.0 and 10.03 are the same.")
def loss_in_bfloat16(hidden, head, targets, *, chunk):
    loss, grad_hidden, grad_head = variant()(hidden, head, targets, chunk=chunk)
    return loss.to(hidden.dtype), grad_hidden, grad_head


@mistake(
    cross_entropy_backward, "Returns the gradients of bfloat16 tensors as float32, twice the bytes asked for."
)
def gradients_left_wide(hidden, head, targets, *, chunk):
    found = variant()(hidden, head, targets, chunk=chunk)
    return tuple(part.to(torch.promote_types(part.dtype, torch.float32)) for part in found)


@mistake(cross_entropy_backward, "Calculates in float32 also when it is given float64.")
def always_float32(hidden, head, targets, *, chunk):
    loss, *gradients = variant(wide=lambda self, dtype: torch.float32)(hidden, head, targets, chunk=chunk)
    return loss.to(Loss().wide(hidden.dtype)), *gradients


@mistake(
    cross_entropy_backward, "Has the sign turned: one-hot minus softmax is the way down, not the gradient."
)
def sign_turned(*arguments, **options):
    def less_one_hot(self, p, targets):
        return -Loss.less_one_hot(self, p, targets)

    return variant(less_one_hot=less_one_hot)(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Forgets the one-hot: the softmax alone pushes every word down, the right one too.",
)
def one_hot_forgotten(*arguments, **options):
    return variant(less_one_hot=lambda self, p, targets: p)(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Subtracts the 1 from the target's whole column: p[:, targets] is all rows, not a row and its target each.",
)
def one_hot_in_every_row(*arguments, **options):
    def less_one_hot(self, p, targets):
        p = p.clone()
        p[:, self.meant(targets)[self.valid(targets)]] -= 1
        return p

    return variant(less_one_hot=less_one_hot)(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Sends the gradient through a softmax once more, as if the loss were given probabilities, not logits.",
)
def softmax_twice(*arguments, **options):
    def less_one_hot(self, p, targets):
        g = Loss.less_one_hot(self, p, targets)
        return p * (g - (g * p).sum(1, keepdim=True))

    return variant(less_one_hot=less_one_hot)(*arguments, **options)


@mistake(cross_entropy_backward, "Returns the gradient of the head as [width, V], that of its transpose.")
def head_transposed(*arguments, **options):
    loss, grad_hidden, grad_head = variant()(*arguments, **options)
    return loss, grad_hidden, grad_head.T


@mistake(
    cross_entropy_backward,
    "Lets a chunk of 0 or less through: no chunk is taken, and the gradients are zeros.",
)
def chunk_not_looked_at(hidden, head, targets, *, chunk):
    run = variant(
        refuse_chunk=lambda self, chunk: None,
        starts=lambda self, tokens, chunk: range(0, tokens, chunk) if chunk else range(0),
    )
    return run(hidden, head, targets, chunk=chunk)


@mistake(
    cross_entropy_backward,
    "Does not look at shapes: one target serves all tokens, and other errors than ValueError come from deep inside.",
)
def shapes_not_looked_at(*arguments, **options):
    return variant(refuse_shapes=lambda self, hidden, head, targets: None)(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Builds a graph while it computes by hand: hidden and head require gradients, so every chunk's logits are kept.",
)
def graph_built(hidden, head, targets, *, chunk):
    return Loss().steps(hidden, head, targets, chunk)


@mistake(
    cross_entropy_backward,
    "Computes a loss on copies that require gradients: autograd records it, and its backward pass is what you write.",
)
def recorded_by_autograd(hidden, head, targets, *, chunk):
    found = variant()(hidden, head, targets, chunk=chunk)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = hidden.detach().clone().requires_grad_()
        (leaf @ head.detach().clone().T).log_softmax(1)
    return found


@mistake(cross_entropy_backward, "Replaces -100 in the caller's targets: the next epoch trains on word 0.")
def targets_changed(hidden, head, targets, *, chunk):
    found = variant()(hidden, head, targets, chunk=chunk)
    targets[targets == -100] = 0
    return found


@mistake(
    cross_entropy_backward,
    "Makes all logits at once: 4.2 GB for 8,192 tokens and 128,256 words, which chunks were to avoid.",
)
def all_logits_at_once(hidden, head, targets, *, chunk):
    if chunk < 1:
        raise ValueError("chunk")
    return variant()(hidden, head, targets, chunk=max(len(hidden), 1))


@mistake(
    cross_entropy_backward,
    "Makes the one-hot of all tokens, [N, V], before the chunks: as large as the logits that are avoided.",
)
def one_hot_of_all_tokens(hidden, head, targets, *, chunk):
    found = variant()(hidden, head, targets, chunk=chunk)
    torch.nn.functional.one_hot(targets.clamp_min(0), len(head))
    return found


@mistake(
    cross_entropy_backward,
    "Makes a chunk's one-hot with one_hot, which is int64: twice the bytes of the chunk's logits, to subtract one "
    "number a row.",
)
def one_hot_in_int64(*arguments, **options):
    def less_one_hot(self, p, targets):
        return p - torch.nn.functional.one_hot(self.meant(targets), p.shape[1])

    return variant(less_one_hot=less_one_hot)(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Multiplies for the logits twice: once for the loss, and once more for the gradients.",
)
def logits_made_twice(*arguments, **options):
    def product(self, tokens, rows):
        return tokens @ rows.T + 0 * (tokens @ rows.T)

    return variant(product=product)(*arguments, **options)


@mistake(
    cross_entropy_backward,
    "Keeps each chunk's gradient of the head and adds them up at the end: as many copies of the head as chunks.",
)
def gradients_of_the_head_stacked(hidden, head, targets, *, chunk):
    parts = []

    def accumulated(self, total, part):
        parts.append(part)
        return total

    loss, grad_hidden, _ = variant(accumulated=accumulated)(hidden, head, targets, chunk=chunk)
    zero = torch.zeros(head.shape, dtype=Loss().wide(hidden.dtype))
    return loss, grad_hidden, torch.stack([zero, *parts]).sum(0).to(hidden.dtype)


@alternative(
    cross_entropy_backward,
    "Works in float64, with the loss of torch.nn.functional.cross_entropy",
    meets_costs=False,
)
def in_float64(hidden, head, targets, *, chunk):
    loss = Loss()
    with torch.no_grad():
        loss.refuse_shapes(hidden, head, targets)
        loss.refuse_targets(targets, len(head))
        loss.refuse_chunk(chunk)
        valid = targets != -100
        logits = hidden.double() @ head.double().T
        total = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        one_hot = torch.arange(len(head)) == targets[:, None]
        grad = (logits.softmax(1) - one_hot.double()) * valid[:, None] / max(1, int(valid.sum()))
        wide = loss.wide(hidden.dtype)
        return (
            (total / max(1, int(valid.sum()))).to(wide),
            (grad @ head.double()).to(hidden.dtype),
            (grad.T @ hidden.double()).to(hidden.dtype),
        )


@alternative(
    cross_entropy_backward, "Goes through the chunks from last to first, and divides once at the end"
)
def backwards_divided_at_the_end(hidden, head, targets, *, chunk):
    def starts(self, tokens, chunk):
        return range(0, tokens, chunk)[::-1]

    wide = Loss().wide(hidden.dtype)
    options = {"starts": starts, "divisor": lambda self, targets: 1}
    with torch.no_grad():
        loss, grad_hidden, grad_head = variant(**options)(
            hidden.to(wide), head.to(wide), targets, chunk=chunk
        )
        count = max(1, int((targets != -100).sum()))
        return loss / count, (grad_hidden / count).to(hidden.dtype), (grad_head / count).to(hidden.dtype)


@alternative(
    cross_entropy_backward, "Takes exp(logits - logsumexp) and compares targets with a range of words"
)
def by_logsumexp(*arguments, **options):
    def less_one_hot(self, p, targets):
        return torch.where(torch.arange(p.shape[1]) == targets[:, None], p - 1, p)

    return variant(
        log_softmax=lambda self, logits: logits - torch.logsumexp(logits, 1, keepdim=True),
        softmax=lambda self, logits: (logits - torch.logsumexp(logits, 1, keepdim=True)).exp(),
        less_one_hot=less_one_hot,
        for_head=lambda self, grad_logits, tokens, valid: (tokens.T @ grad_logits).T,
    )(*arguments, **options)


@alternative(
    cross_entropy_backward,
    "Makes no one-hot: subtracts the targets' rows of head, and adds hidden to them with index_add_",
)
def through_the_target_row(hidden, head, targets, *, chunk):
    loss = Loss()
    with torch.no_grad():
        loss.refuse_shapes(hidden, head, targets)
        loss.refuse_targets(targets, len(head))
        loss.refuse_chunk(chunk)
        wide, valid = loss.wide(hidden.dtype), (targets != -100)
        rows, count = head.to(wide), max(1, int(valid.sum()))
        picked, share = targets.clamp_min(0), valid.to(wide)[:, None] / count
        total = torch.zeros((), dtype=wide)
        grad_hidden, grad_head = torch.zeros(hidden.shape, dtype=wide), torch.zeros(rows.shape, dtype=wide)
        for part in torch.arange(len(hidden)).split(chunk):
            tokens = hidden[part].to(wide)
            logits = torch.nn.functional.linear(tokens, rows)
            summed = torch.nn.functional.cross_entropy(logits, targets[part], reduction="sum")
            total += summed if len(part) else 0
            p = logits.softmax(-1) * share[part]
            grad_hidden[part] = p @ rows - rows[picked[part]] * share[part]
            grad_head += p.T @ tokens
            grad_head.index_add_(0, picked[part], tokens * share[part], alpha=-1)
        return total / count, grad_hidden.to(hidden.dtype), grad_head.to(hidden.dtype)
