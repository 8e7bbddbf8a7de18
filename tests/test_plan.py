"""Rules: which blocks and sites they mean, which one wins, and what is said when they mean nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tensormix.methods import DropBlocks, LinearMethod, Svd, ZeroMethod
from tensormix.operators import LowRank
from tensormix.plan import Plan, Rule
from tensormix.sites import find_sites
from zoo import make

ZERO = {"name": "zero"}


def rule(**fields) -> Rule:
    return Rule.model_validate({"method": ZERO, **fields})


@pytest.fixture(scope="module")
def llama():
    return find_sites(make("llama"))


@pytest.fixture(scope="module")
def gpt2():
    return find_sites(make("gpt2"))


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("all", range(12)),
        ("last 3", (9, 10, 11)),
        ("first 2", (0, 1)),
        ("3-5", (3, 4, 5)),
        ("2", (2,)),
        (2, (2,)),
        ("1,4,6", (1, 4, 6)),
        ("1, 4-6", (1, 4, 5, 6)),
        ([1, 4], (1, 4)),
        ("last 12", range(12)),
    ],
)
def test_block_expressions(blocks, expected):
    assert rule(blocks=blocks).block_indices(12) == set(expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.data())
def test_first_and_last_meet(num_blocks, data):
    count = data.draw(st.integers(1, num_blocks))
    last = rule(blocks=f"last {count}").block_indices(num_blocks)
    assert len(last) == count and max(last) == num_blocks - 1
    if count < num_blocks:
        first = rule(blocks=f"first {num_blocks - count}").block_indices(num_blocks)
        assert first | last == set(range(num_blocks)) and not first & last


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ("last 17", r"blocks 'last 17' asks for 17 blocks; the model has 4"),
        ("first 5", r"asks for 5 blocks; the model has 4"),
        ("2-4", r"asks for block 4; the model has 4 blocks, numbered 0 to 3"),
    ],
)
def test_more_blocks_than_there_are(llama, blocks, sentence):
    with pytest.raises(ValueError, match=rf"plan\[0\]: .*{sentence}"):
        Plan((rule(blocks=blocks),)).resolve(llama, 4)


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ("lats 3", r"'lats 3' cannot be read, did you mean 'last'\? Write 'last 17', 'first 5'"),
        ("", "cannot be read"),
        (-1, "-1 cannot be read"),
        (True, "True cannot be read"),
        ([], "cannot be read"),
        ("5-3", r"'5-3' runs backwards; write '3-5'"),
        ("last 0", "the count must be at least 1"),
    ],
)
def test_bad_block_expressions(blocks, sentence):
    with pytest.raises(ValidationError, match=sentence):
        rule(blocks=blocks)


def test_unknown_role():
    with pytest.raises(ValidationError, match=r"unknown role 'gat', did you mean 'gate'\? Known roles: q, k, v, o"):
        rule(sites=["q", "gat"])


def test_a_role_is_not_a_regular_expression():
    with pytest.raises(ValidationError, match=r"'down' would be read as a regular expression; .* write \[down\]"):
        rule(sites="down")


def test_bad_regular_expression():
    with pytest.raises(ValidationError, match=r"sites '\(q' is not a regular expression: missing \)"):
        rule(sites="(q")


@pytest.mark.parametrize("sites", [[], 3])
def test_sites_of_a_wrong_kind(sites):
    with pytest.raises(ValidationError, match="must be a list of roles or one regular expression"):
        rule(sites=sites)


def test_dropping_takes_no_sites():
    with pytest.raises(ValidationError, match="drop_blocks works on whole blocks: leave out sites"):
        Rule.model_validate({"method": {"name": "drop_blocks"}, "sites": ["q"]})


def test_unknown_keys_are_refused():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        rule(block="last 3")


def test_without_sites_every_linear_layer(llama):
    chosen = Plan((rule(blocks="last 2"),)).resolve(llama, 4)
    assert set(chosen) == {site.name for site in llama if site.kind == "linear" and site.block in (2, 3)}


def test_roles_and_patterns_mean_the_same(llama):
    by_role = Plan((rule(sites=["gate", "up", "down"]),)).resolve(llama, 4)
    by_name = Plan((rule(sites=r".*\.mlp\..*"),)).resolve(llama, 4)
    assert by_role == by_name and len(by_role) == 12


def test_the_first_matching_rule_wins(llama):
    first, second = Rule(method=Svd(keep=0.5), sites=("q",)), rule()
    chosen = Plan((first, second)).resolve(llama, 4)
    assert chosen["model.layers.0.self_attn.q_proj"] == Svd(keep=0.5)
    assert chosen["model.layers.0.self_attn.k_proj"] == ZeroMethod()


def test_a_rule_that_matches_nothing(llama):
    with pytest.raises(ValueError) as error:
        Plan((rule(), rule(blocks="last 2", sites=r".*\.nothing"))).resolve(llama, 4)
    text = str(error.value)
    assert "plan[1] (blocks 'last 2', sites '.*\\\\.nothing') matches no site that is still dense" in text
    assert "model.layers.0.self_attn.q_proj (role q)" in text


def test_a_rule_when_nothing_is_left():
    with pytest.raises(ValueError, match=r"plan\[0\] .*; the model has no linear site left"):
        Plan((rule(),)).resolve([], 4)


@pytest.mark.parametrize("sites", [["q", "k", "v"], ["qkv"], ["up", "v", "k", "q"]])
def test_all_parts_of_a_fused_site(gpt2, sites):
    assert "transformer.h.0.attn.c_attn" in Plan((rule(sites=sites),)).resolve(gpt2, 4)


def test_a_part_of_a_fused_site(gpt2):
    with pytest.raises(ValueError, match=r"h.0.attn.c_attn fuses q, k, v into one .* or for 'qkv', not for q, v alone"):
        Plan((rule(sites=["q", "v"]),)).resolve(gpt2, 4)


def test_dropped_blocks_claim_their_sites(llama):
    plan = Plan((Rule(method=DropBlocks(), blocks="last 1"), rule(blocks="last 2")))
    chosen = plan.resolve(llama, 4)
    assert isinstance(chosen.pop("model.layers.3"), DropBlocks)
    assert {name.split(".")[2] for name in chosen} == {"2"}


def test_a_later_drop_leaves_claimed_blocks_alone(llama):
    plan = Plan((rule(blocks="3", sites=["q"]), Rule(method=DropBlocks(), blocks="2-3")))
    assert set(plan.resolve(llama, 4)) == {"model.layers.2", "model.layers.3.self_attn.q_proj"}


def test_an_empty_plan_chooses_nothing(llama):
    assert Plan().resolve(llama, 4) == {} == Plan(()).resolve(llama, 4)


def test_a_plan_survives_json():
    plan = Plan.model_validate(
        [
            {"blocks": "last 3", "sites": ["q", "k"], "method": {"name": "mixt", "num_branches": 3}},
            {"blocks": [0, 1], "method": {"name": "svd", "keep": 0.5}},
            {"blocks": 2, "method": {"name": "drop_blocks"}},
        ]
    )
    assert Plan.model_validate(json.loads(plan.model_dump_json())) == plan
    assert "num_branches" in json.dumps(Plan.model_json_schema())


def test_unknown_method():
    with pytest.raises(ValidationError, match="'mixxt' found using 'name' does not match any of the expected tags"):
        Rule.model_validate({"method": {"name": "mixxt"}})


def test_a_method_of_your_own():
    class Mine(LinearMethod):
        name: str = "mine"

        def empty(self, in_features, out_features):
            return LowRank(in_features, out_features, rank=1)

        def fit(self, weight, stats):
            return LowRank.from_dense(weight, rank=1)

    plan = Plan((Rule(method=Mine()),))
    assert isinstance(plan.root[0].method, Mine)
    assert plan.model_dump(mode="json")[0]["method"] == {"name": "mine"}


def test_a_plan_is_made_of_plain_data(tmp_path):
    plain = {"method": {"name": "svd", "keep": 0.5}}
    expected = Plan.model_validate([plain])
    (tmp_path / "rules.yaml").write_text(json.dumps([plain]))
    (tmp_path / "recipe.yaml").write_text(json.dumps({"model": "x", "plan": [plain]}))
    method = Svd(keep=0.5)
    for data in ([plain], (plain,), plain, plain["method"], method, [method], Rule(method=method), {"plan": [plain]}):
        assert Plan.of(data) == expected
    for path in (tmp_path / "rules.yaml", str(tmp_path / "recipe.yaml")):
        assert Plan.of(path) == expected
    assert Plan.of(expected) is expected and Plan.of([]) == Plan(())


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([{"method": {"name": "svd", "kep": 0.5}}], r"plan\[0\]\.method: unknown key 'kep', did you mean 'keep'\?"),
        ({"method": {"name": "svdd", "keep": 0.5}}, r"plan\[0\]\.method: unknown name 'svdd', did you mean 'svd'\?"),
        ([{"methods": {"name": "svd", "keep": 0.5}}], r"plan\[0\]: unknown key 'methods', did you mean 'method'\?"),
        ([3], r"plan\[0\]: must be keys and values, got 3"),
        ("absent.yaml", r"there is no file absent\.yaml"),
        ({"plan": [], "budget": {"keep": 0.5}}, r"a budget or a search decides this plan; run its recipe"),
    ],
)
def test_what_is_no_plan_is_one_sentence(data, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        Plan.of(data)
    assert not isinstance(refused.value, ValidationError)
