"""Weights under the names of gemma_pytorch: query, key and value in one matrix, and int8 with a factor per row.

Source: gemma_pytorch gemma/model.py. Its own files are pickles and refused; this reads what came of converting one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from paligemma.checkpoints.files import Scratch, Spec, is_float
from paligemma.checkpoints.safetensors_io import SafetensorsFiles
from paligemma.errors import CheckpointError

FUSED, SCALER = ".self_attn.qkv_proj.weight", "_scaler"
IGNORABLE: dict[str, str] = {
    r"(.*\.)?(local_|global_)?freqs_cis": "rotary frequencies, computed from the configuration",
}


@dataclass(frozen=True)
class _Made:
    """Rows `start` to `stop` of a matrix of the file, each times its factor where it is quantised."""

    weight: str
    scaler: str | None
    start: int
    stop: int


class Derived:
    """A `TensorFile` over another one, in which fused matrices are cut apart and quantised ones multiplied out.

    Attributes:
        names: inner names -> names to read by; those of gemma_pytorch replaced by Hugging Face's.

    Raises:
        CheckpointError: a fused matrix or a scaler whose shape fits nothing.
    """

    def __init__(self, file: SafetensorsFiles, names: Mapping[str, str], where: str) -> None:
        self._file = file
        self._made: dict[str, _Made] = {}
        self.names: dict[str, str] = dict(names)
        specs = dict(file.specs)
        for inner, full in names.items():
            scaler = names.get(inner + SCALER)
            if not inner.endswith(FUSED) and scaler is None:
                continue
            self._check(full, scaler, where)
            n_rows, width = file.specs[full].shape
            for part, start, stop in self._cuts(inner, n_rows, where):
                own = inner if not part else inner.replace("qkv_proj", part)
                name = f"{full}[{part or 'scaled'}]"
                self._made[name] = _Made(full, scaler, start, stop)
                specs[name] = Spec((stop - start, width), file.specs[scaler or full].dtype)
                if part:
                    self.names.pop(inner, None)
                self.names[own] = name
            self.names.pop(inner + SCALER, None)
        self.specs: Mapping[str, Spec] = specs

    def _check(self, full: str, scaler: str | None, where: str) -> None:
        shape = self._file.specs[full].shape
        if len(shape) != 2:
            raise CheckpointError(f"{where}: {full} has shape {list(shape)}: expected a matrix.")
        if scaler is None:
            return
        factors = self._file.specs[scaler]
        if factors.shape != shape[:1] or not is_float(factors.dtype):
            raise CheckpointError(
                f"{where}: {scaler} holds {factors.dtype} {list(factors.shape)}: expected one floating-point factor "
                f"for each of the {shape[0]} rows of {full}."
            )

    def _cuts(self, inner: str, n_rows: int, where: str) -> list[tuple[str, int, int]]:
        """Part, first row and end of what one matrix holds: [H*d queries, K*d keys, K*d values], or itself."""
        if not inner.endswith(FUSED):
            return [("", 0, n_rows)]
        out = self.names.get(inner.replace("qkv_proj", "o_proj"))
        n_out = self._file_columns(out)
        n_kv = (n_rows - n_out) // 2
        if n_out <= 0 or n_kv <= 0 or n_out + 2 * n_kv != n_rows:
            raise CheckpointError(
                f"{where}: {inner} has {n_rows} rows and o_proj beside it {n_out} columns: expected the rows of "
                "queries, as many as those columns, then equally many of keys and values."
            )
        return [("q_proj", 0, n_out), ("k_proj", n_out, n_out + n_kv), ("v_proj", n_out + n_kv, n_rows)]

    def _file_columns(self, name: str | None) -> int:
        source = self._made[name].weight if name in self._made else name
        shape = self._file.specs[source].shape if source is not None else ()
        return shape[1] if len(shape) == 2 else 0

    def sources(self, name: str) -> tuple[str, ...]:
        """The tensors of the file from which one is made."""
        made = self._made.get(name)
        return (name,) if made is None else (made.weight, *([made.scaler] if made.scaler else []))

    def read(self, name: str, index: tuple[int, ...] = (), scratch: Scratch | None = None) -> Tensor:
        made = self._made.get(name)
        if made is None:
            return self._file.read(name, index, scratch)
        rows = self._file.read(made.weight)[made.start : made.stop]
        if made.scaler is not None:
            factors = self._file.read(made.scaler)[made.start : made.stop]
            rows = rows.to(factors.dtype) * factors[:, None]
        return rows[index]

    def place(self, name: str) -> tuple[int, int]:
        return self._file.place(self.sources(name)[0])

    def where(self, name: str) -> str:
        return self._file.where(self.sources(name)[0])

    def close(self) -> None:
        self._file.close()
