"""Untrusted YAML 1.2 as plain values that remember where they were written.

Only mappings with text keys, lists, text, numbers, booleans and null come out. Whatever makes YAML surprising
or costly is refused with line and column: duplicate keys, tags, merge keys, NaN, alias bombs, deep nesting.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from compress.errors import RecipeError
from compress.plugin import nearest

Path = tuple[str | int, ...]
"""Where a value stands: mapping keys and list indices from the root."""

MAX_CHARACTERS = 1_000_000
MAX_ALIASES = 50
MAX_DEPTH = 40

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_A_NUMBER = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NAMED_LISTS = ("steps", "otherwise", "gate", "release", "export")
_BESIDE_NAME = ("gate", "otherwise")


@dataclass
class Document:
    """A parsed file: its plain value, and the place ("recipe.yaml:14:5") of each value and of each key."""

    name: str
    value: Any
    values: dict[Path, str] = field(default_factory=dict)
    keys: dict[Path, str] = field(default_factory=dict)

    def place(self, path: Path, key: bool = False) -> str:
        """Where the value (or its key) at `path` was written, or else its nearest enclosing value."""
        for length in range(len(path), -1, -1):
            prefix = path[:length]
            if key and prefix in self.keys:
                return self.keys[prefix]
            if prefix in self.values:
                return self.values[prefix]
        return self.name


def parse(text: str, name: str) -> Document:
    """The document in `text`; raises RecipeError with line and column for anything refused."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{name}: {len(text)} characters; a recipe has at most {MAX_CHARACTERS}")
    # YAML 1.1 would turn `off` into False and 1:20 into 80.
    if directive := re.search(r"(?m)^%YAML\b(?![ \t]+1\.2\b)", text):
        line = text.count("\n", 0, directive.start()) + 1
        raise RecipeError(f"{name}:{line}:1  found another %YAML version; recipes are YAML 1.2")
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        raise RecipeError(_syntax(name, error)) from None
    except YAMLError as error:  # characters that YAML does not allow
        raise RecipeError(f"{name}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RecipeError(f"{name}: nested more than {MAX_DEPTH} levels deep") from None
    except (ValueError, ArithmeticError, LookupError, AssertionError, NotImplementedError) as error:
        # ruamel's own slips on malformed escapes, directives and the like
        raise RecipeError(f"{name}: not readable as YAML ({type(error).__name__})") from None
    if node is None:
        raise RecipeError(f"{name}:1:1  the file is empty; a recipe is a mapping with `model`, `release` and `steps`")
    document = Document(name, None)
    document.value = _Reader(document).read(node, ())
    return document


def _syntax(name: str, error: Any) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    problem = " ".join(str(error.problem or error.context).split())
    hint = "; quote text that starts with * or &" if "alias" in problem or "anchor" in problem else ""
    return f"{where}  {problem}{hint}"


def dotted(path: Path) -> str:
    """A path as a reader writes it, on one line.

    >>> dotted(("steps", 1, "gate"))
    'steps[1].gate'
    """
    parts = (part if isinstance(part, int) or part.isprintable() else repr(part) for part in path)
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


class _Reader:
    """Walks composed nodes, counting the aliases it follows."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.seen: set[int] = set()
        self.aliases = 0

    def read(self, node: Any, path: Path) -> Any:
        """The plain value of a node; records where it stands."""
        from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

        self.document.values[path] = self._place(node)
        if len(path) > MAX_DEPTH:
            raise self._error(node, f"nested more than {MAX_DEPTH} levels deep")
        # An alias is composed as the very node it names; expanding one inside another counts again.
        self.aliases += id(node) in self.seen
        if self.aliases > MAX_ALIASES:
            where = self.document.place(path[:-1], key=True)  # the node itself stands at its anchor
            raise RecipeError(f"{where}  more than {MAX_ALIASES} aliases (*name)")
        self.seen.add(id(node))
        tag = str(node.tag).removeprefix(_TAG)
        if isinstance(node, ScalarNode):
            return self._scalar(node, tag)
        if isinstance(node, SequenceNode) and tag == "seq":
            return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, MappingNode) and tag == "map":
            return self._mapping(node, path)
        raise self._error(node, f"found the tag {node.tag}; recipes use no tags")

    def _mapping(self, node: Any, path: Path) -> dict[str, Any]:
        from ruamel.yaml.nodes import ScalarNode

        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise self._error(key_node, "found a list or mapping as a key, expected text")
            key = self._text(key_node)
            if key_node.tag != f"{_TAG}str":
                reason = "merge keys are not supported" if key == "<<" else "keys are text; quote it if it is meant"
                raise self._error(key_node, f"found the key {key}; {reason}")
            if key in found:
                first = self.document.keys[*path, key].removeprefix(f"{self.document.name}:")
                raise self._error(key_node, f"found the key {key!r} twice, first at {first}")
            self.document.keys[*path, key] = self._place(key_node)
            found[key] = self.read(value_node, (*path, key))
        return found

    def _scalar(self, node: Any, tag: str) -> Any:
        text, plain = self._text(node), node.style is None
        if tag == "null":
            return None
        if tag == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if tag in ("int", "float"):
            return self._number(node, text, plain)
        # YAML 1.2 knows no timestamps or `=`: written plainly they are text.
        if tag == "str" or (plain and tag in ("timestamp", "value")):
            return text
        raise self._error(node, f"found the tag {node.tag}; recipes use no tags")

    def _text(self, node: Any) -> str:
        text = str(node.value)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self._error(node, "found half of a surrogate pair, expected text that UTF-8 can hold")
        return text

    def _number(self, node: Any, text: str, plain: bool) -> int | float | str:
        if _INT.fullmatch(text):
            if len(text) > 18:
                raise self._error(node, f"found a number of {len(text)} digits, expected at most 18")
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        if _NOT_A_NUMBER.fullmatch(text):
            raise self._error(node, f"found {text}, expected a finite number")
        if _FLOAT.fullmatch(text):
            if not math.isfinite(value := float(text)):
                raise self._error(node, f"found {text}, expected a finite number")
            return value
        if plain:  # 1_000 and the like are numbers to YAML 1.1 only
            return text
        raise self._error(node, f"found {text!r}, expected a number")

    def _place(self, node: Any) -> str:
        mark = node.start_mark
        return f"{self.document.name}:{mark.line + 1}:{mark.column + 1}"

    def _error(self, node: Any, message: str) -> RecipeError:
        return RecipeError(f"{self._place(node)}  {message}")


def apply_set(document: Document, assignment: str) -> None:
    """Change one value, as `--set PATH=VALUE` asks: `steps.2.group_size=64`, `gate.footprint.max_mb=90`.

    Indices count from 0. The name of a step, check or exporter is skipped, since an entry has only one;
    entries may also be named instead of counted. VALUE is YAML (text, a number, or a flow mapping). Keys that
    are absent are added, and judged when the recipe is validated.
    """
    where = f"--set {' '.join(assignment.split())}"
    name, equals, text = assignment.partition("=")
    segments = name.split(".")
    if not equals or not all(segments):
        raise RecipeError(f"{where}  found no PATH=VALUE; expected for example steps.2.group_size=64")
    given = parse(text, where) if text.strip() else Document(where, None)
    target: Any = document.value
    path: Path = ()
    for segment in segments[:-1]:
        target, path = _locate(target, path, segment, where)
        target, path = _child(target, path)
    target, path = _locate(target, path, segments[-1], where)
    target[path[-1]] = given.value
    for table in (document.values, document.keys):
        for old in [p for p in table if p[: len(path)] == path]:
            del table[old]
    document.values[path] = document.keys[path] = where
    document.values.update({(*path, *inner): where for inner in given.values})
    for length in range(1, len(path)):  # mappings made on the way
        document.values.setdefault(path[:length], where)


def _child(container: Any, path: Path) -> tuple[Any, Path]:
    """The value at the last key of `path`; an absent or null one becomes a mapping."""
    key = path[-1]
    if isinstance(container, dict) and container.get(key) is None:
        container[key] = {}
    return container[key], path


def _locate(target: Any, path: Path, segment: str, where: str) -> tuple[Any, Path]:
    """The container that holds what `segment` names inside `target`, and the path to it."""
    if isinstance(target, dict):
        own = [key for key in target if key not in _BESIDE_NAME]
        is_entry = len(path) > 1 and path[-2] in _NAMED_LISTS and isinstance(path[-1], int)
        if is_entry and len(own) == 1 and segment not in (*_BESIDE_NAME, own[0]):
            target, path = _child(target, (*path, own[0]))
            return _locate(target, path, segment, where)
        return target, (*path, segment)
    at = dotted(path) or "the recipe"
    if not isinstance(target, list):
        raise RecipeError(f"{where}  {at} is {target!r} and has no {segment!r} inside")
    named = {name: i for i, item in enumerate(target) if isinstance(item, dict) for name in item}
    if segment in named and path[-1:] and path[-1] in _NAMED_LISTS:
        return target[named[segment]], (*path, named[segment], segment)
    if segment.isascii() and segment.isdigit() and int(segment[:9]) < len(target):
        return target, (*path, int(segment[:9]))
    size = f"has {len(target)} {'entry' if len(target) == 1 else 'entries'}, counted from 0"
    names = [name for name in named if name not in _BESIDE_NAME]
    hint = f"; {nearest(segment, names)}" if names and not segment.isdigit() else ""
    raise RecipeError(f"{where}  {at} {size}, and no {segment!r}{hint}")
