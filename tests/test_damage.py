"""Damage to artifacts of every kind is seen, whichever bit or length it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import artifact, sealing, verify
from compress.errors import CompressError, Corrupt
from compress.interfaces import Context
from compress.plugin import step
from tests.test_provenance import rounded
from tests.tiny_classifier import tiny_classifier
from tests.tiny_gguf import tiny
from tests.tiny_seq2seq import tiny_seq2seq

pytestmark = pytest.mark.usefixtures("one_thread")


def caught(folder: Path) -> bool:
    try:
        verify.verify(folder)
    except CompressError as error:
        assert error.exit_code == Corrupt.exit_code and str(folder) in str(error)
        return True
    return False


def quantized(model: Any, embeddings: str | None) -> Any:
    step("quantize.rtn")(encoding="int4", group_size=32, embeddings=embeddings).apply(model, Context(seed=0))
    return model


EXPORTS: dict[str, Callable[[Path], object]] = {
    "gguf": lambda folder: compress.export(rounded(), "gguf", folder),
    "onnx genai": lambda folder: compress.export(rounded(), "onnx", folder),
    "onnx portable": lambda folder: compress.export(rounded(), "onnx", folder, flavour="portable"),
    "onnx classifier": lambda folder: compress.export(
        quantized(tiny_classifier(), "int8"), "onnx", folder, flavour="portable"
    ),
    "onnx seq2seq": lambda folder: compress.export(
        quantized(tiny_seq2seq(), "int8"), "onnx", folder, flavour="portable"
    ),
    "checkpoint": lambda folder: compress.export(quantized(tiny(), "fp16"), "checkpoint", folder),
    "checkpoint gptq": lambda folder: compress.export(quantized(tiny(), "fp16"), "checkpoint", folder, format="gptq"),
    "artifact": lambda folder: artifact.save(rounded(), folder),
}


@pytest.fixture(scope="module", params=EXPORTS)
def whole(request, tmp_path_factory) -> tuple[Path, list[Path]]:
    """An artifact of each kind, and its files."""
    folder = tmp_path_factory.mktemp("whole") / request.param
    EXPORTS[request.param](folder)
    assert not caught(folder)
    return folder, sorted(p for p in folder.rglob("*") if p.is_file())


def with_change(path: Path, change: Callable[[bytearray], bytearray | bytes], folder: Path) -> bool:
    """Whether a change of a file is caught; the file is as before afterwards."""
    before = path.read_bytes()
    path.write_bytes(change(bytearray(before)))
    try:
        return caught(folder)
    finally:
        path.write_bytes(before)


def test_a_thousand_bit_flips_are_all_caught(whole):
    folder, files = whole
    rng = random.Random(1)

    def flip(raw: bytearray) -> bytearray:
        bit = rng.randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        return raw

    for i in range(1000):
        path = files[i % len(files)]
        assert with_change(path, flip, folder), path
    assert not caught(folder)


def test_257_truncations_are_all_caught(whole):
    folder, files = whole
    rng = random.Random(2)
    for i in range(257):
        path = files[i % len(files)]
        size = path.stat().st_size
        length = 0 if i < len(files) else size - 1 if i < 2 * len(files) else rng.randrange(size)
        assert with_change(path, lambda raw: raw[:length], folder), (path, length)  # noqa: B023
    assert not caught(folder)


def test_a_missing_file_is_caught_and_a_foreign_one_is_said(whole):
    folder, files = whole
    (folder / "more.txt").write_text("mine")
    assert verify.verify(folder)[1:] == [f"{folder / 'more.txt'}: in no record, not checked"]
    (folder / "more.txt").unlink()
    for path in files:
        if path.name != sealing.FILE:
            path.rename(path.with_name("away"))
            assert caught(folder)
            path.with_name("away").rename(path)
