"""Which operators of the deciding code could be wrong without a test noticing.

Usage: nice -n 19 .venv/bin/python scripts/mutate.py [FILE ...] [--seconds 180]
Flips one comparison, `and`/`or`, `not`, `+`/`-` or sign at a time, in a temporary copy, and runs the fast tests of that
file with `-x -q`. Prints the operators that survive; exits 1 where one is not listed in `EQUIVALENT` with its reason.
Each run is a fork of a process that has torch loaded: a killed mutant takes one to ten seconds.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMERICS = ("tests/numerics/test_sequences.py", "tests/numerics/test_betting.py")
TESTS: dict[str, tuple[str, ...]] = {
    "compress/numerics/sequences.py": (*NUMERICS, "tests/test_decisions.py"),
    "compress/numerics/betting.py": (*NUMERICS, "tests/test_decisions.py"),
    "compress/decisions.py": (*NUMERICS, "tests/test_decisions.py"),
    "compress/gate.py": ("tests/test_decisions.py", "tests/test_gate.py"),
}
OTHERS: dict[type[ast.AST], tuple[str, ...]] = {
    ast.Lt: (">=", "<="),
    ast.LtE: (">", "<"),
    ast.Gt: ("<=", ">="),
    ast.GtE: ("<", ">"),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
    ast.And: ("or",),
    ast.Or: ("and",),
    ast.Add: ("-",),
    ast.Sub: ("+",),
    ast.Not: ("",),
    ast.USub: ("",),
}
SYMBOLS: dict[type[ast.AST], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
    ast.And: "and",
    ast.Or: "or",
    ast.Add: "+",
    ast.Sub: "-",
    ast.Not: "not",
    ast.USub: "-",
}
# (file, line without its surrounding space, mutation) → why no test can tell the difference.
_TOUCH = "two floating-point sums would have to be equal to the last bit"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "compress/numerics/betting.py",
        "return bool(len(values)) and bool(log_capital(values, mean).max() >= -math.log(alpha))",
        ">= → >",
    ): _TOUCH,
    (
        "compress/numerics/betting.py",
        "return bool((n * growth - z * stakes * sd * math.sqrt(n) >= need).any())",
        ">= → >",
    ): _TOUCH,
}


@dataclass(frozen=True)
class Mutant:
    """One operator replaced: characters start to end of a file become `new`."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str
    code: str  # the line as it was

    @property
    def name(self) -> tuple[str, str, str]:
        """What `EQUIVALENT` lists it by."""
        return self.file, self.code, f"{self.old} → {self.new}"


def mutants(file: str) -> list[Mutant]:
    """Every mutant of a file, in the order of the text."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:  # ast counts bytes
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    found = []
    for node, left, right, operator in _operators(ast.parse(text)):
        begin = offset(left[0], left[1])
        end = offset(right[0], right[1])
        old = SYMBOLS[type(operator)]
        at = text.index(old, begin, end)
        for new in OTHERS[type(operator)]:
            found.append(Mutant(file, node.lineno, at, at + len(old), old, new, lines[node.lineno - 1].strip()))
    return sorted(found, key=lambda m: (m.start, m.new))


Place = tuple[int, int]


def _operators(tree: ast.AST) -> Iterator[tuple[ast.expr, Place, Place, ast.AST]]:
    """Each operator with the text between whose ends it stands; annotations, which run nowhere, are left out."""
    annotations = {id(part) for node in ast.walk(tree) for part in _annotations(node)}
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            yield from ((node, _end(a), _start(b), o) for a, b, o in zip(parts, parts[1:], node.ops, strict=False))
        elif isinstance(node, ast.BoolOp):
            yield from ((a, _end(a), _start(b), node.op) for a, b in zip(node.values, node.values[1:], strict=False))
        elif isinstance(node, ast.BinOp):
            if isinstance(node.op, ast.Add | ast.Sub):
                yield node, _end(node.left), _start(node.right), node.op
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield node, _start(node), _start(node.operand), node.op


def _annotations(node: ast.AST) -> Iterator[ast.AST]:
    for field in ("annotation", "returns"):
        found = getattr(node, field, None)
        if isinstance(found, ast.AST):
            yield from ast.walk(found)


def _start(node: ast.expr) -> Place:
    return node.lineno, node.col_offset


def _end(node: ast.expr) -> Place:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return node.end_lineno, node.end_col_offset


def copy_of_the_tree(target: Path) -> None:
    """Everything that the tests import, elsewhere."""
    for name in ("compress", "evaluators", "export", "tests", "scripts", "recipes"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", target)


def survives(tree: Path, mutant: Mutant | None, tests: Sequence[str], seconds: int) -> bool:
    """Whether the tests pass over the mutant (or over the code as it is); one that takes too long does not survive."""
    path = tree / mutant.file if mutant else None
    text = path.read_text(encoding="utf-8") if path else ""
    if path and mutant:
        path.write_text(text[: mutant.start] + mutant.new + text[mutant.end :], encoding="utf-8")
    child = os.fork()
    if child == 0:
        _run_tests(tree, tests, seconds)
    _, status = os.waitpid(child, 0)
    if path:
        path.write_text(text, encoding="utf-8")
    return status == 0


def _run_tests(tree: Path, tests: Sequence[str], seconds: int) -> None:
    import pytest

    signal.alarm(seconds)  # ends this process
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True  # a mutant of the same second and size would be taken for the one before
    quiet = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # torch is loaded
    code = pytest.main([*quiet, *tests])
    os._exit(int(code))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=[*TESTS])
    parser.add_argument("--seconds", type=int, default=180, help="after which a run counts as killed")
    options = parser.parse_args()
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    unexplained, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_of_the_tree(tree)
        for file in options.files:
            if not survives(tree, None, TESTS[file], options.seconds):
                sys.exit(f"{file}: its tests fail as it is")
            todo = mutants(file)
            alive = []
            for mutant in todo:
                if mutant.name in EQUIVALENT or not survives(tree, mutant, TESTS[file], options.seconds):
                    continue
                alive.append(mutant)
                print(f"  {file}:{mutant.line}  {mutant.old} → {mutant.new}:  {mutant.code}", flush=True)
            equivalent = sum(m.name in EQUIVALENT for m in todo)
            killed = len(todo) - equivalent - len(alive)
            minutes = (time.monotonic() - started) / 60
            print(
                f"{file}: {killed} killed, {equivalent} equivalent, {len(alive)} survive ({minutes:.0f} min)",
                flush=True,
            )
            unexplained += len(alive)
    sys.exit(1 if unexplained else 0)


if __name__ == "__main__":
    main()
