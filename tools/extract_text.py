"""Bytes to clean lines: which character set, what may not stay, how long a line may be."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from urllib.parse import urljoin

from thinkloop.tools.extract_bounds import LINE_CHARS, MAX_LINES, TOTAL_CHARS, URL_CHARS

# Controls but tab and newline; soft hyphen, zero-width space, directional marks and overrides, invisible operators,
# byte order mark, interlinear marks, noncharacters, blank letters (Hangul fillers), variation selectors and tags, which
# can hide text. Joiners (200C, 200D) and FE0F stay: Persian, Indic scripts and emoji need them, but no two joiners in a
# row.
_UNWANTED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0e\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]+"
)
_MORE_JOINERS = re.compile("(?<=[\u200c\u200d])[\u200c\u200d]+")
_NEWLINE = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_MARKUP_CHARSET = re.compile(
    rb"""<(?:meta|\?xml)[^>]{0,400}?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]{2,40})""", re.I
)
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))

_URL = re.compile(r"(?i:https?)://[^\s<>\"]+")

# What browsers take these labels to mean (WHATWG Encoding, section 4.2).
_LABELS = {
    "ascii": "cp1252", "us-ascii": "cp1252", "iso-8859-1": "cp1252", "latin1": "cp1252", "latin-1": "cp1252",
    "iso-8859-9": "cp1254", "iso-8859-11": "cp874", "tis-620": "cp874", "gb2312": "gb18030", "gbk": "gb18030",
    "x-gbk": "gb18030", "shift_jis": "cp932", "shift-jis": "cp932", "x-sjis": "cp932", "sjis": "cp932",
    "euc-kr": "cp949", "ks_c_5601-1987": "cp949", "big5": "big5hkscs", "x-euc-jp": "euc_jp", "utf8": "utf-8",
    "utf-16": "utf-16-le", "unicode": "utf-16-le", "x-mac-roman": "mac_roman", "macintosh": "mac_roman",
}  # fmt: skip
# Codecs that Python counts as text but no document is in; some take quadratic time.
_NEVER = frozenset({"idna", "punycode", "unicode_escape", "raw_unicode_escape", "utf-7", "undefined", "mbcs", "oem"})


@dataclass(frozen=True, slots=True)
class Text:
    """Clean lines and, when something was left out, a note that says so."""

    lines: list[str]
    note: str = ""


def decode(data: bytes, declared: str = "") -> str:
    """The text of `data`, never failing: BOM, then UTF-8 if that is plainly what it is, the declared character set, the
    one named in the markup, UTF-8, and last windows-1252."""
    for mark, name in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace")
    if (text := _multibyte_utf8(data)) is not None:
        return text
    found = _MARKUP_CHARSET.search(data[:2048])
    labels = [declared, found[1].decode("ascii", "replace") if found else "", _utf16(data), "utf-8"]
    for label in labels:
        text = _attempt(data, label)
        if text is not None and not looks_binary(text):
            return text
    return data.decode("cp1252", "replace")


def _multibyte_utf8(data: bytes) -> str | None:
    """The text, if there are UTF-8 sequences and hardly anything else. Other character sets don't look like that by
    chance, so a declaration of one is wrong (a server's default, most often)."""
    if data.isascii() or b"\0" in data[:4096]:
        return None
    text, _ = codecs.utf_8_decode(data, "replace", False)  # not final: a body may be cut within a character
    bad = text.count("\ufffd")
    good = sum(map(len, re.findall("[\x80-\ufffc\U00010000-\U0010ffff]+", text))) if bad else 1
    return text if bad * 20 <= good else None


def _attempt(data: bytes, label: str) -> str | None:
    """The text in this character set, unless it is unknown or does not fit (over 1 % of the characters bad)."""
    name = codec_of(label)
    if not name or (name.startswith(("utf-16", "utf-32")) and b"\0" not in data[:4096]):
        return None
    try:
        text = data.decode(name, "replace")
    except (ValueError, LookupError, ArithmeticError):
        return None
    return text if text.count("\ufffd") * 100 <= len(text) else None


def codec_of(label: str) -> str:
    """Python's name for the character set that browsers take `label` to mean; empty when there is none such."""
    label = label.strip().strip("\"'").lower()[:40]
    try:
        found = codecs.lookup(_LABELS.get(label, label))
    except (LookupError, ValueError, OSError):  # OSError: the worker can't look for a module of that name
        return ""
    return found.name if found._is_text_encoding and found.name not in _NEVER else ""


def _utf16(data: bytes) -> str:
    """UTF-16 without a mark shows as NULs in every other byte; which half tells the order."""
    sample = data[:4096]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if even + odd < len(sample) // 5:
        return ""
    return "utf-16-be" if even > odd else "utf-16-le"


def looks_binary(text: str) -> bool:
    """Whether more than 2 % of the first characters (and more than a few) are controls or undecodable."""
    sample = text[:8192]
    strange = sum(1 for c in sample if (c < " " and c not in "\t\n\r\f\x1b") or c == "\ufffd" or "\x7f" <= c <= "\x84")
    return strange > 5 and strange * 50 > len(sample)


def clean(text: str) -> str:
    """The text without what is invisible or steers a terminal; every kind of line end is a newline."""
    return _MORE_JOINERS.sub("", _UNWANTED.sub("", _NEWLINE.sub("\n", text)))


def clean_line(text: str, limit: int) -> str:
    """One line with single spaces, at most `limit` characters."""
    return " ".join(clean(text[: limit * 4]).split())[:limit].strip()


def web_url(base: str, href: str) -> str:
    """The absolute http or https address, or empty when it is none or has more than 2,000 characters."""
    try:
        url = urljoin(base, "%20".join(href[: URL_CHARS + 1].split()))
    except ValueError:
        return ""
    return url if len(url) <= URL_CHARS and _URL.fullmatch(url) and not _UNWANTED.search(url) else ""


def wrap(line: str) -> list[str]:
    """The line in pieces of at most 500 characters, broken at a space where there is one in the second half."""
    pieces = []
    start = 0
    while len(line) - start > LINE_CHARS:
        space = line.rfind(" ", start + LINE_CHARS // 2, start + LINE_CHARS + 1)
        end = space if space > 0 else start + LINE_CHARS
        pieces.append(line[start:end])
        start = end + (space > 0)
    pieces.append(line[start:])
    return pieces


def bounded(text: str) -> Text:
    """Clean lines: none over 500 characters, at most 200,000 of them and 2,000,000 characters, no empty ones at the
    ends."""
    note = ""
    text = clean(text[: TOTAL_CHARS * 2]).strip("\n")
    if len(text) > TOTAL_CHARS:
        text, note = text[:TOTAL_CHARS], f"cut after {TOTAL_CHARS:,} characters"
    lines = [piece for line in text.split("\n") for piece in wrap(line.rstrip())]
    if len(lines) > MAX_LINES:
        del lines[MAX_LINES:]
        note = f"cut after {MAX_LINES:,} lines"
    return Text(lines if any(lines) else [], note)
