"""Agreement of captions with several references: CIDEr-D, BLEU, ROUGE-L, without Java.

Texts are cut into words as the Penn Treebank does (`ptb_words`); the numbers are those of pycocoevalcap on such words.
Sources: CIDEr (arXiv 1411.5726) in its D form, BLEU (Papineni et al., 2002), ROUGE-L (Lin, 2004).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from paligemma.errors import ShapeError

Ngrams = Counter[tuple[str, ...]]

N = 4  # longest n-gram
SIGMA = 6.0  # CIDEr-D: width of the penalty for another length
BETA = 1.2  # ROUGE-L: recall counts this much more than precision
_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's guards of BLEU against zeros

# Brackets stay as words: the reference drops "-LRB-", but lower-cases first.
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_WORD = re.compile(
    r"""
    \.\.\.|--+ |                                      # runs of marks
    (?:[a-z]\.){2,} |                                 # u.s.
    \d+(?:[.,:/]\d+)* |                               # 1,000  3:30  1/2
    [^\W\d_]+(?=n't\b)|n't\b |                        # do n't
    '(?:s|re|ve|ll|d|m)\b |                           # it 's
    \w+(?:[-&/]\w+)* |                                # well-known
    [^\w\s]
    """,
    re.VERBOSE,
)


def ptb_words(text: str) -> list[str]:
    """Lower-cased words as the Penn Treebank cuts them, punctuation left out.

    >>> ptb_words("It's a cat's toy; don't touch!")
    ['it', "'s", 'a', 'cat', "'s", 'toy', 'do', "n't", 'touch']
    """
    words = (_BRACKETS.get(word, word) for word in _WORD.findall(text.replace("’", "'").lower()))
    return [word for word in words if word not in _PUNCTUATION and word != '"']


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of every prediction, 0..10; its mean times 100 is what reports print.

    How rare an n-gram is, and so what it weighs, is counted over all these references: a score depends on its set.

    Raises:
        ShapeError: another number of predictions than of reference lists.
    """
    _same_length(predictions, references)
    said = [_ngrams(ptb_words(text)) for text in predictions]
    told = [[_ngrams(ptb_words(text)) for text in texts] for texts in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for texts in told:
        frequency.update(set().union(*texts) if texts else ())
    log_n = math.log(max(1, len(references)))

    def vectors(counts: Ngrams) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        by_n: list[dict[tuple[str, ...], float]] = [{} for _ in range(N)]
        norms, length = [0.0] * N, 0
        for gram, count in counts.items():
            weight = count * (log_n - math.log(max(1.0, frequency[gram])))
            by_n[len(gram) - 1][gram] = weight
            norms[len(gram) - 1] += weight**2
            length += count if len(gram) == 2 else 0
        return by_n, [math.sqrt(norm) for norm in norms], length

    scores = []
    for prediction, texts in zip(said, told, strict=True):
        hyp, hyp_norms, hyp_length = vectors(prediction)
        total = 0.0
        for text in texts:
            ref, ref_norms, ref_length = vectors(text)
            penalty = math.exp(-((hyp_length - ref_length) ** 2) / (2 * SIGMA**2))
            for n in range(N):
                overlap = sum(
                    min(weight, ref[n].get(gram, 0.0)) * ref[n].get(gram, 0.0) for gram, weight in hyp[n].items()
                )
                if hyp_norms[n] and ref_norms[n]:
                    overlap /= hyp_norms[n] * ref_norms[n]
                total += overlap * penalty / N
        scores.append(10 * total / len(texts) if texts else 0.0)
    return scores


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 … BLEU-4 of the whole set, 0..1; of several references the one nearest in length counts for brevity."""
    _same_length(predictions, references)
    matched, possible, n_said, n_told = [0] * N, [0] * N, 0, 0
    for prediction, texts in zip(predictions, references, strict=True):
        words, told = ptb_words(prediction), [ptb_words(text) for text in texts]
        n_said += len(words)
        n_told += min((abs(len(text) - len(words)), len(text)) for text in told)[1]
        most: Counter[tuple[str, ...]] = Counter()
        for text in told:
            most |= _ngrams(text)
        for gram, count in _ngrams(words).items():
            matched[len(gram) - 1] += min(count, most[gram])
        for n in range(N):
            possible[n] += max(0, len(words) - n)
    scores, product = [], 1.0
    ratio = (n_said + _TINY) / (n_told + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    for n in range(N):
        product *= (matched[n] + _TINY) / (possible[n] + _SMALL)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L of every prediction, 0..1: best precision and best recall of the longest common subsequence."""
    _same_length(predictions, references)
    scores = []
    for prediction, texts in zip(predictions, references, strict=True):
        words = ptb_words(prediction)
        precision = recall = 0.0
        for text in texts:
            told = ptb_words(text)
            common = _common_subsequence(words, told)
            precision = max(precision, common / len(words) if words else 0.0)
            recall = max(recall, common / len(told) if told else 0.0)
        both = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / both if precision and recall else 0.0)
    return scores


def _ngrams(words: Sequence[str]) -> Ngrams:
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _same_length(predictions: Sequence[object], references: Sequence[object]) -> None:
    if len(predictions) != len(references):
        raise ShapeError(
            f"{len(predictions)} predictions, {len(references)} reference lists: expected as many of both."
        )
