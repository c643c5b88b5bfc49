"""From what a user names to examples: any format, annotations through a builder, several sources as a mixture.

open_rows("digits/")                          JSONL, Parquet, tars: prompts as they are
open_rows("animals-coco/", task="detect")     annotations: prompts by a builder
open_rows("mixture.yaml")                     several of them (mixing.py)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from paligemma.data.augment import Augmented, AugmentOptions, augment
from paligemma.data.builders import BUILDERS, Builder, Built, OneOf, builder_of
from paligemma.data.mixing import is_mixture, read_mixture
from paligemma.data.sources.open import open_data
from paligemma.errors import DataError, OptionError
from paligemma.processing.image import load_image
from paligemma.tasks.base import MaskDecoder, MaskEncoder


def open_rows(
    data: str | Path,
    *,
    task: str | None = None,
    task_fields: Sequence[tuple[str, Any]] = (),
    augmentation: AugmentOptions | None = None,
    mask_encoder: MaskEncoder | None = None,
    mask_decoder: MaskDecoder | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """The splits of a data set, as sources of examples.

    Args:
        data: folder, file or pattern of any format, or the YAML file of a mixture.
        task: builder of prompts, or several joined by commas; needed for annotations, refused for prompts.
        task_fields: (name, value) pairs, fields of the builder.
        augmentation: of the train split; None or all zeros changes nothing.
        mask_encoder: 64 x 64 maps -> codes, for tasks with masks; mask_decoder: the way back, to move masks that are
            already codes.
        seed: of everything random in builders and augmentation.
        options: those of `open_data`: format, allow_outside, images, columns, …

    Raises:
        DataError, OptionError: nothing there that can be read, or options that do not fit it.
    """
    asked: dict[str, Any] = {
        "task": task, "task_fields": task_fields, "augmentation": augmentation, "mask_encoder": mask_encoder,
        "mask_decoder": mask_decoder, "seed": seed,
    }  # fmt: skip
    if is_mixture(data):
        given = {**options, **asked}
        return read_mixture(data, lambda **own: open_rows(**{**given, **own}), seed=seed)
    found = open_data(data, **options)
    return {split: _prompted(source, split == "train", str(data), **asked) for split, source in found.items()}


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
    seed: int,
) -> Any:
    wanted = augmentation if is_train and augmentation is not None and augmentation.is_on else None
    if not is_annotated(source):
        if task is not None:
            raise OptionError(f"{name} holds prompts already: expected no task. Leave --task {task} out.")
        if wanted is None:
            return source
        return Augmented(source, wanted, seed=seed, mask_encoder=mask_encoder, mask_decoder=mask_decoder)
    if task is None:
        raise DataError(
            f"{name} holds annotations and no prompts: expected a task, one of {', '.join(BUILDERS)}. For boxes: "
            "--task detect."
        )
    builder = builders_of(task, dict(task_fields), mask_encoder)
    change = None if wanted is None else partial(augment, options=wanted, load=load_image)
    return Built(source, builder, seed=seed, augment=change, skip_empty=True)


def builders_of(task: str, fields: Mapping[str, Any], mask_encoder: MaskEncoder | None = None) -> Builder | OneOf:
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
        made.append(builder_of(word, **own))
    return made[0] if len(made) == 1 else OneOf(tuple(made))
