"""GGUF files executed by llama.cpp, through llama-cpp-python's low-level interface.

One window runs per batch: several short windows in one batch measured no faster (157 against 159 tokens/s and
thread for windows of 100 tokens, SmolLM2-135M), and a window's logits then never depend on its neighbours.
"""

from __future__ import annotations

import ctypes
import hashlib
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.branching import Branches
from compress.errors import CompressError, Corrupt, RecipeError
from compress.numerics.sampling import Pick, greedy
from export import _gguf_cache
from export._chat import render

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 512  # tokens per call: larger ones measured no faster, and hold more logits at a time
_ERROR = 3  # llama.cpp's log level
_messages: deque[str] = deque(maxlen=8)  # llama.cpp's latest errors: the reason behind a null pointer

# What llama.cpp's CPU backend converts activations to, by the type of the weight they multiply.
_ACTIVATIONS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Special tokens by the names that chat templates know them by.
_SPECIAL = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",  # the format's spelling
    "pad": "tokenizer.ggml.padding_token_id",
}


def find(path: Path) -> Path:
    """The GGUF file that `path` is, or the only one in the folder it is; raises RecipeError."""
    if not path.is_dir():
        if not path.is_file():
            raise RecipeError(f"{path}: no such file; expected a .gguf file or a folder with one")
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise RecipeError(f"{path}: expected one .gguf file in the folder, found {len(found)}; name the file")
    return found[0]


def read(path: Path) -> Any:
    """The file's header, long arrays aside, and tensors (mapped, not loaded); raises RecipeError or Corrupt."""
    from compress.gguf_header import Header

    file = find(path)
    try:
        return Header(file)
    except (ValueError, IndexError, KeyError, OverflowError, OSError, RecursionError) as error:
        raise Corrupt(f"{file}: not a readable GGUF file ({error}); export it again") from error


class LlamaCpp:
    """A GGUF model in llama.cpp, on the processor, at its default settings but for the cache that the file asks for."""

    def __init__(self, path: Path, vocabulary_only: bool = False) -> None:
        """Open a file; raises RecipeError where it or the runtime is missing, Corrupt where it is broken.

        vocabulary_only: load no weights; `encode` and `eos_ids` work, nothing else does.
        """
        self._library = library()
        self.path = find(path)
        self._handles: dict[str, Any] = {}  # "model", "context"
        self._finalizer = weakref.finalize(self, _free, self._library, self._handles)
        self._context_size = 0
        # Parsed first: llama.cpp aborts the process on some malformed headers.
        self.compute = "none" if vocabulary_only else _compute(read(self.path))
        self.digest = "" if vocabulary_only else _sha256(self.path)
        parameters = self._library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.vocab_only = vocabulary_only
        parameters.check_tensors = True
        _messages.clear()
        started = time.perf_counter()
        model = self._library.llama_model_load_from_file(str(self.path).encode(), parameters)
        self.load_seconds = time.perf_counter() - started
        if not model:
            raise Corrupt(f"{self.path}: llama.cpp cannot load it ({_reason()})")
        self._handles["model"] = model
        self._vocabulary = self._library.llama_model_get_vocab(model)
        header = {key: self._metadata(key) for key in (_gguf_cache.KEYS, _gguf_cache.VALUES)}
        self._cache = _gguf_cache.types(header)
        self.runtime = f"llama.cpp (llama-cpp-python {metadata.version('llama-cpp-python')}; {_features()})"
        self.vocabulary_size: int = self._library.llama_vocab_n_tokens(self._vocabulary)
        self.context_length: int = self._library.llama_model_n_ctx_train(model)
        # What llama.cpp itself stops at: the declared ids, and tokens it knows by their text.
        ends = (i for i in range(self.vocabulary_size) if self._library.llama_vocab_is_eog(self._vocabulary, i))
        self.eos_ids: frozenset[int] = frozenset(ends)

    def encode(self, text: str) -> list[int]:
        """Token ids by llama.cpp's tokenizer; nothing is added, special-token texts are recognized."""
        data = text.encode()
        size = len(data) + 8  # no token is shorter than a byte
        ids = (ctypes.c_int32 * size)()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, size, False, True)
        if count < 0:
            raise CompressError(f"{self.path}: llama.cpp could not tokenize {len(data)} bytes (code {count})")
        return list(ids[:count])

    @property
    def bos_id(self) -> int | None:
        """The begin-of-sequence token that the file names."""
        found = self._metadata(_SPECIAL["bos"])
        return int(found) if found else None

    def encode_chat(self, message: str) -> list[int]:
        """Token ids of a user's message in the file's own chat template; of the plain text where it has none."""
        template = self._metadata("tokenizer.chat_template")
        if not template:
            return self.encode(message)
        declared = {f"{kind}_token": self._metadata(key) for kind, key in _SPECIAL.items()}
        texts = {kind: self.decode([int(token)]) for kind, token in declared.items() if token}
        return self.encode(render(template, message, texts, self.path))

    def _metadata(self, key: str) -> str:
        """A value of the file's header as text; empty where it is absent."""
        model, size = self._handles["model"], 1024
        for _ in range(2):  # a buffer that is too small is answered with the length that fits
            buffer = ctypes.create_string_buffer(size)
            length = self._library.llama_model_meta_val_str(model, key.encode(), buffer, size)
            if length < size:
                break
            size = length + 1
        return buffer.value.decode(errors="replace")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids by llama.cpp's vocabulary, special tokens written out."""
        # Piece by piece: llama_detokenize tidies the spaces before punctuation in some vocabularies.
        return b"".join(map(self._piece, ids)).decode(errors="replace")

    def _piece(self, token: int) -> bytes:
        size = 64
        for _ in range(2):  # a buffer that is too small is answered with the size that fits
            buffer = ctypes.create_string_buffer(size)
            count = self._library.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            size = -count
        raise CompressError(f"{self.path}: llama.cpp could not write out token {token} (code {count})")

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """One float32 (len(window), vocabulary) tensor per window, in order, each with an empty cache."""
        for window in windows:
            yield self._window(window, BATCH)

    def branch_logits(self, items: Sequence[Branches]) -> Iterator[list[Tensor]]:
        """See `compress.branching`: what continuations leave behind the context is dropped from the cache."""
        import torch

        for context, continuations in items:
            self._start(len(context) + max(map(len, continuations)) - 1)
            after = self._read(context, 0)[-1:]
            found = []
            for continuation in continuations:
                memory = self._library.llama_get_memory(self._handles["context"])
                if not self._library.llama_memory_seq_rm(memory, 0, len(context), -1):
                    raise CompressError(f"{self.path}: llama.cpp cannot drop tokens from this model's cache")
                found.append(torch.cat([after, self._read(continuation[:-1], len(context))]))
            yield found

    def decode_logits(self, window: Sequence[int]) -> Tensor:
        """Logits of one window, fed token by token through the key-value cache."""
        return self._window(window, 1)

    def stream(self, window: Sequence[int], prefill: int) -> Iterator[Tensor]:
        """Logits after the first `prefill` tokens at once, and after each further one, (vocabulary,) each."""
        self._start(len(window))
        rows, position = None, 0
        for chunk in _chunks(window[:prefill], BATCH):
            rows = self._decode(chunk, position, last_only=True)
            position += len(chunk)
        if rows is None:
            raise RecipeError("an empty prompt cannot be continued; give at least one token")
        yield rows[-1]
        for i in range(prefill, len(window)):
            yield self._decode(window[i : i + 1], i)[-1]

    def generate(self, prompt: Sequence[int], max_new_tokens: int, pick: Pick = greedy) -> list[int]:
        """Continuation, up to and including the first end-of-sequence token; pick: logits → token."""
        self._start(len(prompt) + max_new_tokens)
        position, row = 0, None
        for chunk in _chunks(prompt, BATCH):
            row = self._decode(chunk, position)[-1]
            position += len(chunk)
        if row is None:
            raise RecipeError("an empty prompt cannot be continued; give at least one token")
        tokens: list[int] = []
        while len(tokens) < max_new_tokens:
            tokens.append(pick(row))
            if tokens[-1] in self.eos_ids or len(tokens) == max_new_tokens:
                break
            row = self._decode(tokens[-1:], position)[-1]
            position += 1
        return tokens

    def close(self) -> None:
        """Release weights and cache; the object is of no use afterwards."""
        self._finalizer()

    def _window(self, window: Sequence[int], batch: int) -> Tensor:
        self._start(len(window))
        return self._read(window, 0, batch)

    def _read(self, tokens: Sequence[int], position: int, batch: int = BATCH) -> Tensor:
        """Logits (len(tokens), vocabulary) after `position` cached tokens, `batch` tokens at a time."""
        import torch

        out, done = torch.empty(len(tokens), self.vocabulary_size), 0
        for chunk in _chunks(tokens, batch):
            out[done : done + len(chunk)] = self._decode(chunk, position + done)
            done += len(chunk)
        return out

    def _start(self, size: int) -> None:
        """Empty the cache, and make it hold at least `size` tokens."""
        import torch

        if size > self.context_length:
            raise RecipeError(f"{size} tokens exceed the context of {self.context_length} of {self.path.name}")
        if size <= self._context_size:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._handles["context"]), True)
            return
        if old := self._handles.pop("context", None):
            self._context_size = 0
            self._library.llama_free(old)
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = min(-(-max(size, BATCH) // 256) * 256, self.context_length)
        parameters.n_batch = parameters.n_ubatch = BATCH
        if self._cache is not None:
            parameters.type_k = _gguf_cache.GGML_TYPES[self._cache.keys]
            parameters.type_v = _gguf_cache.GGML_TYPES[self._cache.values]
            parameters.flash_attn_type = self._library.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        _messages.clear()
        context = self._library.llama_init_from_model(self._handles["model"], parameters)
        if not context:
            raise CompressError(f"{self.path}: llama.cpp cannot make a context of {size} tokens ({_reason()})")
        self._handles["context"], self._context_size = context, parameters.n_ctx

    def _decode(self, tokens: Sequence[int], position: int, last_only: bool = False) -> Tensor:
        """Logits (len(tokens), vocabulary) after `position` cached tokens: a view, soon overwritten.

        last_only: those of the last token alone, (1, vocabulary), as llama.cpp computes them for a prompt.
        """
        import numpy as np
        import torch

        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = int(token), position + i
                batch.logits[i] = int(not last_only or i == len(tokens) - 1)
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            _messages.clear()
            code = self._library.llama_decode(self._handles["context"], batch)
        finally:
            self._library.llama_batch_free(batch)
        if code:
            raise CompressError(f"{self.path}: llama.cpp failed to compute {len(tokens)} tokens ({code}: {_reason()})")
        pointer = self._library.llama_get_logits(self._handles["context"])
        rows = 1 if last_only else len(tokens)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(rows, self.vocabulary_size)))


@cache
def library() -> Any:
    """llama-cpp-python's low-level module, silenced; raises RecipeError with the command that installs it."""
    try:
        import llama_cpp
    except ImportError as error:
        raise RecipeError(f"GGUF needs llama-cpp-python ({error}); pip install 'compress-toolkit[gguf]'") from error

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            _messages.append(text.decode(errors="replace").strip())

    library.keep = collect  # type: ignore[attr-defined]  # C holds the pointer: it must outlive this call
    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _reason() -> str:
    return "; ".join(_messages) or "no reason given"


def _features() -> str:
    """Processor features the kernels use, e.g. "AVX2 FMA": logits depend on them."""
    report = library().llama_print_system_info().decode()
    pairs = (part.split("=") for part in report.partition(":")[2].split("|") if "=" in part)
    return "CPU " + " ".join(key.strip() for key, value in pairs if value.strip() == "1")


def _compute(reader: Any) -> str:
    """Types of the matrices, by share of weights, and what activations become before they multiply them."""
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    kinds = [kind for kind, _ in sizes.most_common()]
    activations = dict.fromkeys(_ACTIVATIONS.get(kind, "int8") for kind in kinds)
    cache = _gguf_cache.types(_gguf_cache.asked(reader)) or "float16 cache"
    return f"{' + '.join(kinds)} weights, {' + '.join(activations)} activations, {cache}"


def _chunks(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (tokens[i : i + size] for i in range(0, len(tokens), size))


def _free(library: Any, handles: dict[str, Any]) -> None:
    if context := handles.pop("context", None):
        library.llama_free(context)
    if model := handles.pop("model", None):
        library.llama_model_free(model)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
