"""Text from data and file names, made safe for each place it goes to."""

from __future__ import annotations

import hashlib
import html
import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

__all__ = [
    "bibliography",
    "clean",
    "csv_bytes",
    "format_interval",
    "format_number",
    "numbered",
    "plot_text",
    "safe_name",
    "script_json",
]

# Lone surrogates (undecodable file names), control characters, and the marks that reorder text.
_UNSHOWABLE = re.compile("[\ud800-\udfff\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_FORMULA = re.compile(r"^\s*[=+\-@\uff1d\uff0b\uff0d\uff20\t\r]")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
#: TeX's accents as combining characters, and its names of letters.
_ACCENTS = {
    '"': "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303", "=": "\u0304",
    ".": "\u0307", "c": "\u0327", "v": "\u030c", "u": "\u0306", "H": "\u030b", "r": "\u030a",
    "k": "\u0328",
}  # fmt: skip
_LETTERS = {
    "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "aa": "å", "AA": "Å", "ss": "ß", "o": "ø",
    "O": "Ø", "l": "ł", "L": "Ł", "i": "ı", "j": "ȷ",
}  # fmt: skip
_ACCENTED = re.compile(r"\\(?:([\"'`^~=.])\s*|([cvuHrk])(?=[\s{\\])\s*)\{?\\?([A-Za-z])\}?")
_LETTER = re.compile(rf"\\({'|'.join(sorted(_LETTERS, key=len, reverse=True))})(?![A-Za-z])\s*")
_CITATION = re.compile(r"\[@[^\[\]]+\]")


def clean(text: object) -> str:
    """Return text in which every character can be encoded and shown, others as U+FFFD."""
    return _UNSHOWABLE.sub("\ufffd", str(text).replace("\r\n", "\n"))


def plot_text(text: object) -> str:
    """Return text that plotly, which reads a few HTML tags and entities, shows as it is."""
    return html.escape(" ".join(clean(text).split()), quote=False)


def safe_name(text: object) -> str:
    """Return a file name or anchor of ``a-z0-9-`` for any text; different texts stay different."""
    text = str(text)
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:48].strip("-")
    if slug and slug == text:
        return slug
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{slug or 'x'}-{digest}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {clean(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _jsonable(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value if value is None else clean(value)


def script_json(value: Any) -> str:
    """Return JSON that can stand inside a script: no ``<``, no line separators, no NaN."""
    text = json.dumps(_jsonable(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        value = clean(value)
        return "'" + value if _FORMULA.match(value) else value
    return value


def csv_bytes(frame: pd.DataFrame) -> bytes:
    """Return a table as UTF-8 CSV; text that a spreadsheet would run as a formula is quoted.

    Such text (its first character one of ``= + - @``) gets an apostrophe in front; numbers stay.
    """
    guarded = frame.copy()
    guarded.columns = [_cell(str(c)) for c in frame.columns]
    for i, kind in enumerate(frame.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            guarded.isetitem(i, [_cell(v) for v in frame.iloc[:, i].tolist()])
    text = guarded.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return text.encode("utf-8")


def _decimals(value: float) -> int:
    size = abs(value)
    return 3 if size < 1 else 2 if size < 10 else 1 if size < 1000 else 0


def format_number(value: float, decimals: int | None = None) -> str:
    """Return a number as a reader expects it: three figures, a true minus sign, no long tails."""
    if value is None or not np.isfinite(value):
        return "–"
    if decimals is None:
        size = abs(value)
        if size and (size < 1e-3 or size >= 1e7):
            mantissa, exponent = f"{value:.1e}".split("e")
            power = str(int(exponent)).translate(_SUPERSCRIPT)
            return f"{mantissa}×10{power}".replace("-", "−")
        decimals = 0 if float(value).is_integer() else _decimals(value)
    return f"{value:,.{decimals}f}".replace("-", "−")


def format_interval(value: float, low: float | None, high: float | None) -> tuple[str, str]:
    """Return an estimate and its interval, with three figures or more if the interval is narrow."""
    if low is None or high is None or not np.isfinite([value, low, high]).all():
        return format_number(value), ""
    width = (high - low) / 2
    needed = int(np.clip(1 - np.floor(np.log10(width)), 0, 4)) if width > 0 else 0
    size = abs(value) or max(abs(low), abs(high))
    whole = width == 0 and float(value).is_integer()
    decimals = 0 if whole else max(needed, _decimals(size))
    written = [format_number(v, decimals) for v in (value, low, high)]
    return written[0], f"[{written[1]}, {written[2]}]"


def _braced(text: str, start: int) -> int:
    """Return where the brace opened at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text)


def _plain(tex: str) -> str:
    """Return the value of a BibTeX field with its accents as characters, without braces."""

    def accented(found: re.Match[str]) -> str:
        mark = _ACCENTS[found[1] or found[2]]
        return unicodedata.normalize("NFC", found[3] + mark)

    text = _ACCENTED.sub(accented, tex)
    text = _LETTER.sub(lambda found: _LETTERS[found[1]], text)
    text = re.sub(r"\\([&%_#$])", r"\1", text)
    return " ".join(re.sub(r"[{}]", "", text).split())


def _fields(entry: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    position = entry.find(",") + 1
    while match := re.compile(r"\s*,?\s*([A-Za-z_]+)\s*=\s*").match(entry, position):
        start = match.end()
        if entry[start : start + 1] == "{":
            end = _braced(entry, start)
            value, position = entry[start + 1 : end], end + 1
        elif entry[start : start + 1] == '"':
            end = entry.find('"', start + 1)
            end = len(entry) if end < 0 else end
            value, position = entry[start + 1 : end], end + 1
        else:
            bare = re.compile(r"[^,}\s]*").match(entry, start)
            value, position = (bare.group(), bare.end()) if bare else ("", start + 1)
        fields[match.group(1).lower()] = _plain(value)
    return fields


def bibliography(entry: str) -> tuple[str, str | None]:
    """Return a BibTeX entry as one readable line, and the address of its DOI if it has one."""
    f = _fields(entry)
    if "title" not in f:
        return " ".join(clean(entry).split()), None
    authors = [
        " ".join(reversed(a.split(", ", 1))) if ", " in a else a
        for a in f.get("author", "").split(" and ")
        if a.strip()
    ]
    who = ", ".join(authors[:6]) + (" et al." if len(authors) > 6 else "")
    where = f.get("journal") or f.get("booktitle") or f.get("publisher") or ""
    volume = f.get("volume", "") + (f"({f['number']})" if f.get("number") else "")
    pages = f.get("pages", "").replace("--", "–")
    place = ", ".join(x for x in (where, volume, pages) if x)
    parts = [who, f"({f['year']})" if f.get("year") else "", f["title"].rstrip(".") + ".", place]
    line = " ".join(p for p in parts if p)
    doi = re.fullmatch(
        r"(?:https?://(?:dx\.)?doi\.org/)?(10\.\d{4,9}/[^\s\"<>]+)", f.get("doi", "")
    )
    return clean(line), f"https://doi.org/{doi.group(1)}" if doi else None


def numbered(text: str, numbers: Mapping[str, int]) -> list[tuple[str, list[int]]]:
    """Split text at its citations ``[@key; @key]``: pieces of (text, numbers cited after it).

    A citation with a key that has no entry stays in the text as it was written.
    """
    pieces: list[tuple[str, list[int]]] = []
    begin = 0
    for match in _CITATION.finditer(text):
        keys = [k.strip().removeprefix("@") for k in re.split(r"[;,]", match.group()[1:-1])]
        if all(k in numbers for k in keys):
            pieces.append((text[begin : match.start()].rstrip(), [numbers[k] for k in keys]))
            begin = match.end()
    pieces.append((text[begin:], []))
    return pieces
