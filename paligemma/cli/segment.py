"""`paligemma segment`

paligemma segment photo.jpg cat "red car" --save out/
paligemma segment photos/ --label cat --label dog --coco masks.json
paligemma segment                                  (a bundled picture)

Words are told apart as in `paligemma detect`. --save writes the picture with its masks, and every mask alone.
"""

import argparse

from paligemma.cli import detect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    detect.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return detect.look_for(args, "segment")
