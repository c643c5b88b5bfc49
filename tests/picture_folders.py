"""Generated folders of pictures for tests of data formats."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma.data.record import Instance, Mask, Record, Text
from paligemma.data.world import render, sample_scene

SIZE_HW = (48, 64)


def picture(path: Path, size_hw: tuple[int, int] = SIZE_HW, seed: int = 0, **options: Any) -> Path:
    """A file of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def drawn_records(folder: Path, n: int = 4, *, masks: bool = True) -> list[Record]:
    """Scenes of the picture world with whole-pixel boxes; names with spaces and umlauts, in folders of their own."""
    records = []
    for seed in range(n):
        drawn = render(scene := sample_scene(seed, "plain"))
        path = folder / f"ordner {seed % 2}" / f"bild ä {seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.image).save(path)
        instances = tuple(
            Instance(thing.name, box, Mask.of(mask) if masks else None)
            for thing, box, mask in zip(scene.things, drawn.boxes_xyxy_px, drawn.masks, strict=True)
        )
        height, width = drawn.image.shape[:2]
        texts = (Text("a scene"), Text("eine Szene", "de")) if masks else ()
        records.append(Record((path,), (height, width), instances, texts, id=f"{seed}"))
    return [*records, Record((picture(folder / "leer.png"),), SIZE_HW, id="empty")]


def with_masks(record: Record, mask: Mask) -> Record:
    """Every instance with this mask."""
    return dataclasses.replace(record, instances=tuple(dataclasses.replace(i, mask=mask) for i in record.instances))


def all_of(source: Any) -> list[Any]:
    return [source[index] for index in range(len(source))]


def annotations(record: Record) -> tuple[Any, ...]:
    """What a record says, without where it stands; masks as pixels."""
    instances = [
        (i.label, i.box_xyxy_px, i.is_crowd, None if i.mask is None else i.mask.pixels().tobytes())
        for i in record.instances
    ]
    return (record.size_hw, instances, record.texts, record.words, record.questions)


def boxes(record: Record) -> list[tuple[str, tuple[float, ...]]]:
    """Labels and boxes, in the order of the labels."""
    return sorted((i.label, i.box_xyxy_px) for i in record.instances)
