"""Compares what an answer gave with what the reference gave: None, or what differs, in shapes and numbers.

Integers, strings, shapes, dtypes and devices must be equal. Floats agree when
|observed - expected| <= tol * k * eps(dtype) * (|expected| + rms(expected)), k = 64 for float32 and float64 and 2 for
narrower types: room for another order of summation, none for another formula.
"""

from __future__ import annotations

import builtins
import math

import torch
from torch import Tensor

from llmcourse.wire import Data, Opaque, device_of, printable

ROOM = {torch.float64: 64, torch.float32: 64, torch.complex64: 64, torch.complex128: 64}
ROOM_NARROW = 2
SHOWN_CHARS = 80


def difference(observed: Data, expected: Data, *, tol: float = 1.0, path: str = "") -> str | None:
    """None when observed agrees with expected; otherwise one line that names the place, what was expected and found."""
    where = f"{path}: " if path else ""
    if isinstance(expected, Tensor):
        if not isinstance(observed, Tensor):
            return f"{where}expected {describe(expected)}, found {describe(observed)}"
        return _tensor_difference(observed, expected, tol, where)
    if type(observed) is not type(expected):
        return f"{where}expected {describe(expected)}, found {describe(observed)}"
    if isinstance(expected, float):
        return _float_difference(observed, expected, tol, where)  # type: ignore[arg-type]
    if isinstance(expected, list | tuple):
        return _sequence_difference(observed, expected, tol, path)  # type: ignore[arg-type]
    if isinstance(expected, dict):
        return _dict_difference(observed, expected, tol, path)  # type: ignore[arg-type]
    if isinstance(expected, bytes) and observed != expected:
        return where + _bytes_difference(observed, expected)  # type: ignore[arg-type]
    if observed == expected:
        return None
    if isinstance(expected, str) and is_outcome(expected) and is_outcome(observed):
        to_do = "a result" if expected == "nothing" else expected
        return f"{where}expected {to_do}, and the call {outcome(observed)}"  # type: ignore[arg-type]
    return f"{where}expected {describe(expected)}, found {describe(observed)}"


def is_outcome(data: Data) -> bool:
    """Whether a text is what `exercise.raised` gives: the name of a builtin exception, or "nothing"."""
    kind = getattr(builtins, data, None) if isinstance(data, str) and data != "nothing" else Exception
    return isinstance(kind, type) and issubclass(kind, BaseException)


def outcome(name: str) -> str:
    """The same in words."""
    return "returned" if name == "nothing" else f"raised {name}"


def structure(data: Data, *, shapes: bool = True) -> object:
    """What must be equal before an own judge looks: types, keys, dtypes and, unless shapes=False, shapes."""
    if isinstance(data, Tensor):
        return ("tensor", str(data.dtype), device_of(data), tuple(data.shape) if shapes else data.dim())
    if isinstance(data, dict):
        return {key: structure(part, shapes=shapes) for key, part in data.items()}
    if isinstance(data, list | tuple) and shapes:
        return (type(data).__name__, [structure(part, shapes=shapes) for part in data])
    return type(data).__name__


def describe(data: Data) -> str:
    """A value in a few words: `float32 [4, 8]`, `3`, `'abc'`, `a list of 3`."""
    if isinstance(data, Tensor):
        name = str(data.dtype).removeprefix("torch.")
        device = "" if device_of(data) == "cpu" else f" on {device_of(data)}"
        if data.dim() == 0:
            return (
                f"{name} scalar {data.item():.6g}{device}"
                if data.is_floating_point()
                else f"{name} scalar {data.item()}"
            )
        return f"{name} {list(data.shape)}{device}"
    if isinstance(data, Opaque):
        return printable(data.kind)
    if isinstance(data, list | tuple):
        plain = len(data) <= SHOWN_CHARS // 3 and all(isinstance(part, int | str | None) for part in data)
        short = repr(data) if plain else ""
        return short if plain and len(short) <= SHOWN_CHARS else f"a {type(data).__name__} of {len(data)}"
    if isinstance(data, dict):
        return f"a dict with keys {_keys(sorted(data)[:6])}" if data else "an empty dict"
    if isinstance(data, bytes):
        return f"{len(data)} bytes"
    if isinstance(data, float):
        text = f"{data:.9g}"
        return text if not text.lstrip("-").isdigit() else f"{text}.0"
    if isinstance(data, int) and not isinstance(data, bool) and abs(data) >= 10_000:
        return f"{data:,}" if abs(data) < 10**40 else f"an int of {data.bit_length()} bits"
    text = repr(data)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


def _float_difference(observed: float, expected: float, tol: float, where: str) -> str | None:
    if math.isnan(expected) or math.isinf(expected) or not math.isfinite(observed):
        same = (math.isnan(expected) and math.isnan(observed)) or observed == expected
        return None if same else f"{where}expected {expected:.9g}, found {observed:.9g}"
    allowed = tol * ROOM[torch.float64] * torch.finfo(torch.float64).eps * 2 * abs(expected)
    if abs(observed - expected) <= allowed:
        return None
    digits = 9 if f"{expected:.9g}" != f"{observed:.9g}" else 17
    return f"{where}expected {expected:.{digits}g}, found {observed:.{digits}g}"


def _tensor_difference(observed: Tensor, expected: Tensor, tol: float, where: str) -> str | None:
    if (
        observed.dtype != expected.dtype
        or observed.shape != expected.shape
        or device_of(observed) != device_of(expected)
    ):
        return f"{where}expected {describe(expected)}, found {describe(observed)}"
    # Most right answers give what the reference does to the last bit, which is soon told.
    if expected.numel() == 0 or _is_equal(observed, expected):
        return None
    if not (expected.is_floating_point() or expected.is_complex()):
        wrong = observed != expected
        if not bool(wrong.any()):
            return None
        return where + _first(wrong, observed, expected, "")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    o, e = observed.to(wide), expected.to(wide)
    unclear = ~torch.isfinite(e) | ~torch.isfinite(o)
    same = (torch.isnan(o) & torch.isnan(e)) | (o == e)
    magnitude = torch.where(torch.isfinite(e), e, torch.zeros_like(e)).abs()
    peak = magnitude.max().clamp_min(torch.finfo(torch.float64).tiny)
    rms = (magnitude / peak).square().mean().sqrt() * peak  # squares of values above 1e154 would overflow
    room = ROOM.get(expected.dtype, ROOM_NARROW) * torch.finfo(expected.dtype).eps
    allowed = tol * room * (magnitude + rms)
    wrong = torch.where(unclear, ~same, (o - e).abs() > allowed)
    if not bool(wrong.any()):
        return None
    not_finite = int((~torch.isfinite(o) & torch.isfinite(e)).sum())
    note = f"; {not_finite} are NaN or infinite where the answer is finite" if not_finite else ""
    return where + _first(wrong, observed, expected, note)


def _is_equal(observed: Tensor, expected: Tensor) -> bool:
    if expected.element_size() == 1:  # torch.equal does not know every float of 8 bits
        observed, expected = observed.view(torch.uint8), expected.view(torch.uint8)
    return torch.equal(observed, expected)


def _first(wrong: Tensor, observed: Tensor, expected: Tensor, note: str) -> str:
    place = [int(i) for i in wrong.nonzero()[0]]
    found, right = observed[tuple(place)].item(), expected[tuple(place)].item()
    of = f"{int(wrong.sum()):,} of {wrong.numel():,} values differ; first at {place}: " if wrong.dim() else ""
    shown = [f"{value:.6g}" if isinstance(value, float) else f"{value}" for value in (right, found)]
    if shown[0] == shown[1] and isinstance(right, float):
        shown = [f"{value:.17g}" for value in (right, found)]
    return f"{of}expected {shown[0]}, found {shown[1]}{note}"


def _sequence_difference(
    observed: list[Data] | tuple[Data, ...], expected: list[Data] | tuple[Data, ...], tol: float, path: str
) -> str | None:
    where = f"{path}: " if path else ""
    if len(observed) != len(expected):
        return f"{where}expected {describe(expected)}, found {describe(observed)}"
    for index, (o, e) in enumerate(zip(observed, expected, strict=True)):
        found = difference(o, e, tol=tol, path=f"{path}[{index}]")
        if found is not None:
            return found
    return None


def _dict_difference(
    observed: dict[str, Data], expected: dict[str, Data], tol: float, path: str
) -> str | None:
    where = f"{path}: " if path else ""
    missing = [key for key in expected if key not in observed]
    surplus = [key for key in observed if key not in expected]
    if missing or surplus:
        parts = [
            f"{label} {_keys(keys[:5])}"
            for label, keys in (("missing", missing), ("not expected", surplus))
            if keys
        ]
        return where + "; ".join(parts)
    for key, e in expected.items():
        found = difference(observed[key], e, tol=tol, path=f"{path}.{key}" if path else key)
        if found is not None:
            return found
    return None


def _keys(keys: list[str]) -> str:
    return printable(", ".join(keys))[:SHOWN_CHARS]


def _bytes_difference(observed: bytes, expected: bytes) -> str:
    if len(observed) != len(expected):
        return f"expected {len(expected):,} bytes, found {len(observed):,}"
    at = next(i for i, (o, e) in enumerate(zip(observed, expected, strict=True)) if o != e)
    return f"bytes differ, first at {at}: expected 0x{expected[at]:02x}, found 0x{observed[at]:02x}"
