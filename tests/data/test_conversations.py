"""Conversations: how they are written, and what of them counts, whatever the chat template does."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensormix.data import IGNORED, Document, Mixture, pack, packed_source, read_documents
from tensormix.data.conversations import Conversations
from tensormix.settings import Source

# ---- how they are written

PLAIN = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def speaking(tokenizer):
    """Makes the tokenizer speak a chat template; <|turn|> and <|end|> are special tokens of its own."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<|turn|>", "<|end|>"], special_tokens=True)

    def made(template):
        own.chat_template = template
        return own

    return made


def talk_file(folder, *conversations):
    """A source of conversations; each is what user and assistant say in turn."""
    roles = ("user", "assistant")
    talks = [[{"role": roles[i % 2], "content": said} for i, said in enumerate(talk)] for talk in conversations]
    (folder / "a.json").write_text(json.dumps([{"talk": talk} for talk in talks]))
    return Source(file=str(folder / "a.json"), chat="talk")


def test_a_field_for_each_role_becomes_a_conversation_and_an_empty_one_nobody_speaks(tmp_path, speaking):
    lines = [{"s": "", "q": "how?", "more": "two", "a": " so "}, {"s": "be kind", "q": "why?", "more": "", "a": "thus"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = Source(file=str(tmp_path / "a.jsonl"), chat={"system": "s", "user": "q+more", "assistant": "a"})
    assert [document.text for document in read_documents(source, speaking(PLAIN))] == [
        "<user>how?\n\ntwo\n<assistant>so\n",
        "<system>be kind\n<user>why?\n<assistant>thus\n",
    ]


def test_a_conversation_is_packed_with_one_bos(tmp_path, speaking):
    ids = packed_source(speaking(PLAIN), talk_file(tmp_path, ["how?", "so"], ["how?", "so"]))
    assert (ids == speaking(PLAIN).bos_token_id).sum() == 2
    assert speaking(PLAIN).decode(ids) == "<s><user>how?\n<assistant>so\n" * 2


def test_what_a_template_refuses_is_named(tmp_path, speaking):
    own = speaking("{{ raise_exception('say so') }}")
    with pytest.raises(ValueError, match=r"item 1 of .* does not fit the tokenizer's chat template: say so"):
        packed_source(own, talk_file(tmp_path, ["how?", "so"]))


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ({"text": "x"}, r"item 1 of .*a\.json has no list of messages 'talk'; each message is an object with role and"),
        ({"talk": [{"role": "user"}]}, r"item 1 of .*a\.json has no list of messages 'talk'"),
        (
            {"talk": [{"role": "user", "content": 3}]},
            r"the content of message 1 of item 1 of .*a\.json is a number, not text",
        ),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path, speaking, item, sentence):
    own = speaking("{% for m in messages %}{{ m['content'] + '' }}{% endfor %}")
    (tmp_path / "a.json").write_text(json.dumps([item]))
    with pytest.raises(ValueError, match=sentence):
        packed_source(own, Source(file=str(tmp_path / "a.json"), chat="talk"))


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json asks for chat, and the model's tokenizer has no chat template"):
        packed_source(tokenizer, Source(file=str(tmp_path / "a.json"), chat="talk"))


def test_what_is_generated_is_no_conversation():
    with pytest.raises(ValueError, match="chat belongs to records of a file or of the Hub"):
        Source(exam=True, chat="messages")


# ---- what the assistant says, in templates of the shapes that models have

TURNS = """{{ bos_token }}{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' }}\
{{ m['content'] }}{{ '<|end|>\n' }}{% endfor %}"""
BRACKETS = """{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' <|end|>' }}\
{% else %}{{ '<|turn|>[ask] ' + m['content'] | trim + ' [/ask]' }}{% endif %}{% endfor %}"""
HEADINGS = "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
NEXT_SPEAKER = "{% for m in messages %}{{ '<|turn|>' + m['role'] + ': ' + m['content'] }}{% endfor %}"
# Reasoning is written in the last turn alone, if only an empty one: no conversation's beginning is written alike
THINKING = """{% for m in messages %}{% set parts = m['content'].split('</think>') %}\
{{ '<|turn|>' + m['role'] + '\n' }}\
{% if m['role'] == 'assistant' and loop.last %}<think>{{ '\n' }}\
{{ parts[0].replace('<think>', '') if parts | length > 1 else '' }}{{ '\n</think>\n' }}{% endif %}\
{{ parts | last }}{{ '<|end|>\n' }}{% endfor %}"""
TOOLS = """{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] }}\
{% for call in m['calls'] or [] %}{{ '<call>' + call + '</call>' }}{% endfor %}{{ '<|end|>\n' }}{% endfor %}"""


def marking(template, marked, whole=True):
    """The same template, whose text of an assistant's turn is marked with {% generation %}; with its end if `whole`."""
    end = "{{ '<|end|>' }}"
    inside = marked + (end if whole else "")
    choice = f"{{% if m['role'] == 'assistant' %}}{{% generation %}}{inside}{{% endgeneration %}}{'' if whole else end}"
    return template.replace(
        marked + "{{ '<|end|>\n' }}", choice + f"{{% else %}}{marked}{end}{{% endif %}}{{{{ '\n' }}}}"
    )


def counted(own, messages):
    """What counts of a conversation, span by span."""
    template = Conversations(own)
    text = template.write(messages, "it")
    return [text[start:stop] for start, stop in template.answers(messages, text, "it")]


def said(*turns):
    """Messages in which user and assistant speak in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURNS, ["so<|end|>", "no<|end|>"]),
        (marking(TURNS, "{{ m['content'] }}"), ["so<|end|>", "no<|end|>"]),
        (marking(TURNS, "{{ m['content'] }}", whole=False), ["so<|end|>", "no<|end|>"]),
        (BRACKETS, ["so <|end|>", "no <|end|>"]),
        (HEADINGS, ["so\n\n", "no\n\n"]),
        (NEXT_SPEAKER, ["so<|turn|>", "no"]),
        (PLAIN.replace("{{ m['content'] }}", "{{ m['content'] }}.~ "), ["so.~", "no.~"]),
        (THINKING, ["so<|end|>", "no<|end|>"]),
    ],
)
def test_every_turn_of_the_assistant_counts_with_what_ends_it(speaking, template, expected):
    messages = [{"role": "system", "content": "be kind"}, *said("so?", "so", "no?", "no")]
    assert counted(speaking(template), messages) == expected


@pytest.mark.parametrize("between", ["", "\n"])
def test_where_the_end_is_marked_the_token_of_the_next_speaker_does_not_count(speaking, between):
    own = speaking(
        "{% for m in messages %}{{ '<|turn|>' + m['role'] + ':' }}{% if m['role'] == 'assistant' %}{% generation %}"
        f"{{{{ m['content'] + '<|end|>{between}' }}}}{{% endgeneration %}}"
        "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    )
    assert counted(own, said("so?", "so", "no?", "no")) == [f"so<|end|>{between}", f"no<|end|>{between}"]


def test_a_question_that_follows_the_last_answer_does_not_count(speaking):
    assert counted(speaking(TURNS), said("so?", "so", "no?")) == ["so<|end|>"]
    assert counted(speaking(TURNS), said("so?")) == []
    assert counted(speaking(TURNS), said("so?", "")) == []  # nothing said, nothing to learn


def test_reasoning_counts_where_the_template_writes_it(speaking):
    thoughtful = "<think>hm</think>so"
    assert counted(speaking(THINKING), said("so?", thoughtful)) == ["hm\n</think>\nso<|end|>"]
    assert counted(speaking(THINKING), said("so?", thoughtful, "no?", "no")) == ["so<|end|>", "no<|end|>"]


def test_what_an_assistant_asks_of_its_tools_counts(speaking):
    messages = said("time?", "wait ", "thanks")
    messages[1]["calls"] = ["clock()", "zone()"]
    assert counted(speaking(TOOLS), messages) == ["wait <call>clock()</call><call>zone()</call><|end|>"]


def test_a_message_that_the_template_leaves_out_does_not_count(speaking):
    last = "{% for m in messages[-2:] %}" + TURNS.partition("{% for m in messages %}")[2]
    assert counted(speaking(last), said("so?", "so", "no?", "no")) == ["no<|end|>"]


WORDS = ["a", "so", " ", "\n", "<|end|>", "<|turn|>", "assistant\n", "é", "<", "}"]
SAID = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)


@given(st.lists(SAID, min_size=1, max_size=6))
def test_without_its_marks_a_template_counts_the_same(speaking, turns):
    """The oracle is what transformers notes while it writes the marked template."""
    messages = said(*turns)
    expected = counted(speaking(marking(TURNS, "{{ m['content'] }}")), messages)
    assert counted(speaking(TURNS), messages) == [said for said in expected if said != "<|end|>"]


def test_a_mark_of_one_token_at_the_very_beginning_counts_alone(speaking):
    """The mask of tokens that transformers returns here runs on to the end."""
    own = speaking(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ '<|turn|>' + m['content'] }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "why?"}]
    assert counted(own, messages) == ["A<|turn|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TURNS + "{{ messages[-1]['content'] }}", "it does not write message 2 once and as it is"),
        (TURNS.replace("m['content']", "m['content'] | length"), "it does not write message 2 once and as it is"),
        (TURNS.replace("in messages", "in messages | reverse"), "it writes the messages in another order"),
        (
            "{% if messages[1]['content'] != 'so' %}{{ raise_exception('say so') }}{% endif %}" + TURNS,
            "it refuses another message 2: say so",
        ),
    ],
)
def test_a_template_that_does_not_tell_is_refused(tmp_path, speaking, template, reason):
    source = talk_file(tmp_path, ["so?", "so"] if "reverse" not in template else ["so?", "so", "no?", "no"])
    with pytest.raises(ValueError) as refused:
        list(read_documents(source, speaking(template), answers_only=True))
    assert str(refused.value) == (
        f"data: item 1 of {source.file}: what the assistant says cannot be told from the tokenizer's chat template "
        f"({reason}); take loss_on: all, or a template that marks it with {{% generation %}}."
    )
    assert list(read_documents(source, speaking(template)))  # which is right


# ---- windows


def windows_of(own, source, window, num_windows=8):
    return Mixture(own, [source], window=window, num_windows=num_windows, seed=0, answers_only=True)


def test_a_conversation_has_the_same_tokens_whatever_counts(tmp_path, speaking):
    source = talk_file(tmp_path, ["so?", "so then", "no?", "no"], ["up?", "down"])
    own = speaking(TURNS)
    ids, which = pack(own, read_documents(source, own, answers_only=True))
    assert ids.tolist() == packed_source(own, source).tolist()
    assert which is not None and own.decode(ids[which]) == "so then<|end|>no<|end|>down<|end|>"


def test_a_turn_that_the_eos_token_ends_is_not_ended_twice(tmp_path, speaking):
    own = speaking("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")  # it separates documents, too
    source = talk_file(tmp_path, ["up?", "down"], ["so?", "so"])
    ids, which = pack(own, read_documents(source, own, answers_only=True))
    assert which is not None and own.decode(ids[which]) == "down<s>so<s>"


def test_an_answer_that_a_window_cuts_goes_on_in_the_next(tmp_path, speaking):
    answer = " ".join(f"{n}" for n in range(60))
    own = speaking(TURNS)
    source = talk_file(tmp_path, ["count", answer])
    ids, which = pack(own, read_documents(source, own, answers_only=True))
    assert which is not None
    ids, which = ids[: len(ids) // 16 * 16], which[: len(ids) // 16 * 16]
    mixture = windows_of(own, source, window=16, num_windows=len(which.view(-1, 16).any(1).nonzero()))
    counting = torch.cat([window["labels"][window["labels"] != IGNORED] for window in mixture])
    assert len(mixture) > 2 and sorted(counting.tolist()) == sorted(ids[which].tolist())
    for window in mixture:
        assert ((window["labels"] == window["input_ids"]) | (window["labels"] == IGNORED)).all()


def test_windows_without_an_answer_are_left_out(tmp_path, speaking):
    own = speaking(TURNS)
    long = " ".join(f"{n}" for n in range(100))
    source = talk_file(tmp_path, [long, "so"], [long, "no"])
    mixture = windows_of(own, source, window=16, num_windows=40)
    assert all((window["labels"][1:] != IGNORED).any() for window in mixture)
    assert len({tuple(window["input_ids"].tolist()) for window in mixture}) == len(mixture.windows[0].ids) <= 4


def test_conversations_in_which_no_assistant_speaks_are_refused(tmp_path, speaking):
    own = speaking(TURNS)
    source = talk_file(tmp_path, ["so? " * 20], ["no? " * 20])
    with pytest.raises(ValueError, match=r"a\.json has no answer in any of its windows, and loss_on: answers counts"):
        windows_of(own, source, window=8)
    assert len(Mixture(own, [source], window=8, num_windows=2, seed=0)) == 2


def test_one_of_many_in_which_no_assistant_speaks_is_a_question_only(tmp_path, speaking):
    own = speaking(TURNS)
    source = talk_file(tmp_path, ["so?"], ["no?", "no"])
    ids, which = pack(own, read_documents(source, own, answers_only=True))
    assert which is not None and own.decode(ids[which]) == "no<|end|>"


def test_where_everything_counts_no_second_row_is_kept(tokenizer):
    assert pack(tokenizer, [Document("prose"), Document("more")]).counted is None
