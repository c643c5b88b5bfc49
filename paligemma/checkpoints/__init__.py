"""Every file format to and from the native state dict.

identify(path)            "hf", "npz", "adapter" or "pickle", judged by content
read(path)                (PaliGemmaConfig, {native name: tensor})
open_checkpoint(path)     the same, tensor by tensor
write(path, config, state, format)
convert, verify           from file to file; from file to verdict
assemble, save_assembly   raw SigLIP + raw Gemma -> a model that has learned nothing yet (stage 0)
read_adapter, merge       PEFT LoRA
resolve(name)             path, short name or hub id -> local path
push(folder, repo)        a result folder with its card -> the hub
"""

from paligemma.checkpoints.assemble import Assembly, AssemblyReport, assemble, save_assembly
from paligemma.checkpoints.checkpoint import Checkpoint, open_checkpoint, read, stream
from paligemma.checkpoints.convert import convert
from paligemma.checkpoints.hub import commit_of, resolve
from paligemma.checkpoints.identify import Format, identify
from paligemma.checkpoints.lora import Adapter, merge, read_adapter
from paligemma.checkpoints.push import Pushed, push
from paligemma.checkpoints.verify import Verdict, verify
from paligemma.checkpoints.write import write

__all__ = [
    "Adapter",
    "Assembly",
    "AssemblyReport",
    "Checkpoint",
    "Format",
    "Pushed",
    "Verdict",
    "assemble",
    "commit_of",
    "convert",
    "identify",
    "merge",
    "open_checkpoint",
    "push",
    "read",
    "read_adapter",
    "resolve",
    "save_assembly",
    "stream",
    "verify",
    "write",
]
