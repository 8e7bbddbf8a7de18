"""Files of text as people have them: whatever the program that wrote them, the same text or a sentence."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
from pyarrow import ipc, parquet

from tensormix.data import packed_source, read_documents, understood_by
from tensormix.settings import Source

TEXTS = ["first line\nsecond", "café", "x" * 200_000]
RECORDS = [{"text": text} for text in TEXTS]
LINES = "\n".join(json.dumps(record) for record in RECORDS)


def texts_of(path, **settings):
    return [document.text for document in read_documents(Source(file=str(path), **settings))]


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL", "a.ndjson"])
def test_json_lines_are_read_whatever_they_are_called_and_marked(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(LINES.replace("\n", "\r\n\r\n").encode(encoding))
    assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize("written", [RECORDS, TEXTS, {"data": RECORDS}, {"version": "1", "texts": TEXTS}])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.JSON"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_alone_or_inside_an_object_is_read(tmp_path, written, name, indent):
    (tmp_path / name).write_text("\ufeff" + json.dumps(written, indent=indent), encoding="utf-8")
    assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    ("suffix", "pack"), [("gz", gzip.compress), ("GZ", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress),
                         ("zst", zstd)]
)  # fmt: skip
@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "csv"])
def test_packed_files_are_those_that_they_hold(tmp_path, suffix, pack, kind):
    plain = {"txt": "one\r\ntwo", "json": json.dumps(["one\ntwo"]), "jsonl": json.dumps({"text": "one\ntwo"})}
    plain["csv"] = 'text\n"one\r\ntwo"\n'
    (tmp_path / f"a.{kind}.{suffix}").write_bytes(pack(plain[kind].encode("utf-8-sig")))
    assert texts_of(tmp_path / f"a.{kind}.{suffix}") == ["one\ntwo"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_ends_of_lines_and_byte_order_marks_are_no_part_of_a_text(tmp_path, end):
    (tmp_path / "a.TXT").write_bytes(f"\ufeffone{end}\ufefftwo".encode())
    (tmp_path / "a.json").write_text(json.dumps({"text": f"\ufeffone{end}two"}))
    assert texts_of(tmp_path / "a.TXT") == texts_of(tmp_path / "a.json") == ["one\ntwo"]


def test_tables_give_a_record_in_each_row(tmp_path):
    table = pyarrow.table({"text": TEXTS, "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as sink:
        sink.write_table(table)
    (tmp_path / "a.csv").write_text('text;n\n"first line\nsecond";1\ncafé;2\n' + "x" * 200_000 + ";3\n", "utf-8")
    (tmp_path / "a.tsv").write_text('text\tn\n"first line\nsecond"\t1\ncafé\t2\n' + "x" * 200_000 + "\t3\n", "utf-8")
    for name in ("a.parquet", "a.arrow", "a.csv", "a.tsv"):
        assert texts_of(tmp_path / name) == TEXTS


def test_a_folder_is_its_files_in_order_and_what_is_left_out_is_said(tmp_path, tokenizer):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl.gz", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        line = json.dumps({"text": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith("gz") else line)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "x.pdf").write_text("about")
    assert texts_of(tmp_path) == ["a.jsonl", "b.jsonl", "sub/c.jsonl.gz"]
    said = []
    with understood_by(said.append):
        ids = packed_source(tokenizer, Source(file=str(tmp_path)))
    assert f"3 documents, {len(ids)} tokens, 3 files, the field 'text'" in said[0]
    assert "2 other files left out (README.md, x.pdf)" in said[0]
    (tmp_path / "d.txt").write_text("prose")
    with pytest.raises(ValueError, match=r"several kinds \(\.jsonl, \.txt\).*name one file"):
        texts_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("café.jsonl", '{"text": "café"}'.encode("latin-1"), r"café\.jsonl is not UTF-8 .*0xe9.*save it as UTF-8"),
        ("a.txt", "hello".encode("utf-16-le"), r"a\.txt holds zero bytes: it is UTF-16.*save it as UTF-8"),
        ("a.txt", b"\xff\xfehel", r"a\.txt begins as UTF-16.* and is damaged"),
        ("a.txt.gz", gzip.compress(b"hello" * 99)[:-9], r"a\.txt\.gz is damaged or cut off"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read as \.parquet"),
        ("a.csv", b"text,n\nx\n", r"row 1 of .*a\.csv has not as many columns"),
        ("a.pdf", b"x", r"a\.pdf has the unknown kind '\.pdf'; known: \.txt.*\.jsonl.*\.parquet.*\.gz"),
        ("a.json", b'{"one": ["a"], "two": ["b"]}', r"a\.json holds an object with several lists \('one', 'two'\)"),
        ("a.json", b'{"text": "x"}\n\n{"text"', r"a\.json, line 3 is not valid JSON"),
        ("a.json", b'[\n"a",\n', r"a\.json, line 3 is not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_file(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        texts_of(tmp_path / name)


def test_records_without_text_are_counted_and_a_file_of_nothing_else_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "prose"}\n{"text": ""}')
    said = []
    with understood_by(said.append):
        packed_source(tokenizer, Source(file=str(tmp_path / "a.jsonl")))
    assert said[0].startswith("a.jsonl: 1 document, ") and said[0].endswith("2 without text left out")
    (tmp_path / "a.jsonl").write_text('{"text": null}')
    with pytest.raises(ValueError, match=r"a\.jsonl holds no text; of its records 1 are empty"):
        packed_source(tokenizer, Source(file=str(tmp_path / "a.jsonl")))
