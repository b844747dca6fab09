"""How varied texts are: distinct n-grams, and how like each other they are by BLEU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

_ORDERS = (1, 2, 3, 4)


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float | None:
    """distinct-n: of all n-grams of the texts, the share that are different ones. None where there is no n-gram.

    Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", there over the
    number of tokens. It falls as there is more text: compare as many texts of like length only.

    Args:
        texts: each as its tokens (or words).
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def self_similarity(texts: Sequence[str]) -> float | None:
    """Self-BLEU: the mean over texts of BLEU-4 (by words) against all others; 1 means that all are the same.

    Zhu et al. 2018, "Texygen: A Benchmarking Platform for Text Generation Models". BLEU is Papineni et al. 2002,
    section 2.3, with one added to matches and totals of the longer n-grams (Lin and Och 2004, "ORANGE"). It rises with
    the number of texts. None where fewer than two texts have words.
    """
    worded = [words for text in texts if (words := text.split())]
    if len(worded) < 2:
        return None
    counts = [[Counter(_grams(words, n)) for words in worded] for n in _ORDERS]
    highest = [_two_highest(each) for each in counts]
    lengths = Counter(map(len, worded))
    total = 0.0
    for i, words in enumerate(worded):
        matched = [_matched(i, each[i], most) for each, most in zip(counts, highest, strict=True)]
        others = lengths - Counter([len(words)])
        total += _bleu(matched, len(words), min(others, key=lambda r: (abs(r - len(words)), r)))
    return total / len(worded)


def _grams(text: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


_Highest = dict[tuple[Hashable, ...], tuple[int, int, int]]


def _two_highest(counts: Sequence[Counter[tuple[Hashable, ...]]]) -> _Highest:
    """Of each n-gram: its highest count in one text, which text that is, and the highest count in another.

    So each text's references, all others, are known at once, where comparing each with each takes the square.
    """
    found: _Highest = {}
    for i, counter in enumerate(counts):
        for gram, count in counter.items():
            most, owner, second = found.get(gram, (0, -1, 0))
            if count > most:
                found[gram] = count, i, most
            elif count > second:
                found[gram] = most, owner, count
    return found


def _matched(i: int, counter: Counter[tuple[Hashable, ...]], highest: _Highest) -> tuple[int, int]:
    """n-grams of text i that another text has, too (as often as it has them), and all of them."""
    matched = 0
    for gram, count in counter.items():
        most, owner, second = highest[gram]
        matched += min(count, second if owner == i else most)
    return matched, counter.total()


def _bleu(matched: Sequence[tuple[int, int]], length: int, reference: int) -> float:
    (first, words), *longer = matched
    if first == 0:
        return 0.0
    logs = [math.log(first / words), *(math.log((hits + 1) / (all_ + 1)) for hits, all_ in longer)]
    brevity = 0.0 if length > reference else 1 - reference / length
    return math.exp(brevity + sum(logs) / len(logs))
