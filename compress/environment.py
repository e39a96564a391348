"""What decides results besides the recipe: library versions, processor and threads."""

from __future__ import annotations

import os
import platform
from importlib import metadata

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


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def host() -> dict[str, str | int]:
    """What decides floating-point results besides versions: processor and threads."""
    return {"machine": platform.machine(), "processor": machine.processor(), "cpus": len(os.sched_getaffinity(0))}
