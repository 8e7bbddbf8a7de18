"""Models whose blocks are not one list that text passes once, or hold layers that text does not pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    MusicgenForCausalLM,
    Zamba2ForCausalLM,
)

import tensormix
import tensormix.hf
from tensormix.plan import Plan
from tensormix.sites import find_sites, locate_blocks
from tensormix.sites.calls import record_calls
from tensormix.sites.other_blocks import other_blocks
from tensormix.sites.through import Blocks, through
from tensormix.sites.twin import twin_of

IDS: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **IDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
XLM = {"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True}
TOKENS = torch.randint(10, 60, (2, 12), generator=torch.Generator().manual_seed(0))
SVD, SVD_LLM = ({"method": {"name": name, "keep": 0.5}} for name in ("svd", "svd_llm"))


def make(kind: str, sizes: dict[str, Any], auto: Any = AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    return auto.from_config(CONFIG_MAPPING[kind](**sizes)).eval()


@pytest.mark.parametrize(
    ("kind", "sizes", "names"),
    [
        ("xlm", XLM, ("transformer.attentions", "transformer.ffns")),
        ("hrm_text", LLAMA, ("L_module.layers", "H_module.layers")),
    ],
)
@pytest.mark.parametrize("rule", [SVD, SVD_LLM, {"blocks": 0, "method": {"name": "drop_blocks"}}])
def test_several_lists_that_text_passes_are_refused_by_their_names(kind, sizes, names, rule):
    model = make(kind, sizes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        tensormix.compress(model, Plan.model_validate([rule]), [TOKENS])
    assert all(name in str(error.value) for name in names)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("kind", "sizes"), [("llama", LLAMA), ("gpt2", {**IDS, "n_embd": 32, "n_layer": 2})])
def test_one_list_is_one_list(kind, sizes):
    assert other_blocks(make(kind, {**sizes, **({"n_head": 4} if kind == "gpt2" else {})})) == []


def test_an_encoder_stays_as_it_is():
    """Its decoder is compressed, on the inputs that the model feeds it."""
    sizes = {**IDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
             "max_position_embeddings": 64}  # fmt: skip
    model = make("bart", sizes, AutoModelForSeq2SeqLM)
    assert other_blocks(model) == ["model.encoder.layers"]
    assert all(site.name.startswith("model.decoder.layers") for site in find_sites(model))
    with torch.no_grad():
        wanted = model.model(TOKENS, output_hidden_states=True).decoder_hidden_states
    for part in through(model, Blocks(), [TOKENS]):
        assert torch.allclose(part.pass_on("dense")[0], wanted[part.span.stop], atol=1e-5)
    tensormix.compress(model, Plan.model_validate([SVD_LLM]), [TOKENS])


def test_a_model_that_needs_more_than_text_says_so():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = make("t5", sizes, AutoModelForSeq2SeqLM)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration .* other inputs than text .* svd"):
        tensormix.compress(model, Plan.model_validate([SVD_LLM]), [TOKENS])
    tensormix.compress(model, Plan.model_validate([SVD]))


def test_a_model_that_takes_images_first_is_calibrated_on_the_part_that_takes_text():
    """What enters its language model is what the language model is fed alone."""
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
             "image_size": 8, "patch_size": 4}  # fmt: skip
    former = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
              "num_attention_heads": 2, "encoder_hidden_size": 16}  # fmt: skip
    text = {**IDS, "model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
    model = make(
        "blip-2", {"vision_config": tower, "qformer_config": former, "text_config": text}, AutoModelForImageTextToText
    )
    assert {site.name.split(".")[0] for site in find_sites(model)} == {"language_model"}
    with torch.no_grad():
        wanted = model.language_model.model(TOKENS, output_hidden_states=True).hidden_states
    for part in through(model, Blocks(), [TOKENS]):
        states = part.pass_on("dense")[0]
        assert part.is_last or torch.allclose(states, wanted[part.span.stop], atol=1e-5)
    tensormix.compress(model, Plan.model_validate([SVD_LLM]), [TOKENS])


class Scaled(nn.Module):
    """Two blocks, and a number that what passes from the one to the other is multiplied by."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.embed, self.factor = nn.Embedding(64, 8), factor
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        return self.layers[1](self.factor * self.layers[0](self.embed(tokens)))


def test_a_model_that_works_between_its_blocks_is_not_calibrated():
    """Else the second block would be shown what the first returns."""
    record_calls(Scaled(1.0), [TOKENS])
    with pytest.raises(ValueError, match="before it enters the next"):
        record_calls(Scaled(2.0), [TOKENS])


def test_of_several_lists_the_blocks_are_as_many_as_the_config_says():
    model: Any = nn.Module()
    model.compressor, model.layers = (nn.ModuleList(nn.Linear(4, 4) for _ in range(n)) for n in (3, 2))
    assert locate_blocks(model)[0] == "compressor"
    model.config = SimpleNamespace(num_hidden_layers=2)
    assert locate_blocks(model)[0] == "layers"


@pytest.mark.parametrize("kind", ["zamba2", "musicgen_decoder"])
def test_layers_that_stay_idle_are_no_sites_though_others_in_their_list_are_called(kind):
    """One adapter of a list for each use of a shared block; attention to what there is none of."""
    sizes = {
        "zamba2": {**LLAMA, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 16,
                   "num_mem_blocks": 1, "num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2,
                   "hybrid_layer_ids": [1, 3], "adapter_rank": 4, "chunk_size": 8},
        "musicgen_decoder": {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "num_codebooks": 2, "pad_token_id": 0, "bos_token_id": 0},
    }  # fmt: skip
    cls = Zamba2ForCausalLM if kind == "zamba2" else MusicgenForCausalLM
    model, called = cls(CONFIG_MAPPING[kind](**sizes[kind])).eval(), set()
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        model.base_model(TOKENS, use_cache=False)
    sites = {site.name for site in find_sites(model) if site.kind == "linear"}
    assert sites and sites == {name for name in called if name.startswith(f"{twin_of(model).root}.")}
    own = {"sites": r"(?!.*\.shared_transformer\.).*", **SVD_LLM}  # what blocks share stays dense
    tensormix.compress(model, Plan.model_validate([own]), [torch.cat([TOKENS, TOKENS])])
    unread = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)} - called
    assert any("adapter_list" in name or "encoder_attn" in name for name in unread)
