"""The playground of `tulu chat --web` in a real browser: columns answer one prompt, and nothing else is asked for."""

import re

import pytest

from tulu_lightning.launch.chat_model import Manner, open_chat_model

pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[browser]'")

from tulu_lightning.launch.chat_web import serve

WIDE, PHONE = 1280, 390


@pytest.fixture(scope="module")
def models(tiny):
    opened = [open_chat_model(tiny, template="tulu") for _ in range(2)]
    opened[0].name, opened[1].name = "before", "after"
    yield opened
    for model in opened:
        model.close()


@pytest.fixture(scope="module")
def address(models):
    page, found = serve(models, Manner(max_new_tokens=12), "Be brief.", "127.0.0.1", 0, wait=False)
    yield found
    page.close(verbose=False)


def foreign(heard, address: str) -> list[str]:
    return [url for url in heard.requests if not url.startswith((address, "data:", "blob:"))]


def bot(page, place: int):
    return page.locator(f"#answers-{place} [data-testid='bot']")


def test_it_is_served_at_the_loopback_address_unless_told_otherwise(address):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_both_columns_answer_one_prompt(address, models, visit, width):
    page, heard = visit(address, width)
    page.get_by_label("Prompt").fill("What is 3 + 4?")
    page.get_by_role("button", name="Send").click()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]
    expected = "".join(models[0].reply(messages, Manner(max_new_tokens=12)))
    assert expected.strip(), "the model says something"
    page.wait_for_function(
        "words => [0, 1].every(i => (document.querySelector(`#answers-${i} [data-testid='bot']`)?.innerText ?? '')"
        ".replace(/\\s+/g, '') === words)",
        arg=re.sub(r"\s+", "", expected),
    )
    assert [bot(page, place).count() for place in range(2)] == [1, 1]
    assert page.get_by_label("Prompt").input_value() == ""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert foreign(heard, address) == []
    assert [line for line in heard.console if line.startswith(("error", "warning", "dialog"))] == []
    boxes = [page.locator(f"#answers-{i}").bounding_box() for i in range(2)]
    if width == WIDE:
        assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"], "side by side"
    else:
        assert boxes[0]["y"] < boxes[1]["y"], "one under the other"


def test_a_new_conversation_forgets(address, visit):
    page, _ = visit(address)
    page.get_by_label("Prompt").fill("Hi")
    page.get_by_role("button", name="Send").click()
    bot(page, 1).wait_for()
    page.get_by_role("button", name="New conversation").click()
    bot(page, 0).wait_for(state="detached")
    assert page.locator("[data-testid='user']").count() == 0


def test_an_image_in_a_message_is_not_fetched(address, visit):
    page, heard = visit(address)
    page.get_by_label("Prompt").fill("![x](https://example.invalid/a.png)")
    page.get_by_role("button", name="Send").click()
    bot(page, 1).wait_for()
    page.wait_for_timeout(1000)
    assert any("violates the following Content Security Policy" in line for line in heard.console)
    assert not page.evaluate(
        "[...document.querySelectorAll('img')].some(i => i.src.includes('example.invalid') && i.naturalWidth > 0)"
    )


def test_what_cannot_be_asked_is_said(address, visit, models):
    page, _ = visit(address)
    page.get_by_label("Prompt").fill("x" * models[0].positions)
    page.get_by_role("button", name="Send").click()
    page.get_by_text("positions").first.wait_for()
