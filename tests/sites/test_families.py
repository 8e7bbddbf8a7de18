"""The records of architectures, and the page that is made of them and of the zoo."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tensormix.sites.families import FAMILIES, Family
from zoo import MOE, ZOO

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "tensormix"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The one that writes the page. It is called as the module of the records is, so it is imported by its path."""
    spec = importlib.util.spec_from_file_location("families_page", ROOT / "tools" / "families" / "records.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "tests"))
    return module


@pytest.fixture(scope="module")
def table(script) -> dict[str, dict[str, bool]]:
    """What the page says."""
    first = script.PAGE.read_text().partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in first.splitlines() if line.startswith("| ")]
    return {row[0]: dict(zip(rows[0][2:], (cell == "yes" for cell in row[2:]), strict=True)) for row in rows[1:]}


def test_the_page_has_every_family_and_every_feature_as_the_script_writes_it(script, table):
    assert list(table) == [*ZOO, *MOE]
    assert script.PAGE.read_text().startswith(script.page(table)), "run python tools/families"


def test_the_page_promises_what_the_records_say(script, table):
    """Without a record nothing special is supported; with one, all of it but what norms of heads forbid."""
    for family, found in table.items():
        record = FAMILIES.get(script.block_class(family), Family())
        for feature in script.OF_RECORDS:
            _, promised = script.FEATURES[feature]
            assert found[feature] == promised(record), f"{family}: {feature}; run python tools/families"
        everything = [feature for feature, (_, promised) in script.FEATURES.items() if promised(Family())]
        assert everything and all(found[feature] for feature in everything)
        assert found["experts"] == (family in MOE)


def test_every_record_with_more_than_names_is_tried(script):
    """Those that say only what a block returns have no model in the zoo."""
    tried = {script.block_class(family) for family in (*ZOO, *MOE)}
    assert {name for name, record in FAMILIES.items() if record.stream_norms or record.pairs} <= tried


def test_no_other_file_names_what_architectures_call_their_parts():
    """Blocks, layers and norms; a sliced block has names of its own, which are those of its checkpoints."""
    names = re.compile(
        r"\w+(DecoderLayer|GPT\w*Block)\b|self_attn\b|\w+_layernorm\b|\b[a-z_]+_proj\b|\b(c_attn|Wqkv|fc1|ln_f)\b"
    )
    known = {Path("sites/families.py"), Path("operators/sliced.py"), Path("storage/gguf/architectures.py")}
    found = {
        str(path.relative_to(SOURCE)): hit[0]
        for path in SOURCE.rglob("*.py")
        if path.relative_to(SOURCE) not in known and (hit := names.search(path.read_text(encoding="utf-8")))
    }
    assert not found, "say it in sites/families.py"


@pytest.mark.parametrize("feature", ["turned stream", "turned pairs", "sliced stream"])
def test_a_feature_is_really_tried(script, feature):
    """The script says of a family without a record what it says of one with it: what the package does."""
    assert script.supports("llama", feature) and not script.supports("mixtral", feature)


def test_a_refusal_of_what_a_record_promises_is_an_error(script, monkeypatch):
    monkeypatch.setitem(FAMILIES, "Gemma3DecoderLayer", Family(pairs="halves"))
    with pytest.raises(AssertionError, match=r"gemma3: turned pairs is refused, but its record promises it: .*q_norm"):
        script.supports("gemma3", "turned pairs")
