"""Masks: how large each thing is, an overlay to look at, and one black-and-white PNG per mask."""

import sys
from importlib.resources import files
from pathlib import Path

import paligemma
from paligemma import draw


def main(folder: Path) -> None:
    pg = paligemma.load("tiny")
    image = str(files("paligemma") / "assets" / "example" / "shapes.png")
    things = pg.segment(image, ["red circle", "star"])
    for thing in things:
        print(f"{thing.label}: {thing.mask.mean():.1%} of the picture, score {thing.score:.2f}")
    for problem in things.problems:  # whatever the model wrote that is no segment
        print("not understood:", problem)
    for file in draw.save(folder, "shapes", image, things):
        print(file)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "masks"))
