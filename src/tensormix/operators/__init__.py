"""What a weight becomes: modules that know sizes, multiplication and their own dense form; no data, no models."""

from __future__ import annotations

import inspect
from typing import Any

from tensormix.operators.base import Operator, StructuredLinear, did_you_mean, outermost
from tensormix.operators.basis_experts import BasisExperts
from tensormix.operators.blast import Blast
from tensormix.operators.block_tensor_train import BlockTensorTrain
from tensormix.operators.bypass import Bypass, StandIn
from tensormix.operators.chain import Chain
from tensormix.operators.concat import Concat
from tensormix.operators.cost import Cost, bits_of
from tensormix.operators.dense import Dense
from tensormix.operators.experts import DenseStack, Experts, ExpertStack, StackedLinear
from tensormix.operators.kronecker import Kronecker
from tensormix.operators.low_rank import LowRank
from tensormix.operators.low_rank_stack import LowRankStack, stack_of
from tensormix.operators.mixt import MixT
from tensormix.operators.monarch import Monarch
from tensormix.operators.padded import Padded
from tensormix.operators.per_head import PerHead
from tensormix.operators.placed import Placed
from tensormix.operators.quantized import Quantized
from tensormix.operators.remapped import Remapped
from tensormix.operators.residual_mlp import ResidualMLP
from tensormix.operators.shared import Owner, View, connect
from tensormix.operators.siblings import Siblings, why_apart
from tensormix.operators.sliced import SlicedBlock, SlicedNorm
from tensormix.operators.sparse import Sparse
from tensormix.operators.sparse_tucker_heads import SparseTuckerHeads
from tensormix.operators.sum import Sum
from tensormix.operators.tensor_train import TensorTrain
from tensormix.operators.tucker_heads import TuckerHeads
from tensormix.operators.tucker_stack import TuckerStack
from tensormix.operators.zero import Zero

__all__ = [
    "OPERATORS",
    "BasisExperts",
    "Blast",
    "BlockTensorTrain",
    "Bypass",
    "Chain",
    "Concat",
    "Cost",
    "Dense",
    "DenseStack",
    "ExpertStack",
    "Experts",
    "Kronecker",
    "LowRank",
    "LowRankStack",
    "MixT",
    "Monarch",
    "Operator",
    "Owner",
    "Padded",
    "PerHead",
    "Placed",
    "Quantized",
    "Remapped",
    "ResidualMLP",
    "Siblings",
    "SlicedBlock",
    "SlicedNorm",
    "Sparse",
    "SparseTuckerHeads",
    "StackedLinear",
    "StandIn",
    "StructuredLinear",
    "Sum",
    "TensorTrain",
    "TuckerHeads",
    "TuckerStack",
    "View",
    "Zero",
    "bits_of",
    "build",
    "connect",
    "outermost",
    "stack_of",
    "why_apart",
]

OPERATORS: dict[str, type[Operator]] = {
    "MixT": MixT,
    "LowRank": LowRank,
    "Chain": Chain,
    "Monarch": Monarch,
    "BlockTensorTrain": BlockTensorTrain,
    "Blast": Blast,
    "Kronecker": Kronecker,
    "Zero": Zero,
    "Padded": Padded,
    "Sum": Sum,
    "Placed": Placed,
    "Concat": Concat,
    "PerHead": PerHead,
    "Bypass": Bypass,
    "Dense": Dense,
    "Quantized": Quantized,
    "Remapped": Remapped,
    "ResidualMLP": ResidualMLP,
    "Siblings": Siblings,
    "Sparse": Sparse,
    "TensorTrain": TensorTrain,
    "TuckerHeads": TuckerHeads,
    "SparseTuckerHeads": SparseTuckerHeads,
    "TuckerStack": TuckerStack,
    "BasisExperts": BasisExperts,
    "View": View,
    "DenseStack": DenseStack,
    "LowRankStack": LowRankStack,
    "ExpertStack": ExpertStack,
}


def build(spec: dict[str, Any]) -> Any:
    """An empty operator from its `spec`, nested specs included; the weights are loaded afterwards.

    Raises:
        ValueError: the operator is unknown, or a size is unknown, missing or not allowed.
    """
    name = spec.get("operator", "(none)")
    if name not in OPERATORS:
        raise ValueError(f"unknown operator {name!r}{did_you_mean(name, OPERATORS)} Known: {', '.join(OPERATORS)}.")
    given = {key: _build_inner(value) for key, value in spec.items() if key != "operator"}
    known = inspect.signature(OPERATORS[name]).parameters
    for size in given:
        if size not in known:
            hint = did_you_mean(size, known)
            raise ValueError(f"{name}: unknown size {size!r}{hint} Known: {', '.join(known)}.")
    missing = [k for k, p in known.items() if p.default is inspect.Parameter.empty and k not in given]
    if missing:
        raise ValueError(f"{name}: missing size {', '.join(missing)}. Known: {', '.join(known)}.")
    return OPERATORS[name](**given)


def _build_inner(value: Any) -> Any:
    """Specs inside a spec become operators; everything else stays as it is. JSON may sort the keys of a dictionary."""
    if isinstance(value, list | tuple):
        return [_build_inner(item) for item in value]
    if isinstance(value, dict):
        return build(value) if "operator" in value else {key: _build_inner(item) for key, item in value.items()}
    return value
