"""The 25 constraints of IFEval (Zhou et al. 2023, table 1) with the semantics of the official checkers.

What that means where the instruction's text leaves it open: keywords, forbidden words and section names are regular
expressions and ignore case (section names do not); relations are "less than" and "at least"; a language that cannot be
told counts as the right one. Three things differ, none of which a well-formed row sees: an argument that is missing is
refused when data are read (the official code draws one at random), so is one that is out of range, and a letter may
be any character (the official code replaces "#" and "!" of two of its rows by a random letter).

Every rule is linear in the text but those with the row's own regular expressions and those of nltk and langdetect.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tulu_lightning.verifiers import if_text
from tulu_lightning.verifiers.ifeval_schema import Rule, letter, one_of, pattern, patterns, text, whole

__all__ = ["OPTIONS", "RULES"]

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""What `detectable_format:constrained_response` allows."""
ENDS_A_WORD = frozenset(".,?!'\"")
FENCES = ("```json", "```Json", "```JSON", "```")
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
RELATION = one_of("less than", "at least")


def _compare(count: int, relation: str, limit: int) -> bool:
    return count < limit if relation == "less than" else count >= limit


def _keywords(response: str, keywords: list[str]) -> bool:
    return all(re.search(keyword, response, re.IGNORECASE) for keyword in keywords)


def _keyword_frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    found = re.findall(keyword.strip(), response, re.IGNORECASE)
    return _compare(len(found), relation, frequency)


def _forbidden_words(response: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", response, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(response.lower().count(letter.lower()), let_relation, let_frequency)


def _response_language(response: str, language: str) -> bool:
    return if_text.language(response) in (language, None)


def _sentences(response: str, num_sentences: int, relation: str) -> bool:
    return _compare(if_text.sentences(response), relation, num_sentences)


def _words(response: str, num_words: int, relation: str) -> bool:
    return _compare(if_text.words(response), relation, num_words)


def _paragraphs(response: str, num_paragraphs: int) -> bool:
    parts = _parts(response, "***")
    return parts is not None and len(parts) == num_paragraphs


def _two_responses(response: str) -> bool:
    parts = _parts(response, "******")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _parts(response: str, divider: str) -> list[str] | None:
    """Texts between dividers, stripped; None when two dividers have nothing between them. Outer ones may be blank."""
    first, *inner = (part.strip() for part in response.split(divider))
    last = [inner.pop()] if inner else []
    if not all(inner):
        return None
    return [part for part in (first, *inner, *last) if part]


def _nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in response.split("\n\n")]
    if sum(map(bool, parts)) != num_paragraphs:
        return False
    # Blank parts count for the place though not for the number: that is the official reading.
    part = parts[nth_paragraph - 1]
    if not part:
        return False
    word = part.split()[0].lstrip("'").lstrip('"')
    end = next((place for place, mark in enumerate(word) if mark in ENDS_A_WORD), len(word))
    return word[:end].lower() == first_word.lower()


def _placeholders(response: str, num_placeholders: int) -> bool:
    return len(if_text.brackets(response)) >= num_placeholders


def _postscript(response: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    return re.search(POSTSCRIPTS.get(marker, marker.lower()), response.lower()) is not None


def _bullets(response: str, num_bullets: int) -> bool:
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def _constrained_response(response: str) -> bool:
    return any(option in response for option in OPTIONS)


def _highlights(response: str, num_highlights: int) -> bool:
    single = (span[1:-1] for span in re.findall(r"\*[^\n*]*\*", response))
    double = (span[2:-2] for span in re.findall(r"\*\*[^\n*]*\*\*", response))
    return sum(bool(span.strip()) for span in (*single, *double)) >= num_highlights


def _sections(response: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"(?:{section_spliter.strip()})\s?\d+", response)) >= num_sections


def _json(response: str) -> bool:
    value = response.strip()
    for fence in FENCES:
        value = value.removeprefix(fence)
    try:
        json.loads(value.removesuffix("```").strip())
    except (ValueError, RecursionError):  # brackets nested by the thousand are no answer either
        return False
    return True


def _title(response: str) -> bool:
    for line in response.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def _repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_words(response: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(token.isupper() for token in if_text.tokens(response))
    return _compare(count, capital_relation, capital_frequency)


def _capital(response: str) -> bool:
    return response.isupper() and if_text.language(response) in ("en", None)


def _lowercase(response: str) -> bool:
    return response.islower() and if_text.language(response) in ("en", None)


def _no_comma(response: str) -> bool:
    return "," not in response


def _quotation(response: str) -> bool:
    value = response.strip()
    return len(value) > 1 and value[0] == value[-1] == '"'


def _place_complaint(arguments: Mapping[str, Any]) -> str | None:
    place, count = arguments["nth_paragraph"], arguments["num_paragraphs"]
    return f"nth_paragraph is {place}, and there are to be {count} paragraphs" if place > count else None


def _needs_nltk(arguments: Mapping[str, Any]) -> str | None:
    del arguments
    return if_text.missing_data()


def _rule(follows: Callable[..., bool], **arguments: Any) -> Rule:
    return Rule(follows, arguments)


RULES: dict[str, Rule] = {
    "keywords:existence": _rule(_keywords, keywords=patterns),
    "keywords:frequency": _rule(_keyword_frequency, keyword=pattern, frequency=whole(), relation=RELATION),
    "keywords:forbidden_words": _rule(_forbidden_words, forbidden_words=patterns),
    "keywords:letter_frequency": _rule(_letter_frequency, letter=letter, let_frequency=whole(), let_relation=RELATION),
    "language:response_language": _rule(_response_language, language=text),
    "length_constraints:number_sentences": Rule(
        _sentences, {"num_sentences": whole(), "relation": RELATION}, _needs_nltk
    ),
    "length_constraints:number_paragraphs": _rule(_paragraphs, num_paragraphs=whole(1)),
    "length_constraints:number_words": _rule(_words, num_words=whole(), relation=RELATION),
    "length_constraints:nth_paragraph_first_word": Rule(
        _nth_paragraph_first_word,
        {"num_paragraphs": whole(1), "nth_paragraph": whole(1), "first_word": text},
        _place_complaint,
    ),
    "detectable_content:number_placeholders": _rule(_placeholders, num_placeholders=whole()),
    "detectable_content:postscript": _rule(_postscript, postscript_marker=pattern),
    "detectable_format:number_bullet_lists": _rule(_bullets, num_bullets=whole()),
    "detectable_format:constrained_response": _rule(_constrained_response),
    "detectable_format:number_highlighted_sections": _rule(_highlights, num_highlights=whole()),
    "detectable_format:multiple_sections": _rule(_sections, section_spliter=pattern, num_sections=whole()),
    "detectable_format:json_format": _rule(_json),
    "detectable_format:title": _rule(_title),
    "combination:two_responses": _rule(_two_responses),
    "combination:repeat_prompt": _rule(_repeat_prompt, prompt_to_repeat=text),
    "startend:end_checker": _rule(_end, end_phrase=text),
    "startend:quotation": _rule(_quotation),
    "change_case:capital_word_frequency": Rule(
        _capital_words, {"capital_frequency": whole(), "capital_relation": RELATION}, _needs_nltk
    ),
    "change_case:english_capital": _rule(_capital),
    "change_case:english_lowercase": _rule(_lowercase),
    "punctuation:no_comma": _rule(_no_comma),
}
"""By the official instruction id."""
