"""scripts/bench_distill.py on a tiny model: every way trains, and the tables are complete."""

import json
import random
import sys
from pathlib import Path

import pytest

from tests.tiny import WORDS
from tests.tiny_gguf import tiny

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_distill.py"


@pytest.fixture
def bench(monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("bench_distill", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    model = tiny()
    model.module.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    (folder / "text.txt").write_text(" ".join(rng.choices(WORDS, k=2000)))
    rows = [{"id": f"d{i}", "text": " ".join(rng.choices(WORDS, k=60))} for i in range(100)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(place: Path, mode: str, *more: str) -> list[str]:
    common = ["--model", str(place / "model"), "--data", f"file:{place / 'data.jsonl'}", "--length", "32"]
    return [str(SCRIPT), mode, *common, *more]


def test_ways_are_timed_alike_and_their_ratio_is_printed(bench, place, monkeypatch, capsys):
    timed = []

    def in_this_process(command, **_):
        monkeypatch.setattr(sys, "argv", command[1:])
        bench.main()
        timed.append(command[-1])
        return type("Done", (), {"stdout": capsys.readouterr().out})

    monkeypatch.setattr(bench.subprocess, "run", in_this_process)
    more = ["--rounds", "2", "--steps", "3", "--batch", "2", "--only", "ours, lean", "--only", "trainer bf16"]
    monkeypatch.setattr(sys, "argv", arguments(place, "speed", *more))
    bench.main()
    assert timed == ["ours, lean", "trainer bf16"] * 2
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["way", "tokens per second", "over trainer bf16", "peak memory"]
    assert [row[0] for row in table[2:]] == ["ours, lean", "trainer bf16"] and table[3][2] == "1.00"
    assert all(float(row[1]) > 0 for row in table[2:])


def test_methods_train_for_a_stated_time_and_are_scored(bench, place, monkeypatch, capsys):
    monkeypatch.setattr(bench, "WOUNDS", {"half": [("prune.magnitude", {"sparsity": 0.5})]})
    more = ["--text", str(place / "text.txt"), "--windows", "4", "--seconds", "0.5", "--batch", "2"]
    also = ["--method", 'hidden=["distill.hidden", {"train": "all", "alpha": 1.0, "batch": 1}]']
    monkeypatch.setattr(sys, "argv", arguments(place, "recovery", *more, "--only", "logits, all", *also))
    bench.main()
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("baseline: perplexity ")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out[4:]]
    assert [row[:2] for row in rows] == [["half", "logits, all"], ["half", "hidden"]]
    for row in rows:
        assert int(row[2].replace(",", "")) % 32 == 0 and row[7].startswith("KL to the baseline")
        assert row[6].endswith("%")
