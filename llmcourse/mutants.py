"""Mechanical mutants: small wrong versions of a reference, made from its syntax tree.

Each mutant changes one place: an operator, a comparison, a constant, an axis, a minimum, a condition, an argument; or
it drops a statement, a clamp, a transpose. A check that lets one live does not check that place, unless the mutant
gives the same answers, which an `excuse` beside the exercise says in one line.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from llmcourse import source

OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
SWAPPED_NAMES = {
    "min": "max",
    "max": "min",
    "amin": "amax",
    "amax": "amin",
    "argmin": "argmax",
    "argmax": "argmin",
    "minimum": "maximum",
    "maximum": "minimum",
    "floor": "ceil",
    "ceil": "floor",
    "round": "floor",
    "sum": "mean",
    "mean": "sum",
    "any": "all",
    "all": "any",
    "repeat_interleave": "repeat",
    "tril": "triu",
    "triu": "tril",
    "add_": "sub_",
    "sub_": "add_",
    "mul_": "div_",
    "div_": "mul_",
}
DROPPED_METHODS = (
    *(
        "abs",
        "sqrt",
        "clamp",
        "clamp_min",
        "clamp_max",
        "clamp_",
        "transpose",
        "t",
        "mT",
        "T",
        "round",
        "trunc",
        "flip",
    ),
    *(
        "contiguous",
        "clone",
        "detach",
        "unsqueeze",
        "squeeze",
        "sort",
        "sorted",
        "reversed",
        "float",
        "double",
        "square",
    ),
)
AXIS_KEYWORDS = ("dim", "axis")
DROPPED_STATEMENTS = (ast.For, ast.With, ast.Try, ast.Expr, ast.Assign, ast.Delete, ast.Raise, ast.Assert)


@dataclass(frozen=True)
class Mutant:
    """One wrong version: `name` says what was changed, `source` is the whole definition."""

    name: str
    source: str


def mutants(definition_source: str) -> list[Mutant]:
    """Every mutant of a function's or class's source, names unique, the unchanged text left out."""
    tree = source.parse(definition_source)
    original = ast.unparse(tree)
    found, seen, names = [], {original}, Counter[str]()
    for name, text in _versions(tree):
        if text in seen:
            continue
        seen.add(text)
        names[name] += 1
        found.append(Mutant(name if names[name] == 1 else f"{name} #{names[name]}", text))
    return found


def _versions(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(what was changed, text) for each change; the tree is changed in place and put back."""
    for node, parent, field, index in _places(tree):
        for replacement in _replacements(node):
            before = _text(node)
            _put(parent, field, index, replacement)
            try:
                text = ast.unparse(tree)
            finally:
                _put(parent, field, index, node)
            after = _text(replacement) if not isinstance(replacement, ast.Pass) else "dropped"
            yield f"{before} -> {after}", text


def _places(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST, str, int | None]]:
    """Every node that belongs to what an answer does: not annotations, docstrings, decorators or error messages."""
    queue: list[ast.AST] = [tree]
    while queue:
        parent = queue.pop(0)
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list", "type_params") or isinstance(
                parent, ast.Raise
            ):
                continue
            if isinstance(parent, ast.JoinedStr | ast.FormattedValue):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(node, ast.AST) or _is_docstring(parent, field, index, node):
                    continue
                queue.append(node)
                yield node, parent, field, index


def _is_docstring(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> bool:
    owner = isinstance(parent, ast.FunctionDef | ast.ClassDef | ast.Module)
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return owner and field == "body" and constant


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _text(node: ast.AST) -> str:
    lines = ast.unparse(node).splitlines()
    return lines[0] + (" …" if len(lines) > 1 else "")


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
        yield ast.Pass()
    elif isinstance(node, ast.Compare):
        yield from _comparisons(node)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for index in range(len(node.values)):
            rest = [*node.values[:index], *node.values[index + 1 :]]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from _constants(node)
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.stmt):
        yield from _statements(node)


def _comparisons(node: ast.Compare) -> Iterator[ast.AST]:
    for index, operator in enumerate(node.ops):
        for other in COMPARISONS.get(type(operator), ()):
            yield ast.Compare(
                node.left, [*node.ops[:index], other(), *node.ops[index + 1 :]], node.comparators
            )


def _constants(node: ast.Constant) -> Iterator[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
        yield ast.Constant(value - 1) if value > 0 else ast.UnaryOp(ast.USub(), ast.Constant(1 - value))
    elif isinstance(value, float):
        yield ast.Constant(value * 2 if value else 1.0)
        yield ast.Constant(value / 2)


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in SWAPPED_NAMES:
        swapped = copy.copy(function)
        setattr(swapped, "attr" if isinstance(swapped, ast.Attribute) else "id", SWAPPED_NAMES[name])
        yield ast.Call(swapped, node.args, node.keywords)
    if name in DROPPED_METHODS:
        if isinstance(function, ast.Attribute) and not _is_module(function.value):
            yield function.value
        elif node.args:
            yield node.args[0]
    if len(node.args) == 2 and not any(isinstance(part, ast.Starred) for part in node.args):
        yield ast.Call(function, node.args[::-1], node.keywords)
    for index, keyword in enumerate(node.keywords):
        yield ast.Call(function, node.args, [*node.keywords[:index], *node.keywords[index + 1 :]])
        if keyword.arg in AXIS_KEYWORDS and isinstance(keyword.value, ast.Constant | ast.UnaryOp):
            for axis in (0, 1):
                changed = ast.keyword(keyword.arg, ast.Constant(axis))
                yield ast.Call(
                    function, node.args, [*node.keywords[:index], changed, *node.keywords[index + 1 :]]
                )


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "np", "numpy", "math", "F", "os", "json")


def _statements(node: ast.stmt) -> Iterator[ast.AST]:
    if isinstance(node, ast.If | ast.While):
        kind = type(node)
        yield kind(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        yield ast.Pass()
    elif isinstance(node, DROPPED_STATEMENTS):
        yield ast.Pass()
    elif isinstance(node, ast.Break):
        yield ast.Continue()
    elif isinstance(node, ast.Continue):
        yield ast.Break()
    elif isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))
