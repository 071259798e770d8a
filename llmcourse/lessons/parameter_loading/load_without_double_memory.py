"""Load a checkpoint into a module that is built on the meta device, so that the weights are in memory once."""

from __future__ import annotations

import functools
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from llmcourse.counting import PeakOfItem, memory_error_bytes, settle
from llmcourse.exercise import Rng, alternative, case, cost, exercise, mistake, raised


@exercise(
    points=4,
    minutes=12,
    hints=(
        "On the meta device a tensor has a shape and a dtype and no memory. The file's tensors can then take the "
        "places of the module's instead of being copied into them.",
        "Ties: a Parameter put in place under one name is not in place under its other names. Buffers that are "
        "not in the file: what was made on the meta device holds no values, and stays there until it is made again.",
    ),
)
def load_without_double_memory(build: Callable[[], nn.Module], path: str) -> nn.Module:
    """The module that `build()` makes, with the weights of the safetensors file at
    `path`, held in memory once.

    Call `build()` once, with "meta" as torch's default device meanwhile, so that it
    allocates nothing; afterwards, or when it raises, the default device is what it was.
    Return that module with all its parameters and buffers on the CPU:

    - What its `state_dict` names comes from the file and keeps the file's dtype,
      whatever dtype `build` gave it. Parameters stay parameters with the
      `requires_grad` that `build` gave them, buffers stay buffers.
    - A parameter with several names (tied weights) stays one Parameter; the file holds
      it once, under any of them.
    - Buffers registered with persistent=False are not in the file. Each module that
      owns one has a method `reset_buffers()`, which makes them anew on the default
      device and may read that module's loaded parameters.

    The process may allocate 1.05 times the file's bytes (tensors that map the file
    privately allocate nothing). Changing the module's weights later must not change the
    file.

    KeyError when the file lacks tensors of the module or holds others: its message
    names exactly these (a tied parameter by any of its names). ValueError when a tensor
    has another shape in the file than in the module, even with as many elements: its
    message names that tensor and no other. About 20 lines.
    """
    ### BEGIN SOLUTION
    with torch.device("meta"):
        module = build()
    stored = load_file(path)  # maps the file privately: nothing is copied until it is written to
    names_of: dict[Tensor, list[str]] = defaultdict(list)
    for name, tensor in module.state_dict(keep_vars=True).items():
        names_of[tensor].append(name)

    missing = [names for names in names_of.values() if not any(name in stored for name in names)]
    unexpected = stored.keys() - module.state_dict().keys()
    if missing or unexpected:
        raise KeyError(
            f"{path} lacks {missing} and holds {sorted(unexpected)}, which the module does not have"
        )

    for tensor, names in names_of.items():
        name = next(name for name in names if name in stored)
        loaded = stored[name]
        if loaded.shape != tensor.shape:
            raise ValueError(f"{name} is {list(loaded.shape)} in {path}; the module has {list(tensor.shape)}")
        if isinstance(tensor, nn.Parameter):
            loaded = nn.Parameter(loaded, requires_grad=tensor.requires_grad)
        for name in names:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, loaded)

    for part in module.modules():
        reset_buffers = getattr(part, "reset_buffers", None)
        if reset_buffers is not None:
            reset_buffers()
    return module
    ### END SOLUTION


# ------------------------------------------------------------------------------------------------ modules to load


class Rotary(nn.Module):
    """Owns a table that no checkpoint holds."""

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        self.width, self.base = width, base
        self.reset_buffers()

    def reset_buffers(self) -> None:
        frequencies = [self.base ** -(index / self.width) for index in range(0, self.width, 2)]
        self.register_buffer("frequency", torch.tensor(frequencies), persistent=False)


class Projection(nn.Module):
    """A linear map that keeps its diagonal beside it: a buffer that depends on the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        diagonal = self.weight.detach().diagonal().to(torch.float64, copy=True)
        self.register_buffer("diagonal", diagonal, persistent=False)


class Embedding(nn.Embedding):
    """Starts from zeros.

    Here as in Rotary no torch function is called that on the meta device is written in Python, as `normal_` and
    division are: the first such call imports torch's compiler, which takes a second.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class Decoder(nn.Module):
    """embed [words, width], two projections, a norm, a head, a gain of its own; `tied` names what is one Parameter."""

    def __init__(self, words: int, width: int, tied: Sequence[str] = (), frozen: Iterable[str] = ()) -> None:
        super().__init__()
        self.embed = Embedding(words, width)
        self.rotary = Rotary(width, 100.0)
        self.blocks = nn.ModuleList([Projection(width), Projection(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.output_gain = nn.Parameter(torch.zeros(width))
        for other in tied[1:]:
            self.get_submodule(other.rpartition(".")[0]).weight = self.get_parameter(tied[0])
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)


class NamedProjections(nn.Module):
    """Projections under the given names; those of `tied` have one Parameter together."""

    def __init__(self, width: int, names: Sequence[str], tied: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, Projection(width))
        for name in tied[1:]:
            self.get_submodule(name).weight = self.get_parameter(f"{tied[0]}.weight")


class Scaled(nn.Module):
    """Owns a Parameter of one value, one of none, and a buffer that depends on the first; `inner` is a part of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(0, 3))
        self.inner = inner
        self.reset_buffers()

    def reset_buffers(self) -> None:
        # Not by arithmetic: for that torch imports its compiler on the meta device, for a second.
        self.register_buffer("as_loaded", self.scale.detach().clone(), persistent=False)


HEAD, BLOCKS = ("head.weight", "embed.weight"), ("blocks.0.weight", "blocks.1.weight")


def drawn(rng: Rng, words: int, width: int, tied: Sequence[str], stored: str) -> dict[str, Tensor]:
    """What a file holds for a Decoder, of the names that are tied only `stored`."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(HEAD, (words, width))
    shapes |= dict.fromkeys(BLOCKS, (width, width))
    shapes |= dict.fromkeys(("output_gain", "norm.weight", "norm.bias"), (width,))
    tensors = {
        name: rng.normal(*shape) for name, shape in shapes.items() if name == stored or name not in tied
    }
    return tensors | {f"blocks.{index}.steps": rng.integers(1, 1000, 2) for index in range(2)}


def sizes(rng: Rng) -> tuple[int, int]:
    """(words, width), never equal."""
    return rng.integer(9, 14), 2 * rng.integer(2, 4)


def seen(module: nn.Module) -> dict[str, object]:
    """Every tensor by every name it has, which are parameters, trained, and one and the same."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(module.named_buffers(remove_duplicate=False))}
    places: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        places.setdefault(id(tensor), []).append(name)
    return {
        "tensors": {name: tensor.detach() for name, tensor in sorted(tensors.items())},
        "parameters": sorted(parameters),
        "saved": sorted(module.state_dict()),
        "trained": sorted(name for name, parameter in parameters.items() if parameter.requires_grad),
        "one tensor": [names for names in places.values() if len(names) > 1],
    }


def loads(
    answer: Callable[..., nn.Module], tensors: dict[str, Tensor], build: Callable[[], nn.Module]
) -> nn.Module:
    """The answer's module for a file that holds the tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.safetensors"
        save_file(tensors, path)
        return answer(build, path)


def refusal(
    answer: Callable[..., nn.Module],
    tensors: dict[str, Tensor],
    build: Callable[[], nn.Module],
    names: Iterable[str],
) -> list[str]:
    """Kind of the exception (or "nothing") and which of the names its message has; embed and head count as one."""
    try:
        loads(answer, tensors, build)
    except NotImplementedError:
        raise
    except (LookupError, ValueError, TypeError, RuntimeError, AttributeError, AssertionError) as error:
        message = str(error).replace(*HEAD)
        return [type(error).__name__, *sorted(name for name in names if name in message)]
    return ["nothing"]


# ---------------------------------------------------------------------------------------------------------- cases


@case(load_without_double_memory)
def tied_weights(answer, rng):
    """A weight with two names, stored under the first and then under the second; then one with three."""
    words, width = sizes(rng)
    observed = {}
    for tied in (HEAD, BLOCKS):
        build = functools.partial(Decoder, words, width, tied)
        for stored in tied:
            observed[stored] = seen(loads(answer, drawn(rng, words, width, tied, stored), build))
    names = [f"part_{rng.bytes(3).hex()}" for _ in range(4)]
    three = rng.shuffled(names)[:3]
    stored = rng.choice(three)
    held = {
        f"{name}.weight": rng.normal(width, width) for name in names if name == stored or name not in three
    }
    held |= {f"{name}.steps": rng.integers(1, 1000, 2) for name in names}
    return {
        **observed,
        "three": seen(loads(answer, held, functools.partial(NamedProjections, width, names, three))),
    }


@case(load_without_double_memory)
def dtypes_of_the_file(answer, rng):
    """A file whose dtypes are not those that the module declares."""
    words, width = sizes(rng)
    tensors = drawn(rng, words, width, HEAD, rng.choice(HEAD))
    dtypes = rng.shuffled([torch.bfloat16, torch.float16, torch.float64])
    for name, dtype in zip(("output_gain", "norm.weight", "blocks.0.weight"), dtypes, strict=True):
        tensors[name] = tensors[name].to(dtype)
    tensors["blocks.1.steps"] = tensors["blocks.1.steps"].to(torch.int32)
    tensors["blocks.1.weight"] = rng.integers(-127, 127, width, width, dtype=torch.int8)
    return seen(loads(answer, tensors, functools.partial(Decoder, words, width, HEAD, ["blocks.1.weight"])))


@case(load_without_double_memory)
def buffers_outside_the_file(answer, rng):
    """A rotary table and diagonals, which are in no file."""
    words, width = sizes(rng)
    module = loads(
        answer, drawn(rng, words, width, HEAD, HEAD[0]), functools.partial(Decoder, words, width, HEAD)
    )
    return {name: buffer.detach() for name, buffer in module.named_buffers()}


@case(load_without_double_memory)
def buffers_at_every_depth(answer, rng):
    """Modules that own such buffers inside one another, the outermost among them; Parameters of one value and none."""
    width, depth = 2 * rng.integer(2, 4), rng.integer(3, 4)

    def build() -> nn.Module:
        module: nn.Module = Projection(width)
        for _ in range(depth):
            module = Scaled(module)
        return module

    prefixes = ["inner." * level for level in range(depth)]
    tensors = {f"{prefix}scale": rng.normal() for prefix in prefixes}
    tensors |= {f"{prefix}unused": torch.zeros(0, 3) for prefix in prefixes}
    last = "inner." * depth
    tensors |= {f"{last}weight": rng.normal(width, width), f"{last}steps": rng.integers(1, 1000, 2)}
    return seen(loads(answer, tensors, build))


@case(load_without_double_memory)
def frozen_parameters(answer, rng):
    """Some parameters are frozen when the module is built, and one of them is tied."""
    words, width = sizes(rng)
    frozen = [HEAD[0], *rng.shuffled(["output_gain", "norm.bias", "blocks.0.weight", "blocks.1.weight"])[:2]]
    tensors = drawn(rng, words, width, HEAD, HEAD[1])
    return seen(loads(answer, tensors, functools.partial(Decoder, words, width, HEAD, frozen)))


@case(load_without_double_memory)
def built_on_meta(answer, rng):
    """Where torch makes tensors while `build` runs, how often it runs, and where afterwards, also when it raises."""
    words, width = sizes(rng)
    made, devices = [], []

    def build() -> nn.Module:
        devices.append(torch.get_default_device().type)
        made.append(Decoder(words, width, HEAD))
        return made[-1]

    def fails() -> nn.Module:
        devices.append(torch.get_default_device().type)
        raise MemoryError("no layers")

    afterwards = []
    module = loads(answer, drawn(rng, words, width, HEAD, HEAD[0]), build)
    afterwards.append(str(torch.get_default_device()))
    raised_by_build = raised(loads, answer, drawn(rng, words, width, HEAD, HEAD[0]), fails)
    afterwards.append(str(torch.get_default_device()))
    torch.set_default_device(None)
    found = {"devices": devices, "afterwards": afterwards, "raised": raised_by_build}
    return {**found, "returned": [module is one for one in made], **seen(module)}


@case(load_without_double_memory)
def missing_or_unexpected(answer, rng):
    """Files that lack a tensor, hold one too many, or have one renamed."""
    words, width = sizes(rng)
    tensors = drawn(rng, words, width, HEAD, rng.choice(HEAD))
    lost, renamed, *others = rng.shuffled(
        ["output_gain", "norm.weight", "norm.bias", "blocks.0.weight", "blocks.1.steps"]
    )
    rest = {name: tensor for name, tensor in tensors.items() if name != lost}
    files = {
        "lacking": rest,
        "surplus": {**tensors, "rotary.frequency": rng.normal(width // 2)},
        "renamed": {**{n: t for n, t in rest.items() if n != renamed}, "model.renamed": tensors[renamed]},
        "nothing tied": {name: tensor for name, tensor in tensors.items() if name not in HEAD},
    }
    names = [lost, renamed, *others, "rotary.frequency", "model.renamed", HEAD[1]]
    build = functools.partial(Decoder, words, width, HEAD)

    found = {file: refusal(answer, held, build, names) for file, held in files.items()}
    return {**found, "tensors": seen(loads(answer, tensors, build))["tensors"]}


@case(load_without_double_memory)
def other_shapes(answer, rng):
    """A tensor of another shape in the file: transposed, with a dimension more, one that would broadcast."""
    words, width = sizes(rng)
    tensors = drawn(rng, words, width, HEAD, rng.choice(HEAD))
    tied = next(name for name in tensors if name in HEAD)
    others = {
        tied: rng.normal(width, words),
        "output_gain": rng.normal(width, 1),
        "blocks.0.weight": rng.normal(1, width),
        "blocks.1.steps": rng.integers(1, 9, 3),
    }
    build = functools.partial(Decoder, words, width, HEAD)

    files = {f"other {name}": {**tensors, name: other} for name, other in others.items()}
    found = {file: refusal(answer, held, build, {*tensors, HEAD[1]}) for file, held in files.items()}
    return {**found, "tensors": seen(loads(answer, tensors, build))["tensors"]}


@case(load_without_double_memory)
def training_leaves_the_file_alone(answer, rng):
    """The loaded weights are changed in place; the file is read again."""
    words, width = sizes(rng)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file(drawn(rng, words, width, HEAD, HEAD[0]), path)
        module = answer(functools.partial(Decoder, words, width, HEAD), str(path))
        with torch.no_grad():
            module.head.weight.add_(1)
            module.output_gain.mul_(2)
        return {
            "file": path.read_bytes(),
            "embed": module.embed.weight.detach(),
            "gain": module.output_gain.detach(),
        }


LARGE_WIDTH, LARGE_LAYERS = 1024, 8
LARGE_FILE_BYTES = 4 * LARGE_LAYERS * LARGE_WIDTH**2 + (1 << 12)  # with its header, in whole pages


class Stack(nn.Module):
    """Layers of 4 MiB each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(LARGE_WIDTH, LARGE_WIDTH, bias=False) for _ in range(LARGE_LAYERS)
        )


@cost(
    load_without_double_memory,
    share=1 / 3,
    authority="outside",
    service=lambda rng: PeakOfItem(mapped_bytes=LARGE_FILE_BYTES),
)
def held_once(answer, rng, memory):
    """A file of 32 MiB is loaded and every weight of it is read."""
    values = [float(rng.integer(1, 100)) for _ in range(LARGE_LAYERS)]
    layer_bytes = 4 * LARGE_WIDTH**2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        entry = {"dtype": "F32", "shape": [LARGE_WIDTH, LARGE_WIDTH]}
        header = {
            f"layers.{i}.weight": {**entry, "data_offsets": [i * layer_bytes, (i + 1) * layer_bytes]}
            for i in range(LARGE_LAYERS)
        }
        # A layer at a time: what the case holds while it writes is inside the window too.
        with path.open("wb") as file:
            raw = json.dumps(header).encode()
            raw += b" " * (-len(raw) % 8)
            file.write(len(raw).to_bytes(8, "little") + raw)
            for value in values:
                torch.full((LARGE_WIDTH, LARGE_WIDTH), value).numpy().tofile(file)
        settle()
        module = answer(Stack, str(path))
        means = [float(layer.weight.detach().mean()) for layer in module.layers]
        payload_bytes = LARGE_LAYERS * layer_bytes
        memory.bound(int(1.05 * payload_bytes) + min(memory_error_bytes(), payload_bytes // 4))
    return {"layers with other weights": (sum(m != v for m, v in zip(means, values, strict=True)), 0)}


# ------------------------------------------------------------------------------------------------------- mistakes


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, tensor)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def checked(module: nn.Module, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensor for each name of the module; refuses names and shapes that do not fit."""
    state = module.state_dict(keep_vars=True)
    found = {id(state[name]): tensor for name, tensor in stored.items() if name in state}
    wrong = [name for name in state if id(state[name]) not in found] + [n for n in stored if n not in state]
    if wrong:
        raise KeyError(f"in one and not in the other: {wrong}")
    full = {name: found[id(tensor)] for name, tensor in state.items()}
    for name, tensor in full.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(state[name].shape)}")
    return full


def assign(module: nn.Module, full: dict[str, Tensor]) -> None:
    """Put tensors in place, one Parameter for all names of a tied weight."""
    made: dict[int, Tensor] = {}
    for name, old in module.state_dict(keep_vars=True).items():
        if id(old) not in made:
            trained = old.requires_grad
            made[id(old)] = nn.Parameter(full[name], trained) if isinstance(old, nn.Parameter) else full[name]
        put(module, name, made[id(old)])


def reset(module: nn.Module) -> nn.Module:
    for part in module.modules():
        getattr(part, "reset_buffers", lambda: None)()
    return module


@mistake(
    load_without_double_memory,
    "The module is built with real weights, then the file is copied into it: both are in memory at once.",
    fails=["dtypes_of_the_file", "built_on_meta", "held_once"],
)
def build_then_copy(build, path):
    module = build()
    full = checked(module, load(Path(path).read_bytes()))
    module.load_state_dict(full)
    return reset(module)


@mistake(
    load_without_double_memory,
    "Buffers that the file does not hold stay on the meta device.",
    fails=[
        "tied_weights",
        "dtypes_of_the_file",
        "buffers_outside_the_file",
        "frozen_parameters",
        "built_on_meta",
        "missing_or_unexpected",
        "other_shapes",
        "buffers_at_every_depth",
    ],
)
def buffers_on_meta(build, path):
    module = on_meta(build)
    assign(module, checked(module, load_file(path)))
    return module


@mistake(
    load_without_double_memory,
    "Buffers that the file does not hold get memory and no values.",
    fails=[
        "tied_weights",
        "dtypes_of_the_file",
        "buffers_outside_the_file",
        "frozen_parameters",
        "built_on_meta",
        "missing_or_unexpected",
        "other_shapes",
        "buffers_at_every_depth",
    ],
)
def buffers_without_values(build, path):
    module = on_meta(build)
    assign(module, checked(module, load_file(path)))
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            put(module, name, torch.zeros_like(buffer, device="cpu"))
    return module


@mistake(
    load_without_double_memory,
    "Buffers are made anew before the weights they depend on are in place.",
    fails=[
        "tied_weights",
        "dtypes_of_the_file",
        "buffers_outside_the_file",
        "frozen_parameters",
        "built_on_meta",
        "missing_or_unexpected",
        "other_shapes",
        "buffers_at_every_depth",
    ],
)
def buffers_too_early(build, path):
    module = reset(on_meta(build))
    assign(module, checked(module, load_file(path)))
    return module


def reset_some(
    build: Callable[[], nn.Module], path: str, chosen: Callable[[nn.Module], Iterable]
) -> nn.Module:
    """A right load, but for which modules make their buffers anew."""
    module = on_meta(build)
    assign(module, checked(module, load_file(path)))
    for part in chosen(module):
        getattr(part, "reset_buffers", lambda: None)()
    return module


@mistake(
    load_without_double_memory,
    "Only modules without parts make their buffers anew.",
    fails=["buffers_at_every_depth"],
)
def innermost_buffers_only(build, path):
    return reset_some(build, path, lambda module: [m for m in module.modules() if not [*m.children()]])


@mistake(
    load_without_double_memory,
    "The parts of the module make their buffers anew, and the module itself does not.",
    fails=["buffers_at_every_depth"],
)
def outermost_buffers_forgotten(build, path):
    return reset_some(build, path, lambda module: [part for part in module.modules() if part is not module])


@mistake(
    load_without_double_memory,
    "Looks for buffers two modules deep and no deeper.",
    fails=["buffers_at_every_depth"],
)
def buffers_two_deep(build, path):
    def chosen(module):
        return [part for name, part in module.named_modules() if name.count(".") < 2]

    return reset_some(build, path, chosen)


@mistake(
    load_without_double_memory,
    "Sets the default device and sets it back by hand: when `build` raises, it stays meta.",
    fails=["built_on_meta"],
)
def default_device_left(build, path):
    torch.set_default_device("meta")
    module = build()
    torch.set_default_device(None)
    assign(module, checked(module, load_file(path)))
    return reset(module)


@mistake(
    load_without_double_memory,
    "A second module is built with real weights for the sake of its buffers.",
    fails=[
        "tied_weights",
        "dtypes_of_the_file",
        "buffers_outside_the_file",
        "frozen_parameters",
        "built_on_meta",
        "missing_or_unexpected",
        "other_shapes",
        "buffers_at_every_depth",
    ],
)
def built_again_for_buffers(build, path):
    module, other = on_meta(build), build()
    assign(module, checked(module, load_file(path)))
    for name, buffer in other.named_buffers():
        if name not in module.state_dict():
            put(module, name, buffer)
    return module


@mistake(
    load_without_double_memory,
    "strict=False: a renamed weight is neither loaded nor reported.",
    fails=["missing_or_unexpected"],
)
def not_strict(build, path):
    module = on_meta(build)
    state, stored = module.state_dict(keep_vars=True), load_file(path)
    names = {id(state[name]): name for name in stored if name in state}
    full = {name: stored[names[id(old)]] if id(old) in names else old for name, old in state.items()}
    for name, tensor in full.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(state[name].shape)}")
    assign(module, full)
    return reset(module)


@mistake(
    load_without_double_memory,
    "Tensors of the file that the module does not have are ignored.",
    fails=["missing_or_unexpected"],
)
def surplus_ignored(build, path):
    module = on_meta(build)
    stored = load_file(path)
    assign(module, checked(module, {name: stored[name] for name in stored if name in module.state_dict()}))
    return reset(module)


@mistake(
    load_without_double_memory,
    "Each name of a tied weight gets a Parameter of its own.",
    fails=["tied_weights", "dtypes_of_the_file", "frozen_parameters", "built_on_meta"],
)
def tie_broken(build, path):
    module = on_meta(build)
    module.load_state_dict(checked(module, load_file(path)), assign=True)
    return reset(module)


@mistake(
    load_without_double_memory,
    "A tied weight is looked for under its first name only.",
    fails=[
        "tied_weights",
        "dtypes_of_the_file",
        "buffers_outside_the_file",
        "built_on_meta",
        "missing_or_unexpected",
        "other_shapes",
        "training_leaves_the_file_alone",
    ],
)
def first_name_only(build, path):
    module = on_meta(build)
    state, stored = module.state_dict(keep_vars=True), load_file(path)
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    wrong = sorted(set(first.values()) ^ set(stored))
    if wrong:
        raise KeyError(f"in one and not in the other: {wrong}")
    assign(module, checked(module, stored))
    return reset(module)


@mistake(
    load_without_double_memory,
    "The file's tensors are cast to the dtype that the module declares.",
    fails=["dtypes_of_the_file"],
)
def cast_to_the_module(build, path):
    module = on_meta(build)
    state = module.state_dict()
    assign(module, {name: t.to(state[name].dtype) for name, t in checked(module, load_file(path)).items()})
    return reset(module)


@mistake(
    load_without_double_memory,
    "New Parameters are trained, whatever the old ones were.",
    fails=["frozen_parameters"],
)
def everything_trained(build, path):
    module = on_meta(build)
    assign(module, checked(module, load_file(path)))
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return reset(module)


@mistake(
    load_without_double_memory,
    "As many elements are taken for the same shape, so a transposed weight is let in.",
    fails=["other_shapes"],
)
def reshaped(build, path):
    module = on_meta(build)
    stored, state = load_file(path), module.state_dict()
    fitting = {
        name: t.view_as(state[name]) if name in state and t.numel() == state[name].numel() else t
        for name, t in stored.items()
    }
    assign(module, checked(module, {n: t.clone() for n, t in fitting.items()}))
    return reset(module)


@mistake(
    load_without_double_memory, "No shape is looked at when tensors are put in place.", fails=["other_shapes"]
)
def any_shape(build, path):
    module = on_meta(build)
    stored, state = load_file(path), module.state_dict()
    fitting = {name: torch.empty_like(state[name]) if name in state else t for name, t in stored.items()}
    checked(module, fitting)
    names = {id(t): n for n, t in module.state_dict(keep_vars=True).items() if n in stored}
    assign(module, {n: stored[names[id(t)]] for n, t in module.state_dict(keep_vars=True).items()})
    return reset(module)


@mistake(
    load_without_double_memory,
    "The whole file is read and tensors are made of its bytes: both are in memory at once.",
    fails=["held_once"],
)
def read_then_cloned(build, path):
    module = on_meta(build)
    tensors = {name: tensor.clone() for name, tensor in load(Path(path).read_bytes()).items()}
    assign(module, checked(module, tensors))
    return reset(module)


@mistake(
    load_without_double_memory,
    "The file is mapped to be written to, so the first step of training changes the checkpoint.",
    fails=["training_leaves_the_file_alone"],
)
def shared_map(build, path):
    module = on_meta(build)
    size_bytes = Path(path).stat().st_size
    raw = torch.from_file(path, shared=True, size=size_bytes, dtype=torch.uint8)
    stored = load_file(path)
    start = size_bytes - sum(tensor.nbytes for tensor in stored.values())
    origin = min(tensor.data_ptr() for tensor in stored.values() if tensor.numel())
    mapped = {}
    for name, tensor in stored.items():
        offset = start + tensor.data_ptr() - origin if tensor.numel() else 0
        mapped[name] = raw[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    assign(module, checked(module, mapped))
    return reset(module)


# --------------------------------------------------------------------------------------------------- alternatives


@alternative(load_without_double_memory, "Hands Parameters, tied ones twice, to load_state_dict(assign=True)")
def through_load_state_dict(build, path):
    module = on_meta(build)
    full = checked(module, load_file(path))
    made: dict[int, Tensor] = {}
    for name, old in module.state_dict(keep_vars=True).items():
        if isinstance(old, nn.Parameter):
            full[name] = made.setdefault(id(old), nn.Parameter(full[name], requires_grad=old.requires_grad))
    module.load_state_dict(full, assign=True)
    return reset(module)


@alternative(load_without_double_memory, "Copies one tensor after another into memory of its own")
def copied_one_by_one(build, path):
    module = on_meta(build)
    with safe_open(path, "pt") as file:
        full = checked(module, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, not a dict
    own: dict[int, Tensor] = {}
    for name, tensor in full.items():
        full[name] = own.setdefault(tensor.data_ptr(), tensor.clone())
    assign(module, full)
    return reset(module)


@alternative(load_without_double_memory, "Gives the module empty memory, then copies the file into it")
def emptied_then_filled(build, path):
    module = on_meta(build)
    full = checked(module, load_file(path))
    state = module.state_dict(keep_vars=True)
    assign(module, {name: torch.empty_like(full[name]) for name in state})
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            tensor.copy_(full[name])
    return reset(module)
