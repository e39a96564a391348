"""scripts/bench_references.py on a tiny model: code written for a GPU and for transformers 4 runs beside ours."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.tiny import tiny_model

SCRIPTS = Path(__file__).parents[1] / "scripts"
# Written as the repositories are: names, calls and devices of theirs, the mathematics of Han et al. 2015.
PRUNE = """
import torch
from .ablate import AblateGPT
from .data import get_loaders

def prune_magnitude(args, model, tokenizer, device):
    batches, _ = get_loaders("c4", nsamples=args.nsamples, seed=args.seed, seqlen=model.seqlen, tokenizer=tokenizer)
    assert len(batches) == args.nsamples and not model.hf_device_map
    for i, layer in enumerate(model.model.layers):
        states = model.model.embed_tokens(batches[0][0].to(device))
        positions = torch.arange(states.shape[1])[None]
        (states,) = layer(states, attention_mask=None, position_ids=positions)
        assert states.isfinite().all()
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                W = module.weight.data
                least = W.abs().flatten().cuda().sort()[0][int(W.numel() * args.sparsity_ratio) - 1].cpu()
                W[W.abs() <= least] = 0
    torch.cuda.synchronize()
"""


@pytest.fixture(scope="module")
def bench():
    """The script as a module, which imports another by name, as it does when it is run."""
    sys.path.insert(0, str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("bench_references", SCRIPTS / "bench_references.py")
    sys.modules["bench_references"] = module = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPTS))
    for name in ("bench_references", "bench_prune", "lib", "lib.prune", "lib.data", "lib.ablate"):
        sys.modules.pop(name, None)


def test_inputs_are_multiplied_as_number_by_number(bench):
    draw = torch.Generator().manual_seed(0)
    X, W = torch.randn(10, 24, generator=draw), torch.randn(6, 1, 3, 8, generator=draw)
    wrapped = bench._Inputs(X[None]).view(-1, 24).reshape(1, 10, -1, 8)[:, 0::2].to(W.device)
    plain = X.reshape(1, 10, 3, 8)[:, 0::2]
    assert wrapped.shape == plain.shape
    torch.testing.assert_close((wrapped * W).sum(dim=-1), (plain * W).sum(dim=-1))


def test_both_sides_of_a_row_are_pruned_from_the_same_weights(bench, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "prune.py").write_text(PRUNE)
    baseline = tiny_model()
    draw = torch.Generator().manual_seed(0)
    windows = [torch.randint(0, 256, (32,), generator=draw) for _ in range(4)]
    text = [window.tolist() for window in windows]
    before = baseline.digest
    row = bench.compared(bench.PAIRS["magnitude 50 %"], tmp_path, baseline, windows, text)
    assert row["ours"]["perplexity"] == row["theirs"]["perplexity"] and row["perplexity over theirs"] == 1
    assert row["theirs"]["perplexity"] != round(bench.perplexity(baseline, text), 3)
    assert baseline.digest == before


def test_a_block_answers_as_it_once_did_and_everything_is_put_back(bench):
    model = tiny_model()
    (block, *_), plain = model.module.model.layers, LlamaDecoderLayer.forward
    states, positions = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0)), torch.arange(12)[None]
    with torch.no_grad():
        expected = block(states, position_embeddings=model.module.model.rotary_emb(states, position_ids=positions))
        with bench.as_in_their_time(model.module):
            (found,) = block(states, attention_mask=None, position_ids=positions)
            assert not model.module.config.use_cache
            assert states.cuda() is states and states.cpu().data_ptr() != states.data_ptr()
            assert block.cuda() is block
            torch.cuda.synchronize()
    assert torch.equal(found, expected)
    assert model.module.config.use_cache and LlamaDecoderLayer.forward is plain
    assert states.cpu().data_ptr() == states.data_ptr()
