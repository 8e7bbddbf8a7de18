"""A budget that chooses the bond of each mixture beside its number of branches."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tensormix.allocation import allocate
from tensormix.compression import compress
from tensormix.methods import Mixt, Rtn
from tensormix.plan import Plan, Rule
from tensormix.recipe import Recipe
from tensormix.settings import Budget
from zoo import make, token_ids

BATCHES = [token_ids(rows=4, length=16, seed=1)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make("llama").save_pretrained(folder)
    return folder


def divided(folder, keep, **settings):
    plan = Plan((Rule(method=Mixt(num_branches=1, **settings)),))
    return allocate(folder, plan, Budget(keep=keep, of="parameters", by="greedy"), BATCHES)


def test_the_sizes_are_those_of_every_bond_and_the_dense_layer_once():
    alone = {bond: Mixt(num_branches=1, bond=bond).allowed_sizes(64, 128) for bond in (2, 4)}
    both = Mixt(num_branches=1, bonds=(2, 4)).allowed_sizes(64, 128)
    assert len(set(both)) == len(both)
    assert set(both) == {(1, 2)} | {(count, bond) for bond, counts in alone.items() for count in counts if count > 1}
    costs = [Mixt(num_branches=1, bonds=(2, 4)).sized(size).empty(64, 128).num_params for size in both]
    assert costs == sorted(set(costs), reverse=True)


def test_a_wider_choice_meets_the_budget_with_less_error(llama):
    one, many = divided(llama, 0.15), divided(llama, 0.15, bonds=(2, 4))
    assert many.rows[0]["achieved"] <= many.rows[0]["asked"]
    assert many.rows[0]["error"] < one.rows[0]["error"]
    assert {row["size"][1] for row in many.rows[1:] if row["size"]} == {2, 4}
    assert {row["setting"] for row in many.rows[1:] if row["size"]} == {"num_branches, bond"}


def test_where_few_sizes_are_fitted_the_smallest_of_all_bonds_is_among_them(llama):
    plan = Plan((Rule(method=Mixt(num_branches=1, bonds=(2, 4))),))
    budget = Budget(keep=0.1, of="parameters", by="greedy", levels=2)
    assert {row["size"] for row in allocate(llama, plan, budget, BATCHES).rows[1:]} == {(5, 2), (2, 4)}


def test_the_plan_stores_what_was_counted_and_its_layers_have_the_chosen_bonds(llama):
    found = divided(llama, 0.15, bonds=(2, 4))
    model = make("llama")
    compress(model, found.plan, BATCHES)
    bonds = set()
    for row in found.rows[1:]:
        if row["size"]:
            operator = model.get_submodule(row["site"])
            assert (operator.num_branches, operator.bond) == tuple(row["size"])
            assert operator.num_params == row["cost"]
            bonds.add(operator.bond)
    assert bonds == {2, 4}
    assert Plan.model_validate_json(found.plan.model_dump_json()) == found.plan


def test_what_rounds_a_mixture_names_its_setting():
    method = Rtn(bits=8, of=Mixt(num_branches=1, bonds=(2, 4)))
    sizes = method.allowed_sizes(64, 128)
    assert (2, 4) in sizes
    assert method.sized((2, 4)).of == Mixt(num_branches=2, bond=4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bonds": [2, 1]}, "bonds are a list of whole numbers from 2 on, got [2, 1]"),
        ({"bonds": [2, 2]}, "bonds are each named once, got [2, 2]"),
        ({"bonds": []}, "bonds are a list of whole numbers from 2 on, got []"),
        ({"bonds": 2}, "bonds are a list of whole numbers from 2 on, got 2"),
        (
            {"bonds": [2, 4], "num_branches": 3},
            "bonds are for a budget to choose from, and num_branches=3 is chosen already: leave out num_branches, or "
            "give one bond",
        ),
    ],
)
def test_bonds_that_make_no_sense_are_refused(settings, sentence):
    with pytest.raises(ValidationError) as refused:
        Mixt.model_validate({"num_branches": 1} | settings)
    assert sentence in str(refused.value)


def test_bonds_without_a_budget_are_refused_where_a_recipe_is_read(llama):
    recipe = {"model": str(llama), "plan": [{"method": {"name": "mixt", "bonds": [2, 4]}}]}
    with pytest.raises(ValidationError, match="num_branches"):
        Recipe.model_validate(recipe)
    sized = Recipe.model_validate(recipe | {"budget": {"keep": 0.2}})
    assert sized.plan.root[0].method.bonds == (2, 4)
