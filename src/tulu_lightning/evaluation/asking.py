"""From an example to token ids, and from a completion to the text that is judged."""

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from tulu_lightning.data import chat
from tulu_lightning.data.keys import tokenizer_digest
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.task import Example, Task, digest_of

__all__ = ["Asker", "answer_text"]


class Asker:
    """Renders a model's prompts.

    Args:
        tokenizer: the model's.
        template: one of ours; None for the model's own Jinja template.
        where: the model, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: chat.ChatTemplate | None, where: str) -> None:
        self.tokenizer, self.template, self.where = tokenizer, template, where

    def check(self, tasks: Sequence[Task]) -> None:
        """Whether the tasks can be asked at all; wants no weights.

        Raises:
            InputError: a task is asked in chat, and the model has no template.
        """
        asked = next((task.name for task in tasks if task.chat), None)
        if asked is not None and self.template is None and not self.tokenizer.chat_template:
            what = f"it has no chat template, and {asked} is asked in chat"
            raise InputError(self.where, what, "Name one: --template tulu (or llama3, chatml, smollm2).")

    def check_room(self, task: Task, examples: Sequence[Example], positions: int | None, remedy: str) -> None:
        """Whether a model with so many positions (None: no such limit) can read each prompt and write its longest answer.

        Raises:
            InputError: names the item with the longest prompt, and says the remedy.
        """
        if positions is None or not examples:
            return
        if examples[0].choices:
            new, lengths = 0, [max(len(p) + len(c) for p, c in self.pairs(task, example)) for example in examples]
        else:
            new, lengths = task.max_new_tokens, list(map(len, self.prompts(task, examples)))
        longest = max(lengths)
        if longest + new > positions:
            key = examples[lengths.index(longest)].key
            answer = f" and answers up to {new}" if new else ""
            what = f"the longest prompt, {key}, has {longest} tokens{answer}; {self.where} has {positions} positions"
            raise InputError(f"task {task.name}", what, remedy)

    def digest(self, chat_too: bool) -> str:
        """Hash of what turns an example into token ids: the tokenizer, and for a chat its template."""
        template = self.tokenizer.chat_template if self.template is None else [self.template.name, self.template.jinja]
        return digest_of([self._words, template if chat_too else None])

    @cached_property
    def _words(self) -> str:
        return tokenizer_digest(self.tokenizer)

    def prompts(self, task: Task, examples: Sequence[Example]) -> list[list[int]]:
        """Token ids of what comes before the answer, `Example.prefix` included.

        Raises:
            InputError: the task is asked in chat, and the model has no template.
        """
        if not task.chat:
            texts = ["".join(turn.content for turn in example.turns) + example.prefix for example in examples]
            return [self._plain(text) for text in texts]
        return [
            [*ids, *self.continuation(e.prefix)] for ids, e in zip(self._in_chat(task, examples), examples, strict=True)
        ]

    def _in_chat(self, task: Task, examples: Sequence[Example]) -> list[list[int]]:
        messages = [[turn._asdict() for turn in example.turns] for example in examples]
        if self.template is not None:
            return [
                one.ids for one in chat.encode_many(self.tokenizer, self.template, messages, generation_prompt=True)
            ]
        self.check([task])
        texts = [self.tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
        return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]  # type: ignore[arg-type]

    def pairs(self, task: Task, example: Example) -> list[tuple[list[int], list[int]]]:
        """(prompt, choice) token ids of each choice of an example.

        Without chat, prompt and choice are tokenised together and cut where the prompt alone would end, as
        lm-evaluation-harness does; white space at the prompt's end goes to the choice. A chat template's generation
        prompt ends in control tokens, and the choice is tokenised alone.
        """
        if task.chat:
            return [(self.prompts(task, [example])[0], self.continuation(choice)) for choice in example.choices]
        text = "".join(turn.content for turn in example.turns) + example.prefix
        bare = text.rstrip()
        start = self._plain(bare)
        wholes = (self._plain(bare + text[len(bare) :] + choice) for choice in example.choices)
        return [(whole[: len(start)], whole[len(start) :]) for whole in wholes]

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=True)

    def continuation(self, text: str) -> list[int]:
        """Token ids of words that follow a prompt."""
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []


def answer_text(text: str, prefix: str, stops: Sequence[str]) -> str:
    """What is judged: the prefix and the answer up to the first stop text.

    Example: `answer_text(" 4\\n\\nQ: 3 + 3?", "Answer:", ("\\n\\n",))` is "Answer: 4".
    """
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return prefix + (text[: min(ends)] if ends else text)
