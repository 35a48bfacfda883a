"""The 25 constraints in the schema of Tülu 3's RLVR data (`func_name` and arguments), judged right.

The instruction's own text decides. What is a definition there is kept, though official IFEval has relations instead:
exactly N of a word, a letter (upper and lower case apart), bullet points, sections or paragraphs; at least N
placeholders and highlights; "around" is within a tenth of N, at least 1, for words and capital words, and within 1 for
sentences; paragraphs are divided by `* * *`; keywords are plain text, found inside words too; what must be repeated or
ended with must be exact. Mistakes of the release that are mended here (`ifeval_tulu_release` has them):

| function | the release |
|---|---|
| validate_placeholders | always passes (it returns a pair, which is true) |
| validate_choice | asks whether the response is a part of an option: "yes" passes, "My answer is yes" does not |
| validate_forbidden_words | finds "can" in "candle" |
| verify_keyword_frequency | never finds a word with a hyphen or an apostrophe, or two words |
| validate_response_language | draws at random, fails where no language shows, never equals "zh" |
| verify_sentence_constraint | ends none at "!" or at a stop in quotation marks, one at the number of a list's item |
| validate_paragraphs | counts blank paragraphs, takes "Therefore" for "The" and not "the" |
| verify_bullet_points | counts lines in bold, rules and "-5" as bullet points |
| validate_title | takes `<<>>` |
| validate_highlighted_sections | counts "**" as a highlight of nothing, and a bullet with a star behind it |
| validate_sections | counts pieces between the splitter wherever it occurs, so an introduction is a section |
| validate_two_responses | takes a blank one for the other |
| validate_uppercase, validate_lowercase | take text without a letter; fail on letters without an upper case |
| validate_frequency_capital_words | "around" is exact; É is no capital; "DON'T" is two words |
| validate_end, validate_repeat_prompt | never match a phrase with white space around it |
| validate_quotation | takes one mark for two |
| validate_no_commas | knows only the Latin comma |
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from tulu_lightning.verifiers import if_text
from tulu_lightning.verifiers.ifeval_rules import RULES as OFFICIAL
from tulu_lightning.verifiers.ifeval_schema import Rule, letter, one_of, text, texts, whole

__all__ = ["RULES", "options", "within"]

QUANTIFIER = one_of("at least", "around", "at most")
STOP = re.compile(r"[.?!][\"'”’)\]]*\s")
NO_STOP = re.compile(r"(?:\b[A-Za-z]\.[A-Za-z]|\b[A-Z][a-z]|\bMrs|\bProf|\n[ \t]*[0-9]{1,2})\.\Z")
"""Where no sentence ends: behind an abbreviation (e.g., U.S., Mr.) and behind the number of a list's item."""
HIGHLIGHT = re.compile(r"(?<!\*)(\*{1,3})(?![\s*])[^*\n]*(?<!\s)\1(?!\*)")
RULE_LINE = re.compile(r"[*\-\s]+\Z")
COMMAS = frozenset(",，、،")


def within(count: int, N: int, quantifier: str, tolerance: int) -> bool:
    """Whether a count is at least, at most or around N."""
    if quantifier == "around":
        return abs(count - N) <= tolerance
    return count >= N if quantifier == "at least" else count <= N


def _tenth(N: int) -> int:
    return max(round(N * 0.1), 1)


def _alone(word: str) -> str:
    """Pattern of a word or phrase that is not part of a longer one."""
    return rf"(?<!\w){re.escape(word.strip())}(?!\w)"


def _keywords(response: str, keyword_list: list[str]) -> bool:
    return all(keyword.strip().lower() in response.lower() for keyword in keyword_list)


def _keyword_frequency(response: str, word: str, N: int) -> bool:
    return len(re.findall(_alone(word.lower()), response.lower())) == N


def _forbidden_words(response: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(_alone(word.lower()), response.lower()) for word in forbidden_words)


def _letter_frequency(response: str, letter: str, N: int) -> bool:
    return response.count(letter) == N


def _language(response: str, language: str) -> bool:
    found = if_text.language(response)
    return found is not None and language in (found, found.partition("-")[0])


def _paragraph_count(response: str, N: int) -> bool:
    parts = "\n".join(line.strip() for line in response.splitlines()).split("* * *")
    return len(parts) == N and all(part.strip() for part in parts)


def _words(response: str, N: int, quantifier: str) -> bool:
    return within(len(response.split()), N, quantifier, _tenth(N))


def _sentences(response: str, N: int, quantifier: str) -> bool:
    text = f"\n{response}"
    # A stop is looked at with a few characters before it, so that the whole stays linear.
    ends = (text[max(0, stop.start() - 6) : stop.start() + 1] for stop in STOP.finditer(text))
    count = 1 + sum(not NO_STOP.search(end) for end in ends)
    return within(count, N, quantifier, 1)


def _paragraphs(response: str, N: int, first_word: str, i: int) -> bool:
    parts = [part.strip() for part in response.split("\n\n") if part.strip()]
    return (
        len(parts) == N and re.match(rf"{re.escape(first_word.strip())}(?!\w)", parts[i - 1], re.IGNORECASE) is not None
    )


def _postscript(response: str, postscript_marker: str) -> bool:
    _, marker, behind = response.partition(postscript_marker.strip())
    return bool(marker and behind.strip())


def _placeholders(response: str, N: int) -> bool:
    return len(if_text.brackets(response)) >= N


def _bullets(response: str, N: int) -> bool:
    lines = (line.strip() for line in response.split("\n"))
    return sum(bool(re.match(r"[*-]\s", line)) and not RULE_LINE.match(line) for line in lines) == N


def _choice(response: str, options: list[str]) -> bool:
    # Longest first: an option that is part of another ("no", "no idea") is not found inside it.
    ordered = sorted({option.strip() for option in options}, key=len, reverse=True)
    return len(set(re.findall("|".join(map(_alone, ordered)), response))) == 1


def _highlights(response: str, N: int) -> bool:
    return sum(1 for _ in HIGHLIGHT.finditer(response)) >= N


def _sections(response: str, N: int, section_splitter: str) -> bool:
    heads = rf"^[ \t#*_>\-]*{re.escape(section_splitter.strip())}[ \t]*(?:\d+|[IVXLC]+|[A-Z])(?!\w)"
    return len(re.findall(heads, response, re.MULTILINE)) == N


def _repeat_prompt(response: str, original_prompt: str) -> bool:
    return response.strip().startswith(original_prompt.strip())


def _two_responses(response: str) -> bool:
    parts = [part.strip() for part in response.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _capital_words(response: str, N: int, quantifier: str) -> bool:
    count = sum(word.isupper() for word in re.findall(r"\w+(?:['’-]\w+)*", response))
    return within(count, N, quantifier, _tenth(N))


def _end(response: str, end_phrase: str) -> bool:
    return response.strip().endswith(end_phrase.strip())


def _quotation(response: str) -> bool:
    value = response.strip()
    return len(value) > 2 and value[0] == value[-1] == '"' and bool(value[1:-1].strip())


def _json(response: str) -> bool:
    # No ticks around it: Tülu's wording of the instruction, unlike the official one, does not offer them.
    try:
        json.loads(response)
    except (ValueError, RecursionError):
        return False
    return True


def options(value: Any) -> list[str]:
    """A list of options, or one text that names them: (yes, no or maybe)."""
    if isinstance(value, str):
        value = [part for part in re.split(r"[,/\n]|\bor\b", value.strip().strip("()[]")) if part.strip()]
    return texts(value)


def _place_complaint(arguments: Mapping[str, Any]) -> str | None:
    place, count = arguments["i"], arguments["N"]
    return f"i is {place}, and there are to be {count} paragraphs" if place > count else None


RULES: dict[str, Rule] = {
    "verify_keywords": Rule(_keywords, {"keyword_list": texts}),
    "verify_keyword_frequency": Rule(_keyword_frequency, {"word": text, "N": whole()}),
    "validate_forbidden_words": Rule(_forbidden_words, {"forbidden_words": texts}),
    "verify_letter_frequency": Rule(_letter_frequency, {"letter": letter, "N": whole()}),
    "validate_response_language": Rule(_language, {"language": text}),
    "verify_paragraph_count": Rule(_paragraph_count, {"N": whole(1)}),
    "validate_word_constraint": Rule(_words, {"N": whole(), "quantifier": QUANTIFIER}),
    "verify_sentence_constraint": Rule(_sentences, {"N": whole(), "quantifier": QUANTIFIER}),
    "validate_paragraphs": Rule(_paragraphs, {"N": whole(1), "first_word": text, "i": whole(1)}, _place_complaint),
    "verify_postscript": Rule(_postscript, {"postscript_marker": text}),
    "validate_placeholders": Rule(_placeholders, {"N": whole()}),
    "verify_bullet_points": Rule(_bullets, {"N": whole()}),
    "validate_title": OFFICIAL["detectable_format:title"],
    "validate_choice": Rule(_choice, {"options": options}),
    "validate_highlighted_sections": Rule(_highlights, {"N": whole()}),
    "validate_sections": Rule(_sections, {"N": whole(), "section_splitter": text}),
    "validate_json_format": Rule(_json),
    "validate_repeat_prompt": Rule(_repeat_prompt, {"original_prompt": text}),
    "validate_two_responses": Rule(_two_responses),
    "validate_uppercase": Rule(str.isupper),
    "validate_lowercase": Rule(str.islower),
    "validate_frequency_capital_words": Rule(_capital_words, {"N": whole(), "quantifier": QUANTIFIER}),
    "validate_end": Rule(_end, {"end_phrase": text}),
    "validate_quotation": Rule(_quotation),
    "validate_no_commas": Rule(lambda response: COMMAS.isdisjoint(response)),
}
"""By the release's `func_name`."""
