"""The command line. Results go to stdout, progress to stderr; the exit code says what was proven."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from compress import completion
from compress.console import end_on_signals, errors, print_json, reporter
from compress.machine import keep_freed_memory
from compress.permission import code_execution

app = typer.Typer(
    name="compress",
    help="Compress a language model by a recipe, prove each step, and export what was proven.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and library logs.")]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a field, e.g. steps.2.group_size=64; repeatable."),
]
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe file, or a shipped recipe's name.", autocompletion=completion.recipes
    ),
]

AllowCode = Annotated[
    bool,
    typer.Option("--allow-code-execution", help="Let `code` run programs that the model writes, in a sandbox."),
]

RunPath = Annotated[Path, typer.Argument(help="A run's folder, or its run.json.")]


@app.command()
def apply(
    recipe: RecipeName,
    run_dir: Annotated[Path | None, typer.Option(help="The run's own folder; running again resumes.")] = None,
    set_: Override = None,
    allow_code_execution: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Carry out a recipe: steps with gates, exports with gates, and a report."""
    with errors(debug), reporter(quiet) as told, code_execution(allow_code_execution):
        from compress import recipe as recipes
        from compress import run

        loaded = recipes.load(recipes.find(recipe), set_ or [])
        if loaded.streaming:
            keep_freed_memory(False)
        record, folder = run.apply(loaded, run_dir, reporter=told)
    found = json.loads(record.to_json())
    if as_json:
        print_json(found)
    else:
        from compress import report

        print("\n".join(report.summary_lines(found)))
        print(f"report: {folder / 'report.html'}")
    raise typer.Exit(record.exit_code)


@app.command()
def plan(
    recipe: RecipeName,
    set_: Override = None,
    allow_code_execution: AllowCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a recipe will do, cost and be able to prove, before any weight is loaded."""
    with errors(debug), code_execution(allow_code_execution):
        from compress import plan as plans
        from compress import recipe as recipes
        from compress import source

        loaded = recipes.load(recipes.find(recipe), set_ or [])
        opened = source.download(source.resolve(loaded.model))
        found = plans.describe(loaded, source.facts(opened))
    if as_json:
        print_json(found)
    else:
        print("\n".join(_plan_lines(found)))


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="pkg:NAME, a folder, a .gguf, an export, a run, or org/name@revision.")],
    with_: Annotated[
        str | None,
        typer.Option(
            "--with",
            help="Evaluators, separated by commas. By default a scorecard: quality, safety, robustness, efficiency "
            "(with --windows: perplexity).",
            autocompletion=completion.evaluators,
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="A reference model to measure losses against.")] = None,
    data: Annotated[str, typer.Option(help="wiki, pydoc, file:PATH or hub:NAME.")] = "wiki",
    documents: Annotated[int, typer.Option(min=1, help="Documents to score, in seeded random order.")] = 200,
    windows: Annotated[int | None, typer.Option(min=1, help="Instead: the first N windows of the text.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of matrix products in torch.")] = "float32",
    allow_code_execution: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model or an exported artifact, with intervals; decides nothing and exits 0."""
    with errors(debug), reporter(quiet) as told, code_execution(allow_code_execution):
        from compress import measure as measures
        from compress import scorecard

        card = with_ is None and windows is None
        chosen = with_ if with_ is not None else ",".join(scorecard.DEFAULT) if card else "perplexity"
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        found = measures.evaluate(
            model,
            names,
            against=against,
            source=data,
            documents=documents,
            windows=windows,
            length=length,
            dtype=dtype,
            efficiency=card,
            progress=told.progress,
        )
    if as_json:
        print_json(found)
    else:
        print("\n".join(scorecard.lines(found)))


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A run, an artifact, pkg:NAME, a folder, a .gguf, or org/name@revision.")
    ],
    format: Annotated[
        str, typer.Argument(help="An exporter's name, see `compress ls`.", autocompletion=completion.formats)
    ],
    out: Annotated[Path, typer.Option("--out", help="The new folder to write.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of the exporter, e.g. activations=int8."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model's very weights in a format, without gates; a run stands for its final model."""
    with errors(debug), reporter(quiet) as told:
        from compress import ungated

        made = ungated.write(model, ungated.configured(format, overrides=set_ or []), out, told.say)
    if as_json:
        print_json(made.model_dump(mode="json"))
    else:
        print("\n".join(ungated.lines(made)))


@app.command()
def ls(
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List recipes, steps, evaluators, exporters, encodings, and which step stores which."""
    with errors(debug):
        from compress import encodings, methods, plugin
        from compress import recipe as recipes
        from evaluators import _perturb, accuracy

        found: dict[str, dict[str, str]] = {"recipes": recipes.shipped()}
        for kind in ("step", "evaluator", "exporter"):
            found[f"{kind}s"] = {name: plugin.summary(kind, name) for name in plugin.names(kind)}
        found["tasks of accuracy"] = accuracy.summaries()
        found["perturbations of robustness"] = _perturb.summaries()
        names = (*encodings.NAMES, *encodings.GGML_NAMES)
        found["encodings"] = {name: encodings.describe(name) for name in names}
        found["encodings of steps"] = methods.summaries()
    if as_json:
        print_json(found)
        return
    for title, entries in found.items():
        print(title)
        width = max(map(len, entries), default=0)
        for name, text in entries.items():
            print(f"  {name:<{width}}  {text}")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="An artifact, an exported folder, or a run.")],
    key: Annotated[
        Path | None, typer.Option("--key", help="A public key (PEM), for the signature of an artifact.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Re-check every digest, and a signature with --key; exit 8 names the first file that differs."""
    with errors(debug):
        from compress import verify as verification

        lines = verification.verify(path)
        if key is not None:
            from compress import signing

            lines.append(signing.check(path, key))
    if as_json:
        print_json({"verified": str(path), "lines": lines})
    else:
        print("\n".join(lines))


@app.command()
def sign(
    path: Annotated[Path, typer.Argument(help="An artifact, or an exported folder.")],
    key: Annotated[Path, typer.Option("--key", help="A private key (PEM, elliptic curve).")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Sign an artifact's files with a key of your own (OpenSSF Model Signing)."""
    with errors(debug):
        from compress import signing

        signature = signing.sign(path, key)
    if as_json:
        print_json({"signed": str(path), "signature": str(signature)})
    else:
        print(f"{signature}: checked by `compress verify {path} --key PUBLIC_KEY`")


@app.command()
def bench(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT...",
            help="Exported folders, .gguf files, or models that torch opens; ratios are to the first.",
            autocompletion=completion.artifacts,
        ),
    ],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens read in one pass.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded one by one.")] = 32,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds, in each of which every artifact has its turn.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default all.")] = None,
    chart: Annotated[Path, typer.Option(help="The page that is written where artifacts know their quality.")] = Path(
        "bench.html"
    ),
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time artifacts in their own runtimes, interleaved, with intervals; decides nothing and exits 0."""
    with errors(debug), reporter(quiet) as told:
        from compress import bench as benches
        from compress.bench import chart as charts
        from compress.bench import table
        from compress.store import write_atomic

        found = benches.bench(
            artifacts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            reporter=told,
        )
        page = charts.render(found)
        if page is not None:
            write_atomic(chart, page)
    if as_json:
        print_json({**found.model_dump(mode="json"), "chart": None if page is None else str(chart)})
    else:
        print("\n".join(table.lines(found)))
        print("no chart: no artifact has a gate's figures on record" if page is None else f"chart: {chart}")


@app.command()
def schema(
    run: Annotated[bool, typer.Option("--run", help="Of run.json instead of recipes.")] = False,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of recipes, or of run.json."""
    with errors(debug):
        from compress import recipe as recipes
        from compress import record

        print_json(record.schema() if run else recipes.schema())


@app.command()
def report(
    run: RunPath,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write report.html and report.md anew from a run's record, and show its summary."""
    with errors(debug):
        from compress import record
        from compress import report as reports

        read, folder = record.read(run)
        found = json.loads(read.to_json())
        reports.write(found, folder)
    if as_json:
        print_json(found)
    else:
        print("\n".join(reports.summary_lines(found)))
        print(f"report: {folder / 'report.html'}")


@app.command()
def diff(
    old: RunPath,
    new: RunPath,
    markdown: Annotated[bool, typer.Option("--md", help="A Markdown table.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what differs between two runs: recipe, versions, sizes, losses, verdicts."""
    with errors(debug):
        from compress import diff as diffs
        from compress import record

        left, right = (json.loads(record.read(path)[0].to_json()) for path in (old, new))
        rows = diffs.diff(left, right)
    if as_json:
        print_json([row.as_dict() for row in rows])
    elif rows:
        print("\n".join(diffs.table(rows, markdown)))
    else:
        print("no difference")


@app.command()
def doctor(as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Try what this machine can do: packages, data, processor, memory, disk; exits 0."""
    with errors(debug), reporter(quiet) as told:
        from compress import doctor as doctors
        from compress import requirements

        found = doctors.describe(requirements.wanted(), told.say)
    if as_json:
        print_json(found)
    else:
        print("\n".join(doctors.lines(found)))


def main() -> NoReturn:
    """Entry point of the `compress` command."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Idle threads of torch and llama.cpp spin for a moment and then sleep: beside other work they are twice as slow
        # where they spin for good, and steps of many small operations take half as long again where they never do.
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if "_COMPRESS_COMPLETE" in os.environ:  # typer folds help at the terminal's width; a shell offers every line of it
        os.environ["COLUMNS"] = "1000"
    keep_freed_memory()
    end_on_signals()
    app()
    sys.exit(0)


def _plan_lines(found: dict[str, Any]) -> list[str]:
    """A plan for a reader: a line per step, with what each check can resolve below it."""
    base = found["baseline"]
    lines = [f"{found['recipe']}: {found['model']}, {found['parameters'] / 1e6:.1f} M weights"]
    lines.append(f"baseline  {base['size_bytes'] / 1e6:.1f} MB, {base['bits_per_weight']:.2f} bits per weight")
    for step in found["steps"]:
        seconds = step["seconds_estimate"]
        times = f"about {seconds:.0f} s + gate {step['gate_seconds_estimate']:.0f} s" if seconds is not None else ""
        size = f"{step['size_bytes'] / 1e6:.1f} MB, {step['bits_per_weight']:.2f} bits"
        memory = f"up to {step['memory_bytes_estimate'] / 1e9:.1f} GB"
        lines.append(f"step  {step['name']}  {size}, {times}, {memory}")
        lines += [f"  otherwise {other['name']}  {other['size_bytes'] / 1e6:.1f} MB" for other in step["otherwise"]]
        lines += [f"  {line}" for line in _power_lines(step["checks"])]
    lines += ["release", *(f"  {line}" for line in _power_lines(found["release"]))]
    if found["holdout"]:
        lines += ["holdout, first use", *(f"  {line}" for line in _power_lines(found["holdout"]))]
    lines += [f"export  {entry['format']}" for entry in found["exports"]]
    lines += [f"basis of {name}: {text}" for name, text in found["basis"].items()]
    return lines + [f"warning: {warning}" for warning in found["warnings"]]


def _power_lines(checks: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for check in checks:
        if check["source"] == "files":
            lines.append(f"{check['metric']}: exact, from the files")
            continue
        if check["resolves"] == 0:
            margin = f"margin {check['margin_shown']}, decided on a fixed set, without sampling error"
            lines.append(f"{check['metric']} on {check['source']}: {margin}")
            continue
        resolves = check["resolves_shown"] or "unknown"
        count = "an unknown number of" if check["documents"] is None else check["documents"]
        lines.append(
            f"{check['metric']} on {check['source']}: margin {check['margin_shown']}, "
            f"resolves {resolves} at 80 % power with {count} documents"
            + (f"; no loss is proven with {check['lossless']}" if check["lossless"] else "")
        )
    return lines
