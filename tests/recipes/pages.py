"""What a page of the report holds, for tests."""

import json
import re
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "hr", "input"}
FETCHING = {"src", "href", "srcset", "data", "action", "poster", "formaction", "background"}


class Page(HTMLParser):
    """What a browser would make of the page: tags, attributes, text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.captions: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags nest"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text += data
            if self.open[-2:] == ["figcaption", "b"]:
                self.captions.append(data)

    def links(self):
        return [v for _, attrs in self.tags for k, v in attrs.items() if k in FETCHING]


def traces_of(figure: str) -> list[dict]:
    """What a figure hands to plotly: the second argument of its call."""
    return json.loads(re.search(r'"plot-[\w-]+",\s*(\[.*?\]),\s*\{"', figure, re.DOTALL).group(1))
