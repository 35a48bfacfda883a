"""The template doctor: is what the model will be trained on what the conversations say?

It looks at the token ids and weights that `encode_many` gave, decodes them and holds them against the messages. How they
were made does not matter to it, so a template, a tokenizer or an encoder that is wrong shows, whatever the reason.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tulu_lightning.data.checkup import Bos, Checkup
from tulu_lightning.data.encoding import encode_many
from tulu_lightning.data.templates import ChatTemplate, Message
from tulu_lightning.errors import InputError

__all__ = ["PROBES", "RULES", "Bos", "Finding", "Named", "check", "examine", "probes", "stop_on"]

Named = tuple[str, Sequence[Message]]
"""What findings call a conversation, and its messages."""

RULES = {
    "bos": "a conversation has one BOS token, its first, or none, as the template says",
    "end": "every assistant turn ends in a token that generation stops on",
    "end-trained": "the token that ends an assistant turn is trained",
    "answer": "the words of every assistant turn are trained, with the message's weight",
    "context": "no token of a user or system turn is trained",
    "prefix": "what stands before a turn does not change when turns are added",
    "prompt": "the generation prompt is what stands before an answer",
    "special": "special tokens do not come from the text of messages",
    "text": "the tokens decode to the text that was rendered, and it holds every message",
}
"""What must hold, by the name that findings use."""

REMEDIES = {
    "end": "Use a template whose end of turn is in the generation config's eos_token_id, or add it there.",
    "special": "Mark these tokens as special in the tokenizer (special: true), or take them out of the rows.",
}
REMEDY = "Correct the chat template, or use one of ours (tulu, llama3, chatml, smollm2)."


class Finding(NamedTuple):
    """A rule that does not hold."""

    rule: str
    """A key of `RULES`."""
    where: str
    """Which row or probe."""
    detail: str
    """What was found there, with a short excerpt."""


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


PROBES: tuple[tuple[str, tuple[Message, ...]], ...] = (
    ("single turn", (_user("What is 1 + 1?"), _assistant("It is 2."))),
    (
        "two turns",
        (_user("Name a colour."), _assistant("Blue!"), _user("Another\none?"), _assistant("Très bien: 赤 🚀")),
    ),
    ("with a system message", ({"role": "system", "content": "Be brief."}, _user("Hello"), _assistant("Hi."))),
    ("ending in a question", (_user("Who?"), _assistant("Me."), _user("Why?"))),
)
"""Small conversations that every template must get right."""


def probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Sequence[Message]]]:
    """`PROBES`, and one whose messages hold every special token of the tokenizer."""
    for name, messages in PROBES:
        yield f"probe {name!r}", messages
    words = " ".join(sorted(set(tokenizer.all_special_tokens)))
    yield "probe 'special tokens in messages'", (_user(f"a {words} b"), _assistant(f"c {words} d"))


def examine(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    rows: Iterable[tuple[str, Sequence[Message]]],
    stops: Sequence[int],
    bos: Bos | None = None,
) -> list[Finding]:
    """Look at how conversations come out of a template and a tokenizer.

    Args:
        tokenizer: that of the model.
        template: bound to it.
        rows: names and messages; begin with `probes(tokenizer)`.
        stops: ids that end generation.
        bos: whether conversations have one BOS token or none; as the template says if left out.

    Returns:
        Findings, in the order of the rows; empty if every rule holds.
    """
    named = list(rows)
    checkup = Checkup(tokenizer, template, frozenset(stops), bos or ("one" if template.bos else "none"))
    encoded = encode_many(tokenizer, template, [messages for _, messages in named])
    return [
        Finding(rule, where, detail)
        for (where, messages), row in zip(named, encoded, strict=True)
        for rule, detail in checkup.row(messages, row)
    ]


def stop_on(findings: Sequence[Finding]) -> None:
    """Stop the run at the first finding.

    Raises:
        InputError: there is one; it names the row, the rule and what was found.
    """
    if findings:
        rule, where, detail = findings[0]
        others = len(findings) - 1
        more = f" ({others} more finding{'s' * (others > 1)})" if others else ""
        what = f"it breaks the template rule {rule!r} ({RULES[rule]}): {detail}{more}"
        raise InputError(where, what, REMEDIES.get(rule, REMEDY))


def _refuses_system(template: ChatTemplate, messages: Sequence[Message]) -> bool:
    """Whether a probe has a system message and the template takes none, as Gemma's; a row that has one is refused."""
    if messages[0]["role"] != "system":
        return False
    try:
        template.render(messages)
    except InputError:
        return True
    return False


def check(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, stops: Sequence[int], rows: Sequence[Named]
) -> str:
    """Examine the probes and some rows, and stop at the first finding.

    Returns:
        What was looked at, in a sentence.

    Raises:
        InputError: a rule does not hold.
    """
    tried = [probe for probe in probes(tokenizer) if not _refuses_system(template, probe[1])]
    stop_on(examine(tokenizer, template, [*tried, *rows], stops))
    of_rows = f" and {len(rows)} rows" if rows else ""
    return f"template doctor: all {len(RULES)} rules hold on {len(tried)} probes{of_rows} ({', '.join(RULES)})"
