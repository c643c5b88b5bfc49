"""`make demo`: the embedded model looks at pictures that it was not trained on; its answers land in ./demo/ as PNGs.

The first picture comes with the package, the others are drawn from held-out seeds of the picture world.
"""

import sys
from importlib.resources import files
from pathlib import Path

from PIL import Image

import paligemma
from paligemma import draw
from paligemma.data.world import render, sample_scene


def world(seed: int) -> tuple[Image.Image, list[str]]:
    """A held-out picture and the colours and shapes in it."""
    scene = sample_scene(seed, "full", "held_out")
    labels = dict.fromkeys(f"{thing.colour} {thing.shape}" for thing in scene.things if thing.kind == "shape")
    return Image.fromarray(render(scene).image), list(labels)


def main(folder: Path) -> None:
    pg = paligemma.load("tiny")
    shapes = Image.open(str(files("paligemma") / "assets" / "example" / "shapes.png"))
    wanted = ["red circle", "blue square", "green triangle", "purple star", "orange heart"]
    (one, in_one), (two, in_two) = world(0), world(5)
    jobs = {
        "1-caption": (shapes, "caption en", pg.caption(shapes)),
        "2-ask": (shapes, "what is left of the star?", pg.answer(shapes, "what is left of the star?")),
        "3-detect": (shapes, f"detect {' ; '.join(wanted)}", pg.detect(shapes, wanted)),
        "4-segment": (shapes, f"segment {' ; '.join(wanted)}", pg.segment(shapes, wanted)),
        "5-read": (two, "ocr", pg.read(two)),
        "6-detect": (one, f"detect {' ; '.join(in_one)}", pg.detect(one, in_one)),
        "7-segment": (two, f"segment {' ; '.join(in_two)}", pg.segment(two, in_two)),
        "8-choose": (shapes, "what colour is the heart?", pg.answer(
            shapes, "what colour is the heart?", choices=["red", "orange", "yellow", "pink"])),
    }  # fmt: skip

    pages = []
    for name, (picture, asked, result) in jobs.items():
        overlay, *masks = draw.save(folder, name, picture, result, prompt=asked)
        pages.append(Image.open(overlay))
        print(f"{overlay}   {asked} → {' '.join(result.raw.split())[:160]}")
        for mask in masks:
            print(f"    {mask}")
    draw.sheet(pages, columns=4, cell_px=420).save(folder / "overview.png")
    print(f"\n{len(pages)} answers, as pictures, in {folder.resolve()}/ (all on one page: overview.png)")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
