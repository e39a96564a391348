"""The layers import downward only, and importing the package costs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [
    ("compress.errors", "compress.machine", "compress.requirements", "compress.permission", "compress.publishing"),
    ("compress.batching", "compress.branching", "compress.labels", "compress.pairs", "compress.sealing"),
    ("compress.lock", "compress.environment", "compress.reuse"),
    ("compress.numerics",),
    ("compress.encodings", "compress.families", "compress.architectures", "compress.rounding"),
    ("compress.methods",),
    ("compress.attention", "compress.conv1d"),
    ("compress.storage", "compress.streaming"),
    ("compress.model", "compress.classifier", "compress.seq2seq", "compress.source", "compress.permutation",
     "compress.ggml_mixes", "compress.gguf_header"),
    ("compress.data", "compress.artifact", "compress.blocks", "compress.lineage"),
    ("compress.interfaces",),
    ("compress.plugin", "compress.timing", "compress.scarcity"),
    ("compress.zeros",),
    ("compress.steps", "evaluators", "export"),
    ("compress.decisions", "compress.scoring"),
    ("compress.fixed_sample",),
    ("compress.gate", "compress.planting"),
    ("compress.assay", "compress.noise"),
    ("compress.yaml_nodes", "compress.validation", "compress.recipe_schema", "compress.recipe", "compress.store"),
    ("compress.recipe_data", "compress.holdout"),
    ("compress.refusals",),
    ("compress.plan", "compress.record", "compress.opening", "compress.parity"),
    ("compress.measure", "compress.scorecard"),
    ("compress.inspection",),
    ("compress.report",),
    ("compress.provenance",),
    ("compress.verify",),
    ("compress.workbench",),
    ("compress.exporting",),
    ("compress.run", "compress.ungated", "compress.diff", "compress.doctor", "compress.bench", "compress.signing"),
    ("compress.console", "compress.completion"),
    ("compress.cli",),
]  # fmt: skip


def layer(module: str) -> int:
    """Position of a module in the stack, by its longest matching prefix."""
    for i, prefixes in enumerate(LAYERS):
        if any(module == p or module.startswith(p + ".") for p in prefixes):
            return i
    raise AssertionError(f"{module} is in no layer: add it to LAYERS where it belongs")


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            base = node.module
            inside = [f"{base}.{alias.name}" for alias in node.names]
            found |= {m if (ROOT / (m.replace(".", "/") + ".py")).is_file() else base for m in inside}
    return {m for m in found if m.split(".")[0] in ("compress", "evaluators", "export") and m != "compress"}


def test_imports_point_downward():
    seen = 0
    for package in ("compress", "evaluators", "export"):
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if module == "compress":
                continue  # the public API points at everything, lazily
            for target in imports(path):
                seen += 1
                assert layer(target) <= layer(module), f"{module} imports {target}, which lies above it"
    assert seen > 50


def test_a_step_imports_no_other_step():
    for path in (ROOT / "compress" / "steps").rglob("*.py"):
        for target in imports(path):
            if target.startswith("compress.steps."):
                assert target.rsplit(".", 1)[1].startswith("_"), f"{path} imports the step {target}"


def test_import_is_lean():
    code = "import sys, compress, compress.cli, compress.recipe, compress.run, compress.report\n"
    code += "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'llama_cpp'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
