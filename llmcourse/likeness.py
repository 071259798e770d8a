"""Whether two answers are the same program: a normal form of a definition's syntax tree, and a digest of it.

What a copy usually changes is not in it: comments, layout, docstrings, annotations, and the names of the definition
itself, of its parameters and of its variables. A short exercise has few sensible answers, so sameness is a flag for
a person to look at and proves nothing.
"""

from __future__ import annotations

import ast
import hashlib
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


def _digest(node: Definition) -> str:
    plain = _Plain().visit(node)
    names: dict[str, str] = {plain.name: "itself"}
    for each in ast.walk(plain):
        if isinstance(each, ast.arg):
            names.setdefault(each.arg, f"name {len(names)}")
        elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            names.setdefault(each.id, f"name {len(names)}")
    for each in ast.walk(plain):
        if isinstance(each, ast.arg):
            each.arg = names[each.arg]
        elif isinstance(each, ast.Name):
            each.id = names.get(each.id, each.id)
        elif isinstance(each, Definition):
            each.name = names.get(each.name, each.name)
    return hashlib.sha256(ast.dump(plain).encode("utf-8", "surrogatepass")).hexdigest()[:32]


class _Plain(ast.NodeTransformer):
    """Drops what says nothing about what is computed."""

    def _plain(self, node: Any) -> Any:
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        node.decorator_list = []
        if hasattr(node, "returns"):
            node.returns = None
        return self.generic_visit(node)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _plain

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        self.generic_visit(node)
        if node.value is None:
            return ast.Pass()
        return ast.copy_location(ast.Assign(targets=[node.target], value=node.value), node)


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
