"""One vLLM server with the real SmolLM2: as an engine, and as the judge of a verifier."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tulu_lightning.rollout.canary import canaries, prove, tolerance_of
from tulu_lightning.rollout.server import ServerEngine
from tulu_lightning.verifiers.judge import Judge

RUBRIC = "How polite is this answer? {response}\nEnd with a line such as: Score: 7"


@pytest.fixture(scope="module")
def engine(smol):
    engine = ServerEngine.started(smol, max_model_len=512, kv_cache_mb=128)
    yield engine
    engine.close()


def test_half_a_gigabyte_of_weights_through_shared_memory_is_proved(engine, smol):
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * weight.std() * torch.randn(weight.shape, generator=generator))

    def own(sequences):
        result = []
        for prompt, response in sequences:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            result.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0])
        return result

    engine.refresh(model.state_dict().items(), 1)
    assert prove(engine, own, canaries(model.config.vocab_size), tolerance_of(torch.float32)).maximum < 1e-3
    # The judge below reads sense, so the server gets its own weights again.
    engine.refresh(AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).state_dict().items(), 2)


def test_the_server_is_a_judge(engine, smol, caplog):
    assert AutoTokenizer.from_pretrained(smol).chat_template
    judge = Judge(url=engine._client.url, model=smol, rubric=RUBRIC, max_tokens=64, retries=0)
    texts = ("Thank you so much, dear friend!", "Thank you.", "You are welcome, my dear.", "Go away.")
    verdicts = [judge(text, "") for text in texts]
    assert verdicts == [judge(text, "") for text in texts]  # greedy
    scored = [verdict for verdict in verdicts if verdict.outcome in ("right", "wrong")]
    assert scored, "a small judge misses the form now and then, not always"
    assert all((verdict.outcome == "right") == (verdict.score >= 0.5) for verdict in scored)
    if len(scored) < len(verdicts):
        assert "its answer has no score from 0 to 10" in caplog.text


def test_a_judge_whose_server_is_gone_says_error(engine, smol, caplog):  # last
    judge = Judge(url=engine._client.url, model=smol, rubric=RUBRIC, max_tokens=8, retries=0)
    engine.close()
    assert judge("Hello", "") == ("error", 0.0)
    assert "refused" in caplog.text
