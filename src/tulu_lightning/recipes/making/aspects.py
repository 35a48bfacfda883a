"""What a judge is asked, in words of our own, and how its answer is read.

Four aspects, each rated 1 to 5 in a call of its own that lists all responses (Tülu 3, section 5.2.1; the aspects are
UltraFeedback's).
"""

import random
import re
from collections.abc import Mapping, Sequence

from tulu_lightning.core.binarise import NOT_APPLICABLE, Rating
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.data.chat import Message

__all__ = ["ASPECTS", "LAYOUT", "SLOTS", "SYSTEM", "order_shown", "questionnaire", "read_ratings"]

ASPECTS: Mapping[str, str] = {
    "helpfulness": """\
How much does the text help the person who asked? Weigh whether it gets to what they need, whether it is complete without
padding, and whether they could act on it.
1: no help at all, or harmful. 2: touches the question and leaves most of it open. 3: useful in part. 4: answers it well,
with small gaps. 5: could hardly be more useful.""",
    "instruction_following": """\
How exactly does the text do what the instruction asks? Weigh the task itself and every stated condition: length, form,
language, things to include or to leave out. Do not weigh anything that was not asked.
1: ignores the instruction. 2: meets few conditions. 3: does the task but breaks some conditions. 4: one small miss.
5: everything is met.""",
    "honesty": """\
Does the text claim as much certainty as it can have? Weigh whether it admits what it does not know, and whether a
confident tone is deserved. For tasks of invention, where nothing is claimed, rate N/A.
1: confidently wrong throughout. 2: often surer than it can be, or evasive where the answer is known. 3: mixed.
4: nearly always right about its own certainty. 5: sure where it is right, open where it is not.""",
    "truthfulness": """\
Is what the text says true, and does it hold together? Weigh facts, reasoning, numbers, and whether it stays with what the
instruction gives. Something made up counts as false.
1: false or made up for the most part. 2: several serious errors. 3: right in the main, with an error that matters.
4: a slip that changes nothing. 5: no error found.""",
}
"""Rubric by aspect."""

SYSTEM = """\
You rate texts that were written as answers to one instruction. Look at one aspect only. Judge each text by itself; their
order means nothing, and neither does their length unless the instruction asks for one."""
LAYOUT = """\
## Aspect: {aspect}
{rubric}

## Instruction
{instruction}

{texts}
## Your ratings
For each text write one line "Text N: R", where R is a whole number from 1 to 5{or_na}, and after it, on a line of its own,
the reason in one sentence. Write nothing else."""


SLOTS = ("aspect", "rubric", "or_na", "instruction", "texts")
"""What a layout may name between braces; without the last two nothing could be judged."""


def questionnaire(
    aspect: str,
    rubric: str,
    messages: Sequence[Message],
    responses: Sequence[str],
    layout: str = LAYOUT,
    system: str = SYSTEM,
) -> list[Message]:
    """The conversation that a judge gets: all responses to one prompt, one aspect.

    Args:
        aspect: its name.
        rubric: what the numbers mean.
        messages: the prompt.
        responses: in the order in which they are to be shown.
        layout: of the question, with the `SLOTS` between braces.
        system: what stands before it; no system message if empty.
    """
    if len(messages) == 1:
        instruction = messages[0]["content"]
    else:
        instruction = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
    values = {
        "aspect": aspect.replace("_", " "),
        "rubric": rubric,
        "or_na": " or N/A" if "N/A" in rubric else "",
        "instruction": instruction,
        "texts": "".join(f"## Text {number}\n{text}\n\n" for number, text in enumerate(responses, start=1)),
    }
    # All at once, so that braces in what people wrote are not taken for slots.
    asked = re.sub("|".join(rf"\{{{name}\}}" for name in SLOTS), lambda slot: values[slot[0][1:-1]], layout)
    before: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": asked}]


_VALUE = r"(N\s?/\s?A|\d{1,3}(?:\.\d{1,3})?)(?:\s{0,3}/\s{0,3}5(?:\.0)?)?(?![\w./])"
_DRESS = r"[\s\"'*_`:#=()\[\]-]{0,20}"
_NUMBERED = re.compile(
    rf"(?:\b(?:text|response|answer|output)\b|#){_DRESS}(\d{{1,3}})\b{_DRESS}(?:(?:rating|score)\b{_DRESS})?{_VALUE}",
    re.IGNORECASE,
)
_AT_START = re.compile(
    rf"^[\s*_>-]{{0,10}}(?:text|response|answer|output)[\s#*_]{{1,4}}(\d{{1,3}})[\s*_`\"')\]]{{0,10}}[:=–-]{_DRESS}"
    rf"(?:(?:rating|score)\b{_DRESS})?{_VALUE}",
    re.IGNORECASE | re.MULTILINE,
)
"""The form that is asked for, at the start of a line: what a reason says of another text further on is no rating."""
_LABELLED = re.compile(rf"\b(?:rating|score)s?\b{_DRESS}{_VALUE}", re.IGNORECASE)
_LISTED = re.compile(rf"^\s{{0,5}}(\d{{1,3}})\s{{0,3}}[.):]\s{{0,5}}{_VALUE}\s{{0,5}}$", re.IGNORECASE | re.MULTILINE)
_ALONE = re.compile(rf"^{_DRESS}{_VALUE}[\s*_`.]{{0,5}}$", re.IGNORECASE | re.MULTILINE)


def order_shown(count: int, *seed: int) -> list[int]:
    """In which order texts are shown: drawn, and in the second round that of the first one turned round.

    Two draws of two texts are the same half of the time, and the same question twice is no judge against itself.
    """
    *where, number = seed
    order = list(range(count))
    random.Random(mix_seed(where[0], 2, *where[1:], number - number % 2)).shuffle(order)
    return order[::-1] if number % 2 else order


def read_ratings(answer: str, count: int, scale: tuple[int, int] = (1, 5)) -> list[Rating]:
    """The rating of each text in a judge's answer, in the order shown; None where there is none.

    Reads, in this order, the first form that gives any: `Text 2: 4` at the start of a line, then anywhere (also response, answer, `#2`; with `rating` between;
    `4/5`); `2. 4` alone on a line; `Rating: 4` once for each text, in order; one number a line for each text. What a
    reasoning model wrote up to `</think>` does not count. A number that is not whole or off the scale is no rating; of
    two for one text the last counts.

    Args:
        answer: the judge's words.
        count: texts that it was shown.
        scale: lowest and highest rating.
    """
    answer = answer.rpartition("</think>")[2]
    for pattern in (_AT_START, _NUMBERED, _LISTED):
        found = {int(number): value for number, value in pattern.findall(answer)}
        if found:
            return [_rating(found.get(number), scale) for number in range(1, count + 1)]
    for pattern in (_LABELLED, _ALONE):
        values = pattern.findall(answer)
        if len(values) == count:
            return [_rating(value, scale) for value in values]
    return [None] * count


def _rating(value: str | None, scale: tuple[int, int]) -> Rating:
    if value is None:
        return None
    if value.upper().replace(" ", "") == NOT_APPLICABLE:
        return NOT_APPLICABLE
    number = float(value)
    return number if number.is_integer() and scale[0] <= number <= scale[1] else None
