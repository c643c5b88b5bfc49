"""Answers for other programs: one COCO file (pictures, categories, scored boxes and masks) and plain JSON."""

import json
import sys
from pathlib import Path

from PIL import Image

import paligemma
from paligemma.data.world import render, sample_scene
from paligemma.interop import coco_file


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(3):
        Image.fromarray(render(sample_scene(seed, "plain", "held_out")).image).save(folder / f"{seed}.jpg", quality=95)
    names = sorted(str(path) for path in folder.glob("*.jpg"))

    pg = paligemma.load("tiny")
    found = pg.batch("segment", names, [["moon", "heart", "diamond"]] * len(names))
    coco = coco_file(list(zip(names, found, strict=True)))
    (folder / "answers.coco.json").write_text(json.dumps(coco))
    print(f"{len(coco['annotations'])} annotations on {len(coco['images'])} pictures in {folder / 'answers.coco.json'}")
    print(json.dumps(found[0].to_dict())[:200], "…")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "coco"))
