"""Completion as the shells ask for it, through the very protocol of the scripts that are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress import completion, plugin
from compress import recipe as recipes

ROOT = Path(__file__).parents[1]
PROGRAM = "import sys; sys.argv[0] = 'compress'; from compress.cli import main; "


def compress(*arguments: str, after: str = "main()", cwd: Path = ROOT, **variables: str):
    words = [sys.executable, "-c", PROGRAM + after, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, env=env)


def complete(shell: str, line: str, cwd: Path = ROOT) -> list[str]:
    """The words that a shell is offered at the end of a line."""
    variables = {"_COMPRESS_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line}
    if shell == "bash":
        variables |= {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    if shell == "fish":
        variables["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    done = compress(cwd=cwd, **variables)
    assert done.returncode == 0 and not done.stderr, done.stderr
    if shell == "zsh":  # _arguments '*: :(("word":"help" …))'
        return [part.split('"')[1] for part in done.stdout.splitlines() if '"' in part]
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_recipes_and_formats(shell, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")  # where help would be folded
    assert complete(shell, "compress exp") == ["export"]
    assert complete(shell, "compress apply quicks") == ["quickstart"]
    assert complete(shell, "compress export a-model g") == ["gguf"]
    assert complete(shell, "compress eval a-model --with perp") == ["perplexity"]


@pytest.mark.parametrize("shell,mark", [("bash", "complete -o"), ("zsh", "#compdef compress"), ("fish", "complete -")])
def test_a_script_can_be_shown_and_installed(shell, mark, tmp_path):
    off = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    shown = compress("--show-completion", shell, **off)
    assert shown.returncode == 0 and mark in shown.stdout and "_COMPRESS_COMPLETE" in shown.stdout, shown.stderr
    installed = compress("--install-completion", shell, **off)
    assert installed.returncode == 0, installed.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("_COMPRESS_COMPLETE" in path.read_text() for path in files), files


def test_bash_itself_completes(tmp_path):
    script = compress("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
    (tmp_path / "compress").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{PROGRAM}main()" "$@"\n')
    (tmp_path / "compress").chmod(0o755)
    asked = (
        "COMP_WORDS=(compress apply quicks); COMP_CWORD=2; "
        '_compress_completion compress quicks apply; echo "${COMPREPLY[@]}"'
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "quickstart", done.stderr


def test_every_name_is_offered_and_nothing_else():
    assert {name for name, _ in completion.formats("")} == set(plugin.names("exporter"))
    assert {name for name, _ in completion.evaluators("")} == set(plugin.names("evaluator"))
    assert completion.evaluators("perplexity,div") == [("perplexity,divergence", "")]
    assert dict(completion.recipes("quick")).keys() == {n for n in recipes.shipped() if n.startswith("quick")}
    assert completion.recipes("no such thing") == [] == completion.formats("no such thing")


def test_recipe_files_are_completed_beside_shipped_names(tmp_path, monkeypatch):
    for name in ("quack.yaml", "quack.txt", "inner/quark.yml", ".hidden.yaml", "quarry/x"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    monkeypatch.chdir(tmp_path)
    words = [word for word, _ in completion.recipes("qu")]
    assert (
        words[-2:] == ["quack.yaml", "quarry/"]
        and "quickstart" in words
        and len(words) == 2 + len([name for name in recipes.shipped() if name.startswith("qu")])
    )
    assert [word for word, _ in completion.recipes("inner/")] == ["inner/quark.yml"]
    assert [word for word, _ in completion.recipes("./inner/qua")] == ["./inner/quark.yml"]
    assert [word for word, _ in completion.recipes(f"{tmp_path}/qua")] == [
        f"{tmp_path}/quack.yaml",
        f"{tmp_path}/quarry/",
    ]
    assert [word for word, _ in completion.recipes(".h")] == [".hidden.yaml"]


def test_artifacts_are_gguf_files_and_folders(tmp_path):
    for name in ("model.gguf", "model.yaml", "runs/run.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert complete("bash", "compress bench m", tmp_path) == ["model.gguf"]
    assert complete("fish", "compress bench model.gguf r", tmp_path) == ["runs/"]
    assert complete("zsh", "compress si") == ["sign"] and complete("bash", "compress ben") == ["bench"]


def test_completing_loads_no_model_library():
    heavy = "{'torch', 'transformers', 'onnx', 'onnxruntime', 'llama_cpp', 'numpy'}"
    code = "from compress import completion as c; print(c.recipes(''), c.formats(''), c.evaluators('')); "
    done = compress(after=f"{code}print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.splitlines()[-1] == "[]" and "quickstart" in done.stdout, done.stderr
