"""Rows about what a model does and costs: evaluate, direct, diagnose and profile."""

from typing import Literal, NotRequired, TypedDict

# evaluate and direct


class PerplexityRow(TypedDict):
    kind: Literal["perplexity"]
    text: str
    value: float
    loss: float  # nats per token
    num_tokens: int
    window: int
    stride: int
    bos: bool
    dtype: str
    domain: NotRequired[Literal["in_domain", "held_out"]]  # of a recovery, where the recipe says it


class DivergenceRow(TypedDict):
    kind: Literal["kl"]
    text: str
    value: float  # nats per token
    num_tokens: int
    window: int
    stride: int
    bos: bool
    dtype: str


class AccuracyRow(TypedDict):
    kind: Literal["accuracy"]
    task: str
    subject: str  # "all" or one of the task's
    value: float
    low: float  # of the Wilson 95 % interval
    high: float
    num_questions: int
    # of a benchmark
    shots: NotRequired[int]
    size: NotRequired[int]
    batch_size: NotRequired[int]
    acc_norm: NotRequired[float]


class AnswerRow(TypedDict):
    kind: Literal["answer"]
    task: str
    subject: str
    id: str
    gold: int
    predicted: int
    logits: NotRequired[list[float]]  # of the four letters
    likelihoods: NotRequired[list[float]]  # of any other choices
    acc_norm: NotRequired[float]


class LeftOutRow(TypedDict):
    kind: Literal["left_out"]
    task: str
    value: int
    limit: int
    longest: int
    ids: list[str]


class NoEntropyRow(TypedDict):
    kind: Literal["no_entropy"]
    task: str
    reason: str


class MacroAccuracyRow(TypedDict):
    kind: Literal["macro_accuracy"]
    value: float
    tasks: list[str]


class MacroDropRow(TypedDict):
    kind: Literal["macro_drop"]
    value: float  # percentage points
    tasks: list[str]


class ModelSizeRow(TypedDict):
    """What the model is before its recovery."""

    kind: Literal["size"]
    dtype: str
    parameters: int
    bytes: dict[str, int]  # by dtype


# diagnose


class EntropyRow(TypedDict):
    kind: Literal["output_entropy", "prediction_entropy"]
    value: float
    task: str


class PromptsRow(TypedDict):
    kind: Literal["prompts"]
    num_prompts: int
    digest: str


class PairRow(TypedDict):
    kind: Literal["similarity", "drift"]
    layer: int
    other: int
    value: float


class DriftProfileRow(TypedDict):
    kind: Literal["drift_profile"]
    layer: int
    value: float


class DriftMeanRow(TypedDict):
    kind: Literal["drift_mean"]
    region: str
    value: float


class ResidualRow(TypedDict):
    kind: Literal["residual"]
    layer: int
    angle: float  # degrees
    norm_ratio: float
    num_tokens: int


class ResidualLastRow(TypedDict):
    kind: Literal["residual_last"]
    layer: int
    angle: float
    norm_ratio: float
    num_tokens: int
    block: int


class SpectrumRow(TypedDict):
    kind: Literal["spectrum"]
    site: str
    block: int
    role: str | None
    mode: str
    exponent: float | None
    r_squared: float | None
    first: int | None
    last: int | None
    num_values: int


class SpectralGapRow(TypedDict):
    kind: Literal["spectral_gap"]
    site: str
    block: int
    role: str | None
    mode: str
    rank: int
    rank_of: str
    order: int
    value: float | None
    bound: float | None


class RestorationRow(TypedDict):
    kind: Literal["restoration"]
    site: str
    block: int
    set: str
    rank: int
    value: float
    num_entries: int
    tolerance: float


class TrackedEntryRow(TypedDict):
    kind: Literal["tracked_entry"]
    site: str
    block: int
    set: str
    row: int
    column: int
    value: float
    rank: int


class SuperWeightRow(TypedDict):
    kind: Literal["super_weight"]
    site: str
    block: int
    expert: int | None
    row: int
    column: int
    value: float
    input: float
    output: float
    spike: float
    share: float
    loss: float
    loss_without: float


class SuperWeightsRow(TypedDict):
    kind: Literal["super_weights"]
    value: int
    searched: int


class SensitivityRow(TypedDict):
    kind: Literal["sensitivity"]
    change: str
    block: int
    value: float
    loss: float
    whole: float
    whole_loss: float


# profile


class ResourcesRow(TypedDict):
    kind: Literal["resources"]
    model: str  # dense or compressed
    parameters: int
    macs_per_token: int
    bytes: dict[str, int]  # by dtype
    embedding_bytes: int
    bytes_on_disk: int
    peak_memory_bytes: int
    peak_memory_tokens: int
    dtype: str


class LatencyRow(TypedDict):
    kind: Literal["latency"]
    model: str
    tokens: int
    median_ms: float
    low_ms: float
    high_ms: float
    speedup: float
