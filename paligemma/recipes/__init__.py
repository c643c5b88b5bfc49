"""Whole runs as functions.

from paligemma.recipes.transfer import TransferRecipe, run
"""

from typing import TYPE_CHECKING

from paligemma.lazy import lazy

if TYPE_CHECKING:
    from paligemma.recipes import tiny, transfer

__all__ = ["tiny", "transfer"]

__getattr__, __dir__ = lazy(__name__, {name: f"{__name__}.{name}" for name in __all__})
