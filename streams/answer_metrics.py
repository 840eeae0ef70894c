"""What a written answer is worth: choices, numbers, ROUGE-L, SARI, edit similarity, all of them in 0..1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

AnswerMetric = Literal["choice", "number", "exact_match", "rouge_l", "sari", "edit_similarity"]
AnswerValue = Callable[[str, str, str], float]
"""Value of prompt, right answer and written answer."""

NAMES: dict[str, str] = {"choice": "accuracy", "number": "accuracy"}
"""Under what name a metric is reported, where it is not its own."""
PACKAGES: dict[str, str] = {"rouge_l": "rouge_score", "sari": "sacrebleu", "edit_similarity": "rapidfuzz"}
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
CHOICE = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")
LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT(?::(.*?))?>")


def answer_value(metric: AnswerMetric) -> AnswerValue:
    """The function of a metric; a ValueError where the package that it needs is missing."""
    package = PACKAGES.get(metric)
    if package is not None and find_spec(package) is None:
        raise ValueError(f"metric {metric}: {package} is not installed; pip install 'clplat[pretrained]' brings it")
    values: dict[str, AnswerValue] = {
        "choice": lambda _, wanted, written: _same(_choice(wanted), _choice(written)),
        "number": lambda _, wanted, written: _same(_number(wanted), _number(written)),
        "exact_match": lambda _, wanted, written: _same(wanted.strip(), written.strip()),
        "rouge_l": lambda _, wanted, written: float(_rouge().score(wanted, written)["rougeL"].fmeasure),
        "sari": sari,
        "edit_similarity": lambda _, wanted, written: edit_similarity(wanted, written),
    }
    return values[metric]


def edit_similarity(wanted: str, written: str) -> float:
    """Share of characters that need no insertion or deletion (rapidfuzz's ratio), code literals taken as their text."""
    from rapidfuzz import fuzz

    first, second = (LITERAL.sub(lambda found: found[1] or "", text).strip() for text in (wanted, written))
    return fuzz.ratio(first, second) / 100


def sari(source: str, wanted: str, written: str) -> float:
    """SARI of one sentence with one reference (Xu et al. 2016, §4): means over 1- to 4-grams of the F1 of what was
    kept, the F1 of what was added and the precision of what was deleted; 0/0 counts as 1. Texts are lower-cased and
    split as by BLEU's tokenizer 13a."""
    texts = [_words(text) for text in (source, wanted, written)]
    parts = [_sari_of(*(_grams(words, length) for words in texts)) for length in range(1, 5)]
    return sum(parts) / len(parts)


def _sari_of(source: Counter[str], wanted: Counter[str], written: Counter[str]) -> float:
    kept, keepable = source & written, source & wanted
    good = kept & wanted
    keep = _f1(_mean_share(good, kept), _ratio(good.total(), keepable.total()))
    gone = source - written
    delete = _mean_share(gone - wanted, gone)
    added, addable = set(written) - set(source), set(wanted) - set(source)
    right = len(added & addable)
    return (keep + delete + _f1(_ratio(right, len(added)), _ratio(right, len(addable)))) / 3


def _mean_share(part: Counter[str], whole: Counter[str]) -> float:
    """Mean over the kinds in `whole` of the share of each that is in `part`."""
    return _ratio(sum(part[gram] / count for gram, count in whole.items()), len(whole))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _grams(words: list[str], length: int) -> Counter[str]:
    return Counter(" ".join(words[start : start + length]) for start in range(len(words) - length + 1))


def _words(text: str) -> list[str]:
    return _splitter()(text.lower()).split()


def _choice(text: str) -> str:
    """The first capital letter that stands alone; empty without one."""
    found = CHOICE.search(text)
    return found[0] if found else ""


def _number(text: str) -> float | str:
    """The first number; the whole text in lower case where there is none."""
    found = NUMBER.search(text)
    return float(found[0].replace(",", "")) if found else text.strip().lower()


def _same(wanted: object, written: object) -> float:
    return float(wanted == written != "")


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


@cache
def _splitter() -> Callable[[str], str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()
