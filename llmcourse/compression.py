"""What quantization does to a trained model: weights or activations replaced by what their codes stand for.

Nothing here is faster or smaller in memory: the products stay float32 and show the *quality* that a stored form
would have, next to the bits that it would take, scales counted. `kernels` shows the speed.

The methods are exercises of lesson 03. Each function takes the one it needs as an argument, so a learner passes
their own; None stands for the course's reference, looked up when it is called.

Shapes: T tokens, K inputs, N outputs; a weight is [N, K], the inputs of a layer [T, K]. Only the decoder layers'
linear weights are quantized: norms, embedding and head keep 16 bits a value.

Not handled: mixtures of experts.
"""

from __future__ import annotations

import copy
import functools
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse import zoo
from llmcourse.figures import inert, joined_table
from llmcourse.model import Decoder
from llmcourse.training import fixed_windows

Windows = tuple[Tensor, Tensor]  # inputs and targets, each [count, tokens]

BITS = (8, 6, 5, 4, 3, 2)
SCALE_DTYPE = torch.float16  # what scales are stored in, and rounded to before they are used
KEPT_BITS = 16  # a value of what is not quantized, as the zoo's files hold it
CONTEXT_TOKENS = 256
SITES_PER_LAYER = 4


def reference(name: str) -> Callable[..., Any]:
    """The course's own answer to an exercise, found when it is asked for. KeyError where there is none."""
    from llmcourse.exercise import find

    return find(name).reference


# --------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Site:
    """Linear layers that are fed the same tensor, and so share its statistics and any scale of its channels.

    norm    the RMSNorm that feeds them and nothing else; None for o_proj and down_proj
    folds   whether a scale of each input channel can be absorbed by what produces them, and costs nothing
    """

    name: str
    linears: tuple[str, ...]
    norm: str | None
    folds: bool


def sites(model: Decoder) -> list[Site]:
    """The places of a decoder where weights are quantized, four a layer, first layer first."""
    config = model.config
    # Query heads that share a key-value head read the same values, so o_proj's scales cannot move into v_proj.
    each_head_has_values = config.num_attention_heads == config.num_key_value_heads
    found = []
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        qkv = tuple(f"{attention}.{part}_proj" for part in "qkv")
        found += [
            Site(f"{attention}.qkv", qkv, f"{layer}.input_layernorm", True),
            Site(f"{attention}.o", (f"{attention}.o_proj",), None, each_head_has_values),
            Site(
                f"{mlp}.gate_up",
                (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                f"{layer}.post_attention_layernorm",
                True,
            ),
            Site(f"{mlp}.down", (f"{mlp}.down_proj",), None, True),  # into the rows of up_proj
        ]
    return found


def held_out_slice(*, count: int | None = None) -> Windows:
    """Windows of held-out text that every figure here is stated for: inputs and targets, each [count, 256].

    16 of them; while a notebook is graded (`figures.inert()`), when nobody reads the figures, 2.
    """
    return _windows("held_out", count or (2 if inert() else 16))


def calibration_tokens(*, count: int | None = None) -> Tensor:
    """Windows of training text that methods may look at: [count, 256]. Never the text that is reported on.

    8 of them; while a notebook is graded 1.
    """
    return _windows("train", count or (1 if inert() else 8))[0]


@functools.cache
def _windows(split: str, count: int) -> Windows:
    return fixed_windows(zoo.tokens(split), count=count, context_tokens=CONTEXT_TOKENS)


@torch.inference_mode()
def window_losses(model: Decoder, windows: Windows, *, batch_size: int = 4) -> Tensor:
    """Mean loss of each window in nats a token, float64 [windows]."""
    device = model.model.embed_tokens.weight.device
    losses = []
    for inputs, targets in zip(windows[0].split(batch_size), windows[1].split(batch_size), strict=True):
        logits = model(inputs.to(device)).float()  # [B, T, V]
        each = F.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none")  # [B, T]
        losses.append(each.double().mean(dim=1).cpu())
    return torch.cat(losses)


def perplexity(model: Decoder, windows: Windows | None = None) -> float:
    """exp of the mean loss on `windows`, the held-out slice unless given."""
    return math.exp(window_losses(model, held_out_slice() if windows is None else windows).mean().item())


@torch.no_grad()
def calibration_inputs(model: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    """What feeds each site while the model reads tokens [B, T]: {site name: inputs [B * T, K]}.

    Raises ValueError for an empty calibration set.
    """
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"calibration needs tokens [batch, tokens], at least one; got {list(tokens.shape)}")
    with _listening(model, sites(model)) as heard:
        model(tokens.to(model.model.embed_tokens.weight.device))
    return heard


@dataclass(frozen=True)
class Calibration:
    """What methods may look at: training text, and what it feeds the sites of the model as it is."""

    tokens: Tensor
    inputs: Mapping[str, Tensor]


def calibrate(model: Decoder, tokens: Tensor | None = None) -> Calibration:
    """The calibration of a model on tokens [B, T], `calibration_tokens()` unless given."""
    tokens = calibration_tokens() if tokens is None else tokens
    return Calibration(tokens, calibration_inputs(model, tokens))


@contextmanager
def _listening(model: nn.Module, heard_sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """Keeps what the sites are fed inside, the last time each; {site name: inputs [tokens, K]}."""
    heard: dict[str, Tensor] = {}

    def keep(site: str, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        heard[site] = arguments[0].detach().flatten(0, -2)

    hooks = [
        model.get_submodule(site.linears[0]).register_forward_pre_hook(functools.partial(keep, site.name))
        for site in heard_sites
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _inputs_behind_quantized(model: Decoder, tokens: Tensor) -> Iterator[tuple[Site, Tensor]]:
    """Each site with its inputs, computed when it is asked for: what was changed before has its effect by then."""
    backbone = model.model
    hidden = backbone.embed_tokens(tokens.to(backbone.embed_tokens.weight.device))  # [B, T, C]
    positions = torch.arange(tokens.shape[1], device=hidden.device)
    cosines, sines = backbone.rotary_emb(positions, hidden.dtype)
    places = iter(sites(model))
    for layer in backbone.layers:
        for _ in range(SITES_PER_LAYER):
            site = next(places)
            with _listening(model, [site]) as heard:
                layer(hidden, cosines, sines, None)
            yield site, heard[site.name]
        hidden = layer(hidden, cosines, sines, None)


def _weights(model: Decoder, site: Site) -> list[Tensor]:
    return [_parameter(model, f"{name}.weight").data for name in site.linears]


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    parameter = model.get_parameter(name)
    assert isinstance(parameter, nn.Parameter)
    return parameter


# ----------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Quantized:
    """What a method makes of one weight.

    weight              what the stored form stands for, float32 [N, K]
    stored_bits         codes, packed without gaps, and scales
    input_scale_bits    of a scale for each input channel, which count where nothing can absorb them
    """

    weight: Tensor
    stored_bits: int
    input_scale_bits: int = 0


@dataclass(frozen=True)
class Method:
    """A way to quantize a weight: `quantize(weight [N, K], inputs [T, K], bits)`, for some numbers of bits.

    sequential   its inputs come from the model with all earlier sites quantized, not from the model as it was
    """

    name: str
    quantize: Callable[[Tensor, Tensor, int], Quantized]
    bits: tuple[int, ...] = BITS
    sequential: bool = False


def round_to_nearest(
    quantize_groups: Callable[..., Any] | None = None, *, group_size: int | None = None
) -> Method:
    """Each weight to the nearest code; a scale for each row, or for each group of `group_size` inputs."""
    own = quantize_groups or reference("quantize_groups")

    def quantize(weight: Tensor, inputs: Tensor, bits: int) -> Quantized:
        codes, scales = own(weight, bits=bits, group_size=_size(weight, group_size))
        return _from_groups(weight, codes, scales, bits, _size(weight, group_size))

    return Method(f"round to nearest, {_grouping(group_size)}", quantize)


def awq(
    awq_scales: Callable[..., Any] | None = None,
    *,
    group_size: int | None = 64,
    steps: int = 20,
    most_tokens: int = 512,
) -> Method:
    """Input channels that carry much are scaled up before rounding. Lin et al. 2023, sec. 3.

    It sees `most_tokens` of the calibration inputs at most, evenly spaced: each of its steps costs a product.
    """
    own = awq_scales or reference("awq_scales")

    def quantize(weight: Tensor, inputs: Tensor, bits: int) -> Quantized:
        size = _size(weight, group_size)
        seen = inputs[:: math.ceil(len(inputs) / most_tokens)]
        channel_scales, codes, scales = own(weight, seen, bits=bits, group_size=size, steps=steps)
        scaled = _from_groups(weight, codes, scales, bits, size)
        kept_scales = stored_scales(channel_scales)
        return Quantized(
            scaled.weight / kept_scales,
            scaled.stored_bits,
            channel_scales.numel() * SCALE_DTYPE.itemsize * 8,
        )

    return Method(f"AWQ, {_grouping(group_size)}", quantize)


def gptq(
    gptq_quantize: Callable[..., Any] | None = None,
    *,
    group_size: int | None = 64,
    act_order: bool = False,
    damping: float = 0.01,
    sequential: bool = True,
) -> Method:
    """Column by column, what rounding loses made up for in the columns still open. Frantar et al. 2022, alg. 1.

    With `act_order` the exercise's codes are in the original column order, and so are its groups. As published
    (sec. 4, "Setup") calibration runs through what is already quantized, there block by block, here site by site;
    `sequential` False takes all inputs from the model as it was.
    """
    own = gptq_quantize or reference("gptq_quantize")

    def quantize(weight: Tensor, inputs: Tensor, bits: int) -> Quantized:
        size = _size(weight, group_size)
        codes, scales = own(weight, inputs, bits=bits, group_size=size, damping=damping, act_order=act_order)
        return _from_groups(weight, codes, scales, bits, size)

    ordered = ", act order" if act_order else ""
    at_once = "" if sequential else ", calibrated at once"
    return Method(f"GPTQ, {_grouping(group_size)}{ordered}{at_once}", quantize, sequential=sequential)


# E2M1 by code: the sign in bit 3. OCP Microscaling Formats (MX) v1.0, table 5.
_FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4_VALUES = torch.cat((_FP4_VALUES, -_FP4_VALUES))
FP4_BLOCKS = {"mxfp4": 32, "nvfp4": 16}  # values that share a scale byte


def mxfp4(block_scaled_fp4: Callable[..., Any] | None = None) -> Method:
    """Blocks of 32 values of E2M1 with a power of two each, 4.25 bits. OCP Microscaling Formats (MX) v1.0."""
    return _fp4("mxfp4", block_scaled_fp4)


def nvfp4(block_scaled_fp4: Callable[..., Any] | None = None) -> Method:
    """Blocks of 16 values of E2M1 with an E4M3 scale each, 4.5 bits, and one float32 a weight."""
    return _fp4("nvfp4", block_scaled_fp4)


def _fp4(form: str, block_scaled_fp4: Callable[..., Any] | None) -> Method:
    own = block_scaled_fp4 or reference("block_scaled_fp4")

    def quantize(weight: Tensor, inputs: Tensor, bits: int) -> Quantized:
        packed, scales, tensor_scale = own(weight, form=form)
        stored_bits = 8 * (packed.numel() + scales.numel()) + (32 if tensor_scale is not None else 0)
        return Quantized(fp4_values(packed, scales, tensor_scale, form=form), stored_bits)

    return Method(form.upper(), quantize, bits=(4,))


def fp4_values(packed: Tensor, scales: Tensor, tensor_scale: Tensor | None, *, form: str) -> Tensor:
    """packed uint8 [N, K / 2], the even value in the low nibble; scales uint8 [N, K / block] -> float32 [N, K].

    "mxfp4": a scale byte is an exponent biased by 127. "nvfp4": the bits of an E4M3 number, times `tensor_scale`.
    """
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)  # [N, K]
    if form == "mxfp4":
        # In two factors: ldexp computes the power itself first, and 2^-127 would be flushed to 0 on the way.
        exponents = scales.int() - 127
        half, ones = exponents // 2, torch.ones(scales.shape)
        each = torch.ldexp(torch.ldexp(ones, half), exponents - half)
    else:
        assert tensor_scale is not None
        each = scales.view(torch.float8_e4m3fn).float() * tensor_scale
    return FP4_VALUES[codes.long()] * each.repeat_interleave(FP4_BLOCKS[form], dim=-1)


def default_methods(own: Mapping[str, Callable[..., Any]] | None = None) -> list[Method]:
    """The methods of the lesson's table; `own` maps an exercise's name to an answer that is used in its place."""
    given = dict(own or {})
    known = {"quantize_groups", "awq_scales", "gptq_quantize", "block_scaled_fp4"}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"no method uses {', '.join(unknown)}; those of {', '.join(sorted(known))} are used")
    groups, column_wise = given.get("quantize_groups"), given.get("gptq_quantize")
    return [
        round_to_nearest(groups),
        *(round_to_nearest(groups, group_size=size) for size in (128, 64, 32)),
        awq(given.get("awq_scales"), group_size=64),
        gptq(column_wise, group_size=None),
        gptq(column_wise, group_size=64),
        mxfp4(given.get("block_scaled_fp4")),
        nvfp4(given.get("block_scaled_fp4")),
    ]


def stored_scales(scales: Tensor) -> Tensor:
    """Scales rounded to what they are stored in (float16), as float32.

    Raises ValueError where that loses one: a scale beyond float16's range would become 0 or Inf.
    """
    kept = scales.to(SCALE_DTYPE).float()
    if not kept.isfinite().all() or bool(((kept == 0) & (scales != 0)).any()):
        low, high = scales.abs().min().item(), scales.abs().max().item()
        raise ValueError(f"scales from {low:.3g} to {high:.3g} do not fit float16; rescale the weight first")
    return kept


def _from_groups(weight: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Quantized:
    rows, columns = weight.shape
    groups = math.ceil(columns / group_size)
    if codes.shape != weight.shape or scales.shape != (rows, groups):
        raise ValueError(
            f"expected codes {[rows, columns]} and scales {[rows, groups]}, "
            f"got {list(codes.shape)} and {list(scales.shape)}"
        )
    if codes.min() < -(2 ** (bits - 1)) or codes.max() > 2 ** (bits - 1) - 1:
        raise ValueError(f"codes {codes.min()} to {codes.max()} do not fit {bits} bits")
    each = stored_scales(scales).repeat_interleave(group_size, dim=1)[:, :columns]
    return Quantized(codes.float() * each, bits * codes.numel() + SCALE_DTYPE.itemsize * 8 * scales.numel())


def _size(weight: Tensor, group_size: int | None) -> int:
    return weight.shape[1] if group_size is None else min(group_size, weight.shape[1])


def _grouping(group_size: int | None) -> str:
    return "a scale a row" if group_size is None else f"groups of {group_size}"


# ---------------------------------------------------------------------------------------------- weights, measured


@dataclass(frozen=True)
class Compressed:
    """A model whose linear weights are what their codes stand for, and what those codes would take.

    bits_per_weight   of the quantized weights: codes, their scales, and input scales that nothing absorbs
    size_bytes        of the whole model, the rest at 16 bits a value
    """

    model: Decoder
    bits_per_weight: float
    size_bytes: int


@torch.no_grad()
def quantize_weights(
    model: Decoder, method: Method, bits: int, *, calibration: Calibration | None = None
) -> Compressed:
    """A copy of the model with every site's weights quantized, its layers stacked into one weight [sum N, K].

    `calibration` is `calibrate(model)`, made anew unless given. Raises ValueError for a number of bits that the
    method does not have, and for weights with NaN or Inf.
    """
    if bits not in method.bits:
        raise ValueError(f"{method.name} has {', '.join(map(str, method.bits))} bits, got {bits}")
    known = calibrate(model) if calibration is None else calibration
    made = copy.deepcopy(model)
    if method.sequential:
        places = _inputs_behind_quantized(made, known.tokens)
    else:
        places = ((site, known.inputs[site.name]) for site in sites(made))
    count = stored_bits = 0
    for site, inputs in places:
        result = _quantize_site(made, site, method, inputs, bits)
        stored_bits += result.stored_bits + (0 if site.folds else result.input_scale_bits)
        count += result.weight.numel()
    kept = sum(parameter.numel() for parameter in made.parameters()) - count
    return Compressed(made, stored_bits / count, math.ceil((stored_bits + KEPT_BITS * kept) / 8))


def _quantize_site(model: Decoder, site: Site, method: Method, inputs: Tensor, bits: int) -> Quantized:
    weights = _weights(model, site)
    stacked = torch.cat(weights).float()
    if not stacked.isfinite().all():
        raise ValueError(f"{site.name} holds NaN or Inf; no scale can stand for it")
    result = method.quantize(stacked, inputs.float(), bits)
    for weight, new in zip(weights, result.weight.split([len(each) for each in weights]), strict=True):
        weight.copy_(new)
    return result


@dataclass(frozen=True)
class Row:
    """One line of a table of perplexities.

    bits_per_weight   true: scales counted; 32 where only activations were quantized
    nats              by how much the mean loss rose; its `nats_error` is the standard error over windows, paired
    """

    method: str
    bits: int
    bits_per_weight: float
    size_bytes: int
    perplexity: float
    nats: float
    nats_error: float


def compression_table(
    model: Decoder,
    methods: Sequence[Method] | None = None,
    *,
    bits: Sequence[int] = BITS,
    tokens: Tensor | None = None,
    windows: Windows | None = None,
) -> list[Row]:
    """Held-out perplexity against true bits a weight: a row for each method and number of bits that it has.

    The first row is the model as it is. `tokens` calibrate (training text), `windows` are reported on (held out).
    """
    windows = held_out_slice() if windows is None else windows
    calibration = calibrate(model, tokens)
    before = window_losses(model, windows)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = [_row("as trained", 16, 16.0, parameters * KEPT_BITS // 8, before, before)]
    for method in default_methods() if methods is None else methods:
        for each in bits:
            if each not in method.bits:
                continue
            made = quantize_weights(model, method, each, calibration=calibration)
            after = window_losses(made.model, windows)
            rows.append(_row(method.name, each, made.bits_per_weight, made.size_bytes, after, before))
    return rows


def _row(
    name: str, bits: int, bits_per_weight: float, size_bytes: int, losses: Tensor, before: Tensor
) -> Row:
    rise = losses - before
    error = (rise.std() / math.sqrt(len(rise))).item() if len(rise) > 1 else math.nan
    return Row(name, bits, bits_per_weight, size_bytes, _exp(losses.mean().item()), rise.mean().item(), error)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


# ------------------------------------------------------------------------------------- outliers, and smoothing


@torch.no_grad()
def rescaled(
    model: Decoder, *, factor: float = 16.0, share: float = 1 / 32, seed: int = 0
) -> tuple[Decoder, dict[str, list[int]]]:
    """CONSTRUCTED outliers: some channels of each norm times `factor`, the columns they meet divided by it.

    The function computed is the same, to the last bit where the factor is a power of two. Large models grow such
    channels by themselves (Dettmers et al. 2022, sec. 3); one of a few million parameters does not, and a figure
    made with this must say so. Returns the copy and {norm: its rescaled channels}; `share` of the channels, one
    at least, drawn by `seed`.

    Raises ValueError unless factor is positive and finite and 0 < share <= 1.
    """
    if not 0 < factor < math.inf or not 0 < share <= 1:
        raise ValueError(f"factor {factor} must be positive and finite, and share {share} above 0, at most 1")
    made, draw = copy.deepcopy(model), random.Random(seed)
    chosen: dict[str, list[int]] = {}
    for site in sites(made):
        if site.norm is None:
            continue
        norm = _parameter(made, f"{site.norm}.weight").data
        channels = sorted(draw.sample(range(len(norm)), max(1, round(share * len(norm)))))
        norm[channels] *= factor
        for weight in _weights(made, site):
            weight[:, channels] /= factor
        chosen[site.norm] = channels
    return made, chosen


@torch.no_grad()
def smoothed(
    model: Decoder,
    inputs: Mapping[str, Tensor],
    *,
    alpha: float = 0.5,
    smooth_scales: Callable[..., Any] | None = None,
) -> Decoder:
    """A copy whose norms hand part of their activations' range to the weights behind them. Xiao et al. 2022, eq. 4.

    `inputs` are the model's `calibration_inputs`; sites without a norm of their own stay as they are.
    """
    own = smooth_scales or reference("smooth_scales")
    made = copy.deepcopy(model)
    for site in sites(made):
        if site.norm is None:
            continue
        norm, weights = _parameter(made, f"{site.norm}.weight").data, _weights(made, site)
        largest = inputs[site.name].abs().amax(dim=0)
        new_norm, new_weights = own(norm, weights, largest, alpha=alpha)
        norm.copy_(new_norm)
        for weight, new in zip(weights, new_weights, strict=True):
            weight.copy_(new)
    return made


# ----------------------------------------------------------------------------------------- activations, measured

Per = Literal["tensor", "token"]


def quantize_activations(
    model: Decoder,
    bits: int,
    *,
    per: Per,
    inputs: Mapping[str, Tensor],
    affine_parameters: Callable[..., Any] | None = None,
    quantize_groups: Callable[..., Any] | None = None,
) -> Decoder:
    """A copy whose linear layers are fed symmetric codes' values in place of their inputs.

    per "tensor": one scale a site, fixed beforehand from `inputs`, and what exceeds them is clipped; per "token":
    a scale for each token, found as it comes.
    """
    if per not in ("tensor", "token"):
        raise ValueError(f'per must be "tensor" or "token", got {per!r}')
    made = copy.deepcopy(model)
    affine = affine_parameters or (reference("affine_parameters") if per == "tensor" else None)
    groups = quantize_groups or (reference("quantize_groups") if per == "token" else None)
    for site in sites(made):
        if affine is not None and per == "tensor":
            scale, zero_point = affine(inputs[site.name], bits, symmetric=True, signed=True)
            feed: Callable[[Tensor], Tensor] = functools.partial(_clipped, bits, scale, zero_point)
        else:
            assert groups is not None
            feed = functools.partial(_by_token, bits, groups)
        for name in site.linears:
            made.get_submodule(name).register_forward_pre_hook(functools.partial(_replace_input, feed))
    return made


def _replace_input(feed: Callable[[Tensor], Tensor], _module: nn.Module, arguments: Any) -> Tensor:
    return feed(arguments[0])


def _clipped(bits: int, scale: Tensor, zero_point: Tensor, x: Tensor) -> Tensor:
    top = 2 ** (bits - 1) - 1  # symmetric: the lowest code is not used
    return ((x / scale).round().clamp(-top, top) - zero_point) * scale


def _by_token(bits: int, quantize_groups: Callable[..., Any], x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    codes, scales = quantize_groups(rows, bits=bits, group_size=rows.shape[1])
    return (codes * scales).view(x.shape)


def activation_table(
    model: Decoder,
    *,
    bits: Sequence[int] = (8, 6, 5, 4),
    weight_bits: int | None = 8,
    alpha: float = 0.5,
    tokens: Tensor | None = None,
    windows: Windows | None = None,
    own: Mapping[str, Callable[..., Any]] | None = None,
) -> list[Row]:
    """Held-out perplexity with quantized activations: per tensor and per token, plain and smoothed.

    Weights are rounded to `weight_bits` with a scale a row, after smoothing, since smoothing makes them harder;
    None keeps them, and then smoothing looks better than it is. The first row is the model as it is.
    """
    given = dict(own or {})
    windows = held_out_slice() if windows is None else windows
    before = window_losses(model, windows)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = [_row("as trained", 16, 16.0, parameters * KEPT_BITS // 8, before, before)]
    smooth = smoothed(
        model, calibrate(model, tokens).inputs, alpha=alpha, smooth_scales=given.get("smooth_scales")
    )
    for form, start in (("plain", model), ("smoothed", smooth)):
        fed, bits_per_weight, size_bytes = start, 16.0, rows[0].size_bytes
        found = calibrate(start, tokens)
        if weight_bits is not None:
            method = round_to_nearest(given.get("quantize_groups"))
            made = quantize_weights(start, method, weight_bits, calibration=found)
            fed, bits_per_weight, size_bytes = made.model, made.bits_per_weight, made.size_bytes
        for per in ("tensor", "token"):
            for each in bits:
                answers = {k: given.get(k) for k in ("affine_parameters", "quantize_groups")}
                changed = quantize_activations(fed, each, per=per, inputs=found.inputs, **answers)
                after = window_losses(changed, windows)
                rows.append(_row(f"per {per}, {form}", each, bits_per_weight, size_bytes, after, before))
    return rows


# ------------------------------------------------------------------------------------------- static int8 in torch


@dataclass(frozen=True)
class StaticInt8:
    """A decoder whose linear layers run torch's int8 kernels with ranges fixed beforehand.

    input_scales   of each linear layer's quantize step, in the model's order
    warned         what torch said while converting, apart from deprecations
    """

    model: Decoder
    input_scales: tuple[float, ...]
    warned: tuple[str, ...]


@torch.no_grad()
def static_int8(
    model: Decoder, tokens: Tensor | None = None, *, calibrate_first: bool = True, stubs: bool = True
) -> StaticInt8:
    """torch.ao's static quantization of the decoder layers' linears: observe, calibrate on `tokens`, convert.

    `calibrate_first` False converts before calibrating, an order that is often published. Conversion asks each
    observer for its range; one that has seen nothing answers scale 1, zero-point 0 and warns, and is then gone:
    the calibration that follows runs, and changes nothing. `stubs` False leaves out the layers that turn float
    input into codes: converting succeeds, and the first call raises NotImplementedError in `quantized::linear`.
    On x86 torch's default keeps activations to 7 of the 8 bits, as processors without VNNI need. Jacob et al. 2017.

    Raises ModuleNotFoundError where torch no longer has torch.ao.quantization, ValueError without a CPU engine.
    """
    import torch.ao.quantization as eager

    engine = torch.backends.quantized.engine
    if engine == "none":
        raise ValueError("this torch has no engine for quantized layers on a CPU")
    tokens = calibration_tokens() if tokens is None else tokens
    made = copy.deepcopy(model).cpu()
    names = [name for site in sites(made) for name in site.linears]
    for name in names:
        _observe(made, name, eager.get_default_qconfig(engine), stubs=stubs)
    with _collected_warnings() as warned:
        eager.prepare(made, inplace=True)
        if calibrate_first:
            made(tokens)
        eager.convert(made, inplace=True)
        if not calibrate_first:
            made(tokens)
    scales = tuple(made.get_buffer(f"{name}.quant.scale").item() for name in names) if stubs else ()
    return StaticInt8(made, scales, tuple(warned))


def _observe(model: Decoder, name: str, qconfig: Any, *, stubs: bool) -> None:
    """Put torch's own linear in place of ours, which it would not recognise, between stubs or without."""
    import torch.ao.quantization as eager

    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    linear = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    linear.weight, linear.bias = old.weight, old.bias
    placed: nn.Module = eager.QuantWrapper(linear) if stubs else linear
    placed.qconfig = qconfig  # torch's interface: an attribute of the module
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, placed)


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """What is warned of inside, each text once; that torch.ao is deprecated is known and left out."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    for warning in caught:
        words = " ".join(str(warning.message).split())
        if "deprecated" not in words and words not in said:
            said.append(words)


@dataclass(frozen=True)
class Outcome:
    """What came of one order of static quantization; `failure` names the exception where there was one."""

    order: str
    perplexity: float | None
    input_scales: tuple[float, ...]
    warned: tuple[str, ...]
    failure: str | None


def static_orders(
    model: Decoder, *, tokens: Tensor | None = None, windows: Windows | None = None
) -> list[Outcome]:
    """Static int8 in the right order, in the published one, and in that without the stubs it leaves out as well."""
    outcomes = []
    for order, options in (
        ("observe, calibrate, convert", {}),
        ("observe, convert, calibrate", {"calibrate_first": False}),
        ("observe, convert, calibrate; no stubs", {"calibrate_first": False, "stubs": False}),
    ):
        try:
            made = static_int8(model, tokens, **options)
        except NotImplementedError as error:
            first_line = str(error).partition(" with arguments")[0]
            outcomes.append(Outcome(order, None, (), (), f"NotImplementedError: {first_line}"))
            continue
        outcomes.append(Outcome(order, perplexity(made.model, windows), made.input_scales, made.warned, None))
    return outcomes


# -------------------------------------------------------------------------------------------------------- tables


def table_text(rows: Sequence[Row]) -> str:
    """The table in plain text, one row a line."""
    width = max(len(row.method) for row in rows)
    lines = [f"{'':{width}}  bits  bits a weight       MB  perplexity    nats more  (standard error)"]
    for row in rows:
        lines.append(
            f"{row.method:{width}}  {row.bits:4}  {row.bits_per_weight:13.3f}  {row.size_bytes / 1e6:7.3f}  "
            f"{row.perplexity:10.3f}  {row.nats:11.4f}  ({row.nats_error:.4f})"
        )
    return joined_table(lines)
