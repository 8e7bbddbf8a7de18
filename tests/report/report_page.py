"""Reads a report back: elements, drawings, downloads. For tests only."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from tensormix.report import build_report

VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass
class Element:
    tag: str
    attrs: dict[str, str]
    children: list[Element] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    def all(self, tag: str | None = None, cls: str | None = None) -> list[Element]:
        found = [
            child
            for child in self.children
            if (tag is None or child.tag == tag) and (cls is None or cls in child.attrs.get("class", "").split())
        ]
        return found + [hit for child in self.children for hit in child.all(tag, cls)]

    def text(self) -> str:
        return "".join(self.pieces).replace("\u00a0", " ")

    def id(self, name: str) -> Element:
        return next(item for item in self.all() if item.attrs.get("id") == name)


class Reader(HTMLParser):
    """Builds a tree and raises where tags do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = [Element("root", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {key: value or "" for key, value in attrs})
        self.stack[-1].children.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.stack[-1].children.append(Element(tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack[-1].tag == tag, f"</{tag}> closes <{self.stack[-1].tag}> at {self.getpos()}"
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        for element in self.stack:
            element.pieces.append(data)


def parse(html: str) -> Element:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert len(reader.stack) == 1, f"never closed: {[element.tag for element in reader.stack[1:]]}"
    return reader.stack[0]


def page_of(*folders: Path) -> Element:
    return parse(build_report(list(folders), folders[0].parent / "page.html").read_text(encoding="utf-8"))


def download(element: Element, name: str) -> str:
    link = next(item for item in element.all("a") if item.attrs.get("download") == name)
    head, _, content = link.attrs["href"].partition(",")
    assert head.startswith("data:")
    return unquote(content)


def csv_rows(element: Element, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(download(element, name))))


def marks(element: Element) -> list[Element]:
    """The drawn values of a figure: markers in its panels, without those of the legend."""
    return [mark for panel in element.all("svg", "panel") for mark in panel.all(cls="mark") if "data-x" in mark.attrs]
