"""Tülu 3's constraint functions as they were released, wrong where they were wrong: to reproduce its rewards.

What is not kept: languages are seeded, or no reward could be computed twice; where the release stops with an error (a
text without a language), the constraint counts as not followed; arguments that a function cannot use are refused when
data are read; and a blank response, in which the release finds no comma and no capital, is unparseable.
"""

import re
from collections.abc import Callable

from tulu_lightning.verifiers import if_text
from tulu_lightning.verifiers.ifeval_schema import Rule
from tulu_lightning.verifiers.ifeval_tulu_rules import RULES as RIGHT
from tulu_lightning.verifiers.ifeval_tulu_rules import within

__all__ = ["RULES"]


def _keyword_frequency(response: str, word: str, N: int) -> bool:
    return re.findall(r"\w+", response.lower()).count(word.lower()) == N


def _forbidden_words(response: str, forbidden_words: list[str]) -> bool:
    return not any(word.lower() in response.lower() for word in forbidden_words)


def _sentences(response: str, N: int, quantifier: str) -> bool:
    # A stop, then white space; but not behind i.e. or Mr. In the release that is three lookbehinds of fixed width.
    breaks = re.findall(r"(?<=[.?])(?<!\w\.\w.)(?<![A-Z][a-z]\.)\s", response)
    return within(len(breaks) + 1, N, quantifier, 1)


def _paragraphs(response: str, N: int, first_word: str, i: int) -> bool:
    parts = response.split("\n\n")
    return len(parts) == N and parts[i - 1].strip().startswith(first_word)


def _postscript(response: str, postscript_marker: str) -> bool:
    start = response.find(postscript_marker)
    return start >= 0 and len(response[start:].strip()) > len(postscript_marker)


def _bullets(response: str, N: int) -> bool:
    return sum(line.strip().startswith(("*", "-")) for line in response.split("\n")) == N


def _title(response: str) -> bool:
    return any(0 <= line.find("<<") <= line.rfind(">>") - 2 for line in response.split("\n"))


def _highlights(response: str, N: int) -> bool:
    # Stars pair up within a line, first with second, third with fourth.
    return sum(line.count("*") // 2 for line in response.split("\n")) >= N


def _sections(response: str, N: int, section_splitter: str) -> bool:
    first, *others = response.split(section_splitter)
    return len(others) + (first != "") == N


def _two_responses(response: str) -> bool:
    if response.count("******") != 1:
        return False
    one, other = response.split("******")
    return one.strip() != other.strip()


def _capital_words(response: str, N: int, quantifier: str) -> bool:
    return within(len(re.findall(r"\b[A-Z]+\b", response)), N, quantifier, 0)


def _plain(name: str, follows: Callable[..., bool]) -> tuple[str, Rule]:
    return name, RIGHT[name]._replace(follows=follows)


RULES: dict[str, Rule] = {
    **RIGHT,
    **dict(
        (
            _plain(
                "verify_keywords", lambda text, keyword_list: all(word.lower() in text.lower() for word in keyword_list)
            ),
            _plain("verify_keyword_frequency", _keyword_frequency),
            _plain("validate_forbidden_words", _forbidden_words),
            _plain("validate_response_language", lambda text, language: if_text.language(text) == language),
            _plain("verify_sentence_constraint", _sentences),
            _plain("validate_paragraphs", _paragraphs),
            _plain("verify_postscript", _postscript),
            # A pair of a verdict and a list: true, whatever the verdict.
            _plain("validate_placeholders", lambda text, N: True),
            _plain("verify_bullet_points", _bullets),
            _plain("validate_title", _title),
            # The wrong way round: the response has to lie within an option.
            _plain("validate_choice", lambda text, options: any(text in option for option in options)),
            _plain("validate_highlighted_sections", _highlights),
            _plain("validate_sections", _sections),
            _plain("validate_repeat_prompt", lambda text, original_prompt: text.startswith(original_prompt)),
            _plain("validate_two_responses", _two_responses),
            _plain("validate_uppercase", lambda text: text == text.upper()),
            _plain("validate_lowercase", lambda text: text == text.lower()),
            _plain("validate_frequency_capital_words", _capital_words),
            _plain("validate_end", lambda text, end_phrase: text.endswith(end_phrase)),
            _plain("validate_quotation", lambda text: text.startswith('"') and text.endswith('"')),
            _plain("validate_no_commas", lambda text: "," not in text),
        )
    ),
}
"""By `func_name`; paragraph and word counts, letter frequencies and JSON were right."""
