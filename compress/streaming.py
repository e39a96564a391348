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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.encodings import EncodedTensor, Encoding
from compress.errors import Corrupt
from compress.machine import return_freed_memory
from compress.storage import flatten, unflatten

_STORED = {"F16": "fp16", "BF16": "bf16"}  # safetensors' names of dtypes → ours
Content = tuple[dict[str, Tensor], dict[str, EncodedTensor]]
"""Of a block: float tensors and encoded ones, by full name."""


class Shelf:
    """The blocks of a module, of which at most one is in memory, and at most one of its other matrices.

    module: whose blocks, at `blocks`, and matrices are bare. read: what a block or a matrix holds at first, by its
    tensors' names. encoded: by name, of the whole model; they come and go with what they belong to.
    """

    def __init__(self, module: nn.Module, blocks: str, read: Callable[[Sequence[str]], Content]):
        found = module.get_submodule(blocks)
        assert isinstance(found, nn.ModuleList)
        self._blocks, self._modules, self._read = blocks, list(found), read
        self._resident: int | None = None
        self._dirty = False
        self._specs: dict[int | str, dict[str, Any]] = {}  # of the blocks and matrices that were written back
        self._outside: dict[str, list[tuple[nn.Module, str]]] = {}  # matrix → the modules that hold it, and as what
        self._alias: dict[str, str] = {}  # each name of a matrix → the one that counts
        self._changed: set[str] = set()  # matrices in memory that are not as on disk
        self._folder = Path(tempfile.mkdtemp(prefix="compress-blocks-"))
        self._finalizer = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.encoded = Encoded(self)
        for index, block in enumerate(self._modules):
            block.register_forward_pre_hook(lambda _, args, index=index: self.need(index))
        self._find_matrices(module)

    def _find_matrices(self, module: nn.Module) -> None:
        """Name the matrices outside the blocks, tied ones once, and have what computes with one bring it back."""
        names: dict[nn.Parameter, str] = {}
        for path, part in module.named_modules():
            if f"{path}.".startswith(f"{self._blocks}."):
                continue
            for leaf, parameter in part.named_parameters(recurse=False):
                if parameter.dim() == 2:
                    name = self._alias[f"{path}.{leaf}"] = names.setdefault(parameter, f"{path}.{leaf}")
                    self._outside.setdefault(name, []).append((part, leaf))
                    part.register_forward_pre_hook(lambda *_, name=name: self._bring_back(name))

    def index(self, name: str) -> int | None:
        """The block that holds a tensor; None for one outside the blocks."""
        if not name.startswith(f"{self._blocks}."):
            return None
        return int(name[len(self._blocks) + 1 :].partition(".")[0])

    def holds(self, name: str) -> bool:
        """Whether a tensor comes and goes; the others, norms, are always in memory."""
        return name in self._alias or self.index(name) is not None

    def names(self, index: int) -> list[str]:
        """Full names of a block's tensors."""
        return [f"{self._blocks}.{index}.{name}" for name, _ in self._modules[index].named_parameters()]

    def changed(self) -> None:
        """Write what is in memory back before it is let go."""
        self._dirty = self._resident is not None
        self._changed.update(name for name, places in self._outside.items() if not getattr(*places[0]).is_meta)

    def fetch(self, name: str) -> None:
        """Have the tensor in memory."""
        if (index := self.index(name)) is not None:
            self.need(index)
        elif name in self._alias:
            self._bring_back(self._alias[name])

    def set_aside(self) -> None:
        """Let go of the matrices outside the blocks, embeddings and head, until something asks for one of them."""
        self._keep_only("")
        return_freed_memory()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _bring_back(self, name: str) -> None:
        """Have a matrix outside the blocks in memory, in the place of the one that is."""
        self._keep_only(name)
        if getattr(*self._outside[name][0]).is_meta:
            floats, encoded = self._content(name, [name])
            _place(name, self._outside[name], _tensor(name, floats, encoded))
            self.encoded.hold(encoded)

    def _keep_only(self, name: str) -> None:
        """Let go of the other matrices outside the blocks."""
        for other, places in self._outside.items():
            parameter = getattr(*places[0])
            if other == name or parameter.is_meta:
                continue
            if other in self._changed:
                self._write(other, [(other, self.encoded.held(other, parameter.detach()))])
                self._changed.remove(other)
            _place(other, places, None)
            self.encoded.drop([other])

    @torch.inference_mode(False)
    @torch.no_grad()
    def need(self, index: int) -> None:
        """Have a block in memory, in the place of the one that is."""
        if index == self._resident:
            return
        self._release()
        floats, encoded = self._content(index, self.names(index))
        for name in self.names(index):
            _place(name, [self._holder(index, name)], _tensor(name, floats, encoded))
        self.encoded.hold(encoded)
        self._resident, self._dirty = index, False

    def _release(self) -> None:
        index = self._resident
        if index is None:
            return
        names = self.names(index)
        if self._dirty:
            parameters = {f"{self._blocks}.{index}.{n}": p for n, p in self._modules[index].named_parameters()}
            self._write(index, ((n, self.encoded.held(n, parameters[n].detach())) for n in names))
        for name in names:
            _place(name, [self._holder(index, name)], None)
        self.encoded.drop(names)
        self._resident = None
        return_freed_memory()  # or it grows by 25 MB per block of 7 M weights

    def _holder(self, index: int, name: str) -> tuple[nn.Module, str]:
        """The module of a block that holds a tensor, and as what."""
        path, _, leaf = name.removeprefix(f"{self._blocks}.{index}.").rpartition(".")
        return self._modules[index].get_submodule(path), leaf

    def _content(self, what: int | str, names: Sequence[str]) -> Content:
        """The tensors of a block or a matrix, from where they were written last."""
        if what in self._specs:
            return unflatten(load_file(self._folder / f"{what}.safetensors"), self._specs[what])
        return self._read(names)

    def _write(self, what: int | str, tensors: Iterable[tuple[str, EncodedTensor | Tensor]]) -> None:
        """Write a block or a matrix back."""
        entries, specs = flatten(tensors)
        # Under another name first: tensors may still be mapped from the file that is replaced.
        save_file(entries, self._folder / "new", metadata={"format": "pt"})
        (self._folder / "new").replace(self._folder / f"{what}.safetensors")
        self._specs[what] = specs

    def close(self) -> None:
        """Remove what was written back, and let go of the module, whose hooks hold this."""
        self._modules.clear()
        self._outside.clear()
        self.encoded.drop([*self.encoded])
        self._finalizer()


def _tensor(name: str, floats: Mapping[str, Tensor], encoded: Mapping[str, EncodedTensor]) -> Tensor:
    """One of the tensors in float32; raises Corrupt where it is missing."""
    if name in floats:
        return floats[name].float()
    if name not in encoded:
        raise Corrupt(f"tensor {name} is missing")
    return encoded[name].decode()


def _place(name: str, places: Collection[tuple[nn.Module, str]], tensor: Tensor | None) -> None:
    """Make a tensor, or its bare shape, the one parameter of modules, each under a name of its own."""
    old = getattr(*next(iter(places)))
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
        """Tensors by name: matrices of 16-bit floats as they are stored, all others in float32."""
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
                floats[name] = tensor.float()
        return floats, encoded
