"""Encoder-decoders in torch: what is scored is a target, given the source that the encoder has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from compress.errors import RecipeError
from compress.model import Model
from compress.numerics.sampling import Pick, greedy
from compress.pairs import parted, split, window_of


def start_of(module: Any) -> int:
    """The token that a decoder begins with: of its generation config, its config, or padding, as T5's."""
    for held in (module.generation_config, module.config):
        if (found := getattr(held, "decoder_start_token_id", None)) is not None:
            return int(found)
    return int(module.config.pad_token_id)


def settle_head(module: Any, tied: bool) -> None:
    """Give a module a head of its own where its config.json says so: transformers ties T5's whatever it says."""
    if tied:
        return
    module._tied_weights_keys = {n: other for n, other in module._tied_weights_keys.items() if n != "lm_head.weight"}
    if module.lm_head.weight is module.shared.weight:
        module.lm_head.weight = nn.Parameter(module.shared.weight.detach().clone())


class Seq2Seq(Model):
    """A model whose decoder writes a target while it reads what the encoder has made of a source.

    Windows hold both, see `compress.pairs`; each side is cut to half of the context.
    """

    paired = True

    def __init__(self, module: Any, tokenizer: Any, *options: Any, **named: Any):
        super().__init__(module, tokenizer, *options, **named)
        self.start = start_of(module)
        if self.start in self.eos_ids:
            raise RecipeError(
                f"{self.name}: its decoder starts with token {self.start}, which ends a text: not supported"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a pair: the source's with what ends it, the decoder's start, the target's with what ends it."""
        source, target = self.tokenizer(list(parted(text)))["input_ids"]
        return window_of(source, target, self.start, self.context_length // 2)

    def head(self, states: Tensor) -> Tensor:
        """Logits (..., vocabulary) of the decoder's final states (..., width), scaled where the model does so."""
        return super().head(states * self.facts.output_scale)

    @torch.inference_mode()
    def decode_logits(self, window: Sequence[int]) -> Tensor:
        """Logits of one window's target, from its start on, fed token by token through the cache."""
        source, target = split(window, self.start)
        rows, known, cache = [], self._source(source), None
        for token in target:
            row, cache = self._step([token], known, cache)
            rows.append(row)
        return torch.stack(rows)

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_new_tokens: int, pick: Pick = greedy) -> list[int]:
        """What follows a window, a source with a start at least, up to and including what ends it."""
        source, target = split(prompt, self.start)
        tokens, known, cache, ids = list[int](), self._source(source), None, target
        for _ in range(max_new_tokens):
            row, cache = self._step(ids, known, cache)
            tokens.append(pick(row))
            if tokens[-1] in self.eos_ids:
                break
            ids = tokens[-1:]
        return tokens

    def read(self, window: Sequence[int] | Tensor) -> None:
        """Run both halves over one window."""
        self._states([split([int(token) for token in window], self.start)])

    def _hidden(self, windows: Sequence[Sequence[int]], batch: Sequence[int]) -> dict[int, Tensor]:
        pairs = [split(windows[i], self.start) for i in batch]
        with self._autocast():
            states = self._states(pairs)
        found = {i: states[row, : len(pairs[row][1])].clone() for row, i in enumerate(batch)}
        if self.recalled is not None:
            for i, state in found.items():
                self.recalled.put(windows[i], state)
        return found

    def _states(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Final states of the decoder, (pairs, longest target, width); both sides are padded on the right."""
        sources, mask = self._padded([source for source, _ in pairs])
        targets, _ = self._padded([target for _, target in pairs])
        read = self.module.encoder(input_ids=sources, attention_mask=mask).last_hidden_state
        out = self.module.decoder(
            input_ids=targets, encoder_hidden_states=read, encoder_attention_mask=mask, use_cache=False
        )
        states: Tensor = out.last_hidden_state
        return states

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        ids = torch.full((len(rows), max(map(len, rows))), self.start)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return ids, mask

    def _source(self, ids: list[int]) -> Tensor:
        with self._autocast():
            states: Tensor = self.module.encoder(input_ids=torch.tensor([ids])).last_hidden_state
        return states

    def _step(self, ids: Sequence[int], source: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits (vocabulary,) after these tokens of the decoder, and its cache with them."""
        with self._autocast():
            out = self.module.decoder(
                input_ids=torch.tensor([list(ids)]), encoder_hidden_states=source, past_key_values=cache, use_cache=True
            )
            row = self.head(out.last_hidden_state[0, -1])
        return row.float(), out.past_key_values

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RecipeError(f"{self.name} reads a source and writes a target: it goes on with no text of its own")

    stream = branch_logits = encode_chat = _refuse
