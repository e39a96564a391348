"""Metrics of one written answer against its references, each in [0, 1]; libraries compute what they define.

BLEU and chrF are those of sacrebleu on one sentence (BLEU with the effective order, since a short answer may have
no 4-gram at all), ROUGE-1, -2, -L and -Lsum those of rouge-score, without stemming. Exact match and F1 follow
SQuAD's evaluation (Rajpurkar et al. 2016, arXiv:1606.05250), ROUGE-S is skip-bigram co-occurrence (Lin 2004, ROUGE:
A Package for Automatic Evaluation of Summaries, section 5). METEOR (Lavie & Agarwal 2007) is nltk's, over equal words,
equal Porter stems and synonyms of WordNet, a folder of the user's (`_wordnet`). `meteor_stem` is the same without the
stage for synonyms: its values are no METEOR of a paper. Of several references the best one counts, except where
sacrebleu has its own rule for many.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import metadata
from itertools import combinations
from typing import Any, Literal

from compress.errors import RecipeError
from evaluators import _wordnet

Metric = Literal[
    "bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "rougeS", "meteor", "meteor_stem", "exact_match", "f1",
    "bertscore", "bertscore_precision", "bertscore_recall",
]  # fmt: skip
# The last three need an encoder: see `evaluators._bertscore`; meteor needs WordNet: see `evaluators._wordnet`.
Tokenize = Literal["13a", "intl", "zh", "char"]  # of sacrebleu, without further packages
SKIP = 4  # words at most between the two of a skip-bigram: ROUGE-S4

# Han, kana and Hangul carry no spaces, or few: each character is a token, as in evaluations of Chinese questions.
EAST_ASIAN = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]"
_TOKEN = re.compile(rf"{EAST_ASIAN}|(?:(?!{EAST_ASIAN})\S)+")
_FULL_WIDTH = "".join(map(chr, [*range(0x3000, 0x3004), *range(0x3008, 0x3020), *range(0xFF01, 0xFF10)]))
_PUNCTUATION = str.maketrans("", "", string.punctuation + _FULL_WIDTH + "：；？［］｛｝～…“”‘’—·")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def normalized(text: str) -> str:
    """SQuAD's normalization: lower case, no punctuation, no articles, single spaces.

    Where the text holds characters of East Asian scripts, their punctuation goes too; without any, the result is
    SQuAD's to the letter.

    >>> normalized("The  Eiffel-Tower!"), normalized("巴黎，法国。")
    ('eiffeltower', '巴黎法国')
    """
    table = _PUNCTUATION if re.search(EAST_ASIAN, text) else _ASCII_PUNCTUATION
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(table)).split())


def tokens(text: str) -> list[str]:
    """Words of the normalized text; East Asian characters are tokens of their own.

    >>> tokens("A big cat"), tokens("在 Paris 住")
    (['big', 'cat'], ['在', 'paris', '住'])
    """
    return _TOKEN.findall(normalized(text))


def exact_match(answer: str, reference: str) -> float:
    """1 where both are equal once normalized, else 0."""
    return float(normalized(answer) == normalized(reference))


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over shared tokens, with their multiplicity."""
    return _f_measure(Counter(tokens(answer)), Counter(tokens(reference)))


def rouge_s(answer: str, reference: str) -> float:
    """F1 over skip-bigrams: ordered pairs of words with at most four words between them.

    Words are runs of a–z and 0–9 in lower case, as in rouge-score.

    >>> rouge_s("police killed the gunman", "police kill the gunman")  # Lin's example: 3 of 6 pairs
    0.5
    """
    return _f_measure(Counter(_skip_bigrams(answer)), Counter(_skip_bigrams(reference)))


def _skip_bigrams(text: str) -> Iterator[tuple[str, str]]:
    words = list(enumerate(_rouge_words(text)))
    return ((a, b) for (i, a), (j, b) in combinations(words, 2) if j - i <= SKIP + 1)


def _rouge_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _f_measure(found: Counter[Any], wanted: Counter[Any]) -> float:
    shared = (found & wanted).total()
    return 2 * shared / (found.total() + wanted.total()) if shared else 0.0


def _best(one: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    return max(one(answer, reference) for reference in references)


def _rouge(kind: str, answer: str, references: Sequence[str]) -> float:
    return max(float(_rouge_scorer(kind).score(reference, answer)[kind].fmeasure) for reference in references)


class _NoSynonyms:
    """Stands for WordNet where nltk's METEOR asks it for synonyms."""

    def synsets(self, word: str) -> list[Any]:
        """None of any word."""
        return []


def meteor(answer: str, reference: str, wordnet: Any) -> float:
    """METEOR over words and punctuation marks in lower case, matched where they are equal, their stems, or synonyms.

    F = P·R / (0.9·P + 0.1·R), times 1 − 0.5·(chunks / matches)³: an answer equal to the reference earns a little less
    than 1. wordnet: its `synsets(word)` gives the sets of synonyms. nltk asks for those of a word's stem: one whose
    stem is no word finds none.
    """
    from nltk.translate.meteor_score import single_meteor_score

    return float(single_meteor_score(_marks(reference), _marks(answer), wordnet=wordnet))


def meteor_stem(answer: str, reference: str) -> float:
    """METEOR without its stage for synonyms.

    >>> round(meteor_stem("cats sat", "The cat sat"), 4)  # P = 1, R = 2/3, one chunk of two matches
    0.6466
    """
    return meteor(answer, reference, _NoSynonyms())


def _marks(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


@cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=False)


@cache
def _sacrebleu(kind: str, tokenize: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(effective_order=True, tokenize=tokenize) if kind == "bleu" else CHRF()


def _sentence(kind: str, tokenize: str, answer: str, references: Sequence[str]) -> float:
    score = float(_sacrebleu(kind, tokenize).sentence_score(answer, list(references)).score)
    return min(1.0, score / 100)  # its exponentials may exceed 100 by a rounding


_LIBRARY = {"bleu": "sacrebleu", "chrf": "sacrebleu", **dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"))}
_LIBRARY |= {name: "rouge-score" for name, library in _LIBRARY.items() if library is None}
_LIBRARY |= {"meteor": "nltk", "meteor_stem": "nltk"}
_OWN: Mapping[str, Callable[[str, str], float]] = {"exact_match": exact_match, "f1": f1, "rougeS": rouge_s}
_SINGLE = {**_OWN, "meteor_stem": meteor_stem}  # of one reference


def scorer(metric: str, tokenize: str = "13a", wordnet: str | None = None) -> Callable[[str, Sequence[str]], float]:
    """The metric as a function of an answer and its references, at least one; not BERTScore, which needs an encoder.

    wordnet: the folder that meteor needs; raises as `_wordnet.opened` does.
    """
    if metric == "meteor":
        assert wordnet is not None
        return partial(_best, partial(meteor, wordnet=_wordnet.opened(wordnet)))
    if metric in _SINGLE:
        return partial(_best, _SINGLE[metric])
    return partial(_sentence, metric, tokenize) if _LIBRARY[metric] == "sacrebleu" else partial(_rouge, metric)


def library(metric: str) -> str:
    """Name and version of the library that computes a metric, empty for our own; RecipeError where it is missing."""
    name = _LIBRARY.get(metric)
    if name is None:
        return ""
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        raise RecipeError(f"the metric {metric} needs {name}: pip install 'compress-toolkit[eval]'") from None


def unscorable(metric: str, reference: str) -> str:
    """Why no answer could ever earn anything with this reference, or an empty text."""
    if metric.startswith("rouge"):
        words = len(_rouge_words(reference))
        if not words:
            return "ROUGE sees no word in it, as it reads a to z and 0 to 9 alone; use chrf or f1"
        if metric in ("rouge2", "rougeS") and words < 2:
            return f"{metric} compares pairs of words, and it has one; use rouge1 or f1"
    if metric.startswith("meteor") and re.search(EAST_ASIAN, reference):
        return "its script has no spaces between words, and METEOR compares words; use chrf or f1"
    if metric in _OWN and not normalized(reference):
        return "nothing is left of it without articles and punctuation; use chrf"
    return "" if reference.strip() else "it is empty"
