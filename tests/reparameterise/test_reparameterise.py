"""Other weights, the same function: logits stay, weights do not."""

from __future__ import annotations

import pytest
import torch

from tensormix.compression.observing import observe
from tensormix.reparameterise import (
    align_heads,
    balance_values,
    check_equal,
    permute_heads,
    rotate_pairs,
    sort_neurons,
    whiten_values,
)
from tensormix.sites import find_sites
from tensormix.statistics import Gram
from zoo import ZOO, make, token_ids


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def grams(model):
    """Of the inputs of every linear layer, as of `token_ids()`."""
    sites = {site.name: site for site in find_sites(model) if site.kind == "linear"}
    stats = {name: [{Gram: Gram(site.in_features)}] for name, site in sites.items()}
    with observe(model, sites, stats):
        logits(model)
    return {name: of_site[0][Gram].mean for name, of_site in stats.items()}


def changed_sites(model, rewrite, tolerance=1e-9):
    """The sites whose weights `rewrite` changed, all of which it names; the logits must be what they were."""
    before, old = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    names = rewrite(model)
    torch.testing.assert_close(logits(model), before, rtol=tolerance, atol=tolerance)
    changed = {name for name, p in model.named_parameters() if not torch.equal(old[name], p)}
    assert {name.rpartition(".")[0] for name in changed} <= set(names)
    return [name for name in names if f"{name}.weight" in changed]


@pytest.mark.parametrize("family", ZOO)
def test_sorted_neurons_give_the_same_logits(family):
    """In fp64, where nothing but the order of sums differs: any lost bias or half of a fused layer would show."""
    assert len(changed_sites(make(family).double(), sort_neurons)) >= 2 * 4, "every block has at least two that changed"


@pytest.mark.parametrize("rewrite", [align_heads, whiten_values, balance_values])
@pytest.mark.parametrize("family", ZOO)
def test_mapped_values_give_the_same_logits(family, rewrite):
    """Grouped queries, biases, tied heads, and q, k and v in one layer, one after another or by turns."""
    model = make(family).double()
    assert len(changed_sites(model, lambda model: rewrite(model, grams(model)))) == 2 * 4


@pytest.mark.parametrize("family", ZOO)
def test_heads_in_another_order_give_the_same_logits(family):
    """Of two heads there is one order only, up to its direction: so four of keys and values, twelve that read them."""
    grouped = family not in ("opt", "gpt2", "gptj", "gpt_neox")
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 4, "hidden_size": 48} if grouped else {}
    model, fused = make(family, **heads).double(), family in ("phi3", "gpt2", "gpt_neox")
    changed = changed_sites(model, permute_heads)  # not where the heads are in that order already
    assert len(changed) >= (2 if fused else 4) and len(permute_heads(model)) == (2 if fused else 4) * 4


@pytest.mark.parametrize("family", sorted(set(ZOO) - {"qwen3", "gemma3"}))
def test_turned_pairs_give_the_same_logits(family):
    """Whole and partial rotary positions, of halves and of neighbours, and none. GPT-J rounds its scores to float32."""
    fused = family in ("phi3", "gpt2", "gpt_neox")
    model, tolerance = make(family).double(), 1e-6 if family == "gptj" else 1e-9
    names = changed_sites(model, lambda model: rotate_pairs(model, grams(model)), tolerance)
    assert len(names) == (1 if fused else 2) * 4


def test_the_values_of_a_head_are_uncorrelated_afterwards():
    model = make("llama").double()
    align_heads(model, grams(model))
    seen = grams(model)
    for site in find_sites(model):
        if site.role == "v":
            for rows in site.weight.split(8):
                moment = rows @ seen[site.name] @ rows.T
                assert (moment - moment.diagonal().diag()).abs().max() < 1e-9 * moment.diagonal().max()
                assert moment.diagonal().diff().max() <= 1e-12, "the largest first"


def heads_of(gram, size=8):
    """The moments of each head, and None between them."""
    return [gram[start : start + size, start : start + size] for start in range(0, len(gram), size)]


def test_white_values_are_white_where_o_reads_them():
    model = make("llama").double()
    whiten_values(model, grams(model))
    for name, gram in grams(model).items():
        if name.endswith("o_proj"):
            first, second, third, fourth = heads_of(gram)
            for pair in (first + second, third + fourth):  # two query heads read each key-value head
                torch.testing.assert_close(pair / 2, torch.eye(8).double(), atol=1e-8, rtol=0)


def test_balanced_values_have_the_energy_that_o_gives_them_weight():
    model = make("qwen2").double()
    balance_values(model, grams(model))
    for name, gram in grams(model).items():
        if name.endswith("o_proj"):
            weight = model.get_parameter(f"{name}.weight")
            for pair in (slice(0, 16), slice(16, 32)):
                moment = sum(heads_of(gram[pair, pair])) / 2
                reads = sum(heads_of((weight.T @ weight)[pair, pair]))
                torch.testing.assert_close(moment, reads, atol=1e-8, rtol=1e-8)
                assert (moment - moment.diagonal().diag()).abs().max() < 1e-8 * moment[0, 0]
                assert moment.diagonal().diff().max() < 1e-9


@pytest.mark.parametrize(("family", "second"), [("mistral", 4), ("gptj", 1)])
def test_turned_pairs_are_balanced_and_aligned(family, second):
    """The channels 0 and 4 of a head are a pair in Mistral, 0 and 1 in GPT-J, which turns 4 of 8 channels."""
    model = make(family).double()
    rotate_pairs(model, grams(model))
    seen = grams(model)
    for site in find_sites(model):
        if site.role == "q":
            keys = model.get_submodule(site.name.replace("q_proj", "k_proj")).weight
            moments = [heads_of(weight @ seen[site.name] @ weight.T) for weight in (site.weight, keys)]
            shared = len(moments[0]) // len(moments[1])
            for head, of_keys in enumerate(moments[1]):
                of_queries = sum(moments[0][head * shared : (head + 1) * shared]) / shared
                both = [0, second]
                pair, its_key = of_queries[both][:, both], of_keys[both][:, both]
                torch.testing.assert_close(pair.trace(), its_key.trace(), atol=0, rtol=1e-6)
                together = pair + its_key
                assert together[0, 1].abs() < 1e-6 * together.trace() and together[0, 0] > together[1, 1]
                if family == "gptj":  # the others have no positions: balanced
                    torch.testing.assert_close(of_queries[4:, 4:], of_keys[4:, 4:], atol=1e-7, rtol=1e-6)


def test_alike_heads_come_side_by_side():
    """Two kinds of heads, mixed: afterwards one change of kind is left in the order."""
    model = make("llama", num_attention_heads=4, num_key_value_heads=4).double()
    attention, kinds = model.model.layers[0].self_attn, (torch.arange(32) // 8) % 2
    with torch.no_grad():
        for layer in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
            layer.mul_(0.1).add_(torch.where(kinds == 1, 1.0, -1.0)[:, None])
    permute_heads(model)
    assert int((attention.v_proj.weight.view(4, -1).mean(1) > 0).int().diff().abs().sum()) == 1


@pytest.mark.parametrize(("rewrite", "role"), [(align_heads, "v"), (whiten_values, "o"), (rotate_pairs, "q")])
def test_fewer_tokens_than_channels(rewrite, role):
    """Moments without full rank: directions that nobody saw are not blown up, and the logits stay."""
    model = make("llama").double()
    short = {name: torch.zeros_like(gram) for name, gram in grams(model).items()}
    for gram in short.values():
        gram[0, 0] = 1
    before = logits(model)
    assert any(name.endswith(f"{role}_proj") for name in rewrite(model, short))
    torch.testing.assert_close(logits(model), before, rtol=1e-7, atol=1e-7)


def test_sorted_neurons_are_like_their_neighbours():
    """Two kinds of neurons, mixed: afterwards one change of kind is left in the order."""
    model = make("llama").double()
    mlp, kinds = model.model.layers[0].mlp, torch.arange(48) % 2
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T):
            weight.mul_(0.1).add_(torch.where(kinds == 1, 1.0, -1.0)[:, None])
    sort_neurons(model)
    assert int((mlp.up_proj.weight.mean(1) > 0).int().diff().abs().sum()) == 1


def test_what_is_wrong_is_said():
    model = make("llama")
    with pytest.raises(ValueError, match=r"v_proj: align_heads needs the Gram matrix of its inputs"):
        align_heads(model, {})
    with pytest.raises(ValueError, match=r"o_proj: whiten_values needs the Gram matrix of its inputs"):
        whiten_values(model, {})
    with pytest.raises(ValueError, match=r"q_proj: the inputs that rotate_pairs was given are all zero or not finite"):
        rotate_pairs(model, {name: 0 * gram for name, gram in grams(model).items()})
    before = logits(model)
    check_equal(before, before + 1e-5 * before.std())
    with pytest.raises(ValueError, match=r"logits moved by 0\.5 of their standard deviation, allowed is 0\.001"):
        check_equal(before, before + 0.5 * before.std())


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_pairs_behind_a_norm_are_refused(family):
    model = make(family)
    sentence = r"layers\.0\.self_attn\.q_norm stands between a projection and its rotary positions .* pairs of queries"
    with pytest.raises(ValueError, match=sentence):
        rotate_pairs(model, grams(model))


def test_unknown_positions_and_heads_are_refused():
    model = make("mixtral")
    with pytest.raises(ValueError, match=r"layers\.0 is a MixtralDecoderLayer: how it pairs channels .* is not known"):
        rotate_pairs(model, {})
    wrong = make("llama")
    wrong.config.head_dim = 4
    with pytest.raises(ValueError, match=r"o_proj: the layers of this attention do not have 4 heads \(2 of keys"):
        permute_heads(wrong)
