"""The verbs on a model of random weights: what must hold whatever the model has learnt."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import paligemma
from paligemma import PaliGemma
from paligemma.engine.sampling import Sampling
from paligemma.errors import ImageError, OptionError, PromptError, ShapeError, TaskError
from paligemma.tasks import TASKS
from tests.tiny_folder import write_folder

Picture = NDArray[np.uint8]


@pytest.fixture(scope="module")
def pg(tmp_path_factory: pytest.TempPathFactory) -> PaliGemma:
    return paligemma.load(write_folder(tmp_path_factory.mktemp("models") / "random"))


def picture(seed: int) -> Picture:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (30 + 7 * seed, 64 - 5 * seed, 3), dtype=np.uint8)


EXAMPLES: list[Any] = [picture(0), [picture(1), picture(1)], picture(2), picture(3), [picture(4)]]
ARGS: dict[str, list[Any] | None] = {
    "caption": ["en", "de", "en", "zh", "fil"],
    "answer": ["what is this?", "how many?", "a", "is there a cat?", "why"],
    "question": ["cat", "two", "yes", "a red circle", "no"],
    "detect": ["cat", ["cat", "dog"], "a ; b ; c", ["x"], "red circle"],
    "segment": ["cat", ["cat", "dog"], "a ; b ; c", ["x"], "red circle"],
    "read": None,
}


def same(one: Any, other: Any) -> None:
    """Equal to the letter, numbers to rounding: the order of sums in a matrix product depends on its size."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=2e-4)
    else:
        assert one == other


def single(pg: PaliGemma, verb: str, image: Any, arg: Any, **options: Any) -> Any:
    return getattr(pg, verb)(image, **options) if arg is None else getattr(pg, verb)(image, arg, **options)


@pytest.mark.parametrize("verb", ARGS)
def test_a_batch_answers_like_single_calls_for_unlike_sizes_counts_and_prompts(pg: PaliGemma, verb: str):
    args = ARGS[verb]
    alone = [
        single(pg, verb, image, args[i] if args else None, max_new_tokens=70).to_dict()
        for i, image in enumerate(EXAMPLES)
    ]
    assert len({answer["raw"] for answer in alone}) > 2, "answers that are all alike would prove nothing"
    for batch_size in (2, 5):
        together = pg.batch(verb, EXAMPLES, args, batch_size=batch_size, max_new_tokens=70)
        same([answer.to_dict() for answer in together], alone)


def test_the_random_model_finds_boxes_and_masks_in_pixels_of_each_picture(pg: PaliGemma):
    found = pg.batch("segment", EXAMPLES, ARGS["segment"], max_new_tokens=200)
    assert sum(map(len, found)) > 3
    for image, segments in zip(EXAMPLES, found, strict=True):
        height, width = (image[0] if isinstance(image, list) else image).shape[:2]
        assert segments.size_hw == (height, width)
        for segment in segments:
            left, top, right, bottom = segment.box_xyxy_px
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert segment.mask.shape == (height, width)
            assert 0 < segment.score <= 1


@pytest.mark.parametrize("verb", ARGS)
def test_a_handle_stands_for_its_picture_in_every_verb(pg: PaliGemma, verb: str):
    args = ARGS[verb]
    for i in (0, 1):
        handle = pg.encode_image(EXAMPLES[i])
        arg = args[i] if args else None
        direct = single(pg, verb, EXAMPLES[i], arg, max_new_tokens=40)
        same(single(pg, verb, handle, arg, max_new_tokens=40).to_dict(), direct.to_dict())


def test_handles_and_pictures_mix_within_one_example_and_one_batch(pg: PaliGemma):
    a, b = picture(0), picture(2)
    plain = pg.generate([a, b], "caption en", max_new_tokens=30)[0]
    for images in ([pg.encode_image(a), b], [a, pg.encode_image(b)], pg.encode_image([a, b])):
        assert pg.generate(images, "caption en", max_new_tokens=30)[0].tokens == plain.tokens
    assert pg.generate([b, a], "caption en", max_new_tokens=30)[0].tokens != plain.tokens, "order matters"


def test_every_form_of_a_picture_means_the_same(pg: PaliGemma, tmp_path: Any):
    array = picture(1)
    path = tmp_path / "picture.png"
    Image.fromarray(array).save(path)
    forms = [array, Image.fromarray(array), path, str(path), path.read_bytes()]
    assert len({pg.caption(form, max_new_tokens=20).raw for form in forms}) == 1


def test_choices_are_weighed_by_the_likelihood_of_the_whole_answer(pg: PaliGemma):
    image, choices = picture(2), ["a cat", "dog", "a red circle", ""]
    answer = pg.answer(image, "what is this?", choices=choices)
    scores = dict(zip(choices, pg.score(image, "answer en what is this?", choices), strict=True))
    assert sum(choice.probability for choice in answer.choices) == pytest.approx(1, abs=1e-9)
    assert [c.text for c in answer.choices] == sorted(choices, key=lambda text: -scores[text])
    for choice in answer.choices:
        assert choice.logprob == pytest.approx(scores[choice.text], abs=1e-4)
        assert np.log(choice.probability / answer.choices[0].probability) == pytest.approx(
            scores[choice.text] - scores[answer.text], abs=1e-4
        )
    assert (answer.text, answer.logprob) == (answer.choices[0].text, answer.choices[0].logprob)


def test_a_generated_answer_scores_what_generate_said(pg: PaliGemma):
    prompts = [f"caption {lang}" for lang in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st", "uv", "wx")]
    image = pg.encode_image(picture(0))
    ended = 0
    for prompt, one in zip(prompts, pg.generate(image, prompts, max_new_tokens=60), strict=True):
        spelled_alike = (*pg.processor.tokenizer.encode(one.text), 1) == one.tokens
        if one.finish_reason == "stop" and spelled_alike:
            ended += 1
            assert pg.score(image, prompt, [one.text])[0] == pytest.approx(one.logprob, abs=1e-3)
    assert ended > 0


def test_a_stream_joins_to_the_generated_text_and_works_only_as_far_as_it_is_read(pg: PaliGemma):
    for seed in range(4):
        whole = pg.generate(picture(seed), "answer en what?", max_new_tokens=50)[0]
        assert "".join(pg.stream(picture(seed), "answer en what?", max_new_tokens=50)) == whole.text
        assert "".join(whole.pieces) == whole.text
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = pg.model.text.register_forward_hook(count)
    pieces = pg.stream(picture(1), "answer en what?", max_new_tokens=50)
    assert calls == 0
    assert len(list(islice(pieces, 2))) == 2
    hook.remove()
    assert 0 < calls < 10


def test_a_stream_refuses_a_bad_prompt_before_the_first_piece(pg: PaliGemma):
    with pytest.raises(PromptError, match="<eos>"):
        pg.stream(picture(0), "caption <eos>")


def test_generate_takes_a_picture_per_prompt_one_for_all_or_none(pg: PaliGemma):
    prompts = ["caption en", "caption de"]
    a, b = picture(0), picture(1)
    each = [
        pg.generate(image, prompt, max_new_tokens=20)[0].tokens for image, prompt in zip([a, b], prompts, strict=True)
    ]
    assert [g.tokens for g in pg.generate([a, b], prompts, max_new_tokens=20)] == each
    assert pg.generate(a, prompts, max_new_tokens=20)[0].tokens == each[0]
    text_only = pg.generate(None, prompts, max_new_tokens=20)
    mixed = pg.generate([a, None], prompts, max_new_tokens=20)
    assert mixed[0].tokens == each[0]
    assert mixed[1].tokens == text_only[1].tokens != each[1]
    assert len(pg.generate(a, "", max_new_tokens=5)) == 1, "an empty prompt is a prompt"


def test_samples_repeat_with_their_seed_and_do_not_depend_on_their_batch(pg: PaliGemma):
    def draw(*seeds: int) -> list[tuple[int, ...]]:
        prompts = ["caption en"] * len(seeds)
        found = pg.generate(picture(0), prompts, max_new_tokens=20, sampling=Sampling(temperature=1.5), seeds=seeds)
        return [one.tokens for one in found]

    assert draw(1, 2, 3) == [draw(1)[0], draw(2)[0], draw(3)[0]]
    assert draw(1) != draw(2)


def test_beams_find_nothing_less_likely_than_greedy_with_the_same_end(pg: PaliGemma):
    greedy = pg.generate(picture(3), "caption en", max_new_tokens=12)[0]
    beams = pg.generate(picture(3), "caption en", max_new_tokens=12, n_beams=4)[0]
    named = pg.generate(picture(3), "caption en", max_new_tokens=12, n_beams=4, beam="hf")[0]
    assert beams.finish_reason == "stop"
    if greedy.finish_reason == "stop":
        assert beams.logprob >= greedy.logprob - 1e-4
    assert named.tokens


def test_constraints_and_forbidden_tokens_act_per_prompt(pg: PaliGemma):
    n = pg.config.text.vocab_size
    only = torch.zeros(n, dtype=torch.bool)
    only[[7, 1]] = True
    found = pg.generate(picture(0), ["a", "b"], max_new_tokens=6, constraint=[lambda tokens: only, None])
    assert set(found[0].tokens) <= {7, 1}
    assert not set(found[1].tokens) <= {7, 1}
    banned = found[1].tokens[0]
    assert banned not in pg.generate(picture(0), ["b"], max_new_tokens=6, forbidden=[banned])[0].tokens


def test_masks_of_forbidden_tokens_per_prompt_are_cut_into_chunks_and_may_be_arrays(pg: PaliGemma):
    prompts = ["a", "b", "c"]
    free = pg.generate(picture(0), prompts, max_new_tokens=4)
    masks = torch.zeros(3, pg.config.text.vocab_size, dtype=torch.bool)
    masks[2, list(free[2].tokens)] = True
    for forbidden in (masks, masks.numpy()):
        found = pg.generate(picture(0), prompts, max_new_tokens=4, forbidden=forbidden, batch_size=2)
        assert [one.tokens for one in found[:2]] == [one.tokens for one in free[:2]]
        assert not set(found[2].tokens) & set(free[2].tokens)
    for forbidden in (masks[2].numpy(), masks[2].tolist(), masks[2].nonzero()[:, 0]):
        (alone,) = pg.generate(picture(0), ["c"], max_new_tokens=4, forbidden=forbidden)
        assert alone.tokens == found[2].tokens


def test_a_picture_that_all_prompts_are_about_passes_the_tower_once(pg: PaliGemma):
    seen = []
    hook = pg.model.vision.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    found = pg.generate(picture(0), ["a", "b", "c"], max_new_tokens=4, batch_size=1)
    hook.remove()
    assert seen == [1]
    assert [one.tokens for one in found] == [
        pg.generate(picture(0), prompt, max_new_tokens=4)[0].tokens for prompt in "abc"
    ]


def test_choices_may_come_from_a_generator_for_a_whole_batch(pg: PaliGemma):
    images = [picture(0), picture(1)]
    once = pg.batch("answer", images, ["a", "b"], choices=(text for text in ("x", "y")), batch_size=1)
    again = pg.batch("answer", images, ["a", "b"], choices=["x", "y"], batch_size=1)
    assert [one.text for one in once] == [one.text for one in again]


def test_a_region_is_captioned_by_its_location_tokens(pg: PaliGemma):
    image, box = picture(1), (3.0, 5.0, 40.0, 30.0)
    prompt = TASKS["grounded_caption"].prefix(box, image.shape[:2])
    assert "<loc" in prompt
    expected = pg.generate(image, prompt, allow_special=True, max_new_tokens=30)[0]
    assert pg.caption(image, box=box, max_new_tokens=30).raw == expected.text
    with pytest.raises(TaskError):
        pg.caption(image, box=(40, 5, 3, 30))
    with pytest.raises(OptionError, match="no language"):
        pg.caption(image, "de", box)


def test_an_answer_that_was_cut_is_told_among_the_problems(pg: PaliGemma):
    for ask in (
        lambda n: pg.detect(picture(0), "cat", max_new_tokens=n),
        lambda n: pg.read(picture(3), max_new_tokens=n),
    ):
        cut = ask(2)
        assert any("max_new_tokens" in problem for problem in cut.problems)
    whole = next(d for i in range(5) if len((d := pg.detect(picture(i), "cat")).raw) < 2000 and not _is_cut(d))
    assert not _is_cut(whole)


def _is_cut(result: Any) -> bool:
    return any("max_new_tokens" in problem for problem in result.problems)


def test_min_score_leaves_out_the_less_sure_and_keeps_the_raw_text(pg: PaliGemma):
    image, labels = pg.encode_image(picture(2)), [f"thing {letter}" for letter in "abcdefghijkl"]
    found = dict(zip(labels, pg.batch("detect", [image] * 12, labels, max_new_tokens=200), strict=True))
    label, every = next((label, f) for label, f in found.items() if len({d.score for d in f}) >= 2)
    limit = sorted({d.score for d in every})[1]
    kept = pg.detect(image, label, min_score=limit - 1e-6, max_new_tokens=200)
    assert [d.score for d in kept] == pytest.approx([d.score for d in every if d.score >= limit - 1e-6], abs=1e-4)
    assert len(kept) < len(every)
    assert kept.raw == every.raw


def test_verbs_use_no_gradients_and_leave_the_model_trainable(pg: PaliGemma):
    handle = pg.encode_image(picture(0))
    assert not handle.image_embeds.requires_grad
    assert all(parameter.requires_grad for parameter in pg.model.parameters())
    batch = pg.processor([[handle]], ["caption en"], ["a"])
    pg.model(**batch.model_inputs()).sum().backward()
    assert pg.model.text.embedding.weight.grad is not None
    pg.model.zero_grad(set_to_none=True)


def test_no_examples_have_no_answers(pg: PaliGemma):
    assert pg.batch("detect", [], []) == []
    assert pg.generate([], []) == []
    assert pg.score(picture(0), "caption en", []).shape == (0,)


REFUSALS: dict[str, tuple[Callable[[PaliGemma], Any], type[Exception], str]] = {
    "verb": (lambda pg: pg.batch("detct", [picture(0)], ["a"]), OptionError, "Did you mean 'detect'"),
    "counts": (lambda pg: pg.batch("detect", [picture(0)], ["a", "b"]), OptionError, "2 args for 1 images"),
    "not a list": (lambda pg: pg.batch("detect", picture(0), ["a"]), OptionError, "expected a list"),
    "batch size": (lambda pg: pg.batch("read", [picture(0)], batch_size=0), OptionError, "batch_size=0"),
    "images per prompt": (lambda pg: pg.generate([picture(0)], ["a", "b"]), OptionError, "1 images for 2 prompts"),
    "sizes": (lambda pg: pg.detect([picture(0), picture(1)], "a"), OptionError, "64×30, 59×37"),
    "no labels": (lambda pg: pg.detect(picture(0), []), TaskError, "no thing to look for"),
    "bad label": (lambda pg: pg.detect(picture(0), ["<loc0001>"]), TaskError, "holds '<'"),
    "no choices": (lambda pg: pg.answer(picture(0), "q", choices=[]), OptionError, "choices is empty"),
    "same choice": (lambda pg: pg.answer(picture(0), "q", choices=["a", "a"]), OptionError, "'a' more than once"),
    "empty question": (lambda pg: pg.answer(picture(0), " "), TaskError, "question"),
    "language": (lambda pg: pg.caption(picture(0), ""), TaskError, "language code"),
    "min score": (lambda pg: pg.detect(picture(0), "a", min_score=2), OptionError, "min_score=2"),
    "beams and samples": (
        lambda pg: pg.generate(picture(0), "a", n_beams=2, sampling=Sampling()),
        OptionError,
        "Leave one of them out",
    ),
    "beams and best of": (lambda pg: pg.generate(picture(0), "a", n_beams=2, best_of=2), OptionError, "best_of=2"),
    "best of greedy": (lambda pg: pg.generate(picture(0), "a", best_of=2), OptionError, "Sampling"),
    "beam kind": (lambda pg: pg.generate(picture(0), "a", n_beams=2, beam="bw"), OptionError, "Did you mean 'bv'"),
    "one text": (lambda pg: pg.score(picture(0), "a", "cat"), OptionError, "expected a list of texts"),
    "nested": (lambda pg: pg.caption([[picture(0)]]), ImageError, "nested too deep"),
    "floats": (lambda pg: pg.caption(picture(0) / 255), ImageError, "uint8"),
    "control token": (lambda pg: pg.answer(picture(0), "what <eos> is?"), PromptError, "allow_special"),
    "control in a choice": (lambda pg: pg.answer(picture(0), "q", choices=["<bos>"]), PromptError, "<bos>"),
    "seeds": (lambda pg: pg.generate(None, ["a", "b"], sampling=Sampling(), seeds=[1]), OptionError, "1 seeds for 2"),
    "more seeds": (lambda pg: pg.generate(None, "a", sampling=Sampling(), seeds=[1, 2]), OptionError, "2 seeds for 1"),
    "beams and seeds": (lambda pg: pg.generate(None, "a", n_beams=2, seeds=[1]), OptionError, "draws nothing"),
    "masks per prompt": (
        lambda pg: pg.generate(None, ["a", "b"], forbidden=torch.zeros(1, 1664, dtype=torch.bool), batch_size=1),
        OptionError,
        "1 masks for 2 prompts",
    ),
    "missing argument": (lambda pg: pg.batch("detect", [picture(0)]), OptionError, "'labels'; expected labels"),
    "unknown option": (lambda pg: pg.batch("detect", [picture(0)], ["a"], lang="de"), OptionError, "'lang'; expected"),
    "argument too many": (lambda pg: pg.batch("read", [picture(0)], ["a"]), OptionError, "no argument beside"),
    "too long": (lambda pg: pg.answer(picture(0), "why " * 9000), PromptError, "expected at most 8192"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_call_that_cannot_be_right_is_refused_in_one_clear_line(pg: PaliGemma, case: str):
    call, error, text = REFUSALS[case]
    with pytest.raises(error, match=text) as refusal:
        call(pg)
    assert "\n" not in str(refusal.value)


def test_control_tokens_are_let_in_when_asked_for(pg: PaliGemma):
    asked = pg.answer(picture(0), "what <eos> is?", allow_special=True, max_new_tokens=8)
    raw = pg.generate(picture(0), "answer en what <eos> is?", allow_special=True, max_new_tokens=8)[0]
    assert asked.raw == raw.text


def test_a_handle_of_another_model_is_refused(pg: PaliGemma):
    handle = pg.encode_image(picture(0))
    other = paligemma.EncodedImage(handle.image_embeds[:, :4], handle.sizes_hw)
    with pytest.raises(ShapeError, match="another model"):
        pg.caption(other)
