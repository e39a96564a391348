"""The quick way through a GGUF file finds what gguf-py finds, and refuses what ends early."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest
from gguf import GGUFReader, GGUFValueType
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from compress import source
from compress.encodings import Encoding
from compress.errors import Corrupt
from compress.gguf_header import LONG, Reader, quickly
from export._llama_cpp import find
from export.gguf import Gguf
from tests.tiny_gguf import encoded, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
LISTS = ("tokens", "token_type", "merges")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a vocabulary of 1,000 tokens, and two languages."""
    folder, model = tmp_path_factory.mktemp("file"), encoded(tiny(), Encoding("int4", 32))
    model.described = {"name": "m", "languages": ("en", "de")}
    Gguf().write(model, folder)
    return find(folder)


def test_fields_and_tensors_are_those_of_gguf_py(file: Path) -> None:
    quick, theirs = Reader(file), GGUFReader(file)
    lists = {f"tokenizer.ggml.{name}" for name in LISTS}
    assert list(quick.fields) == list(theirs.fields) and quick.data_offset == theirs.data_offset
    assert {name for name, field in theirs.fields.items() if len(field.data) >= LONG} == lists
    for name, field in theirs.fields.items():
        assert quick.fields[name].types == field.types
        assert quick.fields[name].contents() == field.contents()
    assert quick.fields["general.languages"].contents() == ["en", "de"]
    assert [(t.name, t.data.tobytes()) for t in quick.tensors] == [(t.name, t.data.tobytes()) for t in theirs.tensors]


def test_transformers_reads_the_same_by_either(file: Path) -> None:
    def parsed() -> dict[str, object]:
        found = load_gguf_checkpoint(file)
        return {part: found[part] for part in ("config", "tokenizer", "tokenizer_config")}

    theirs, before = parsed(), (gguf.GGUFReader, gguf.get_tensor_name_map)
    with quickly():
        assert gguf.GGUFReader is Reader and parsed() == theirs
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names and names.mapping == _names().mapping
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    with pytest.raises(Corrupt), quickly():
        raise Corrupt("a file")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def _names() -> gguf.TensorNameMap:
    return gguf.TensorNameMap(gguf.MODEL_ARCH.LLAMA, 2)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("count", [LONG + 10**6, 2**62, 2**64 - 1])
def test_an_array_that_ends_beyond_the_file_is_corrupt(file: Path, name: str, count: int, tmp_path: Path) -> None:
    raw = bytearray(file.read_bytes())
    field = GGUFReader(file).fields[f"tokenizer.ggml.{name}"]
    place = field.offset + 8 + len(field.name) + 8  # behind the key's length, the key, and two types
    assert struct.unpack_from("<Q", raw, place)[0] == len(field.data)
    struct.pack_into("<Q", raw, place, count)
    (tmp_path / "long.gguf").write_bytes(raw)
    with pytest.raises(Corrupt, match=r"long\.gguf: not a readable GGUF file"):
        source.gguf_fields(tmp_path / "long.gguf")


def test_a_text_longer_than_the_file_is_corrupt(file: Path, tmp_path: Path) -> None:
    raw = bytearray(file.read_bytes())
    field = GGUFReader(file).fields["tokenizer.ggml.tokens"]
    assert field.types == [GGUFValueType.ARRAY, GGUFValueType.STRING]
    struct.pack_into("<Q", raw, field.offset + 8 + len(field.name) + 16, 2**63 + 5)  # of the first token
    (tmp_path / "text.gguf").write_bytes(raw)
    with pytest.raises(Corrupt, match=r"text\.gguf: not a readable GGUF file"):
        source.gguf_fields(tmp_path / "text.gguf")
