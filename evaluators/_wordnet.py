"""WordNet from a folder of the user's: which words are synonyms, for METEOR."""

from __future__ import annotations

import hashlib
import warnings
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from compress import source
from compress.errors import Corrupt, RecipeError, one_line

_PARTS = ("adj", "adv", "noun", "verb")
FILES = ("lexnames", *(f"data.{p}" for p in _PARTS), *(f"index.{p}" for p in _PARTS), *(f"{p}.exc" for p in _PARTS))


@dataclass(frozen=True)
class WordNet:
    """An opened WordNet (Miller 1995, doi:10.1145/219717.219748), read by nltk."""

    folder: Path
    reader: Any

    def synsets(self, word: str) -> list[Any]:
        """What nltk's METEOR asks for: sets of synonyms of a word or of its base form. Raises Corrupt."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a synset is not there, which is raised below
            try:
                found: list[Any] = self.reader.synsets(word)
            except Exception as error:  # whatever a damaged line makes nltk stumble over
                raise _damaged(self.folder, error) from error
        if any(synset is None for synset in found):
            raise _damaged(self.folder, f"no synset of {word!r} where its index says")
        return found


def check(folder: str) -> Path:
    """The folder; raises RecipeError where one of `FILES` is missing."""
    where = Path(folder).expanduser()
    if missing := [name for name in FILES if not (where / name).is_file()]:
        expected = "expected WordNet's database files, as nltk.download('wordnet') unpacks them"
        raise RecipeError(f"wordnet {folder}: no file {missing[0]} there; {expected}")
    return where


def digest(folder: str) -> str:
    """sha256 over the files; raises as `check` does."""
    where = check(folder)
    return hashlib.sha256("".join(source.file_digest(where / name) for name in FILES).encode()).hexdigest()


def opened(folder: str) -> WordNet:
    """The WordNet of a folder, kept open until a file changes. Raises RecipeError, Corrupt."""
    return _open(check(folder), digest(folder))


@lru_cache(maxsize=1)
def _open(folder: Path, digest: str) -> WordNet:
    import nltk.data
    from nltk.corpus import WordNetCorpusReader

    if str(folder) not in nltk.data.path:  # outside of which nltk refuses to read
        nltk.data.path.append(str(folder))
    # Relating it to other versions serves other languages, and takes a second WordNet.
    kind = type("English", (WordNetCorpusReader,), {"map_wn": lambda self: None})
    reader: Any = object.__new__(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other languages
        try:
            reader.__init__(str(folder), None)
        except Exception as error:
            _close(reader)
            raise _damaged(folder, error) from error
    found = WordNet(folder, reader)
    weakref.finalize(found, _close, reader)
    return found


def _close(reader: Any) -> None:
    for file in getattr(reader, "_data_file_map", {}).values():  # which nltk leaves open
        file.close()


def _damaged(folder: Path, why: Exception | str) -> Corrupt:
    return Corrupt(f"{folder}: not readable as WordNet ({one_line(why) if isinstance(why, Exception) else why})")
