"""Settings for rows of one's own, which hold a suffix: the reference's examples, and the simple setting."""

from paligemma.recipes.transfers.base import Columns, Row, Setting, Transfer, Turn, same, text
from paligemma.recipes.transfers.captions import CAPTION

SUFFIX: Columns = ("suffix",)

# What the reports search (PaliGemma, section 3.2.4 and appendix J), most important first.
SEARCH: dict[str, tuple[float, ...]] = {
    "resolution": (224, 448, 896),
    "epochs": (1, 3, 10, 30, 100),
    "lr": (3e-5, 1e-5, 3e-6),
    "label_smoothing": (0.0, 0.1, 0.3),
    "dropout": (0.0, 0.1, 0.3),
    "weight_decay_per_lr": (0.0, 0.1),
    "freeze_image": (False, True),
}
# PaliGemma 2, section 4.1.2: all else as above, only this is swept, at 224 px; larger models take less.
LR_SWEEP: tuple[float, ...] = (3e-7, 6e-7, 1e-6, 3e-6, 6e-6, 1e-5, 3e-5)


def as_given(row: Row, turn: Turn) -> tuple[str, list[str]]:
    """Row: {"suffix"}, and "prefix" where it shall be another than `caption en`."""
    prefix = text(row, ("prefix",), turn.where) if row.get("prefix") else CAPTION
    return prefix, [text(row, SUFFIX, turn.where)]


def in_small_letters(row: Row, turn: Turn) -> tuple[str, list[str]]:
    """As `as_given`; the notebook lower-cases by Python, letters of every alphabet."""
    prefix, found = as_given(row, turn)
    return prefix, [text.lower() for text in found]


def plain(row: Row, turn: Turn) -> tuple[str, list[str]]:
    """Row: {"prefix", "suffix"}."""
    return text(row, ("prefix",), turn.where), [text(row, SUFFIX, turn.where)]


TRANSFERS = {
    "simple": Transfer(
        name="simple", prompt="{prefix}", answer=SUFFIX, choose="only", build=plain, also=(("prefix",),),
        text_length=128, resize=None,
        settings=same(Setting(epochs=10, lr=1e-5), 224, 448, 896), metrics=("by prompt, as `paligemma eval`",),
        dflt="epochs to be swept: 1, 3, 10, 30, 100", source="PaliGemma report, section 6.2",
    ),
    "forkme": Transfer(
        name="forkme", prompt=CAPTION, answer=SUFFIX, choose="only", build=as_given, text_length=128,
        resize="bv_bilinear_aa", model="paligemma2-3b-pt", save_every=200,
        settings=same(Setting(epochs=15, lr=1e-5, weight_decay=3e-7, batch_size=32), 224),
        metrics=("stored predictions", "perplexity"),
    ),
    "vertexai_l4": Transfer(
        name="vertexai_l4", prompt=CAPTION, answer=SUFFIX, choose="only", build=as_given, text_length=128,
        resize="bv_bilinear_aa", kind="sgd", settings=same(Setting(epochs=1, lr=0.1, batch_size=4), 224),
        metrics=("stored predictions",),
    ),
    # The notebook keeps what is frozen, and the image tower's arithmetic, in float16; here all of it is float32.
    "notebook": Transfer(
        name="notebook", prompt=CAPTION, answer=SUFFIX, choose="only", build=in_small_letters, lower=True,
        text_length=128, resize="float_bilinear_aa", kind="sgd", warmup=0.1, clip_norm=None, trains="attention",
        settings=same(Setting(epochs=1, lr=0.03, batch_size=8, steps=64), 224),
        metrics=("stored predictions",), source="big_vision configs/proj/paligemma/finetune_paligemma.ipynb",
    ),
}  # fmt: skip
