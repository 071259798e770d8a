"""A cache of keys and values in few bits: scales for channels of keys and tokens of values, recent ones whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcourse.counting import TensorWork
from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake, raised


@exercise(
    points=3,
    minutes=25,
    extension=True,
    hints=(
        "Put the new tokens behind the recent ones, then ask how many of these are to leave: of values all that are "
        "beyond the window, of keys as many whole groups of those as there are. Quantize only what leaves, and put its "
        "codes behind the codes that are there.",
        "A scale is missing one axis of what it scales: a group of keys loses its tokens, a value its channels. And a "
        "slice is a view: what you keep of a slice keeps all that was sliced.",
    ),
)
def quantize_kv_cache(
    cache: dict[str, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    *,
    bits: int,
    group_size: int,
    window: int,
) -> dict[str, Tensor]:
    """Append tokens to a layer's cache, of which old keys and values are kept in `bits`
    bits; about 25 lines.

    cache: None at first, then what an earlier call returned; keys, values [H, T, D], T
    >= 1 new tokens of H heads, as attention will use them, each in a float dtype of at
    most 32 bits, the same in all calls, of any strides and magnitude (subnormals and
    groups that span more than float32 holds aside). Arguments are not changed: two
    continuations can share one cache; nor is the cache when keys or values are written
    over later. Keys and values may require grad, what is returned does not. Returns,
    for all n tokens so far, in order, what was appended in one call or in many:

        key_codes    uint8 [H, a, D]               value_codes    uint8 [H, b, D]
        key_scales   float32 [H, a/group_size, D]  value_scales   float32 [H, b]
        key_minima   float32 [H, a/group_size, D]  value_minima   float32 [H, b]
        recent_keys  [H, n - a, D]                 recent_values  [H, n - b, D]

    The recent ones are as they came, dtype included, at least the last `window` tokens.
    Of m = max(0, n - window) older tokens, b = m values are quantized, each with one
    scale over its D channels; and the a keys of the first m // group_size groups of
    group_size tokens each, with one scale a group and channel. Codes never change
    again: a scale is that of its own group.

    In float32, minimum is the group's least value, scale (greatest - least) / (2^bits -
    1), or 1 where that is 0, and codes (x - minimum) / scale, rounded to nearest, ties
    to even (torch.round): x is about code * scale + minimum.

    ValueError when bits is not within 2..8, group_size below 1 or window below 0; when
    keys or values are empty, hold NaN or Inf, or differ in shape from one another, or
    in H or D from what is cached.

    For a sixth of the points each: the storages of what is returned are no larger than
    the tensors; appending to a long cache makes no tensor larger than all of its key
    codes.

    Liu et al. 2024 (KIVI), section 3; there, keys leave by whole windows.
    """
    ### BEGIN SOLUTION
    if not 2 <= bits <= 8 or group_size < 1 or window < 0:
        raise ValueError(
            f"{bits} bits, group_size {group_size}, window {window}; expected 2..8, at least 1, at least 0"
        )
    heads, tokens, channels = keys.shape
    if values.shape != keys.shape or keys.numel() == 0:
        raise ValueError(
            f"keys {list(keys.shape)}, values {list(values.shape)}; expected the same, and not empty"
        )
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise ValueError("keys or values hold NaN or Inf; no scale covers them")

    keys, values = keys.detach(), values.detach()

    def quantized(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes like x, and scales and minima without the dimension dim, over which each is taken."""
        least, greatest = x.float().aminmax(dim=dim, keepdim=True)
        scales = (greatest - least) / (2**bits - 1)
        scales[scales == 0] = 1
        codes = ((x - least) / scales).round().to(torch.uint8)
        return codes, scales.squeeze(dim), least.squeeze(dim)

    if cache is not None:
        if cache["recent_keys"].shape[::2] != (heads, channels):
            raise ValueError(f"keys {list(keys.shape)}; the cache has {list(cache['recent_keys'].shape)}")
        keys = torch.cat([cache["recent_keys"], keys], dim=1)
        values = torch.cat([cache["recent_values"], values], dim=1)
    groups = max(0, keys.shape[1] - window) // group_size
    old_keys, old_values = groups * group_size, max(0, values.shape[1] - window)
    grouped = keys[:, :old_keys].reshape(heads, groups, group_size, channels)
    codes, key_scales, key_minima = quantized(grouped, 2)
    value_codes, value_scales, value_minima = quantized(values[:, :old_values], 2)
    new = {
        "key_codes": codes.reshape(heads, old_keys, channels),
        "key_scales": key_scales,
        "key_minima": key_minima,
        "value_codes": value_codes,
        "value_scales": value_scales,
        "value_minima": value_minima,
    }
    if cache is not None:
        new = {name: torch.cat([cache[name], part], dim=1) for name, part in new.items()}
    return {**new, "recent_keys": keys[:, old_keys:].clone(), "recent_values": values[:, old_values:].clone()}
    ### END SOLUTION


for _tokens in ("keys", "values"):
    excuse(
        quantize_kv_cache,
        f"max(0, {_tokens}.shape[1] - window) -> max({_tokens}.shape[1] - window, 0)",
        "the larger of two numbers, in either order",
    )


# ---------------------------------------------------------------------------------------------------------- cases

SIZES = ((2, 12), (3, 10), (2, 16), (4, 8))


def keys_and_values(rng, tokens, *, heads=None, channels=None, dtype=torch.float32):
    """Keys [H, T, D] with two loud channels off zero, values [H, T, D] of loud and quiet tokens."""
    if heads is None:
        heads, channels = rng.choice(SIZES)
    keys = rng.normal(heads, tokens, channels) * rng.uniform(0.3, 3, heads, 1, channels)
    for channel in rng.shuffled(range(channels))[:2]:
        keys[:, :, channel] = keys[:, :, channel] * 5 + rng.choice([20, -20])
    values = rng.normal(heads, tokens, channels) * rng.uniform(0.1, 4, heads, tokens, 1) + 0.3
    return keys.to(dtype), values.to(dtype)


def appended(answer, keys, values, sizes, **options):
    """The cache after the tokens were appended in runs of the given sizes."""
    cache = None
    for part_of_keys, part_of_values in zip(
        keys.split(sizes, dim=1), values.split(sizes, dim=1), strict=True
    ):
        cache = answer(cache, part_of_keys, part_of_values, **options)
    return cache


def runs(rng, tokens, longest):
    """Sizes of 1 to `longest` that add up to tokens."""
    found: list[int] = []
    while sum(found) < tokens:
        found.append(min(rng.integer(1, longest), tokens - sum(found)))
    return found


@case(quantize_kv_cache)
def a_long_prompt(answer, rng):
    """A prompt of several groups and some tokens more, at once, in 2, 6 and 7 bits."""
    prompt = keys_and_values(rng, 4 * 8 + 5 + rng.integer(1, 6))
    return {str(bits): answer(None, *prompt, bits=bits, group_size=8, window=5) for bits in (2, 6, 7)}


@case(quantize_kv_cache)
def token_by_token(answer, rng):
    """A prompt and then two dozen tokens, one by one."""
    options = {"bits": rng.choice([2, 3, 4]), "group_size": rng.integer(5, 7), "window": rng.integer(3, 8)}
    prompt = rng.integer(12, 16)
    keys, values = keys_and_values(rng, prompt + 24)
    return {"cache": appended(answer, keys, values, [prompt, *[1] * 24], **options)}


@case(quantize_kv_cache)
def around_the_window(answer, rng):
    """The cache after every one of the tokens that come before and after the window and the first groups are full."""
    options = {"bits": 4, "group_size": rng.integer(2, 3), "window": rng.integer(2, 4)}
    tokens = options["window"] + 2 * options["group_size"] + 1
    cache, found = None, {}
    for n, token in enumerate(
        zip(*(part.split(1, dim=1) for part in keys_and_values(rng, tokens)), strict=True)
    ):
        cache = answer(cache, *token, **options)
        found[f"after {n + 1}"] = cache
    return found


@case(quantize_kv_cache)
def in_runs(answer, rng):
    """Tokens in runs of 1 to 20, without a window in full precision; groups of one token; 8 bits."""
    keys, values = keys_and_values(rng, rng.integer(60, 70))
    sizes = runs(rng, keys.shape[1], 20)
    return {
        "no window": appended(answer, keys, values, sizes, bits=3, group_size=4, window=0),
        "groups of one": appended(
            answer, keys, values, sizes, bits=8, group_size=1, window=rng.integer(4, 9)
        ),
        "one head, one channel": appended(
            answer, keys[:1, :, :1], values[:1, :, :1], sizes, bits=5, group_size=12, window=30
        ),
    }


@case(quantize_kv_cache)
def two_continuations(answer, rng):
    """Two continuations of one prompt, and the prompt's cache after them."""
    options = {"bits": rng.integer(5, 7), "group_size": 4, "window": rng.integer(3, 6)}
    keys, values = keys_and_values(rng, rng.integer(18, 21))
    heads, _, channels = keys.shape
    prompt = answer(None, keys, values, **options)
    first, second = (keys_and_values(rng, 9, heads=heads, channels=channels) for _ in range(2))
    return {
        "first": answer(prompt, *first, **options),
        "second": answer(prompt, *second, **options),
        "prompt": prompt,
    }


@case(quantize_kv_cache)
def keys_and_values_change_afterwards(answer, rng):
    """A prompt that fits into the window, whose keys and values the caller then writes over; one head, and more."""
    options = {"bits": 4, "group_size": 4, "window": 8}
    found = {}
    for heads in (1, 3):
        prompt = keys_and_values(rng, rng.integer(2, 8), heads=heads, channels=8)
        found[f"{heads} heads"] = answer(None, *prompt, **options)
        for part in prompt:
            part.zero_()
    return found


@case(quantize_kv_cache)
def bfloat16_and_views(answer, rng):
    """Keys and values in bfloat16, float16, and one of each, which require grad; cut out of one projection."""
    options = {"bits": 4, "group_size": 4, "window": rng.integer(3, 6)}
    narrow_keys, narrow_values = keys_and_values(rng, 30, dtype=torch.bfloat16)
    both = torch.stack(keys_and_values(rng, rng.integer(20, 30)), dim=-1).transpose(0, 1).contiguous()
    keys, values = both.transpose(0, 1).unbind(dim=-1)
    half_keys, half_values = keys_and_values(rng, 30, dtype=torch.float16)
    sizes = runs(rng, 30, 12)
    mixed = appended(
        answer, half_keys.float().requires_grad_(), half_values.requires_grad_(), sizes, **options
    )
    return {
        "bfloat16": appended(answer, narrow_keys, narrow_values, runs(rng, 30, 12), **options),
        "float16": appended(answer, half_keys, half_values.detach(), sizes, **options),
        "float32 and float16": mixed,
        "require grad": [part.requires_grad for part in mixed.values()],
        "views": appended(answer, keys, values, runs(rng, keys.shape[1], 12), **options),
    }


@case(quantize_kv_cache)
def flat_and_halfway(answer, rng):
    """Channels and tokens of one value throughout, values in the middle between two codes; at three magnitudes."""
    heads, channels, bits = 2, 8, rng.integer(2, 4)
    keys = rng.integers(0, 2**bits - 2, heads, 16, channels) + 0.5
    keys[:, ::8], keys[:, 1::8] = 0.0, 2**bits - 1.0  # scale 1 in groups of 8
    keys = keys * 2.0 ** rng.integers(-3, 3, heads, 1, channels) + rng.integers(-8, 8, heads, 1, channels)
    keys[:, :, rng.integer(0, channels - 1)] = rng.choice([0.0, 3.0, -7.0])
    values = keys[:, :8].transpose(1, 2).repeat(1, 2, 1).contiguous()
    values[:, rng.integer(0, 7)] = rng.choice([0.0, 5.0, -0.5])
    # Keys in the upper half of float32's range: their sum and their squares are infinite, their spans are not.
    given = {"as they are": (keys, values), "quiet": (keys * 2.0**-118, values * 2.0**-118)}
    loud = 2.0 ** (126 - math.frexp(max(keys.abs().max().item(), values.abs().max().item()))[1])
    given["loud"] = keys.abs() * loud, values.abs() * loud
    return {name: answer(None, *parts, bits=bits, group_size=8, window=0) for name, parts in given.items()}


@case(quantize_kv_cache)
def refused_inputs(answer, rng):
    """bits, sizes, shapes, NaN, Inf and no tokens are refused; beside them, a cache that is right."""
    heads, channels = rng.choice(SIZES)
    keys, values = keys_and_values(rng, 14, heads=heads, channels=channels)
    options = {"bits": 4, "group_size": 4, "window": rng.integer(1, 3)}
    broken = {}
    for value in ([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]):
        for place in (0, keys.numel() // 2, keys.numel() - 2):
            bad = keys.clone()
            bad.view(-1)[place : place + len(value)] = torch.tensor(value)
            broken[f"keys {value} at {place}"] = (None, bad, values)
            broken[f"values {value} at {place}"] = (None, values, bad)
    for dtype in (torch.bfloat16, torch.float16):
        broken[f"keys in {dtype}"] = (None, bad.to(dtype), values.to(dtype))
        broken[f"values in {dtype}"] = (None, values.to(dtype), bad.to(dtype))
    cache = answer(None, keys, values, **options)
    given = {
        **broken,
        "keys broken": (cache, bad, values),
        "values broken": (cache, values, bad),
        "fewer values": (None, keys, values[:, 1:]),
        "narrower values": (None, keys, values[..., 1:]),
        "no token": (cache, keys[:, :0], values[:, :0]),
        "no head": (None, keys[:0], values[:0]),
        "no channel": (None, keys[..., :0], values[..., :0]),
        "one head": (None, keys[0], values[0]),
        "another number of heads": (cache, keys[:1], values[:1]),
        "another width": (cache, keys[..., 1:], values[..., 1:]),
    }
    settings = [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"window": -1}]
    return {
        "cache": cache,
        "the smallest settings": answer(None, keys, values, bits=2, group_size=1, window=0),
        "the most bits": answer(None, keys, values, bits=8, group_size=1, window=14 + rng.integer(0, 4)),
        **{name: raised(answer, *arguments, **options) for name, arguments in given.items()},
        "settings": [raised(answer, None, keys, values, **{**options, **each}) for each in settings],
    }


@cost(quantize_kv_cache, share=1 / 6)
def nothing_kept_beside(answer, rng):
    """A prompt cut out of a longer tensor, then some tokens one by one, of several heads and of one: the storages that
    the caches keep alive.
    """
    options = {"bits": 4, "group_size": 8, "window": 6}
    keys, values = keys_and_values(rng, 80)
    caches = [
        appended(answer, keys[:heads, :62], values[:heads, :62], [59, 1, 1, 1], **options)
        for heads in (len(keys), 1)
    ]
    parts = [part for cache in caches for part in cache.values()]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return {
        "observed": caches,
        "bytes of storage": (sum(storages.values()), sum(part.nbytes for part in parts)),
    }


@cost(quantize_kv_cache, share=1 / 6)
def old_codes_left_alone(answer, rng):
    """One token for a cache of 600, just when a group is complete: the largest tensor that is made."""
    options = {"bits": 2, "group_size": 8, "window": 8}
    heads, channels = rng.choice(SIZES)
    keys, values = keys_and_values(rng, 608, heads=heads, channels=channels)
    cache = appended(answer, keys[:, :607], values[:, :607], [604, 3], **options)
    with TensorWork() as work:
        cache = answer(cache, keys[:, 607:], values[:, 607:], **options)
    return {
        "observed": cache,
        "largest tensor made, bytes": (work.largest_tensor_bytes, 600 * heads * channels),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Cache:
    """A right answer in small steps; a mistake replaces one of them."""

    def refuse(
        self, cache: Any, keys: Tensor, values: Tensor, bits: int, group_size: int, window: int
    ) -> None:
        if bits < 2 or bits > 8 or group_size <= 0 or window < 0:
            raise ValueError("settings")
        if keys.dim() != 3 or keys.shape != values.shape or 0 in keys.shape:
            raise ValueError("shapes")
        if cache is not None and (keys.shape[0], keys.shape[2]) != (
            cache["key_codes"].shape[0],
            cache["key_codes"].shape[2],
        ):
            raise ValueError("another cache")
        self.refuse_values(keys, values)

    def refuse_values(self, keys: Tensor, values: Tensor) -> None:
        if not (torch.isfinite(keys).all() and torch.isfinite(values).all()):
            raise ValueError("NaN or Inf")

    def levels(self, bits: int) -> int:
        return 2**bits - 1

    def rounded(self, x: Tensor) -> Tensor:
        return x.round()

    def scale(self, span: Tensor, bits: int) -> Tensor:
        scale = span / self.levels(bits)
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def quantized(self, x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        x = x.float()
        least = x.amin(dim=dim, keepdim=True)
        scale = self.scale(x.amax(dim=dim, keepdim=True) - least, bits)
        codes = self.rounded((x - least) / scale).to(torch.uint8)
        return codes, scale.squeeze(dim), least.squeeze(dim)

    def taken(self, tokens: Tensor) -> Tensor:
        return tokens.detach()

    def leaving(self, recent: int, group_size: int, window: int) -> tuple[int, int]:
        """How many keys and how many values are to be quantized of `recent` ones."""
        old = max(recent - window, 0)
        return old - old % group_size, old

    def grouped_keys(self, keys: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        heads, tokens, channels = keys.shape
        groups = keys.reshape(heads, tokens // group_size, group_size, channels)
        codes, scales, least = self.quantized(groups, 2, bits)
        return codes.reshape(heads, tokens, channels), scales, least

    def single_values(self, values: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.quantized(values, 2, bits)

    def kept(self, recent: Tensor, leaving: int) -> Tensor:
        return recent[:, leaving:].clone()

    def joined(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old, new], dim=1)

    def append(
        self,
        cache: Any,
        keys: Tensor,
        values: Tensor,
        *,
        bits: int,
        group_size: int,
        window: int,
    ) -> dict[str, Tensor]:
        self.refuse(cache, keys, values, bits, group_size, window)
        keys, values = self.taken(keys), self.taken(values)
        if cache is not None:
            keys = torch.cat([cache["recent_keys"], keys], dim=1)
            values = torch.cat([cache["recent_values"], values], dim=1)
        old_keys, old_values = self.leaving(keys.shape[1], group_size, window)
        if cache is not None and cache["recent_keys"].shape != cache["recent_values"].shape:
            old_values = self.leaving(values.shape[1], group_size, window)[1]
        parts = (
            *self.grouped_keys(keys[:, :old_keys], group_size, bits),
            *self.single_values(values[:, :old_values], bits),
        )
        found = dict(zip(NAMES, parts, strict=True))
        if cache is not None:
            found = {name: self.joined(cache[name], part) for name, part in found.items()}
        found["recent_keys"], found["recent_values"] = (
            self.kept(keys, old_keys),
            self.kept(values, old_values),
        )
        return found


NAMES = ("key_codes", "key_scales", "key_minima", "value_codes", "value_scales", "value_minima")


def variant(**steps: Any) -> Callable[..., dict[str, Tensor]]:
    """An answer with some steps replaced."""
    return type("Variant", (Cache,), steps)().append


def dequantized(cache: dict[str, Tensor], group_size: int) -> tuple[Tensor, Tensor]:
    """What the codes of keys and of values stand for, float32."""
    scales, minima = (
        cache[name].repeat_interleave(group_size, dim=1) for name in ("key_scales", "key_minima")
    )
    keys = cache["key_codes"] * scales + minima
    return keys, cache["value_codes"] * cache["value_scales"][..., None] + cache["value_minima"][..., None]


def from_everything(cache, keys, values, *, bits, group_size, window, again):
    """Turns the codes back into keys and values and lets `again` quantize all of them, or stops where none are."""
    Cache().refuse(cache, keys, values, bits, group_size, window)
    if cache is not None:
        old_keys, old_values = dequantized(cache, group_size)
        keys = torch.cat([old_keys.to(keys.dtype), cache["recent_keys"], keys], dim=1)
        values = torch.cat([old_values.to(values.dtype), cache["recent_values"], values], dim=1)
    return again(None, keys, values, bits=bits, group_size=group_size, window=window)


@mistake(
    quantize_kv_cache,
    "Turns all codes back into numbers and quantizes everything again at every step. Work grows with the cache, and "
    "each rounding adds to the last wherever the result is not hit exactly again.",
)
def everything_again(cache, keys, values, **options):
    return from_everything(cache, keys, values, **options, again=variant())


@mistake(
    quantize_kv_cache,
    "One scale for each channel over the whole cache: with each token it may change, and then old codes mean something "
    "else or must be rounded once more.",
)
def one_scale_for_the_cache(cache, keys, values, **options):
    def grouped_keys(self, keys, group_size, bits):
        codes, scales, least = (
            self.quantized(keys, 1, bits)
            if keys.shape[1]
            else Cache.grouped_keys(self, keys, group_size, bits)
        )
        if not keys.shape[1]:
            return codes, scales, least
        groups = keys.shape[1] // group_size
        return codes, *(part[:, None].expand(-1, groups, -1).contiguous() for part in (scales, least))

    return from_everything(cache, keys, values, **options, again=variant(grouped_keys=grouped_keys))


@mistake(
    quantize_kv_cache,
    "Cuts the groups from the newest key backwards: all groups move with each token, and old keys are rounded again.",
)
def groups_from_the_end(cache, keys, values, *, bits, group_size, window):
    Cache().refuse(cache, keys, values, bits, group_size, window)

    def again(_, keys, values, **options):
        found = variant()(None, keys, values, **options)
        old = max(0, keys.shape[1] - window)
        first = old % group_size
        moved = variant()(None, keys[:, first:], values[:, first:], **options)
        for name in ("key_codes", "key_scales", "key_minima"):
            found[name] = moved[name]
        found["recent_keys"] = torch.cat([keys[:, :first], moved["recent_keys"]], dim=1)
        return found

    return from_everything(cache, keys, values, bits=bits, group_size=group_size, window=window, again=again)


@mistake(
    quantize_kv_cache,
    "Quantizes keys per token, as values: the few loud channels set the scale of every token, and all other channels "
    "of keys round to one or two codes.",
)
def keys_per_token(*arguments, **options):
    return variant(grouped_keys=lambda self, keys, group_size, bits: self.quantized(keys, 2, bits))(
        *arguments, **options
    )


@mistake(
    quantize_kv_cache,
    "Gives a group of keys one scale for all its channels: the loud ones take the codes from the others.",
)
def one_scale_for_a_group(*arguments, **options):
    def grouped_keys(self, keys, group_size, bits):
        heads, tokens, channels = keys.shape
        groups = keys.reshape(heads, tokens // group_size, group_size * channels)
        codes, scales, least = self.quantized(groups, 2, bits)
        wide = [part[..., None].expand(-1, -1, channels).contiguous() for part in (scales, least)]
        return codes.reshape(heads, tokens, channels), *wide

    return variant(grouped_keys=grouped_keys)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Gives the heads one scale in common, as if keys were [T, D].",
)
def one_scale_for_all_heads(*arguments, **options):
    def grouped_keys(self, keys, group_size, bits):
        heads, tokens, channels = keys.shape
        groups = keys.reshape(heads, tokens // group_size, group_size, channels).float()
        least = groups.amin(dim=(0, 2), keepdim=True)
        scale = self.scale(groups.amax(dim=(0, 2), keepdim=True) - least, bits)
        codes = self.rounded((groups - least) / scale).to(torch.uint8)
        wide = [part.expand(heads, -1, 1, -1)[:, :, 0].contiguous() for part in (scale, least)]
        return codes.reshape(heads, tokens, channels), *wide

    return variant(grouped_keys=grouped_keys)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Reshapes a group's channels where its tokens are: group_size and D change places, and scales mix channels.",
)
def groups_across_channels(*arguments, **options):
    def grouped_keys(self, keys, group_size, bits):
        heads, tokens, channels = keys.shape
        groups = keys.reshape(heads, tokens // group_size, channels, group_size)
        codes, scales, least = self.quantized(groups, 3, bits)
        return codes.reshape(heads, tokens, channels), scales, least

    return variant(grouped_keys=grouped_keys)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Makes a group of every group_size-th key, not of keys that follow one another.",
)
def interleaved_groups(*arguments, **options):
    def grouped_keys(self, keys, group_size, bits):
        heads, tokens, channels = keys.shape
        groups = keys.reshape(heads, group_size, tokens // group_size, channels)
        codes, scales, least = self.quantized(groups, 1, bits)
        return codes.reshape(heads, tokens, channels), scales, least

    return variant(grouped_keys=grouped_keys)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Lets values wait until a group of them is complete, as keys must: a value has a scale of its own at once.",
)
def values_in_groups(*arguments, **options):
    def leaving(self, recent, group_size, window):
        old = max(recent - window, 0) // group_size * group_size
        return old, old

    return variant(leaving=leaving)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Drops the keys between the last whole group and the window: attention never sees them again.",
)
def remainder_lost(*arguments, window, **options):
    def append(self, cache, keys, values, *, bits, group_size, window):
        found = Cache.append(self, cache, keys, values, bits=bits, group_size=group_size, window=window)
        found["recent_keys"] = found["recent_keys"][
            :, max(0, found["recent_keys"].shape[1] - window) :
        ].clone()
        return found

    return variant(append=append)(*arguments, window=window, **options)


@mistake(
    quantize_kv_cache,
    "Quantizes everything as soon as the window is full, and so leaves no recent token in full precision.",
)
def window_emptied(*arguments, **options):
    def leaving(self, recent, group_size, window):
        old = recent if recent > window else 0
        return old - old % group_size, old

    return variant(leaving=leaving)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Keeps window - 1 tokens in full precision.",
)
def window_one_short(*arguments, **options):
    def leaving(self, recent, group_size, window):
        return Cache.leaving(self, recent, group_size, max(window - 1, 0))

    return variant(leaving=leaving)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Keeps window + 1 tokens in full precision.",
)
def window_one_long(*arguments, **options):
    def leaving(self, recent, group_size, window):
        return Cache.leaving(self, recent, group_size, window + 1)

    return variant(leaving=leaving)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Quantizes the newest tokens and keeps the oldest whole: those that attention looks at most are the recent ones.",
)
def newest_quantized(*arguments, **options):
    def grouped_keys(self, keys, group_size, bits):
        return Cache.grouped_keys(self, keys, group_size, bits)

    def append(self, cache, keys, values, *, bits, group_size, window):
        self.refuse(cache, keys, values, bits, group_size, window)
        if cache is not None:
            keys = torch.cat([cache["recent_keys"], keys], dim=1)
            values = torch.cat([cache["recent_values"], values], dim=1)
        old_keys = self.leaving(keys.shape[1], group_size, window)[0]
        old_values = self.leaving(values.shape[1], group_size, window)[1]
        keep_keys, keep_values = keys.shape[1] - old_keys, values.shape[1] - old_values
        parts = (
            *self.grouped_keys(keys[:, keep_keys:], group_size, bits),
            *self.single_values(values[:, keep_values:], bits),
        )
        found = dict(zip(NAMES, parts, strict=True))
        if cache is not None:
            found = {name: self.joined(cache[name], part) for name, part in found.items()}
        recent = {
            "recent_keys": keys[:, :keep_keys].clone(),
            "recent_values": values[:, :keep_values].clone(),
        }
        return {**found, **recent}

    return variant(append=append)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Quantizes one group and one value in a call: after a long prompt almost all of it stays in full precision.",
)
def one_group_in_a_call(*arguments, **options):
    def leaving(self, recent, group_size, window):
        old = max(recent - window, 0)
        return (group_size if old >= group_size else 0), min(old, 1)

    return variant(leaving=leaving)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Puts new codes in front of the old ones: the order of the tokens is lost.",
)
def new_codes_in_front(*arguments, **options):
    return variant(joined=lambda self, old, new: torch.cat([new, old], dim=1))(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Forgets the cache: every call quantizes the new tokens alone.",
)
def cache_forgotten(cache, keys, values, **options):
    return variant()(None, keys, values, **options)


@mistake(
    quantize_kv_cache,
    "Writes into the cache it was given: a second continuation of the same prompt finds the first one's tokens.",
)
def written_into(cache, keys, values, **options):
    found = variant()(cache, keys, values, **options)
    if cache is None:
        return found
    cache.update(found)
    return cache


@mistake(
    quantize_kv_cache,
    "Has 2^bits steps between minimum and maximum: the largest value gets a code that needs one bit more.",
)
def one_step_too_many(*arguments, **options):
    return variant(levels=lambda self, bits: 2**bits)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Always has the 15 steps of 4 bits.",
)
def always_four_bits(*arguments, **options):
    return variant(levels=lambda self, bits: 15)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Extends the range to contain 0, as for weights: channels of keys lie far off zero, and most codes go unused. "
    "Nothing here needs an exact zero.",
)
def range_contains_zero(*arguments, **options):
    def quantized(self, x, dim, bits):
        x = x.float()
        least = x.amin(dim=dim, keepdim=True).clamp_max(0)
        scale = self.scale(x.amax(dim=dim, keepdim=True).clamp_min(0) - least, bits)
        codes = self.rounded((x - least) / scale).to(torch.uint8)
        return codes, scale.squeeze(dim), least.squeeze(dim)

    return variant(quantized=quantized)(*arguments, **options)


@mistake(
    quantize_kv_cache, "Takes the floor: every key and value comes out too small, by half a step on average."
)
def floored(*arguments, **options):
    return variant(rounded=lambda self, x: x.floor())(*arguments, **options)


@mistake(quantize_kv_cache, "Adds a half and takes the floor: ties go up, not to even.")
def ties_rounded_up(*arguments, **options):
    return variant(rounded=lambda self, x: (x + 0.5).floor())(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Divides by a scale of 0 where all values of a group are equal.",
)
def flat_groups_divided_by_zero(*arguments, **options):
    return variant(scale=lambda self, span, bits: span / self.levels(bits))(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Computes minimum, scale and codes in the dtype of the keys: bfloat16 has 8 bits for all of it.",
)
def in_bfloat16(*arguments, **options):
    def quantized(self, x, dim, bits):
        least = x.amin(dim=dim, keepdim=True)
        scale = self.scale(x.amax(dim=dim, keepdim=True) - least, bits)
        codes = self.rounded((x - least) / scale).to(torch.uint8)
        return codes, scale.squeeze(dim).float(), least.squeeze(dim).float()

    return variant(quantized=quantized)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Keeps the recent tokens in float32 whatever they came in: twice the bytes of bfloat16.",
)
def recent_in_float32(cache, keys, values, **options):
    return variant()(cache, keys.float(), values.float(), **options)


@mistake(
    quantize_kv_cache,
    "Keeps a slice of all that was there as the recent tokens: it is a view, and keeps the whole prompt in memory "
    "beside its codes.",
)
def recent_is_a_view(*arguments, **options):
    return variant(kept=lambda self, recent, leaving: recent[:, leaving:])(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Calls contiguous() to copy the recent tokens: a slice of a single head is contiguous already, and stays a view.",
)
def recent_is_contiguous(*arguments, **options):
    return variant(kept=lambda self, recent, leaving: recent[:, leaving:].contiguous())(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Keeps the caller's own tensors while nothing leaves the window: who writes over them writes over the cache.",
)
def prompt_not_copied(*arguments, **options):
    def kept(self, recent, leaving):
        return recent[:, leaving:].clone() if leaving else recent

    return variant(kept=kept)(*arguments, **options)


@mistake(quantize_kv_cache, "Looks for NaN and Inf in float32 only.")
def narrow_values_let_through(*arguments, **options):
    def refuse_values(self, keys, values):
        if keys.dtype == torch.float32:
            Cache.refuse_values(self, keys, values)

    return variant(refuse_values=refuse_values)(*arguments, **options)


@mistake(
    quantize_kv_cache, "Lets NaN and Inf through: one such key spoils the scale of its whole group, for good."
)
def broken_values_let_through(*arguments, **options):
    return variant(refuse_values=lambda self, keys, values: None)(*arguments, **options)


@mistake(quantize_kv_cache, "Finds NaN and Inf by a sum of squares, which loud keys make infinite too.")
def finite_by_squares(*arguments, **options):
    def refuse_values(self, keys, values):
        if not all(part.float().square().sum().isfinite() for part in (keys, values)):
            raise ValueError("NaN or Inf")

    return variant(refuse_values=refuse_values)(*arguments, **options)


@mistake(quantize_kv_cache, "Holds scales above 1e-8: quiet groups get one code for all their values.")
def scale_held_above_a_floor(*arguments, **options):
    def scale(self, span, bits):
        return torch.where(span == 0, 1.0, (span / self.levels(bits)).clamp_min(1e-8))

    return variant(scale=scale)(*arguments, **options)


@mistake(
    quantize_kv_cache,
    "Caches tokens with their graph: every step of training or of a prompt stays in memory.",
)
def graph_kept(*arguments, **options):
    return variant(taken=lambda self, tokens: tokens)(*arguments, **options)


@mistake(quantize_kv_cache, "Takes any number of bits: from 9 on, codes wrap in a byte.")
def any_bits(*arguments, **options):
    def refuse(self, cache, keys, values, bits, group_size, window):
        Cache.refuse(self, cache, keys, values, 4, group_size, window)

    return variant(refuse=refuse)(*arguments, **options)


@alternative(quantize_kv_cache, "Appends the tokens of a run one at a time, as a decoder does")
def one_at_a_time(cache, keys, values, **options):
    Cache().refuse(cache, keys, values, options["bits"], options["group_size"], options["window"])
    for token in range(keys.shape[1]):
        cache = variant()(cache, keys[:, token : token + 1], values[:, token : token + 1], **options)
    return cache


@alternative(
    quantize_kv_cache, "Goes through groups and tokens in loops, and allocates what it returns beforehand"
)
def looped(cache, keys, values, *, bits, group_size, window):
    layer = Cache()
    layer.refuse(cache, keys, values, bits, group_size, window)
    heads, _, channels = keys.shape
    keys, values = keys.detach(), values.detach()
    if cache is None:
        none = torch.empty(heads, 0, channels)
        cache = dict(
            zip(NAMES, (none.byte(), none, none, none.byte(), none[..., 0], none[..., 0]), strict=True)
        )
        cache |= {"recent_keys": none.to(keys.dtype), "recent_values": none.to(values.dtype)}
    keys = torch.cat((cache["recent_keys"], keys), 1)
    values = torch.cat((cache["recent_values"], values), 1)
    found = {name: [cache[name]] for name in NAMES}
    while keys.shape[1] >= window + group_size:
        for name, part in zip(NAMES[:3], layer.quantized(keys[:, :group_size], 1, bits), strict=True):
            found[name].append(part if name == "key_codes" else part[:, None])
        keys = keys[:, group_size:]
    while values.shape[1] > window:
        for name, part in zip(NAMES[3:], layer.quantized(values[:, 0], 1, bits), strict=True):
            found[name].append(part[:, None])
        values = values[:, 1:]
    whole = {name: torch.cat(parts, 1) for name, parts in found.items()}
    return {**whole, "recent_keys": keys.contiguous().clone(), "recent_values": values.contiguous().clone()}
