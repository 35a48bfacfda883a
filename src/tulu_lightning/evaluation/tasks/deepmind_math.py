"""DeepMind Mathematics (Saxton et al. 2019) as `deepmind_math:0shot_cot-v3::tulu3` of OLMES: 100 questions a category.

The prompt shows three answers of the category, so that the form is known. They are those of the first three rows after the
hundred that are asked.
"""

from collections.abc import Sequence

from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.math_expression import MathExpression
from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["DATA", "DEEPMIND_MATH"]

PER_CATEGORY, SHOWN = 100, 3
DESCRIPTION = "Solve the following math problem efficiently:\n"
CONCLUDE = (
    '\n\nShow your work and conclude with the exact phrasing "Therefore, the final answer is [answer]. I hope it is '
    'correct." where [answer] is just the final number, expression, or answer label representing the solution.  Some '
    "example answers from this question category:\n"
)
SHOW = '- If the answer is {0}, conclude with "Therefore, the final answer is {0}. I hope it is correct."'
FORMS = (
    "\n\nNote the formatting for the following answer types:\n"
    "- If the answer is a list (e.g., when there are two solutions to an equation), unless otherwise specified, present "
    "the solutions in a list separated by commas ordering them from the smallest to biggest  e.g.: 2, 10\n"
    "- Powers should be written with **, for instance x to the power of 2 should be written as x**2\n"
    "- Use * for multiplication, e.g.: 2*x\n"
    "- For fractions, separate the numerator and denominator with a slash (/) e.g.: -2/7"
)
DATA = DataSet(
    name="deepmind_math",
    elsewhere="Take the test set of github.com/google-deepmind/mathematics_dataset, rows {category, question, answer}.",
)


def _rows() -> Sequence[Row]:
    """The first hundred of each category, with answers of the next three."""
    by_category: dict[str, list[Row]] = {}
    for row in DATA.read():
        by_category.setdefault(row["category"], []).append(row)
    asked = []
    for category, rows in by_category.items():
        if len(rows) <= PER_CATEGORY:
            what = (
                f"category {category} has {len(rows)} rows: {PER_CATEGORY} are asked, and the next {SHOWN} show answers"
            )
            raise InputError(f"data set {DATA.name}", what, f"Give at least {PER_CATEGORY + SHOWN} of each category.")
        shown = [row["answer"].strip() for row in rows[PER_CATEGORY : PER_CATEGORY + SHOWN]]
        asked += [{**row, "number": i, "shown": shown} for i, row in enumerate(rows[:PER_CATEGORY])]
    return asked


def _example(row: Row, place: int) -> Example:
    shown = "\n".join(SHOW.format(answer) for answer in row["shown"])
    text = DESCRIPTION + row["question"].strip() + CONCLUDE + shown + FORMS
    key = f"deepmind_math/{row['category']}/{row['number']}"
    return Example(key, (Turn("user", text),), row["answer"].strip(), row["category"])


DEEPMIND_MATH = Task(
    name="deepmind_math",
    version=1,
    skill="Math",
    rows=_rows,
    example=_example,
    verifier="math_expression",
    own=MathExpression(),
    metric="equal text or value, mean over categories",
    average="macro",
    cot=True,
    max_new_tokens=2048,
    source="Tülu 3, table 24: deepmind_math:0shot_cot-v3::tulu3",
)
