r"""One spelling for one answer, by string rewriting alone.

`canonical` does what Hendrycks et al. (2021, "Measuring Mathematical Problem Solving With the MATH Dataset") compare by;
`plain` strips what Minerva's normaliser strips (Lewkowycz et al. 2022, appendix D: units, filler, wrappers), but whole
words only: the original deletes them as substrings, which turns `\left(` into `\le(` and `\infty` into `\iny`.
"""

import re

__all__ = ["braced", "canonical", "plain", "repaired", "right_of_equals"]

_UNICODE = {
    "\u2212": "-", "\u2013": "-", "π": r"\pi ", "√": r"\sqrt ", "×": r"\times ", "·": r"\cdot ", "÷": "/", "∞": r"\infty ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "±": r"\pm ", "°": "", "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "²": "^2", "³": "^3", "θ": r"\theta ",
    "\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u2062": "", "\u200b": "",
}  # fmt: skip
_TRANSLATION = str.maketrans(_UNICODE)
_UNITS = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "sue", "points", "feet", "minutes",
    "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students", "children tickets", "tickets", "multiples",
    "inch", "foot", "mm", "kg", "seconds", "hour", "minute", "day", "days", "unit", "degree", "dollar", "cent", "cubic",
)  # fmt: skip
# Not inside a command, nor a letter of a longer word; what a number touches ("10cm") counts as a word of its own.
_UNIT = re.compile(
    rf"(?<![\\A-Za-z])(?:{'|'.join(sorted(_UNITS, key=len, reverse=True))})(?![A-Za-z])(?:\s*\^\s*\{{?[23]\}}?)?"
)
_ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)
# A line over letters names a segment; one over digits repeats them, and stays.
_WRAPPER = re.compile(
    r"\\(?:(?:textbf|textit|text|mbox|mathrm|mathbf|boxed|fbox)\s*\{([^{}]*)\}|overline\s*\{([A-Za-z]*)\})"
)
_SPACING = re.compile(r"(?<!\\)\\[;,:! ]|\\(?:quad|qquad|displaystyle)(?![A-Za-z])|~")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?")
_PERCENT = re.compile(r"\s*\\?%|\s*(?<![\\A-Za-z])percent(?![A-Za-z])")
_AND = re.compile(r"\s*,?\s*(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])")
_SIZES = re.compile(r"\\(?:left|right|big|Big|bigl|bigr|Bigl|Bigr)(?![A-Za-z])\.?")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:,\s*\\!\s*|,|\{,\}|\\,)[0-9]{3})+(?![0-9])")
# A letter in text behind a number is a unit; the letter alone may be a variable.
_METRES = re.compile(r"(?<=[0-9}\s])\\(?:text|mbox|mathrm)\s*\{\s*(?:m|s|g|h|l|L|in)\.?\s*\}(?:\s*\^\s*\{?[23]\}?)?")
# A label that went through the original normaliser: "ft" is gone out of \left and \infty.
_LOST_LEFT = re.compile(r"(^|\\cup|,|\{)\s*\\le(?=\\?[(\[{|])")
_LOST_INFTY = re.compile(r"\\iny(?![A-Za-z])")


def repaired(label: str) -> str:
    r"""A label as it was before Minerva's normaliser took "ft" out of its `\left` and `\infty` and made `\frac9{5}` `\frac{9}{{}5}`."""
    return _LOST_INFTY.sub(r"\\infty ", _LOST_LEFT.sub(r"\1", label)).replace("}{{}", "}{")


def plain(text: str) -> str:
    """An answer without units, filler words, wrappers, spacing commands, dollar signs and thousands commas."""
    text = re.sub(r"\s+", " ", text.translate(_TRANSLATION)).strip().strip("$").removesuffix(".").strip()
    text = text.replace(r"\$", "").replace("$", "").replace('"', "")
    text = _THOUSANDS.sub(lambda m: re.sub(r"[^0-9]", "", m[0]), text)
    text = _METRES.sub(" ", _SPACING.sub(" ", _SIZES.sub("", text)))
    for _ in range(8):  # wrappers in wrappers; the bound keeps this linear
        text, count = _WRAPPER.subn(lambda m: f" {m[1] or m[2] or ''} ", text)
        if not count:
            break
    text = _PERCENT.sub(r"\\%", _DEGREES.sub("", text))
    text = _AND.sub(",", text)
    without = _UNIT.sub(" ", text)
    # "feet" alone may be the answer; "5 feet" is 5.
    text = without if re.search(r"[0-9\\]", without) else text
    return re.sub(r"\s+", " ", _ARTICLE.sub("", text.strip())).strip().removesuffix(".").rstrip(",; ")


def right_of_equals(text: str) -> str:
    """What stands right of the last equals sign, if the text is one chain of equations; else the text."""
    if "=" not in text or any(
        mark in text for mark in (",", ";", r"\le", r"\ge", r"\ne", "<", ">", " or ", " and ", "&")
    ):
        return text
    return text.rsplit("=", 1)[1].strip()


def canonical(text: str) -> str:
    r"""Hendrycks' canonical string.

    Line breaks, spaces, `\left`, `\right`, degrees, dollar and percent signs and units in `\text{ ...}` go; `\tfrac`
    and `\dfrac` become `\frac`; `\frac12`, `\sqrt3` get their braces; a/b becomes `\frac{a}{b}`, 0.5 one half, .5 0.5;
    a short left side ("k=") goes.

    Raises:
        ValueError: the text cannot be brought into the form (two units; a fraction without a denominator).
    """
    text = (
        text.replace("\n", "")
        .replace(r"\!", "")
        .replace("\\\\", "\\")
        .replace("tfrac", "frac")
        .replace("dfrac", "frac")
    )
    for gone in (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$"):
        text = text.replace(gone, "")
    before, *units = text.split(r"\text{ ")
    if len(units) > 1:
        raise ValueError(f"two units in {text!r}")
    text = (before if units else text).replace(r"\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text.startswith(".") else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _frac_braces(_sqrt_braces(text).replace(" ", ""))
    return _slash(r"\frac{1}{2}" if text == "0.5" else text)


def braced(text: str) -> str:
    r"""With the braces that `\frac12` and `\sqrt3` leave out; the text itself where that fails."""
    try:
        return _frac_braces(_sqrt_braces(text.replace("tfrac", "frac").replace("dfrac", "frac")).replace(" ", ""))
    except ValueError:
        return text


def _sqrt_braces(text: str) -> str:
    head, *rest = text.split(r"\sqrt")
    if any(not part for part in rest):
        raise ValueError(f"a root of nothing in {text!r}")
    return head + "".join(rf"\sqrt{part}" if part[0] == "{" else rf"\sqrt{{{part[0]}}}{part[1:]}" for part in rest)


def _frac_braces(text: str) -> str:
    head, *rest = text.split(r"\frac")
    parts = [head]
    for part in rest:
        if not part:
            raise ValueError(f"a fraction of nothing in {text!r}")
        if part[0] == "{":
            parts.append(part)
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            parts.append(f"{{{part[0]}}}{part[1:]}")
        else:
            parts.append(f"{{{part[0]}}}{{{part[1]}}}{part[2:]}")
    return r"\frac".join(parts)


def _slash(text: str) -> str:
    """`a/b` of two plain integers as a fraction; Hendrycks' int() fails on anything else that has one slash."""
    sides = text.split("/")
    if len(sides) != 2:
        return text
    if all(re.fullmatch(r"-?[1-9][0-9]*|0", side) for side in sides):
        return rf"\frac{{{sides[0]}}}{{{sides[1]}}}"
    if all(re.fullmatch(r"\s*[-+]?[0-9]+(?:_[0-9]+)*\s*", side) for side in sides):
        return text
    raise ValueError(f"{text!r} has a slash between other things than integers")
