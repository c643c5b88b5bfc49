"""All transfers by name, and their table for the pages."""

from collections.abc import Mapping

from paligemma.recipes.transfers import boxes, captions, documents, own, questions, video
from paligemma.recipes.transfers.base import Setting, Transfer

TRANSFERS: dict[str, Transfer] = {
    **captions.TRANSFERS,
    **questions.TRANSFERS,
    **documents.TRANSFERS,
    **boxes.TRANSFERS,
    **video.TRANSFERS,
    **own.TRANSFERS,
}
_HEAD = ("transfer", "prompt", "answer: column", "text", "settings by resolution", "pictures", "scored by")
_CHOSEN = {"cycle": "", "random": ", any", "only": ""}


def table(transfers: Mapping[str, Transfer] = TRANSFERS) -> str:
    """The transfers as a Markdown table."""
    rows = [[_cell(value) for value in _row(transfer)] for transfer in transfers.values()]
    lines = [_HEAD, ["---"] * len(_HEAD), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _row(transfer: Transfer) -> list[str]:
    prompt = transfer.prompt.replace("\n", "\\n")
    answer = " or ".join(f"`{name}`" for name in transfer.answer) + _CHOSEN[transfer.choose]
    answer += ", lower-cased" if transfer.lower else ""
    metrics = "; ".join(transfer.metrics)
    decoded = f"; {transfer.beams} beams" if transfer.beams > 1 else ""
    return [
        f"`{transfer.name}`", f"`{prompt}`", answer, str(transfer.text_length), _settings(transfer),
        _pictures(transfer), f"{metrics}{decoded}",
    ]  # fmt: skip


def _settings(transfer: Transfer) -> str:
    """Resolutions that share a setting stand together."""
    groups: dict[Setting, list[str]] = {}
    for resolution, setting in transfer.settings.items():
        groups.setdefault(setting, []).append(str(resolution))
    told = [f"{', '.join(sides)}: {_setting(setting, transfer)}" for setting, sides in groups.items()]
    return "; ".join(told) or "scored only"


def _setting(setting: Setting, transfer: Transfer) -> str:
    words = [f"{setting.steps} steps" if setting.steps else f"{setting.epochs:g} ep", f"lr {_short(setting.lr)}"]
    if transfer.kind != "adam":
        words.append(transfer.kind)
    if setting.weight_decay:
        words.append(f"wd {_short(setting.weight_decay)}")
    if setting.batch_size != Setting.batch_size:
        words.append(f"bs {setting.batch_size}")
    if setting.dropout:
        words.append(f"do {setting.dropout:g}")
    if setting.label_smoothing:
        words.append(f"ls {setting.label_smoothing:g}")
    if setting.freeze_image:
        words.append("image frozen")
    if transfer.trains:
        words.append(f"only {transfer.trains}")
    return " ".join(words)


def _pictures(transfer: Transfer) -> str:
    words: list[str] = [transfer.resize or "as the checkpoint"]
    if transfer.resize_eval:
        words.append(f"asked: {transfer.resize_eval}")
    if transfer.n_images > 1:
        words.append(f"{transfer.n_images} of them")
    if transfer.n_frames is not None:
        words.append(f"{transfer.n_frames} frames, stride {transfer.stride}")
    if transfer.red_box:
        words.append("red box")
    return ", ".join(words)


def _short(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
