"""What training writes down on the way, as files of tensors and JSON: states to choose among, and where it stands.

A killed run goes on from its last checkpoint and ends with the very bytes of one that was not disturbed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from compress.errors import Corrupt
from compress.interfaces import Context
from compress.steps.distill import _parallel as parallel

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
SEAL = "compress"  # the entry of a file's header that holds facts and digest


@runtime_checkable
class Remembering(Protocol):
    """A lesson that changes while it is taught."""

    def state(self) -> dict[str, Tensor]:
        """What it has become."""

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Become that again."""


@dataclass
class Course:
    """Where training stands: KL at the start and the best since, after which optimizer step, and steps taken.

    fruitless: checks in a row without a new best.
    """

    before: float
    best: float
    kept: int = 0
    taken: int = 0
    fruitless: int = 0


@contextmanager
def workplace(context: Context) -> Iterator[Path]:
    """The step's folder for unfinished work, or a temporary one where it has none, or several processes train."""
    if context.work is not None and parallel.place()[1] == 1:
        yield context.work
        return
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        yield Path(folder)


class Journal:
    """The files of one training: `state-K` holds the parameters after step K, `CHECKPOINT` all that goes on from there.

    settings: what decides the course besides parameters and data; files of other settings are not used.
    """

    def __init__(
        self,
        folder: Path,
        settings: str,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        lesson: object,
    ):
        self.folder, self.settings, self.parameters = folder, settings, parameters
        self.optimizer, self.lesson = optimizer, lesson
        self.restored = 0

    def keep(self, taken: int) -> None:
        """Write down the parameters as they are after `taken` steps."""
        write(state_file(self.folder, taken), self.parameters)

    def checkpoint(self, course: Course) -> None:
        """Write down all that the next step depends on, and drop the states that no checkpoint names any more."""
        tensors = {f"parameter {name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"{key} {name}": value for key, value in self.optimizer.state[parameter].items()}
        if isinstance(self.lesson, Remembering):
            tensors |= {f"lesson {key}": value for key, value in self.lesson.state().items()}
        write(self.folder / CHECKPOINT, tensors, {"settings": self.settings, "course": asdict(course)})
        named = {state_file(self.folder, taken) for taken in (0, course.kept)}
        for path in set(self.folder.glob("state-*.safetensors")) - named:
            path.unlink()

    def resume(self) -> Course | None:
        """Go back to the last checkpoint; None, and an empty folder, where there is none that fits."""
        file = self.folder / CHECKPOINT
        try:
            tensors, facts = read(file)
            if facts["settings"] != self.settings:
                raise Corrupt("it was written under other settings")
            course = Course(**facts["course"])
            for taken in {0, course.kept}:
                read(state_file(self.folder, taken))
            self._load(tensors)
        except FileNotFoundError:
            self._clear()
            return None
        except (Corrupt, KeyError, TypeError, RuntimeError) as error:
            log.warning("%s: %s; training starts anew", file, error)
            self._clear()
            return None
        self.restored = course.taken
        return course

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        """Parameters, moments and the lesson's state; nothing is changed where one is missing."""
        found = {name: tensors[f"parameter {name}"] for name in self.parameters}
        for name, parameter in self.parameters.items():
            if found[name].shape != parameter.shape:
                raise Corrupt(f"{name} has the shape {tuple(found[name].shape)}, not {tuple(parameter.shape)}")
        keys = ("step", "exp_avg", "exp_avg_sq")
        moments = {name: {key: tensors[f"{key} {name}"] for key in keys} for name in self.parameters}
        for name, parameter in self.parameters.items():
            parameter.copy_(found[name])
            self.optimizer.state[parameter] = {key: value.clone() for key, value in moments[name].items()}
        if isinstance(self.lesson, Remembering):
            prefix = "lesson "
            self.lesson.resume({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})

    def _clear(self) -> None:
        for path in (*self.folder.glob("state-*.safetensors"), self.folder / CHECKPOINT):
            path.unlink(missing_ok=True)


def state_file(folder: Path, taken: int) -> Path:
    """Where the parameters after `taken` steps are."""
    return folder / f"state-{taken}.safetensors"


@torch.no_grad()
def restore(folder: Path, taken: int, parameters: Mapping[str, Tensor]) -> None:
    """Give the parameters the values that they had after `taken` steps, where these were written down."""
    if state_file(folder, taken).exists():
        values, _ = read(state_file(folder, taken))
        for name in parameters.keys() & values.keys():
            parameters[name].copy_(values[name])


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """Write tensors and facts as one safetensors file with their digest, seen whole or not at all."""
    from safetensors.torch import save_file

    stored = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(facts or {}, sort_keys=True)
    seal = json.dumps({"facts": facts or {}, "sha256": _digest(stored, text)}, sort_keys=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(stored, temporary, metadata={SEAL: seal})  # one entry: the header lists several in no fixed order
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote; raises FileNotFoundError, and Corrupt where it is not what was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            seal = json.loads((file.metadata() or {})[SEAL])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts: dict[str, Any] = seal["facts"]
        sha256 = seal["sha256"]
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"{path}: not readable ({error})") from None
    if sha256 != _digest(tensors, json.dumps(facts, sort_keys=True)):
        raise Corrupt(f"{path}: its bytes do not match their sha256")
    return tensors, facts


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    sha = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
