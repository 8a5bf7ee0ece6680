"""Text that looks like grounding markup and is none: an *attempt*, which would be trained on letter by letter.

Looked at is the text as a reader sees it: without invisible characters, with full-width letters as plain ones and with
HTML's `&lt;` as `<`. Tags count in any case, with blanks inside, and as `bbox`. An attempt is

- a pair of tags that locates something and holds a digit or nothing; any pair that names something or shows an image;
- a tag that locates something beside coordinates, or directly beside a number or a bracket;
- a name before what locates it, with punctuation between them at most, or before coordinates without a tag;
- the end of an image twice;
- any tag left over in a text that has markup; Qwen2-VL's tokens; a numbered image without its end.

Prose that quotes tags without digits is text.
"""

from __future__ import annotations

import html
import itertools
import re
import unicodedata

from .fields import is_blank, visible

_TAG = re.compile(r"<\s*(?P<end>/?)\s*(?P<name>img|ref|b?box(?:es)?|quads?)\s*/?\s*>", re.IGNORECASE)
_OTHER = re.compile(
    r"<\|(?:box|quad|object_ref)_(?:start|end)\|>"
    r"|(?:picture|image|图片?)[^\w<]{0,3}\d+[^\w<]{0,3}:[^\w<]{0,3}<img>",
    re.IGNORECASE,
)
_AFTER_START = re.compile(r"\s*[-+.]?[\d(\[{]")
_BEFORE_END = re.compile(r"[\d)\]}]\s*$")
_COORDINATES = re.compile(r"\d\s*[),;\s]+\s*[-+.(\[]*\d")
_LOCATION_WITHOUT_TAG = re.compile(r"\s*[(\[{]+\s*[-+.]?\d[\d.]*\s*,\s*[-+.]?\d")
_MAY_HOLD_TAGS = re.compile("[<&\uff1c\ufe64]")
_NEAR = 30
_BETWEEN = re.compile(r"[\s:;,.=~>-]*")
"""Text that may stand between a name and its location."""


def find_attempt(text: str, before: str | None, grounded: bool) -> str | None:
    """Look for an attempt.

    Args:
        text: text between pieces of markup.
        before: kind of the markup that stands directly before it (`ref`), if any.
        grounded: the whole text has grounding markup.

    Returns:
        The text from the attempt on, as it was looked at; None if there is none.
    """
    if before == "ref" and _LOCATION_WITHOUT_TAG.match(_as_seen(text[:_NEAR])):
        return text
    if not _MAY_HOLD_TAGS.search(text):
        return None
    text = _as_seen(text)
    tags = list(_TAG.finditer(text))
    found = [match.start() for match in (_OTHER.search(text),) if match]
    found += [tag.start() for tag in tags if _locates(tag) and _beside_numbers(text, tag)]
    found += [tag.start() for tag in tags[:1] if _continues(before, text, tag)]
    found += [
        first.start()
        for first, second in itertools.pairwise(tags)
        if _belong_together(first, second, text[first.end() : second.start()])
    ]
    if grounded:
        found += [tag.start() for tag in tags if tag["name"].lower() != "img"]
    return text[min(found) :] if found else None


def _as_seen(text: str) -> str:
    if "&" in text:
        text = html.unescape(text)
    return unicodedata.normalize("NFKC", visible(text)).replace("<\\/", "</")


def _locates(tag: re.Match[str]) -> bool:
    return tag["name"].lower() not in ("img", "ref")


def _beside_numbers(text: str, tag: re.Match[str]) -> bool:
    """Whether coordinates stand behind the start, or before the end, of a location."""
    if tag["end"]:
        near = text[max(tag.start() - _NEAR, 0) : tag.start()].rpartition(">")[2]
        return bool(_BEFORE_END.search(near) or _COORDINATES.search(near))
    near = text[tag.end() : tag.end() + _NEAR].partition("<")[0]
    return bool(_AFTER_START.match(near) or _COORDINATES.search(near))


def _continues(before: str | None, text: str, tag: re.Match[str]) -> bool:
    """Whether the first tag of a text goes on with the markup before it."""
    between = text[: tag.start()]
    if before == "img":
        return tag["name"].lower() == "img" and bool(tag["end"]) and is_blank(between)
    return before == "ref" and _is_located(between, tag)


def _is_located(between: str, tag: re.Match[str]) -> bool:
    return _locates(tag) and not tag["end"] and _BETWEEN.fullmatch(between) is not None


def _belong_together(first: re.Match[str], second: re.Match[str], between: str) -> bool:
    """Whether two tags that follow each other were meant as markup."""
    if first["end"]:
        return first["name"].lower() == "ref" and _is_located(between, second)
    if not second["end"]:
        return False
    if _locates(first) and _locates(second):
        return is_blank(between) or any(character.isdigit() for character in between)
    return first["name"].lower() == second["name"].lower()
