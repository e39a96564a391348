"""A small task of lm-evaluation-harness in local files, and the harness' own model beside ours."""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.model import Model
from tests.tiny import WORDS, tiny_model

START = "Ā"  # the byte 0 in a byte-level vocabulary: no text here holds it

TASKS = {
    "mine": """
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "unprompted": """
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{[question ~ ' ' ~ choices[0] ~ '.', question ~ ' ' ~ choices[1] ~ '.']}}"
doc_to_target: "{{gold % 2}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "spaced": """
output_type: multiple_choice
doc_to_text: "{{question}} is  "
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
num_fewshot: 2
fewshot_split: train
metric_list: [{metric: acc_bytes, aggregation: mean, higher_is_better: true}]
""",
    "filled": """
output_type: multiple_choice
doc_to_text: gold
doc_to_choice: "{{choices}}"
doc_to_target: "{{question}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "mutual": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc_mutual_info, aggregation: mean, higher_is_better: true}]
""",
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: said
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}} "
doc_to_target: said
generation_kwargs: {until: ["e", " "], max_gen_toks: 40, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "([a-z])"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
""",
}


def write_data(
    folder: Path, count: int = 120, seed: int = 0, said: Callable[[str], str] = lambda question: "a"
) -> Path:
    """A file of questions with three or four different answers of one to three words, and what is `said` to each."""
    rng = random.Random(seed)
    path = folder / "questions.jsonl"
    with path.open("w") as file:
        for number in range(count):
            answers = list({" ".join(rng.choices(WORDS, k=rng.randint(1, 3))): None for _ in range(4)})
            question = f"{' '.join(rng.choices(WORDS, k=rng.randint(2, 9)))} {number}"
            row = {"question": question, "choices": answers, "gold": rng.randrange(len(answers))}
            row |= {"said": said(question), "passage": number // 4}
            file.write(json.dumps(row) + "\n")
    return path


def write_task(folder: Path, name: str, data: Path, body: str | None = None) -> Path:
    """The YAML of a task over a file."""
    path = folder / f"{name}.yaml"
    files = f"dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}"
    path.write_text(
        f"task: {name}\ndataset_path: json\n{files}\ntest_split: test\n{TASKS[name] if body is None else body}"
    )
    return path


def speaking(seed: int = 0) -> Model:
    """The tiny model with a token that begins and ends sequences, as the harness' own model needs one."""
    model = tiny_model(seed)
    model.tokenizer.add_special_tokens({"bos_token": START, "eos_token": START, "pad_token": START})
    model.module.generation_config.eos_token_id = model.tokenizer.eos_token_id
    return model


def letter(model: Model) -> Callable[[str], str]:
    """The first letter that the model writes after a question, to questions of even length; elsewhere "a"."""

    def first(question: str) -> str:
        written = model.decode(model.generate(model.encode(question), 1 if len(question) % 4 else 40))
        found = re.search("[a-z]", written)
        return found.group() if found and len(question) % 2 == 0 else "a"

    return first


def preferred(folder: Path, name: str, model: Model, count: int) -> Path:
    """Data on which the model is right on every document of a task: right is what it prefers."""
    from evaluators.accuracy import Accuracy

    data = write_data(folder, count)
    path = write_task(folder, name, data)
    check = Accuracy(tasks=(f"lm_eval:{path}",), max_drop=3.0)
    (documents,) = check.sources([])
    examples = check.examples(documents, check.encoder(model))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for example, score in zip(examples, check.score(model, examples), strict=True):
        rows[example.payload.place]["gold"] = int(score.extra["chosen"])
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def theirs(model: Model, task_file: Path) -> list[dict[str, Any]]:
    """What the harness itself finds with its `hf` model, document by document in the task's order."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    made = TaskManager(include_defaults=False).load(str(task_file))
    (task,) = made["tasks"].values()
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)  # as its own simple_evaluate
    lm = HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=8, device="cpu", dtype="float32")
    found = evaluate(lm=lm, task_dict=made, bootstrap_iters=0)
    return list(found["samples"][task.config.task])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket may be opened."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` converts out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
