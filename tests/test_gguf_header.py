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
from compress.gguf_header import LONG, MOST, Header, Reader, quickly
from export import _llama_cpp
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
    short, quick, theirs = Header(file), Reader(file), GGUFReader(file)
    tensors = [(t.name, t.data.tobytes()) for t in theirs.tensors]
    lists = {f"tokenizer.ggml.{name}" for name in LISTS}
    for ours in (short, quick):
        assert list(ours.fields) == list(theirs.fields) and ours.data_offset == theirs.data_offset
        assert [(t.name, t.data.tobytes()) for t in ours.tensors] == tensors
        assert ours.fields["general.languages"].contents() == ["en", "de"]
    assert {name for name, field in theirs.fields.items() if len(field.data) >= LONG} == lists
    for name, field in theirs.fields.items():
        assert short.fields[name].types == quick.fields[name].types == field.types
        assert quick.fields[name].contents() == field.contents()
        assert short.fields[name].contents() == ([] if name in lists else field.contents())


@pytest.mark.parametrize(
    "kind,items",
    [
        (GGUFValueType.FLOAT32, [i / 7 for i in range(LONG)]),
        (GGUFValueType.FLOAT64, [i / 7 for i in range(LONG)]),
        (GGUFValueType.BOOL, [i % 3 == 0 for i in range(LONG)]),
        (GGUFValueType.UINT8, list(range(LONG))),
        (GGUFValueType.INT64, list(range(-LONG, 0))),
        (GGUFValueType.STRING, ["é" * (i % 5) for i in range(LONG)]),
    ],
)
def test_long_arrays_of_any_type(kind: GGUFValueType, items: list[object], tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "array.gguf", "llama")
    writer.add_key_value("x.items", items, GGUFValueType.ARRAY, sub_type=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quick, theirs = (reader(tmp_path / "array.gguf").fields["x.items"] for reader in (Reader, GGUFReader))
    assert quick.types == theirs.types == [GGUFValueType.ARRAY, kind]
    assert quick.contents() == theirs.contents() and len(quick.contents()) == LONG


def test_the_loader_reads_quickly(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Counted(Reader):
        def __init__(self, path: Path):
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr("compress.gguf_header.Reader", Counted)
    source.load(str(file))
    assert len(opened) >= 3  # for the config, the weights and the tokenizer


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
@pytest.mark.parametrize("count", [MOST, MOST + 1, 2**62, 2**64 - 1])
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


def test_the_last_text_may_not_end_beyond_the_file(tmp_path: Path) -> None:
    texts = b"".join(struct.pack("<Q", 1) + b"a" for _ in range(LONG))
    _write(tmp_path / "last.gguf", struct.pack("<IQ", GGUFValueType.STRING, LONG) + texts)
    assert Reader(tmp_path / "last.gguf").fields["k"].contents() == ["a"] * LONG
    (tmp_path / "last.gguf").write_bytes((tmp_path / "last.gguf").read_bytes()[:-1])
    with pytest.raises(Corrupt, match=r"last\.gguf: not a readable GGUF file .*ends beyond the file"):
        source.gguf_fields(tmp_path / "last.gguf")


def test_arrays_within_arrays_without_end_are_corrupt(tmp_path: Path) -> None:
    _write(tmp_path / "deep.gguf", struct.pack("<IQ", GGUFValueType.ARRAY, 1) * 10_000)
    with pytest.raises(Corrupt, match=r"deep\.gguf: not a readable GGUF file"):
        source.gguf_fields(tmp_path / "deep.gguf")
    with pytest.raises(Corrupt, match=r"deep\.gguf: not a readable GGUF file"):
        _llama_cpp.read(tmp_path / "deep.gguf")


def _write(path: Path, array: bytes) -> None:
    """A file of no tensors and one field `k`, an array."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    path.write_bytes(head + struct.pack("<Q", 1) + b"k" + struct.pack("<I", GGUFValueType.ARRAY) + array)
