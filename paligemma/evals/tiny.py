"""`paligemma eval tiny`: a model on the held-out pictures of the world that the embedded model was taught.

Two fixed sets of 1,000 pictures that no training seed can reach: *plain* (1-3 solid shapes on one colour) and *full*
(up to six shapes and texts, textured, overlapping, on patterned backgrounds). Every picture has fixed questions
(`paligemma.data.world.exam`).

With `unseen`, the full pictures are drawn three times more, each time with one thing exchanged for what training never
showed: fonts, outlines of shapes, backgrounds (`paligemma.data.world.unseen`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from tqdm import tqdm

from paligemma.data.world import ANSWER_KINDS, HELD_OUT, UNSEEN, Exam, Question, Unseen, World, exam
from paligemma.errors import OptionError
from paligemma.evals.world_scores import Reply, Tally, WorldScores

# Longest replies in tokens: twice what the true answers need, so that a model that rambles does not hold up the rest.
MAX_NEW_TOKENS = {"detect": 128, "segment": 320, "answer": 24, "caption": 128, "read": 64}


class Model(Protocol):
    """What is asked of a model here; `paligemma.load` gives one."""

    def encode_image(self, image: Any) -> Any: ...

    def batch(self, verb: str, images: Any, args: Any = None, **options: Any) -> list[Any]: ...


@dataclass(frozen=True)
class TinyReport:
    """Scores by set of pictures: plain, full, and where asked for shapes, backgrounds, texts and fonts.

    `shapes`, `backgrounds` and `fonts` are the full pictures with that exchanged; those of `fonts` are the ones with
    text, whose scores as they were are under `texts`.
    """

    worlds: dict[str, WorldScores]

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON types, by set."""
        return {world: scores.to_dict() for world, scores in self.worlds.items()}

    def table(self) -> str:
        """The scores as a plain text table, one column per set; `-` where nothing was asked."""
        columns = list(self.worlds.values())
        rows: list[tuple[str, list[float | None]]] = [
            ("AP", [c.ap for c in columns]),
            ("AP50", [c.ap50 for c in columns]),
            ("mask IoU (missed = 0)", [c.mask_iou for c in columns]),
            ("answers", [c.answers for c in columns]),
            *((f"  {_KIND_TITLES[kind]}", [c.answers_by_kind.get(kind) for c in columns]) for kind in ANSWER_KINDS),
            ("caption facts, precision", [c.caption_precision for c in columns]),
            ("caption facts, recall", [c.caption_recall for c in columns]),
            ("ocr, words", [c.ocr_words for c in columns]),
        ]
        wide = max([9, *(2 + len(world) for world in self.worlds)])
        lines = [f"{'held-out pictures':<32}" + "".join(f"{world:>{wide}}" for world in self.worlds)]
        if "texts" in self.worlds:
            above = {"full": "seen", "shapes": "unseen", "backgrounds": "unseen", "texts": "seen", "fonts": "unseen"}
            lines.insert(0, " " * 32 + "".join(f"{above.get(world, ''):>{wide}}" for world in self.worlds))
        lines += [f"{title:<32}" + "".join(f"{_cell(value):>{wide}}" for value in values) for title, values in rows]
        lines.append(f"{'pictures':<32}" + "".join(f"{c.n_pictures:>{wide},}" for c in columns))
        return "\n".join(lines)


_KIND_TITLES = {
    "count": "how many {thing}?",
    "colour": "what colour is the {shape}?",
    "there": "is there a {thing}?",
    "present": "Is {thing} in the image?",
    "left": "what is left of the {thing}?",
}


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def evaluate(
    model: Model,
    *,
    limit: int | None = None,
    worlds: Sequence[World] = ("plain", "full"),
    unseen: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> TinyReport:
    """Ask a model about the held-out pictures and score its replies.

    Args:
        model: what `paligemma.load` returns.
        limit: score only the first so many pictures of each set; None scores all 1,000.
        worlds: which sets.
        unseen: score the full pictures, asked for or not, also in shapes, on backgrounds and in fonts that training
            never showed.
        batch_size: pictures per batch; the scores do not depend on it.
        progress: draw a bar on stderr.

    Raises:
        OptionError: a limit or batch size below 1, or a set that does not exist.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise OptionError(f"{name}={value}: expected at least 1.")
    for world in worlds:
        if world not in HELD_OUT:
            raise OptionError(f"the set {world!r} does not exist: one of {', '.join(HELD_OUT)}.")
    worlds = [*worlds, *(("full",) if unseen and "full" not in worlds else ())]
    sets: list[tuple[str, World, Unseen | None]] = [(world, world, None) for world in worlds]
    sets += [(what, "full", what) for what in UNSEEN] if unseen else []
    report: dict[str, WorldScores] = {}
    for name, world, what in sets:
        seeds = HELD_OUT[world][:limit]
        tally, texts = Tally(), Tally()
        with tqdm(total=len(seeds), desc=f"eval tiny, {name}", unit=" pictures", disable=not progress) as bar:
            for chunk in _chunks(seeds, batch_size):
                exams = [
                    one for one in (exam(world, seed, what) for seed in chunk) if what != "fonts" or one.scene.texts
                ]
                for one, replies in zip(exams, ask(model, exams, batch_size=batch_size), strict=True):
                    tally.add(one, replies)
                    if unseen and what is None and world == "full" and one.scene.texts:
                        texts.add(one, replies)
                bar.update(len(chunk))
        report[name] = tally.scores()
        if unseen and name == "full":
            report["texts"] = texts.scores()
    order = [*worlds, *(("shapes", "backgrounds", "texts", "fonts") if unseen else ())]
    return TinyReport({name: report[name] for name in order if name in report})


def ask(model: Model, exams: Sequence[Exam], *, batch_size: int) -> list[list[Reply]]:
    """The model's replies, one per question of each exam; every picture is encoded once."""
    handles = [model.encode_image(one.drawn.image) for one in exams]
    replies: list[dict[int, Reply]] = [{} for _ in exams]
    by_verb: dict[str, list[tuple[int, int, Question]]] = {}
    for e, one in enumerate(exams):
        for q, question in enumerate(one.questions):
            by_verb.setdefault(_verb(question), []).append((e, q, question))
    for verb, asked in by_verb.items():
        images, args = [handles[e] for e, _, _ in asked], [_argument(question) for _, _, question in asked]
        options = {"batch_size": batch_size, "max_new_tokens": MAX_NEW_TOKENS[verb]}
        results = model.batch(verb, images, **options) if verb == "read" else model.batch(verb, images, args, **options)
        for (e, q, question), result in zip(asked, results, strict=True):
            replies[e][q] = result.text if question.task == "text" else result
    return [[by_question[q] for q in sorted(by_question)] for by_question in replies]


def _verb(question: Question) -> str:
    if question.task != "text":
        return question.task
    return {"caption": "caption", "ocr": "read"}.get(question.kind, "answer")


def _argument(question: Question) -> Any:
    if question.task != "text":
        return question.labels
    return "en" if question.kind == "caption" else question.prefix.removeprefix("answer en ")


def _chunks(items: Iterable[int], size: int) -> Iterator[list[int]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
