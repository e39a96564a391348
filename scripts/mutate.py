"""Which operators of the deciding code, and of the methods that quantize, could be wrong without a test noticing.

Usage: nice -n 19 .venv/bin/python scripts/mutate.py [FILE ...] [--lines N ...]
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS: dict[str, tuple[str, ...]] = {  # the likeliest to notice first
    "compress/numerics/sequences.py": ("tests/numerics/test_sequences.py", "tests/test_decisions.py"),
    "compress/numerics/betting.py": ("tests/numerics/test_betting.py", "tests/test_decisions.py"),
    "compress/decisions.py": ("tests/test_decisions.py", "tests/numerics/test_betting.py"),
    "compress/gate.py": (
        "tests/test_gate_bounds.py",
        "tests/test_gate_integrity.py",
        "tests/test_gate.py",
        "tests/test_gate_cost.py",
    ),
    "compress/noise.py": ("tests/test_noise.py",),
    "compress/holdout.py": ("tests/test_holdout.py",),
    "compress/numerics/paired.py": ("tests/numerics/test_paired.py",),
    "compress/fixed_sample.py": ("tests/test_fixed_sample.py",),
}
DECIDING = tuple(TESTS)  # what a run without files takes; methods take longer
TESTS |= {
    f"compress/steps/quantize/{name}.py": tuple(f"tests/steps/test_{test}.py" for test in tests)
    for name, tests in {
        "gptq": ("gptq", "quantize", "head"),
        "hqq": ("hqq",),
        "scales": ("scales",),
        "awq": ("awq",),
        "smoothquant": ("smoothquant",),
        "mixed": ("mixed",),
        "_fields": ("rtn", "quantize"),
        "_refinement": ("gptq", "quantize"),
    }.items()
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
    (
        "compress/fixed_sample.py",
        'falling = check.value([Score("", 1.0, 1.0)]) < check.value([Score("", 0.0, 1.0)])',
        "< → <=",
    ): "no metric has one value for all right and all wrong",
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


def fate(tree: Path, mutant: Mutant | None, tests: Sequence[str], seconds: int) -> str:
    """What the tests make of the mutant (or of the code as it is): "survives", "killed" or "too slow"."""
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
    slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    return "too slow" if slow else "killed" if status else "survives"


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
    quiet += ["-m", "not model"]
    quiet.append("--hypothesis-profile=ci")  # no deadline: on a busy machine, one would pass for a mutant killed
    code = pytest.main([*quiet, *tests])
    os._exit(int(code))


def examine(tree: Path, file: str, lines: Sequence[int], seconds: int) -> int:
    """Try the mutants of a file (on some lines of it, if any are given); how many survive or are too slow to tell."""
    if fate(tree, None, TESTS[file], seconds) != "survives":
        sys.exit(f"{file}: its tests fail, or take more than {seconds} s, as it is")
    found: dict[str, int] = {"killed": 0, "equivalent": 0, "survives": 0, "too slow": 0}
    for mutant in (m for m in mutants(file) if not lines or m.line in lines):
        result = "equivalent" if mutant.name in EQUIVALENT else fate(tree, mutant, TESTS[file], seconds)
        found[result] += 1
        if result in ("survives", "too slow"):
            print(f"  {result}  {file}:{mutant.line}  {mutant.old} → {mutant.new}:  {mutant.code}", flush=True)
    print(f"{file}: {', '.join(f'{n} {name}' for name, n in found.items())}", flush=True)
    return found["survives"] + found["too slow"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=[*DECIDING])
    parser.add_argument("--lines", type=int, nargs="*", default=[], help="of one file; by default all")
    parser.add_argument("--seconds", type=int, default=600, help="after which a run ends, an endless loop as well")
    options = parser.parse_args()
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_tree(Path(folder))
        open_ = sum(examine(Path(folder), file, options.lines, options.seconds) for file in options.files)
    sys.exit(1 if open_ else 0)


if __name__ == "__main__":
    main()
