"""The text of the study, cut once into what is learned from, what recovery reads and what nobody reads before the end.

pretraining   everything below that is not held out; the mid-size model is trained on it
recovery      the pretraining text without C4: what a compressed model is recovered on
in_domain     WikiText-2 test: the corpus of the recovery text, other articles
held_out      the last 40 documents of C4: a corpus the recovery never reads, documents nobody ever read
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tensormix.storage.files import write_text

C4_HELD_OUT = 40  # documents
STORIES_HELD_OUT = 100
GSM8K_PROBLEMS = 2000  # of 7,473: enough, and no source should outweigh the others
WORDS_PER_DOCUMENT = 3000  # of the files that are one long text


def _rows(file: Path) -> list[dict]:
    if file.suffix == ".json":
        return json.loads(file.read_text())
    return [json.loads(line) for line in file.read_text().splitlines()]


def _cut(text: str) -> list[str]:
    """A long text as documents of whole paragraphs, about WORDS_PER_DOCUMENT words each."""
    documents, paragraphs, words = [], [], 0
    for paragraph in text.split("\n"):
        paragraphs.append(paragraph)
        words += len(paragraph.split())
        if words >= WORDS_PER_DOCUMENT:
            documents.append("\n".join(paragraphs).strip())
            paragraphs, words = [], 0
    return [*documents, "\n".join(paragraphs).strip()]


def sources(data: Path) -> dict[str, list[str]]:
    """Documents of every source by name; the held-out ones under names of their own."""
    text, instruct = data / "text", data / "instruct"
    c4 = [row["text"] for row in _rows(text / "c4_300.jsonl")]
    stories = [story.strip() for story in _rows(text / "tinystories_1000.json")]
    asked = [
        "\n".join(filter(None, [row["instruction"], row.get("input", ""), row["output"]]))
        for row in _rows(instruct / "alpaca_999.json")
    ]
    return {
        "c4": c4[:-C4_HELD_OUT],
        "c4_held_out": c4[-C4_HELD_OUT:],
        "stories": stories[:-STORIES_HELD_OUT],
        "stories_held_out": stories[-STORIES_HELD_OUT:],
        "wikipedia": _cut((text / "wikipedia_30.txt").read_text()),
        "wikitext": _cut((text / "wikitext2_valid.tokens").read_text()),
        "wikitext_test": _cut((text / "wikitext2_test.raw").read_text()),
        "shakespeare": _cut((text / "tinyshakespeare.txt").read_text()),
        "alpaca": asked,
        "dolly": [row["prompt"] + row["response"] for row in _rows(instruct / "dolly_1000.jsonl")],
        "gsm8k": [f"{r['question']}\n{r['answer']}" for r in _rows(instruct / "gsm8k_train.jsonl")[:GSM8K_PROBLEMS]],
    }


def parts(data: Path) -> dict[str, list[str]]:
    """The four parts of the module's docstring, by name."""
    found = sources(data)
    recovery = ["stories", "wikipedia", "wikitext", "shakespeare", "alpaca", "dolly", "gsm8k"]
    return {
        "pretraining": [text for name in ["c4", *recovery] for text in found[name]],
        "recovery": [text for name in recovery for text in found[name]],
        "in_domain": found["wikitext_test"],
        "held_out": found["c4_held_out"],
        "stories": found["stories"],
        "stories_held_out": found["stories_held_out"],
    }


if __name__ == "__main__":  # python studies/quality/text.py DATA OUT: writes one jsonl per part
    for name, texts in parts(Path(sys.argv[1])).items():
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        write_text(Path(sys.argv[2]) / f"{name}.jsonl", lines)
        print(name, len(texts), "documents", len(lines), "bytes")
