"""What outlives a run: a picture of every answer, every mask, and one COCO file for all of them."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paligemma.cli.run import Example, note, writing
from paligemma.errors import OptionError


@dataclass
class Keeper:
    """Called with every example and its result; `finish` writes what needs all of them.

    Attributes:
        verb: part of every file name, so that an answer saved beside its picture never overwrites it.
        folder: of `--save`; None saves no pictures.
        coco: of `--coco`; None collects nothing.
        prompt: what was asked, written below the picture.
    """

    verb: str
    folder: Path | None = None
    coco: Path | None = None
    prompt: str = ""
    _stems: set[str] = field(default_factory=set)
    _files: list[Path] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)
    _results: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, args: argparse.Namespace, verb: str, *, prompt: str = "") -> "Keeper":
        """What `--save` and `--coco` ask for; places that cannot be written are refused before any work is done."""
        coco = getattr(args, "coco", None)
        if coco and not Path(coco).parent.is_dir():
            raise OptionError(
                f"--coco {coco}: the folder {Path(coco).parent} does not exist. Make it, or name another."
            )
        folder = Path(args.save) if args.save else None
        if folder is not None:
            writing(f"--save {folder}", lambda: folder.mkdir(parents=True, exist_ok=True))
        return cls(verb, folder, Path(coco) if coco else None, prompt)

    def __call__(self, example: Example, result: Any) -> None:
        if self.coco is not None:
            self._names.append(example.name)
            self._results.append(result)
        if self.folder is not None:
            from paligemma import draw

            folder = self.folder
            for picture, image in zip(example.pictures, example.images, strict=True):
                stem = self._unique(f"{picture.stem}.{self.verb}")
                self._files += writing(
                    f"--save {folder}",
                    lambda: draw.save(folder, stem, image, result, prompt=self.prompt),  # noqa: B023
                )

    def finish(self) -> None:
        """Write the COCO file and say on stderr what was saved."""
        if self.coco is not None:
            from paligemma.interop import to_coco

            text = json.dumps(to_coco(self._results, self._names), ensure_ascii=False)
            coco = self.coco
            writing(f"--coco {coco}", lambda: coco.write_text(text, encoding="utf-8"))
            note(f"saved {coco}")
        if self.folder is not None and self._files:
            more = f" and {len(self._files) - 1} more in {self.folder}" if len(self._files) > 1 else ""
            note(f"saved {self._files[0]}{more}")

    def _unique(self, stem: str) -> str:
        """Pictures of one name from two folders do not overwrite each other."""
        name, n = stem, 2
        while name in self._stems:
            name, n = f"{stem}-{n}", n + 1
        self._stems.add(name)
        return name
