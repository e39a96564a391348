"""Walking a decoder block by block: what its linears see, and what leaves it."""

import copy
import weakref

import pytest
import torch

from compress import blocks, reuse
from compress.blocks import Block, walk
from compress.errors import RecipeError
from compress.numerics.products import working_type
from compress.pairs import joined
from compress.reuse import Reuse
from tests.tiny import tiny_model, tiny_of
from tests.tiny_classifier import tiny_classifier
from tests.tiny_seq2seq import sentences, tiny_seq2seq

pytestmark = pytest.mark.usefixtures("working")

WINDOWS = [torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def observed(block: Block) -> dict[str, torch.Tensor]:
    """The inputs of each group of linears in one plain pass, rounded as the products round them."""
    found: dict[str, list[torch.Tensor]] = {}
    block.observe(lambda names, X: found.setdefault(names[0], []).append(X.to(working_type())))
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_untouched_stages_see_what_one_plain_pass_shows():
    for block in walk(tiny_model(), WINDOWS, windows_per_batch=2):
        expected, left = observed(block), block.advance()
        found = {names[0]: torch.cat(inputs) for names, inputs in block.stages_in_turn()}
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert all(torch.equal(a, b) for a, b in zip(left, block.advance(), strict=True))


def test_states_that_enter_give_way_when_nothing_else_follows():
    walks = [walk(tiny_model(), WINDOWS, windows_per_batch=2) for _ in range(2)]
    kept, freed = map(next, walks)
    entered = [weakref.ref(states) for states in freed._states]
    places = [states.data_ptr() for states in freed._states]
    for _ in kept.stages_in_turn():
        pass
    for _ in freed.stages_in_turn(last=True):
        assert all(states() is not None for states in entered)
        assert all(torch.equal(a, b) for a, b in zip(freed._states, kept._states, strict=True))
    assert all(states() is None for states in entered)
    assert [states.data_ptr() for states in freed.advance()] == places
    assert all(torch.equal(a, b) for a, b in zip(kept.advance(), freed.advance(), strict=True))


@pytest.mark.parametrize("changed", range(4))
def test_later_stages_see_the_changes_of_earlier_ones(changed):
    model = tiny_model()
    for block in walk(model, WINDOWS):
        found = {}
        for i, (names, inputs) in enumerate(block.stages_in_turn()):
            found[names[0]] = torch.cat(inputs)
            if i == changed:
                for name in names:
                    model.parameter(f"{name}.weight").data.mul_(0.5)
        expected = observed(block)  # in one plain pass over the weights as they are now
        for names in block.stages[changed + 1 :]:
            assert torch.equal(found[names[0]], expected[names[0]])
        left = block.advance()
        block._left = None
        assert all(torch.equal(a, b) for a, b in zip(left, block.advance(), strict=True))


def test_originals_are_the_inputs_of_the_unchanged_model():
    untouched = [observed(block) for block in walk(tiny_model(), WINDOWS)]
    model = tiny_model()
    for block, expected in zip(walk(model, WINDOWS, windows_per_batch=2, originals=72), untouched, strict=True):
        *wanted, inner = expected
        assert inner.endswith("down_proj") and list(block.originals) == wanted
        assert all(torch.equal(torch.cat(block.originals[name]), expected[name]) for name in wanted)
        for name in block.linears:
            model.parameter(f"{name}.weight").data.mul_(0.5)
    assert not next(walk(model, WINDOWS)).originals


def test_originals_are_carried_for_the_first_batches_that_hold_so_many_tokens():
    untouched = [observed(block) for block in walk(tiny_model(), WINDOWS)]
    model = tiny_model()
    for block, expected in zip(walk(model, WINDOWS, windows_per_batch=1, originals=25), untouched, strict=True):
        assert block.originals
        for name, found in block.originals.items():
            assert [len(X) for X in found] == [24, 24] and torch.equal(torch.cat(found), expected[name][:48])
        for name in block.linears:
            model.parameter(f"{name}.weight").data.mul_(0.5)


def test_a_block_computes_in_the_memory_of_the_one_before():
    model, pool = tiny_model(), set[int]()
    for block in walk(model, WINDOWS[:2], windows_per_batch=1, originals=48):
        originals = {name: places(parts) for name, parts in block.originals.items()}
        entered, found = places(block._states), {}
        for names, inputs in block.stages_in_turn(last=True):
            found[names[0].rpartition(".")[2]] = places(inputs)
        assert not block.originals
        assert set(found["gate_proj"]) == set(found["q_proj"])  # whose turn is over
        assert places(block.advance()) == entered
        taken = {place for parts in [*originals.values(), *found.values()] for place in parts}
        assert block.index == 0 or taken == pool
        pool = taken


def test_states_of_the_unchanged_model_give_way_too():
    block, untouched = (next(walk(tiny_model(), WINDOWS, windows_per_batch=2)) for _ in range(2))
    entered = places(untouched._states)
    assert places(blocks._observe_originals(block, untouched)) == entered


def places(tensors: list[torch.Tensor]) -> list[int]:
    return [X.data_ptr() for X in tensors]


def test_encoders_and_decoders_compute_in_the_memory_of_the_block_before():
    pairs = [{"source": "one two three", "target": "drei zwei"}] * 4
    for model, windows in (
        (tiny_classifier("bert"), [window % 21 + 3 for window in WINDOWS[:2]]),
        (translator := tiny_seq2seq("t5"), [torch.tensor(translator.encode(joined(**pair))) for pair in pairs]),
    ):
        pools: dict[str, set[int]] = {}
        for block in walk(model, windows, windows_per_batch=1, originals=10):
            found = [place for parts in block.originals.values() for place in places(parts)]
            for _, inputs in block.stages_in_turn(last=True):
                found += places(inputs)
            assert pools.setdefault(block._stack.blocks, set(found)) == set(found)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "bert", "t5"])
def test_memory_that_is_taken_over_is_read_by_nobody_else(kind, monkeypatch):
    """Whatever is given or replaced is spoilt: everything that a walk shows is as without reuse."""
    give, replaced = Reuse.give, blocks.replaced
    if kind == "t5":
        model = tiny_seq2seq(kind)
        rows = sentences(8, seed=3)
        windows = [torch.tensor(model.encode(joined(row["source"], row["target"]))) for row in rows]
    else:
        model = tiny_classifier(kind) if kind == "bert" else tiny_of(kind, **{"num_hidden_layers": 4})
        drawn = torch.Generator().manual_seed(0)
        windows = list(torch.randint(3, 24, (4, 24), generator=drawn))

    def spoil(self, tensors):
        given = list(tensors)
        for X in given:
            with torch.inference_mode():
                X.fill_(torch.nan)
        give(self, given)

    def spoiling(old, new):
        with torch.inference_mode():
            new = new.clone()
            old.fill_(torch.nan)
        return replaced(old, new)

    def shown(way, take_over):
        monkeypatch.setattr(Reuse, "give", way)
        for module in (blocks, reuse):
            monkeypatch.setattr(module, "replaced", take_over)
        walked = copy.deepcopy(model)
        found = []
        for block in walk(walked, windows, windows_per_batch=2, originals=30):
            for names, inputs in block.stages_in_turn(last=True):
                found += [X.clone() for X in (*inputs, *block.originals.get(names[0], []))]
                for name in names:
                    walked.parameter(f"{name}.weight").data.mul_(0.9)
            found += [X.clone() for X in block.advance()]
        return found

    expected = shown(lambda self, tensors: None, lambda old, new: new)
    for way in ((give, replaced), (spoil, spoiling)):
        assert all(torch.equal(a, b) for a, b in zip(shown(*way), expected, strict=True))


def test_a_block_is_itself_again_even_when_its_stages_are_left_half_way():
    model = tiny_model()
    block = next(walk(model, WINDOWS))
    expected = block.advance()
    stages = block.stages_in_turn()
    for _ in range(3):
        next(stages)
    stages.close()
    assert all("forward" not in vars(module) for module in block.module.modules())
    assert all(torch.equal(a, b) for a, b in zip(block.advance(), expected, strict=True))


@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.down_proj"])
def test_the_stream_around_a_closing_linear_is_what_transformers_adds_up(part):
    model = tiny_model()
    for block in walk(model, WINDOWS, windows_per_batch=2):
        expected, left = observed(block), block.advance()
        streams: list[torch.Tensor] = []  # what enters the block, and what enters its second norm
        hooks = [
            block.module.get_submodule(norm).register_forward_pre_hook(lambda _, args, to=streams: to.append(args[0]))
            for norm in model.facts.architecture.block_norms
        ]
        assert all(torch.equal(a, b) for a, b in zip(block.advance(), left, strict=True))
        for hook in hooks:
            hook.remove()
        first, second = torch.cat(streams[0::2]).flatten(0, 1), torch.cat(streams[1::2]).flatten(0, 1)
        X, before, after = (torch.cat(t) for t in zip(*block.around(f"model.layers.{block.index}.{part}", last=True)))
        assert torch.equal(X.to(working_type()), expected[f"model.layers.{block.index}.{part}"])
        if part == "self_attn.o_proj":
            assert torch.equal(before, first) and torch.equal(after, second)
        else:
            torch.testing.assert_close(before, second, rtol=1e-5, atol=1e-5)  # a difference of float32 sums
            assert torch.equal(after, torch.cat(left).flatten(0, 1))
        assert all(torch.equal(a, b) for a, b in zip(block.advance(), left, strict=True))


def test_windows_are_asked_for_and_must_have_one_length():
    with pytest.raises(RecipeError, match="needs calibration data"):
        next(walk(tiny_model(), []))
    with pytest.raises(RecipeError, match=r"differ in length: \[8, 24\]"):
        next(walk(tiny_model(), [WINDOWS[0], WINDOWS[1][:8]]))
