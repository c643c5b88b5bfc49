"""The picture world: questions, captions and the corpus."""

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from paligemma.data import world
from paligemma.data.world import ANSWER_KINDS, COLOURS, KINDS, SHAPES, Background, Scene, Thing, caption_facts
from paligemma.data.world.questions import left_of
from paligemma.data.world.shapes import plural

SINGULAR = {plural(shape): shape for shape in SHAPES} | {shape: shape for shape in SHAPES}


def drawn_scenes(name, n=100):
    for seed in range(n):
        scene = world.sample_scene(seed, name)
        yield seed, scene, world.render(scene)


def questions(name, kind, n=100, per_scene=2, **options):
    for seed, scene, drawn in drawn_scenes(name, n):
        rng = np.random.default_rng(seed)
        for _ in range(per_scene):
            question = world.ask_one(kind, scene, drawn, rng, **options)
            if question is not None:
                yield scene, drawn, question


def goes_by(thing, name):
    colour, _, shape = name.rpartition(" ")
    return thing.kind == "shape" and thing.shape == SINGULAR[shape] and colour in ("", thing.colour)


def put(*things):
    """A scene of shapes given as (colour, shape, x, y) on white, 200 pixels square."""
    rgbs = {"red": (220, 20, 30), "blue": (40, 80, 220), "green": (40, 160, 50)}
    return Scene(
        size_hw=(200, 200),
        background=Background(kind="flat", colour="white", rgbs=((255, 255, 255), (255, 255, 255))),
        things=tuple(
            Thing(kind="shape", shape=s, colour=c, rgb=rgbs[c], centre_xy_px=(x, y), size_px=30.0)
            for c, s, x, y in things
        ),
    )


def test_the_same_generator_asks_the_same_questions():
    scene = world.sample_scene(3, "full")
    drawn = world.render(scene)
    first, second = (world.ask(scene, drawn, np.random.default_rng(5), 8) for _ in range(2))
    assert first == second
    assert len(first) == 8


def test_every_kind_is_asked():
    kinds = Counter()
    for seed, scene, drawn in drawn_scenes("full", 150):
        kinds.update(q.kind for q in world.ask(scene, drawn, np.random.default_rng(seed), 6))
    assert set(kinds) == set(KINDS)
    assert set(ANSWER_KINDS) < set(KINDS)


@pytest.mark.parametrize("name", ["plain", "full"])
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_located_things_are_those_asked_for_in_asked_order_from_the_top(name, task):
    for scene, drawn, question in questions(name, task):
        assert question.prefix.startswith(f"{task} ")
        asked = question.prefix.removeprefix(f"{task} ").split(" ; ")
        assert 1 <= len(set(asked)) == len(asked) <= 3
        expected = []
        for label in asked:
            found = [i for i, thing in enumerate(scene.things) if goes_by(thing, label)]
            tops = {i: np.nonzero(drawn.masks[i].any(axis=1))[0][0] for i in found}
            lefts = {i: np.nonzero(drawn.masks[i].any(axis=0))[0][0] for i in found}
            expected += [(label, i) for i in sorted(found, key=lambda i: (tops[i], lefts[i]))]
        assert list(question.answer) == expected
        assert len({i for _, i in question.answer}) == len(question.answer)


def test_some_prompts_ask_only_for_what_is_not_there():
    empty = [not question.answer for _, _, question in questions("full", "detect", 300)]
    assert 0.08 < np.mean(empty) < 0.3
    partly = [
        0 < len({label for label, _ in q.answer}) < q.prefix.count(" ; ") + 1
        for _, _, q in questions("full", "detect", 300)
    ]
    assert np.mean(partly) > 0.03


def test_counts_of_shapes_equal_the_blobs_in_the_picture():
    seen = set()
    for _, scene, drawn in drawn_scenes("plain", 150):
        different = np.abs(drawn.image.astype(int) - scene.background.rgbs[0]).sum(axis=2) > 60
        _, n = ndimage.label(different, structure=np.ones((3, 3)))
        rng = np.random.default_rng(0)
        for _ in range(12):
            question = world.ask_one("count", scene, drawn, rng, variants=False)
            if question.prefix == "answer en how many shapes?":
                assert question.answer == str(n)
                seen.add(n)
    assert seen == {1, 2, 3}


def test_counts_of_a_thing_equal_its_recount():
    answers = Counter()
    for scene, _, question in questions("full", "count", 200, 3):
        asked = question.prefix.removeprefix("answer en ").removesuffix("?").split("many ")[1]
        if not asked.startswith("shape"):
            assert question.answer == str(sum(goes_by(thing, asked) for thing in scene.things))
            answers[question.answer] += 1
    assert {"0", "1", "2", "3"} <= set(answers)
    assert answers["2"] > 0.05 * answers.total()


def test_the_colour_answered_is_the_colour_of_the_pixels():
    asked = 0
    for scene, drawn, question in questions("plain", "colour"):
        shape = question.prefix.removesuffix("?").split("is the ")[1]
        (index,) = [i for i, thing in enumerate(scene.things) if thing.shape == shape]
        pixel = np.median(drawn.image[drawn.masks[index]], axis=0)
        (name,) = [n for n, (low, high) in COLOURS.items() if np.all(pixel >= low) and np.all(pixel <= high)]
        assert question.answer == name
        asked += 1
    assert asked > 100


def test_the_colour_is_not_asked_where_two_shapes_share_the_name():
    scene = put(("red", "star", 50, 50), ("blue", "star", 150, 150))
    rng = np.random.default_rng(0)
    assert all(world.ask_one("colour", scene, world.render(scene), rng) is None for _ in range(20))


@pytest.mark.parametrize("kind", ["there", "present"])
def test_yes_and_no_are_balanced_and_true(kind):
    answers = []
    for scene, _, question in questions("full", kind, 200, variants=False):
        asked = question.prefix.removeprefix("answer en ")
        if kind == "there":
            assert asked.startswith("is there a")
            name = asked.removesuffix("?").split(" ", 3)[3]
        else:
            name = asked.removeprefix("Is ").removesuffix(" in the image?")
        truth = any(goes_by(thing, name) for thing in scene.things)
        assert question.answer == ("yes" if truth else "no")
        answers.append(truth)
    assert 0.4 < np.mean(answers) < 0.6


def test_left_is_the_nearest_on_the_left_and_otherwise_nothing():
    scene = put(("red", "star", 40, 100), ("blue", "circle", 100, 100), ("green", "heart", 170, 100))
    drawn = world.render(scene)
    assert [left_of(scene, drawn, i) for i in range(3)] == [-1, 0, 1]
    answers = {
        q.prefix: q.answer for q in world.ask(scene, drawn, np.random.default_rng(0), 60, {"left": 1}, variants=False)
    }
    assert answers["answer en what is left of the heart?"] == "blue circle"
    assert answers["answer en what is left of the blue circle?"] == "red star"
    assert answers["answer en what is left of the red star?"] == "nothing"


@pytest.mark.parametrize(
    "things",
    [
        (("red", "star", 100, 40), ("blue", "circle", 105, 160)),  # above, not left
        (("red", "star", 50, 60), ("green", "heart", 50, 140), ("blue", "circle", 150, 100)),  # two equally near
    ],
)
def test_left_is_not_asked_where_it_is_a_matter_of_opinion(things):
    scene = put(*things)
    assert left_of(scene, world.render(scene), len(things) - 1) is None


def test_what_is_left_agrees_with_the_masks():
    asked = 0
    for scene, drawn, question in questions("full", "left", 200):
        name = question.prefix.removesuffix("?").split("left of the ")[1]
        (index,) = [i for i, thing in enumerate(scene.things) if goes_by(thing, name)]
        h, w = scene.size_hw
        boxes = [ndimage.find_objects(mask.astype(int))[0] for mask in drawn.masks]
        middles = np.array([[(b[1].start + b[1].stop) / 2 / w, (b[0].start + b[0].stop) / 2 / h] for b in boxes])
        left = [i for i in range(len(middles)) if middles[i, 0] < middles[index, 0]]
        nearest = min(left, key=lambda i: np.linalg.norm(middles[i] - middles[index]), default=None)
        assert question.answer == ("nothing" if nearest is None else scene.things[nearest].name)
        asked += 1
    assert asked > 50


def test_ocr_reads_every_text_once_from_the_top():
    several = 0
    for scene, drawn, question in questions("full", "ocr", 200, 1):
        words = question.answer.split(" ") if question.answer else []
        assert Counter(words) == Counter(scene.things[i].text for i in scene.texts)
        boxes = {scene.things[i].text: drawn.boxes_xyxy_px[i] for i in scene.texts}
        for above, below in itertools.pairwise(words):
            starts_lower = boxes[below][1] >= boxes[above][1]
            same_line = boxes[below][1] < boxes[above][3] and boxes[below][0] >= boxes[above][0]
            assert starts_lower or same_line
            several += 1
    assert several > 20


def test_texts_are_detected_by_the_word_text():
    for scene, _, question in questions("full", "detect_text", 60, 1):
        assert question.prefix == "detect text"
        assert {i for _, i in question.answer} == set(scene.texts)
        assert {label for label, _ in question.answer} <= {"text"}


@pytest.mark.parametrize("name", ["plain", "full"])
def test_a_caption_states_the_facts_of_its_scene(name):
    for _, scene, drawn in drawn_scenes(name, 200):
        text = world.caption(scene, drawn)
        assert caption_facts(text) == world.scene_facts(scene)
        assert not set(text) & set(";<>\n")
        assert all(f'"{scene.things[i].text}"' in text for i in scene.texts)
        assert text.endswith(f"{scene.background.colour} background")


def test_a_caption_goes_from_left_to_right_and_counts_equals():
    scene = put(("red", "star", 150, 50), ("blue", "cross", 40, 50), ("red", "star", 90, 150))
    assert world.caption(scene, world.render(scene)) == "a blue cross and two red stars on a white background"


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("", {}),
        ("three red crosses", {("red", "cross"): 3}),
        ("an orange arrow and a orange arrow", {("orange", "arrow"): 2}),
        ('the word "red circle" on a red background', {}),
        ("a circle, red", {}),
        ("red circle, red circle, two blue ovals", {("red", "circle"): 2, ("blue", "oval"): 2}),
    ],
)
def test_facts_are_read_from_whatever_a_model_says(text, facts):
    assert caption_facts(text) == Counter(facts)


def test_the_corpus_covers_every_character_that_can_be_asked_or_answered():
    characters = set("".join(world.corpus(200, seed=1)))
    for seed, scene, drawn in drawn_scenes("full", 150):
        for question in world.ask(scene, drawn, np.random.default_rng(seed), 5):
            assert set(question.prefix) <= characters
            assert not isinstance(question.answer, str) or set(question.answer) <= characters
    lines = list(world.corpus(20, seed=4))
    assert lines == list(world.corpus(20, seed=4))
    assert set(world.WORDS) <= set(lines)


def test_asking_for_everything_lists_every_shape_and_names_one_that_is_absent():
    tasks = Counter()
    for seed, scene, drawn in drawn_scenes("full", 80):
        question = world.ask_everything(scene, drawn, np.random.default_rng(seed))
        absent = [label for label in question.labels if not any(goes_by(thing, label) for thing in scene.things)]
        assert len(absent) == 1
        assert sorted(i for _, i in question.answer) == list(scene.shapes)
        assert question.task == question.prefix.split(" ")[0]
        tasks[question.task] += 1
    assert min(tasks["detect"], tasks["segment"]) > 20


def test_asking_for_some_lists_only_that():
    n_listed = n_there = 0
    for seed, scene, drawn in drawn_scenes("many", 40):
        question = world.ask_everything(scene, drawn, np.random.default_rng(seed), share=0.5)
        true = {i for i, thing in enumerate(scene.things) if any(goes_by(thing, label) for label in question.labels)}
        assert {i for _, i in question.answer} == true
        assert true
        n_listed, n_there = n_listed + len(true), n_there + len(scene.shapes)
    assert 0.3 < n_listed / n_there < 0.75


def test_stories_list_what_there_is_and_answer_from_the_list():
    told = list(world.stories(60, seed=3))
    assert told == list(world.stories(60, seed=3))
    n_colours = n_counts = 0
    for story in told:
        listed, *lines = story.split("\n")
        names = listed.split(" ; ")
        for prefix, answer in zip(lines[::2], lines[1::2], strict=True):
            shape = next((name.split()[-1] for name in names if prefix.endswith(f" {name.split()[-1]}?")), None)
            if "colour is the" in prefix:
                assert f"{answer} {shape}" in names
                n_colours += 1
            if prefix == "answer en how many shapes?":
                assert int(answer) == sum(name != "text" for name in names)
                n_counts += 1
            if prefix.startswith("detect "):
                said = [label for label in answer.split(" ; ") if label]
                assert all(any(name == label or name.endswith(f" {label}") for name in names) for label in said)
    assert min(n_colours, n_counts) > 3
