"""The records of files as people keep them: text, JSON, JSON lines, tables, packed or not, alone or in a folder.

A byte order mark says how a file is encoded and is no part of its text; without one a file is UTF-8 or refused.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

from tensormix.data.shapes import has_field, is_talk, shape_of

TEXT = (".txt", ".text", ".raw", ".tokens", ".md")
JSON = (".json", ".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}  # and what stands between their columns
ARROW = (".parquet", ".arrow")
KINDS = (*TEXT, *JSON, *TABLES, *ARROW)
KNOWN = ".txt, .md, .raw, .json, .jsonl, .csv, .tsv, .parquet, .arrow; each also as .gz, .bz2, .xz or .zst"
# The longer marks first: that of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
SPACE = re.compile(r"\s*")
PACKED_NAMES = (".gz", ".bz2", ".xz", ".zst")
WRAPPERS = ("data", "texts", "documents", "train", "rows", "examples", "records", "items")
BESIDE = ("readme", "license", "licence", "dataset_info.json", "state.json")  # of a data set, and no part of its text


class Record(NamedTuple):
    """One record of a file, and its place in words: "item 3 of notes.json"."""

    item: Any
    place: str


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, in lower case and without that of a packed one; None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_NAMES:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def files_of(path: Path) -> tuple[list[Path], list[str]]:
    """The files that a path names, in the order of their names, and the names of those beside them that are left out.

    Raises:
        ValueError: there is no such file, its kind is unknown, or a folder holds none or files of several kinds.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise ValueError(f"data: there is no file {path}; give one of {KNOWN}, or a folder of them.")
    if kind_of(path) is None:
        raise ValueError(f"data: {path} has the unknown kind {path.suffix!r}; known: {KNOWN}.")
    return [path], []


def _in_folder(folder: Path) -> tuple[list[Path], list[str]]:
    there = sorted(file for file in folder.rglob("*") if file.is_file())
    seen = [file for file in there if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if (folder / "dataset_dict.json").exists():
        splits = ", ".join(sorted(child.name for child in folder.iterdir() if child.is_dir()))
        raise ValueError(f"data: {folder} holds several splits of a data set; name the folder of one: {splits}.")
    asides = [file for file in seen if file.name.lower().startswith(BESIDE)]
    files = [file for file in seen if kind_of(file) is not None and file not in asides]
    kinds = sorted({str(kind_of(file)) for file in files})
    if not files:
        raise ValueError(f"data: the folder {folder} holds no file of a known kind; known: {KNOWN}.")
    if len(kinds) > 1:
        raise ValueError(
            f"data: the folder {folder} holds files of several kinds ({', '.join(kinds)}), which may be the same text "
            "twice; name one file, or a folder that holds one kind."
        )
    return files, [str(file.relative_to(folder)) for file in seen if file not in files]


def records_of(path: Path, field: str = "text") -> Iterator[Record]:
    """The records of one file: a text is one, a table has one in each row. `field` is where their text will be sought.

    Raises:
        ValueError: the file is damaged or in another encoding, or a line is not valid; it names file and line.
    """
    readers: dict[str, Callable[[Path], Iterator[Record]]] = {
        **dict.fromkeys(TEXT, _whole), **dict.fromkeys(JSON, partial(_json, field)), **dict.fromkeys(TABLES, _table),
        **dict.fromkeys(ARROW, _arrow),
    }  # fmt: skip
    with _said_of(path):
        yield from readers[str(kind_of(path))](path)


def read_text(path: Path) -> str:
    """The whole text of a file of any name. Raises ValueError as `records_of`."""
    with _said_of(path), _text(path) as text:
        return text.read()


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except (EOFError, OSError, lzma.LZMAError, csv.Error) as error:
        raise ValueError(f"data: {path} is damaged or cut off: {' '.join(str(error).split())}.") from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    if not error.encoding.startswith("utf-8"):
        return ValueError(f"data: {path} begins as {error.encoding.upper()} and is damaged; save it as UTF-8.")
    byte = error.object[error.start : error.start + 1].hex()
    return ValueError(
        f"data: {path} is not UTF-8 (byte 0x{byte} belongs to no character) and has no byte order mark that names "
        "another encoding; save it as UTF-8."
    )


def _opened(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked if its first ones say that it is packed, whatever it is called."""
    with path.open("rb") as handle:
        head = handle.read(6)
    if head.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(path))
    if head.startswith(b"BZh"):
        return cast(BinaryIO, bz2.open(path))
    if head.startswith(b"\xfd7zXZ"):
        return cast(BinaryIO, lzma.open(path))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return cast(BinaryIO, pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _text(path: Path, newline: str | None = None) -> TextIO:
    """The characters of a file, every end of a line as \\n unless `newline` says otherwise."""
    with _opened(path) as handle:
        head = handle.read(4096)
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in head:
        raise ValueError(
            f"data: {path} holds zero bytes: it is UTF-16 or UTF-32 without a byte order mark, or no text at all; "
            "save it as UTF-8."
        )
    return io.TextIOWrapper(_opened(path), encoding=encoding, newline=newline)


def _whole(path: Path) -> Iterator[Record]:
    with _text(path) as text:
        yield Record(text.read(), str(path))


def _json(field: str, path: Path) -> Iterator[Record]:
    """Of JSON lines one record a line, of any other JSON the items of its list. Which it is, the content says."""
    with _text(path) as lines:
        first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith("{") or not _is_json(first):
        return (yield from _values(field, path))
    with _text(path) as lines:
        places = (Record(line, f"line {number}") for number, line in enumerate(lines, 1) if line.strip())
        begun = next(places)
        value = _parsed(begun.item, path, begun.place)
        after = next(places, None)
        if after is None:
            return (yield from _listed(value, field, path))
        yield Record(value, f"item {begun.place.removeprefix('line ')} of {path}")
        for line, place in (after, *places):
            yield Record(_parsed(line, path, place), f"item {place.removeprefix('line ')} of {path}")


def _values(field: str, path: Path) -> Iterator[Record]:
    """One JSON value, or several after each other, on one line or on many."""
    with _text(path) as text:
        whole = text.read()
    decoder, values, start = json.JSONDecoder(), [], _next(whole, 0)
    while start < len(whole):
        try:
            value, start = decoder.raw_decode(whole, start)
        except (ValueError, RecursionError) as error:
            line = whole.count("\n", 0, getattr(error, "pos", start)) + 1
            raise ValueError(f"data: {path}, line {line} is not valid JSON: {error}.") from error
        values.append(value)
        start = _next(whole, start)
    if len(values) == 1:
        yield from _listed(values[0], field, path)
    else:
        yield from (Record(value, f"item {number} of {path}") for number, value in enumerate(values, 1))


def _next(text: str, start: int) -> int:
    """Where the white space that begins at `start` ends."""
    space = SPACE.match(text, start)
    return space.end() if space else start


def _listed(value: Any, field: str, path: Path) -> Iterator[Record]:
    """The items of a list, or of the one list of an object; any other object is a record itself."""
    if isinstance(value, dict) and not has_field(value, field.split("+")[0]) and shape_of(value) is None:
        lists = [key for key, items in value.items() if _holds_records(key, items, value)]
        if len(lists) > 1:
            raise ValueError(
                f"data: {path} holds an object with several lists ({', '.join(map(repr, lists))}); write the one that "
                "holds the texts into a file of its own."
            )
        value = value[lists[0]] if lists else value
    elif isinstance(value, dict) and isinstance(value.get(field), list) and not is_talk(value[field]):
        value = value[field]
    items = [value] if is_talk(value) or not isinstance(value, list) else value
    yield from (Record(item, f"item {number} of {path}") for number, item in enumerate(items, 1))


def _holds_records(key: str, items: Any, of: Mapping[str, Any]) -> bool:
    """Whether a list in an object is all that it is about. Texts beside other things may be tags of a record."""
    if not isinstance(items, list) or not items or is_talk(items):
        return False
    if all(isinstance(item, dict) for item in items):
        return True
    return all(isinstance(item, str) for item in items) and (key.lower() in WRAPPERS or all(map(_is_list, of.values())))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(line: str, path: Path, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {path}, {place} is not valid JSON: {error}.") from error


def _table(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a text in a column may be long
    with _text(path, newline="") as lines:
        header = lines.readline()
    with _text(path, newline="") as lines:
        delimiter = TABLES[str(kind_of(path))]
        if delimiter not in header:  # what spreadsheets of some languages write instead
            delimiter = next((other for other in ";\t" if other in header), delimiter)
        for number, row in enumerate(csv.DictReader(lines, delimiter=delimiter), 1):
            if None in row or None in row.values():
                raise ValueError(f"data: row {number} of {path} has not as many columns as the first line names.")
            yield Record(row, f"row {number} of {path}")


def _arrow(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if kind_of(path) == ".parquet":
            batches = parquet.ParquetFile(path).iter_batches()
        else:
            source = pyarrow.memory_map(str(path))
            batches = iter(ipc.open_stream(source))
        items = (item for batch in batches for item in batch.to_pylist())
        yield from (Record(item, f"row {number} of {path}") for number, item in enumerate(items, 1))
    except pyarrow.ArrowException as error:
        raise ValueError(f"data: {path} cannot be read as {kind_of(path)}: {str(error).splitlines()[0]}") from error
