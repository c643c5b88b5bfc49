"""The original's tokeniser and its training and evaluation pipelines, value for value (tolerance: none).

Of `single_ops.json` `tok`, `tolen` and `lower` are ours (`Tokenizer.encode`, `fit`, `lowered`); the others (strfmt,
strjoin, setdefault, majority, getidx, masked_concat) are string and dictionary handling of TensorFlow pipelines that
this package has no counterpart of.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma.data.builders.base import lowered
from paligemma.processing.prompt import Sequence, fit, lay_out
from paligemma.processing.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data" / "text_preprocessing"
ENCODE_DECODE = json.loads((DATA / "encode_decode.json").read_text(encoding="utf-8"))
PIPELINES = json.loads((DATA / "pipelines.json").read_text(encoding="utf-8"))["cases"]
SINGLE_OPS = json.loads((DATA / "single_ops.json").read_text(encoding="utf-8"))
FACTS = json.loads((DATA / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["plain model, extended here", "extended model", "converted to tokenizer.json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "extended model":
        return Tokenizer.from_file(DATA / "tokenizer_extended.model")
    plain = Tokenizer.from_file(DATA / "tokenizer.model")
    if request.param == "plain model, extended here":
        return plain
    folder = tmp_path_factory.mktemp("converted")
    plain.save(folder, hugging_face=True)
    return Tokenizer.from_file(folder / "tokenizer.json")


def test_ids_of_the_vocabulary_are_the_original_ones(tokenizer: Tokenizer):
    ours = tokenizer.tokens
    assert (ours.pad, ours.eos, ours.bos, ours.unk) == tuple(FACTS[f"{n}_id"] for n in ("pad", "eos", "bos", "unk"))
    assert (ours.loc_start, ours.seg_start) == (FACTS["loc0_id"], FACTS["seg0_id"])
    assert tokenizer.n_tokens == FACTS["extended_vocab_size"]
    assert tokenizer.encode("\n") == [FACTS["newline_id"]]
    spelled = [tokenizer.piece(i) for i in range(ours.loc_start, tokenizer.n_tokens)]
    assert spelled[:3] == FACTS["first_loc_pieces"]
    assert spelled[1023:1025] == [FACTS["last_loc_piece"], FACTS["first_seg_piece"]]
    assert spelled[-1] == FACTS["last_piece"]


def test_every_text_becomes_the_original_ids(tokenizer: Tokenizer):
    assert len(ENCODE_DECODE["encode"]) == 57
    for case in ENCODE_DECODE["encode"]:
        ids = tokenizer.encode(case["text"])
        assert ids == case["ids"], case["text"]
        assert [tokenizer.tokens.bos, *ids, tokenizer.tokens.eos] == case["ids_bos_eos"]
        assert tokenizer.decode(ids) == case["decoded"]


def test_every_sequence_of_ids_becomes_the_original_text(tokenizer: Tokenizer):
    assert len(ENCODE_DECODE["decode"]) == 31
    for case in ENCODE_DECODE["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"], case["ids"]
        assert tokenizer.decode(case["ids"], stop_at_eos=False) == case["text_not_stopping_at_eos"], case["ids"]


def test_all_training_and_evaluation_pipelines_give_the_original_rows(tokenizer: Tokenizer):
    assert len(PIPELINES) == 92
    for case in PIPELINES:
        prefix, separator, suffix = (tokenizer.encode(case[name]) for name in ("prefix", "sep", "suffix"))
        taught = lay_out(0, prefix, separator, suffix, bos=2, eos=1)
        asked = lay_out(0, prefix, separator, bos=2, eos=None)
        begun = lay_out(0, prefix, separator, suffix, bos=2, eos=None)
        assert_equal(fit(taught, case["text_len"] + 1), case["train"])
        assert_equal(fit(asked, case["text_len"]), case["eval_without_suffix"])
        assert_equal(fit(begun, case["text_len"]), case["eval_with_suffix"])


def assert_equal(row: Sequence, expected: dict[str, list[int]]) -> None:
    assert set(expected) in ({"text", "mask_ar", "mask_loss"}, {"text", "mask_ar", "mask_input"})
    for name, values in expected.items():
        ours = getattr(row, "tokens" if name == "text" else name)
        np.testing.assert_array_equal(ours.astype(np.int64), values, err_msg=name)


TOK = [op for op in SINGLE_OPS if op["op"].startswith("tok(")]
TOLEN = [op for op in SINGLE_OPS if op["op"].startswith("tolen(")]


def argument(op: dict[str, Any], name: str) -> str:
    found = re.search(rf"{name}=(\"(?:[^\"]*)\"|[^,)]+)", op["op"])
    assert found, op["op"]
    return found[1].strip('"')


def test_tok_operations_are_encode_and_fit(tokenizer: Tokenizer):
    assert len(TOK) >= 50
    for op in TOK:
        text = op["inputs"].get("text") if "text=" not in op["op"] else argument(op, "text")
        bos, eos = argument(op, "bos"), argument(op, "eos")
        row = lay_out(
            0, tokenizer.encode(text), bos=2 if bos == "yes" else None, eos=1 if eos in ("yes", "sticky") else None
        )
        length = argument(op, "length")
        if length != "None":
            row = fit(row, int(length), keep_last=eos == "sticky")
        assert row.tokens.tolist() == op["output"], op


def test_lower_operations_are_lowered():
    operations = [op for op in SINGLE_OPS if op["op"].startswith("lower(")]
    assert len(operations) == 3
    for op in operations:
        assert lowered(op["inputs"]["text"]) == op["output"], op


def test_tolen_operations_are_fit():
    assert len(TOLEN) == 7
    for op in TOLEN:
        values = op["inputs"]["x"]
        row = fit(lay_out(0, values, bos=None, eos=None), 5, keep_last=argument(op, "sticky_end") == "True")
        # big_vision pads with a value of choice (9 here); ours says by mask_input what is padding.
        assert np.where(row.mask_input, row.tokens, int(argument(op, "pad_value"))).tolist() == op["output"], op
