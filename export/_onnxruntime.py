"""A language model executed by onnxruntime, from the folder that the ONNX exporter writes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.batching import batches, consecutive
from compress.errors import Corrupt, RecipeError
from compress.numerics.sampling import Pick, greedy
from export import _onnx_file
from export._chat import render
from export._onnx_packing import INT8_ACTIVATIONS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

CONFIG = "genai_config.json"
TOKENIZER = "tokenizer.json"
TOKENS_PER_RUN = 512  # bounds the logits held at a time: 100 MB at 49,152 tokens of vocabulary
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TOKENS_PER_CHUNK = 256  # of a prompt that is read into the cache


@dataclass(frozen=True)
class Shapes:
    """What genai_config.json says of the model."""

    layers: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context_length: int
    eos_ids: frozenset[int]

    @staticmethod
    def read(path: Path) -> Shapes:
        """Shapes of a genai_config.json; raises Corrupt."""
        try:
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            decoder, eos = model["decoder"], model.get("eos_token_id")
            return Shapes(
                layers=int(decoder["num_hidden_layers"]),
                kv_heads=int(decoder["num_key_value_heads"]),
                head_size=int(decoder["head_size"]),
                vocabulary=int(model["vocab_size"]),
                context_length=int(model["context_length"]),
                eos_ids=frozenset([] if eos is None else eos if isinstance(eos, list) else [eos]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{path} cannot be read: {error!r}") from error


class OnnxModel:
    """`LanguageModel` over an onnxruntime session on the CPU, in float32 outside the weight products."""

    def __init__(self, folder: Path, graph: Any):
        import onnxruntime

        self._shapes = self._read_shapes(folder)
        self._tokenizer = _tokenizer(folder / TOKENIZER)
        self._folder = folder
        started = time.perf_counter()
        self._session = session(folder / self._graph_file, self._settings)
        self.load_seconds = time.perf_counter() - started
        self.vocabulary_size = self._shapes.vocabulary
        self.context_length = self._shapes.context_length
        self.eos_ids = self._shapes.eos_ids
        self.digest = folder_digest(folder)
        self.runtime = f"onnxruntime {onnxruntime.__version__} (CPUExecutionProvider)"
        self.compute = compute_of(graph)

    _settings: Mapping[str, str] = {}  # entries of the session's configuration
    _graph_file = _onnx_file.GRAPH

    def _read_shapes(self, folder: Path) -> Shapes:
        return Shapes.read(folder / CONFIG)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added before or after."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @property
    def bos_id(self) -> int | None:
        """The begin-of-sequence token that the folder's tokenizer_config.json names."""
        text = _chat(self._folder)[1].get("bos_token")
        found: int | None = None if text is None else self._tokenizer.token_to_id(text)
        return found

    def encode_chat(self, message: str) -> list[int]:
        """Token ids of a user's message in the folder's own chat template; of the plain text where it has none."""
        template, special_tokens = _chat(self._folder)
        return self.encode(render(template, message, special_tokens, self._folder) if template else message)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens written out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """One float32 (len(window), vocabulary) tensor per window, in order.

        Windows of similar length run together, padded on the right, where a causal model cannot see the padding. A
        window longer than `TOKENS_PER_RUN` is read into the cache in chunks, as onnxruntime-genai may: at 2,048
        tokens its logits alone are 400 MB.
        """
        import torch

        for run in consecutive([len(window) for window in windows], TOKENS_PER_RUN):
            part = windows[run.start : run.stop]
            if len(part[0]) > TOKENS_PER_RUN:
                yield self._in_chunks(part[0])
                continue
            found: dict[int, np.ndarray] = {}
            for batch in batches([len(window) for window in part], TOKENS_PER_RUN):
                logits = self._prefill([part[i] for i in batch])
                found.update((i, logits[row, : len(part[i])]) for row, i in enumerate(batch))
            for i in range(len(part)):
                yield torch.from_numpy(found.pop(i))

    def _in_chunks(self, window: Sequence[int]) -> Tensor:
        import torch

        ids, rows = self._ids(window), torch.empty(len(window), self.vocabulary_size)
        cache = _Cache(self._session, self._shapes, len(window))
        for start in range(0, len(ids), TOKENS_PER_CHUNK):
            chunk = ids[start : start + TOKENS_PER_CHUNK]
            rows[start : start + len(chunk)] = torch.from_numpy(cache.step(chunk))
        return rows

    def decode_logits(self, window: Sequence[int]) -> Tensor:
        """Logits of one window, (len(window), vocabulary), fed token by token through the cache."""
        import torch

        cache = _Cache(self._session, self._shapes, len(window))
        ids = self._ids(window)
        return torch.cat([torch.from_numpy(cache.step(ids[t : t + 1])) for t in range(len(window))])

    def stream(self, window: Sequence[int], prefill: int) -> Iterator[Tensor]:
        """Logits after the first `prefill` tokens at once, and after each further one, (vocabulary,) each."""
        import torch

        ids, cache = self._ids(window), _Cache(self._session, self._shapes, len(window))
        for start in range(0, prefill, TOKENS_PER_CHUNK):
            rows = cache.step(ids[start : min(start + TOKENS_PER_CHUNK, prefill)])
        yield torch.from_numpy(rows[-1])
        for t in range(prefill, len(ids)):
            yield torch.from_numpy(cache.step(ids[t : t + 1])[-1])

    def generate(self, prompt: Sequence[int], max_new_tokens: int, pick: Pick = greedy) -> list[int]:
        """Continuation, up to and including the first end-of-sequence token; pick: logits → token."""
        limit = min(len(prompt) + max_new_tokens, self.context_length)
        ids, tokens = self._ids(prompt), list[int]()
        cache = _Cache(self._session, self._shapes, limit)
        for start in range(0, len(ids), TOKENS_PER_CHUNK):
            last = cache.step(ids[start : start + TOKENS_PER_CHUNK])[-1]
        while len(tokens) < limit - len(ids):
            tokens.append(pick(last))
            if tokens[-1] in self.eos_ids or len(tokens) == limit - len(ids):
                break
            last = cache.step(self._ids(tokens[-1:]))[-1]
        return tokens

    def norm_outputs(self, norms: Sequence[str], window: Sequence[int]) -> list[Tensor]:
        """Output of each norm on one window, (len(window), width) each, by a second session of the same graph."""
        import torch

        found = self._values(self._graph_file, norms, self._feed([window]))
        return [torch.from_numpy(array[0]) for array in found]

    def _values(self, file: str, norms: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """What the norms of one graph of the folder compute."""
        import onnx

        graph = onnx.load(self._folder / file, load_external_data=False)
        names = [_onnx_file.norm_output(graph, norm) for norm in norms]
        known = {value.name for value in graph.graph.output}
        graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known)
        beside = {"session.model_external_initializers_file_folder_path": str(self._folder)}
        second = session(graph.SerializeToString(), {**self._settings, **beside})
        found: list[np.ndarray] = second.run(names, dict(feed))
        return found

    def close(self) -> None:
        """Release the session and its weights."""
        del self._session

    def _ids(self, window: Sequence[int]) -> np.ndarray:
        """The window as int64, or RecipeError where the model cannot take it."""
        import numpy as np

        ids = np.asarray(window, dtype=np.int64)
        if not 0 < len(ids) <= self.context_length:
            raise RecipeError(f"a window of {len(ids)} tokens; this model takes 1 to {self.context_length}")
        if ids.min() < 0 or ids.max() >= self.vocabulary_size:
            raise RecipeError(f"token ids {ids.min()} to {ids.max()} are outside 0 to {self.vocabulary_size - 1}")
        return ids

    def _prefill(self, batch: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits (windows, longest, vocabulary) of windows that start with an empty cache."""
        logits: np.ndarray = self._session.run(["logits"], self._feed(batch))[0]
        return logits

    def _feed(self, batch: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """All inputs: windows padded on the right, and an empty cache."""
        import numpy as np

        shape = (len(batch), self._shapes.kv_heads, 0, self._shapes.head_size)
        empty = {name: np.zeros(shape, np.float32) for name, _ in _cache_names(self._shapes.layers)}
        return {**self._padded(batch), **empty}

    def _padded(self, batch: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """Token ids and mask of windows, padded on the right."""
        import numpy as np

        ids = np.zeros((len(batch), max(map(len, batch))), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, window in enumerate(batch):
            ids[row, : len(window)] = self._ids(window)
            mask[row, : len(window)] = 1
        return {"input_ids": ids, "attention_mask": mask}


class _Cache:
    """Keys and values of one sequence, in buffers that the session reads and extends in place."""

    def __init__(self, session: Any, shapes: Shapes, capacity: int):
        import numpy as np
        import onnxruntime

        self.session = session
        self.length = 0
        self.binding = session.io_binding()
        room = (1, shapes.kv_heads, capacity, shapes.head_size)
        for past, present in _cache_names(shapes.layers):
            # An OrtValue borrows its array: each needs one of its own.
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(room, np.float32))
            self.binding.bind_ortvalue_input(past, buffer)
            self.binding.bind_ortvalue_output(present, buffer)

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens (t,) to the sequence; logits (t, vocabulary)."""
        import numpy as np

        self.length += len(ids)
        # The binding borrows the arrays' memory: keep them alive until the run is over.
        inputs = {"input_ids": ids[None].copy(), "attention_mask": np.ones((1, self.length), np.int64)}
        for name, array in inputs.items():
            self.binding.bind_cpu_input(name, array)
        self.binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(self.binding)
        # Outputs come in the order of first binding: the caches, then the logits.
        logits: np.ndarray = self.binding.get_outputs()[-1].numpy()
        rows: np.ndarray = logits[0]
        return rows


def _cache_names(layers: int) -> Iterator[tuple[str, str]]:
    """Names of (past, present) keys and values."""
    for layer in range(layers):
        for part in ("key", "value"):
            yield f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"


def session(graph: Path | bytes, settings: Mapping[str, str]) -> Any:
    """An onnxruntime session of a graph, by its file or its bytes; raises Corrupt."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as the models that it is compared with
    options.log_severity_level = 3  # errors reach us as exceptions
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    try:
        source = graph if isinstance(graph, bytes) else str(graph)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class per status code, without a common base
        name = "a graph with more outputs" if isinstance(graph, bytes) else graph
        raise Corrupt(f"{name}: onnxruntime cannot load it: {error}") from error


def _tokenizer(path: Path) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise Corrupt(f"{path} cannot be read: {error}") from error


def _chat(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The folder's chat template, and the texts of the special tokens that a template may name; raises Corrupt."""
    path = folder / TOKENIZER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in config.items()}
        template = folder / TEMPLATE
        found = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
        if isinstance(found, list):  # several templates by name
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise Corrupt(f"{path} cannot be read: {error!r}") from error
    special = {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}
    return found, special


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of the folder's files."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as file:
            total.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def compute_of(*graphs: Any) -> str:
    """The distinct encodings of the weights, and the precision that products take activations in."""
    held = (encoding for graph in graphs for encoding in _onnx_file.encodings(graph).values())
    kinds = sorted({str(encoding) for encoding in held if encoding is not None})
    products = {
        "int8"
        if node.op_type == "MatMulInteger"
        or node.op_type == "MatMulNBits"
        and node.attributes["accuracy_level"].as_int() == INT8_ACTIVATIONS
        else "float32"
        for graph in graphs
        for node in graph.graph
        if node.op_type in ("MatMul", "MatMulNBits", "MatMulInteger")
    }
    return f"{' + '.join(kinds) or 'float32'} weights, {' + '.join(sorted(products))} activations"
