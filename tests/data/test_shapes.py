"""What records hold is told by their fields: conversations and questions become the same text as when asked for."""

import copy
import json

import pytest

from tensormix.data import packed_source, read_documents, understood_by
from tensormix.settings import Source

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
PARTS = TEMPLATE.replace("{{ m['content'] }}\n", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{{ '\n' }}")
TALK = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}]
WRITTEN = "<user>how?\n<assistant>so\n"


@pytest.fixture
def speaking(tokenizer):
    def made(template=TEMPLATE):
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        return own

    return made


def source_of(folder, *records, **settings):
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Source(file=str(folder / "a.jsonl"), **settings)


def texts_of(source, tokenizer=None, **settings):
    return [document.text for document in read_documents(source, tokenizer, **settings)]


def in_parts(content):
    return [{"type": "text", "text": content[:1]}, {"type": "text", "text": content[1:]}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TALK},
        {"id": 3, "conversations": [{"from": "human", "value": "how?"}, {"from": "gpt", "value": "so"}]},
        {"conversation": [{**m, "content": in_parts(m["content"])} for m in TALK]},
        {"messages": {"role": ["user", "assistant"], "content": ["how?", "so"]}},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"prompt": "how?", "completion": "so"},
        {"instruction": "how?", "input": "", "output": "so"},
        {"instruction": "how?", "output": "so"},
        {"question": "how?", "answer": "so"},
        {"text": None, "messages": TALK},
        TALK,
    ],
)
def test_conversations_and_questions_are_written_in_the_chat_template(tmp_path, speaking, record):
    source = source_of(tmp_path, record, record)
    for own in (speaking(), speaking(PARTS)):
        assert texts_of(source, own) == [WRITTEN] * 2
    documents = list(read_documents(source, speaking(), answers_only=True))
    assert [d.text[a:b] for d in documents for a, b in d.answers or ()] == ["so\n", "so\n"]
    said = []
    with understood_by(said.append):
        packed_source(speaking(), source)
    assert "in the chat template of the tokenizer" in said[0]


def test_questions_without_a_template_are_fields_and_conversations_are_refused(tmp_path, tokenizer):
    asked = {"instruction": "how?", "input": "two", "output": "so"}
    source = source_of(tmp_path, asked, {"instruction": "why?", "output": "thus"})
    assert texts_of(source) == texts_of(source, tokenizer) == ["how?\n\ntwo\n\nso", "why?\n\nthus"]
    with pytest.raises(ValueError, match=r"item 1 of .*a\.jsonl is a conversation .*'messages'.*no chat template"):
        texts_of(source_of(tmp_path, {"messages": TALK}), tokenizer)


def test_what_is_asked_for_wins_over_what_the_fields_say(tmp_path, speaking):
    record = {"prompt": "how?", "completion": "so", "meta": {"body": ["zero", "one"]}}
    source = source_of(tmp_path, record, field="meta.body.1+prompt")
    assert texts_of(source, speaking()) == ["one\n\nhow?"]
    assert texts_of(source_of(tmp_path, {"a.b": "dots"}, field="a.b")) == ["dots"]
    assert texts_of(source_of(tmp_path, {"talk": TALK}, field="talk"), speaking()) == [WRITTEN]
    assert texts_of(source_of(tmp_path, {"text": "prose", "messages": TALK}), speaking()) == ["prose"]


@pytest.mark.parametrize(
    ("record", "settings", "sentence"),
    [
        ({"body": "x", "n": 3}, {}, r"no text field 'text'; it has: body, n; write field: body"),
        (
            {"meta": {"body": "x"}},
            {"field": "meta.bdy"},
            r"no text field 'meta\.bdy'; it has: meta; write field: meta.b",
        ),
        ({"text": 3}, {}, r"the field 'text' of item 1 of .* holds a number, not text"),
        ({"talk": TALK, "x": "y"}, {"field": "x+talk"}, r"holds a list of messages \(write chat:"),
        ({"talk": "x"}, {"chat": "talk"}, r"no list of messages 'talk'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, r"message 1 of item 1 .*kind 'image'"),
        ({"messages": [{"role": "user", "content": 3}]}, {}, r"message 1 of item 1 .* is a number, not text"),
        ({"messages": [{"role": 3, "content": "x"}]}, {}, r"role of message 1 of item 1 .* is a number"),
        (3, {}, r"it is a number"),
    ],
)
def test_an_unknown_shape_is_named_with_what_is_there(tmp_path, speaking, record, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        texts_of(source_of(tmp_path, record, **settings), speaking())


def test_nothing_that_was_said_is_left_out_without_a_word(tmp_path, speaking):
    strict = (
        "{% for m in messages if m['role'] in ('user', 'assistant') %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    stranger = {"messages": [*TALK, {"role": "narrator", "content": "aside"}]}
    with pytest.raises(ValueError, match=r"message 3 of item 1 .* role 'narrator', which .* does not write; known"):
        texts_of(source_of(tmp_path, stranger), speaking(strict))
    assert texts_of(source_of(tmp_path, stranger), speaking()) == [WRITTEN + "<narrator>aside\n"]
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "utc"}'}}
    calling = {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    with pytest.raises(ValueError, match=r"message 2 of item 1 .* calls tools \(clock\), which .* does not write"):
        texts_of(source_of(tmp_path, calling), speaking())
    tools = TEMPLATE.replace(
        "\n{% endfor", "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor"
    )
    expected = '<user>how?<assistant>{"arguments": {"zone": "utc"}, "name": "clock"}'
    legacy = {"messages": [TALK[0], {"role": "assistant", "content": None, "function_call": call["function"]}]}
    for record in (calling, legacy):
        text = texts_of(source_of(tmp_path, record), speaking(tools))[0]
        assert json.loads(text.partition("<assistant>")[2]) == json.loads(expected.partition("<assistant>")[2])
