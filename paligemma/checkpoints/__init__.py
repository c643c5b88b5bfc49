"""Every file format to and from the native state dict: `identify`, `open_checkpoint`, `read`, `stream`, `write`."""

from paligemma.checkpoints.checkpoint import Checkpoint, open_checkpoint, read, stream
from paligemma.checkpoints.identify import Format, identify
from paligemma.checkpoints.write import write

__all__ = ["Checkpoint", "Format", "identify", "open_checkpoint", "read", "stream", "write"]
