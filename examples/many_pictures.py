"""Many pictures at once: batched answers equal the single ones, and SigLIP runs once per picture."""

import paligemma
from paligemma.data.world import render, sample_scene


def main() -> None:
    pg = paligemma.load("tiny")
    pictures = [render(sample_scene(seed, "plain", "held_out")).image for seed in range(1, 5)]
    handles = [pg.encode_image(picture) for picture in pictures]

    captions = pg.batch("caption", handles, batch_size=4)
    found = pg.batch("detect", handles, [["moon"], ["cross", "rectangle"], ["moon", "ring"], ["ring"]], batch_size=4)
    for caption, detections in zip(captions, found, strict=True):
        boxes = ", ".join(f"{d.label} at {tuple(round(v) for v in d.box_xyxy_px)}" for d in detections)
        print(f"{caption.text}: {boxes or 'nothing found'}")


if __name__ == "__main__":
    main()
