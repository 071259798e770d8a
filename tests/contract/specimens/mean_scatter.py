"""Specimen: a collective of two ranks whose traffic is counted by the protocol."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake, raised


@exercise(points=3, minutes=15, ranks=2, hints=("What does the other rank need of yours, and what not?",))
def mean_scatter(gradient: Tensor, link) -> Tensor:
    """This rank's part of the mean of all ranks' gradients; every rank calls it with its own gradient.

    gradient [n], the same n and floating dtype on every rank; the parts are those of torch.tensor_split(gradient,
    link.world_size), of unlike sizes where n is not divisible, and a rank gets the part of its number.
    The sum is made in float32 at least and then rounded to the dtype of the gradient. No rank sends what
    the other does not need. ValueError when gradient is not one-dimensional, before anything is sent. `link` has rank,
    world_size, send(to, data) and receive(source); sending does not wait. About 7 lines.
    """
    ### BEGIN SOLUTION
    if gradient.dim() != 1:
        raise ValueError(f"expected a gradient of one dimension, found {gradient.dim()}")
    parts = torch.tensor_split(gradient, link.world_size)
    others = [rank for rank in range(link.world_size) if rank != link.rank]
    for rank in others:
        link.send(rank, parts[rank])
    wide = torch.promote_types(gradient.dtype, torch.float32)
    total = parts[link.rank].to(wide)
    for rank in others:
        total = total + link.receive(rank)
    return (total / link.world_size).to(gradient.dtype)
    ### END SOLUTION


excuse(
    mean_scatter,
    "torch.promote_types(gradient.dtype, torch.float32) -> torch.promote_types(torch.float32, gradient.dtype)",
    "promote_types is symmetric",
)


@case(mean_scatter)
def even_parts(answer, rng, link):
    """Ten values on each rank."""
    return answer(rng.normal(2, 10)[link.rank], link)


@case(mean_scatter)
def uneven_parts(answer, rng, link):
    """An odd number of values, float64, twice in a row."""
    mine = rng.normal(2, 2 * rng.integer(2, 5) + 1, dtype=torch.float64)[link.rank]
    return [answer(mine, link), answer(mine * 3 + link.rank, link)]


@case(mean_scatter)
def half_precision(answer, rng, link):
    """bfloat16 gradients of unlike sizes."""
    both = rng.normal(2, 400) * torch.tensor([[1.0], [37.0]])
    return answer(both.bfloat16()[link.rank], link)


@case(mean_scatter)
def large_values(answer, rng, link):
    """float16 gradients whose sum would not fit float16, though their mean does."""
    return answer((rng.normal(2, 8).abs() * 1000 + 50_000).half()[link.rank], link)


@case(mean_scatter)
def refusal(answer, rng, link):
    """A matrix is refused, and a vector after it is not disturbed."""
    mine = rng.normal(2, 3, 4)[link.rank]
    return {"refused": raised(answer, mine, link), "part": answer(mine[0], link)}


FREE = {"messages sent by the busiest rank": (0, float("inf"))}


@cost(mean_scatter, share=1 / 6, authority="protocol")
def traffic(answer, rng, link):
    """Bytes sent for 4,096 values of float32; how many messages carry them is free."""
    answer(rng.normal(2, 4096)[link.rank], link)
    return FREE


@cost(mean_scatter, share=1 / 6, authority="protocol")
def traffic_of_bfloat16(answer, rng, link):
    """Bytes sent for 4,096 values of bfloat16."""
    answer(rng.normal(2, 4096).bfloat16()[link.rank], link)
    return FREE


def check(gradient):
    if gradient.dim() != 1:
        raise ValueError("expected one dimension")


def other(link):
    return 1 - link.rank


@mistake(mean_scatter, "The parts are summed, not averaged.")
def summed(gradient, link):
    check(gradient)
    parts = gradient.tensor_split(2)
    link.send(other(link), parts[other(link)])
    return (parts[link.rank].double() + link.receive(other(link)).double()).to(gradient.dtype)


@mistake(mean_scatter, "Every rank gets the first part.")
def first_part(gradient, link):
    check(gradient)
    link.send(other(link), gradient.tensor_split(2)[0])
    return ((gradient.tensor_split(2)[0].double() + link.receive(other(link)).double()) / 2).to(
        gradient.dtype
    )


@mistake(mean_scatter, "Each rank keeps the part that belongs to the other.")
def swapped(gradient, link):
    check(gradient)
    parts = gradient.tensor_split(2)
    link.send(other(link), parts[link.rank])
    return ((parts[other(link)].double() + link.receive(other(link)).double()) / 2).to(gradient.dtype)


@mistake(mean_scatter, "Every rank waits for the other before it sends, so both wait for ever.")
def receives_first(gradient, link):
    check(gradient)
    parts = gradient.tensor_split(2)
    theirs = link.receive(other(link))
    link.send(other(link), parts[other(link)])
    return ((parts[link.rank].double() + theirs.double()) / 2).to(gradient.dtype)


@mistake(mean_scatter, "The whole gradient is sent, twice what the other rank needs.")
def sends_everything(gradient, link):
    check(gradient)
    link.send(other(link), gradient)
    theirs = link.receive(other(link)).tensor_split(2)[link.rank]
    return ((gradient.tensor_split(2)[link.rank].double() + theirs.double()) / 2).to(gradient.dtype)


@mistake(mean_scatter, "The gradient is widened before it is sent, so the traffic doubles.")
def sends_float32(gradient, link):
    check(gradient)
    parts = gradient.tensor_split(2)
    link.send(other(link), parts[other(link)].to(torch.promote_types(gradient.dtype, torch.float32)))
    return ((parts[link.rank].double() + link.receive(other(link)).double()) / 2).to(gradient.dtype)


@mistake(mean_scatter, "The values are sent as a list of numbers, each of which takes eight bytes.")
def sends_numbers(gradient, link):
    check(gradient)
    parts = gradient.tensor_split(2)
    link.send(other(link), parts[other(link)].tolist())
    theirs = torch.tensor(link.receive(other(link)), dtype=torch.float64)
    return ((parts[link.rank].double() + theirs) / 2).to(gradient.dtype)


@mistake(mean_scatter, "The sum is made in the gradient's own type, which it may overflow.")
def narrow_sum(gradient, link):
    check(gradient)
    parts = gradient.tensor_split(2)
    link.send(other(link), parts[other(link)])
    return (parts[link.rank] + link.receive(other(link))) / 2


@mistake(mean_scatter, "All parts have the size of the first, so an odd gradient is cut off.")
def equal_parts(gradient, link):
    check(gradient)
    size = len(gradient) // 2
    parts = gradient[: 2 * size].reshape(2, size)
    link.send(other(link), parts[other(link)])
    return ((parts[link.rank].double() + link.receive(other(link)).double()) / 2).to(gradient.dtype)


@mistake(mean_scatter, "The shape is not checked.")
def unchecked(gradient, link):
    parts = gradient.tensor_split(2)
    link.send(other(link), parts[other(link)])
    return ((parts[link.rank].double() + link.receive(other(link)).double()) / 2).to(gradient.dtype)


@alternative(mean_scatter, "Halves first, in float64, and sends in two messages")
def in_two_messages(gradient, link):
    check(gradient)
    theirs = gradient.tensor_split(2)[other(link)]
    middle = len(theirs) // 2
    link.send(other(link), theirs[:middle])
    link.send(other(link), theirs[middle:].clone())
    received = torch.cat([link.receive(other(link)), link.receive(other(link))])
    return (gradient.tensor_split(2)[link.rank].double() * 0.5 + received.double() * 0.5).to(gradient.dtype)


@alternative(mean_scatter, "Rank 1 waits before it sends; rank 0 sends first, and the parts travel as bytes")
def as_bytes_in_turn(gradient, link):
    check(gradient)
    parts = gradient.tensor_split(2)
    raw = parts[other(link)].contiguous().view(torch.uint8).numpy().tobytes()
    if link.rank == 0:
        link.send(1, raw)
    received = link.receive(other(link))
    if link.rank == 1:
        link.send(0, raw)
    theirs = torch.frombuffer(bytearray(received), dtype=gradient.dtype)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return torch.stack([theirs, parts[link.rank]]).to(wide).mean(dim=0).to(gradient.dtype)
