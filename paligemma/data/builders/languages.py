"""The languages that prompts name."""

from paligemma.errors import OptionError, nearest

# The translated sets of pre-training, CC3M-35L and COCO-35L. Source: big_vision transfers/coco35l.py.
LANGUAGES: tuple[str, ...] = (
    "ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr", "he", "hi", "hr", "hu", "id", "it", "ja",
    "ko", "mi", "nl", "no", "pl", "pt", "ro", "ru", "sv", "sw", "te", "th", "tr", "uk", "vi", "zh",
)  # fmt: skip

# ISO 639-2 spells these with three letters, partly in two ways; the models were taught the code on the right.
_LONG_CODES: dict[str, str] = {
    "ara": "ar", "ben": "bn", "ces": "cs", "cze": "cs", "dan": "da", "deu": "de", "ger": "de", "ell": "el", "gre": "el",
    "eng": "en", "spa": "es", "fas": "fa", "per": "fa", "fin": "fi", "tgl": "fil", "fra": "fr",
    "fre": "fr", "heb": "he", "hin": "hi", "hrv": "hr", "hun": "hu", "ind": "id", "ita": "it",
    "jpn": "ja", "kor": "ko", "mri": "mi", "mao": "mi", "nld": "nl", "dut": "nl", "nor": "no", "pol": "pl", "por": "pt",
    "ron": "ro", "rum": "ro", "rus": "ru", "swe": "sv", "swa": "sw", "tel": "te", "tha": "th", "tur": "tr", "ukr": "uk",
    "vie": "vi", "zho": "zh", "chi": "zh",
}  # fmt: skip


def check_language(lang: str | None, field: str = "lang") -> None:
    """A language that the user fixes is a code of two or three small letters that is not another spelling of ours.

    Codes beyond the 35 pass: web captions of pre-training have more than a hundred languages.

    Raises:
        OptionError: "eng", "en-US", "English".
    """
    if lang is None:
        return
    stem = str(lang).replace("_", "-").split("-")[0].lower()
    meant = _LONG_CODES.get(stem, stem)
    if lang in LANGUAGES or (meant == lang and len(lang) in (2, 3) and lang.isascii() and lang.isalpha()):
        return
    hint = f" Did you mean '{meant}'?" if meant in LANGUAGES else nearest(stem, LANGUAGES)
    raise OptionError(f"{field}={lang!r}: expected a language code as prompts have it, such as 'en' or 'fil'.{hint}")
