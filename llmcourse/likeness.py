"""Whether two answers are the same program: a normal form of a definition's syntax tree, and a digest of it.

What a copy usually changes is not in it: comments, layout, docstrings, annotations, and the names of the definition
itself, of its parameters and of its variables. A short exercise has few sensible answers, so sameness is a flag for
a person to look at and proves nothing.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from typing import Any

from llmcourse.source import Definition, parse

UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def form(text: str, name: str) -> str:
    """A digest of the normal form of the last top-level definition of `name`; "" where there is none or only a stub."""
    try:
        found = [node for node in parse(text).body if isinstance(node, Definition) and node.name == name]
        if not found or _is_stub(found[-1]):
            return ""
        return _digest(found[-1])
    except UNPARSABLE:
        return ""


# What says nothing about what is computed, nor would be the same in a copy.
_LEFT_OUT = frozenset(
    ("annotation", "ctx", "decorator_list", "kind", "returns", "type_comment", "type_params")
)


def _digest(node: Definition) -> str:
    names = {node.name: "itself"}
    _name(node, names)
    told: list[str] = []
    _tell(node, names, told)
    return hashlib.sha256("\0".join(told).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _parts(node: ast.AST) -> Iterator[Any]:
    """What a node consists of, in the order of its fields, as far as it counts."""
    if isinstance(node, ast.AnnAssign):
        yield from ([node.target], node.value) if node.value is not None else ()
        return
    for field in node._fields:
        if field not in _LEFT_OUT:
            part = getattr(node, field, None)
            if field == "body" and isinstance(node, Definition) and _is_docstring(node.body):
                part = node.body[1:]
            yield part


def _is_docstring(body: list[ast.stmt]) -> bool:
    first = body[0]
    return (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )


def _name(node: Any, names: dict[str, str]) -> None:
    """Number the parameters and variables below a node as they come."""
    if isinstance(node, list):
        for part in node:
            _name(part, names)
    elif isinstance(node, ast.AST):
        if isinstance(node, ast.arg):
            names.setdefault(node.arg, f"name {len(names)}")
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                names.setdefault(node.id, f"name {len(names)}")
        else:
            for part in _parts(node):
                _name(part, names)


def _tell(node: Any, names: dict[str, str], told: list[str]) -> None:
    """The tree as a list of texts, in which nothing can be told apart that means the same."""
    if isinstance(node, list):
        told.append(f"{len(node)} of")
        for part in node:
            _tell(part, names, told)
    elif not isinstance(node, ast.AST):
        told.append(repr(node))
    elif isinstance(node, ast.arg):
        told.append(f"arg {names[node.arg]}")
    elif isinstance(node, ast.Name):
        told.append(f"Name {names.get(node.id, node.id)}")
    elif isinstance(node, ast.AnnAssign):
        told.append("Assign" if node.value is not None else "Pass")
        for part in _parts(node):
            _tell(part, names, told)
    else:
        told.append(type(node).__name__)
        for part in _parts(node):
            # Of a definition's fields its name alone is a text.
            is_name = isinstance(node, Definition) and isinstance(part, str)
            _tell(names.get(part, part) if is_name else part, names, told)


def _is_stub(node: Definition) -> bool:
    """Whether nothing is left of a definition but refusals: every body raises NotImplementedError and does no more."""
    inner = [each for each in node.body if isinstance(each, Definition)]
    rest = [each for each in node.body if each not in inner]
    if rest and isinstance(rest[0], ast.Expr) and isinstance(rest[0].value, ast.Constant):
        rest = rest[1:]
    raises = all(
        isinstance(each, ast.Raise) and "NotImplementedError" in ast.dump(each) for each in rest
    ) and bool(rest or inner)
    return raises and all(map(_is_stub, inner))
