r"""MATH as Tülu 3's release verified it, mistakes and all: to reproduce its numbers, not to train with.

What is wrong with it: the normaliser deletes units and "ft" as substrings, inside commands and words too (`\left(` becomes
`\le(`), takes everything up to the last "=" away ("x=1,y=2" is 2) and joins lists of integers ("1,2" is 12); sympy's
LaTeX parser stops without a word at what it cannot read ("5, 6" is 5); percent signs, and units behind `\text{ `, are
dropped whatever they say; any right one of several stated answers is enough; and nothing is unparseable.

Two differences remain. The release gave sympy five seconds by a signal, which works in a main thread only; here the
scoring pool ends it. And it asked sympy first, then compared strings; here strings come first: same verdicts, sooner.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.math_equal import hendrycks_equal

__all__ = ["MathRelease", "minerva_normal"]

# Lewkowycz et al. (2022), appendix D.
_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"), (",\\text{and}", ","),
    ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)  # fmt: skip
_UNWRAPPED = (r"\\text\{(.*?)\}", r"\\textbf\{(.*?)\}", r"\\overline\{(.*?)\}", r"\\boxed\{(.*)\}")
_SENTENCE = re.compile(r"Final Answer: The final answer is(.*?). I hope it is correct.")


def minerva_normal(answer: str) -> str:
    """The answer by the normaliser of Lewkowycz et al. (2022), appendix D, to the letter."""
    answer = answer.split("=")[-1]
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for gone in _REMOVED:
        answer = answer.replace(gone, "")
    if "$" in answer:  # what the next line can match at all
        answer = re.sub(r"(.*?)\$(.*?)\$(.*)", r"$\2$", answer)
    for wrapper in _UNWRAPPED:
        answer = re.sub(wrapper, r"\1", answer)
    answer = re.sub(r"(frac)([^{])(.)", r"frac{\2}{\3}", answer)
    answer = re.sub(r"(sqrt)([^{])", r"sqrt{\2}", answer).replace("$", "")
    return answer.replace(",", "") if answer.replace(",", "").isdigit() else answer


def _box(text: str) -> str | None:
    r"""Content of the last `\boxed`, or of the last `\fbox` if there is none; `\boxed ` wins wherever it stands."""
    if r"\boxed " in text:
        return text.split(r"\boxed ")[-1].split("$")[0]
    start = text.rfind(r"\boxed")
    if start < 0:
        # The release took the content out of \boxed only: an \fbox counted as no answer.
        return None
    depth = 0
    for at in range(start, len(text)):
        if text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                whole = text[start : at + 1]
                return whole[len(r"\boxed{") : -1] if whole.startswith(r"\boxed{") else None
    return None


def _answers(response: str) -> list[str]:
    answers = [box] if (box := _box(response)) is not None else []
    if sentence := _SENTENCE.search(response):
        answers.append(minerva_normal(sentence[1].strip()))
    if not answers and response.count("$") > 1:
        answers.append(minerva_normal(response.split("$")[-2]))
    return answers or [minerva_normal(response)]


@cache
def _classes() -> tuple[Any, ...]:
    """What sympy's `parse_latex` is made of. The function itself refuses every antlr but 4.11; 4.13 runs the code too."""
    from sympy.parsing.latex._antlr.latexlexer import CommonTokenStream, InputStream, LaTeXLexer  # type: ignore[attr-defined]
    from sympy.parsing.latex._antlr.latexparser import LaTeXParser
    from sympy.parsing.latex._parse_latex_antlr import MathErrorListener, convert_relation

    class Lexer(LaTeXLexer):
        def checkVersion(self, toolVersion: str) -> None:
            """Quietly: the runtime prints when it is not the generator's version."""

    class Parser(LaTeXParser):
        def checkVersion(self, toolVersion: str) -> None:
            """Quietly."""

    return InputStream, Lexer, CommonTokenStream, Parser, MathErrorListener, convert_relation


def _parsed(text: str) -> Any:
    """As sympy's own `parse_latex` reads it, which is its longest readable beginning; raises for what it cannot read."""
    stream, lexer_class, token_stream, parser_class, error_listener, convert = _classes()
    text = text.strip()
    errors = error_listener(text)
    lexer = lexer_class(stream(text))
    parser = parser_class(token_stream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(errors)
    return convert(parser.math().relation())


def _sympy_equal(one: str, other: str) -> bool:
    import sympy

    try:
        return bool(sympy.simplify(_parsed(one) - _parsed(other)) == 0)
    except Exception:  # as in the release: any failure is "not equal"
        return False


@dataclass(frozen=True)
class MathRelease:
    """Right when any stated answer equals the target as Tülu 3's release compared; everything else is wrong."""

    runs: ClassVar = "pool"

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0. Unguarded, as the release: call it where it can be killed."""
        answers = _answers(response)
        if any(hendrycks_equal(answer, target) for answer in answers):
            return Verdict("right", 1.0)
        if any(_sympy_equal(answer, target) for answer in answers):
            return Verdict("right", 1.0)
        return Verdict("wrong", 0.0)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        return None if target.strip() else f"{target!r} is blank: no response can be right"
