"""From what a user names to examples: any format, annotations through a builder, several sources as a mixture.

open_rows("digits/")                          JSONL, Parquet, tars: prompts as they are
open_rows("animals-coco/", task="detect")     annotations: prompts by a builder
open_rows("mixture.yaml")                     several of them (mixing.py)
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from paligemma.data.augment import Augmented, AugmentOptions, augment
from paligemma.data.builders import BUILDERS, Builder, Built, OneOf, builder_of
from paligemma.data.mixing import is_mixture, read_mixture
from paligemma.data.record import Record
from paligemma.data.sources.open import open_data
from paligemma.data.subset import Subset, held_out
from paligemma.errors import DataError, OptionError, PaliGemmaError
from paligemma.processing.image import load_image
from paligemma.tasks.base import MaskDecoder, MaskEncoder
from paligemma.tasks.grammar import N_SEG


def open_rows(
    data: str | Path,
    *,
    task: str | None = None,
    task_fields: Sequence[tuple[str, Any]] = (),
    augmentation: AugmentOptions | None = None,
    mask_encoder: MaskEncoder | None = None,
    mask_decoder: MaskDecoder | None = None,
    load: Callable[..., Any] = load_image,
    text_length: Callable[[str], int] | None = None,
    max_text: int | None = None,
    valid_share: float = 0.0,
    shuffle: bool = True,
    seed: int = 0,
    reweight: Sequence[tuple[str, float]] = (),
    keep_all: bool = False,
    failed: dict[str, DataError] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The splits of a data set, as sources of examples.

    Every training row comes up in every epoch: one that a builder has nothing to ask about gives its place to the next
    that it has. Of other splits such rows are left out.

    Args:
        data: folder, file or pattern of any format, or the YAML file of a mixture.
        task: builder of prompts, or several joined by commas; needed for annotations, refused for prompts.
        task_fields: (name, value) pairs, fields of the builder.
        augmentation: of the train split; None or all zeros changes nothing.
        mask_encoder: 64 x 64 maps -> codes, for tasks with masks; mask_decoder: the way back, to move masks that are
            already codes.
        load: opens the pictures that are augmented, as the model's processor does.
        text_length: tokens of a text, for builders that drop words until a text fits into `max_text` tokens, bos to
            eos, so that the end is not what is always cut.
        valid_share: of the training pictures kept apart as the split "held", where there is no valid or test split.
        shuffle: of a mixture, the rows of every source; False keeps them in their order.
        seed: of everything random in builders and augmentation.
        reweight: of a mixture, (task, factor) pairs: sources of that task or name are drawn so much more often.
        failed: takes splits that cannot be opened, as in `open_data`; of a mixture one is an error.
        keep_all: rows that a builder has nothing to ask about stay in other splits too, for somebody who looks at all.
        options: those of `open_data`: format, allow_outside, images, columns, …

    Raises:
        DataError, OptionError: nothing there that can be read, or options that do not fit it.
    """
    asked: dict[str, Any] = {
        "task": task, "task_fields": task_fields, "augmentation": augmentation, "mask_encoder": mask_encoder,
        "mask_decoder": mask_decoder, "load": load, "text_length": text_length,
        "max_text": max_text, "seed": seed, "keep_all": keep_all,
    }  # fmt: skip
    if is_mixture(data):
        given = {**options, **asked, "shuffle": shuffle}
        return read_mixture(
            data, lambda **own: open_rows(**{**given, **own}), seed=seed, shuffle=shuffle, reweight=reweight, task=task
        )
    found = open_data(data, failed=failed, **options)
    if valid_share and "train" in found and not {"valid", "test"} & set(found):
        train, held, _ = held_out(found["train"], valid_share)
        if len(held):
            found = {"train": train, "held": held}
    # A class of one split alone is a class of all: prompts of every split speak of the same ones.
    annotated = [source for source in found.values() if is_annotated(source)]
    labels = None
    if task is not None and len(annotated) > 1:
        builders_of(task, dict(task_fields))  # what is wrong with it is said before every file is read for its labels
        labels = tuple(dict.fromkeys(name for one in annotated for name in one.labels))
    return {
        split: _prompted(source, split == "train", str(data), labels=labels, **asked) for split, source in found.items()
    }


def is_annotated(source: Any) -> bool:
    """Whether a source holds records, of which a builder makes examples."""
    return hasattr(source, "labels") and not isinstance(source, Built)


def _prompted(
    source: Any,
    is_train: bool,
    name: str,
    *,
    task: str | None,
    task_fields: Any,
    augmentation: AugmentOptions | None,
    mask_encoder: MaskEncoder | None,
    mask_decoder: MaskDecoder | None,
    load: Callable[..., Any],
    text_length: Callable[[str], int] | None,
    max_text: int | None,
    seed: int,
    keep_all: bool,
    labels: tuple[str, ...] | None,
) -> Any:
    wanted = augmentation if is_train and augmentation is not None and augmentation.is_on else None
    if not is_annotated(source):
        if task is not None:
            raise OptionError(f"{name} holds prompts already: expected no task. Leave --task {task} out.")
        if wanted is None:
            return source
        return Augmented(source, wanted, seed=seed, load=load, mask_encoder=mask_encoder, mask_decoder=mask_decoder)
    if task is None:
        raise DataError(
            f"{name} holds annotations and no prompts: expected a task, one of {', '.join(BUILDERS)}. For boxes: "
            "--task detect."
        )
    budget = None if max_text is None else max(1, max_text - _FRAME)
    builder = builders_of(task, dict(task_fields), mask_encoder, text_length, budget)
    only_things = all(word.strip() in OF_THINGS for word in task.split(","))
    change = None if wanted is None else partial(_augmented, options=wanted, load=load, only_things=only_things)
    if not is_train and not keep_all:
        asking = builders_of(task, dict(task_fields), no_codes, text_length, budget)
        source = Subset(source, _askable(Built(source, asking, seed=seed, labels=labels)))
    return Built(source, builder, seed=seed, augment=change, skip_empty=is_train, labels=labels)


# Prompts that are about instances alone: what captions and questions say of left and right does not bind them.
OF_THINGS = ("detect", "detect_noise", "segment", "list_objects", "presence", "multi_presence", "count")


def _augmented(
    record: Record, rng: np.random.Generator, *, options: AugmentOptions, load: Callable[..., Any], only_things: bool
) -> Record:
    if only_things:
        record = dataclasses.replace(record, texts=(), questions=())
    return augment(record, rng, options, load=load)


def _askable(built: Built) -> Iterator[int]:
    """Rows that a builder has something to ask about; one that cannot be read stays, so that it is told of."""
    for index in range(len(built)):
        try:
            if built.applies(index):
                yield index
        except PaliGemmaError:
            yield index


_FRAME = 8  # tokens of a row beside the words of an `ocr` answer: bos, prompt, separator, eos


def no_codes(crops: Any) -> Any:
    """Codes for the question whether there is something to encode at all."""
    return np.zeros((len(crops), N_SEG), np.int64)


def builders_of(
    task: str,
    fields: Mapping[str, Any],
    mask_encoder: MaskEncoder | None = None,
    text_length: Callable[[str], int] | None = None,
    max_length: int | None = None,
) -> Builder | OneOf:
    """The builder of a task, or one that draws from several, joined by commas; fields are those of each that has them.

    Raises:
        OptionError: no such builder, or a field that none of them has.
    """
    words = [word.strip() for word in task.split(",")]
    known = {word: {field.name for field in dataclasses.fields(cast(Any, builder_of(word)))} for word in words}
    for name in fields:
        if not any(name in names for names in known.values()):
            builder_of(words[0], **{name: fields[name]})  # says what is wrong with it
    made = []
    for word in words:
        own = {name: value for name, value in fields.items() if name in known[word]}
        if mask_encoder is not None and "mask_encoder" in known[word]:
            own.setdefault("mask_encoder", mask_encoder)
        if text_length is not None and "length" in known[word] and "max_length" not in own:
            own.setdefault("length", text_length)
            own["max_length"] = max_length
        made.append(builder_of(word, **own))
    return made[0] if len(made) == 1 else OneOf(tuple(made))
