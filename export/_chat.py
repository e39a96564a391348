"""Chat templates as artifacts ship them, rendered without the tokenizer that they were made from.

A template is untrusted code: transformers compiles it in jinja2's immutable sandbox, with plain data alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compress.errors import Corrupt


def render(template: str, message: str, special_tokens: Mapping[str, str], where: Path) -> str:
    """One message of a user in the template, up to where the model answers; raises Corrupt.

    special_tokens: texts by the names that templates know them by, e.g. {"bos_token": "<s>"}.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{"role": "user", "content": message}]
    try:
        rendered, _ = render_jinja_template(
            conversations=[chat], chat_template=template, add_generation_prompt=True, **special_tokens
        )
    except Exception as error:  # a template may fail in any way, as any program
        raise Corrupt(f"{where}: its chat template cannot be rendered ({error}); repair it") from error
    return str(rendered[0])
