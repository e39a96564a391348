"""Models larger than memory: one decoder block at a time is in it, the others are on disk.

A block is read when something asks for it (a forward pass, a parameter, an encoded tensor), and the one before it is
then let go: written to a folder of the model's own where it was changed. Whoever walks the blocks in order, as steps
and forward passes do, reads each once. Embeddings and output head come and go in the same way, one at a time beside the
block, and not even that while a walk is on its way.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.encodings import EncodedTensor, Encoding
from compress.errors import Corrupt
from compress.machine import return_freed_memory
from compress.storage import flatten, require_finite, unflatten

_STORED = {"F16": "fp16", "BF16": "bf16"}  # safetensors' names of dtypes → ours
Content = tuple[dict[str, Tensor], dict[str, EncodedTensor]]
"""Of a block: float tensors and encoded ones, by full name."""


Piece = int | str
"""What comes and goes as one: a block, by its number, or a matrix outside the blocks, by its name."""
Places = list[tuple[nn.Module, str]]
"""The modules that hold a tensor, each under a name of its own."""


class Shelf:
    """The blocks of a module, of which at most one is in memory, and at most one of its other matrices.

    module: whose blocks, at `blocks`, and matrices are bare. read: what a block or a matrix holds at first, by its
    tensors' names. encoded: by name, of the whole model; they come and go with what they belong to.
    """

    def __init__(self, module: nn.Module, blocks: str, read: Callable[[Sequence[str]], Content]):
        self._blocks, self._read = blocks, read
        self._pieces: dict[Piece, dict[str, Places]] = {}  # the tensors of each, by name
        self._alias: dict[str, str] = {}  # each name of a matrix outside the blocks → the one that counts
        self._resident: dict[type, Piece] = {}  # the one block and the one matrix that are in memory
        self._dirty: set[Piece] = set()  # those of them that are not as on disk
        self._specs: dict[Piece, dict[str, Any]] = {}  # of those that were written back
        self._folder = Path(tempfile.mkdtemp(prefix="compress-blocks-"))
        self._finalizer = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.encoded = Encoded(self)
        self._find_blocks(module)
        self._find_matrices(module)

    def _find_blocks(self, module: nn.Module) -> None:
        """Name the tensors of each block, and have its forward pass bring it into memory."""
        found = module.get_submodule(self._blocks)
        assert isinstance(found, nn.ModuleList)
        for index, block in enumerate(found):
            tensors = self._pieces[index] = {}
            for name, _ in block.named_parameters(f"{self._blocks}.{index}"):
                path, _, leaf = name.rpartition(".")
                tensors[name] = [(module.get_submodule(path), leaf)]
            block.register_forward_pre_hook(lambda *_, index=index: self.need(index))

    def _find_matrices(self, module: nn.Module) -> None:
        """Name the matrices outside the blocks, tied ones once, and have what computes with one bring it back."""
        names: dict[nn.Parameter, str] = {}
        for path, part in module.named_modules():
            if f"{path}.".startswith(f"{self._blocks}."):
                continue
            for leaf, parameter in part.named_parameters(recurse=False):
                if parameter.dim() == 2:
                    name = names.setdefault(parameter, f"{path}.{leaf}")
                    self._alias[f"{path}.{leaf}"] = name
                    self._pieces.setdefault(name, {name: []})[name].append((part, leaf))
                    part.register_forward_pre_hook(lambda *_, name=name: self.need(name))

    def index(self, name: str) -> int | None:
        """The block that holds a tensor; None for one outside the blocks."""
        if not name.startswith(f"{self._blocks}."):
            return None
        return int(name[len(self._blocks) + 1 :].partition(".")[0])

    def _piece(self, name: str) -> Piece | None:
        """The block or the matrix that a tensor comes with; None for one that is always in memory, a norm."""
        index = self.index(name)
        return self._alias.get(name) if index is None else index

    def holds(self, name: str) -> bool:
        """Whether a tensor comes and goes."""
        return self._piece(name) is not None

    def names(self, index: int) -> list[str]:
        """Full names of a block's tensors."""
        return list(self._pieces[index])

    def changed(self) -> None:
        """Write what is in memory back before it is let go."""
        self._dirty.update(self._resident.values())

    def fetch(self, name: str) -> None:
        """Have the tensor in memory."""
        if (piece := self._piece(name)) is not None:
            self.need(piece)

    def set_aside(self) -> None:
        """Let go of the matrices outside the blocks, embeddings and head, until something asks for one of them."""
        self._release(str)

    @torch.inference_mode(False)
    @torch.no_grad()
    def need(self, piece: Piece) -> None:
        """Have a block, or a matrix outside them, in memory, in the place of the one that is."""
        if piece == self._resident.get(type(piece)):
            return
        self._release(type(piece))
        tensors = self._pieces[piece]
        floats, encoded = self._content(piece)
        for name, places in tensors.items():
            _place(name, places, _tensor(name, floats, encoded))
        self.encoded.hold(encoded)
        self._resident[type(piece)] = piece

    def _release(self, kind: type) -> None:
        """Let go of the block or the matrix in memory, written back first where it was changed."""
        piece = self._resident.get(kind)
        if piece is None:
            return
        tensors = self._pieces[piece]
        if piece in self._dirty:
            held = ((name, self.encoded.held(name, _parameter(places).detach())) for name, places in tensors.items())
            self._write(piece, held)
            self._dirty.remove(piece)
        for name, places in tensors.items():
            _place(name, places, None)
        self.encoded.drop(tensors)
        del self._resident[kind]
        return_freed_memory()  # or it grows by 25 MB per block of 7 M weights

    def _content(self, piece: Piece) -> Content:
        """The tensors of a block or a matrix, from where they were written last."""
        if piece in self._specs:
            return unflatten(load_file(self._folder / f"{piece}.safetensors"), self._specs[piece])
        return self._read(list(self._pieces[piece]))

    def _write(self, piece: Piece, tensors: Iterable[tuple[str, EncodedTensor | Tensor]]) -> None:
        """Write a block or a matrix back."""
        entries, specs = flatten(tensors)
        # Under another name first: tensors may still be mapped from the file that is replaced.
        save_file(entries, self._folder / "new", metadata={"format": "pt"})
        (self._folder / "new").replace(self._folder / f"{piece}.safetensors")
        self._specs[piece] = specs

    def close(self) -> None:
        """Remove what was written back, and let go of the module, whose hooks hold this."""
        self._pieces.clear()
        self.encoded.drop([*self.encoded])
        self._finalizer()


def _parameter(places: Places) -> nn.Parameter:
    """A tensor where it is held; all places hold the same."""
    module, leaf = places[0]
    found = getattr(module, leaf)
    assert isinstance(found, nn.Parameter)
    return found


def _tensor(name: str, floats: Mapping[str, Tensor], encoded: Mapping[str, EncodedTensor]) -> Tensor:
    """One of the tensors in float32; raises Corrupt where it is missing."""
    if name in floats:
        return floats[name].float()
    if name not in encoded:
        raise Corrupt(f"tensor {name} is missing")
    return encoded[name].decode()


def _place(name: str, places: Places, tensor: Tensor | None) -> None:
    """Make a tensor, or its bare shape, the one parameter of its places."""
    old = _parameter(places)
    if tensor is not None and tensor.shape != old.shape:
        raise Corrupt(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(old.shape)}")
    fresh = torch.empty_like(old, device="meta") if tensor is None else tensor
    parameter = nn.Parameter(fresh, requires_grad=False)
    for module, leaf in places:
        setattr(module, leaf, parameter)


class Encoded(MutableMapping[str, EncodedTensor]):
    """Encoded tensors by name: knows all of them, holds those that are in memory."""

    def __init__(self, shelf: Shelf):
        self._shelf = weakref.proxy(shelf)
        self._known: dict[str, Encoding] = {}
        self._held: dict[str, EncodedTensor] = {}

    def announce(self, encodings: Mapping[str, Encoding]) -> None:
        """Tell the encodings of tensors that are on disk."""
        self._known.update(encodings)

    @property
    def encodings(self) -> Mapping[str, Encoding]:
        """The encoding of every tensor, without reading any."""
        return self._known

    def hold(self, tensors: Mapping[str, EncodedTensor]) -> None:
        """Take tensors that were read."""
        self._held.update(tensors)

    def held(self, name: str, otherwise: Tensor) -> EncodedTensor | Tensor:
        """A tensor that is in memory, or `otherwise`."""
        return self._held.get(name, otherwise)

    def drop(self, names: Iterable[str]) -> None:
        """Let go of tensors."""
        for name in names:
            self._held.pop(name, None)

    def __getitem__(self, name: str) -> EncodedTensor:
        if name not in self._known:
            raise KeyError(name)
        self._shelf.fetch(name)
        return self._held[name]

    def __setitem__(self, name: str, tensor: EncodedTensor) -> None:
        self._shelf.fetch(name)
        self._known[name], self._held[name] = tensor.encoding, tensor
        self._shelf.changed()

    def __delitem__(self, name: str) -> None:
        self._shelf.fetch(name)
        del self._known[name], self._held[name]
        self._shelf.changed()

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


class Weights:
    """The tensors of a folder's safetensors files, one at a time."""

    def __init__(self, files: Iterable[Path]):
        self.files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self.files.update(dict.fromkeys(opened.keys(), file))

    def encodings(self, names: Iterable[str]) -> dict[str, Encoding]:
        """Those of tensors that `read` takes for encoded, from the files' headers."""
        found = {}
        for name in names:
            with safe_open(self.files[name], framework="pt") as opened:
                part = opened.get_slice(name)
                if len(part.get_shape()) == 2 and (kind := _STORED.get(part.get_dtype())):
                    found[name] = Encoding(kind)
        return found

    def read(self, names: Iterable[str]) -> Content:
        """Tensors by name: matrices of 16-bit floats as they are stored, all others in float32.

        Raises Corrupt or NonFiniteModel naming one that is not of floats, or not finite.
        """
        names = list(names)
        kinds, floats = self.encodings(names), {}
        encoded: dict[str, EncodedTensor] = {}
        for name in names:
            with safe_open(self.files[name], framework="pt") as opened:
                tensor = opened.get_tensor(name)
            if not tensor.is_floating_point():
                raise Corrupt(f"{self.files[name]}: {name} is {tensor.dtype}; expected floats")
            if name in kinds:
                encoded[name] = EncodedTensor(kinds[name], tensor)
            else:
                tensor = floats[name] = tensor.float()
            require_finite(self.files[name], name, tensor)
        return floats, encoded
