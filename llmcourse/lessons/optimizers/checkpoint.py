"""Activation checkpointing: keep what went into a part of the network, and run that part again for its gradient."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from llmcourse.counting import LivingBytes, TensorWork
from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake, raised


@exercise(
    points=4,
    minutes=25,
    extension=True,
    forbid=(
        "torch.utils.checkpoint.checkpoint",
        "torch.utils.checkpoint.checkpoint_sequential",
        "torch.utils.checkpoint.CheckpointFunction",
        "torch.utils.checkpoint._checkpoint_without_reentrant_generator",
        "torch.utils.checkpoint._CheckpointFrame",
        "torch.utils.checkpoint._checkpoint_hook",
        "torch.utils.checkpoint._recomputation_hook",
    ),
    hints=(
        "Two ways lead there: an autograd.Function, whose backward runs the function again and calls backward on what "
        "comes out; or saved_tensors_hooks, which let you keep a number in place of each tensor that is saved. With "
        "hooks, parameters and outputs without a gradient need no care of yours. What else than its inputs decides "
        "what a function with dropout returns?",
        "In an autograd.Function's forward and backward gradients are off, and where no input requires one its "
        "backward is never called, although parameters wait for it. With hooks, the tensors of the second run have "
        "to come in the order of the first.",
    ),
)
def checkpoint(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """function(*inputs, **options), whose inside is forgotten and computed again in backward.

    About 20 lines. inputs and options are passed on as they are: tensors, also ones that
    require no gradient or hold integers, and any other values; tensors inside lists and
    dicts need not be treated. What function returns is returned: a tensor, or a tuple of
    tensors and other values, such as None. An exception of function's goes through.

    After backward() every gradient is what it is without checkpoint, added to what is
    there: of each tensor among inputs and options that requires one, and of parameters that
    function uses without being given them, also where no input requires a gradient. Outputs
    may be left without use; what only they depend on keeps None. An output requires a
    gradient when function's own does. Under torch.no_grad() it is a plain call.

    Between forward and backward no tensor lives that was made inside function, but for
    its outputs; after backward none does, but what an output without use still needs. The
    inputs are held, not copied. function is called once in forward, and once more in
    backward, when its inside is first needed: gradients are made of what that second run
    computes. It has what the first one had:

      - the state of torch's generator for the CPU (torch.get_rng_state), so that dropout
        drops the same values. Afterwards the generator stands where it stood before
        backward, as if function had not run again; forward advances it like a plain call;
      - autocast for the CPU: whether it is on, and its dtype (torch.is_autocast_enabled,
        torch.get_autocast_dtype), wherever backward is called.

    backward raises RuntimeError when a tensor among inputs and options was changed in
    place since forward, as autograd does for a tensor that it saved (`_version` of a tensor
    counts its changes).

    Not asked for: other devices, checkpoint inside checkpoint, backward twice through one
    graph, torch.autograd.grad. (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
    Cost".)

    For a third of the points, half of it each: (1) what was made and lives between forward
    and backward, outputs aside, has no more bytes than the state of the generator; (2)
    forward and backward together do the matrix products of function twice and those of its
    backward once: 4/3 of a plain run, where backward does two for each of forward's.
    """
    ### BEGIN SOLUTION
    tensors = [value for value in (*inputs, *options.values()) if isinstance(value, Tensor)]
    versions = [tensor._version for tensor in tensors]
    generator = torch.get_rng_state()
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    numbers = itertools.count()
    again: dict[int, Tensor] = {}

    def run_again() -> None:
        if [tensor._version for tensor in tensors] != versions:
            raise RuntimeError("an input of checkpoint was changed in place since forward")
        places = itertools.count()

        def keep(tensor: Tensor) -> None:
            again[next(places)] = tensor

        autocast = torch.autocast("cpu", dtype=dtype, enabled=enabled)
        hooks = saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), autocast, hooks:
            torch.set_rng_state(generator)
            function(*inputs, **options)

    def unpack(number: int) -> Tensor:
        if number not in again:
            run_again()
        return again.pop(number)  # what has been used is free

    # In place of each tensor that is saved, its number: the second run saves them in the same order.
    with saved_tensors_hooks(lambda _: next(numbers), unpack):
        return function(*inputs, **options)
    ### END SOLUTION


excuse(
    checkpoint,
    "torch.random.fork_rng(devices=[]) -> torch.random.fork_rng()",
    "without the argument the generators of all accelerators are put back too; a CPU has none",
)


# ---------------------------------------------------------------------------------------------------------- cases


def leaf(rng, *shape, dtype=torch.float32):
    return rng.normal(*shape, dtype=dtype).requires_grad_()


class Part:
    """A part of a network with three parameters of its own: [.., width] -> [.., outputs]. It notes what it makes."""

    def __init__(self, rng, width, hidden, outputs, *, rate=0.5, dtype=torch.float32):
        self.up = leaf(rng, hidden, width, dtype=dtype)
        self.bias = leaf(rng, hidden, dtype=dtype)
        self.down = leaf(rng, outputs, hidden, dtype=dtype)
        self.rate, self.calls = rate, 0
        self.made: list[StorageWeakRef] = []

    def note(self, tensor):
        self.made.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def __call__(self, x):
        self.calls += 1
        hidden = self.note(nn.functional.linear(x, self.up, self.bias))
        hidden = self.note(nn.functional.silu(hidden))
        hidden = self.note(nn.functional.dropout(hidden, self.rate))
        return nn.functional.linear(hidden, self.down)

    def living(self):
        """How many of the tensors that were made inside still have their memory."""
        gc.collect()
        return sum(not made.expired() for made in self.made)

    def gradients(self):
        return {"up": self.up.grad, "bias": self.bias.grad, "down": self.down.grad}

    def state(self):
        return {"calls": self.calls, "living": self.living()}


def shapes(rng):
    """rows, width, hidden, outputs."""
    return rng.integer(3, 5), rng.integer(6, 8), rng.integer(9, 12), rng.integer(4, 5)


def disturbed(rng):
    """The generator at a place that no seed gives."""
    torch.manual_seed(rng.integer(0, 1 << 30))
    torch.rand(rng.integer(1, 9))


@case(checkpoint)
def dropout(answer, rng):
    """A part with dropout: output, gradients, and where the generator stands between and afterwards."""
    rows, width, hidden, outputs = shapes(rng)
    part, x, g = Part(rng, width, hidden, outputs), leaf(rng, 2, rows, width), rng.normal(2, rows, outputs)
    disturbed(rng)
    y = answer(part, x)
    between = torch.rand(3)
    y.backward(g)
    return {
        "y": y,
        "drawn between": between,
        "x": x.grad,
        "parameters": part.gradients(),
        "drawn after": torch.rand(3),
    }


@case(checkpoint)
def what_lives(answer, rng):
    """How often the part was called, and how many of the tensors it made live: before, between and after."""
    rows, width, hidden, outputs = shapes(rng)
    part, x = Part(rng, width, hidden, outputs), leaf(rng, rows, width)
    disturbed(rng)
    y = answer(part, x)
    between = part.state()
    y.sum().backward()
    return {
        "y of": list(y.shape),
        "between": between,
        "after": part.state(),
        "x": x.grad.shape == x.shape,
    }


@case(checkpoint)
def chain(answer, rng):
    """Four parts one after the other, each with dropout and a checkpoint of its own, and a sum around the second."""
    rows, width, hidden, outputs = shapes(rng)
    ends = [width, outputs, outputs, hidden, 3]
    parts = [Part(rng, a, hidden + i, b) for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False))]
    x = leaf(rng, rows, width)
    disturbed(rng)
    h = x * 2
    for index, part in enumerate(parts):
        h = answer(part, h) + (h if index == 1 else 0)
    between = [part.state() for part in parts]
    h.square().sum().backward()
    return {
        "y": h,
        "x": x.grad,
        "parameters": [part.gradients() for part in parts],
        "between": between,
        "after": [part.state() for part in parts],
        "drawn after": torch.rand(2),
    }


def attended(x, heads, mask, columns, *, scale, shift=0.0, names=()):
    """x [rows, n] with some of its columns, from values of all kinds; scale may be a tensor."""
    y = (x * scale).tanh()[:, columns].repeat(1, heads)
    y = y if mask is None else y * mask
    return (y + shift).sin() * len(names)


@case(checkpoint)
def values_of_all_kinds(answer, rng):
    """Integers, None, strings, lists, a tensor of indices and a mask; tensors and numbers by name."""
    rows, width = rng.integer(3, 5), rng.integer(6, 8)
    found = {}
    for name, heads, mask, shift in (
        ("shift is a tensor", 1, None, rng.normal(1, 3).requires_grad_()),
        ("with a mask", 2, rng.normal(rows, 6) > 0, 0.25),
    ):
        x, scale = leaf(rng, rows, width), leaf(rng, width)
        columns = rng.integers(0, width - 1, 3)
        y = answer(attended, x, heads, mask, columns, scale=scale * 1, shift=shift, names=["a", "b"])
        y.square().sum().backward()
        of_shift = shift.grad if isinstance(shift, Tensor) else None
        found[name] = {"y": y, "x": x.grad, "scale": scale.grad, "shift": of_shift}
    given = rng.normal(rows, width)
    only_by_name = leaf(rng, width)
    answer(attended, given, 1, None, [0, 2], scale=only_by_name, names="ab").sum().backward()
    return {
        **found,
        "only by name": only_by_name.grad,
        "gradient of data": given.grad,
        "data require a gradient": given.requires_grad,
    }


@case(checkpoint)
def several_outputs(answer, rng):
    """A tuple of tensors, None and numbers, of which the loss uses one, another one, or both; all are held."""
    rows, width, hidden, outputs = shapes(rng)
    seen = {}
    for used in ((0,), (3,), (0, 3)):
        first, second = Part(rng, width, hidden, outputs), Part(rng, width, hidden, 3)

        def both(x, first=first, second=second):
            y = first(x)
            return y, None, len(x), second(x), y.argmax(dim=1), y.detach() * 2

        x = leaf(rng, rows, width)
        disturbed(rng)
        results = answer(both, x)
        loss = sum(results[index].square().sum() for index in used)
        loss.backward()
        seen[f"a loss of outputs {list(used)}"] = {
            "type": type(results).__name__,
            "outputs": list(results),
            "output requires a gradient": {
                str(i): part.requires_grad for i, part in enumerate(results) if isinstance(part, Tensor)
            },
            "x": x.grad,
            "first part": first.gradients(),
            "second part": second.gradients(),
            "living, of what was used": sum((first if index == 0 else second).living() for index in used),
        }
    alone = answer(lambda x: (x.exp(),), x)
    return {**seen, "a tuple of one": [type(alone).__name__, len(alone), alone[0]]}


@case(checkpoint)
def from_the_second_run(answer, rng):
    """A function that adds other numbers in each call: the second call's are in the gradient."""
    rows, width = rng.integer(3, 5), rng.integer(6, 8)
    x, shifts, calls = leaf(rng, rows, width), rng.normal(3, rows, width), []

    def shifted(x):
        calls.append(torch.is_grad_enabled())
        return (x + shifts[len(calls) - 1]).sin()

    y = answer(shifted, x)
    y.sum().backward()
    return {"y": y, "x": x.grad, "calls": len(calls), "gradients are on in the second": calls[-1]}


@case(checkpoint)
def only_parameters(answer, rng):
    """No input requires a gradient, or there is none: tokens, a batch of data, a function without arguments."""
    rows, width, hidden, outputs = shapes(rng)
    part, table = Part(rng, width, hidden, outputs), leaf(rng, 9, width)
    tokens = rng.integers(0, 8, rows, 2)
    disturbed(rng)
    y = answer(lambda tokens: part(table[tokens].cos()), tokens)
    y.square().sum().backward()
    data = answer(part, rng.normal(rows, width))
    data.square().sum().backward()
    bare = leaf(rng, width)
    none = answer(lambda: bare.exp() * bare)
    none.sum().backward()
    return {"y": [y, data, none], "table": table.grad, "parameters": part.gradients(), "bare": bare.grad}


@case(checkpoint)
def added_to_what_is_there(answer, rng):
    """One part used twice, an input given twice, and gradients that were there before: all add up."""
    rows, width, hidden, _ = shapes(rng)
    part, x = Part(rng, width, hidden, width, rate=0.1), leaf(rng, rows, width)
    x.grad, part.up.grad = rng.normal(rows, width), rng.normal(hidden, width)
    disturbed(rng)
    y = x + answer(part, answer(part, x) * 0.5)
    z = answer(torch.mul, x, x) + answer(lambda a, b: a.exp() * b.sin(), x, b=x)
    (y.square().sum() + z.sum()).backward()
    answer(part, x).sum().backward()
    return {"y": y, "z": z, "x": x.grad, "parameters": part.gradients(), "calls": part.calls}


@case(checkpoint)
def without_gradients(answer, rng):
    """Under no_grad, and where nothing requires a gradient: one call, and the result requires none."""
    rows, width, hidden, outputs = shapes(rng)
    part, x = Part(rng, width, hidden, outputs), leaf(rng, rows, width)
    disturbed(rng)
    with torch.no_grad():
        y = answer(part, x)
    plain = answer(lambda x, power: x.exp() ** power, x.detach(), power=2)
    return {
        "y": [y, plain],
        "requires a gradient": [y.requires_grad, plain.requires_grad],
        "calls": part.calls,
        "living": part.living(),
        "drawn after": torch.rand(2),
        "gradients are on": torch.is_grad_enabled(),
    }


def under_autocast(answer, rng, dtype, *, forward, backward):
    """Output and gradients, forward and backward each with autocast on or off."""
    rows, width, hidden, outputs = shapes(rng)
    part, x, g = Part(rng, width, hidden, outputs), leaf(rng, rows, width), rng.normal(rows, outputs)
    disturbed(rng)
    with torch.autocast("cpu", dtype=dtype, enabled=forward):
        y = answer(part, x)
    with torch.autocast("cpu", enabled=backward):
        y.backward(g.to(y.dtype))
    autocast_is_on = torch.is_autocast_enabled("cpu")
    return {"y": y, "x": x.grad, "parameters": part.gradients(), "autocast stays on": autocast_is_on}


@case(checkpoint)
def autocast(answer, rng):
    """A forward in bfloat16, its backward called outside; and one in float32, its backward called inside."""
    return {
        "forward": under_autocast(answer, rng, torch.bfloat16, forward=True, backward=False),
        "backward": under_autocast(answer, rng, torch.bfloat16, forward=False, backward=True),
    }


@case(checkpoint)
def autocast_to_float16(answer, rng):
    """A forward in float16, which is not what autocast takes on a CPU unless it is told."""
    return under_autocast(answer, rng, torch.float16, forward=True, backward=False)


@case(checkpoint)
def changed_in_between(answer, rng):
    """An input, a mask, indices or a tensor given by name is changed in place before backward; and nothing is."""
    rows, width, hidden, outputs = shapes(rng)
    found = {}
    for changed in (None, "input", "mask", "indices", "by name"):
        part, x, scale = Part(rng, width, hidden, outputs), leaf(rng, rows, width), rng.normal(width)
        mine, mask, columns = x * 1, rng.normal(rows, width) > 0, rng.integers(0, outputs - 1, 3)

        def masked(x, mask, columns, *, scale, part=part):
            return part(x * mask * scale)[:, columns]

        disturbed(rng)
        y = answer(masked, mine, mask, columns, scale=scale)
        if changed is not None:
            with torch.no_grad():
                {"input": mine, "mask": mask, "indices": columns, "by name": scale}[changed].zero_()
        found[f"{changed or 'nothing'} changed"] = {
            "y": y.detach(),
            "raised": raised(y.sum().backward),
            "x": None if changed else x.grad,
        }
    return found


@case(checkpoint)
def errors_go_through(answer, rng):
    """What function raises comes out; afterwards all works as before."""
    rows, width, hidden, outputs = shapes(rng)
    part, x = Part(rng, width, hidden, outputs), leaf(rng, rows, width)

    def breaks(x, error):
        part(x)
        raise error

    disturbed(rng)
    found = [raised(answer, breaks, x, error) for error in (KeyError("a"), ZeroDivisionError())]
    y = part(x) + answer(part, x)
    y.sum().backward()
    return {"raised": found, "y": y, "x": x.grad, "parameters": part.gradients(), "calls": part.calls}


@case(checkpoint)
def modules_and_views(answer, rng):
    """A module, float64, a transposed input, work in place inside, and an output that is a view."""
    rows, width, hidden, outputs = shapes(rng)
    part = Part(rng, width, hidden, outputs, dtype=torch.float64)
    x = leaf(rng, width, rows, dtype=torch.float64)
    disturbed(rng)
    y = answer(lambda x: part(x).mul_(0.5).relu_().T, x.T)
    y.square().sum().backward()
    module = nn.Sequential(nn.Linear(width, hidden), nn.Dropout(0.3), nn.GELU(), nn.Linear(hidden, outputs))
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(rng.normal(*weight.shape))
    data = leaf(rng, rows, width)
    found = answer(module, data)
    found.square().sum().backward()
    return {
        "y": y,
        "x": x.grad,
        "parameters": part.gradients(),
        "module": [found, data.grad, *(weight.grad for weight in module.parameters())],
    }


@cost(checkpoint, share=1 / 6)
def bytes_between(answer, rng):
    """What was made in forward and still lives when backward begins."""
    rows = rng.integer(60, 70)
    part, x = Part(rng, 32, 128, 40, rate=0.0), leaf(rng, rows, 32)
    given = x * 1
    with LivingBytes() as living:
        y = answer(part, given)
    held = living.size_bytes(given, y, part.up, part.bias, part.down)
    y.backward(rng.normal(rows, 40))
    return {
        "observed": {"y": y, "x": x.grad, "parameters": part.gradients()},
        "bytes between forward and backward": (held, torch.get_rng_state().nbytes),
    }


@cost(checkpoint, share=1 / 6)
def products(answer, rng):
    """Operations in matrix products of forward and backward, against four times those of forward."""
    rows = rng.integer(10, 20)
    part, x, g = Part(rng, 24, 40, 16, rate=0.0), leaf(rng, rows, 24), rng.normal(rows, 16)
    with TensorWork(large_elements=64) as work:
        y = answer(part, x)
        y.backward(g)
    forward = 2 * rows * (24 * 40 + 40 * 16)
    return {
        "observed": {"y": y, "x": x.grad, "parameters": part.gradients()},
        "operations in matrix products, in forwards": (work.flops / forward, 4),
        "operations without a count": (len(work.uncounted), 0),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Hooked:
    """A right answer with hooks for saved tensors, in small steps; a mistake replaces one of them."""

    def __init__(self, function, inputs, options):
        self.function, self.inputs, self.options = function, self.hold(inputs), options
        self.versions = self.changes()
        self.generator = torch.get_rng_state()
        self.cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self.saved = 0
        self.found = {}

    def hold(self, inputs):
        return inputs

    def call(self):
        return self.function(*self.inputs, **self.options)

    call_again = call

    def watched(self):
        return [*self.inputs, *self.options.values()]

    def changes(self):
        return [value._version for value in self.watched() if isinstance(value, Tensor)]

    def check(self):
        if self.changes() != self.versions:
            raise RuntimeError("changed")

    def number(self, tensor):
        self.saved += 1
        return self.saved - 1

    def keep(self, tensor):
        self.found[len(self.found)] = tensor.detach()

    def rewind(self):
        torch.set_rng_state(self.generator)

    def autocast(self):
        return torch.autocast("cpu", enabled=self.cast[0], dtype=self.cast[1])

    def guarded(self):
        return torch.random.fork_rng(devices=[])

    def grads(self):
        return torch.enable_grad()

    def run_again(self):
        self.check()
        self.found = {}
        with self.guarded(), self.grads(), self.autocast(), saved_tensors_hooks(self.keep, self.number):
            self.rewind()
            self.call_again()

    def take(self, number):
        if not self.found:
            self.run_again()
        return self.found.pop(number)

    def forward(self):
        with saved_tensors_hooks(self.number, self.take):
            return self.call()


def hooked(**steps: Any) -> Callable[..., Any]:
    """An answer of hooks with some steps replaced."""

    def answer(function, *inputs, **options):
        return type("Variant", (Hooked,), steps)(function, inputs, options).forward()

    return answer


class Rerun:
    """A right answer with an autograd.Function, in small steps; a mistake replaces one of them."""

    def __init__(self, function, inputs, options):
        self.function, self.options, self.arity = function, options, len(inputs)
        self.values = [*inputs, *options.values()]
        self.places = [
            i for i, value in enumerate(self.values) if isinstance(value, Tensor) and self.chosen(i)
        ]
        self.generator = torch.get_rng_state()
        self.cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self.several = False

    def chosen(self, place):
        return True

    def call(self, tensors):
        """function's results as a tuple, of these tensors in the places of those that were given."""
        values = list(self.values)
        for place, tensor in zip(self.places, tensors, strict=True):
            values[place] = tensor
        result = self.function(
            *values[: self.arity], **dict(zip(self.options, values[self.arity :], strict=True))
        )
        self.several = isinstance(result, tuple)
        return result if self.several else (result,)

    def asking(self):
        """What makes autograd call backward, even where no input requires a gradient."""
        return torch.empty(0, requires_grad=True)

    def cut(self, tensor):
        return tensor.detach().requires_grad_(tensor.requires_grad)

    def first_run(self, ctx, tensors):
        with torch.set_grad_enabled(self.asked), saved_tensors_hooks(lambda _: None, lambda _: None):
            results = self.call([self.cut(tensor) for tensor in tensors])
        returned = tuple(part.detach() if isinstance(part, Tensor) else part for part in results)
        self.mark(ctx, results, returned)
        return returned

    def mark(self, ctx, results, returned):
        """Say which results require no gradient, as function's own do not."""
        both = zip(results, returned, strict=True)
        ctx.mark_non_differentiable(
            *(new for part, new in both if isinstance(part, Tensor) and not part.requires_grad)
        )

    def unused(self, ctx):
        ctx.set_materialize_grads(False)

    def pairs(self, results, gradients):
        return [
            (part, gradient)
            for part, gradient in zip(results, gradients, strict=True)
            if isinstance(part, Tensor) and part.requires_grad and gradient is not None
        ]

    def ends(self, tensors, results, gradients):
        """Gradients of the tensors; those of parameters are added to what is there."""
        pairs = self.pairs(results, gradients)
        torch.autograd.backward([part for part, _ in pairs], [gradient for _, gradient in pairs])
        return [tensor.grad for tensor in tensors]

    def second_run(self, ctx, gradients):
        tensors = [self.cut(tensor) for tensor in ctx.saved_tensors]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(self.generator)
            with torch.autocast("cpu", enabled=self.cast[0], dtype=self.cast[1]):
                results = self.call(tensors)
        return self.ends(tensors, results, gradients)

    def forward(self):
        self.asked = torch.is_grad_enabled()
        results = Node.apply(self, self.asking(), *(self.values[place] for place in self.places))
        return results if self.several else results[0]


class Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rerun, asking, *tensors):
        ctx.rerun = rerun
        rerun.unused(ctx)
        ctx.save_for_backward(*tensors)
        return rerun.first_run(ctx, tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, *ctx.rerun.second_run(ctx, gradients)


def rerun(**steps: Any) -> Callable[..., Any]:
    """An answer of an autograd.Function with some steps replaced."""

    def answer(function, *inputs, **options):
        return type("Variant", (Rerun,), steps)(function, inputs, options).forward()

    return answer


@mistake(
    checkpoint, "Calls function and leaves everything to autograd: all that it saves lives until backward."
)
def plain_call(function, *inputs, **options):
    return function(*inputs, **options)


@mistake(
    checkpoint, "Runs function under no_grad and returns that: nothing that was computed has a gradient."
)
def under_no_grad(function, *inputs, **options):
    with torch.no_grad():
        return function(*inputs, **options)


@mistake(
    checkpoint,
    "Saves tensors as they are, each beside its number: function runs again, and nothing was freed.",
    fails=("what_lives", "chain", "bytes_between"),
)
def kept_beside_the_number(function, *inputs, **options):
    def number(self, tensor):
        return Hooked.number(self, tensor), tensor

    def take(self, both):
        return Hooked.take(self, both[0])

    return hooked(number=number, take=take)(function, *inputs, **options)


@mistake(
    checkpoint,
    "Copies what autograd saves to another place, and copies it back: that is offloading, nothing runs again.",
)
def offloaded(function, *inputs, **options):
    return hooked(number=lambda self, tensor: tensor.clone(), take=lambda self, copy: copy)(
        function, *inputs, **options
    )


@mistake(
    checkpoint,
    "Keeps what autograd saves as bytes, and gradients are made of these: what the second run computes is thrown away.",
    fails=("from_the_second_run", "bytes_between"),
)
def kept_as_bytes(function, *inputs, **options):
    def number(self, tensor):
        return tensor.dtype, tensor.shape, tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()

    def take(self, kept):
        dtype, shape, data = kept
        if not self.found:
            self.run_again()
            self.found = {0: None}
        return torch.tensor(data, dtype=torch.uint8).view(dtype).view(shape)

    return hooked(number=number, take=take)(function, *inputs, **options)


@mistake(
    checkpoint,
    "What the second run saved is held until all outputs are used: one without use holds all of it.",
    fails=("several_outputs",),
)
def never_let_go(function, *inputs, **options):
    def take(self, number):
        if not self.found:
            self.run_again()
        return self.found[number]

    return hooked(take=take)(function, *inputs, **options)


@mistake(
    checkpoint,
    "Keeps what autograd saves in bfloat16: half the bytes, and gradients that are not the ones of forward.",
)
def kept_in_bfloat16(function, *inputs, **options):
    def number(self, tensor):
        return tensor.dtype, tensor.bfloat16() if tensor.is_floating_point() else tensor.clone()

    return hooked(number=number, take=lambda self, kept: kept[1].to(kept[0]))(function, *inputs, **options)


@mistake(
    checkpoint,
    "An autograd.Function keeps the graph of the first run in ctx, and backward goes through that one.",
)
def graph_in_ctx(function, *inputs, **options):
    def first_run(self, ctx, tensors):
        self.kept = [self.cut(tensor) for tensor in tensors]
        with torch.set_grad_enabled(self.asked):
            self.results = self.call(self.kept)
        returned = tuple(part.detach() if isinstance(part, Tensor) else part for part in self.results)
        self.mark(ctx, self.results, returned)
        return returned

    def second_run(self, ctx, gradients):
        ctx.saved_tensors  # noqa: B018 - notices what was changed in place
        return self.ends(self.kept, self.results, gradients)

    return rerun(first_run=first_run, second_run=second_run)(function, *inputs, **options)


@mistake(
    checkpoint,
    "ctx keeps what the second run made, so it lives as long as the output does.",
    fails=("what_lives", "chain", "several_outputs"),
)
def second_run_kept(function, *inputs, **options):
    def second_run(self, ctx, gradients):
        self.inside = []

        def keep(tensor):
            self.inside.append(tensor)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            return Rerun.second_run(self, ctx, gradients)

    return rerun(second_run=second_run)(function, *inputs, **options)


@mistake(
    checkpoint,
    "Runs function a second time at once, in forward: twice the work, and all of it is kept.",
    fails=("what_lives", "chain", "changed_in_between", "bytes_between"),
)
def run_twice_in_forward(function, *inputs, **options):
    def forward(self):
        with saved_tensors_hooks(self.number, self.take):
            result = self.call()
        if self.saved and torch.is_grad_enabled():
            self.run_again()
        return result

    return hooked(forward=forward)(function, *inputs, **options)


@mistake(checkpoint, "Runs function again for each tensor that was saved, instead of once for all of them.")
def run_for_each_tensor(function, *inputs, **options):
    def take(self, number):
        self.run_again()
        return self.found[number]

    return hooked(take=take)(function, *inputs, **options)


@mistake(checkpoint, "Holds copies of the inputs, which live outside anyway.", fails=("bytes_between",))
def inputs_copied(function, *inputs, **options):
    def hold(self, inputs):
        self.given = inputs
        self.copies = [part.detach().clone() if isinstance(part, Tensor) else part for part in inputs]
        return inputs

    def call_again(self):
        again = [
            copy.requires_grad_(part.requires_grad) if isinstance(part, Tensor) else part
            for copy, part in zip(self.copies, self.given, strict=True)
        ]
        return self.function(*again, **self.options)

    return hooked(hold=hold, call_again=call_again)(function, *inputs, **options)


@mistake(
    checkpoint,
    "The generator is not put back for the second run: dropout drops other values there than in forward.",
)
def generator_not_put_back(function, *inputs, **options):
    return hooked(rewind=lambda self: None)(function, *inputs, **options)


@mistake(
    checkpoint,
    "The generator stays where the second run left it: what is drawn after backward was drawn before.",
    fails=("dropout", "chain", "added_to_what_is_there"),
)
def generator_left_there(function, *inputs, **options):
    return hooked(guarded=contextlib.nullcontext)(function, *inputs, **options)


@mistake(
    checkpoint,
    "The second run starts from torch.initial_seed(), where the first one had started only if nothing was drawn.",
)
def started_from_the_seed(function, *inputs, **options):
    return hooked(rewind=lambda self: torch.manual_seed(torch.initial_seed()))(function, *inputs, **options)


@mistake(checkpoint, "The state of the generator is taken after function ran, not before.")
def state_taken_too_late(function, *inputs, **options):
    def forward(self):
        result = Hooked.forward(self)
        self.generator = torch.get_rng_state()
        return result

    return hooked(forward=forward)(function, *inputs, **options)


@mistake(
    checkpoint,
    "Both runs begin with a seed of their own, so every layer and every step drops the same values.",
)
def seed_of_its_own(function, *inputs, **options):
    def call(self):
        torch.manual_seed(0)
        return self.function(*self.inputs, **self.options)

    return hooked(call=call, call_again=call)(function, *inputs, **options)


@mistake(
    checkpoint,
    "The first run is inside fork_rng too: forward leaves no trace, and the next layer drops the same values.",
)
def forward_leaves_no_trace(function, *inputs, **options):
    def forward(self):
        with torch.random.fork_rng(devices=[]):
            return Hooked.forward(self)

    return hooked(forward=forward)(function, *inputs, **options)


@mistake(
    checkpoint,
    "Autocast is not put back: the second run is in float32 where the first one was in half precision.",
    fails=("autocast", "autocast_to_float16"),
)
def autocast_forgotten(function, *inputs, **options):
    return hooked(autocast=lambda self: contextlib.nullcontext())(function, *inputs, **options)


@mistake(
    checkpoint,
    "Autocast is put back with its default dtype, not with the one that forward had.",
    fails=("autocast_to_float16",),
)
def autocast_of_default_dtype(function, *inputs, **options):
    return hooked(autocast=lambda self: torch.autocast("cpu", torch.bfloat16, enabled=self.cast[0]))(
        function, *inputs, **options
    )


@mistake(
    checkpoint,
    "Autocast is turned on where forward had it, but not turned off where forward did not.",
    fails=("autocast",),
)
def autocast_only_turned_on(function, *inputs, **options):
    def autocast(self):
        return torch.autocast("cpu", self.cast[1]) if self.cast[0] else contextlib.nullcontext()

    return hooked(autocast=autocast)(function, *inputs, **options)


@mistake(checkpoint, "Gradients are off in the second run, as they are in any backward: it records nothing.")
def second_run_without_gradients(function, *inputs, **options):
    return hooked(grads=contextlib.nullcontext)(function, *inputs, **options)


@mistake(
    checkpoint,
    "Gradients are turned on in forward, even where the caller turned them off.",
    fails=("without_gradients",),
)
def gradients_turned_on(function, *inputs, **options):
    with torch.enable_grad():
        return hooked()(function, *inputs, **options)


@mistake(
    checkpoint,
    "Inputs are held without looking whether they were changed: backward gives gradients of other inputs.",
    fails=("changed_in_between",),
)
def change_unnoticed(function, *inputs, **options):
    return hooked(check=lambda self: None)(function, *inputs, **options)


@mistake(
    checkpoint,
    "Only positional inputs are watched: a tensor given by name may change unnoticed.",
    fails=("changed_in_between",),
)
def change_by_name_unnoticed(function, *inputs, **options):
    return hooked(watched=lambda self: [*self.inputs])(function, *inputs, **options)


@mistake(
    checkpoint,
    "Of the positional inputs only those that require a gradient are watched: a mask may change unnoticed.",
    fails=("changed_in_between",),
)
def change_of_a_mask_unnoticed(function, *inputs, **options):
    def watched(self):
        asking = [part for part in self.inputs if isinstance(part, Tensor) and part.requires_grad]
        return [*asking, *self.options.values()]

    return hooked(watched=watched)(function, *inputs, **options)


@mistake(
    checkpoint,
    "The second run gets no keyword arguments.",
    fails=("values_of_all_kinds", "added_to_what_is_there", "changed_in_between"),
)
def options_dropped(function, *inputs, **options):
    return hooked(call_again=lambda self: self.function(*self.inputs))(function, *inputs, **options)


@mistake(checkpoint, "Always returns a tuple, also of the one tensor that function returns.")
def always_a_tuple(function, *inputs, **options):
    result = hooked()(function, *inputs, **options)
    return result if isinstance(result, tuple) else (result,)


@mistake(checkpoint, "Takes a tuple of one for the tensor in it.", fails=("several_outputs",))
def tuple_of_one_unpacked(function, *inputs, **options):
    result = hooked()(function, *inputs, **options)
    return result[0] if isinstance(result, tuple) and len(result) == 1 else result


@mistake(
    checkpoint,
    "Takes every value among the inputs for a tensor: numbers, None and strings have no requires_grad.",
    fails=("values_of_all_kinds", "errors_go_through"),
)
def tensors_only(function, *inputs, **options):
    asked = [part.requires_grad for part in inputs]
    return (rerun() if any(asked) else hooked())(function, *inputs, **options)


@mistake(
    checkpoint,
    "Requires a gradient of every tensor among the inputs, and integers cannot have one.",
    fails=("values_of_all_kinds", "only_parameters", "without_gradients", "changed_in_between"),
)
def gradients_of_integers(function, *inputs, **options):
    return rerun(cut=lambda self, tensor: tensor.detach().requires_grad_())(function, *inputs, **options)


@mistake(
    checkpoint,
    "Tensors that are given by name are cut off and get no gradient.",
    fails=("values_of_all_kinds", "added_to_what_is_there"),
)
def no_gradient_by_name(function, *inputs, **options):
    cut = {name: part.detach() if isinstance(part, Tensor) else part for name, part in options.items()}
    return rerun()(function, *inputs, **cut)


@mistake(
    checkpoint,
    "No input requires a gradient, so autograd never calls the Function's backward, and parameters get nothing.",
    fails=("only_parameters",),
)
def nobody_asks(function, *inputs, **options):
    return rerun(asking=lambda self: torch.empty(0))(function, *inputs, **options)


class Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, options, *inputs):
        ctx.segment = Hooked(function, inputs, options)
        ctx.segment.watched = lambda: inputs
        ctx.segment.versions = ctx.segment.changes()
        return function(*inputs, **options)

    @staticmethod
    def backward(ctx, *gradients):
        segment = ctx.segment
        segment.check()
        inputs = [Rerun.cut(None, part) if isinstance(part, Tensor) else part for part in segment.inputs]
        with segment.guarded(), torch.enable_grad(), segment.autocast():
            segment.rewind()
            results = segment.function(*inputs, **segment.options)
        pairs = Rerun.pairs(None, results if isinstance(results, tuple) else (results,), gradients)
        torch.autograd.backward([part for part, _ in pairs], [gradient for _, gradient in pairs])
        return None, None, *(part.grad if isinstance(part, Tensor) else None for part in inputs)


@mistake(
    checkpoint,
    "A bare autograd.Function: without an input that requires a gradient its backward is not called, and parameters "
    "get nothing; all its outputs require a gradient, and tensors by name pass it unseen.",
)
def bare_function(function, *inputs, **options):
    return Bare.apply(function, options, *inputs)


@mistake(
    checkpoint,
    "backward asks autograd.grad for the inputs alone: the parameters that function uses get nothing.",
)
def inputs_only(function, *inputs, **options):
    def ends(self, tensors, results, gradients):
        pairs = self.pairs(results, gradients)
        asked = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(
            torch.autograd.grad(
                [part for part, _ in pairs], asked, [gradient for _, gradient in pairs], allow_unused=True
            )
            if asked
            else ()
        )
        return [next(found) if tensor.requires_grad else None for tensor in tensors]

    return rerun(ends=ends)(function, *inputs, **options)


@mistake(
    checkpoint,
    "The second run takes the inputs with their history, and backward goes on through what came before, twice.",
)
def history_not_cut(function, *inputs, **options):
    return rerun(cut=lambda self, tensor: tensor)(function, *inputs, **options)


@mistake(checkpoint, "backward starts from ones, whatever gradient arrives from above.")
def gradient_from_above_ignored(function, *inputs, **options):
    def pairs(self, results, gradients):
        return [(part, torch.ones_like(part)) for part, _ in Rerun.pairs(self, results, gradients)]

    return rerun(pairs=pairs)(function, *inputs, **options)


@mistake(
    checkpoint, "Of several outputs only the first one's gradient is taken back.", fails=("several_outputs",)
)
def first_output_only(function, *inputs, **options):
    return rerun(pairs=lambda self, results, gradients: Rerun.pairs(self, results[:1], gradients[:1]))(
        function, *inputs, **options
    )


@mistake(
    checkpoint,
    "Outputs without use get gradients of zero, and so do parameters that only they depend on.",
    fails=("several_outputs",),
)
def zeros_for_the_unused(function, *inputs, **options):
    return rerun(unused=lambda self, ctx: None)(function, *inputs, **options)


@mistake(
    checkpoint,
    "All outputs require gradients, also those that function had detached.",
    fails=("several_outputs", "without_gradients"),
)
def all_outputs_require_gradients(function, *inputs, **options):
    return rerun(mark=lambda self, ctx, results, returned: None)(function, *inputs, **options)


@mistake(
    checkpoint,
    "Starts backward at every output that is a tensor, and some of them have no gradient to take.",
    fails=("several_outputs",),
)
def backward_of_all_outputs(function, *inputs, **options):
    def pairs(self, results, gradients):
        both = zip(results, gradients, strict=True)
        return [(part, gradient) for part, gradient in both if isinstance(part, Tensor)]

    return rerun(pairs=pairs)(function, *inputs, **options)


@mistake(
    checkpoint, "Gradients of the inputs are taken back, then those of parameters in another second run."
)
def a_run_for_parameters(function, *inputs, **options):
    def second_run(self, ctx, gradients):
        found = Rerun.second_run(self, ctx, gradients)
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            self.call(ctx.saved_tensors)
        return found

    return rerun(second_run=second_run)(function, *inputs, **options)


@alternative(
    checkpoint, "An autograd.Function whose backward runs function again and calls backward on the result"
)
def by_function(function, *inputs, **options):
    return rerun()(function, *inputs, **options)


class Enough(Exception):  # noqa: N818 - not an error
    """All that was asked for has been made."""


@alternative(checkpoint, "Stops the second run at the last tensor that was saved")
def stops_early(function, *inputs, **options):
    def keep(self, tensor):
        Hooked.keep(self, tensor)
        if len(self.found) == self.saved:
            raise Enough

    def call_again(self):
        with contextlib.suppress(Enough):
            self.call()

    return hooked(keep=keep, call_again=call_again)(function, *inputs, **options)


@alternative(
    checkpoint, "Runs again on inputs without history, and lets a Function of no effect hold and watch them"
)
def watched_by_autograd(function, *inputs, **options):
    class Holds(torch.autograd.Function):
        @staticmethod
        def forward(ctx, asking, *tensors):
            ctx.save_for_backward(*tensors)
            return torch.empty(0)

    def hold(self, inputs):
        tensors = [part.detach() for part in (*inputs, *options.values()) if isinstance(part, Tensor)]
        with torch.enable_grad():
            self.held = Holds.apply(torch.empty(0, requires_grad=True), *tensors)
        return inputs

    return hooked(hold=hold, check=lambda self: self.held.grad_fn.saved_tensors)(function, *inputs, **options)
