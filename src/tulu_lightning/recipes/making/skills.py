"""What a persona is asked to make up, skill by skill, in words of our own; and how what comes back is read.

The skills and their limits are those of Tülu 3 (section 3.1 and appendix C: precise instruction following, hard maths of at most two
parts, grade-school maths, algebra, Python). Constraints are not left to the writer: they are drawn, and their sentences appended to
the request, so every row can be checked by a program.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tulu_lightning.assets.constraints import DRAWS, Constraint, Dice, ground_truth
from tulu_lightning.core.settings import require
from tulu_lightning.data.constraints import draw_constraints, with_sentences
from tulu_lightning.errors import InputError, nearest
from tulu_lightning.verifiers.code import program_of
from tulu_lightning.verifiers.registry import check_target

__all__ = ["SKILLS", "Skill", "Written", "filled", "read_request"]

PERSONA = "{persona}"


@dataclass(frozen=True)
class Skill:
    """One kind of request. A name of `SKILLS` fills what is left out; any other name is a skill of your own.

    Example: `Skill("spelling", count=100, ask="{persona} asks how a hard word is spelled. Write the request.", begins="Request:")`.
    """

    name: str
    count: int = 100
    """Requests to make."""
    ask: str | None = None
    """What the writer of requests is told; `{persona}` and `{example}` are filled in."""
    begins: str | None = None
    """What its answer has to begin with; the request is what follows."""
    examples: list[str] | None = None
    """One is drawn for each request and shown as `{example}`."""
    answer: str | None = None
    """What the writer of answers is told after the request; it does not become part of the row."""
    check: Literal["none", "constraints", "majority", "tests"] | None = None
    """How an answer is verified. `constraints`: the drawn ones. `majority`: the value that most answers state. `tests`: assertions
    that came with the request, run in the sandbox."""
    answers: int | None = None
    """Answers to sample for each request; one that passes is kept."""
    constraints: int = 3
    """With `constraints`: from 1 to so many are drawn."""
    kinds: list[str] = field(default_factory=lambda: list(DRAWS))
    """IFEval's instruction ids to draw from."""

    def whole(self) -> "Skill":
        """With what a built-in skill of that name says where this one says nothing.

        Raises:
            InputError: no built-in skill has the name and `ask` is missing, or a number is out of its range.
        """
        where = f"skill {self.name!r}"
        base = SKILLS.get(self.name, {})
        if self.ask is None and not base:
            raise InputError(where, "has no ask", f"{nearest(self.name, SKILLS)} Or say what the writer is told.")
        defaults: dict[str, Any] = {"begins": "Request:", "examples": [], "answer": "", "check": "none", "answers": 1}
        names = ("ask", *defaults)
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        made = replace(self, **{**defaults, **base, **given})
        assert made.ask is not None
        if PERSONA not in made.ask:
            raise InputError(f"{where}.ask", "does not say {persona}", "Say where the persona's description goes.")
        if "{example}" in made.ask and not made.examples:
            raise InputError(f"{where}.examples", "is empty, and ask wants {example}", "Give some, or leave it out.")
        require(made.count >= 1, f"{where}.count", made.count, "Use at least 1.")
        require((made.answers or 0) >= 1, f"{where}.answers", made.answers, "Use at least 1.")
        require(1 <= made.constraints <= 3, f"{where}.constraints", made.constraints, "Use 1 to 3.")
        if made.check == "majority":
            require((made.answers or 0) >= 2, f"{where}.answers", made.answers, "A majority needs at least 2.")
        if made.check == "constraints":
            _check_kinds(f"{where}.kinds", made.kinds)
        return made


def _check_kinds(where: str, kinds: Sequence[str]) -> None:
    """Refuse kinds that are unknown, or that this machine cannot verify, before a request is paid for."""
    if not kinds:
        raise InputError(where, "is empty", "Name at least one of IFEval's instruction ids.")
    for kind in kinds:
        if kind not in DRAWS:
            raise InputError(where, f"there is no constraint {kind!r} here", nearest(kind, DRAWS))
        for number in range(4):  # some draws of a kind need more than others
            arguments, text = DRAWS[kind](Dice(kind, number), "A request.")
            if complaint := check_target("ifeval", ground_truth("", [Constraint(kind, arguments, text)])):
                raise InputError(where, f"{kind} cannot be verified: {complaint}", "Or choose other kinds.")


_IF = """\
{persona}

Think of something that this person would ask an assistant to write, and that can be said in one request of one to three sentences.
It will be sent together with conditions on the form of the answer, so say nothing about form, length or language yourself.
Here is how such a request may look: {example}
Make up another one, about this person's own concerns. Begin with "Request:" and write nothing after the request."""
_MATH = """\
{persona}

Make up a hard, advanced problem of mathematics that arises from this person's work or interests. It asks for one final value, has at
most two parts, can be solved without tools, and all that is needed stands in it. No solution, no hint.
Begin with "Problem:" and write nothing after the problem."""
_GRADE = """\
{persona}

Make up a word problem for a child at primary school, set in this person's everyday life. It is solved by a few steps of basic
arithmetic and has a single number as its answer. No solution. Begin with "Problem:" and write nothing after the problem."""
_ALGEBRA = """\
{persona}

Make up a problem of intermediate algebra (equations, systems, polynomials, sequences or functions) that fits this person. It has a
single value as its answer, and all that is needed stands in it. No solution. Begin with "Problem:" and write nothing after it."""
_PYTHON = """\
{persona}

Make up a small programming exercise that this person would meet, for a beginner up to somebody with some practice: one Python
function, standard library alone, whose result depends on its arguments alone. Name the function and say what it takes and returns.
Begin with "Exercise: Write a Python function". Then, in a block of code (```python), write three assert statements that a right
solution passes and that need nothing but the function. Write nothing else."""
_SOLVE = (
    "\n\nWork it out step by step. Close with a line of its own: "
    "Final Answer: The final answer is $ANSWER$. I hope it is correct."
)

SKILLS: Mapping[str, Mapping[str, Any]] = {
    "precise_if": {
        "ask": _IF, "begins": "Request:", "check": "constraints", "answers": 1,
        "examples": [
            "Write a short notice for the staff about the new opening hours.",
            "Give me ideas for a birthday party in the garden.",
            "Explain to my grandmother how video calls work.",
            "Describe the town where you would most like to live.",
            "Write a few lines to thank a neighbour for watering my plants.",
        ],
    },
    "math": {"ask": _MATH, "begins": "Problem:", "answer": _SOLVE, "check": "majority", "answers": 4},
    "grade_school_math": {"ask": _GRADE, "begins": "Problem:", "answer": _SOLVE, "check": "majority", "answers": 4},
    "algebra": {"ask": _ALGEBRA, "begins": "Problem:", "answer": _SOLVE, "check": "majority", "answers": 4},
    "python": {
        "ask": _PYTHON, "begins": "Exercise:", "check": "tests", "answers": 1,
        "answer": "\n\nWrite the function and nothing else, in a block of Python code.",
    },
}  # fmt: skip
"""The paper's skills by name."""


@dataclass(frozen=True)
class Written:
    """A request as it was read, or why it cannot be used."""

    text: str = ""
    """What the user says, constraints included."""
    bare: str = ""
    """Without them."""
    constraints: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)
    """(id, arguments, sentence) of each."""
    tests: list[str] = field(default_factory=list)
    reason: str = ""
    """Empty if it can be used."""


def filled(skill: Skill, persona: str, example: str) -> str:
    """What the writer of requests is told. Braces in persona and example stay as they are."""
    assert skill.ask is not None
    parts = re.split(r"(\{persona\}|\{example\})", skill.ask)
    return "".join({PERSONA: persona, "{example}": example}.get(part, part) for part in parts)


def read_request(skill: Skill, answer: str, finish: str, seed: str) -> Written:
    """The request in an answer of the writer; what is drawn for it depends on the seed alone."""
    begins = str(skill.begins)
    text = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL).strip().lstrip("*#> ")
    if finish == "length":
        return Written(reason="the request was cut")
    if not text.lower().startswith(begins.lower()):
        return Written(reason=f"it does not begin with {begins!r}")
    text = text[len(begins) :].lstrip("* ").strip()
    if skill.check == "tests":
        return _with_tests(text)
    if not text:
        return Written(reason="the request is empty")
    if skill.check != "constraints":
        return Written(text, text)
    drawn = draw_constraints(seed, text, skill.kinds, skill.constraints)
    whole = with_sentences(text, [each.text for each in drawn])
    return Written(whole, text, [(each.id, each.arguments, each.text) for each in drawn])


def _with_tests(text: str) -> Written:
    """The exercise, and the assert statements of its block."""
    before, fence, _ = text.partition("```")
    if not fence:
        return Written(reason="there are no tests")
    tests = [line.strip() for line in program_of(text).splitlines() if line.strip().startswith("assert ")]
    if not before.strip() or not tests:
        return Written(reason="there are no tests" if before.strip() else "the request is empty")
    return Written(before.strip(), before.strip(), tests=tests)
