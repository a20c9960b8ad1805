import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from fedpipe_core.config import GenerationSpec
from fedpipe_core.text_metrics import corpus_score, extract_answer, text_counts

TEXTS = ["the cat sat on the mat", "a dog barked loudly at night", "it rains"]
REFERENCES = [
    ("the cat sat on a mat", "on the mat sat the cat"),
    ("the dog barked at night",),
    ("it is raining today", "it rains", "rain falls"),
]


def score(metric, texts, references, **spec):
    counts = text_counts(GenerationSpec(metrics=(metric,), **spec), texts, references)[metric]
    return corpus_score(metric, counts.sum(axis=0))


def streams(references):
    """References as sacrebleu takes them: the first of every text, the second of every text, with None for none."""
    most = max(map(len, references))
    return [[right[k] if k < len(right) else None for right in references] for k in range(most)]


@pytest.mark.parametrize(("metric", "theirs"), [("bleu", BLEU()), ("chrf", CHRF())])
def test_score_of_summed_counts_is_sacrebleu_s_corpus_score(metric, theirs):
    assert score(metric, TEXTS, REFERENCES) == pytest.approx(theirs.corpus_score(TEXTS, streams(REFERENCES)).score)


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=8).map(" ".join)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(WORDS, st.lists(WORDS.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=5))
def test_bleu_of_any_corpus_is_sacrebleu_s(corpus):
    texts, references = [text for text, _ in corpus], [right for _, right in corpus]
    assert score("bleu", texts, references) == pytest.approx(BLEU().corpus_score(texts, streams(references)).score)


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL"])
def test_rouge_takes_the_best_reference(metric):
    scorer = RougeScorer([metric], use_stemmer=True)
    expected = [
        max(scorer.score(right, text)[metric].fmeasure for right in answers)
        for text, answers in zip(TEXTS, REFERENCES, strict=True)
    ]
    assert score(metric, TEXTS, REFERENCES) == pytest.approx(np.mean(expected))


def test_exact_match_compares_whole_texts_without_a_pattern():
    assert score("exact_match", [" it rains ", "no"], [("it rains",), ("yes",)]) == 0.5


def test_exact_match_compares_extracted_answers():
    texts = ["2 + 2 = 4\n#### 4", "so #### 1,200", "I do not know", "#### 3 or #### 5"]
    references = [("#### 4",), ("#### 1,300",), ("#### 7",), ("#### 5",)]
    assert score("exact_match", texts, references, answer_pattern=r"#### ([\d,]+)") == 0.5


@pytest.mark.parametrize(
    ("pattern", "answer"), [(None, "a 1 b 2"), (r"\d", "2"), (r"([a-z]) \d", "b"), (r"x", None), (r"(\d) b", "1")]
)
def test_answer_is_the_last_match(pattern, answer):
    assert extract_answer(" a 1 b 2 ", pattern) == answer
