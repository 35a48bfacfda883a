"""What is not given to sympy: text whose value or tree would take minutes or gigabytes, told from the text alone.

The scoring pool can kill a worker, but each kill costs a time limit. The limits here lie far beyond the answers of
mathematics problems (the longest of MATH's 5,000 has 72 characters, the largest exponent is 2007), so what is refused is
not equal to any sane label.
"""

import re

__all__ = ["refusal", "unevaluated"]

MAX_CHARACTERS = 400
MAX_DEPTH = 25
MAX_DIGITS = 100
MAX_EXPONENT = 100_000
MAX_FACTORIAL = 10_000
MAX_SYMBOLIC_POWER = 200

_DIGITS = re.compile(r"[0-9]+")
_UNEVALUATED = re.compile(r"\\(?:sum|prod|int|iint|iiint|oint|lim)(?![A-Za-z])")
_FACTORIAL_OF = re.compile(r"([0-9]+|[)\]}!])(?=\s*!)")
_BINOMIAL = re.compile(r"\\[dt]?binom")


def refusal(text: str) -> str | None:
    """Why the text is not parsed as mathematics (e.g. "a tower of exponents"), or None if it may be."""
    if len(text) > MAX_CHARACTERS:
        return f"longer than {MAX_CHARACTERS} characters"
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        return "half a surrogate pair"
    if any(len(digits) > MAX_DIGITS for digits in _DIGITS.findall(text)):
        return f"a number of more than {MAX_DIGITS} digits"
    if _depth(text) > MAX_DEPTH:
        return f"brackets nested deeper than {MAX_DEPTH}"
    if len(_UNEVALUATED.findall(text)) > 1:
        return "several sums, products, integrals or limits"
    return _factorials(text) or _exponents(text)


def unevaluated(text: str) -> bool:
    """Whether the text holds a sum, product, integral or limit that is still to be worked out."""
    return _UNEVALUATED.search(text) is not None


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def _factorials(text: str) -> str | None:
    for match in _FACTORIAL_OF.finditer(text):
        of = match[1]
        if of == "!" or (of in ")]}" and re.search(r"[0-9]{3}|!", text[: match.start(1)])):
            return "a factorial of a factorial or of a large expression"
        if of.isdigit() and int(of) > MAX_FACTORIAL:
            return f"a factorial over {MAX_FACTORIAL}"
    if _BINOMIAL.search(text) and any(int(digits) > MAX_FACTORIAL for digits in _DIGITS.findall(text)):
        return f"a binomial over {MAX_FACTORIAL}"
    return None


def _exponents(text: str) -> str | None:
    """Judges each exponent with what is raised to it; `**` is read as `^`."""
    text = re.sub(r"\s+", "", text.replace("**", "^"))
    budget = MAX_EXPONENT
    for at, character in enumerate(text):
        if character != "^":
            continue
        exponent = _exponent(text, at + 1)
        numbers = [int(digits) for digits in _DIGITS.findall(exponent)]
        largest = max(numbers, default=0)
        tower = "^" in exponent or "!" in exponent
        if tower and (largest > 9 or (largest > 3 and not re.search(r"[A-Za-z]", exponent))):
            return "a tower of exponents"
        if largest > MAX_EXPONENT:
            return f"an exponent over {MAX_EXPONENT}"
        if text[at - 1 : at] in (")", "]", "}"):
            # A power of a group is expanded, or the power of a power.
            if largest > MAX_SYMBOLIC_POWER and re.search(r"[A-Za-z+\-^]", text[:at]):
                return f"a group to a power over {MAX_SYMBOLIC_POWER}"
            budget //= max(largest, 1)
            if budget == 0:
                return "powers of powers"
    return None


def _exponent(text: str, start: int) -> str:
    """The exponent that starts there: a group, with what is raised within and after it, or a number or letter."""
    end, depth = start, 0
    while end < len(text):
        character = text[end]
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth < 0:
                break
        end += 1
        if depth == 0 and not (end < len(text) and text[end] in "^!0123456789" and _goes_on(character, text[end])):
            break
    return text[start:end]


def _goes_on(last: str, following: str) -> bool:
    """Whether an exponent goes on: digits after a digit, and anything after, or before, a caret or factorial."""
    return following in "^!" or last in "^-" or (last.isdigit() and following.isdigit())
