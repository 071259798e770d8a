"""Decode-like products on this machine: one weight in several stored forms, each multiplied by its own kernel.

Decoding one token multiplies every weight matrix by one vector, so each weight is read once and used once: what
counts is the bytes that are read and whether the kernel reads them as they are stored. A `Contender` packs a
weight into its form (`setup`), multiplies by it (`run`), and says how many bytes one product reads
(`weight_bytes`) and which weight the codes stand for (`represented`). `decode_table` times all of them, interleaved.

Shapes: T tokens, K inputs, N outputs; a weight is [N, K], x is [T, K], a product [T, N].

Not handled: biases, float16 (a CPU product in it takes minutes), training, more than one device.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import logging
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.figures import inert, joined_table

MIB = 2**20
# What one contender's copies hold together. The others run between two of its products, so far more than this has
# passed through the caches before a copy is read again.
ROTATION_BYTES = 128 * MIB
GROUP_SIZE = 64


# ---------------------------------------------------------------------------------------------- stored forms


def check_weight(weight: Tensor) -> Tensor:
    """The weight in float32, laid out by rows; ValueError unless it is [N, K], not empty, and finite."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"expected a weight [out, in] with at least one value, got shape {list(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise ValueError(f"expected a floating-point weight, got {weight.dtype}; dequantize it first")
    wide = weight.detach().float().contiguous()
    if not wide.isfinite().all():
        raise ValueError(
            "the weight holds NaN or Inf; no scale can stand for it, so find where they come from"
        )
    return wide


def symmetric_codes(
    weight: Tensor, *, bits: int, group_size: int, clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Round-to-nearest: weight [N, K] -> codes int8 [N, K], scales float32 [N, K / group_size].

    `clip` times each group's largest magnitude becomes the top code; a group of zeros gets scale 1. ValueError
    unless group_size divides K, as packed kernels demand.
    """
    rows, columns = weight.shape
    if columns % group_size:
        raise ValueError(
            f"expected a group_size that divides in_features {columns}, got {group_size}; choose one that does"
        )
    top = 2 ** (bits - 1) - 1
    groups = weight.view(rows, columns // group_size, group_size)
    scales = clip * groups.abs().amax(-1) / top
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (groups / scales[..., None]).round_().clamp_(-top, top)
    return codes.view(rows, columns).to(torch.int8), scales


def expanded(codes: Tensor, scales: Tensor) -> Tensor:
    """codes [N, K] and scales [N, groups] -> the weight they stand for, float64 [N, K]."""
    group_size = codes.shape[1] // scales.shape[1]
    return codes.double() * scales.double().repeat_interleave(group_size, dim=1)


# ------------------------------------------------------------------------------------------------ contenders


class Contender:
    """One stored form of a weight and the kernel that multiplies by it.

    name       what tables call it
    x_dtype    of the activations its kernel takes; `run` casts what comes otherwise
    device     "cpu" or torch's name of an accelerator
    """

    name: str
    x_dtype: torch.dtype = torch.float32
    device_type: ClassVar[str] = "cpu"

    def __init__(self, *, device: str | None = None) -> None:
        self.device = self.device_type if device is None else device
        self._copies: list[Any] = []
        self._next = 0

    def setup(self, weight: Tensor, *, rotation_bytes: int = ROTATION_BYTES) -> None:
        """Pack a weight [N, K], and copy it until `rotation_bytes` are held; 0 keeps the single, hot copy.

        Raises ValueError for a weight that is not finite and [N, K], or that the kernel's shapes exclude.
        """
        packed = self._pack(check_weight(weight).to(self.device))
        one_bytes = self._held_bytes(packed)
        count = max(1, math.ceil(rotation_bytes / one_bytes))
        self._copies = [packed, *(self._copy(packed) for _ in range(count - 1))]
        self._next = 0

    def run(self, x: Tensor) -> Tensor:
        """x [T, K] times the next copy of the weight: [T, N], in the dtype that the kernel gives."""
        packed = self._copies[self._next]
        self._next = (self._next + 1) % len(self._copies)
        return self._product(x.to(self.x_dtype), packed)

    @property
    def copies(self) -> int:
        return len(self._copies)

    @property
    def weight_bytes(self) -> int:
        """Bytes that one product must read of the weight: codes and scales of one copy."""
        return self._held_bytes(self._copies[0])

    def represented(self) -> Tensor:
        """The weight that the stored form stands for, float64 [N, K] on the CPU."""
        return self._unpack(self._copies[0]).cpu()

    def error(self, x: Tensor, weight: Tensor) -> float:
        """Distance of `run(x)` from the float64 product with the weight as it was, over that product's norm."""
        exact = x.double().cpu() @ weight.double().cpu().T
        return ((self.run(x).double().cpu() - exact).norm() / exact.norm()).item()

    def _pack(self, weight: Tensor) -> Any:
        raise NotImplementedError

    def _product(self, x: Tensor, packed: Any) -> Tensor:
        raise NotImplementedError

    def _unpack(self, packed: Any) -> Tensor:
        raise NotImplementedError

    def _copy(self, packed: Any) -> Any:
        return tuple(part.clone() for part in packed)

    def _held_bytes(self, packed: Any) -> int:
        return sum(part.nbytes for part in packed)


class Dense(Contender):
    """The weight as it is, in float32 or bfloat16: what every other contender is compared with."""

    def __init__(self, dtype: torch.dtype, *, device: str | None = None) -> None:
        super().__init__(device=device)
        self.x_dtype = dtype
        self.name = str(dtype).removeprefix("torch.")

    def _pack(self, weight: Tensor) -> tuple[Tensor]:
        # Never the caller's own tensor: changing it later must not change what is raced.
        return (weight.to(self.x_dtype, copy=True),)

    def _product(self, x: Tensor, packed: tuple[Tensor]) -> Tensor:
        return F.linear(x, packed[0])

    def _unpack(self, packed: tuple[Tensor]) -> Tensor:
        return packed[0].double()


class Int8WeightOnly(Contender):
    """int8 codes and a scale a row, widened inside the kernel (`aten::_weight_int8pack_mm`)."""

    def __init__(self, x_dtype: torch.dtype, *, device: str | None = None) -> None:
        super().__init__(device=device)
        self.x_dtype = x_dtype
        self.name = f"int8 weights, {str(x_dtype).removeprefix('torch.')} activations"

    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = symmetric_codes(weight, bits=8, group_size=weight.shape[1])
        return codes, scales[:, 0].to(self.x_dtype)  # the kernel wants its scales in the activations' dtype

    def _product(self, x: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, *packed)

    def _unpack(self, packed: tuple[Tensor, Tensor]) -> Tensor:
        return expanded(packed[0], packed[1][:, None])


class Int4WeightOnly(Contender):
    """Two 4-bit codes a byte and a scale and zero a group, on a CPU (`aten::_weight_int4pack_mm_for_cpu`)."""

    def __init__(
        self, x_dtype: torch.dtype, *, group_size: int = GROUP_SIZE, device: str | None = None
    ) -> None:
        super().__init__(device=device)
        self.x_dtype = x_dtype
        self.group_size = group_size
        self.name = f"int4 weights, {str(x_dtype).removeprefix('torch.')} activations"

    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        _check_int4_shape(weight, self.group_size, rows=16)
        codes, scales = symmetric_codes(weight, bits=4, group_size=self.group_size)
        # The kernel reads codes 0..15 as (code - 8) * scale + zero, and wants [K / group, N, 2] of (scale, zero).
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 2)
        return packed, _scales_and_zeros(scales, self.x_dtype)

    def _product(self, x: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[0], self.group_size, packed[1])

    def _unpack(self, packed: tuple[Tensor, Tensor]) -> Tensor:
        return self._through_the_kernel(packed)

    def _through_the_kernel(self, packed: tuple[Tensor, Tensor]) -> Tensor:
        """The packed layout is torch's own business; a product with the unit vectors is exact and reads it out."""
        columns = packed[1].shape[0] * self.group_size
        units = torch.eye(columns, dtype=self.x_dtype, device=packed[0].device)
        return self._product(units, packed).double().T


class CudaInt4WeightOnly(Int4WeightOnly):
    """As `Int4WeightOnly`, through the CUDA kernel (`aten::_weight_int4pack_mm`), which takes bfloat16 activations.

    Needs compute capability 8.0 (Ampere) or later.
    """

    device_type: ClassVar[str] = "cuda"
    INNER_TILES: ClassVar[int] = 8

    def __init__(self, *, group_size: int = GROUP_SIZE, device: str | None = None) -> None:
        super().__init__(torch.bfloat16, group_size=group_size, device=device)

    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        _check_int4_shape(weight, self.group_size, rows=8)
        if weight.shape[1] % (16 * self.INNER_TILES):
            raise ValueError(
                f"in_features must be a multiple of {16 * self.INNER_TILES}, got {weight.shape[1]}"
            )
        codes, scales = symmetric_codes(weight, bits=4, group_size=self.group_size)
        shifted = (codes + 8).to(torch.uint8)
        pairs = shifted[:, ::2] << 4 | shifted[:, 1::2]  # this one wants the even column in the high nibble
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), self.INNER_TILES)
        return packed, _scales_and_zeros(scales, self.x_dtype)

    def _product(self, x: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, packed[0], self.group_size, packed[1])


def _check_int4_shape(weight: Tensor, group_size: int, *, rows: int) -> None:
    if group_size not in (32, 64, 128, 256):
        raise ValueError(f"the int4 kernels take a group_size of 32, 64, 128 or 256, got {group_size}")
    if weight.shape[0] % rows:
        raise ValueError(f"the int4 kernel takes out_features in multiples of {rows}, got {weight.shape[0]}")


def _scales_and_zeros(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """scales [N, groups] -> [groups, N, 2] of (scale, zero), zeros all 0: our codes are symmetric."""
    return torch.stack((scales.T, torch.zeros_like(scales.T)), dim=-1).to(dtype).contiguous()


class Int8PerToken(Contender):
    """int8 codes on both sides: x is quantized with a scale a token, and the product is of integers.

    torch's CUDA kernel refuses 16 rows or fewer: there the missing rows are zeros.
    """

    name = "int8 weights and activations"
    CUDA_ROWS: ClassVar[int] = 32

    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if weight.device.type == "cuda" and (weight.shape[0] % 8 or weight.shape[1] % 8):
            raise ValueError(f"the CUDA kernel takes sizes in multiples of 8, got {list(weight.shape)}")
        codes, scales = symmetric_codes(weight, bits=8, group_size=weight.shape[1])
        return codes, scales[:, 0]

    def _product(self, x: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
        codes, scales = packed
        steps = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127  # [T, 1]; a token of zeros stays zeros
        x_codes = (x / steps).round_().to(torch.int8)
        tokens = x.shape[0]
        if x.device.type == "cuda" and tokens < self.CUDA_ROWS:
            x_codes = F.pad(x_codes, (0, 0, 0, self.CUDA_ROWS - tokens))
        return torch._int_mm(x_codes, codes.t())[:tokens].float().mul_(steps).mul_(scales)

    def _unpack(self, packed: tuple[Tensor, Tensor]) -> Tensor:
        return expanded(packed[0], packed[1][:, None])


class DequantizeThenLinear(Contender):
    """int8 codes that are widened to a whole float32 matrix before each product: smaller, and slower."""

    name = "int8, dequantized each time"

    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return symmetric_codes(weight, bits=8, group_size=weight.shape[1])

    def _product(self, x: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
        codes, scales = packed
        return F.linear(x, codes.to(x.dtype) * scales)

    def _unpack(self, packed: tuple[Tensor, Tensor]) -> Tensor:
        return expanded(*packed)


class CompiledInt8(Contender):
    """int8 weights that torch.compile fuses into the product: the compiler's own weight-only kernel."""

    name = "int8 weights, compiled"
    x_dtype = torch.bfloat16
    device_type: ClassVar[str] = "cuda"

    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = symmetric_codes(weight, bits=8, group_size=weight.shape[1])
        return codes, scales[:, 0].to(self.x_dtype)

    def _product(self, x: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
        return _compiled_int8()(x, *packed)

    def _unpack(self, packed: tuple[Tensor, Tensor]) -> Tensor:
        return expanded(packed[0], packed[1][:, None])


@functools.cache
def _compiled_int8() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return F.linear(x, codes.to(x.dtype)) * scales

    return torch.compile(product, dynamic=False)


class TorchDynamic(Contender):
    """torch.ao.quantization.quantize_dynamic: int8 weights with one scale, activations quantized at each call."""

    name = "torch quantize_dynamic"

    def _pack(self, weight: Tensor) -> Any:
        from torch.ao.quantization import quantize_dynamic

        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        with _deprecations_unsaid():
            return quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear}, torch.qint8)[0]

    def _product(self, x: Tensor, packed: Any) -> Tensor:
        return packed(x)

    def _unpack(self, packed: Any) -> Tensor:
        return packed.weight().dequantize().double()

    def _copy(self, packed: Any) -> Any:
        with _deprecations_unsaid():
            return copy.deepcopy(packed)

    def _held_bytes(self, packed: Any) -> int:
        return packed.weight().int_repr().nbytes + 4  # one float32 scale; its zero-point is 0


@contextmanager
def _deprecations_unsaid() -> Iterator[None]:
    """torch.ao announces at each call that it will go; `contenders` looks whether it is there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*(TypedStorage|quantized tensor creation)")
        yield


class PlainRead(Contender):
    """No product: the sum of a buffer larger than the caches, which is what memory gives."""

    name = "a plain sum"
    BUFFER_BYTES: ClassVar[int] = 64 * MIB

    def _pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        # One integer addition for eight bytes, so that no arithmetic is in the way (as `machine` measures it).
        dtype = torch.float32 if torch.device(self.device).type == "mps" else torch.int64
        return (torch.ones(self.BUFFER_BYTES // dtype.itemsize, dtype=dtype, device=self.device),)

    def _product(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        return packed[0].sum()


class PlainProduct(PlainRead):
    """The same buffer as a float32 matrix times a vector: some processors read many rows at once faster than one."""

    name = "a plain product"
    COLUMNS: ClassVar[int] = 1024

    def _pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        matrix = torch.ones(self.BUFFER_BYTES // (4 * self.COLUMNS), self.COLUMNS, device=self.device)
        return matrix, torch.ones(self.COLUMNS, device=self.device)

    def _product(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        return torch.mv(*packed)


# ------------------------------------------------------------------- contenders of libraries that may be installed


@contextmanager
def _said_in_peace() -> Iterator[None]:
    """torchao tells at import which of its compiled parts this machine cannot load; the contender does without."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class TorchaoInt8(Contender):
    """torchao's int8 weight-only linear, eager or compiled, in bfloat16."""

    x_dtype = torch.bfloat16

    def __init__(self, *, compiled: bool, device: str | None = None) -> None:
        super().__init__(device=device)
        self.compiled = compiled
        self.name = f"torchao int8 weights, {'compiled' if compiled else 'eager'}"

    def _pack(self, weight: Tensor) -> Any:
        with _said_in_peace():
            quantization = importlib.import_module("torchao.quantization")
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight.to(self.x_dtype), requires_grad=False)
        holder = torch.nn.Sequential(linear)  # quantize_ replaces the modules inside what it is given
        quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
        return holder[0]

    @functools.cached_property
    def _call(self) -> Callable[[Tensor, Tensor], Tensor]:
        # The weight is an argument, so that its copies share the one compiled product.
        return torch.compile(F.linear, dynamic=False) if self.compiled else F.linear

    def _product(self, x: Tensor, packed: Any) -> Tensor:
        with torch.no_grad():
            return self._call(x, packed.weight)

    def _unpack(self, packed: Any) -> Tensor:
        return packed.weight.dequantize().double()

    def _copy(self, packed: Any) -> Any:
        return copy.deepcopy(packed)

    def _held_bytes(self, packed: Any) -> int:
        rows, columns = packed.weight.shape
        return rows * columns + rows * self.x_dtype.itemsize


class OnnxRuntime(Contender):
    """ONNX Runtime on a CPU: "float32", "int8" (both sides, dynamic) or "int4" weights (`MatMulNBits`)."""

    def __init__(self, form: str, *, group_size: int = GROUP_SIZE) -> None:
        super().__init__()
        if form not in ("float32", "int8", "int4"):
            raise ValueError(f'form must be "float32", "int8" or "int4", got {form!r}')
        self.form = form
        self.group_size = group_size
        self.name = {
            "float32": "ONNX Runtime float32",
            "int8": "ONNX Runtime int8, dynamic",
            "int4": "ONNX Runtime int4 weights",
        }[form]

    def _pack(self, weight: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        rows, columns = weight.shape
        if self.form == "float32":
            parts: tuple[Tensor, ...] = (weight.T.contiguous(),)
        elif self.form == "int8":
            codes, scales = symmetric_codes(weight, bits=8, group_size=columns)
            parts = (codes.T.contiguous(), scales[:, 0])
        else:
            codes, scales = symmetric_codes(weight, bits=4, group_size=self.group_size)
            shifted = (codes + 8).to(torch.uint8)
            pairs = shifted[:, ::2] | shifted[:, 1::2] << 4  # the even column in the low nibble
            parts = (pairs.view(rows, columns // self.group_size, self.group_size // 2), scales.flatten())
        return parts, self._session(parts, rows, columns)

    def _session(self, parts: tuple[Tensor, ...], rows: int, columns: int) -> Any:
        onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
        make = onnx.helper
        domains = [make.make_opsetid("", 17), make.make_opsetid("com.microsoft", 1)]
        graph = make.make_graph(
            self._nodes(make, rows, columns),
            "product",
            [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["tokens", columns])],
            [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["tokens", rows])],
            [onnx.numpy_helper.from_array(part.numpy(), f"part{i}") for i, part in enumerate(parts)],
        )
        # IR 10 is what every runtime of the last years reads; the newest onnx would write its own.
        model = make.make_model(graph, opset_imports=domains, ir_version=10)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        return runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _nodes(self, make: Any, rows: int, columns: int) -> list[Any]:
        if self.form == "float32":
            return [make.make_node("MatMul", ["x", "part0"], ["y"])]
        if self.form == "int4":
            shape = {"K": columns, "N": rows, "bits": 4, "block_size": self.group_size, "accuracy_level": 4}
            return [
                make.make_node("MatMulNBits", ["x", "part0", "part1"], ["y"], domain="com.microsoft", **shape)
            ]
        return [
            make.make_node("DynamicQuantizeLinear", ["x"], ["codes", "step", "zero"]),
            make.make_node("MatMulInteger", ["codes", "part0", "zero"], ["whole"]),
            make.make_node("Cast", ["whole"], ["wide"], to=1),  # 1 is ONNX's float32
            make.make_node("Mul", ["step", "part1"], ["scales"]),
            make.make_node("Mul", ["wide", "scales"], ["y"]),
        ]

    def _product(self, x: Tensor, packed: Any) -> Tensor:
        return torch.from_numpy(packed[1].run(None, {"x": x.numpy()})[0])

    def _unpack(self, packed: Any) -> Tensor:
        parts = packed[0]
        if self.form == "float32":
            return parts[0].T.double()
        if self.form == "int8":
            return expanded(parts[0].T, parts[1][:, None])
        pairs, scales = parts[0].flatten(1).to(torch.int16), parts[1].view(parts[0].shape[0], -1)
        return expanded(torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1) - 8, scales)

    def _copy(self, packed: Any) -> Any:
        parts = packed[0]
        shape = tuple(parts[0].shape)
        rows, columns = (
            (shape[0], shape[1] * self.group_size) if self.form == "int4" else (shape[1], shape[0])
        )
        return parts, self._session(parts, rows, columns)  # the session keeps its own copy of the weight

    def _held_bytes(self, packed: Any) -> int:
        return sum(part.nbytes for part in packed[0])


def _installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def _has_kernel(operator: str, device: str) -> bool:
    """Whether this torch has a kernel of its own for `aten::operator` on that kind of device."""
    key = torch.device(device).type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", key)


def contenders(
    device: str = "cpu", *, group_size: int = GROUP_SIZE, libraries: bool = True, compiled: bool = False
) -> list[Contender]:
    """Every contender that this machine has a kernel for, the float32 baseline first.

    `libraries` adds torchao and ONNX Runtime where they are installed. `compiled` adds those that torch.compile
    makes, which takes a C++ compiler (a CPU) or Triton (CUDA) and up to a minute.

    Raises ValueError for a device that this torch does not see.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        found = _on_cpu(group_size)
        if libraries:
            found += _of_libraries(group_size, compiled=compiled)
        return found
    if kind not in ("cuda", "mps") or not getattr(torch, kind).is_available():
        raise ValueError(f"no device {device!r} here; torch sees a CPU" + _also_seen())
    found = [Dense(torch.float32, device=device), Dense(torch.bfloat16, device=device)]
    if _has_kernel("_weight_int8pack_mm", device):
        found.append(Int8WeightOnly(torch.bfloat16, device=device))
    if kind == "cuda":
        found.append(Int8PerToken(device=device))
        if torch.cuda.get_device_capability(device) >= (8, 0) and _has_kernel("_weight_int4pack_mm", device):
            found.append(CudaInt4WeightOnly(group_size=group_size, device=device))
        if compiled:
            found.append(CompiledInt8(device=device))
    found.append(DequantizeThenLinear(device=device))
    return found


def _also_seen() -> str:
    names = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()]
    return "".join(f", {name}" for name in names)


def _on_cpu(group_size: int) -> list[Contender]:
    found: list[Contender] = [Dense(torch.float32), Dense(torch.bfloat16)]
    dtypes = (torch.bfloat16, torch.float32)
    if _has_kernel("_weight_int8pack_mm", "cpu"):
        found += [Int8WeightOnly(dtype) for dtype in dtypes]
    if _has_kernel("_weight_int4pack_mm_for_cpu", "cpu"):
        found += [Int4WeightOnly(dtype, group_size=group_size) for dtype in dtypes]
    if _has_kernel("_int_mm", "cpu"):
        found.append(Int8PerToken())
    if _installed("torch.ao.quantization") and torch.backends.quantized.engine != "none":
        found.append(TorchDynamic())
    return [*found, DequantizeThenLinear()]


def _of_libraries(group_size: int, *, compiled: bool) -> list[Contender]:
    found: list[Contender] = []
    if _installed("torchao"):
        found.append(TorchaoInt8(compiled=False))
        if compiled:
            found.append(TorchaoInt8(compiled=True))
    if _installed("onnxruntime", "onnx"):
        found += [OnnxRuntime("float32"), OnnxRuntime("int8"), OnnxRuntime("int4", group_size=group_size)]
    return found


# -------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Timing:
    """One contender in one interleaved measurement.

    median_s          of one product: CPU seconds of the one thread; on an accelerator elapsed ones
    speedup           the median over rounds of (baseline's time / this one's in the same round)
    low, high         of the speedup: order statistics that hold its true median with 95 % confidence
    weight_bytes      read by one product
    bandwidth_share   weight_bytes a second, as a share of what the faster of a plain sum and a plain product reads a
                      second in the same rounds (the median of it); above 1 a cache has helped
    error             of the products, against float64 with the unquantized weight, relative
    """

    name: str
    median_s: float
    speedup: float
    low: float
    high: float
    weight_bytes: int
    bandwidth_share: float
    error: float


def decode_table(
    size: int = 4096,
    *,
    out_features: int | None = None,
    tokens: int = 1,
    device: str = "cpu",
    entries: Sequence[Contender] | None = None,
    rounds: int = 31,
    seconds: float = 60.0,
    rotation_bytes: int = ROTATION_BYTES,
    seed: int = 0,
) -> list[Timing]:
    """Time x [tokens, size] times a weight [out_features, size] in every form: the baseline's row first.

    On a CPU at one thread and by that thread's own clock, which a busy neighbour disturbs least. Each round draws
    fresh inputs and runs all contenders once, in random order. It stops after `rounds`, or, five rounds at least,
    after `seconds`. `entries` defaults to `contenders(device)`; the first is the baseline. Two more contenders only
    read: the bandwidth that shares are stated of was there at the same time, whoever else used the machine.
    While a notebook is graded (`figures.inert()`) five rounds of one hot copy are all.

    Raises ValueError for sizes below 1, fewer than five rounds or no contender, and for shapes a kernel excludes.
    """
    if min(size, tokens, out_features or size) < 1 or rounds < 5:
        raise ValueError(
            f"size {size}, out_features {out_features} and tokens {tokens} must be at least 1, rounds ({rounds}) 5"
        )
    if inert():
        rounds, rotation_bytes = 5, 0
    with _one_thread():
        # Inside: ONNX Runtime's sessions keep the thread count that they are made under.
        raced = list(contenders(device) if entries is None else entries)
        if not raced:
            raise ValueError("no contender to measure; pass at least a baseline")
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(out_features or size, size, generator=generator) / math.sqrt(size)
        for entry in raced:
            entry.setup(weight, rotation_bytes=rotation_bytes)
        sample = torch.randn(tokens, size, generator=generator)
        errors = [entry.error(sample.to(entry.device), weight) for entry in raced]
        readers = [PlainRead(device=device), PlainProduct(device=device)]
        for reader in readers:
            reader.setup(weight)
        times = _interleaved_s(
            [*raced, *readers], (tokens, size), rounds, seconds, generator, random.Random(seed)
        )
    # Seconds a byte of the faster reader, round by round.
    read_s = [min(pair) / PlainRead.BUFFER_BYTES for pair in zip(times.pop(), times.pop(), strict=True)]
    return [
        _timing(entry, times[0], own, read_s, error)
        for entry, own, error in zip(raced, times, errors, strict=True)
    ]


def prefill_table(size: int = 1024, *, tokens: int = 512, **options: Any) -> list[Timing]:
    """Where it does not help: `tokens` at once, so that arithmetic and not the weight's bytes is the limit."""
    return decode_table(size, tokens=tokens, **options)


def small_layer_tables(
    sizes: Sequence[int] = (128, 256, 512, 1024, 2048), **options: Any
) -> dict[int, list[Timing]]:
    """Where it does not help: decode at widths whose weights a cache holds and whose calls cost as much as the work.

    The weight is not rotated (`rotation_bytes` 0): a model with layers that small stays in the cache as well.
    """
    return {size: decode_table(size, **{"rotation_bytes": 0, **options}) for size in sizes}


def table_text(rows: Sequence[Timing]) -> str:
    """The table in plain text, one contender a line; narrow enough for a notebook's page.

    speed-up has its 95 % interval beside it; bandwidth is the share of this machine's, error that of the product.
    """
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  median ms  speed-up        95 %      MB  bandwidth    error"]
    for row in rows:
        interval = f"{row.low:.2f} to {row.high:.2f}"
        lines.append(
            f"{row.name:{width}}  {row.median_s * 1e3:9.3f}  {row.speedup:7.2f}x  {interval:>12}  "
            f"{row.weight_bytes / 1e6:5.1f}  {row.bandwidth_share:9.2f}  {row.error:7.0e}"
        )
    return joined_table(lines)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


# A product on an accelerator takes about as long as starting it: the clock is read around this many.
ACCELERATOR_REPEATS = 16


def _interleaved_s(
    raced: Sequence[Contender],
    shape: tuple[int, int],
    rounds: int,
    seconds: float,
    generator: torch.Generator,
    order: random.Random,
) -> list[list[float]]:
    """Seconds of one product, for each contender a list with one entry a round; a first round is thrown away."""
    times: list[list[float]] = [[] for _ in raced]
    end = time.perf_counter() + seconds
    for done in range(rounds + 1):
        if done > 5 and time.perf_counter() > end:
            break
        x = torch.randn(shape, generator=generator)
        for index in order.sample(range(len(raced)), len(raced)):
            took_s = _once_s(raced[index], x)
            if done:
                times[index].append(took_s)
    return times


def _once_s(entry: Contender, x: Tensor) -> float:
    x = x.to(entry.device, entry.x_dtype)  # off the clock: a model hands on activations in its own dtype
    repeats = 1 if entry.device == "cpu" else ACCELERATOR_REPEATS
    synchronize = _synchronize(entry.device)
    # CPU seconds of this one thread: another process's turns, which hit long products oftener, are not counted.
    clock = time.thread_time if entry.device == "cpu" else time.perf_counter
    synchronize()
    start = clock()
    for _ in range(repeats):
        entry.run(x)
    synchronize()
    return (clock() - start) / repeats


def _synchronize(device: str) -> Callable[[], object]:
    kind = torch.device(device).type
    if kind == "cuda":
        return functools.partial(torch.cuda.synchronize, device)
    return torch.mps.synchronize if kind == "mps" else lambda: None


def _timing(
    entry: Contender,
    baseline_s: Sequence[float],
    own_s: Sequence[float],
    read_s: Sequence[float],
    error: float,
) -> Timing:
    ratios = [base / own for base, own in zip(baseline_s, own_s, strict=True)]
    low, high = median_interval(ratios)
    median_s = statistics.median(own_s)
    share = statistics.median(
        entry.weight_bytes * byte_s / own for own, byte_s in zip(own_s, read_s, strict=True)
    )
    return Timing(
        entry.name, median_s, statistics.median(ratios), low, high, entry.weight_bytes, share, error
    )


def median_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Order statistics that hold the median of the values' law with that confidence, whatever the law.

    The k-th smallest and largest, k as large as Binomial(n, 1/2) allows; the extremes when n is too small for it.
    Conover 1999, sec. 3.2.
    """
    ordered, count = sorted(values), len(values)
    below, k = 0.0, 0
    while True:
        below += math.comb(count, k) / 2**count
        if 2 * below > 1 - confidence or 2 * k >= count - 1:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[count - k]
