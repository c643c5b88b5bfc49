"""A picture of the world as a plain value: what is in it and where, before any pixel is drawn."""

from dataclasses import dataclass
from typing import Literal

from paligemma.data.world.palette import Rgb

World = Literal["plain", "many", "full"]
Split = Literal["train", "held_out"]

TEXTURES: tuple[str, ...] = ("solid", "stripes", "dots", "checker", "gradient", "outline")
BACKGROUNDS: tuple[str, ...] = ("flat", "gradient", "noise", "stripes", "blobs")
UNSEEN_BACKGROUNDS: tuple[str, ...] = ("bricks", "waves", "rings")  # in examinations only, `unseen.py`


@dataclass(frozen=True, kw_only=True)
class Background:
    """What lies behind everything. `colour` names the base, `rgbs` are the ends between which the pattern stays."""

    kind: str
    colour: str
    rgbs: tuple[Rgb, Rgb]
    angle_deg: float = 0.0
    period_px: float = 16.0
    seed: int = 0  # of the noise and the blobs


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape or one text.

    `size_px` is the side of a shape's unit square or the em size of a text; `centre_xy_px` is in pixel edges (the
    middle of the first pixel is 0.5).
    """

    kind: Literal["shape", "text"]
    colour: str
    rgb: Rgb
    centre_xy_px: tuple[float, float]
    size_px: float
    shape: str = ""
    text: str = ""
    font: str = ""
    angle_deg: float = 0.0  # clockwise
    elongation: float = 1.0  # length over width of a rectangle or an oval
    variant: bool = False  # the other outline of a shape, which no training picture shows
    texture: str = "solid"
    second_rgb: Rgb = (0, 0, 0)  # the texture's other shade
    texture_angle_deg: float = 0.0

    @property
    def name(self) -> str:
        """`red circle`, or `text`."""
        return f"{self.colour} {self.shape}" if self.kind == "shape" else "text"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture: later things lie on top of earlier ones."""

    size_hw: tuple[int, int]
    background: Background
    things: tuple[Thing, ...]

    @property
    def shapes(self) -> tuple[int, ...]:
        """Indices of the things that are shapes."""
        return tuple(i for i, thing in enumerate(self.things) if thing.kind == "shape")

    @property
    def texts(self) -> tuple[int, ...]:
        """Indices of the things that are texts."""
        return tuple(i for i, thing in enumerate(self.things) if thing.kind == "text")
