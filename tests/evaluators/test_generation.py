import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from compress import plugin
from compress.errors import GateInconclusive, RecipeError
from compress.gate import Gate
from compress.interfaces import Context, Example, Score
from compress.measure import evaluate, measure
from compress.model import Model
from compress.numerics.repetition import distinct_share, loops
from evaluators import generation
from evaluators._prompts import PROMPTS
from evaluators.generation import Generation
from tests import tiny_gguf, tiny_onnx
from tests.gates import Store

CHECK = Generation(max_collapsed="10%")
SHORT = Generation(max_collapsed="20%", prompts=8)


def varied(seed: int = 0) -> Model:
    """A random model whose answers do not collapse: strong weights of attention let every step differ."""
    return tiny_gguf.tiny(seed=seed, max_position_embeddings=512)


def looping(model: Model) -> Model:
    """Its twin by real weights: all rows of the head but two are zero, and of those two one always wins."""
    twin = Model(type(model.module)(model.module.config), model.tokenizer)
    twin.module.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        weight = twin.parameter("lm_head.weight")
        row = weight[300].clone()
        weight.zero_()
        weight[300], weight[301] = row, -row
    twin.touch()
    return twin


@pytest.fixture(scope="module")
def baseline() -> Model:
    return varied()


# --- repetition ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", range(1, 13))
def test_a_loop_of_up_to_twelve_tokens_that_fills_the_last_24_collapses(period):
    loop = list(range(100, 100 + period)) * 24
    prefix = list(range(24))  # half of the answer is varied, so that n-grams alone would let it pass
    assert loops([*prefix, *loop[:24]], 24, 12)
    assert generation._collapsed([*prefix, *loop[:24]], "text")
    assert not loops([*prefix, *loop[:23]], 24, 12)
    assert not generation._collapsed([*prefix, *loop[:23]][-40:], "text") or period < 3


def test_a_longer_loop_collapses_by_its_share_of_distinct_ngrams():
    sentence = list(range(20))
    assert not loops(sentence * 3, 24, 12)
    assert distinct_share(sentence * 3, 4) == 20 / 57
    assert generation._collapsed(sentence * 3, "text")
    assert not generation._collapsed(list(range(48)), "text")


@pytest.mark.parametrize(("tokens", "text"), [([], ""), ([5, 6], " \n ")])
def test_an_answer_without_text_collapses(tokens, text):
    assert generation._collapsed(tokens, text)


def test_a_short_repetition_may_be_an_answer():
    assert not generation._collapsed([1] * 15, "no no")
    assert generation._collapsed([1] * 16, "no no")


# --- fields --------------------------------------------------------------------------------------------------


def test_fields():
    assert CHECK.margin == pytest.approx(0.1) and CHECK.confidence == 1.0 and CHECK.max_documents is None
    assert Generation.model_validate(CHECK.model_dump(mode="json")) == CHECK
    (data,) = CHECK.sources([])
    assert len(data.documents) == len(PROMPTS) == len(dict(PROMPTS)) == 16
    assert len(SHORT.sources([])[0].documents) == 8


@pytest.mark.parametrize(
    "fields",
    [{"max_collapsed": "100%"}, {"prompts": 7}, {"prompts": 17}, {"max_new_tokens": 23}, {"confidence": 0.95},
     {"max_documents": 5}],
)  # fmt: skip
def test_fields_that_would_decide_nothing_are_refused(fields):
    with pytest.raises(ValidationError):
        Generation(**{"max_collapsed": "10%", **fields})


# --- scores --------------------------------------------------------------------------------------------------


def test_an_answer_is_the_greedy_continuation_and_its_nats_those_of_one_pass(baseline):
    (data,) = SHORT.sources([])
    examples = SHORT.examples(data, SHORT.encoder(baseline))
    for example, score in zip(examples, SHORT.score(baseline, examples), strict=True):
        answer = baseline.generate(example.payload, 48)
        assert score.positions == tuple(map(float, answer)) and score.weight == 1.0
        rows = torch.log_softmax(next(baseline.logits([[*example.payload, *answer]])), -1)
        nats = [-float(rows[len(example.payload) - 1 + i, token]) for i, token in enumerate(answer)]
        assert score.extra["nats"] == pytest.approx(sum(nats) / len(nats), rel=1e-4)
        assert score.extra["ended"] == (answer[-1] in baseline.eos_ids)


def test_an_answer_that_ends_at_once_is_empty(baseline):
    twin = looping(baseline)
    with torch.no_grad():
        twin.parameter("lm_head.weight").zero_()  # all logits equal: the first token wins, which is the end
    (end,) = baseline.eos_ids
    assert end == 0
    example = Example("fact", "fact", tuple(baseline.encode("Hello there")))
    (score,) = SHORT.score(twin, [example])
    assert score.positions == (0.0,) and score.extra["ended"] == 1.0 and score.total == 1.0


def test_a_context_without_room_is_inconclusive(baseline):
    example = Example("fact", "fact", tuple(range(30)) * 17)
    with pytest.raises(GateInconclusive, match="48 new tokens are 558 tokens, and the model's context holds 512"):
        SHORT.score(baseline, [example])


# --- gates ---------------------------------------------------------------------------------------------------


def judge(model, baseline, check=SHORT, **options):
    return Gate((check,)).evaluate(model, baseline, [], **options).checks[0]


def test_a_looping_model_fails_and_both_are_told(baseline):
    found = judge(looping(baseline), baseline)
    assert found.verdict == "FAIL" and found.source == "built-in prompts"
    assert found.value == 1.0 and found.reference <= 0.25
    assert found.loss == found.lower == found.upper == found.value - found.reference
    assert found.confidence == 1.0 and found.examples == 8
    assert found.details["newly collapsed"] == 8 * found.loss
    assert found.details["distinct 4-grams"] < 0.5 < found.details["reference's distinct 4-grams"]
    assert 0 <= found.details["reference's tokens before the first difference"] < 0.5
    assert len(found.samples) == 6 and found.samples[0].note == "newly collapsed"
    for sample in found.samples:
        assert sample.prompt == dict(PROMPTS)[sample.id] and sample.reference != sample.model
    assert "no others" in found.definition


def test_a_salad_of_words_collapses_under_the_reference_although_it_never_repeats(baseline):
    other = varied(seed=1)
    found = judge(other, baseline)
    assert judge(other, varied(seed=1)).value == 0.0  # by itself it finds nothing wrong
    assert found.verdict == "FAIL" and found.reference == 0.0
    assert found.details["distinct 4-grams"] > 0.9
    nats = "nats per token under the reference"
    assert found.details[nats] > 5 > found.details[f"reference's {nats}"]


def test_the_same_weights_keep_every_answer(baseline):
    found = judge(varied(), baseline)
    assert (found.verdict, found.loss, found.upper) == ("PASS", 0.0, 0.0)
    assert found.details["reference's tokens before the first difference"] == 1.0
    assert {s.note.split(",")[0] for s in found.samples} == {"the same answer"}


def test_other_weights_with_the_same_answers_pass_by_their_nats(baseline):
    near = looping(baseline)
    with torch.no_grad():
        near.parameter("lm_head.weight").copy_(baseline.parameter("lm_head.weight") * (1 + 1e-6))
    near.touch()
    found = judge(near, baseline)
    assert found.verdict == "PASS" and found.details["reference's tokens before the first difference"] == 1.0


def test_other_weights_that_change_no_score_are_invalid(baseline):
    twin = varied()
    (data,) = SHORT.sources([])
    prompts = [e.payload for e in SHORT.examples(data, SHORT.encoder(baseline))]
    seen = {token for prompt in prompts for token in (*prompt, *baseline.generate(prompt, 48))}
    weight = twin.parameter("model.embed_tokens.weight")
    with torch.no_grad():
        weight[min(set(range(len(weight))) - seen)] += 1
    twin.touch()
    found = judge(twin, baseline)
    assert found.verdict == "INVALID" and "scores of both models are equal" in found.definition


def test_nan_is_invalid_in_the_model_and_in_the_reference(baseline):
    broken = looping(baseline)
    with torch.no_grad():
        broken.parameter("model.norm.weight").fill_(math.nan)
    broken.touch()
    assert judge(broken, baseline).verdict == judge(baseline, broken).verdict == "INVALID"
    assert "not finite" in judge(broken, baseline).definition


def test_a_reference_that_always_collapses_proves_nothing(baseline):
    one, other = looping(baseline), looping(varied(seed=1))
    found = judge(one, other)
    assert found.verdict == "INVALID" and found.loss == 0.0
    assert "the reference itself collapses on 8 of 8 prompts: no loss could be seen" in found.definition


def test_a_lost_template_is_invalid(baseline):
    asking = varied(seed=2)
    asking.tokenizer.chat_template = "Q: {{ messages[0].content }}"
    assert "tokenize 'fact' differently" in judge(asking, baseline).definition


def test_answers_of_the_reference_come_from_the_cache(baseline, monkeypatch):
    store, model = Store(), looping(baseline)
    first = judge(model, baseline, cache=store)
    monkeypatch.setattr(baseline, "generate", None)
    assert judge(model, baseline, cache=store) == first and store.hits


# --- runtimes ------------------------------------------------------------------------------------------------

MODELS = {"gguf": varied, "onnx": lambda: tiny_onnx.tiny("llama", True)}


@pytest.mark.parametrize("name", MODELS)
def test_artifacts_answer_as_torch_does(name, tmp_path):
    model, exporter = MODELS[name](), plugin.exporter(name)()
    model.tokenizer.chat_template = "{{ messages[0].content[:40] }}:\n"
    exporter.write(model, tmp_path)
    runtime = exporter.open(tmp_path)
    found = judge(runtime, model)
    assert found.verdict == "PASS"
    assert found.details["reference's tokens before the first difference"] > 0.8  # float16 cache in llama.cpp
    assert abs(found.details["tokens per answer"] - found.details["reference's tokens per answer"]) < 4
    runtime.close()
    told = evaluate(str(tmp_path), ["generation"], documents=4)["metrics"][0]
    assert (told["metric"], told["examples"], told["source"]) == ("generation", 4, "built-in prompts")
    assert told["interval"] == [told["value"], told["value"]]


def test_eval_needs_no_windows_and_knows_losses(baseline):
    with pytest.raises(RecipeError, match="generation reads a fixed set of its own"):
        evaluate("nowhere", ["generation"], windows=2)
    (data,) = SHORT.sources([])
    metric = measure(SHORT, looping(baseline), data, reference=baseline)
    assert metric.against is not None and metric.against["loss"] == metric.against["upper"] > 0.7
    assert metric.value == 1.0 and metric.interval == (1.0, 1.0)


# --- the real model ------------------------------------------------------------------------------------------


def test_int2_collapses_more_than_int8(real_baseline, real_model):
    check = Generation(max_collapsed="10%", prompts=8, max_new_tokens=24)
    (data,) = check.sources([])
    part = replace(data, documents=data.documents[:4])  # all of them would take a minute
    collapsed: dict[str, list[Score]] = {}
    for encoding in ("int8", "int2"):
        model = real_model()
        plugin.step("quantize.rtn")(encoding=encoding, group_size=32).apply(model, Context(seed=0))
        model.touch()
        collapsed[encoding] = check.score(model, check.examples(part, check.encoder(model)), real_baseline)
        model.close()
    assert check.value(collapsed["int8"]) == 0.0 and check.value(collapsed["int2"]) == 1.0
    judged = {name: [s.extra["judged"] for s in scores] for name, scores in collapsed.items()}
    assert max(judged["int8"]) < 2 and min(judged["int2"]) > 7  # on both sides of 5, and far from it
    assert real_baseline.encode_chat("Hi") != real_baseline.encode("Hi")  # asked through its own template
