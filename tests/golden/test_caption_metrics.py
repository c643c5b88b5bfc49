"""CIDEr-D, ROUGE-L and BLEU of the pycocoevalcap package, on words that our own tokeniser cuts."""

import json

import pytest
from numpy.testing import assert_allclose

from paligemma.metrics.caption import bleu, cider, ptb_words, rouge_l
from tests.golden_model import DATA

STATED = json.loads((DATA / "metrics" / "captions.json").read_text())
CASES = STATED["cases"]
PREDICTIONS = [case["prediction"] for case in CASES]
REFERENCES = [case["references"] for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prediction"][:40])
def test_words_are_those_of_the_treebank(case):
    assert " ".join(ptb_words(case["prediction"])) == case["tokenised_prediction"]
    assert [" ".join(ptb_words(text)) for text in case["references"]] == case["tokenised_references"]


def test_scores_of_each_and_of_all():
    scores = cider(PREDICTIONS, REFERENCES)
    assert_allclose(scores, [case["cider"] for case in CASES], atol=1e-6)
    assert_allclose(sum(scores) / len(scores), STATED["aggregate"]["cider"], atol=1e-6)
    rouge = rouge_l(PREDICTIONS, REFERENCES)
    assert_allclose(rouge, [case["rouge"] for case in CASES], atol=1e-6)
    assert_allclose(sum(rouge) / len(rouge), STATED["aggregate"]["rouge"], atol=1e-6)
    assert_allclose(bleu(PREDICTIONS, REFERENCES), STATED["aggregate"]["bleu-4"], atol=1e-6)
    for case in CASES:
        assert_allclose(bleu([case["prediction"]], [case["references"]]), case["bleu"], atol=1e-6)
