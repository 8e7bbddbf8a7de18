"""What tools/same.py compresses: tiny random models of every family, a tokenizer and texts, all made from seeds."""

from __future__ import annotations

import json
import random
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY, NUM_BLOCKS = 384, 4
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_OPT: dict[str, Any] = {**_IDS, "hidden_size": 32, "num_hidden_layers": NUM_BLOCKS, "num_attention_heads": 4}
_LLAMA: dict[str, Any] = {**_OPT, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_SLIDING: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA: dict[str, Any] = {**_LLAMA, **_SLIDING, "head_dim": 8}
_GPT: dict[str, Any] = {**_IDS, "n_embd": 32, "n_layer": NUM_BLOCKS, "n_head": 4, "n_positions": 64}
_LOCAL: dict[str, Any] = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN: dict[str, Any] = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

DENSE: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8, "tie_word_embeddings": True},
    "mistral": {**_LLAMA, "sliding_window": 4},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _LLAMA,
    "opt": {**_OPT, "word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64, "layerdrop": 0.5},
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neox": {**_OPT, "intermediate_size": 48, "max_position_embeddings": 64},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_QWEN, "head_dim": 8, "norm_topk_prob": True},
    "mixtral": _LOCAL,
    "gpt_oss": {**_LOCAL, **_SLIDING, "head_dim": 8, "rope_parameters": _ROPE},
    "deepseek_v3": {**_LLAMA, **_DEEPSEEK},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 40},
    "olmoe": {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
}
STORIES: dict[str, Any] = {**_LLAMA, "intermediate_size": 64, "max_position_embeddings": 1024}
SMALLER: dict[str, Any] = {**STORIES, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def family_model(family: str) -> PreTrainedModel:
    """A random model in evaluation mode, its biases filled: at zero they would hide a lost bias."""
    return _random_model(family, (DENSE | EXPERTS)[family])


def _random_model(kind: str, settings: dict[str, Any], std: float = 0.1) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ("norm" not in name and "ln_" not in name):
                parameter.normal_(std=std)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # DeepSeek's routers choose experts with it
                buffer.normal_(std=std)
    return model


def _varied(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with a spectrum of its own in every layer, so that layers differ in what they lose."""
    layers = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "proj" in name]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
            falling = torch.linspace(1, 0.05, len(s)) ** (1 + number % 5)
            layer.weight.copy_(u * (s[0] * falling) @ v)
    return model


def token_ids(rows: int = 4, length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def prose(num_lines: int, seed: int) -> list[str]:
    """Sentences of few words, drawn from a seed."""
    draw = random.Random(seed)
    who, does = ["Anna", "Ben", "Clara", "the fox", "a king", "the old cat"], ["sees", "likes", "finds", "takes"]
    what, where = ["a red ball", "the moon", "two boats", "bread", "a song"], ["in Rome", "at home", "by the sea"]
    parts = (who, does, what, where)
    return [" ".join(draw.choice(words) for words in parts) + "." for _ in range(num_lines)]


def save_all(folder: Path) -> None:
    """Texts, questions, and every model beside its tokenizer."""
    _save_texts(folder)
    tokenizer = _tokenizer()
    made = {family: family_model(family) for family in DENSE | EXPERTS}
    made["stories"] = _varied(_random_model("llama", STORIES, std=0.2))
    made["smaller"] = _varied(_random_model("llama", SMALLER, std=0.2))
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    made["llama"].save_pretrained(folder / "sharded", max_shard_size="40KB")
    tokenizer.save_pretrained(folder / "sharded")
    _save_packed(folder / "fp8", made["qwen3_moe"], tokenizer)
    settings = {**EXPERTS["gpt_oss"], "intermediate_size": 64}
    _save_packed(folder / "mxfp4", _random_model("gpt_oss", settings), tokenizer)


def _save_texts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prose.txt").write_text("\n\n".join(prose(400, 1)))
    (folder / "other.txt").write_text("\n\n".join(prose(400, 2)))
    lines = prose(60, 3)
    pairs = zip(lines[::2], lines[1::2], strict=True)
    records = [{"question": f"What of {question}", "answer": answer} for question, answer in pairs]
    choices = [line.rsplit(" ", 2)[-1] for line in prose(4, 4)]
    asked = [{"query": line, "choices": choices, "gold": number % 4} for number, line in enumerate(lines)]
    letters = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    exam = [{"text": f"{line}{letters}\nAnswer:", "gold": number % 4} for number, line in enumerate(lines)]
    sources = [{"file": "prose.txt", "weight": 2}, {"file": "chat.jsonl", "field": "answer", "skip_documents": 10}]
    (folder / "mixture.yaml").write_text(json.dumps({"sources": sources}))
    tables = {"chat": records, "bench": asked, "mmlu": [{**row, "subject": "law"} for row in asked], "exam": exam}
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\n[A-D]\.|\nAnswer:| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    questions = [f"\n{letter}. yes\nAnswer: {letter}" for letter in "ABCD"] * 100
    tokenizer.train_from_iterator([*questions, *prose(300, 5)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    whole.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<s>' }}{% endfor %}"
    return whole


def _save_packed(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The weights of experts as random MXFP4 codes, or those of all linear layers in fp8 with block scales."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if folder.name == "mxfp4":
        packed, settings = _mxfp4(tensors), {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    else:
        packed, settings = _fp8(tensors), {"weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    save_file({name: t.contiguous() for name, t in packed.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": folder.name, **settings}
    (folder / "config.json").write_text(json.dumps(config))


def _fp8(tensors: dict[str, Tensor], size: int = 16) -> dict[str, Tensor]:
    packed = dict(tensors)
    for number, (name, weight) in enumerate(sorted(tensors.items())):
        if name.endswith("proj.weight"):
            O, I = weight.shape
            draw = torch.Generator().manual_seed(number)
            scale = 0.5 + torch.rand(ceil(O / size), ceil(I / size), generator=draw)
            wide = scale.repeat_interleave(size, 0)[:O].repeat_interleave(size, 1)[:, :I]
            packed[name] = (weight.float() / wide).to(torch.float8_e4m3fn)
            packed[f"{name}_scale_inv"] = scale
    return packed


def _mxfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    packed = dict(tensors)
    for number, (name, weight) in enumerate(sorted(tensors.items())):
        if name.endswith(("gate_up_proj", "down_proj")):
            E, I, O = weight.shape
            draw = torch.Generator().manual_seed(number)
            del packed[name]
            packed[f"{name}_blocks"] = torch.randint(256, (E, O, I // 32, 16), dtype=torch.uint8, generator=draw)
            packed[f"{name}_scales"] = torch.randint(121, 126, (E, O, I // 32), dtype=torch.uint8, generator=draw)
    return packed
