"""The config of transformers that the metadata of a GGUF file describe.

Every key of the architecture is used here or known to change nothing: another one may stand for something that the
model computes, so that the file is refused by the key's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tensormix.storage.gguf.layouts import Heads
from tensormix.storage.gguf.record import Architecture

# Those that are read below, or say again what the tensors do.
_KNOWN = {
    "vocab_size",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scale_linear",
    "attention.key_length",
    "attention.value_length",
    "attention.causal",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "tensor_data_layout",
    "context_length",
    "feed_forward_length",
    "expert_feed_forward_length",
    "attention.head_count_kv",
    "attention.head_count",
    "expert_count",
    "expert_used_count",
    "ssm.dt_b_c_rms",
}
_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
# What Llama 3 may have been trained with: the file says the outcome only, factors by frequency.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_PATTERNS = {"gemma2": 2, "gemma3_text": 6}  # of so many blocks the last one sees everything
_LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}  # blocks of the one whose queries are scaled in another way
_OUT = "output.weight"


class Description:
    """The metadata of one model, and what of its tensors the config depends on.

    Args:
        shapes: of all tensors, by their names in the file.
        factors: the values of the tensors that stand for rotary frequencies, by their names.

    Raises ValueError, naming the key, if something is said that the class of transformers cannot do.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        architecture: Architecture,
        shapes: Mapping[str, tuple[int, ...]],
        factors: Mapping[str, list[float]],
        where: str,
    ) -> None:
        self.metadata, self.architecture, self.shapes, self.factors = metadata, architecture, shapes, factors
        self.where, self.name = where, str(metadata["general.architecture"])
        self._check_keys()
        self.width = self._number("embedding_length")
        self.num_heads = self.get("attention.head_count") and self._number("attention.head_count")
        self.head_dim = self.get("attention.key_length") or (self.width // self.num_heads if self.num_heads else 0)

    @property
    def heads(self) -> Heads:
        keys = self.get("attention.head_count_kv")
        return Heads(self.num_heads or 0, self._number("attention.head_count_kv") if keys else self.num_heads or 0)

    def get(self, key: str, otherwise: Any = None) -> Any:
        return self.metadata.get(f"{self.name}.{key}", otherwise)

    def _number(self, key: str) -> Any:
        """One number, or the one that all blocks share."""
        found = self.get(key)
        if isinstance(found, list) and len(set(found)) == 1:
            found = found[0]
        if isinstance(found, list):
            self._refuse(f"its blocks are of different sizes ({key}: {found[:4]}...)")
        if found is None:
            self._refuse(f"it does not say {self.name}.{key}")
        return found

    def _refuse(self, reason: str) -> None:
        raise ValueError(f"{self.where} cannot be read: {reason}; take the model's own folder of safetensors instead")

    def _check_keys(self) -> None:
        known = _KNOWN | self.architecture.keys.keys()
        for key in self.metadata:
            prefix, _, rest = key.partition(".")
            if prefix == self.name and rest not in known:
                self._refuse(
                    f"{key} = {self.metadata[key]!r} may change what the model computes, and nothing is known of it "
                    f"for {self.architecture.model_type}"
                )
        if not self.get("attention.causal", True) or self.get("ssm.dt_b_c_rms", False):
            self._refuse(
                f"it is of a kind that {self.architecture.model_type} is not (attention.causal, ssm.dt_b_c_rms)"
            )

    def config(self) -> dict[str, Any]:
        """What config.json would hold, but for `dtype` and `architectures`."""
        keys = {key: name for key, name in self.architecture.keys.items() if self.get(key) is not None}
        found: dict[str, Any] = {"model_type": self.architecture.model_type}
        found |= {name: self._number(key) for key, name in keys.items()}
        rows = self.shapes.get("token_embd.weight")
        if rows is None:
            self._refuse("it holds no token_embd.weight")
        assert rows is not None
        found["vocab_size"] = rows[0]
        found["tie_word_embeddings"] = _OUT not in self.shapes
        for name, key in _TOKENS.items():
            found[name] = self.metadata.get(f"tokenizer.ggml.{key}")
        if self.architecture.rotary != "none":
            found |= self._positions()
        return {**found, **self._special(), **self.architecture.constants}

    # Rotary positions

    def _positions(self) -> dict[str, Any]:
        size = self.width // self.heads.queries
        named = "head_dim" in self.architecture.keys.values()
        if self.get("attention.value_length", self.head_dim) != self.head_dim:
            self._refuse("its keys and values are of different sizes")
        if self.head_dim != size and not named:
            self._refuse(f"its heads are of {self.head_dim}, and those of {self.architecture.model_type} of {size}")
        turned = self.get("rope.dimension_count", self.head_dim)
        rope = {"rope_theta": float(self.get("rope.freq_base", 10000.0)), **self._scaling()}
        if self.architecture.rotary == "part":
            rope["partial_rotary_factor"] = turned / self.head_dim
        elif turned != self.head_dim:
            self._refuse(f"it turns {turned} of the {self.head_dim} numbers of a head")
        beside = {"head_dim": self.head_dim} if named else {}
        if self.architecture.model_type == "gemma3_text":  # positions near by and far away turn differently
            near = {"rope_type": "default", "rope_theta": float(self.get("rope.freq_base_swa", 10000.0))}
            return {**beside, "rope_parameters": {"full_attention": rope, "sliding_attention": near}}
        if self.get("rope.freq_base_swa") is not None:
            self._refuse("it turns near and far positions differently (rope.freq_base_swa)")
        return {**beside, "rope_parameters": rope}

    def _scaling(self) -> dict[str, Any]:
        kind, factor = self.get("rope.scaling.type", "none"), self.get("rope.scaling.factor", 1.0)
        if "rope_freqs.weight" in self.factors:
            return self._llama3(self.factors["rope_freqs.weight"])
        if "rope_factors_long.weight" in self.factors:
            return self._long()
        if self.get("rope.scale_linear") is not None:
            kind, factor = "linear", self.get("rope.scale_linear")
        if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
            return {"rope_type": "default"}
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind != "yarn":
            self._refuse(f"its rotary positions are scaled by {kind!r}")
        optional = {
            "attention_factor": self.get("rope.scaling.yarn_attn_factor"),
            "beta_fast": self.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": self.get("rope.scaling.yarn_beta_slow"),
        }
        length = self.get("rope.scaling.original_context_length") or self._number("context_length")
        beside = {key: value for key, value in optional.items() if value is not None}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length, **beside}

    def _llama3(self, factors: list[float]) -> dict[str, Any]:
        """The scaling of Llama 3 whose factors these are: they are computed again, and have to be the same."""
        scaling = {"rope_type": "llama3", "factor": float(round(max(factors), 4)), **_LLAMA3}
        low, high, length = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"], 8192
        theta = float(self.get("rope.freq_base", 10000.0))
        for number, factor in enumerate(factors):
            turns = length * theta ** (-2 * number / self.head_dim) / (2 * math.pi)  # over the whole length
            smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
            expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
            if abs(factor - expected) > 1e-4 * expected:
                self._refuse("its rotary frequencies (rope_freqs.weight) are none of Llama 3's")
        return scaling

    def _long(self) -> dict[str, Any]:
        length = self.get("rope.scaling.original_context_length")
        short, long = (self.factors[f"rope_factors_{which}.weight"] for which in ("short", "long"))
        found = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        if length is None:
            self._refuse("its long rotary factors come without rope.scaling.original_context_length")
        beside = {} if (by := self.get("rope.scaling.attn_factor")) is None else {"attention_factor": by}
        return {**found, "original_max_position_embeddings": length, **beside}

    # What single classes need beside their sizes

    def _special(self) -> dict[str, Any]:
        model_type = self.architecture.model_type
        found: dict[str, Any] = {}
        if model_type in ("llama", "granite", "smollm3", "qwen3", "qwen3_moe", "olmo2", "cohere", "nemotron"):
            found["attention_bias"] = "blk.0.attn_q.bias" in self.shapes
        if model_type in ("llama", "granite", "smollm3", "nemotron"):
            found["mlp_bias"] = "blk.0.ffn_up.bias" in self.shapes
        if model_type == "cohere":
            found["use_qk_norm"] = "blk.0.attn_q_norm.weight" in self.shapes
        if model_type == "stablelm":
            found["use_qkv_bias"] = "blk.0.attn_q.bias" in self.shapes
        if model_type == "starcoder2":
            found["use_bias"] = "blk.0.attn_q.bias" in self.shapes
        if model_type == "falcon":
            found["multi_query"], found["new_decoder_architecture"] = self.heads.keys == 1, self.heads.keys > 1
            found["num_ln_in_parallel_attn"] = 1 if self.heads.keys > 1 else None
        if model_type == "phi3":
            found["sliding_window"] = self.get("attention.sliding_window") or None
            found["original_max_position_embeddings"] = self.get(
                "rope.scaling.original_context_length", self._number("context_length")
            )
        if model_type in _PATTERNS:
            found |= self._gemma(model_type)
        elif self.get("attention.sliding_window") and "sliding_window" not in self.architecture.keys.values():
            self._refuse("some of its blocks see a window only (attention.sliding_window)")
        if "num_experts" in self.architecture.keys.values():
            found |= self._experts()
        return found

    def _gemma(self, model_type: str) -> dict[str, Any]:
        """How queries are scaled, and which blocks see everything: left to the reader by the file."""
        count, pattern = self._number("block_count"), self.get("attention.sliding_window_pattern")
        largest = count == _LARGEST_GEMMA[model_type]
        if isinstance(pattern, list):
            near = [bool(one) for one in pattern]
        else:
            every = pattern or _PATTERNS[model_type]
            near = [(number + 1) % every != 0 for number in range(count)]
        if not self.get("attention.sliding_window"):
            near = [model_type == "gemma2"] * count if model_type == "gemma2" else [False] * count
        return {
            "query_pre_attn_scalar": self.width // self.heads.queries if largest else self.head_dim,
            "layer_types": ["sliding_attention" if one else "full_attention" for one in near],
        }

    def _experts(self) -> dict[str, Any]:
        if self.get("expert_feed_forward_length") is not None:
            return {}
        return {"moe_intermediate_size": self.shapes["blk.0.ffn_gate_exps.weight"][1]}  # older files do not say it
