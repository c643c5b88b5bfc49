"""Several adapters beside one base, one chosen per request.

The choice stands in a context variable (`models/lora.py`), so that requests of other threads and tasks keep theirs.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

from paligemma.api.arguments import chunks
from paligemma.api.encoded import EncodedImage
from paligemma.checkpoints.hub import PUBLIC_NAMES
from paligemma.checkpoints.lora import Adapter, read_adapter
from paligemma.checkpoints.lora_write import load_adapter
from paligemma.config import PaliGemmaConfig
from paligemma.errors import CheckpointError, OptionError, nearest
from paligemma.models.lora import adapters_of, check_name, choosing, chosen_adapter, drop_lora
from paligemma.models.paligemma import PaliGemmaModel

# One name for all examples, or one (or None) for each. None leaves the model as it stands: the base, with whatever was
# merged into it.
Chosen = str | None | Sequence[str | None]
Step = TypeVar("Step")
Result = TypeVar("Result")
_END = object()


class Adapters:
    """Who stands beside a base: added and taken off by name, safe to use from several threads."""

    def __init__(self, model: PaliGemmaModel) -> None:
        self._model = model
        self._sees_pictures: dict[str, bool] = {}  # name -> whether it changes the image tower or the projector
        self._changing = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sees_pictures)

    def add(self, name: str, adapter: Adapter) -> None:
        """Hang an adapter beside the others.

        Raises:
            OptionError: the name is taken, or cannot be one.
            CheckpointError: it changes more than linear layers.
        """
        check_name(name)
        with self._changing:
            if name in adapters_of(self._model):
                raise OptionError(
                    f"there is an adapter {name!r} already: expected another name, or remove_adapter first."
                )
            load_adapter(self._model, adapter, name=name, make_active=False)
            for layer in adapters_of(self._model)[name].values():
                layer.requires_grad_(False)  # whatever else is being trained here
            self._sees_pictures[name] = _sees_pictures(adapter.deltas)

    def remove(self, name: str) -> None:
        """Take one off and give its memory back.

        Raises:
            OptionError: there is none of that name.
        """
        with self._changing:
            drop_lora(self._model, name)
            self._sees_pictures.pop(name, None)

    def choose(self, name: str | None) -> AbstractContextManager[None]:
        """Answer with this adapter inside the block; None changes nothing.

        Raises:
            OptionError: there is none of that name.
        """
        if name is None:
            return nullcontext()
        if name not in self._sees_pictures and not self._is_trained(name):
            have = ", ".join(self.names) or "one that was added with add_adapter"
            raise OptionError(f"there is no adapter {name!r}: expected {have}.{nearest(name, self.names)}")
        return choosing(name)

    def _is_trained(self, name: str) -> bool:
        """Whether the model has an adapter that was not added here, and to remember it if so."""
        trained = adapters_of(self._model).get(name)
        if trained is not None:
            self._sees_pictures[name] = _sees_pictures(trained)
        return trained is not None

    def each(
        self, chosen: Chosen, n: int, batch_size: int, answer: Callable[[Sequence[int]], Sequence[Result]]
    ) -> list[Result]:
        """Results of n examples in their order; those with one adapter are answered together.

        Args:
            answer: the numbers of at most `batch_size` examples -> their results.

        Raises:
            OptionError: another number of names than of examples, or a name that is not there.
        """
        names = [chosen] * n if chosen is None or isinstance(chosen, str) else list(chosen)
        if len(names) != n:
            raise OptionError(
                f"{len(names)} adapters for {n} examples: expected one (or None) for each, or one for all."
            )
        groups: dict[str | None, list[int]] = {}
        for i, name in enumerate(names):
            groups.setdefault(name, []).append(i)
        choices = {name: self.choose(name) for name in groups}  # an unknown one is refused before any work
        results: dict[int, Result] = {}
        for name, rows in groups.items():
            with choices[name]:
                for chunk in chunks(len(rows), batch_size):
                    some = [rows[i] for i in chunk]
                    results.update(zip(some, answer(some), strict=True))
        return [results[i] for i in range(n)]

    def along(self, name: str | None, steps: Iterator[Step]) -> Iterator[Step]:
        """An iterator whose every step runs under an adapter, or under what is chosen now; between steps nothing is.

        A block around a generator's loop would leave the choice standing in whoever takes its values.
        """
        name = chosen_adapter() if name is None else name
        return steps if name is None else self._along(name, steps)

    def _along(self, name: str, steps: Iterator[Step]) -> Iterator[Step]:
        while True:
            with choosing(name):
                step = next(steps, _END)
            if step is _END:
                return
            yield step  # type: ignore[misc]

    def of_pictures(self) -> str | None:
        """The adapter chosen here if image tokens depend on it, else None: it then is nobody's matter."""
        name = chosen_adapter()
        if not name or not (name in self._sees_pictures or self._is_trained(name)):
            return None
        return name if self._sees_pictures[name] else None

    def check_handle(self, handle: EncodedImage) -> None:
        """That an encoded picture is what the model as chosen here would see.

        Raises:
            OptionError: it came through the image tower of another adapter.
        """
        wanted = self.of_pictures()
        if handle.n_images and handle.adapter != wanted:
            raise OptionError(
                f"the picture was encoded under {_told(handle.adapter)}, and {_told(wanted)} sees pictures otherwise: "
                f"expected a handle of its own. Encode it again with encode_image(..., adapter={wanted!r})."
            )


def open_adapter(folder: str | Path, config: PaliGemmaConfig, *, strict: bool = True) -> Adapter:
    """Read a PEFT folder and refuse that of another base.

    Raises:
        CheckpointError: shapes that do not fit, or other published weights it was trained on.
    """
    adapter = read_adapter(folder, config, strict=strict)
    require_base(adapter, config.name, strict=strict)
    return adapter


def require_base(adapter: Adapter, model_name: str, *, strict: bool = True) -> None:
    """That an adapter says it was trained on these weights; only published names can be compared, not paths.

    Raises:
        CheckpointError: it was trained on other published weights; with strict=False that is a warning.
    """
    theirs, ours = _published(adapter.base), _published(model_name)
    if theirs is None or ours is None or theirs == ours:
        return
    text = f"{adapter.path}: trained on {theirs}, but the model is {ours}: expected an adapter of these weights"
    if strict:
        raise CheckpointError(f"{text}. Load {theirs}, or take it all the same with strict=False.")
    warnings.warn(f"{text}.", stacklevel=3)


def _sees_pictures(paths: Iterable[str]) -> bool:
    """Whether any of these layers is one that pictures pass."""
    return any(not path.startswith("text.") for path in paths)


def _published(name: str) -> str | None:
    short = name.split("@")[0].removeprefix("google/")
    return f"google/{short}" if short in PUBLIC_NAMES else None


def _told(name: str | None) -> str:
    return "the base" if name is None else f"adapter {name!r}"
