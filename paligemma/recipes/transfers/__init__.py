"""The published transfers: one recipe for each data set of the reports, prompts and numbers included.

    recipe("vqav2", data="vqav2/", resolution=448)     a `TransferRecipe`; recipes.transfer.run carries it out
    open_rows("vqav2", "vqav2/")                       what is learned, what is held out, where that comes from
    score("vqav2", predictions, rows)                  by the metric that is reported
    TRANSFERS["vqav2"]                                 prompt, columns, every number by resolution
    table()                                            all of them, as in the pages

base.py        what a transfer is
captions.py questions.py documents.py boxes.py video.py own.py     the transfers by kind
rows.py        JSONL rows with the data set's columns to examples
make.py        to a recipe
score.py table.py
"""

from paligemma.recipes.transfers.base import Setting, Transfer, Turn
from paligemma.recipes.transfers.make import recipe
from paligemma.recipes.transfers.own import LR_SWEEP, SEARCH
from paligemma.recipes.transfers.rows import TransferRows, asked_rows, open_rows, rows_of, transfer_of
from paligemma.recipes.transfers.score import score, score_report
from paligemma.recipes.transfers.table import TRANSFERS, table

__all__ = [
    "LR_SWEEP", "SEARCH", "TRANSFERS", "Setting", "Transfer", "TransferRows", "Turn", "asked_rows", "open_rows",
    "recipe", "rows_of", "score", "score_report", "table", "transfer_of",
]  # fmt: skip
