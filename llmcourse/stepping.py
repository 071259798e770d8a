"""What the cases of every optimizer need: gradients to step with, scenes to go through, and the bytes of a state.

An answer is a class of optimizers, called with parameters or groups and options. `give(missing=...)` sets a new
gradient on every parameter of a scene; what follows from it is the exercise's own.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from llmcourse.exercise import Rng, raised

Give = Callable[..., None]


def drawn(rng: Rng, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters of 2, 3, 1 and 0 dimensions, of magnitudes around 1; the scalar is too large to come near 0."""
    shapes = ((3, 5), (2, 3, 4), (7,))
    several = [rng.normal(*shape, dtype=dtype) + rng.choice((-1, 1)) for shape in shapes]
    scalar = rng.uniform(3, 4, dtype=dtype) * rng.choice((-1, 1))
    return [Parameter(value) for value in (*several, scalar)]


def gradients_of(
    parameters: Sequence[Parameter],
    rng: Rng,
    *,
    sizes: Sequence[float],
    size: float = 1.0,
    missing: Iterable[int] = (),
) -> None:
    """A new normal gradient for each parameter, sizes[i] * size times as large; None for those in `missing`."""
    for index, (parameter, loudness) in enumerate(zip(parameters, sizes, strict=True)):
        gradient = rng.normal(*parameter.shape, dtype=parameter.dtype) * (loudness * size)
        parameter.grad = None if index in missing else gradient


def values(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copies of what the parameters are now."""
    return [parameter.detach().clone() for parameter in parameters]


# ---------------------------------------------------------------------------------------------------------- scenes


def with_missing(
    optimizer: Any, parameters: Sequence[Parameter], give: Give, missing: Iterable[Sequence[int]]
) -> list[Any]:
    """Values after each of several steps, in which these parameters have no gradient."""
    seen = []
    for absent in missing:
        give(missing=absent)
        optimizer.step()
        seen.append(values(parameters))
    return seen


def in_groups(
    answer: Any,
    parameters: Sequence[Parameter],
    give: Callable[[bool], None],
    *,
    first: Sequence[dict[str, Any]],
    later: dict[str, Any],
    steps: int = 6,
    **options: Any,
) -> list[Any]:
    """Values after each step with the groups `first`, to which the group `later` is added before the fourth step.

    give(joined) sets the gradients; joined says whether `later` is in.
    """
    optimizer, seen = answer(list(first), **options), []
    for step in range(steps):
        if step == 3:
            optimizer.add_param_group(later)
        give(step >= 3)
        optimizer.step()
        seen.append(values(parameters))
    return seen


def scheduled(
    optimizer: Any,
    parameters: Sequence[Parameter],
    give: Callable[[int], None],
    change: dict[str, Any],
    *,
    factors: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 0.3, 0.1, 1.0, 1.0),
) -> list[Any]:
    """Values after 7 steps, each with another factor of the rate; the options in `change` count from the sixth on."""
    scheduler, seen = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step]), []
    for step in range(7):
        give(step)
        optimizer.step()
        scheduler.step()
        seen.append(values(parameters))
        if step == 4:
            optimizer.param_groups[0].update(change)
    return seen


def one_after_another(
    answer: Any, parameters: Sequence[Parameter], give: Give, every: Iterable[dict[str, Any]]
) -> list[Any]:
    """Values after each of two steps of one optimizer, then of the next on the same parameters, which starts anew."""
    seen = []
    for options in every:
        seen += with_missing(answer(parameters, **options), parameters, give, ((), ()))
    return seen


def in_shared_memory(
    answer: Any, rng: Rng, *, transposed_first: bool = False, **options: Any
) -> dict[str, Any]:
    """Three steps of parameters that are views of larger tensors; one of the gradients is transposed."""
    whole, wide = rng.normal(5, 3), rng.normal(4, 6)
    parameters = [Parameter(whole.T), Parameter(wide[:, 1:4])]
    optimizer = answer(parameters, **options)
    gradients = (
        (rng.normal(5, 3).T, rng.normal(4, 3)) if transposed_first else (rng.normal(3, 5), rng.normal(3, 4).T)
    )
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for _ in range(3):
        optimizer.step()
    return {
        "whole": whole,
        "wide": wide,
        "parameters": values(parameters),
        "gradients": [parameter.grad for parameter in parameters],
    }


def write(optimizer: Any, parameters: Sequence[Parameter], **more: Any) -> bytes:
    """A checkpoint of the optimizer, its parameters and `more`."""
    written = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "parameters": values(parameters), **more}, written)
    return written.getvalue()


def read(saved: bytes, optimizer: Any, parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Put a checkpoint back into an optimizer and parameters of this process; everything that it held."""
    loaded: dict[str, Any] = torch.load(io.BytesIO(saved), weights_only=True)
    optimizer.load_state_dict(loaded["optimizer"])
    with torch.no_grad():
        for parameter, value in zip(parameters, loaded["parameters"], strict=True):
            parameter.copy_(value)
    return loaded


def with_gradient(value: Tensor, gradient: Tensor) -> list[Parameter]:
    """One parameter that has this gradient."""
    parameter = Parameter(value)
    parameter.grad = gradient
    return [parameter]


def refused_gradients(answer: Any, rng: Rng) -> dict[str, Any]:
    """What step() raises for a gradient that is sparse, complex or of 16 bits."""
    x = rng.normal(3, 2)
    given = {
        "sparse": with_gradient(x, rng.normal(3, 2).to_sparse()),
        "complex": with_gradient(x.to(torch.complex64), rng.normal(3, 2).to(torch.complex64)),
        "bfloat16": with_gradient(x.bfloat16(), rng.normal(3, 2, dtype=torch.bfloat16)),
        "float16": with_gradient(x.half(), rng.normal(3, 2, dtype=torch.float16)),
    }
    return {name: raised(answer(parameters).step) for name, parameters in given.items()}


# ----------------------------------------------------------------------------------------------------------- costs


def large(rng: Rng) -> list[Parameter]:
    """Parameters of some kilobytes with gradients, all but the last."""
    shapes = ((rng.integer(30, 40), 24), (130,), (3, 5, 9), (500,))
    parameters = [Parameter(rng.normal(*shape)) for shape in shapes]
    for parameter in parameters[:3]:
        parameter.grad = rng.normal(*parameter.shape)
    return parameters


def state_bytes(value: Any) -> int:
    """Bytes of a state as it is saved: each tensor's whole storage, and 8 for every number."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return sum(state_bytes(part) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(state_bytes(part) for part in value)
    return 8
