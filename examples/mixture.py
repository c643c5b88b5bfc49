"""Annotations into prompts, prompts into a mixture, a mixture into the batches of a training step."""

import paligemma
from paligemma.data.builders import Built, builder_of
from paligemma.data.loader import Loader, LoaderOptions
from paligemma.data.mixture import Mixture, Part
from paligemma.data.world.records import WorldRecords


def main() -> None:
    drawn = WorldRecords(100)  # any source of records: Coco, Yolo, Voc, or one of your own
    mixture = Mixture(
        {
            "boxes": Part(source=Built(drawn, builder_of("detect", order="raster")), weight=3),
            "words": Part(source=Built(drawn, builder_of("caption")), weight=1),
        }
    )
    for place in (0, 1, 10**9):
        row = mixture.at(place)
        print(f"place {place:,}: {row.part}, row {row.draw.row}, pass {row.draw.epoch:,}: {mixture[place].prefix!r}")

    pg = paligemma.load("tiny")
    loader = Loader(mixture, pg.processor, LoaderOptions(batch_size=8, max_text=129))
    (batch,) = loader.step(1000).parts  # any step can be had first
    print(f"step 1000: {batch}")


if __name__ == "__main__":
    main()
