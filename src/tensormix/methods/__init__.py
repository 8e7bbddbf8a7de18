"""How an operator is fitted; the table is the table of contents."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import Field

from tensormix.methods.auto import Auto
from tensormix.methods.base import BlockMethod, JointMethod, LinearMethod, Method, ModelMethod, SpanMethod, StackMethod
from tensormix.methods.blast import BlastMethod
from tensormix.methods.btt import BttMethod
from tensormix.methods.coala import Coala
from tensormix.methods.dense_sparse_tt import DenseSparseTt
from tensormix.methods.dobi_svd import DobiSvd
from tensormix.methods.drop_blocks import DropBlocks
from tensormix.methods.flat_llm import FlatLlm
from tensormix.methods.gptq import Gptq
from tensormix.methods.hassle_free import HassleFree
from tensormix.methods.hqq import Hqq
from tensormix.methods.laser import Laser, laser_search
from tensormix.methods.lestd import LeStd
from tensormix.methods.mixt import Mixt
from tensormix.methods.mixt_chain import MixtChain, MixtRotated
from tensormix.methods.mixt_hybrid import MixtLowRank, MixtSparse, split_search
from tensormix.methods.mobe import Mobe
from tensormix.methods.monarch import MonarchMethod
from tensormix.methods.narrow import Narrow
from tensormix.methods.null import MeanOutput, ZeroMethod
from tensormix.methods.per_head_tt import PerHeadTt
from tensormix.methods.rounded_low_rank import RoundedLowRank
from tensormix.methods.rounded_parts import RoundedParts
from tensormix.methods.rounded_sparse import RoundedSparse
from tensormix.methods.rounding import IntegerGrid, Rounding
from tensormix.methods.rtn import Rtn
from tensormix.methods.slice_gpt import SliceGpt
from tensormix.methods.sola import Sola
from tensormix.methods.streamline import Streamline
from tensormix.methods.svd import Svd
from tensormix.methods.svd_llm import SvdLlm
from tensormix.methods.td_moe import TdMoe
from tensormix.methods.tensor_train import TensorTrainMethod
from tensormix.methods.trawl import Trawl
from tensormix.methods.tucker_heads import TuckerAttention

__all__ = [
    "METHODS",
    "Auto",
    "BlastMethod",
    "BlockMethod",
    "BttMethod",
    "Coala",
    "DenseSparseTt",
    "DobiSvd",
    "DropBlocks",
    "FlatLlm",
    "Gptq",
    "HassleFree",
    "Hqq",
    "JointMethod",
    "Laser",
    "LeStd",
    "LinearMethod",
    "MeanOutput",
    "Method",
    "Mixt",
    "MixtChain",
    "MixtLowRank",
    "MixtRotated",
    "MixtSparse",
    "Mobe",
    "ModelMethod",
    "MonarchMethod",
    "Narrow",
    "PerHeadTt",
    "RoundedLowRank",
    "RoundedSparse",
    "Rtn",
    "SliceGpt",
    "Sola",
    "SpanMethod",
    "StackMethod",
    "Streamline",
    "Svd",
    "SvdLlm",
    "TdMoe",
    "TensorTrainMethod",
    "Trawl",
    "TuckerAttention",
    "ZeroMethod",
    "laser_search",
    "split_search",
    "with_sizes",
]  # fmt: skip

METHODS: dict[str, type[Method]] = {
    "mixt": Mixt,
    "svd": Svd,
    "zero": ZeroMethod,
    "mean_output": MeanOutput,
    "drop_blocks": DropBlocks,
    "svd_llm": SvdLlm,
    "mixt_low_rank": MixtLowRank,
    "mixt_sparse": MixtSparse,
    "mixt_chain": MixtChain,
    "mixt_rotated": MixtRotated,
    "monarch": MonarchMethod,
    "btt": BttMethod,
    "blast": BlastMethod,
    "tensor_train": TensorTrainMethod,
    "per_head_tt": PerHeadTt,
    "dense_sparse_tt": DenseSparseTt,
    "coala": Coala,
    "laser": Laser,
    "hassle_free": HassleFree,
    "dobi_svd": DobiSvd,
    "rtn": Rtn,
    "gptq": Gptq,
    "hqq": Hqq,
    "rounded_low_rank": RoundedLowRank,
    "rounded_sparse": RoundedSparse,
    "sola": Sola,
    "streamline": Streamline,
    "flat_llm": FlatLlm,
    "narrow": Narrow,
    "slice_gpt": SliceGpt,
    "tucker_heads": TuckerAttention,
    "lestd": LeStd,
    "trawl": Trawl,
    "td_moe": TdMoe,
    "mobe": Mobe,
    "auto": Auto,
}


def with_sizes(data: Any) -> Any:
    """The mapping of a method, with its size filled in where that is left to a budget."""
    if not isinstance(data, dict):
        return data
    if isinstance(data.get("of"), dict):
        return {**data, "of": with_sizes(data["of"])}
    cls = METHODS.get(str(data.get("name")))
    if cls is None or cls.size is None or data.get("ranks"):
        return data
    return {cls.size: cls.largest, **data}


# Only here are all methods known among which the `of` of rounding and the `among` of auto choose.
_linear = [cls for cls in METHODS.values() if issubclass(cls, LinearMethod) and not issubclass(cls, IntegerGrid)]
for _rounding in (cls for cls in METHODS.values() if issubclass(cls, Rounding)):
    _rounding.model_rebuild(
        _types_namespace={"AnyLinearMethod": Annotated[reduce(or_, _linear), Field(discriminator="name")]}
    )
_rounders = [cls for cls in METHODS.values() if issubclass(cls, Rounding)]
for _rounded in (cls for cls in METHODS.values() if issubclass(cls, RoundedParts)):
    _rounded.model_rebuild(
        _types_namespace={"AnyRounding": Annotated[reduce(or_, _rounders), Field(discriminator="name")]}
    )
_candidates = [cls for cls in METHODS.values() if cls is not Auto]
Auto.model_rebuild(_types_namespace={"AnyCandidate": Annotated[reduce(or_, _candidates), Field(discriminator="name")]})
