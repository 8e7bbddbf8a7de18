"""One rotation of the residual stream, folded into all weights: logits stay, channels become principal components."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tensormix.compression import compress
from tensormix.plan import Plan
from tensormix.reparameterise import residual_basis, rotate_residual
from tensormix.reparameterise.residual import find_stream
from tensormix.sites import blocks, find_sites
from zoo import ZOO, logits, make, token_ids

TURNED = ["llama", "qwen2", "qwen3", "mistral", "phi3", "opt", "gpt2", "gptj", "gpt_neox"]
LAYER_NORMS = ["opt", "gpt2", "gptj", "gpt_neox"]


class ExactNorm(nn.Module):
    """The norm of transformers without its rounding to float32, which would hide what the rotation changes."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def exact(family, **changes):
    """In fp64 throughout, with gains and shifts that are not the ones and zeros of a new model."""
    model = make(family, **changes).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, ExactNorm(module))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                low = 0.5 if name.endswith("weight") else -0.5
                parameter.copy_(low + torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def rotation(width, *, keeps_ones=False):
    turned = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)).double()).Q
    if not keeps_ones:
        return turned
    ones = torch.eye(width).double()
    ones[0] = 1
    frame = torch.linalg.qr(ones.T).Q  # its first column is the direction of ones
    inner = torch.linalg.qr(turned[1:, 1:]).Q
    return frame @ torch.block_diag(inner.new_ones(1, 1), inner) @ frame.T


def energies(model):
    """Of each channel that the norms of the blocks hand on, gains left out; tokens as in calibration."""
    seen = []
    for norm in find_stream(model).norms[:-1]:
        norm.module.register_forward_pre_hook(lambda _, args, norm=norm: seen.append(norm.without_gain(args[0])))
    with torch.no_grad():
        model(token_ids())
    return torch.cat([states.reshape(-1, 32) for states in seen])


@pytest.mark.parametrize("family", TURNED)
def test_any_rotation_gives_the_same_logits(family):
    """Gains, shifts with and without a bias to go to, learned positions, tied and parallel blocks included."""
    model = exact(family)
    before, old = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    turn = rotation(32, keeps_ones=family in LAYER_NORMS)
    names = rotate_residual(model, turn)
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)
    changed = {name for name, p in model.named_parameters() if name not in old or not torch.equal(old[name], p)}
    assert {f"{name}.weight" for name in names} <= changed
    dense = {site.name for site in find_sites(model) if site.kind == "linear"}
    assert dense < set(names), "every layer of every block reads or writes the stream"


@pytest.mark.parametrize("family", TURNED)
def test_the_principal_basis_gives_the_same_logits_and_sorted_channels(family):
    model = exact(family)
    before = logits(model)
    rotate_residual(model, residual_basis(model, [token_ids()]))
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)
    states = energies(model)
    moment = states.T @ states / len(states)
    if family in LAYER_NORMS:  # their last coordinate is the mean, which a reflection swaps with the vector of ones
        last = torch.zeros(32, dtype=torch.float64)
        last[-1] = 1
        between = last - 32**-0.5
        swap = torch.eye(32) - 2 * torch.outer(between, between) / between.square().sum()
        moment = swap @ moment @ swap
        assert moment[-1].abs().max() < 1e-9
    assert (moment - moment.diagonal().diag()).abs().max() < 1e-9 * moment.diagonal()[0]
    assert moment.diagonal().diff().max() < 1e-9, "the strongest first"
    assert moment.diagonal()[0] > 4 * moment.diagonal()[16]


def test_the_basis_of_some_blocks_is_of_them_alone():
    model = exact("llama")
    basis = residual_basis(model, [token_ids()], blocks=[2])
    seen = []
    block = blocks(model)[2]
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        norm.register_forward_hook(lambda module, _, out: seen.append((out / module.weight).flatten(0, 1)))
    logits_of_calibration = model(token_ids()).logits.detach()
    turned = torch.cat(seen).detach() @ basis
    moment = turned.T @ turned
    assert (moment - moment.diagonal().diag()).abs().max() < 1e-9 * moment[0, 0]
    halves = [residual_basis(model, [token_ids()[:1], token_ids()[1:]], blocks=[2])]
    torch.testing.assert_close((halves[0] * basis).sum(0)[:8].abs(), torch.ones(8).double())
    rotate_residual(model, basis)
    torch.testing.assert_close(model(token_ids()).logits.detach(), logits_of_calibration, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt"])
def test_tied_embeddings_are_two_matrices_afterwards_and_come_back_so(family, tmp_path):
    model = make(family)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is head.weight and model.config.tie_word_embeddings
    before = logits(model)
    rotate_residual(model, residual_basis(model, [token_ids()]))
    assert head.weight is not embedding.weight and not model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(again.eval()), logits(model))


def test_with_all_channels_turned_the_slices_of_a_later_basis_are_the_axes():
    """What slicing measures in a turned model: its basis of those blocks is the identity, up to signs."""
    model = exact("llama")
    rotate_residual(model, residual_basis(model, [token_ids()], blocks=[1]))
    again = residual_basis(model, [token_ids()], blocks=[1])
    torch.testing.assert_close(again[:, :16].abs(), torch.eye(32).double()[:, :16], atol=1e-6, rtol=0)


def test_fewer_tokens_than_channels_and_bfloat16():
    model = make("llama").to(torch.bfloat16)
    before = logits(model).double()
    rotate_residual(model, residual_basis(model, [token_ids(rows=1, length=5)]))
    after = logits(model).double()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert float((after - before).norm() / before.norm()) < 0.05


@pytest.mark.parametrize("family", sorted(set(ZOO) - set(TURNED)))
def test_families_with_norms_elsewhere_are_refused(family):
    model = make(family)
    sentence = r"layers\.0 is a Gemma\dDecoderLayer: the residual stream can be turned where .* other models change"
    for ask in (lambda: rotate_residual(model, rotation(32)), lambda: residual_basis(model, [token_ids()])):
        with pytest.raises(ValueError, match=sentence):
            ask()


def test_what_is_refused_leaves_the_model_as_it_was():
    model, layered = make("qwen3"), make("gpt2")
    states = [copy.deepcopy(m.state_dict()) for m in (model, layered)]
    for asked, sentence in (
        (torch.eye(31), r"rotation must be 32x32 for this residual stream, got 31x31"),
        (2 * torch.eye(32), r"rotation must be orthogonal: R\^T R is off by 3, allowed is 1e-05"),
        (torch.full((32, 32), torch.nan), r"rotation must be orthogonal: R\^T R is off by nan"),
    ):
        with pytest.raises(ValueError, match=sentence):
            rotate_residual(model, asked)
    with pytest.raises(ValueError, match=r"must keep the vector of ones: the layer norms of GPT2LMHeadModel subtract"):
        rotate_residual(layered, rotation(32))
    with torch.no_grad():
        layered.transformer.ln_f.weight[3] = 0
        layered.transformer.ln_f.bias[3] = 1
    states[1] = copy.deepcopy(layered.state_dict())
    with pytest.raises(ValueError, match=r"ln_f: its gain is zero and its shift is not at 1 channels, and lm_head has"):
        rotate_residual(layered, torch.eye(32))
    with pytest.raises(ValueError, match=r"blocks must be some of 0 to 3, got \[2, 7\]"):
        residual_basis(model, [token_ids()], blocks=[7, 2])
    with pytest.raises(ValueError, match=r"there are no calibration batches: the iterable is empty"):
        residual_basis(model, [])
    for one, state in zip((model, layered), states, strict=True):
        assert all(torch.equal(value, one.state_dict()[name]) for name, value in state.items())
        assert one.config.tie_word_embeddings


def test_other_kinds_of_models_are_refused():
    after = make("opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match=r"is a OPTDecoderLayer with norms behind attention and MLP: the residual"):
        rotate_residual(after, torch.eye(32))
    with pytest.raises(
        ValueError, match=r"OPTForCausalLM: turning the residual stream needs an embedding of its width"
    ):
        rotate_residual(make("opt", word_embed_proj_dim=16), torch.eye(32))
    model = make("llama")
    compress(model, Plan.model_validate([{"blocks": 1, "sites": ["q"], "method": {"name": "svd", "keep": 0.5}}]))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj is a LowRank already"):
        rotate_residual(model, torch.eye(32))
