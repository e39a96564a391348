"""What a run did and what it proved, for people: an HTML page, a Markdown text and lines for the terminal.

Every function is pure in the run's record (`run.json` as a plain dict): no clock, no network, no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.report.markdown import render_markdown
from compress.report.page import render_html
from compress.report.terminal import summary_lines

__all__ = ["render_html", "render_markdown", "summary_lines", "write"]


def write(run: dict[str, Any], folder: Path) -> None:
    """Write `report.html` and `report.md` into an existing folder; the same record gives the same bytes."""
    for name, text in (("report.html", render_html(run)), ("report.md", render_markdown(run))):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
