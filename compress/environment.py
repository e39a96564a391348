"""What decides results besides the recipe: library versions, processor and threads."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from compress import machine

_LIBRARIES = (
    "torch",
    "transformers",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "llama-cpp-python",
    "gguf",
)


def versions() -> dict[str, str]:
    """Of this package, of Python and of every library that computes or writes."""
    found = {"compress-toolkit": _version("compress-toolkit"), "python": platform.python_version()}
    return found | {name: _version(name) for name in _LIBRARIES}


def step_versions() -> dict[str, str]:
    """Versions that decide what a step computes."""
    return {name: _version(name) for name in ("torch", "transformers", "numpy")}


@cache
def code_sha256() -> str:
    """Digest of the source files of this package's three import packages, by name and content."""
    sha = hashlib.sha256()
    for package in ("compress", "evaluators", "export"):
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        for folder in map(Path, spec.submodule_search_locations):
            for path in sorted(folder.rglob("*.py")):
                name = f"{package}/{path.relative_to(folder).as_posix()}"
                sha.update(f"{name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return sha.hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def host() -> dict[str, str | int]:
    """What decides floating-point results besides versions: processor and threads."""
    return {"machine": platform.machine(), "processor": machine.processor(), "cpus": len(os.sched_getaffinity(0))}
