"""Packed tensors through transformers' loader: they become plain weights before anything else is done with them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, _IdentityOp
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tensormix.sites.families import EXPERT_WEIGHTS
from tensormix.storage.foreign import Foreign
from tensormix.storage.packed import Pack

# By pack, what is stored for a parameter: ends of names.
_STORED = {
    "fp8": {"weight": ["weight", "weight_scale_inv", "activation_scale"]},
    "mxfp4": {
        name: [f"{name}_blocks", f"{name}_scales"] for name in (EXPERT_WEIGHTS["gate_up"], EXPERT_WEIGHTS["down"])
    },
}
# Dtypes, as safetensors and torch name them, that are no weights without scales.
_CODES = (
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8", "I16", "I32",
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint8, torch.int8, torch.int16, torch.int32,
)  # fmt: skip


class Unpacking(WeightConverter):
    """Makes weights of stored parts; of experts one by one, before `operations` merge them.

    Not an operation itself, because transformers keeps the reason to itself when an operation fails.
    """

    __slots__ = ("dtype", "pack")

    def __init__(
        self, source_patterns: list[str], target_patterns: list[str], operations: list[Any], pack: Pack
    ) -> None:
        super().__init__(source_patterns, target_patterns, operations)
        self.pack = pack
        self.dtype = torch.get_default_dtype()

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        stored = self.materialize_tensors()
        names = list(dict.fromkeys(map(self.pack.dense_name, stored)))
        try:
            weights = {name: self._unpack(name, stored) for name in names}
        except ValueError as error:
            raise ValueError(f"{layer_name}: {error}") from None
        for name, experts in weights.items():
            self.collected_tensors[name] = experts  # pyright: ignore[reportArgumentType]
        return super().convert(layer_name, *args, **kwargs)

    def _unpack(self, name: str, stored: dict[str, list[Tensor]]) -> list[Tensor]:
        parts = self.pack.companions(name, stored)
        counts = {part: len(stored[part]) for part in parts.values()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{number} of {part}" for part, number in counts.items())
            raise ValueError(f"the parts of the experts do not match ({found}); the checkpoint is incomplete")
        columns = [stored.pop(part) for part in parts.values()]
        weights = []
        while columns[0]:  # what is packed goes while the weights come
            weights.append(
                self.pack.unpack({role: c.pop(0) for role, c in zip(parts, columns, strict=True)}, self.dtype)
            )
        return weights


class PackedQuantizer(HfQuantizer):
    """A quantizer whose checkpoint may hold packed tensors; the loaded model holds plain weights.

    Raises ValueError while loading, naming the parameter, if a tensor cannot be unpacked.
    """

    def __init__(
        self, quantization_config: QuantizationConfigMixin, pack: Pack | Foreign | None, **kwargs: Any
    ) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pack = pack
        self._conversions: list[tuple[Any, Any]] = []  # of transformers for this model, and what they became here

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # Where the config does not say, it is that of the first tensor on disk, which may be a packed one.
        return torch.bfloat16 if self.pack and dtype.itemsize == 1 else dtype

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        if self.pack is None:
            return super().update_weight_conversions(weight_conversions, model)
        if not isinstance(self.pack, Pack):
            raise ValueError(
                f"weights packed as {self.pack.name} are read by tensormix.models.load_model, or compressed from their "
                "folder; transformers alone does not make plain weights of them"
            )
        self._conversions = [(conversion, _unpacking(conversion, self.pack)) for conversion in weight_conversions]
        rest = [
            Unpacking(list(stored), [name], [_IdentityOp()], self.pack)
            for name, stored in _STORED[self.pack.name].items()
        ]
        return [ours for _, ours in self._conversions] + rest

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        if isinstance(converter, Unpacking) and dtype is not None:
            converter.dtype = dtype  # it casts; codes and scales must come as they are stored
            return None
        stored = param.get_dtype() if hasattr(param, "get_dtype") else param.dtype  # a part of a file, or a tensor
        if self.pack and dtype is not None and dtype.is_floating_point and stored in _CODES:
            raise ValueError(
                f"{converter.source_patterns[0]} is stored as {stored}, and nothing says how a checkpoint packed as "
                f"{self.pack.name} stores such a tensor"
            )
        return super().get_new_dtype(converter, param, dtype)

    def forget_pack(self, model: nn.Module) -> None:
        """After loading: the model is saved as one of plain weights."""
        if self.pack is not None:
            used = [plain for plain, ours in self._conversions if ours.was_used()]
            model._weight_conversions = used  # pyright: ignore[reportArgumentType]
            self.pack = None


def _unpacking(conversion: Any, pack: Pack) -> Any:
    """The conversion as it is, or if it makes parameters of weights, one that takes packed ones too."""
    if not isinstance(conversion, WeightConverter):
        return conversion
    sources = conversion._original_source_patterns
    leaf = sources[0].rpartition(".")[2]
    stored = _STORED[pack.name].get(leaf)
    if stored is None or not all(source.endswith(f".{leaf}") for source in sources):
        return conversion
    patterns = [re.sub(f"{leaf}$", part, source) for source in sources for part in stored]
    ours = Unpacking(patterns, list(conversion._original_target_patterns), conversion.operations, pack)
    ours.scope_prefix, ours.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    ours.force_cpu = conversion.force_cpu
    return ours
