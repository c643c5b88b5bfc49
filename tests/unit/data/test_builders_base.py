"""What all builders share: cycling over epochs, reading order, drawing among builders, the source of examples."""

import dataclasses
import pickle
from collections import Counter

import numpy as np
import pytest

from paligemma.data import world
from paligemma.data.builders import (
    BUILDERS,
    LANGUAGES,
    Built,
    CaptionBuilder,
    OneOf,
    Turn,
    builder_of,
    choice_no_replacement,
    raster_order,
    read_example,
)
from paligemma.data.example import Example
from paligemma.data.record import Asked, Instance, Record, Text, Word
from paligemma.data.world.questions import raster_order as world_raster_order
from paligemma.errors import DataError, OptionError

SIZE = (100, 200)
RECORD = Record(
    ("a.jpg",),
    SIZE,
    instances=(Instance("cat", (10, 20, 60, 80)),),
    texts=(*(Text(f"text {i}") for i in range(5)), Text("eine Katze", "de")),
    words=(Word("OPEN", (0, 0, 30, 10)), Word("NOW", (40, 0, 70, 10))),
    questions=(Asked("where?", ("here", "there")), Asked("wer?", ("cat",), "de")),
    id="17",
    where="train.json image 17 (a.jpg)",
    meta={"license": 3},
)


@dataclasses.dataclass
class Shelf:
    """Records in memory, as a source."""

    records: list[Record]
    labels: tuple[str, ...] = ("cat", "dog", "red car")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def where(self, index: int) -> str:
        return self.records[index].where


def bare(number: int) -> Record:
    return Record((f"{number}.jpg",), SIZE, id=str(number), where=f"image {number}")


def captioned(number: int) -> Record:
    return dataclasses.replace(bare(number), texts=(Text(f"caption of {number}"),))


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_every_item_is_shown_once_in_every_walk(n):
    for key in ("a", "b"):
        shown = [choice_no_replacement(n, seed=3, key=key, epoch=epoch) for epoch in range(4 * n)]
        for walk in range(4):
            assert sorted(shown[walk * n : (walk + 1) * n]) == list(range(n))


def test_walks_differ_by_record_by_seed_and_from_one_another():
    def walk(first=0, seed=0, key="a"):
        return [choice_no_replacement(8, seed=seed, key=key, epoch=first + i) for i in range(8)]

    assert walk() == walk()
    assert len({tuple(w) for w in (walk(), walk(first=8), walk(seed=1), walk(key="b"))}) == 4
    with pytest.raises(OptionError, match="n=0"):
        choice_no_replacement(0, seed=0, key="a", epoch=0)


def test_first_epochs_favour_no_item():
    counts = Counter(choice_no_replacement(4, seed=0, key=str(record), epoch=0) for record in range(4000))
    assert all(900 < counts[i] < 1100 for i in range(4))


def test_boxes_of_a_line_are_read_from_the_left_though_they_do_not_stand_level():
    boxes = [(50, 12, 60, 22), (0, 10, 10, 20), (0, 40, 10, 50), (20, 8, 30, 18)]
    assert raster_order(boxes) == [1, 3, 0, 2]
    assert raster_order([]) == []


def test_the_picture_world_reads_in_the_same_order():
    checked = 0
    for seed in range(60):
        scene = world.sample_scene(seed, "full")
        drawn = world.render(scene)
        texts = list(scene.texts)
        ours = [texts[i] for i in raster_order([drawn.boxes_xyxy_px[i] for i in texts])]
        assert ours == world_raster_order(scene, drawn)
        checked += len(texts) > 1
    assert checked > 5


def test_there_are_35_languages_and_a_fixed_one_is_checked():
    assert len(LANGUAGES) == len(set(LANGUAGES)) == 35
    for lang in (*LANGUAGES, "quz", "is", "tl", "ceb"):
        assert CaptionBuilder(lang=lang).lang == lang
    for lang, meant in (
        ("eng", "en"),
        ("en-US", "en"),
        ("en_us", "en"),
        ("EN", "en"),
        ("zh-Hant", "zh"),
        ("ger", "de"),
    ):
        with pytest.raises(OptionError, match=f"lang='{lang}': expected a language code.*Did you mean '{meant}'"):
            CaptionBuilder(lang=lang)
    for lang in ("", "english language", "e", "7"):
        with pytest.raises(OptionError, match="expected a language code"):
            builder_of("answer", answer_lang=lang)


def test_a_language_that_comes_with_the_data_is_taken_as_it_is():
    record = dataclasses.replace(RECORD, texts=(Text("hi", "en-US"),))
    example = CaptionBuilder().build(record, np.random.default_rng(0))
    assert example.prefix == "caption en-US"
    with pytest.raises(DataError, match=r"^train.json image 17 \(a.jpg\): lang='': expected one language code"):
        CaptionBuilder().build(dataclasses.replace(RECORD, texts=(Text("hi", ""),)), np.random.default_rng(0))


def test_the_table_has_a_builder_under_each_name():
    assert list(BUILDERS) == [
        "caption", "cap", "describe", "grounded_caption", "ocr", "ocr_boxes", "answer", "question", "detect",
        "detect_noise", "segment", "referring", "list_objects", "presence", "multi_presence", "count",
    ]  # fmt: skip
    assert all(builder.name == name and builder.needs for name, builder in BUILDERS.items())


def test_wrong_names_fields_and_values_are_refused_with_the_nearest():
    for call, said in (
        (lambda: builder_of("captoin"), "no builder 'captoin': expected one of .*Did you mean 'caption'"),
        (lambda: builder_of("caption", langs="en"), "has no field 'langs': expected one of .*Did you mean 'lang'"),
        (lambda: builder_of("detect", order="rastre"), "order='rastre': expected one of .*Did you mean 'raster'"),
        (lambda: builder_of("caption", choice="cycel"), "Did you mean 'cycle'"),
        (lambda: builder_of("detect", max_objects=0), "max_objects=0: expected a whole number of 1 or more"),
        (lambda: builder_of("detect", n_noise=True), "n_noise=True: expected a whole number"),
        (lambda: builder_of("detect", n_noise=1, fill_to=4), "n_noise=1 and fill_to=4: expected one of them"),
        (lambda: builder_of("detect", noise_label="<noise>"), "noise_label '<noise>' holds '<'"),
        (lambda: builder_of("detect", ask="all", n_absent=2), "n_absent=2 with ask='all'"),
        (lambda: builder_of("detect", jittered=2), "jittered=2: expected a share"),
        (lambda: builder_of("referring", prefix="x"), "the prompt to be the expression alone"),
        (lambda: builder_of("presence", question="Is it?"), "expected text with {thing} once"),
        (lambda: builder_of("count", p_absent=-1), "p_absent=-1: expected a share"),
        (lambda: OneOf((BUILDERS["ocr"],), (1, 2)), "1 builders with weights"),
        (lambda: OneOf(()), "0 builders"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=said) as refused:
            call()
        assert "\n" not in str(refused.value)
    assert builder_of("caption", lang="de", choice="first") == CaptionBuilder(lang="de", choice="first")


def test_examples_carry_pictures_place_and_all_that_the_record_holds():
    example = BUILDERS["ocr"].build(RECORD, np.random.default_rng(0))
    assert example == Example(
        ("a.jpg",), "ocr", "OPEN NOW", where=RECORD.where, meta={"license": 3, "id": "17"}
    )  # fmt: skip
    back = read_example(example, SIZE)
    assert (back.images, back.size_hw, back.id, back.where) == (RECORD.images, SIZE, "17", RECORD.where)
    assert back.words == (Word("OPEN"), Word("NOW"))


def test_one_of_several_is_drawn_by_weight_among_those_that_apply():
    names = ("caption", "ocr", "describe")  # there is no text to describe
    one = OneOf(tuple(BUILDERS[name] for name in names), (3, 1, 50))
    prefixes = Counter(one.build(RECORD, np.random.default_rng(seed)).prefix.split()[0] for seed in range(400))
    assert set(prefixes) == {"caption", "ocr"}
    assert 250 < prefixes["caption"] < 350
    example = one.build(RECORD, np.random.default_rng(5))
    assert one.build(RECORD, np.random.default_rng(5)) == example
    assert one.build(bare(1), np.random.default_rng(5)) is None
    assert one.read(example, SIZE) == read_example(example, SIZE)
    with pytest.raises(DataError, match=r"the prompt 'detect cat' is none of 'caption \| ocr \| describe'"):
        one.read(Example((), "detect cat", ""), SIZE)


def test_captions_cycle_over_epochs_without_repeats():
    built = Built(Shelf([RECORD]), builder_of("caption", lang="en"), seed=4)
    for first in (0, 5):
        assert {built.varied(0, first + i).suffix for i in range(5)} == {f"text {i}" for i in range(5)}
    other = Built(Shelf([RECORD]), builder_of("caption", lang="en"), seed=5)
    assert [other.varied(0, i).suffix for i in range(5)] != [built.varied(0, i).suffix for i in range(5)]


def test_every_question_and_then_every_answer_is_shown_over_epochs():
    turns = [Turn(epoch=epoch) for epoch in range(4)]
    shown = [BUILDERS["answer"].build(RECORD, np.random.default_rng(0), turn=turn) for turn in turns]
    assert Counter((e.prefix, e.suffix) for e in shown) == {
        ("answer en where?", "here"): 1,
        ("answer en where?", "there"): 1,
        ("answer en wer?", "cat"): 2,
    }


def test_an_example_depends_on_seed_epoch_and_row_alone():
    shelf = Shelf([captioned(i) for i in range(6)])
    built = Built(shelf, OneOf((BUILDERS["caption"], BUILDERS["presence"])), seed=1)
    backwards = [built.varied(i, 2) for i in reversed(range(6))][::-1]
    again = pickle.loads(pickle.dumps(built))
    assert [again.varied(i, 2) for i in range(6)] == backwards
    assert [built[i] for i in range(6)] == [built.varied(i, 0) for i in range(6)]
    assert built[-1] == built[5]
    assert (len(built), built.labels, built.where(3)) == (6, shelf.labels, "image 3")
    with pytest.raises(IndexError):
        built[6]


def test_a_record_that_has_nothing_is_an_error_or_gives_way_to_the_next():
    shelf = Shelf([captioned(0), bare(1), bare(2), captioned(3), bare(4)])
    with pytest.raises(DataError, match=r"^image 1 has nothing for 'caption': expected a text of style 'caption'\. "):
        Built(shelf, BUILDERS["caption"])[1]
    skipping = Built(shelf, BUILDERS["caption"], skip_empty=True)
    assert [skipping[i].where for i in range(5)] == ["image 0", "image 3", "image 3", "image 3", "image 0"]
    with pytest.raises(DataError, match="none of the 5 records has anything for 'detect': expected instances"):
        Built(shelf, BUILDERS["detect"], skip_empty=True)[0]


def test_augmentation_comes_before_building_and_is_seeded():
    def moved(record: Record, rng: np.random.Generator) -> Record:
        return dataclasses.replace(record, texts=(Text(f"moved by {rng.integers(1000)}"),))

    built = Built(Shelf([captioned(0), captioned(1)]), BUILDERS["caption"], seed=2, augment=moved)
    texts = [built.varied(i, epoch).suffix for i in range(2) for epoch in range(3)]
    assert all(text.startswith("moved by") for text in texts)
    assert len(set(texts)) == 6
    assert built.varied(1, 2).suffix == texts[5]


def test_raw_prompts_are_nobodys():
    for prefix in ("", "what is this?", "the cat on the left", "caption", "detect", "answer en", "caption en please"):
        assert read_example(Example((), prefix, "a cat"), SIZE) is None
