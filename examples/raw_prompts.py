"""Raw prompts: greedy, sampled, beams, and a stream of pieces as they are written."""

from importlib.resources import files

import paligemma
from paligemma.engine.sampling import Sampling


def main() -> None:
    pg = paligemma.load("tiny")
    image = pg.encode_image(str(files("paligemma") / "assets" / "example" / "shapes.png"))
    (greedy,) = pg.generate([image], ["caption en"], max_new_tokens=48)
    (beams,) = pg.generate([image], ["caption en"], max_new_tokens=48, n_beams=3)
    print(f"greedy  {greedy.logprob:7.2f}  {greedy.text}")
    print(f"beams   {beams.logprob:7.2f}  {beams.text}")
    for seed in (0, 1):
        (drawn,) = pg.generate(
            [image], ["caption en"], max_new_tokens=48, sampling=Sampling(temperature=0.7, top_p=0.9, seed=seed)
        )
        print(f"sampled {drawn.logprob:7.2f}  {drawn.text}")
    print("stream ", end=" ")
    for piece in pg.stream(image, "caption en"):
        print(piece, end="|", flush=True)
    print()


if __name__ == "__main__":
    main()
