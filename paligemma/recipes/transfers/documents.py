"""Questions about charts, documents and texts in scenes."""

from paligemma.recipes.transfers.base import ANSWER, ANSWERS, Setting, Transfer, same
from paligemma.recipes.transfers.questions import AA, ASK, VQAV2

ANLS = "ANLS"


def _by_size(label_smoothing: float) -> dict[int, Setting]:
    """InfoVQA and ST-VQA: smaller batches of larger pictures."""
    return {
        224: Setting(epochs=3, lr=1e-5, weight_decay=1e-6, batch_size=256, label_smoothing=label_smoothing),
        448: Setting(epochs=3, lr=1e-5, weight_decay=1e-6, batch_size=128, label_smoothing=label_smoothing),
        896: Setting(epochs=3, lr=3e-6, weight_decay=3e-7, batch_size=32, label_smoothing=label_smoothing),
    }


TRANSFERS = {
    # Human and augmented questions are mixed 7,398 : 20,901, the numbers of their rows: one file with all of them.
    "chartqa": Transfer(
        name="chartqa", prompt="{question}", answer=ANSWER, choose="only", text_length=48, resize=AA,
        settings=same(Setting(epochs=30, lr=1e-5, weight_decay=1e-6, dropout=0.1, label_smoothing=0.2)),
        metrics=("relaxed accuracy, 5 %, lower-cased; mean of human and augmented",), sets=("human", "augmented"),
        final_split="train + val; human and augmented as often as they are, 7,398 : 20,901 in train", dflt="896 px",
    ),
    "ocrvqa": Transfer(
        name="ocrvqa", prompt=ASK, answer=ANSWER, choose="only", resize=AA,
        settings={
            224: Setting(epochs=3, lr=3e-6, batch_size=128),
            448: Setting(epochs=3, lr=3e-6, batch_size=128),
            896: Setting(epochs=3, lr=1e-5, batch_size=128),
        },
        metrics=("exact match, lower-cased",), final_split="train + val",
    ),
    "textvqa": Transfer(
        name="textvqa", prompt=ASK, answer=ANSWERS, resize=AA,
        settings={
            224: Setting(epochs=5, lr=3e-6),
            448: Setting(epochs=10, lr=3e-6, weight_decay=3e-7),
            896: Setting(epochs=10, lr=3e-6),
        },
        metrics=(VQAV2,), final_split="train + val",
    ),
    "docvqa": Transfer(
        name="docvqa", prompt="{question}", answer=ANSWERS, choose="random", resize=AA,
        settings=same(Setting(epochs=10, lr=1e-5, weight_decay=1e-6), 224, 448, 896),
        metrics=(f"{ANLS}, lower-cased",), final_split="train + val; while tuning, train without its last 5 %",
    ),
    "infovqa": Transfer(
        name="infovqa", prompt=ASK, answer=ANSWERS, lower=True, text_length=48, resize=AA, settings=_by_size(0.4),
        metrics=(ANLS,), final_split="train + val", dflt="lr 3e-6, wd 3e-7, 896 px",
    ),
    "stvqa": Transfer(
        name="stvqa", prompt=ASK, answer=ANSWERS, lower=True, text_length=48, resize=AA, settings=_by_size(0.1),
        metrics=(ANLS,), final_split="train + val", dflt="5 epochs, lr 3e-6, wd 3e-7, 896 px",
    ),
}  # fmt: skip
