"""Answers drawn onto the picture they were given for: boxes, masks, words, captions."""

from paligemma.draw.overlay import overlay, save, sheet
from paligemma.draw.paint import mask_picture
from paligemma.draw.style import PALETTE, Style, colours_for

__all__ = ["PALETTE", "Style", "colours_for", "mask_picture", "overlay", "save", "sheet"]
