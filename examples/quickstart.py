"""Four questions about one picture. Give a file to ask about your own: python examples/quickstart.py photo.jpg"""

import sys
from importlib.resources import files

import paligemma


def main(image: str) -> None:
    pg = paligemma.load("tiny")  # or "paligemma2-3b-mix-448", a local folder, an .npz file
    print("caption:", pg.caption(image).text)
    print("answer: ", pg.answer(image, "what colour is the star?").text)
    print("read:   ", pg.read(image).text)
    for found in pg.detect(image, ["circle", "star"]):
        left, top, right, bottom = found.box_xyxy_px
        print(f"detect:  {found.label} {found.score:.2f} from ({left:.0f}, {top:.0f}) to ({right:.0f}, {bottom:.0f})")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(files("paligemma") / "assets" / "example" / "shapes.png"))
