"""The torch model under compression: a transformers module, its tokenizer, and the stored form of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.architectures import Facts
from compress.attention import IMPLEMENTATIONS, round_cache, speed_up
from compress.batching import batches, consecutive
from compress.branching import Branches, by_windows
from compress.conv1d import as_linears
from compress.encodings import EncodedTensor, Encoding
from compress.errors import CompressError, NumericalError, RecipeError
from compress.numerics.affine import finite
from compress.numerics.capping import capped
from compress.numerics.products import prefer_onednn
from compress.numerics.sampling import Pick, greedy
from compress.numerics.trie import Trie, trie, visible
from compress.rounding import CacheRounding, InputRounding, to_json

if TYPE_CHECKING:
    from compress.ggml_mixes import Importance
    from compress.streaming import Shelf

ROWS_OF_HEAD = 256  # of logits at a time: 50 MB at 49,152 tokens of vocabulary
RECALLED_BYTES = 96 * 2**20  # of hidden states: 40,000 tokens at a width of 576
_NOT_CONTENT = ("_name_or_path", "transformers_version", "architectures", "dtype")  # entries that change no output


def config_of(module: Any) -> dict[str, Any]:
    """A module's config with the head that its class has and, of an encoder-decoder, whether that is tied."""
    found = {**module.config.to_dict(), "architectures": [type(module).__name__]}
    if hasattr(module, "shared") and hasattr(module, "lm_head"):
        found["tie_word_embeddings"] = module.lm_head.weight is module.shared.weight
    return found


def facts_of(module: Any) -> Facts:
    """Facts of a transformers module: see `config_of`."""
    return Facts.from_config(config_of(module))


class Recalled:
    """Final hidden states by window, for a model that is asked for the same text again and again.

    They take a hundredth of their logits' room, and the head alone turns them into logits. The first that come are
    kept, up to `RECALLED_BYTES`; whoever opens the very same model again may go on with them.
    """

    def __init__(self) -> None:
        self._states: dict[tuple[int, ...], Tensor] = {}
        self._free = RECALLED_BYTES

    def get(self, window: Sequence[int]) -> Tensor | None:
        """The states of a window, (length, width), or None."""
        return self._states.get(tuple(window))

    def put(self, window: Sequence[int], states: Tensor) -> None:
        """Keep the states of a window while there is room."""
        if states.nbytes <= self._free and tuple(window) not in self._states:
            self._states[tuple(window)] = states
            self._free -= states.nbytes


class Model:
    """A causal language model in torch, with the encodings and masks of its weights.

    module: float32 transformers model in eval mode, its Conv1D modules made nn.Linear in place; the float32 weight of
    an encoded tensor always equals the decoded encoding. encoded, masks: by tensor name, as in `named_parameters`.
    dtype: of matrix products in evaluation ("float32" or "bfloat16"); weights stay float32. name: for people, never
    part of the digest.
    inputs, cache: what every forward pass rounds, besides; inputs by name of the linear.
    importance: where libggml rounded some of its tensors by importances, what those were measured on.
    described: of where it comes from, as `compress.lineage` has it, for files that say so; like `importance` never part
    of the digest.
    recalled: set where the same windows will be asked for again. shelf: of a model whose blocks are on disk.
    """

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        dtype: str = "float32",
        name: str = "model",
        tokens_per_batch: int = 4096,
        shelf: Shelf | None = None,
    ):
        self.module = module.eval()
        as_linears(self.module)
        speed_up(self.module)
        prefer_onednn()
        self.name = name
        self.tokenizer = tokenizer
        self.facts = facts_of(module)
        self.shelf = shelf
        self.encoded: MutableMapping[str, EncodedTensor] = {} if shelf is None else shelf.encoded
        self.masks: dict[str, Tensor] = {}
        self.inputs: dict[str, InputRounding] = {}
        self.cache: CacheRounding | None = None
        self.importance: Importance | None = None
        self.described: Mapping[str, Any] = {}
        self.dtype = dtype
        self.tokens_per_batch = tokens_per_batch  # bounds activations: a few MB per 100 tokens
        self.recalled: Recalled | None = None
        self._digest: str | None = None

    # --- stored form -------------------------------------------------------------------------------------

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter called `name`, e.g. "model.layers.0.mlp.up_proj.weight"."""
        if self.shelf is not None:
            self.shelf.fetch(name)
        parameter = self.module.get_parameter(name)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def encoding(self, name: str) -> Encoding | None:
        """The encoding of a tensor, None for float32, without reading it."""
        if self.shelf is not None:
            return self.shelf.encoded.encodings.get(name)
        return self.encoded[name].encoding if name in self.encoded else None

    @torch.no_grad()
    def store(self, name: str, encoded: EncodedTensor) -> None:
        """Hold the tensor `name` in an encoding from now on, and write its decoded values into the module.

        Raises NumericalError for non-finite values, CompressError where a masked weight is not zero.
        """
        decoded = encoded.decode()
        if not finite(decoded):
            raise NumericalError(f"{name}: {encoded.encoding} produced non-finite weights")
        if name in self.masks and decoded[~self.masks[name]].any():
            raise CompressError(f"{name}: {encoded.encoding} would resurrect pruned weights")
        self.parameter(name).copy_(decoded)
        self.encoded[name] = encoded
        self.touch()

    def round_inputs(self, linear: str, rounding: InputRounding) -> None:
        """Round what the linear reads from now on, in every forward pass."""
        if linear in self.inputs:
            raise CompressError(f"{linear}: its inputs are rounded already ({self.inputs[linear]})")
        self.module.get_submodule(linear).register_forward_pre_hook(lambda _, args: (rounding(args[0]), *args[1:]))
        self.inputs[linear] = rounding
        self.touch()

    def round_cache(self, rounding: CacheRounding) -> None:
        """Round every key and value from now on before attention reads it, as a quantized cache would hold them."""
        arch = self.facts.architecture
        names = [f"{arch.blocks}.{i}.{arch.attention}" for i in range(self.facts.layers)]
        round_cache(self.module, [self.module.get_submodule(name) for name in names], rounding)
        self.cache = rounding
        self.touch()

    def reshaped(self) -> None:
        """Read the facts from the config again: shapes have changed."""
        self.facts = facts_of(self.module)
        self.touch()

    def touch(self) -> None:
        """Forget the digest and what was computed: weights have changed."""
        self._digest = None
        self.recalled = None
        if self.shelf is not None:
            self.shelf.changed()

    def tensors(self) -> Iterator[tuple[str, EncodedTensor | Tensor]]:
        """Every stored tensor once, in module order; a head tied to the embedding is left out."""
        for name in [name for name, _ in self.module.named_parameters()]:
            yield name, self.tensor(name)

    def tensor(self, name: str) -> EncodedTensor | Tensor:
        """The stored form of one tensor."""
        return self.encoded[name] if name in self.encoded else self.parameter(name).detach()

    @property
    def digest(self) -> str:
        """sha256 over the config, every stored tensor (codes, scales, zero points, floats) and what else is rounded."""
        if self._digest is None:
            config = self.module.config.to_dict()
            config = {key: config[key] for key in config if key not in _NOT_CONTENT}
            sha = hashlib.sha256(json.dumps(config, default=str, sort_keys=True).encode())
            for name, tensor in self.tensors():
                parts = [tensor] if isinstance(tensor, Tensor) else [tensor.codes, tensor.scales, tensor.zero_points]
                sha.update(f"{name}:{'' if isinstance(tensor, Tensor) else tensor.encoding}".encode())
                for part in parts:
                    if part is not None:
                        sha.update(part.contiguous().view(torch.uint8).numpy().data)
            if rounded := to_json(self.inputs, self.cache):
                sha.update(json.dumps(rounded, sort_keys=True).encode())
            self._digest = sha.hexdigest()
        return self._digest

    # --- language model ----------------------------------------------------------------------------------

    @property
    def runtime(self) -> str:
        """The runtime and its version."""
        return f"torch {torch.__version__}"

    @property
    def compute(self) -> str:
        """Weight dtype and precision of matrix products."""
        kinds = sorted({str(self.encoding(name)) for name in self.encoded}) or ["float32"]
        rounded = sorted({str(r) for r in (*self.inputs.values(), *([self.cache] if self.cache else []))})
        return ", ".join([f"{' + '.join(kinds)} weights", *rounded, f"{self.dtype} products"])

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes that a classification head tells apart; none of a language model."""
        return self.facts.labels

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self.facts.vocabulary

    @property
    def context_length(self) -> int:
        """Longest window the position embedding was made for."""
        return self.facts.context_length

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a generation."""
        ids = self.module.generation_config.eos_token_id
        return frozenset([] if ids is None else ids if isinstance(ids, list) else [ids])

    @property
    def bos_id(self) -> int | None:
        """The tokenizer's begin-of-sequence token."""
        found: int | None = self.tokenizer.bos_token_id
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added before or after, special-token texts are recognized."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode_chat(self, message: str) -> list[int]:
        """Token ids of a user's message in the tokenizer's chat template; of the plain text where it has none."""
        if not self.tokenizer.chat_template:
            return self.encode(message)
        chat = [{"role": "user", "content": message}]
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may fail in any way, as any program
            raise RecipeError(f"{self.name}: its chat template cannot be rendered ({error}); repair it") from error
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens written out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files, without the padding and truncation that were asked of it last."""
        if backend := getattr(self.tokenizer, "backend_tokenizer", None):
            backend.no_padding()
            backend.no_truncation()
        self.tokenizer.save_pretrained(folder)

    @torch.inference_mode()
    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """One float32 (len(window), vocabulary) tensor per window, in order.

        Windows run in batches of similar length, padded on the right: under a causal mask padding cannot
        reach an earlier position. Only hidden states are kept; the head runs over some windows at a time.
        """
        hidden: dict[int, Tensor] = {}
        if self.recalled is not None:
            hidden = {i: known for i, w in enumerate(windows) if (known := self.recalled.get(w)) is not None}
        missing = [i for i in range(len(windows)) if i not in hidden]
        for batch in batches([len(windows[i]) for i in missing], self.tokens_per_batch):
            hidden |= self._hidden(windows, [missing[k] for k in batch])
        for run in consecutive([len(w) for w in windows], ROWS_OF_HEAD):
            states = [hidden.pop(i) for i in run]
            with self._autocast():
                rows = self.head(torch.cat(states)).float()
            yield from torch.split(rows, [len(state) for state in states])

    def head(self, states: Tensor) -> Tensor:
        """Logits (..., vocabulary) of final hidden states (..., width), capped where the model does so."""
        logits: Tensor = self.module.get_output_embeddings()(states)
        return capped(logits, self.facts.logit_cap)

    def _hidden(self, windows: Sequence[Sequence[int]], batch: Sequence[int]) -> dict[int, Tensor]:
        """Final hidden states, (length, width) each, of the windows with these indices."""
        ids = torch.zeros(len(batch), max(len(windows[i]) for i in batch), dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(windows[i])] = torch.tensor(windows[i])
        with self._autocast():
            states = self.module.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found = {i: states[row, : len(windows[i])].clone() for row, i in enumerate(batch)}
        if self.recalled is not None:
            for i, state in found.items():
                self.recalled.put(windows[i], state)
        return found

    @torch.inference_mode()
    def branch_logits(self, items: Sequence[Branches]) -> Iterator[list[Tensor]]:
        """See `compress.branching`: each context is read once, and the head runs over the rows that are asked for.

        Context and continuations are one row of tokens, of which each attends to its ancestors alone.
        """
        tries = [trie(context, continuations) for context, continuations in items]
        if not self._reads_trees(max((max(t.depths) for t in tries), default=0)):
            yield from by_windows(self, items)
            return
        hidden: dict[int, Tensor] = {}
        for batch in batches([len(t.tokens) for t in tries], self.tokens_per_batch):
            hidden |= self._hidden_trees(tries, batch)
        for i, tree in enumerate(tries):
            nodes = sorted({node for path in tree.paths for node in path})
            with self._autocast():
                rows = self.head(hidden.pop(i)[nodes]).float()
            place = {node: row for row, node in enumerate(nodes)}
            yield [rows[[place[node] for node in path]] for path in tree.paths]

    def _reads_trees(self, deepest: int) -> bool:
        """Whether attention takes a mask of ours, and no sliding window would have narrowed it."""
        config = self.module.config
        window = getattr(config, "sliding_window", None)
        return config._attn_implementation in IMPLEMENTATIONS and (window is None or deepest < window)

    def _hidden_trees(self, tries: Sequence[Trie], batch: Sequence[int]) -> dict[int, Tensor]:
        """Final hidden states, (tokens, width) each, of the trees with these indices."""
        longest = max(len(tries[i].tokens) for i in batch)
        ids, positions = torch.zeros(2, len(batch), longest, dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(tries[i].tokens)] = torch.tensor(tries[i].tokens)
            positions[row, : len(tries[i].tokens)] = torch.tensor(tries[i].depths)
        mask = torch.stack([visible(tries[i], longest) for i in batch])[:, None]
        with self._autocast():
            states = self.module.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        return {i: states[row, : len(tries[i].tokens)].clone() for row, i in enumerate(batch)}

    @torch.inference_mode()
    def decode_logits(self, window: Sequence[int]) -> Tensor:
        """Logits of one window, (len(window), vocabulary), fed token by token through the cache."""
        rows, cache = [], None
        for token in window:
            with self._autocast():
                out = self.module(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1].float())
        return torch.stack(rows)

    def read(self, window: Sequence[int] | Tensor) -> None:
        """Run the blocks over one window, without the head: for whoever has hooks on them."""
        self.module.base_model(input_ids=torch.as_tensor(window)[None], use_cache=False)

    @torch.inference_mode()
    def norm_outputs(self, norms: Sequence[str], window: Sequence[int]) -> list[Tensor]:
        """Output of each norm, by its module's name, on one window: (len(window), width) float32 each."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda module, inputs, output: found.update({name: output[0].float().clone()})

        hooks = [self.module.get_submodule(name).register_forward_hook(keep(name)) for name in norms]
        try:
            with self._autocast():
                self.read(window)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[name] for name in norms]

    @torch.inference_mode()
    def stream(self, window: Sequence[int], prefill: int) -> Iterator[Tensor]:
        """Logits after the first `prefill` tokens at once, and after each further one, (vocabulary,) each."""
        cache = None
        for part in (window[:prefill], *([token] for token in window[prefill:])):
            with self._autocast():
                ids = torch.tensor([list(part)])
                out = self.module(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            yield out.logits[0, -1].float()

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_new_tokens: int, pick: Pick = greedy) -> list[int]:
        """Continuation, up to and including the first end-of-sequence token; pick: logits → token."""
        tokens, cache, ids = [], None, torch.tensor([list(prompt)])
        for _ in range(max_new_tokens):
            with self._autocast():
                out = self.module(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            token = pick(out.logits[0, -1].float())
            tokens.append(token)
            if token in self.eos_ids:
                break
            ids = torch.tensor([[token]])
        return tokens

    def close(self) -> None:
        """Drop the weights."""
        del self.module
        if self.shelf is not None:
            self.shelf.close()

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")
