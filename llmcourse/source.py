"""The texts an exercise's file is cut into: the statement, the stub, and what a worker may see of its cases.

Everything is cut from the file's own text with `ast`; nothing is imported and there is no second copy anywhere.
"""

from __future__ import annotations

import ast
import functools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = "raise NotImplementedError"
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class SourceError(ValueError):
    """An exercise's file that cannot be cut: says where and what is expected."""


_parsing = threading.Lock()


def parse(text: str) -> ast.Module:
    """`ast.parse`, one thread at a time: Python 3.11 raises SystemError when two build a tree at once (gh-106905)."""
    with _parsing:
        return ast.parse(text)


def definition(text: str, name: str, path: Path | str = "exercise") -> str:
    """Source of the top-level function or class `name`, comments kept, decorators left out."""
    tree = parse(text)
    for index, node in enumerate(tree.body):
        if isinstance(node, Definition) and node.name == name:
            following = tree.body[index + 1] if index + 1 < len(tree.body) else None
            return _lines_of(text, node, following)
    raise SourceError(f"{path}: expected a function or class named {name} at the top level; found none")


def _lines_of(text: str, node: Definition, following: ast.stmt | None) -> str:
    lines = text.split("\n")  # as Python counts lines; splitlines would also break at a form feed
    end = node.end_lineno or node.lineno
    # A closing marker after the last statement is a comment, which the syntax tree does not hold.
    limit = len(lines) if following is None else _first_line(following) - 1
    for number in range(end, limit):
        line = lines[number]
        if line.strip() and not line[:1].isspace():
            break
        if line.strip() == END:
            end = number + 1
    return "\n".join(lines[node.lineno - 1 : end])


def _first_line(node: ast.stmt) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def stub(text: str, path: Path | str = "exercise") -> str:
    """The source with every solution region replaced by `raise NotImplementedError`, as nbgrader does it."""
    kept: list[str] = []
    inside = False
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() == BEGIN:
            if inside:
                raise SourceError(f"{path}:{number}: {BEGIN} inside a solution; expected {END} first")
            inside = True
            kept.append(line[: len(line) - len(line.lstrip())] + STUB)
        elif line.strip() == END:
            if not inside:
                raise SourceError(f"{path}:{number}: {END} without {BEGIN} above it")
            inside = False
        elif not inside:
            kept.append(line)
    if inside:
        raise SourceError(f"{path}: {BEGIN} without {END} below it")
    if STUB not in "\n".join(kept):
        raise SourceError(f"{path}: no solution is marked; expected {BEGIN} and {END} around it")
    return "\n".join(kept)


def bound_names(node: ast.stmt) -> list[str]:
    """Names a top-level statement binds or changes: definitions, assignments (`table[0] = 1` too), imports."""
    if isinstance(node, Definition):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    return [name for target in targets for name in _target_names(target)]


def _target_names(target: ast.expr) -> list[str]:
    if isinstance(target, ast.Tuple | ast.List):
        return [name for part in target.elts for name in _target_names(part)]
    while isinstance(target, ast.Attribute | ast.Subscript | ast.Starred):
        target = target.value
    return [target.id] if isinstance(target, ast.Name) else []


def used_names(node: ast.AST) -> set[str]:
    """Names a statement reads from outside: a function's own parameters and variables are left out."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        inner = node.body if isinstance(node.body, list) else [node.body]
        own = {part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)}
        own |= {name for statement in inner for name in _stored_names(statement)}
        outer = [*getattr(node, "decorator_list", []), *_outside_a_body(node)]
        return set().union(*map(used_names, inner)) - own | set().union(*map(used_names, outer))
    if isinstance(node, ast.Name):
        return {node.id}
    return set().union(*map(used_names, ast.iter_child_nodes(node)))


def _outside_a_body(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[ast.AST]:
    """Defaults and annotations, which are evaluated where the function is defined."""
    return [node.args, *filter(None, [getattr(node, "returns", None)])]


def _stored_names(node: ast.AST) -> Iterator[str]:
    """Names a function's own body binds; those of functions and classes inside it are theirs."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from bound_names(node)
    if isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name
    if isinstance(node, Definition):
        yield node.name
    elif not isinstance(node, ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _stored_names(child)


def case_source(text: str, roots: Iterable[str], hidden: Iterable[str], path: Path | str = "exercise") -> str:
    """Source of the cases and costs in `roots` and of what they reach by name, nothing else.

    hidden: reference, mistakes and alternatives; a case that reaches one is an error, since a case gets the answer
    as an argument. The decorators of the roots are left out, so what they name (judges, services) stays behind
    too; those of what a root reaches are kept.
    """
    return _case_source(text, tuple(roots), frozenset(hidden), str(path))


@functools.lru_cache(maxsize=256)
def _case_source(text: str, wanted_names: tuple[str, ...], secret: frozenset[str], path: str) -> str:
    tree = parse(text)
    roots = list(wanted_names)
    owners: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        if isinstance(node, Definition) and node.name in roots:
            node.decorator_list = []
        for name in bound_names(node):
            owners.setdefault(name, []).append(node)
    wanted, queue = set[int](), roots
    reached: set[str] = set()
    while queue:
        name = queue.pop()
        if name in reached or name not in owners:
            continue
        if name in secret:
            raise SourceError(f"{path}: a case reaches {name} by name; a case gets the answer as an argument")
        reached.add(name)
        for node in owners[name]:
            wanted.add(id(node))
            if not isinstance(node, ast.Import | ast.ImportFrom):
                queue.extend(used_names(node))
    kept: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            kept.append(node)
        elif id(node) in wanted:
            kept.append(_only(node, reached))
    return ast.unparse(ast.Module(body=kept, type_ignores=[]))


def _only(node: ast.stmt, names: set[str]) -> ast.stmt:
    if isinstance(node, ast.Import | ast.ImportFrom):
        aliases = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in names]
        if isinstance(node, ast.ImportFrom):
            return ast.ImportFrom(node.module, aliases, node.level)
        return ast.Import(aliases)
    return node


def imports_of(text: str) -> str:
    """The import statements at the top level of a source, as source; those of the course's lessons left out."""
    tree = parse(text)
    kept: list[ast.stmt] = [
        node
        for node in tree.body
        if isinstance(node, ast.Import)
        or (isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("llmcourse.lessons"))
    ]
    return ast.unparse(ast.Module(body=kept, type_ignores=[]))
