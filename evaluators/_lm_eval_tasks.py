"""Loading tasks of lm-evaluation-harness: by name, or from the user's own YAML, which is data and never code.

The harness would run what a task's YAML names (`!function`), fetches metrics that are programs, and renders
templates without bounds. Of all that, only what ships with the harness itself is let through.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.util
import io
import logging
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from compress.errors import CompressError, Corrupt, GateInconclusive, NetworkError, RecipeError, UnsafeInput, one_line
from compress.plugin import nearest

FEWSHOT_SEED = 1234  # the harness' own default: another one would ask other questions
_FILES = ("include", "dataset_path", "data_files", "data_dir")  # keys whose values name files
_REMOTE = ("huggingface_hub", "httpx", "requests", "urllib3", "aiohttp")  # whose errors tell of a download
_LOGGERS = ("lm_eval", "datasets", "huggingface_hub")


def version() -> str:
    """The installed harness' version; raises RecipeError with the command that installs it."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise RecipeError("tasks of lm_eval need lm-evaluation-harness: pip install 'compress-toolkit[eval]'") from None


def fingerprint(name: str, path: str | None) -> str:
    """Digest of the harness' version and of the local files that a task is made of, read without the harness.

    Those are the YAML files of the user and the data that they name; data of the hub are not among them.
    """
    sha = hashlib.sha256(f"{version()} {name} {path}".encode())
    for file in sorted(_files(_yaml_files(name, path))):
        with file.open("rb") as opened:
            sha.update(f"{file} {hashlib.file_digest(opened, 'sha256').hexdigest()}".encode())
    return sha.hexdigest()


def load(name: str, path: str | None, offline: bool = False) -> dict[str, Any]:
    """The harness' tasks that `name` stands for (a task, a group or a tag), by their own names, in a fixed order.

    name: may be the path of a YAML file. path: a folder of the user's YAML files, or one of them. offline: ask no
    network. Raises RecipeError, Corrupt, UnsafeInput, or NetworkError where data of the hub cannot be had.
    """
    version()
    files = _yaml_files(name, path)
    with _quiet(), _offline(offline):
        _sandbox_templates()
        for file in _files(files):
            _refuse_programs(file)
        try:
            found = _find(name, path, files)
        except CompressError:
            raise
        except Exception as error:  # data, YAML and the hub's client fail in many ways
            raise _explained(name, error) from error
    for task in found.values():
        _prepare(task)
    return dict(sorted(found.items()))


def requests(task: Any) -> list[Any]:
    """All requests of a task, document by document, as the harness makes them; raises RecipeError."""
    with _quiet():
        try:
            task.build_all_requests()
        except Exception as error:  # templates meet documents here
            raise RecipeError(f"task {task.config.task}: its prompts cannot be made ({one_line(error)})") from error
    return list(task.instances)


# --- where tasks are -------------------------------------------------------------------------------------------


def _find(name: str, path: str | None, files: list[Path]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    def built(manager: Any, spec: str) -> dict[str, Any]:
        found: dict[str, Any] = manager.load(spec)["tasks"]
        return found

    if name.endswith(".yaml"):
        return built(TaskManager(include_defaults=False), str(files[0]))
    if path is not None and Path(path).expanduser().is_dir():
        own = TaskManager(include_defaults=False, include_path=Path(path).expanduser())
        if name in own.all_tasks:
            return built(own, name)
    elif files and name == _value(files[0], "task"):
        return built(TaskManager(include_defaults=False), str(files[0]))
    shipped = _shipped(name)
    if len(shipped) == 1:
        if "unsafe_code: true" in shipped[0].read_text(encoding="utf-8"):
            raise _runs_code(name)  # before its metric is fetched
        return built(TaskManager(include_defaults=False), str(shipped[0]))
    every = TaskManager()
    if name not in every.all_tasks:
        where = f" in {path} or" if path else ""
        raise RecipeError(f"no task {name!r}{where} in lm_eval {version()}; {nearest(name, _close(name, every))}")
    return built(every, name)


def _close(name: str, manager: Any) -> list[str]:
    """Some names out of thousands: those that begin alike."""
    return [known for known in manager.all_tasks if known[:3] == name[:3]][:100] or ["see `lm-eval ls tasks`"]


def _shipped(name: str) -> list[Path]:
    """Shipped files that define a task of this name: the harness takes 9 s to index all 14,000 of them."""
    line = re.compile(rf"^task:\s*[\"']?{re.escape(name)}[\"']?\s*$", re.MULTILINE)
    files = (_package() / "tasks").rglob("*.yaml")
    return [file for file in files if line.search(file.read_text(encoding="utf-8", errors="replace"))]


def _package() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent.resolve()


def _yaml_files(name: str, path: str | None) -> list[Path]:
    """The user's YAML files; raises RecipeError where there are none."""
    spec = name if name.endswith(".yaml") else path
    if spec is None:
        return []
    where = Path(spec).expanduser()
    found = sorted(where.rglob("*.yaml")) if where.is_dir() else [where] * where.is_file()
    if not found:
        raise RecipeError(f"task_path {spec}: no task YAML there; expected a folder with .yaml files, or one of them")
    return found


def _files(yaml_files: list[Path]) -> set[Path]:
    """These files, those that they include, and the local data that they name."""
    found: set[Path] = set()
    waiting = [file.resolve() for file in yaml_files]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        if file.suffix == ".yaml":
            named = [value for key, value, _ in _scalars(file) if key in _FILES]
            waiting += [match for value in named for match in _matches(value, file.parent)]
    return found


def _matches(value: str, folder: Path) -> Iterator[Path]:
    """Files that a value names, from the current folder (data) or from the YAML's own (what it includes)."""
    for base in (Path(), folder):
        for text in glob.glob(str(base / Path(value).expanduser())):
            match = Path(text).resolve()
            yield from [match] if match.is_file() else (f for f in match.iterdir() if f.is_file())


def _scalars(file: Path) -> list[tuple[str, str, str]]:
    """(nearest key of `_FILES` around it, else its own key; value; tag) of all scalars in a YAML file."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    found: list[tuple[str, str, str]] = []
    seen: set[int] = set()  # an alias is the very node it stands for

    def walk(node: Any, key: str) -> None:
        if node is None or id(node) in seen:
            return
        seen.add(id(node))
        tag = str(node.tag)
        if isinstance(node.value, str):
            found.append((key, node.value, tag))
            return
        found.append((key, "", tag))
        for member in node.value:
            if isinstance(member, tuple):
                walk(member[1], key if key in _FILES else str(member[0].value))
            else:
                walk(member, key)

    try:
        walk(YAML(typ="safe", pure=True).compose(file.read_text(encoding="utf-8")), "")
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise Corrupt(f"{file}: not readable as YAML ({one_line(error)})") from None
    return found


def _value(file: Path, key: str) -> str:
    """The first value of a key in a YAML file, empty where it has none."""
    return next((value for found, value, _ in _scalars(file) if found == key), "")


# --- what is kept out --------------------------------------------------------------------------------------------


def _refuse_programs(file: Path) -> None:
    """Raise UnsafeInput where the user's YAML would make the harness run code of others."""
    if file.suffix != ".yaml" or file.is_relative_to(_package()):
        return
    import lm_eval.api.metrics  # noqa: F401  # registers them
    from lm_eval.api.registry import metric_registry

    for key, value, tag in _scalars(file):
        problem = ""
        if tag.startswith("!") or ":python/" in tag:
            problem = f"{tag} {value} would run code"
        elif key == "hf_evaluate" and value.lower() not in ("false", "no", "off"):
            problem = "hf_evaluate would run a program of the hub"
        elif key == "metric" and value and value not in metric_registry:
            problem = f"metric {value!r} is none of the harness' own, and another would be a program of the hub"
        elif key == "dataset_path" and value in ("pandas", "pickle"):
            problem = f"dataset_path {value} would unpickle data"
        elif key == "unsafe_code" and value.lower() not in ("false", "no", "off"):
            problem = "unsafe_code asks to run what a model writes"
        if problem:
            raise UnsafeInput(f"{file}: {problem}; task YAML is data here: use templates, and metrics of the harness")


def _sandbox_templates() -> None:
    """Templates are text of others: let them format documents, and nothing else."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    if isinstance(utils.env, ImmutableSandboxedEnvironment):
        return
    options = {"loader": utils.env.loader, "undefined": utils.env.undefined}
    sandbox = ImmutableSandboxedEnvironment(**options, keep_trailing_newline=utils.env.keep_trailing_newline)
    sandbox.filters.update(utils.env.filters)
    utils.env = sandbox


def _runs_code(name: str) -> UnsafeInput:
    remedy = "for programs in a sandbox write code: {data: file:PATH}"
    return UnsafeInput(f"task lm_eval:{name} runs what the model writes; {remedy}")


def _prepare(task: Any) -> None:
    """Settle what the harness settles before it evaluates, and refuse what a language model alone cannot answer."""
    name = task.config.task
    if getattr(task, "UNSAFE_CODE", False):
        raise _runs_code(name)
    if getattr(task, "MULTIMODAL", False):
        raise RecipeError(f"task {name} shows pictures or sound; only text can be asked here")
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep bars and warnings of the libraries off stderr: what matters is raised."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextlib.contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Take data of the hub from the local cache alone."""
    if not wanted:
        yield
        return
    import datasets
    from huggingface_hub import constants

    places: tuple[Any, ...] = (datasets.config, constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before):
            place.HF_HUB_OFFLINE = value


def _explained(name: str, error: Exception) -> CompressError:
    """An error of the harness as one line: of the network, of data that hold nothing, or of the task itself."""
    cause: BaseException | None = error
    while cause is not None:
        kind = type(cause)
        remote = kind.__module__.startswith(_REMOTE) or kind.__name__ in (
            "DatasetNotFoundError",
            "OfflineModeIsEnabled",
        )
        if remote or isinstance(cause, ConnectionError):
            reason = one_line(cause).split(". ")[0]
            return NetworkError(
                f"task lm_eval:{name}: its data cannot be had from the hub ({reason}); use task_path with local data"
            )
        # What `datasets` and the harness say of no rows, depending on the format.
        if isinstance(cause, StopIteration | IndexError) or "corresponds to no data" in str(cause):
            return GateInconclusive(f"task lm_eval:{name} has no document; there is nothing to compare")
        cause = cause.__cause__ or cause.__context__
    root: BaseException = error
    while root.__cause__ is not None:  # it tells a line or a field; `datasets` puts a general one before it
        root = root.__cause__
    return RecipeError(f"task lm_eval:{name} cannot be loaded ({one_line(root)})")
