"""Likelihoods instead of text: multiple choice, and the log-probability of any suffix."""

from importlib.resources import files

import paligemma


def main() -> None:
    pg = paligemma.load("tiny")
    image = pg.encode_image(str(files("paligemma") / "assets" / "example" / "shapes.png"))
    answer = pg.answer(image, "what colour is the heart?", choices=["red", "orange", "blue"])
    for choice in answer.choices:  # best first; the probabilities sum to 1
        print(f"{choice.probability:6.1%}  {choice.text}")

    suffixes = ["yes", "no"]
    for suffix, logprob in zip(suffixes, pg.score(image, "answer en is there a star?", suffixes), strict=True):
        print(f"log p({suffix!r}) = {logprob:.2f}")


if __name__ == "__main__":
    main()
