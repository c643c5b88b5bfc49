"""Lists in every shape that callers may hand over → one entry per example, or a refusal that says what was expected."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

from paligemma.api.encoded import Pictures
from paligemma.errors import ImageError, OptionError


def pictures_of(example: Pictures) -> list[Any]:
    """One example's pictures as a list: a single picture is a list of one, None is text alone."""
    if example is None:
        return []
    if is_several(example):
        flat = list(example)
        if any(is_several(item) for item in flat):
            raise ImageError(
                "pictures are nested too deep: expected one picture or a flat list of pictures per example."
            )
        return flat
    return [example]


def is_several(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list of pictures rather than one picture."""
    return isinstance(value, list | tuple)


def list_of(values: Any, name: str) -> list[Any]:
    if not isinstance(values, list | tuple):
        kind = type(values).__name__
        raise OptionError(f"{name} is a {kind}: expected a list with one entry per example. Write [{name}].")
    return list(values)


def per_prompt(images: Pictures, prompts: Sequence[str], *, is_single: bool) -> list[Any]:
    """The pictures of each prompt: see `PaliGemma.generate`."""
    if is_single:
        return [images]
    if not is_several(images):
        return [images] * len(prompts)
    if len(images) != len(prompts):
        raise OptionError(
            f"{len(images)} images for {len(prompts)} prompts: expected one entry per prompt (a picture, a list of "
            "pictures, or None), or a single picture for all."
        )
    return list(images)


def per_prompt_rules(constraint: Any, n: int) -> list[Any]:
    if constraint is None or callable(constraint):
        return [constraint] * n
    if len(constraint) != n:
        raise OptionError(f"{len(constraint)} constraints for {n} prompts: expected one for each, or one for all.")
    return list(constraint)


def per_prompt_seeds(seeds: Sequence[int] | None, n: int) -> list[int] | None:
    if seeds is not None and len(seeds) != n:
        raise OptionError(f"{len(seeds)} seeds for {n} prompts: expected one for each, or None.")
    return None if seeds is None else list(seeds)


def forbidden_of(forbidden: Any, n: int, some: Sequence[int]) -> Any:
    """What is forbidden to some of n prompts: their rows of bool[n, V], or what holds for all."""
    if getattr(forbidden, "ndim", 1) != 2:
        return forbidden
    if len(forbidden) != n:
        raise OptionError(f"forbidden has {len(forbidden)} masks for {n} prompts: expected one for each, or bool[V].")
    return forbidden[list(some)]


def chunks(n: int, size: int) -> Iterator[range]:
    if size < 1:
        raise OptionError(f"batch_size={size}: expected 1 or more.")
    return (range(start, min(start + size, n)) for start in range(0, n, size))
