"""How good a written text is, against every right answer: BLEU, chrF, ROUGE, exact match.

Each metric is split in two, so that resamples can be scored: counts of one text, and the score of their sum. The counts
and the scores are sacrebleu's and rouge-score's own.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe_core.config_inputs import GenerationSpec

Counts = Callable[[str, Sequence[str]], list[float]]


def text_counts(spec: GenerationSpec, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """For every configured metric, each text's counts: (texts, counts), float64."""
    found: dict[str, NDArray[np.float64]] = {}
    for name in spec.metrics:
        count = _counter(name, spec.answer_pattern)
        pairs = zip(texts, references, strict=True)
        found[name] = np.array([count(text, right) for text, right in pairs], dtype=np.float64)
    return found


def corpus_score(metric: str, counts: NDArray[np.float64]) -> float:
    """The metric of a corpus from the sum of its texts' counts: BLEU and chrF from 0 to 100, the others from 0 to 1."""
    if metric == "bleu":
        return _bleu_score(counts)
    if metric == "chrf":
        return float(_chrf()._compute_score_from_stats([round(count) for count in counts]).score)
    return float(counts[0] / counts[1])


def _counter(metric: str, answer_pattern: str | None) -> Counts:
    if metric.startswith("rouge"):
        return partial(_rouge_counts, metric)
    if metric == "exact_match":
        return partial(_match_counts, answer_pattern)
    return _bleu_counts if metric == "bleu" else _chrf_counts


def _bleu_counts(text: str, references: Sequence[str]) -> list[float]:
    """Length of the text and of the reference nearest to it in length, matching n-grams, all n-grams (n = 1 to 4)."""
    score = _bleu().corpus_score([text], [[reference] for reference in references])
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def _bleu_score(counts: NDArray[np.float64]) -> float:
    from sacrebleu.metrics import BLEU

    text_length, reference_length, *ngrams = [round(count) for count in counts]
    order = len(ngrams) // 2
    found = BLEU.compute_bleu(ngrams[:order], ngrams[order:], text_length, reference_length, smooth_method="exp")
    return float(found.score)


def _chrf_counts(text: str, references: Sequence[str]) -> list[float]:
    streams = [[reference] for reference in references]
    return [float(count) for count in _chrf()._extract_corpus_statistics([text], streams)[0]]


def _rouge_counts(metric: str, text: str, references: Sequence[str]) -> list[float]:
    """F-measure against the best reference, and 1."""
    return [max(_rouge(metric).score(right, text)[metric].fmeasure for right in references), 1.0]


def _match_counts(pattern: str | None, text: str, references: Sequence[str]) -> list[float]:
    """Whether the text's answer is one of the right ones, and 1; a text without an answer is wrong."""
    answer = extract_answer(text, pattern)
    return [float(answer is not None and answer in {extract_answer(right, pattern) for right in references}), 1.0]


def extract_answer(text: str, pattern: str | None) -> str | None:
    """The pattern's last match in the text (its first group if it has one) without blanks; all of the text without one.

    None where the pattern does not match.
    """
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    found = matches[-1]
    return str(found.group(1) if found.re.groups else found.group()).strip()


@lru_cache(maxsize=1)
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(force=True)  # no warning about texts that end in " ."


@lru_cache(maxsize=1)
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


@lru_cache(maxsize=3)
def _rouge(metric: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([metric], use_stemmer=True)
