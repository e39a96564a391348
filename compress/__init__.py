"""Model compression whose every claim is proven: recipes, statistical gates, exact exports.

The names below are imported on first use, so that `import compress` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.gate import Gate
    from compress.measure import evaluate
    from compress.opening import load
    from compress.recipe import Recipe
    from compress.run import apply
    from compress.ungated import export

_PUBLIC = {
    "Gate": "compress.gate",
    "Recipe": "compress.recipe",
    "apply": "compress.run",
    "evaluate": "compress.measure",
    "export": "compress.ungated",
    "load": "compress.opening",
}
__all__ = ["Gate", "Recipe", "apply", "evaluate", "export", "load"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'compress' has no attribute {name!r}")
