"""Sealed manifests: a JSON file that names the digest of every file beside it, and its own.

The text is canonical and its digest stands in it, so that a change of any bit, in a figure or in a space, is seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import Corrupt

FILE = "compression.json"
SIGNATURE = "model.sig"  # beside it, where somebody signed the folder
SEAL = "sha256"  # the key of the manifest's own digest, which covers all other keys


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the facts, which must not hold `SEAL`, as the folder's manifest."""
    (folder / FILE).write_text(sealed(facts), encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The folder's manifest without its seal; raises Corrupt where it is missing or was changed in any way."""
    file = folder / FILE
    try:
        raw = file.read_bytes()
        facts: dict[str, Any] = json.loads(raw)
        found = facts.pop(SEAL, None)
        text = sealed(facts)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{folder}: no readable {FILE} ({error})") from None
    if found is None:
        raise Corrupt(f"{file}: it has no {SEAL} of its own; expected a manifest that compress wrote")
    if text.encode() != raw:
        raise Corrupt(f"{file}: its bytes do not match the {SEAL} that it states of itself ({str(found)[:12]}…)")
    return facts


def sealed(facts: Mapping[str, Any]) -> str:
    """The facts as canonical JSON with their digest.

    >>> print(sealed({"schema": "s"}), end="")
    {
     "schema": "s",
     "sha256": "5651cd116c4d2509991178dd84d0a225af20e941973e12d226ab606758b11ff1"
    }
    """
    compact = json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    digest = hashlib.sha256(compact.encode()).hexdigest()
    return json.dumps({**facts, SEAL: digest}, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
