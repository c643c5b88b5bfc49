#!/usr/bin/env python
"""From a COCO folder to a detector, by the command line alone, for shapes that `tiny` was never taught.

    python studies/new_shapes.py --work runs/new_shapes      # a quarter of an hour on two cores, and goes on later
    python studies/new_shapes.py --steps 40 --n 24           # a look

Six shapes and their names are new: house, fish, bolt, hourglass, cup, crown. 300 drawn pictures with polygons are a
COCO export like any other:

    paligemma data check FOLDER
    paligemma train transfer --data FOLDER --task detect --method lora --steps N
    paligemma eval FOLDER --task detect --split valid --adapter …
    paligemma checkpoint merge tiny ADAPTER MODEL
    paligemma detect PICTURE house fish … --model MODEL --save …

Every budget is a run of its own from the same beginning, so that each point of the curve is a finished schedule.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from helpers.study import Results, describe
from PIL import Image, ImageDraw

from paligemma.data.record import Instance, Mask, Record
from paligemma.data.sources.coco_write import write_coco

DOCS = Path(__file__).resolve().parents[1] / "docs" / "studies"
STEPS = (25, 50, 100, 200, 400, 800)
SCALE = 4  # pictures are drawn this much larger and shrunk: smooth edges
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {  # in a unit square around the origin, y down
    "house": ((-0.5, 0.5), (-0.5, -0.05), (0, -0.5), (0.5, -0.05), (0.5, 0.5)),
    "fish": ((-0.5, 0), (-0.2, -0.28), (0.15, -0.2), (0.3, -0.05), (0.5, -0.3), (0.5, 0.3), (0.3, 0.05), (0.15, 0.2),
             (-0.2, 0.28)),
    "bolt": ((0.1, -0.5), (-0.35, 0.08), (-0.05, 0.08), (-0.15, 0.5), (0.35, -0.12), (0.05, -0.12), (0.3, -0.5)),
    "hourglass": ((-0.4, -0.5), (0.4, -0.5), (0.08, 0), (0.4, 0.5), (-0.4, 0.5), (-0.08, 0)),
    "cup": ((-0.45, -0.4), (0.3, -0.4), (0.3, -0.25), (0.5, -0.25), (0.5, 0.2), (0.3, 0.2), (0.2, 0.45), (-0.35, 0.45)),
    "crown": ((-0.5, 0.4), (-0.5, -0.35), (-0.22, 0), (0, -0.45), (0.22, 0), (0.5, -0.35), (0.5, 0.4)),
}  # fmt: skip
LORA = ("--set", "lora.rank=16", "--set", "lora.alpha=32", "--set", "lora.targets=[decoder, vision]")
# With so few examples: one true order of the boxes, places learned from their neighbours, and said as `tiny` says them.
TASK = ("--set", "task_fields=[[order, raster], [n_absent, 1]]", "--set", "loc_sigma=8", "--set", "loc_step=8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/new_shapes"))
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the page")
    parser.add_argument("--n", type=int, default=300, help="training pictures")
    parser.add_argument("--valid", type=int, default=100, help="held-out pictures")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    data = args.work / "coco"
    if not data.exists():
        for split, n, seed in (("train", args.n, 0), ("valid", args.valid, 1)):
            write_coco([draw(seed, i) for i in range(n)], data, split=split, labels=tuple(SHAPES))
    paligemma("data", "check", str(data))
    results = Results(args.work / "new_shapes.json")
    if "before" not in results:
        results["before"] = evaluate(data)
    for steps in args.steps:
        if str(steps) in results:
            continue
        run = args.work / f"steps-{steps}"
        started = time.monotonic()
        paligemma(
            "train", "transfer", "--data", str(data), "--task", "detect", "--method", "lora", "--steps", str(steps),
            "--lr", str(args.lr), "--out", str(run), "--set", f"loader.batch_size={args.batch}", *LORA, *TASK,
            "--set", "merge=false", "--set", "eval_rows=1", "--set", "samples=0", "--set", "score_before=false",
        )  # fmt: skip
        minutes = (time.monotonic() - started) / 60
        results[str(steps)] = {"minutes": minutes, **evaluate(data, "--adapter", str(run / "adapter"))}
        print(f"{steps} steps: {results[str(steps)]}", file=sys.stderr, flush=True)
    last = max(args.steps)
    merged = args.work / "merged"
    paligemma("checkpoint", "merge", "tiny", str(args.work / f"steps-{last}" / "adapter"), str(merged), "--overwrite")
    pictures = sorted((data / "valid").glob("*.png"))[:4]
    paligemma("detect", *map(str, pictures), *SHAPES, "--model", str(merged), "--save", str(args.work / "found"))
    write(results, args)
    return 0


def draw(seed: int, index: int) -> Record:
    """A picture of one to three new shapes on a flat ground, none over another."""
    rng = np.random.default_rng([seed, index, 0x5EA])
    height, width = (int(side) for side in rng.integers(140, 260, 2))
    ground = rng.integers(0, 256, 3)
    picture = Image.new("RGB", (width * SCALE, height * SCALE), tuple(int(c) for c in ground))
    pen = ImageDraw.Draw(picture)
    placed: list[Instance] = []
    for _ in range(int(rng.integers(1, 4))):
        for _ in range(20):
            name = str(rng.choice(list(SHAPES)))
            size = float(rng.uniform(0.25, 0.55)) * min(height, width)
            turn = np.radians(rng.uniform(-20, 20))
            points = (
                np.array(SHAPES[name]) * size @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
            )
            reach = np.abs(points).max(axis=0) + 2
            if (2 * reach > (width, height)).any():
                continue
            points = points + rng.uniform(reach, np.array([width, height]) - reach)
            box = (*points.min(axis=0), *points.max(axis=0))
            if any(b[0] < box[2] + 3 and box[0] < b[2] + 3 and b[1] < box[3] + 3 and box[1] < b[3] + 3 for b in
                   (other.box_xyxy_px for other in placed)):  # fmt: skip
                continue
            colour = rng.integers(0, 256, 3)
            while np.abs(colour - ground).sum() < 150:
                colour = rng.integers(0, 256, 3)
            pen.polygon([tuple(p) for p in points * SCALE], fill=tuple(int(c) for c in colour))
            outline = tuple(float(round(c, 2)) for c in points.reshape(-1))
            placed.append(Instance(name, tuple(float(c) for c in box), Mask((height, width), (outline,))))  # type: ignore[arg-type]
            break
    image = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    return Record((image,), (height, width), tuple(placed), id=f"{seed}-{index}", where=f"drawn picture {index}")


def evaluate(data: Path, *more: str) -> dict[str, Any]:
    """AP and AP50 on the held-out pictures."""
    told = paligemma("eval", str(data), "--task", "detect", "--split", "valid", "--json", *more)
    scores = json.loads(told)["detect"]
    return {"AP": scores["AP"], "AP50": scores["AP50"]}


def paligemma(*words: str) -> str:
    """Run a command line; its stdout."""
    print("paligemma", *words, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "paligemma", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def write(results: Results, args: argparse.Namespace) -> None:
    """The page and its curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = sorted(int(key) for key in results if key.isdigit())
    rows = []
    for n in steps:
        found = results[str(n)]
        rows.append(f"| {n:,} | {found['minutes']:.1f} | {found['AP50']:.3f} | {found['AP']:.3f} |")
    before = results["before"]
    page = f"""# Shapes that `tiny` was never taught, from a COCO folder

Six shapes with their names (house, fish, bolt, hourglass, cup, crown), {args.n} drawn pictures to learn from,
{args.valid} held out, as a COCO export with polygons. By the command line alone: `data check`, `train transfer --task
detect --method lora` (rank 16 on decoder and image tower, learning rate {args.lr:g}, batch {args.batch}), `eval`,
`checkpoint merge`, `detect`. Every line is a run of its own with a finished schedule.

What it took: boxes in raster order, one absent name asked with the present ones (`task_fields`), places learned from
their neighbours (`loc_sigma=8`) and said in every eighth token, as `tiny` says them (`loc_step=8`).

| updates | minutes | AP50 | AP |
|---:|---:|---:|---:|
| 0 | 0 | {before["AP50"]:.3f} | {before["AP"]:.3f} |
{chr(10).join(rows)}

![AP50 by minutes of training](new_shapes.png)

{describe()} Minutes include loading and writing. Again: `python studies/new_shapes.py`.
"""
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "new_shapes.md").write_text(page)
    figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    minutes = [0.0, *(results[str(n)]["minutes"] for n in steps)]
    axes.plot(minutes, [before["AP50"], *(results[str(n)]["AP50"] for n in steps)], "o-", label="AP50")
    axes.plot(minutes, [before["AP"], *(results[str(n)]["AP"] for n in steps)], "o-", label="AP")
    axes.axhline(0.6, color="0.6", lw=0.8, ls=":")
    axes.set(xlabel="minutes on two CPU cores", ylabel="held-out score", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(args.out / "new_shapes.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
