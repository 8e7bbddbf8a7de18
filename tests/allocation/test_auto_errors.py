"""What a budget over several methods cannot do is said in one sentence."""

import pytest

from budget_plans import save_varied_llama
from plans import one_rule
from tensormix.allocation import ImpossibleBudget, allocate
from tensormix.compression import compress
from tensormix.plan import Plan
from tensormix.recipe import Recipe
from tensormix.settings import Budget
from zoo import make, token_ids

WINDOWS = [token_ids(rows=3, length=24, seed=3)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_varied_llama(tmp_path_factory.mktemp("llama"))


def auto(*among, **changes):
    return one_rule({"name": "auto", "among": list(among), "keeps": [0.5], "tokens": 24} | changes)


def test_a_budget_that_no_candidate_reaches_names_the_nearest(llama):
    plan = auto({"name": "svd_llm"}, {"name": "flat_llm"})
    with pytest.raises(
        ImpossibleBudget, match=r"keep=0.02 .* cannot be met; the smallest .* is 0\.\d+, .* svd_llm"
    ) as e:
        allocate(llama, plan, Budget(keep=0.02, of="parameters"), WINDOWS)
    smallest = float(str(e.value).split("smallest possible is ")[1].split(",")[0])
    assert smallest < 0.5
    plan = auto({"name": "svd_llm", "keep": 0.5})
    with pytest.raises(ImpossibleBudget) as e:
        allocate(llama, plan, Budget(keep=0.3, of="parameters"), WINDOWS)
    smallest = float(str(e.value).split("smallest possible is ")[1].split(",")[0])
    allocate(llama, plan, Budget(keep=smallest, of="parameters"), WINDOWS)


@pytest.mark.parametrize(
    "among, message",
    [
        ([], "at least 1 item"),
        ([{"name": "slice_gpt", "keep_channels": 0.5}], "slice_gpt changes several blocks together"),
        ([{"name": "streamline", "count": 2}], "streamline changes several blocks together"),
        ([{"name": "trawl", "num_stacked": 3}], "trawl changes several blocks together"),
        ([{"name": "drop_blocks", "choose": "angular", "count": 2}], "leave out choose and count"),
        ([{"name": "svd"}, {"name": "svd"}], "svd stands there twice with the same settings"),
        ([{"name": "svdllm"}], "unknown name 'svdllm', did you mean 'svd_llm'"),
        ([{"name": "auto", "among": [{"name": "svd"}]}], "unknown name 'auto'"),
    ],
)
def test_what_cannot_compete_is_refused(among, message):
    with pytest.raises(ValueError, match=message):
        Plan.of([{"method": {"name": "auto", "among": among}}])


def test_settings_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="between 0 and 1, each once"):
        auto({"name": "svd"}, keeps=[0.5, 1.0])
    with pytest.raises(ValueError, match="auto must be the only rule of its plan"):
        Plan.of([{"method": {"name": "auto", "among": [{"name": "svd"}]}}, {"method": {"name": "svd", "keep": 0.5}}])


def test_a_plan_without_its_budget_is_refused():
    with pytest.raises(ValueError, match="auto is decided by a recipe with a budget"):
        compress(make("llama"), auto({"name": "svd_llm"}), WINDOWS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"budget": None}, "auto chooses within a budget, and there is no such section"),
        ({"calibration": None}, "auto measures its candidates on calibration text"),
        ({"budget": {"keep": 0.5, "by": "greedy"}}, "leave out by, got 'greedy'"),
        ({"budget": {"keep": 0.5, "measure": "angle"}}, "auto takes kl or loss"),
    ],
)
def test_a_recipe_that_lacks_something_is_refused(changes, message):
    data = {
        "model": "somewhere",
        "plan": [{"method": {"name": "auto", "among": [{"name": "svd"}]}}],
        "budget": {"keep": 0.5},
        "calibration": {"text": {"facts": True}},
    }
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(data | changes)


def test_one_window_cannot_both_fit_and_measure(llama):
    with pytest.raises(ValueError, match=r"it has 1, and needs two at least: give calibration\.num_windows"):
        allocate(llama, auto({"name": "svd"}), Budget(keep=0.5), [WINDOWS[0][:1]])


def test_whole_blocks_beside_chosen_layers_are_refused(llama):
    plan = one_rule({"name": "auto", "among": [{"name": "drop_blocks"}]}, sites=["up"])
    with pytest.raises(ValueError, match="works on whole blocks: leave out sites"):
        allocate(llama, plan, Budget(keep=0.5), WINDOWS)


def test_a_method_that_fits_nowhere_says_why(llama):
    with pytest.raises(ValueError, match="auto: nothing of what it chooses from makes a layer smaller"):
        allocate(llama, auto({"name": "td_moe", "keep": 0.5}), Budget(keep=0.5), WINDOWS)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: .*leaves no rank"):
        allocate(llama, auto({"name": "svd", "keep": 1e-4}), Budget(keep=0.5), WINDOWS)
