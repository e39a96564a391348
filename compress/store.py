"""The content-addressed cache of artifacts and records, shared by all runs of a user.

Everything is named by what determines it, published whole or not at all, and checked when it is read: an
entry whose bytes do not match its digest, or that belongs to another key, is set aside under `quarantine/` and
computed anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import artifact, publishing
from compress.errors import Corrupt

if TYPE_CHECKING:
    from compress.model import Model

log = logging.getLogger(__name__)

_FORGOTTEN = 14 * 86400.0  # seconds since the last checkpoint of a step that was not finished
_WRITTEN_BY_NOW = 3600.0  # seconds; a record is a few kilobytes


def default_root() -> Path:
    """$COMPRESS_HOME, or the user's cache folder."""
    home = os.environ.get("COMPRESS_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(home) if home else cache / "compress-toolkit"


def key_of(facts: Mapping[str, Any]) -> str:
    """Digest of what determines a result; equal facts give equal keys, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Store:
    """Artifacts (folders) and records (JSON values) by key."""

    def __init__(self, root: Path | None = None):
        self.root = (root or default_root()) / "store"

    def artifact_path(self, key: str) -> Path:
        """Where the artifact of a key is, or will be."""
        return self.root / "artifacts" / key

    def artifact(self, key: str) -> Path | None:
        """The artifact of a key, its manifest readable; None where it is absent or was quarantined."""
        folder = self.artifact_path(key)
        if not folder.exists():
            return None
        try:
            artifact.manifest(folder)
        except Corrupt as error:
            self.quarantine(folder, error)
            return None
        return folder

    def made(self, key: str) -> tuple[Path, dict[str, Any]] | None:
        """The artifact of a key and the record of its making, see `remember`; None where either is missing.

        An artifact that is not the one on record, as whole as it may be, is set aside.
        """
        folder, facts = self.artifact(key), self.get(f"{key}.made")
        if folder is None or facts is None:
            return None
        if facts["artifact"] != (found := artifact.digest(folder)):
            problem = f"{folder}: artifact {found[:12]}…, and {facts['artifact'][:12]}… was made here"
            self.quarantine(folder, Corrupt(problem))
            return None
        return folder, facts

    def remember(self, key: str, facts: Mapping[str, Any]) -> None:
        """Put on record how the artifact of a key was made, and which one it is."""
        self.put(f"{key}.made", {**facts, "artifact": artifact.digest(self.artifact_path(key))})

    def find(self, digest: str) -> Path | None:
        """The artifact of a digest, as records of runs name them; None where it was removed or never was here."""
        for folder in (self.root / "artifacts").glob("*"):
            if (folder / artifact.MANIFEST).is_file() and artifact.digest(folder) == digest:
                return folder
        return None

    def save(self, model: Model, key: str) -> Path:
        """Keep a model under a key; where another process has just done so, that artifact stays."""
        artifact.save(model, self.artifact_path(key), keep=True)
        return self.artifact_path(key)

    @contextmanager
    def work(self, key: str) -> Iterator[Path | None]:
        """A folder for unfinished work under a key, as the last process left it; removed where the body succeeds.

        None where another process works in it at this moment.
        """
        folder = self.root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        with publishing.held(folder) as mine:
            yield folder if mine else None
            if mine:
                shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed processes left half written, and unfinished work that nobody came back for."""
        publishing.sweep(self.root / "artifacts")
        for folder in (self.root / "work").glob("*"):
            with suppress(FileNotFoundError):
                if time.time() - folder.stat().st_mtime > _FORGOTTEN:
                    with publishing.held(folder) as mine:
                        if mine:
                            shutil.rmtree(folder, ignore_errors=True)
        for path in (self.root / "records").glob("*/.*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _WRITTEN_BY_NOW:
                    path.unlink()

    def quarantine(self, path: Path, reason: Exception) -> None:
        """Set a damaged entry aside, so that it is computed anew and can be looked at."""
        log.warning("%s; set aside and computed anew", reason)
        target = self.root / "quarantine" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process has set it aside
            path.rename(target.with_name(f"{target.name}.{os.getpid()}.{len(list(target.parent.iterdir()))}"))

    def get(self, key: str) -> Any | None:
        """The record of a key, or None; one that is damaged is set aside."""
        try:
            return self.read(key)
        except Corrupt as error:
            self.quarantine(self._record(key), error)
            return None

    def read(self, key: str) -> Any | None:
        """The record of a key, or None; raises Corrupt where it is not what was stored under this very key."""
        path = self._record(key)
        try:
            envelope = json.loads(path.read_text())
            if envelope["sha256"] != _digest(key, envelope["value"]):
                raise ValueError("digest differs")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{path}: not what was stored ({error})") from None
        return envelope["value"]

    def put(self, key: str, value: Any) -> None:
        """Keep a record, atomically."""
        write_atomic(self._record(key), json.dumps({"sha256": _digest(key, value), "value": value}))

    def _record(self, key: str) -> Path:
        return self.root / "records" / key[:2] / f"{key}.json"


def _digest(key: str, value: Any) -> str:
    return hashlib.sha256(json.dumps([key, value], sort_keys=True).encode()).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part: fsync, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(publishing.SUFFIX, f".{path.name}.", path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
