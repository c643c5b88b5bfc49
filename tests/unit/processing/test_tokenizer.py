"""Tokenizer: both file formats alike, extension, control spellings, streaming, files of the wrong vocabulary."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from paligemma.config import TokenConfig
from paligemma.errors import PromptError, TokenizerError
from paligemma.processing.tokenizer import Tokenizer

DATA = Path(__file__).parents[2] / "golden" / "data" / "text_preprocessing"
TOKENS = TokenConfig(n_tokens=1664, loc_start=512, seg_start=1536, image=1664)


@pytest.fixture(scope="module")
def json_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    Tokenizer.from_file(DATA / "tokenizer.model").save(folder, hugging_face=True)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def tokenizer(request: pytest.FixtureRequest, json_file: Path) -> Tokenizer:
    return Tokenizer.from_file(json_file if request.param == "tokenizer.json" else DATA / "tokenizer.model", TOKENS)


# ----------------------------------------------------------------------------------------------------------- meaning


def test_ids_are_read_off_the_vocabulary(json_file: Path):
    assert Tokenizer.from_file(DATA / "tokenizer.model").tokens == TOKENS
    assert Tokenizer.from_file(DATA / "tokenizer_extended.model").tokens == TOKENS
    assert Tokenizer.from_file(json_file).tokens == TOKENS


def test_appended_pieces_make_the_model_that_sentencepiece_itself_would_write():
    """The golden extended file was written by the protobuf package; ours by appending bytes."""
    ours, theirs = (
        sentencepiece.SentencePieceProcessor(model_proto=data)
        for data in (
            Tokenizer.from_file(DATA / "tokenizer.model")._vocabulary.data,
            (DATA / "tokenizer_extended.model").read_bytes(),
        )
    )
    assert ours.GetPieceSize() == theirs.GetPieceSize() == 1664
    assert [ours.IdToPiece(i) for i in range(1664)] == [theirs.IdToPiece(i) for i in range(1664)]
    assert [ours.GetScore(i) for i in range(1664)] == [theirs.GetScore(i) for i in range(1664)]


def test_control_spellings_are_characters_unless_parsing_is_asked_for(tokenizer: Tokenizer):
    for piece, token in (("<pad>", 0), ("<eos>", 1), ("<bos>", 2), ("<unk>", 3), ("<image>", 1664)):
        assert token not in tokenizer.encode(f"a{piece}b")
        assert tokenizer.decode(tokenizer.encode(f"a{piece}b")) == f"a{piece}b"
        assert tokenizer.encode(f"a{piece}b", special="parse") == [
            *tokenizer.encode("a"),
            token,
            *tokenizer.encode("b"),
        ]


def test_turn_and_mask_pieces_are_one_token_in_either_mode(tokenizer: Tokenizer):
    for piece, token in (("<mask>", 4), ("<start_of_turn>", 8), ("<end_of_turn>", 9)):
        for special in ("text", "parse"):
            assert tokenizer.encode(piece, special=special) == [token]


def test_location_spellings_are_one_token_wherever_they_stand(tokenizer: Tokenizer):
    assert tokenizer.encode("x<loc0000><loc1023><seg000><seg127>x")[1:-1] == [512, 1535, 1536, 1663]
    near_miss = tokenizer.encode("<loc1024><loc123><seg128>")
    assert not [token for token in near_miss if token >= 512]


def test_control_pieces_are_what_a_prompt_must_not_contain(tokenizer: Tokenizer):
    expected = {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<image>", "<start_of_turn>", "<end_of_turn>"}
    assert set(tokenizer.control_pieces) == expected
    for piece in expected:
        assert tokenizer.find_control(f"a{piece}") == piece
    assert tokenizer.find_control("a <loc0001><seg001> <b> <eo s>") is None


def test_nothing_is_changed_on_the_way_in(tokenizer: Tokenizer):
    assert tokenizer.encode("Hello") != tokenizer.encode(" Hello")
    for text in ("ﬁ", "e\u0301", "É", "①", "\u00a0", "\u3000", "a\r\nb", "\0", "\u200b", "𝒳"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_one_character_that_does_not_come_back_is_the_space_sign(tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer):
    with pytest.raises(PromptError, match=r"half a surrogate pair: expected whole Unicode characters"):
        tokenizer.encode("a\ud83d")


# ---------------------------------------------------------------------------------------------------- tokens to text


def test_pieces_put_a_character_at_its_last_byte(tokenizer: Tokenizer):
    dog = tokenizer.encode("🐕")
    assert len(dog) == 4
    assert tokenizer.pieces([*tokenizer.encode("a"), *dog, 1]) == ["a", "", "", "", "🐕", ""]


def test_broken_bytes_are_one_replacement_each_at_their_own_place(tokenizer: Tokenizer):
    e2, a = (tokenizer.encode(text)[0] for text in ("€", "a"))
    dog = tokenizer.encode("🐕")
    assert tokenizer.pieces([e2, a]) == ["\ufffd", "a"]
    assert tokenizer.pieces(dog[:3]) == ["\ufffd"] * 3
    assert tokenizer.pieces([e2, *dog]) == ["\ufffd", "", "", "", "🐕"]


def test_silent_tokens_part_the_bytes_of_a_character_as_in_sentencepiece(tokenizer: Tokenizer):
    first, second = tokenizer.encode("é")
    assert tokenizer.pieces([first, 0, second]) == ["\ufffd", "", "\ufffd"]
    assert tokenizer.decode([0, 2, 1664, 1665]) == ""


def test_a_stream_shows_a_character_only_once_it_is_whole(tokenizer: Tokenizer):
    stream = tokenizer.stream()
    shown = [
        stream.push(token)
        for token in [*tokenizer.encode("é!"), *tokenizer.encode("🐕")[:2], 1, *tokenizer.encode("x")]
    ]
    assert shown == ["", "é", "!", "", "", "\ufffd\ufffd", ""]
    assert stream.close() == ""


def test_a_negative_id_is_refused(tokenizer: Tokenizer):
    with pytest.raises(TokenizerError, match=r"token id -1 is negative: expected 0 to 1663"):
        tokenizer.decode([-1])


# ------------------------------------------------------------------------------------------------------------- files


def test_copies_and_other_processes_get_an_equal_tokenizer(tokenizer: Tokenizer):
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other.encode("caption en <loc0001>") == tokenizer.encode("caption en <loc0001>")


def test_a_complete_vocabulary_is_saved_byte_for_byte(tmp_path: Path, json_file: Path):
    for source in (DATA / "tokenizer_extended.model", json_file):
        Tokenizer.from_file(source).save(tmp_path)
        assert (
            tmp_path / ("tokenizer.json" if source == json_file else "tokenizer.model")
        ).read_bytes() == source.read_bytes()


def test_an_extended_vocabulary_is_saved_with_what_was_appended(tmp_path: Path):
    Tokenizer.from_file(DATA / "tokenizer.model").save(tmp_path)
    saved = (tmp_path / "tokenizer.model").read_bytes()
    assert saved.startswith((DATA / "tokenizer.model").read_bytes())
    assert Tokenizer.from_bytes(saved, TOKENS).encode("<loc0007>") == [519]


def test_a_json_without_location_tokens_is_extended_too(json_file: Path):
    """A plain Gemma `tokenizer.json`: the same 1,152 tokens at the same ids."""
    values = json.loads(json_file.read_text(encoding="utf-8"))
    values["added_tokens"] = [t for t in values["added_tokens"] if t["id"] < 512]
    values["model"]["vocab"] = {piece: i for piece, i in values["model"]["vocab"].items() if i < 512}
    tokenizer = Tokenizer.from_bytes(json.dumps(values).encode(), TOKENS)
    assert tokenizer.encode("<loc0000> <seg127>") == [512, *tokenizer.encode(" "), 1663]


def test_a_folder_is_searched_for_either_file(tmp_path: Path, json_file: Path):
    assert Tokenizer.from_file(json_file.parent, TOKENS).source.endswith("tokenizer.model")
    (tmp_path / "tokenizer.json").write_bytes(json_file.read_bytes())
    assert Tokenizer.from_file(tmp_path, TOKENS).source.endswith("tokenizer.json")


def test_a_file_of_another_name_is_known_by_its_content(tmp_path: Path, json_file: Path):
    (tmp_path / "words.bin").write_bytes(json_file.read_bytes())
    assert Tokenizer.from_file(tmp_path / "words.bin").tokens == TOKENS


def test_a_missing_file_says_what_was_expected(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"no tokenizer at .*: expected a tokenizer\.model or tokenizer\.json"):
        Tokenizer.from_file(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"  \n", b"not a model", b"{}", b'{"version": "1.0", "mod', b"\x80\x04\x95pickle"]
)
def test_files_that_are_no_tokenizer_are_refused_in_one_line(data: bytes):
    with pytest.raises(TokenizerError, match="expected") as caught:
        Tokenizer.from_bytes(data, name="words.model")
    assert str(caught.value).startswith("words.model is ")
    assert "\n" not in str(caught.value)


def test_a_truncated_model_is_refused_wherever_it_was_cut():
    whole = (DATA / "tokenizer_extended.model").read_bytes()
    for n_bytes in (1, 100, 5000, len(whole) // 2, len(whole) - 1):
        with pytest.raises(TokenizerError):
            Tokenizer.from_bytes(whole[:n_bytes], TOKENS)


@pytest.mark.parametrize("changes", [{"n_tokens": 1665}, {"loc_start": 500}, {"seg_start": 1}, {"image": 7}])
def test_a_vocabulary_other_than_the_model_expects_is_refused(changes: dict[str, int], json_file: Path):
    expected = dataclasses.replace(TOKENS, **changes)
    (name, value), ours = next(iter(changes.items())), getattr(TOKENS, next(iter(changes)))
    with pytest.raises(
        TokenizerError, match=rf"does not fit the model: it has {name}={ours}, expected {name}={value}\. Use"
    ):
        Tokenizer.from_file(json_file, expected)


def test_a_base_of_another_size_is_refused_although_it_can_be_extended():
    with pytest.raises(TokenizerError, match=r"it has n_tokens=1664, loc_start=512, .*expected n_tokens=257152"):
        Tokenizer.from_file(DATA / "tokenizer.model", TokenConfig())


def edited(json_file: Path, change: Callable[[dict[str, int]], None]) -> bytes:
    """The vocabulary with some pieces renamed or removed."""
    values = json.loads(json_file.read_text(encoding="utf-8"))
    vocab = values["model"]["vocab"]
    change(vocab)
    values["added_tokens"] = [t for t in values["added_tokens"] if vocab.get(t["content"]) == t["id"]]
    return json.dumps(values).encode()


def test_wrong_control_ids_are_refused(json_file: Path):
    def swap(vocab: dict[str, int]) -> None:
        vocab["<eos>"], vocab["<bos>"] = vocab["<bos>"], vocab["<eos>"]

    with pytest.raises(TokenizerError, match=r"has '<bos>' as id 1, expected '<eos>': this is not a Gemma vocabulary"):
        Tokenizer.from_bytes(edited(json_file, swap))


def test_some_but_not_all_location_tokens_are_refused(json_file: Path):
    with pytest.raises(TokenizerError, match=r"has 1151 of 1152 loc and seg tokens, <seg007> is not among them"):
        Tokenizer.from_bytes(edited(json_file, lambda vocab: vocab.update({"<seg7>": vocab.pop("<seg007>")})))


def test_location_tokens_out_of_order_are_refused(json_file: Path):
    def swap(vocab: dict[str, int]) -> None:
        vocab["<loc0003>"], vocab["<loc0004>"] = vocab["<loc0004>"], vocab["<loc0003>"]

    with pytest.raises(TokenizerError, match=r"the <loc…> tokens of tokenizer do not follow one another from 512"):
        Tokenizer.from_bytes(edited(json_file, swap))
