"""What a verb asks and how its answer is read: a prompt, a length, and a function from generated text to a result.

The table at the end is the whole list of verbs. Each maps (picture size, main argument, options) to a `Request`; the
formats themselves belong to `paligemma.tasks`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma.errors import OptionError
from paligemma.results import Generation
from paligemma.tasks import TASKS

SizeHw = tuple[int, int]
MaskDecoder = Callable[[NDArray[np.int64]], NDArray[np.float32]]

# Longest answers in tokens, end of sequence included. The models were trained on suffixes of up to 512 tokens; captions
# and answers of the transfers need 32-48, other languages spell a word in more pieces.
MAX_NEW_TOKENS = {"caption": 64, "answer": 48, "question": 48, "detect": 512, "segment": 512, "read": 512}


@dataclass(frozen=True)
class Request:
    """One prompt and the reading of its answer.

    Attributes:
        prefix: the prompt.
        read: generated text → result.
        choices: given answers to weigh by likelihood, in which case nothing is generated.
    """

    prefix: str
    read: Callable[[Generation], Any]
    choices: tuple[str, ...] = ()
