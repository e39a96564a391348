import pytest

from compress import plan, refusals
from compress.architectures import Facts
from compress.errors import RecipeError
from tests.recipes import CONFIG, HEAD, SMOL, recipe, refusal


def test_a_sound_recipe_has_nothing_to_warn_of() -> None:
    steps = "  - prune.wanda: {sparsity: 0.2}\n  - distill.logits: {tokens: 1024}\n  - quantize.gptq: {}\n"
    assert refusals.check(recipe(steps, export="export: [onnx: {}]\n"), SMOL) == []


# What cannot work


def test_a_margin_looser_than_the_release_needs_a_later_step_that_recovers() -> None:
    wound = "  - prune.wanda: {sparsity: 0.2}\n    gate: [{perplexity: {max_increase: 12%}}]\n"
    message = refusal(recipe(wound + "  - quantize.rtn: {}\n"))
    assert message.startswith("recipe.yaml:9:5  steps[0] prune.wanda: its gate lets perplexity lose +12.0 %")
    assert "release +5.0 %" in message
    assert refusals.check(recipe(wound + "  - distill.logits: {}\n"), SMOL) == []
    healed_before = "  - distill.logits: {}\n" + wound
    assert refusal(recipe(healed_before)).startswith("recipe.yaml:10:5  steps[1] prune.wanda")
    # a size may shrink later without any training
    head = HEAD.replace("release: [", "release: [{footprint: {max_mb: 90}}, ")
    big = "  - prune.wanda: {}\n    gate: [{footprint: {max_mb: 600}}]\n  - quantize.rtn: {}\n"
    assert refusals.check(recipe(big.replace("{}\n    g", "{sparsity: 0.2}\n    g"), head), SMOL) == []


def test_a_margin_against_the_parent_is_comparable_only_where_the_parent_is_the_baseline() -> None:
    loose = "    gate: [{perplexity: {max_increase: 9%, against: parent}}]\n"
    assert "no later step" in refusal(recipe("  - quantize.rtn: {}\n" + loose))
    assert refusals.check(recipe("  - prune.wanda: {sparsity: 0.2}\n  - quantize.rtn: {}\n" + loose), SMOL) == []


@pytest.mark.parametrize("attempt", ["step", "alternative"])
def test_a_group_size_that_does_not_divide_is_refused_in_every_attempt(attempt: str) -> None:
    good, bad = "quantize.rtn: {group_size: 32}", "quantize.gptq: {group_size: 128}"
    first, second = (bad, good) if attempt == "step" else (good, bad)
    message = refusal(recipe(f"  - {first}\n    otherwise:\n      - {second}\n"))
    place = "9:5  steps[0]" if attempt == "step" else "11:9  steps[0] otherwise[0]"
    assert message.startswith(f"recipe.yaml:{place} quantize.gptq: model.layers.0.self_attn.q_proj: ")
    assert "576 input channels are not a multiple of group_size=128; use group_size=96" in message


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    message = refusal(recipe('  - quantize.rtn: {keep: {"*.gate": int8}}\n'))
    assert message.startswith("recipe.yaml:9:5  steps[0] quantize.rtn: keep: '*.gate' matches no linear")


@pytest.mark.parametrize(
    ("late", "verb"), [("distill.logits: {}", "trains"), ("prune.magnitude: {sparsity: 0.2}", "prunes")]
)
@pytest.mark.parametrize("packing", ["quantize.rtn: {}", "quantize.cast: {}"])
def test_nothing_trains_or_prunes_codes(late: str, verb: str, packing: str) -> None:
    message = refusal(recipe(f"  - {packing}\n  - {late}\n"))
    name = packing.split(":")[0]
    assert message.startswith(f"recipe.yaml:10:5  steps[1] {late.split(':')[0]}: {verb} after steps[0] {name} has")
    assert refusals.check(recipe(f"  - {late}\n  - {packing}\n"), SMOL) == []


def test_an_encoding_without_zero_is_refused_after_pruning() -> None:
    pruned = "  - prune.wanda: {sparsity: 0.2}\n"
    message = refusal(recipe(pruned + '  - quantize.rtn: {keep: {"*.o_proj": iq4_nl}}\n'))
    assert message.startswith("recipe.yaml:10:5  steps[1] quantize.rtn: model.layers.0.self_attn.o_proj.weight: iq4_nl")
    assert "holds no zero, and steps[0] prune.wanda has pruned weights; use int4 or mxfp4" in message
    mixed = "  - quantize.mixed: {target_bits: 4.0, choices: [int3, iq4_nl], method: rtn}\n"
    assert "iq4_nl g32 holds no zero" in refusal(recipe(pruned + mixed))
    assert refusals.check(recipe(mixed), SMOL) == []
    assert refusals.check(recipe(pruned + "  - quantize.rtn: {encoding: mxfp4}\n"), SMOL) == []
    assert refusals.check(recipe("  - quantize.rtn: {encoding: iq4_nl}\n"), SMOL) == []


SPARED = '  - prune.wanda: {sparsity: 0.2, layers: {"*.down_proj": 0.0}}\n'


def test_an_encoding_without_zero_is_refused_for_pruned_tensors_alone() -> None:
    apart = '  - quantize.rtn: {keep: {"*.down_proj": iq4_nl}, embeddings: iq4_nl}\n'
    assert refusals.check(recipe(SPARED + apart), SMOL) == []
    assert "0.mlp.down_proj.weight: iq4_nl" in refusal(recipe(SPARED.replace("0.0", '"2:4"') + apart))
    assert "0.self_attn.o_proj.weight: iq4_nl" in refusal(recipe(SPARED + apart.replace("down", "o")))
    assert "0.self_attn.q_proj.weight: iq4_nl" in refusal(recipe(SPARED + "  - quantize.rtn: {encoding: iq4_nl}\n"))
    # an alternative spares other tensors
    either = SPARED + "    otherwise:\n      - prune.magnitude: {sparsity: 0.1}\n"
    message = refusal(recipe(either + apart))
    assert "0.mlp.down_proj.weight: iq4_nl" in message and "steps[0] prune.magnitude has pruned weights" in message


def test_a_step_that_prunes_nothing_bars_no_other() -> None:
    nothing = '  - prune.wanda: {sparsity: 0.2, layers: {"*": 0}}\n'
    assert refusals.check(recipe(nothing + NARROW), SMOL) == []
    assert refusals.check(recipe(nothing + "  - quantize.rtn: {encoding: iq4_nl}\n"), SMOL) == []
    assert "after steps[0] prune.wanda has pruned single weights" in refusal(recipe(SPARED + NARROW))


NARROW, SHORT = "  - prune.neurons: {fraction: 0.25}\n", "  - prune.layers: {count: 3}\n"


@pytest.mark.parametrize("reshaping", [NARROW, SHORT])
@pytest.mark.parametrize(
    ("earlier", "held"),
    [("quantize.cast: {}", "stored the weights in an encoding"), ("prune.wanda: {sparsity: 0.2}", "pruned single")],
)
def test_masks_and_codes_fix_the_shapes(reshaping: str, earlier: str, held: str) -> None:
    message = refusal(recipe(f"  - {earlier}\n{reshaping}"))
    name = earlier.split(":")[0]
    assert message.startswith(
        f"recipe.yaml:10:5  steps[1] {reshaping[4:].split(':')[0]}: changes shapes after steps[0]"
    )
    assert f"{name} has {held}" in message and message.endswith("move it before steps[0]")
    assert refusals.check(recipe(f"{reshaping}  - {earlier}\n"), SMOL) == []


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "activation"])
def test_no_gradient_chooses_what_goes_once_the_cache_is_rounded(criterion: str) -> None:
    cache = "  - quantize.kv_cache: {}\n"
    narrow = f"  - prune.neurons: {{fraction: 0.25, criterion: {criterion}}}\n"
    assert refusals.check(recipe(narrow + cache), SMOL) == []
    if criterion == "activation":
        assert refusals.check(recipe(cache + narrow), SMOL) == []
        return
    message = refusal(recipe(cache + narrow))
    place = "recipe.yaml:10:5  steps[1] prune.neurons"
    assert message.startswith(f"{place}: takes gradients after steps[0] quantize.kv_cache")
    assert message.endswith("which has none; move it before steps[0] or choose another criterion")
    message = refusal(recipe(cache + "  - quantize.mixed: {}\n"))
    assert message.startswith("recipe.yaml:10:5  steps[1] quantize.mixed: takes gradients after steps[0]")
    assert message.endswith("which has none; move it before steps[0]")
    assert refusals.check(recipe("  - quantize.mixed: {}\n" + cache), SMOL) == []


def test_later_steps_are_judged_on_the_shapes_that_any_attempt_before_may_leave() -> None:
    keep = '  - quantize.rtn: {group_size: 48, keep: {"*.29.*": int8}}\n'  # 48 divides 576 and 1,536
    assert refusals.check(recipe(keep), SMOL) == []
    odd = "  - prune.neurons: {fraction: 0.2, round_to: 8}\n"  # 1,232 channels
    message = refusal(recipe(odd + keep))
    assert message.startswith("recipe.yaml:10:5  steps[1] quantize.rtn: model.layers.0.mlp.down_proj: 1232 input")
    alternative = "  - prune.neurons: {fraction: 0.25}\n    otherwise:\n    " + odd.strip() + "\n"
    assert "down_proj: 1232 input" in refusal(recipe(alternative.replace("    - p", "      - p") + keep))
    message = refusal(recipe(SHORT + keep))
    assert message.startswith("recipe.yaml:10:5  steps[1] quantize.rtn: keep: '*.29.*' matches no linear")
    assert refusals.check(recipe(SHORT + keep.replace("29", "26")), SMOL) == []


PAIRED = Facts.from_config(CONFIG | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64})
GPT2 = Facts.from_config({"model_type": "gpt2", "vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 2})


@pytest.mark.parametrize(
    ("facts", "first", "problem"),
    [
        (PAIRED, "prune.heads: {groups: 2}", "groups=2 leaves none of 2 key/value heads; use at most 1"),
        (PAIRED, "prune.heads: {queries: 4}", "queries=4 leaves none of 4 query heads; use at most 2"),
        (GPT2, "prune.heads: {groups: 2}", "the config of a gpt2 cannot say that heads and width no longer divide"),
    ],
)
def test_a_step_that_is_refused_is_named_before_any_step_behind_it(facts: Facts, first: str, problem: str) -> None:
    name = first.split(":")[0]
    second = '  - prune.heads: {queries: 1}\n  - quantize.rtn: {keep: {"*.down_proj": int8}}\n'
    message = refusal(recipe(f"  - {first}\n{second}"), facts)
    assert message.startswith(f"recipe.yaml:9:5  steps[0] {name}: ") and problem in message
    alternative = f"  - quantize.kv_cache: {{}}\n    otherwise:\n      - {first}\n{second}"
    message = refusal(recipe(alternative), facts)
    assert message.startswith(f"recipe.yaml:11:9  steps[0] otherwise[0] {name}: ") and problem in message


def test_an_exporter_is_asked_about_the_tensors_that_remain() -> None:
    last = '  - quantize.rtn: {encoding: fp, keep: {"*.29.*": int3}}\n'.replace("fp", "int8")
    export = "export:\n  - gguf: {}\n"
    assert "model.layers.29.self_attn.q_proj.weight: GGUF has no block" in refusal(recipe(last, export=export))
    two = '  - quantize.rtn: {encoding: int8}\n    otherwise:\n      - quantize.rtn: {keep: {"*.26.*": int3}}\n'
    assert "(stored by steps[1] otherwise[0]" in refusal(recipe(SHORT + two, export=export))
    assert refusals.check(recipe(SHORT + "  - quantize.rtn: {encoding: int8}\n", export=export), SMOL) == []


def test_codes_are_not_rounded_again() -> None:
    message = refusal(recipe("  - quantize.gptq: {}\n  - quantize.rtn: {}\n"))
    assert message.startswith("recipe.yaml:10:5  steps[1] quantize.rtn: model.layers.0.self_attn.q_proj.weight and 210")
    apart = '  - quantize.gptq: {embeddings: null}\n  - quantize.rtn: {keep: {"*": fp32}, embeddings: int8}\n'
    assert refusals.check(recipe(apart), SMOL) == []
    # alternatives start from the same parent: they do not follow one another
    assert refusals.check(recipe("  - quantize.gptq: {}\n    otherwise:\n      - quantize.rtn: {}\n"), SMOL) == []


@pytest.mark.parametrize("attempt", ["step", "alternative"])
def test_an_exporter_must_carry_the_final_encoding_of_every_attempt(attempt: str) -> None:
    good, bad = "quantize.rtn: {group_size: 32}", "quantize.rtn: {group_size: 3}"
    first, second = (bad, good) if attempt == "step" else (good, bad)
    r = recipe(f"  - {first}\n    otherwise:\n      - {second}\n", export="export:\n  - onnx: {}\n")
    message = refusal(r)
    assert message.startswith("recipe.yaml:13:5  export[0] onnx: model.layers.0.self_attn.q_proj.weight: int4 g3")
    origin = "steps[0] quantize.rtn" if attempt == "step" else "steps[0] otherwise[0] quantize.rtn"
    assert message.endswith(f"(stored by {origin})")
    assert refusals.check(recipe(f"  - {good}\n", export="export:\n  - onnx: {}\n"), SMOL) == []


def test_an_exporter_must_carry_every_choice_of_mixed_precision() -> None:
    export = "export:\n  - gguf: {}\n"
    message = refusal(recipe("  - quantize.mixed: {}\n", export=export))
    assert message.startswith("recipe.yaml:11:5  export[0] gguf: model.layers.0.self_attn.q_proj.weight: GGUF has no")
    assert "int3" in message and message.endswith("(stored by steps[0] quantize.mixed)")
    steps = "  - quantize.mixed: {choices: [int4, int5, int8], target_bits: 5}\n"
    r = recipe(steps, export=export)
    assert refusals.check(r, SMOL) == []
    size = plan._size(SMOL, r.steps[0].step.encodings(SMOL))
    linears = sum(n * m for n, m in SMOL.linears.values())
    apart = 49152 * 576 * 8.5 + 61 * 576 * 32  # embeddings in int8, norms in float32
    assert 4.99 < (8 * size["size_bytes"] - apart) / linears <= 5
    few = "  - quantize.mixed: {target_bits: 3}\n"
    assert "steps[0] quantize.mixed: target_bits=3.0: all linears take 3.500 bits" in refusal(recipe(few))


def test_scales_are_refined_only_where_codes_are_stored() -> None:
    scales = "  - quantize.scales: {tokens: 1024}\n"
    assert (
        refusals.check(recipe(f"  - quantize.gptq: {{}}\n{scales}", export="export: [gguf: {}, onnx: {}]\n"), SMOL)
        == []
    )
    message = refusal(recipe(scales))
    assert message.startswith("recipe.yaml:9:5  steps[0] quantize.scales: refines weights stored in codes, and no ")
    either = "  - quantize.rtn: {}\n    otherwise:\n      - quantize.cast: {}\n"
    assert "steps[1] quantize.scales: refines" in refusal(recipe(either + scales))
    late = f"  - quantize.rtn: {{}}\n{scales}  - distill.logits: {{}}\n"
    assert "steps[2] distill.logits: trains after steps[0] quantize.rtn" in refusal(recipe(late))
    loose = "  - quantize.rtn: {}\n    gate: [{perplexity: {max_increase: 20%}}]\n"  # a wound that scales may heal
    assert refusals.check(recipe(loose + scales), SMOL) == []


@pytest.mark.parametrize("refining", ["quantize.scales: {tokens: 1024}", "distill.qat: {tokens: 1024}"])
@pytest.mark.parametrize(
    "fields",
    [
        "rtn: {encoding: mxfp4}",
        'rtn: {keep: {"*": fp16}}',
        "rtn: {layers: []}",
        "ggml: {type: q4_1}",
        "hqq: {encoding: q5_1}",
        'gptq: {encoding: mxfp4, keep: {model.embed_tokens: int4, "*.down_proj": fp32}}',
    ],
)
def test_scales_are_refined_only_where_linears_have_float16_ones(fields: str, refining: str) -> None:
    message = refusal(recipe(f"  - quantize.{fields}\n  - {refining}\n"))
    assert message.startswith(f"recipe.yaml:10:5  steps[1] {refining.split(':')[0]}: refines weights stored in codes")
    assert "no earlier step stores linears with float16 scales in every attempt; quantize before it" in message
    sound = ["ggml: {type: q4_0}", "rtn: {encoding: iq4_nl}", 'rtn: {encoding: mxfp4, keep: {"*.down_proj": nf4}}']
    for other in sound:
        assert refusals.check(recipe(f"  - quantize.{other}\n  - {refining}\n"), SMOL) == []


def test_a_cache_is_rounded_once() -> None:
    cache = "  - quantize.kv_cache: {keys: int4}\n"
    message = refusal(recipe(f"{cache}  - quantize.rtn: {{}}\n  - quantize.kv_cache: {{}}\n"))
    assert message.startswith("recipe.yaml:11:5  steps[2] quantize.kv_cache: steps[0] rounds keys and values already")
    either = "  - quantize.rtn: {}\n    otherwise:\n      - quantize.kv_cache: {}\n"
    assert "steps[0] rounds keys and values already" in refusal(recipe(f"{either}{cache}"))
    # alternatives start from the same parent: they do not follow one another
    alone = f"{cache}    otherwise:\n      - quantize.kv_cache: {{}}\n"
    assert refusals.check(recipe(alone), SMOL) == []


@pytest.mark.parametrize(
    "fields",
    [
        'gptq: {keep: {"*": fp32}, embeddings: null}',
        "rtn: {layers: [], embeddings: fp32}",
        'ggml: {type: q4_0, keep: {"*": fp32}, embeddings: null}',
    ],
)
def test_a_step_that_stores_nothing_is_refused(fields: str) -> None:
    message = refusal(recipe(f"  - quantize.{fields}\n"))
    name = fields.split(":")[0]
    assert message.startswith(f"recipe.yaml:9:5  steps[0] quantize.{name}: stores no matrix in an encoding, so that")
    some = fields.replace("embeddings: null", "embeddings: fp16").replace("embeddings: fp32", "embeddings: fp16")
    assert refusals.check(recipe(f"  - quantize.{some}\n"), SMOL) == []


def test_an_exporter_judges_the_architecture() -> None:
    odd = Facts.from_config(CONFIG | {"head_dim": 40})
    message = refusal(recipe("  - quantize.cast: {}\n", export="export:\n  - onnx: {}\n"), odd)
    assert message.startswith("recipe.yaml:11:5  export[0] onnx: ")
    assert "40" in message


def test_a_plug_in_that_names_itself_is_named_once() -> None:
    fewer = "prune.heads: {groups: 1}"
    assert refusal(recipe(f"  - {fewer}\n"), GPT2).startswith("recipe.yaml:9:5  steps[0] prune.heads: the config of")
    narrow = "  - prune.hidden: {fraction: 0.5, round_to: ROUND}\n"
    message = refusal(recipe(narrow.replace("ROUND", "64")), GPT2)  # one of two heads, and 64 channels
    assert message.startswith("recipe.yaml:9:5  steps[0] prune.hidden: fraction=0.5 of 64 channels removes none")
    assert refusals.check(recipe(narrow.replace("ROUND", "16")), GPT2) == []
    place = r"^recipe\.yaml:9:30  steps\[0\] quantize\.hqq\.encoding: found 'nf4': quantize\.hqq chooses integer codes"
    with pytest.raises(RecipeError, match=place):
        recipe("  - quantize.hqq: {encoding: nf4}\n")
    rope = Facts.from_config(CONFIG | {"rope_scaling": {"type": "linear"}})
    message = refusal(recipe("  - quantize.rtn: {}\n", export="export:\n  - gguf: {}\n"), rope)
    assert message.startswith("recipe.yaml:11:5  export[0] gguf: rope scaling 'linear'")
    message = refusal(recipe("  - quantize.rtn: {}\n", export="export:\n  - onnx: {}\n"), GPT2)
    assert message.startswith("recipe.yaml:11:5  export[0] onnx genai carries exact weights")


def test_an_exporter_judges_encodings_together() -> None:
    step = '  - quantize.rtn: {group_size: 32, embeddings: fp16, keep: {"*.down_proj": KIND}}\n'
    export = "export:\n  - checkpoint: {format: gptq}\n"
    message = refusal(recipe(step.replace("KIND", "int8"), export=export))
    assert "export[0] checkpoint: gptq has one encoding for all linears" in message and "int8 g32" in message
    assert refusals.check(recipe(step.replace("KIND", "int4"), export=export), SMOL) == []


def test_a_mix_of_llama_cpps_needs_a_fallback_where_its_blocks_do_not_divide() -> None:
    message = refusal(recipe("  - quantize.ggml: {preset: Q4_K_M}\n"))
    assert "q_proj.weight has 576 input channels, which q4_k's blocks of 256 do not divide" in message
    assert refusals.check(recipe("  - quantize.ggml: {preset: Q4_K_M, fallback: llama.cpp}\n"), SMOL) == []


def test_windows_must_fit_the_context() -> None:
    short = Facts.from_config(CONFIG | {"max_position_embeddings": 256})
    message = refusal(recipe("  - quantize.rtn: {}\n"), short)
    assert message == ("recipe.yaml:3:3  data.calibration: length=512 exceeds the model's context of 256 tokens")


T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 256, "num_layers": 2}
T5 |= {"num_decoder_layers": 2, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "n_positions": 512}
T5 |= {"relative_attention_num_buckets": 8, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("role", "place", "reading"),
    [("calibration", "3:32", "quantize.gptq: {}"), ("selection", "4:30", "distill.logits: {tokens: 1024}")],
)
def test_a_budget_of_tokens_must_fill_a_window(role: str, place: str, reading: str) -> None:
    source = f"{role}: {{source: pydoc"
    head = HEAD.replace(", tokens: 4096", "").replace(source, f"{source}, tokens: 63")
    short, read = head.replace("tokens: 63", "tokens: 63, length: 64"), f"  - {reading}\n"
    message = refusal(recipe(f"  - quantize.kv_cache: {{}}\n    otherwise:\n    {read}", short))
    expected = f"{place}  data.{role}: tokens=63 fill no window of length=64; raise tokens or lower length"
    assert message == f"recipe.yaml:{expected}"
    assert "tokens=63 fill no window of length=512" in refusal(recipe(read, head))
    assert refusals.check(recipe(read, short.replace("63", "64")), SMOL) == []
    assert refusals.check(recipe("  - quantize.rtn: {}\n", short), SMOL) == []  # reads neither
    if role == "calibration":  # pairs are not cut into windows
        assert refusals.check(recipe(read, short), Facts.from_config(T5)) == []


# What deserves a warning


def test_what_is_off_or_looser_than_the_release_is_listed() -> None:
    steps = "  - quantize.rtn: {}\n    gate: off\n"
    export = "export:\n  - onnx: {}\n    gate: [{perplexity: {max_increase: 6%}}]\n"
    warnings = refusals.check(recipe(steps, export=export), SMOL)
    assert warnings == [
        "export[0] onnx: perplexity may lose +6.0 %, release +5.0 %",
        "steps[0] quantize.rtn: perplexity is off",
        "steps[0] quantize.rtn: no check judges this step alone, and its alternatives can never be tried",
    ]
