"""Mechanical mutants: one change each, everywhere an answer does something, and nowhere else."""

from __future__ import annotations

import ast

import pytest

from llmcourse.mutants import mutants


def names(text: str) -> list[str]:
    return [mutant.name for mutant in mutants(text)]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("return a + b", ["return a + b -> return None", "a + b -> a - b"]),
        ("return a @ b", ["return a @ b -> return None", "a @ b -> a * b"]),
        ("return a << 1", ["return a << 1 -> return None", "a << 1 -> a >> 1", "1 -> 2", "1 -> 0"]),
        ("return a < b", ["return a < b -> return None", "a < b -> a <= b", "a < b -> a > b"]),
        ("return a in b", ["return a in b -> return None", "a in b -> a not in b"]),
        (
            "return a < b < c",
            ["a < b < c -> a <= b < c", "a < b < c -> a > b < c", "a < b < c -> a < b <= c"],
        ),
        ("return not a", ["return not a -> return None", "not a -> a"]),
        (
            "return a and b",
            ["return a and b -> return None", "a and b -> a or b", "a and b -> b", "a and b -> a"],
        ),
        ("return a if b else c", ["a if b else c -> a", "a if b else c -> c"]),
        ("return -1", ["-1 -> 1", "1 -> 2", "1 -> 0"]),
        ("return 0", ["0 -> 1", "0 -> -1"]),
        ("return 0.5", ["0.5 -> 1.0", "0.5 -> 0.25"]),
        ("return 0.0", ["0.0 -> 1.0"]),
        ("return True", ["True -> False"]),
        ("return 'text'", ["return 'text' -> return None"]),
        ("return x.abs()", ["x.abs() -> x"]),
        ("return torch.abs(x)", ["torch.abs(x) -> x"]),
        ("return x.T", ["x.T -> x"]),
        ("return max(a, b)", ["max(a, b) -> min(a, b)", "max(a, b) -> max(b, a)"]),
        (
            "return x.sum(dim=1)",
            ["x.sum(dim=1) -> x.mean(dim=1)", "x.sum(dim=1) -> x.sum()", "x.sum(dim=1) -> x.sum(dim=0)"],
        ),
        ("return f(a, b)", ["f(a, b) -> f(b, a)"]),
        ("return f(a, key=b)", ["f(a, key=b) -> f(a)"]),
        ("a += b", ["a += b -> a -= b", "a += b -> dropped"]),
        ("x.step()", ["x.step() -> dropped"]),
        ("a = b", ["a = b -> dropped"]),
        ("del a", ["del a -> dropped"]),
        ("raise ValueError('no')", ["raise ValueError('no') -> dropped"]),
        ("assert a", ["assert a -> dropped"]),
        ("if a:\n        f()", ["if a: … -> if not a: …", "if a: … -> dropped", "f() -> dropped"]),
        ("while a:\n        break", ["while a: … -> while not a: …", "break -> continue"]),
        ("for i in a:\n        continue", ["for i in a: … -> dropped", "continue -> break"]),
        ("with a:\n        f()", ["with a: … -> dropped"]),
        ("try:\n        f()\n    finally:\n        g()", ["try: … -> dropped", "g() -> dropped"]),
    ],
    ids=lambda value: value.splitlines()[0] if isinstance(value, str) else "",
)
def test_each_kind_of_statement_and_expression_is_changed(statement, expected):
    found = names(f"def f(a, b, c, x):\n    {statement}")
    assert set(expected) <= set(found), found


def test_what_an_answer_does_not_do_is_left_alone():
    text = '''
def f(x: Literal[3] = None, *, axis=None) -> Annotated[int, 1 + 1]:
    """Adds 1 + 1, or 5 < 6."""
    size: Optional[2 - 1] = x
    raise ValueError(f"{x + 1} is not {3 * 2}")
'''
    assert names(text) == ["raise ValueError(f'{x + 1} is not {3 * 2}') -> dropped"]


def test_defaults_are_part_of_what_an_answer_does():
    assert {"1e-08 -> 2e-08", "True -> False"} <= set(
        names("def f(x, eps=1e-8, *, keep=True):\n    return x")
    )


EXAMPLE = '''
class Layer(torch.nn.Module):
    """A layer."""

    scale = 2

    def __init__(self, n):
        super().__init__()
        self.n = n

    @staticmethod
    def apply(x, n):
        if n > 0 and x.dim() == 2:
            for i in range(n):
                x = x + 1
        return [x[0], x[0].abs(), {"a": -x}]
'''


def test_every_mutant_differs_from_the_original_in_one_place_and_is_python():
    original = ast.unparse(ast.parse(EXAMPLE))
    found = mutants(EXAMPLE)
    assert len(found) > 20
    for mutant in found:
        ast.parse(mutant.source)
        assert mutant.source != original
        changed = set(mutant.source.splitlines()) ^ set(original.splitlines())
        # One line becomes another; a dropped loop or condition takes its body along.
        assert len(changed) <= 2 or mutant.name.endswith("dropped"), mutant.name


def test_no_two_mutants_have_one_name_or_one_source():
    found = mutants(EXAMPLE)
    assert len({mutant.name for mutant in found}) == len({mutant.source for mutant in found}) == len(found)
    assert "0 -> 1 #2" in {mutant.name for mutant in found}  # two zeros in one line of indices


def test_the_names_do_not_depend_on_how_the_source_is_laid_out():
    spread = EXAMPLE.replace(
        "x = x + 1", "x = (\n                    x  # a comment\n                    + 1)"
    )
    assert [m.name for m in mutants(spread)] == [m.name for m in mutants(EXAMPLE)]


def test_a_mutant_of_a_working_function_gives_other_answers():
    text = "def f(x):\n    total = 0\n    for part in x:\n        total += 2 * part\n    return total"
    space: dict = {}
    exec(text, space)
    survivors = []
    for mutant in mutants(text):
        changed: dict = {}
        exec(mutant.source, changed)
        try:
            if changed["f"]([1, 5]) == space["f"]([1, 5]):
                survivors.append(mutant.name)
        except (NameError, TypeError, UnboundLocalError):
            continue
    assert survivors == []
