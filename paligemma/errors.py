"""Every error that a user can cause, in one tree.

PaliGemmaError
├── ConfigError           a configuration that contradicts itself or its weights
├── CheckpointError       a file or folder of weights that cannot be read, written or trusted
│   ├── PickleRefused     a pickle where safetensors or npz is expected: never opened
│   └── HubError          a repository that cannot be reached or needs a licence accepted
├── TokenizerError        a tokenizer that does not fit the model
├── ImageError            a picture that cannot be read
├── PromptError           a prompt that cannot be asked: control tokens, too long
├── DataError             examples that cannot be read or make no sense
├── TrainingError         a run that cannot go on: a loss that is no number, a checkpoint of another run
├── TaskError             a label, box or mask that a suffix cannot carry
├── ShapeError            tensors that do not fit together
├── OptionError           an option, a name or a combination of options that does not exist
└── MissingExtra          an optional dependency that is not installed

A message reads: what was wrong: what was expected. How to fix it.
"""

import difflib
from collections.abc import Iterable


class PaliGemmaError(Exception):
    """Root of every error that a user can cause; the command line prints it as one line and exits with status 2."""


class ConfigError(PaliGemmaError, ValueError):
    """A configuration that contradicts itself or the weights beside it."""


class CheckpointError(PaliGemmaError):
    """Weights that cannot be read, written or trusted."""


class PickleRefused(CheckpointError):
    """A pickle was offered where safetensors or npz is expected; it was not opened."""


class HubError(CheckpointError):
    """A hub repository that cannot be reached, does not exist, or asks for a licence to be accepted."""


class TokenizerError(PaliGemmaError):
    """A tokenizer that cannot be read or does not fit the model's vocabulary."""


class ImageError(PaliGemmaError):
    """A picture that cannot be read or is refused."""


class PromptError(PaliGemmaError, ValueError):
    """A prompt that cannot be asked as it stands."""


class TaskError(PaliGemmaError, ValueError):
    """A label, box or mask that a suffix cannot carry."""


class DataError(PaliGemmaError, ValueError):
    """Examples that cannot be read, or that make no sense as they stand.

    Attributes:
        kind: what `paligemma data check` counts it as: "missing picture", "wrong column", …
    """

    def __init__(self, message: str, *, kind: str = "unreadable row") -> None:
        super().__init__(message)
        self.kind = kind


class TrainingError(PaliGemmaError, RuntimeError):
    """A training run that cannot start or go on as it was asked for."""


class ShapeError(PaliGemmaError, ValueError):
    """Tensors that do not fit together."""


class OptionError(PaliGemmaError, ValueError):
    """An option, a name or a combination of options that does not exist."""


class MissingExtra(PaliGemmaError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{module}': it is not installed. pip install 'paligemma[{extra}]'"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a typo: " Did you mean 'x'?" or the empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
