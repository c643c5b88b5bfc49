"""Captions of and questions about clips: frames with a fixed stride, one picture each, 224 px.

A row names a video file or a folder of frames, {"video": "a.mp4"}, or its frames, {"images": ["a-0.jpg", …]}, taken
with the stride already. The reference resizes frames without antialias and keeps fractions of grey levels; here they
are cut to whole levels, as pictures are, which moves a value by less than 1/255 of its range.
"""

from paligemma.recipes.transfers.base import ANSWER, CAPTIONS, Setting, Transfer, same
from paligemma.recipes.transfers.captions import CAPTION
from paligemma.recipes.transfers.questions import ASK

TRANSFERS = {
    "activitynet_cap": Transfer(
        name="activitynet_cap", prompt=CAPTION, answer=CAPTIONS, choose="random", n_frames=16, stride=30,
        text_length=64,
        settings=same(Setting(epochs=1, lr=1e-5, weight_decay=1e-6, batch_size=128, freeze_image=True), 224),
        metrics=("CIDEr",), dflt="3 epochs, lr 3e-6",
    ),
    "activitynet_qa": Transfer(
        name="activitynet_qa", prompt=ASK, answer=ANSWER, choose="only", n_frames=16, stride=70, text_length=64,
        settings=same(Setting(epochs=1, lr=1e-5, weight_decay=1e-6, batch_size=128), 224), metrics=("exact match",),
    ),
    "msrvtt_cap": Transfer(
        name="msrvtt_cap", prompt=CAPTION, answer=CAPTIONS, choose="random", n_frames=16, stride=9, text_length=32,
        settings=same(Setting(epochs=20, lr=1e-5, batch_size=128, freeze_image=True), 224), metrics=("CIDEr",),
        dflt="10 epochs, wd 1e-6",
    ),
    "msrvtt_qa": Transfer(
        name="msrvtt_qa", prompt=ASK, answer=ANSWER, choose="only", n_frames=16, stride=9, text_length=64,
        settings=same(Setting(epochs=1, lr=1e-5, batch_size=128, freeze_image=True), 224), metrics=("exact match",),
    ),
    # The report says 16 frames, the reference's file 8.
    "msvd_qa": Transfer(
        name="msvd_qa", prompt=ASK, answer=ANSWER, choose="only", n_frames=8, stride=26, text_length=64,
        settings=same(Setting(epochs=1, lr=3e-6, weight_decay=3e-7, batch_size=128), 224), metrics=("exact match",),
    ),
    "vatex_cap": Transfer(
        name="vatex_cap", prompt=CAPTION, answer=CAPTIONS, choose="random", n_frames=16, stride=7, text_length=64,
        settings=same(Setting(epochs=10, lr=3e-6, weight_decay=3e-7, batch_size=128), 224), metrics=("CIDEr",),
        dflt="3 epochs",
    ),
}  # fmt: skip
