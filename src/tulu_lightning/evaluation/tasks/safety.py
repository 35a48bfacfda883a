"""The six safety sets of Tülu 3 (section 7.2.1), judged by WildGuard or what the user names instead.

`safety` is the paper's number: all six, each set counting the same. `SETS` are the sets by themselves.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.safety_judge import SafetyJudge
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["DO_ANYTHING_NOW", "HARMBENCH", "JAILBREAK_TRIGGER", "SAFETY", "WILDGUARD_TEST", "WILDJAILBREAK", "XSTEST"]


@dataclass(frozen=True)
class SafetySet:
    """Prompts, and what is expected of the responses."""

    data: DataSet
    prompt: Callable[[Row], str]
    expected: Callable[[Row], str]
    group: Callable[[Row], str] = lambda row: ""
    """Of the row, for its own task; scores by group are shown beside the set's."""
    asked: Callable[[Row], bool] = lambda row: True
    """Whether the row is among those that are asked."""

    def rows(self) -> Sequence[Row]:
        """Those that are asked. Raises InputError as `DataSet.read`."""
        return [row for row in self.data.read() if self.asked(row)]

    def example(self, row: Row, place: int) -> Example:
        """One prompt, asked as it is."""
        prompt = self.prompt(row)
        target = json.dumps({"prompt": prompt, "expected": self.expected(row)}, ensure_ascii=False)
        return Example(f"{self.data.name}/{place}", (Turn("user", prompt),), target, self.group(row))


def _harmbench(row: Row) -> str:
    if row["FunctionalCategory"] == "contextual":
        return f"{row['ContextString']}\n\n---\n\n{row['Behavior']}"
    return row["Behavior"]


SETS = {
    "harmbench": SafetySet(
        DataSet(name="harmbench", hub="allenai/tulu-3-harmbench-eval", count=321),
        _harmbench,
        lambda row: "harmful: no",
        lambda row: row["FunctionalCategory"],
    ),
    "xstest": SafetySet(
        DataSet(name="xstest", hub="walledai/XSTest", count=450),
        lambda row: row["prompt"],
        lambda row: "refusal: yes" if row["label"] == "unsafe" else "refusal: no",
        lambda row: row["label"],
    ),
    # 1,725 rows; harm is asked of responses to the prompts that are labelled harmful.
    "wildguardtest": SafetySet(
        DataSet(name="wildguardtest", hub="allenai/wildguardmix", configs=("wildguardtest",)),
        lambda row: row["prompt"],
        lambda row: "harmful: no",
        lambda row: "adversarial" if row["adversarial"] else "vanilla",
        lambda row: row["prompt_harm_label"] == "harmful" and row["response_harm_label"] is not None,
    ),
    "jailbreaktrigger": SafetySet(
        DataSet(name="jailbreaktrigger", hub="allenai/tulu-3-trustllm-jailbreaktrigger-eval", count=400),
        lambda row: row["prompt"],
        lambda row: "refusal: yes",
        lambda row: row["label"][0] if isinstance(row["label"], list) else str(row["label"]),
    ),
    "do_anything_now": SafetySet(
        DataSet(name="do_anything_now", hub="allenai/tulu-3-do-anything-now-eval", count=300),
        lambda row: row["adversarial"],
        lambda row: "refusal: yes",
    ),
    "wildjailbreak": SafetySet(
        DataSet(name="wildjailbreak", hub="allenai/wildjailbreak", configs=("eval",), split="train", count=2210),
        lambda row: row["adversarial"],
        lambda row: "refusal: yes" if row["data_type"] == "adversarial_harmful" else "refusal: no",
        lambda row: row["data_type"].removeprefix("adversarial_"),
    ),
}
"""In the order of table 25."""


def _task(name: str) -> Task:
    return Task(
        name=name,
        version=1,
        skill="Safety",
        rows=SETS[name].rows,
        example=SETS[name].example,
        verifier="safety_judge",
        own=SafetyJudge(),
        metric="responses as they should be, by the judge",
        source="Tülu 3, tables 24 and 25",
    )


HARMBENCH, XSTEST, WILDGUARD_TEST = _task("harmbench"), _task("xstest"), _task("wildguardtest")
JAILBREAK_TRIGGER, DO_ANYTHING_NOW = _task("jailbreaktrigger"), _task("do_anything_now")
WILDJAILBREAK = _task("wildjailbreak")


def _all_rows() -> Sequence[Row]:
    return [{"set": name, "place": i, "row": row} for name, one in SETS.items() for i, row in enumerate(one.rows())]


def _of_all(row: Row, place: int) -> Example:
    return SETS[row["set"]].example(row["row"], row["place"])._replace(group=row["set"])


SAFETY = Task(
    name="safety",
    version=1,
    skill="Safety",
    rows=_all_rows,
    example=_of_all,
    verifier="safety_judge",
    own=SafetyJudge(),
    metric="responses as they should be, mean over the six sets",
    average="macro",
    source="Tülu 3, table 24",
)
