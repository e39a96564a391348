"""Kill a recipe's run again and again, resume it, and compare what it publishes with an undisturbed run's bytes.

Usage: .venv/bin/python scripts/kill_resume.py [RECIPE] [--kills 20] [--share 0.25] [--seed 0] [--folder DIR]
       [--undisturbed DIR --seconds S] [--set PATH=VALUE]...
Each start is killed after a random time below SHARE of an undisturbed run, so that several kills fall into one
chain of resumed starts; a share below that of the longest step would never let the chain get past it. Takes the
time of about KILLS · SHARE / 2 + 2 runs. Each chain has a store of its own below DIR. Exit code 0: all the same.
--undisturbed takes a finished run instead of making one: DIR/run, its folder, and DIR/home, its $COMPRESS_HOME; it
took S seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-c", "from compress.cli import main; main()", "apply"]


def published(place: Path) -> dict[str, str]:
    """sha256 of every file among the run's exports and the store's artifacts."""
    found = {}
    for folder in (place / "run" / "artifacts", place / "home" / "store" / "artifacts"):
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            with path.open("rb") as file:
                found[str(path.relative_to(place))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def attempt(place: Path, arguments: list[str], seconds: float | None) -> int:
    """Start or resume the run in `place`, and kill it after so many seconds; its exit code, -9 if it was killed."""
    command = [*COMMAND, *arguments, "--run-dir", str(place / "run"), "--quiet"]
    place.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(
        command,
        env={**os.environ, "COMPRESS_HOME": str(place / "home")},
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parents[1],
    ) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return process.wait()


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


def undisturbed(place: Path, arguments: list[str]) -> float:
    """Make the undisturbed run; the seconds that it took."""
    started = time.monotonic()
    attempt(place, arguments, None)
    return time.monotonic() - started


def torment(
    folder: Path, place: Path, duration: float, arguments: list[str], kills: int, share: float, rng: random.Random
) -> bool:
    """Whether every disturbed run ended with the exit code and the bytes of the undisturbed one in `place`."""
    expected = published(place)
    code = json.loads((place / "run" / "run.json").read_text())["exit_code"]
    print(f"undisturbed: exit {code}, {duration:.0f} s, {len(expected)} files", flush=True)
    if code not in (0, 3, 4) or not expected:
        return False
    killed = runs = 0
    same, open_run = True, False
    while killed < kills or open_run:
        place = folder / f"disturbed-{runs}"
        after = rng.uniform(0, share * duration) if killed < kills else None
        ended = attempt(place, arguments, after)
        open_run = ended == -signal.SIGKILL
        if open_run:
            killed += 1
            print(f"kill {killed}: run {runs}, after {after:.1f} s", flush=True)
            continue
        differing = differences(expected, published(place))
        same = same and ended == code and not differing
        print(f"run {runs}: exit {ended}, {len(differing)} files differ {differing[:3]}", flush=True)
        runs += 1
    print("SAME" if same else "DIFFERENT", f"after {killed} kills over {runs} runs", flush=True)
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.25, help="longest time to a kill, of an undisturbed run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept afterwards; by default a temporary one that is removed")
    parser.add_argument("--undisturbed", type=Path, metavar="DIR", help="an undisturbed run that was made before")
    parser.add_argument("--seconds", type=float, metavar="S", help="what it took")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE")
    options = parser.parse_args()
    recipe = Path(options.recipe)
    arguments = [str(recipe.resolve()) if recipe.is_file() else options.recipe]
    arguments += [word for override in options.overrides for word in ("--set", override)]
    if (options.undisturbed is None) != (options.seconds is None):
        parser.error("--undisturbed and --seconds go together")
    if options.folder is not None:
        if options.folder.exists() and any(options.folder.iterdir()):
            parser.error(f"{options.folder} is not empty")
        return 0 if _torment(options.folder.resolve(), arguments, options) else 1
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as folder:
        return 0 if _torment(Path(folder), arguments, options) else 1


def _torment(folder: Path, arguments: list[str], options: argparse.Namespace) -> bool:
    place, duration = options.undisturbed, options.seconds
    if place is None:
        place = folder / "undisturbed"
        duration = undisturbed(place, arguments)
    rng = random.Random(options.seed)
    return torment(folder, place, duration, arguments, options.kills, options.share, rng)


if __name__ == "__main__":
    sys.exit(main())
