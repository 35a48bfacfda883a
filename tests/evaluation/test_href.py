"""HREF: what each kind of instruction is held against, and BERTScore as its authors' package has it."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.alpaca_judge import switched
from tulu_lightning.evaluation.bert_f1 import BertF1
from tulu_lightning.evaluation.href_judge import METHODS, HrefJudge, preferred, question_of
from tulu_lightning.evaluation.judges import use_judge
from tulu_lightning.evaluation.suite import find_task
from tulu_lightning.types import Verdict

TEXT = "the cat sat on the mat, and the dog was in the garden with a red ball; nobody saw it there."
PAIRS = [
    ("the cat sat", "the dog sat on it"),
    ("a red ball", "a red ball"),
    ("  nobody in the garden  ", "it was there"),
    (TEXT * 4, "the dog"),  # longer than the model takes in
]


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A RoBERTa of four layers with words of its own, in the form of the real one."""
    folder = str(tmp_path_factory.mktemp("roberta"))
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    words.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {f"{name}_token": token for name, token in zip(("bos", "pad", "eos", "unk", "mask"), special, strict=True)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, **names, cls_token="<s>", sep_token="</s>", model_max_length=32, add_prefix_space=True
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    RobertaModel(RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=34, **sizes)).save_pretrained(folder)
    return folder


def target(category, baseline="base", reference="The capital is Rome.", instruction="Do it."):
    return json.dumps({"instruction": instruction, "category": category, "baseline": baseline, "reference": reference})


# BERTScore ------------------------------------------------------------------------------------------------------------


def test_f1_is_that_of_the_authors_package(roberta):
    bert_score = pytest.importorskip("bert_score")
    theirs = bert_score.BERTScorer(model_type=roberta, num_layers=3)
    _, _, expected = theirs.score([text for text, _ in PAIRS], [reference for _, reference in PAIRS])
    ours = BertF1(layer=3)
    assert [ours(roberta, *pair) for pair in PAIRS] == pytest.approx(expected.tolist(), abs=1e-5)


def test_f1_by_hand(roberta, monkeypatch):
    """Two tokens between marks, at 0 and 90 degrees; in the other text at 0 and 60. The marks are of a third direction.

    P = R = (1 + cos 30) / 2. Without the first token of the other text P = (cos 60 + cos 30) / 2, R = cos 30.
    """
    ours, root = BertF1(layer=1), 3**0.5 / 2
    mark = [0.0, 0.0, 1.0]
    texts = {
        "one": torch.tensor([mark, [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], mark]),
        "other": torch.tensor([mark, [1.0, 0.0, 0.0], [0.5, root, 0.0], mark]),
    }
    monkeypatch.setattr(ours, "_embedded", lambda model, tokenizer, text: texts[text])
    assert ours(roberta, "one", "other") == pytest.approx((1 + root) / 2)
    texts["other"] = texts["other"][[0, 2, 3]]
    precision = (0.5 + root) / 2
    assert ours(roberta, "one", "other") == pytest.approx(2 * precision * root / (precision + root))


def test_nothing_said_is_like_nothing(roberta):
    assert BertF1(layer=3)(roberta, "  ", "the cat") == 0.0
    assert BertF1(layer=3)(roberta, "the cat", "") == 0.0


def test_a_model_of_too_few_layers_is_refused(roberta):
    with pytest.raises(InputError, match=r"has 4 layers, and layer 17 is compared.*RoBERTa-large"):
        BertF1().check(roberta)


# The judge ------------------------------------------------------------------------------------------------------------


def test_how_the_eleven_kinds_are_judged():
    """Section 7 of the fact sheet: two by similarity, two by the judge alone, seven with a person's answer."""
    of = {how: {kind for kind, each in METHODS.items() if each == how} for how in METHODS.values()}
    assert of["similarity"] == {"Open QA", "Fact Checking or Attributed QA"}
    assert of["judge"] == {"Brainstorm", "Summarize"}
    assert len(of["judge with reference"]) == 7


def test_the_question_shows_a_persons_answer_only_where_it_is_to_count():
    asked = question_of("Say {first}.", "one {second}", "two", "three")
    assert asked.index("Say {first}.") < asked.index("three") < asked.index("one {second}") < asked.index("two")
    assert "A person's own response" in asked
    alone = question_of("Say it.", "one", "two", None)
    assert "person's" not in alone.replace("careful person", "")
    assert "None" not in alone


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Better: 1", "1"),
        ("**Better: 2**", "2"),
        ("better: TIE.", "tie"),
        ("Better: 1? No. Better: 2", "2"),
        ("Better: 12", None),
        ("Response 1", None),
        ("", None),
    ],
)
def test_what_a_judge_says_is_read(text, said):
    assert preferred(text) == said


def test_the_same_answer_wins_in_either_order(server):
    def reply(request):
        text = request["messages"][0]["content"]
        return "Better: 1" if text.index("better one") < text.index("worse one") else "Better: 2"

    server.replies = reply
    use_judge("href", f"toy@{server.url}")
    judge = HrefJudge()
    kinds = [f"Do {i}" for i in range(6)]
    for instruction in kinds:
        assert judge("better one", target("Rewrite", "worse one", instruction=instruction)) == Verdict("right", 1.0)
        assert judge("worse one", target("Rewrite", "better one", instruction=instruction)) == Verdict("wrong", 0.0)
    assert {switched(instruction) for instruction in kinds} == {True, False}
    assert all("The capital is Rome." in request["messages"][0]["content"] for request in server.requests)
    assert server.requests[0]["temperature"] == 0
    asked = len(server.requests)
    judge("better one", target("Summarize", "worse one"))
    assert "The capital is Rome." not in server.requests[asked]["messages"][0]["content"]
    assert judge("same", target("Rewrite", "same")) == Verdict("wrong", 0.5)
    assert len(server.requests) == asked + 1, "equal texts are not asked about"


def test_ties_count_half_and_a_judge_that_does_not_decide_is_told(server):
    use_judge("href", f"toy@{server.url}")
    server.replies = lambda request: "Better: tie"
    assert HrefJudge()("a", target("Extract")) == Verdict("wrong", 0.5)
    server.replies = lambda request: "Both are fine."
    assert HrefJudge()("a", target("Extract")) == Verdict("unparseable", 0.0)


def test_open_questions_are_judged_by_likeness_to_a_persons_answer(roberta):
    use_judge("href_similarity", roberta)
    judge = HrefJudge(BertF1(layer=3))
    near = target("Open QA", "a red ball", "the cat sat on the mat")
    assert judge("the cat sat on the mat", near) == Verdict("right", 1.0)
    assert judge("", near) == Verdict("wrong", 0.0)
    assert judge("a red ball", near) == Verdict("wrong", 0.5)


# The task -------------------------------------------------------------------------------------------------------------


def test_the_task_asks_the_instruction_and_keeps_what_the_judge_needs(give, server, roberta, monkeypatch):
    task = find_task("href")
    monkeypatch.setattr(task.own.similarity, "layer", 3)
    row = {"instruction": "Sum up.", "category": "Summarize", "reference": "r", "output": "o"}
    give("href", [row, {**row, "category": "Open QA"}])
    with pytest.raises(InputError, match=r"judge href: none is named.*--judge href="):
        task.examples()
    use_judge("href", f"toy@{server.url}")
    with pytest.raises(InputError, match=r"judge href_similarity: none is named.*roberta-large"):
        task.examples()
    use_judge("href_similarity", roberta)
    first, second = task.examples()
    assert [turn.content for turn in first.turns] == ["Sum up."]
    assert json.loads(first.target) == {
        "instruction": "Sum up.", "category": "Summarize", "reference": "r", "baseline": "o"
    }  # fmt: skip
    assert (first.key, first.group, second.group) == ("href/0", "Summarize", "Open QA")
    assert task.own.complaint(first.target) is None
    settings = task.settings([first])
    use_judge("href", f"another@{server.url}")
    assert task.settings([first]) != settings, "scores of two judges do not compare"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("href", "some/folder"), "judge href: 'some/folder' is no model behind a server"),
        (("href_similarity", "m@http://127.0.0.1:9"), "judge href_similarity: is a server"),
        (("href", "m@http://127.0.0.1:9"), "it does not answer"),
    ],
)
def test_judges_that_cannot_serve_are_refused_before_anything_runs(roberta, given, said, server):
    use_judge("href", f"toy@{server.url}")
    use_judge("href_similarity", roberta)
    use_judge(*given)
    with pytest.raises(InputError, match=said):
        HrefJudge(BertF1(layer=3)).ready()


def test_a_category_that_is_none_is_told_with_the_nearest(give, server, roberta):
    row = {"instruction": "i", "category": "Summarise", "reference": "r", "output": "o"}
    give("href", [row])
    with pytest.raises(InputError, match=r"data set href, row 1: there is no category 'Summarise'.*Summarize"):
        find_task("href").example(row, 0)
    assert "no category" in HrefJudge().complaint(target("Summarise"))
    assert "no JSON object" in HrefJudge().complaint("[]")
    assert "no text" in HrefJudge().complaint(target("Extract", baseline=None))
