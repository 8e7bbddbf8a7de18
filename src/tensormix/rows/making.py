"""Rows about how a model is made (allocate, reparameterise, compress, recover), and the cells of many runs."""

from typing import Literal, NotRequired, TypedDict

# allocate


class BudgetRow(TypedDict):
    kind: Literal["budget"]
    of: str  # unit of the costs below
    over: str
    by: str
    keep: float
    dense: int
    asked: int
    achieved: int
    achieved_keep: float
    error: float


class SizeRow(TypedDict):
    """One site of a budget."""

    kind: Literal["size"]
    site: str
    block: int
    role: str | None
    method: str
    size: int | float | str | list[int] | None  # None: the site stays dense
    setting: str | None  # which setting of the method the size is
    cost: int
    dense_cost: int
    error: float | None
    importance: float | None
    importance_error: NotRequired[float | None]  # one standard error, over the tokens that it was measured on


class CandidateRow(TypedDict):
    """What one region of a model could become where methods compete, and what the model loses by that alone."""

    kind: Literal["candidate"]
    region: str  # the module that holds its layers, or the block
    block: int
    method: str  # as it is called among those that compete
    size: int | float | str | list[int] | None
    cost: int | None  # None: refused
    dense_cost: int
    loss: float | None  # nats per token
    loss_error: float | None  # one standard error, over the tokens
    chosen: bool
    refused: str | None  # why it cannot be there


class ContenderRow(TypedDict):
    """A whole plan within the budget: of all methods that compete, or of one alone."""

    kind: Literal["contender"]
    contender: str
    cost: int | None  # of the sites; None: it cannot meet the budget
    predicted: float | None  # the sum of what its candidates lose alone, nats per token
    bound: float | None  # no choice of its methods is predicted to lose less
    # What the whole plan loses on windows that no fit saw. None: it cannot meet the budget, or it has one size
    # everywhere and is predicted to lose more than another plan was measured to.
    measured: float | None
    measured_error: float | None  # one standard error, over the tokens
    tokens: int  # on which it was measured
    chosen: bool


class TrialRow(TypedDict):
    """One evaluation of a search."""

    kind: Literal["trial"]
    choices: dict[str, float]  # site -> fraction of the rank
    accuracy: float
    log_loss: float  # nats
    chosen: bool


# reparameterise and compress


class BasesRow(TypedDict):
    kind: Literal["bases"]
    sites: list[str]
    error_before: float
    error_after: float
    error_calls: int
    logits_moved: float  # largest change of a logit, in units of their standard deviation


class SiteRow(TypedDict):
    """One site of compress, the only row without `kind`."""

    site: str
    block: int | None  # None: outside the blocks
    role: str | None  # None: a whole block
    method: str
    operator: str
    dense_parameters: int
    parameters: int
    dense_bits: int
    bits: int
    dense_macs_per_token: int
    macs_per_token: int
    relative_error: float | None  # of the weight; None where it has none
    seconds: float
    tokens_per_expert: NotRequired[list[int]]
    # facts of methods that fit by the inputs
    fit_steps: NotRequired[int | list[int]]  # of a stack a list, as the three below
    fit_residual: NotRequired[float | list[float]]
    fit_precision: NotRequired[str | list[str]]
    output_error: NotRequired[float | list[float]]
    matched_output_error: NotRequired[float | list[float]]
    # facts of methods that choose blocks
    chosen_by: NotRequired[str]
    window: NotRequired[list[int]]
    angle: NotRequired[float]
    influence: NotRequired[float]
    candidates: NotRequired[dict[str, float]]
    mse: NotRequired[float]  # of a trained layer in the place of blocks, and of nothing in their place
    mse_dropped: NotRequired[float]


# recover


class LossRow(TypedDict):
    kind: Literal["loss"]
    step: int
    phase: str
    loss: float
    learning_rate: float
    tokens: int
    seconds: float


class RateRow(TypedDict):
    kind: Literal["rate"]
    learning_rate: float
    promised: float | None  # of the loss, by the first step, to first order; None where there is no loss
    said: str | None  # to the user, of a rate that is too high


class HeldOutRow(TypedDict):
    kind: Literal["held_out"]
    step: int
    by: Literal["lm", "kl"]
    loss: float  # nats for a token
    tokens: int  # that were judged
    # where other texts judge too: the loss on windows of the text that is learned from, and on those
    in_domain: NotRequired[float]
    elsewhere: NotRequired[float]


class KeptRow(TypedDict):
    kind: Literal["kept"]
    step: int
    loss: float
    start: float
    end: float
    said: str | None  # to the user: of a state that was not the last, and of other texts


class LocalLossRow(TypedDict):
    kind: Literal["local_loss"]
    block: int
    before: float
    after: float
    steps: int
    tokens: int
    seconds: float


class EarlyStopRow(TypedDict):
    kind: Literal["early_stop"]
    step: int
    accuracy: float
    outcome: str


# sweeps and comparisons


class SeriesRow(TypedDict):
    """Which cells of a sweep belong together."""

    direction: str  # in which the blocks follow each other
    method: str
    num_branches: int | None  # where they are varied
    settings: dict[str, object]  # all that is varied
    variant: str  # the method with what is varied but the branches
    series: str  # all of it, for people


class CellRow(SeriesRow):
    """One cell of a sweep."""

    cell: str
    folder: str
    depth: int  # number of compressed blocks; 0: the dense model
    blocks: list[int]


class BoundaryRow(SeriesRow):
    """Where accuracy leaves its plateau; `Boundary` says what its keys mean."""

    kind: Literal["boundary"]
    value: int | None
    last_good: int
    low: int | None
    high: int | None
    confidence: float
    plateau: float
    plateau_spread: float
    level: float | None
    share_without: float
    sentence: str


class DriftCrossingRow(SeriesRow):
    """Where the growth of the drift changes, by depth."""

    kind: Literal["drift_crossing"]
    value: float
    height: float
    slope_before: float
    slope_after: float


class ScalingTrendRow(TypedDict):
    kind: Literal["scaling_trend"]
    floor: float
    scale: float
    exponent: float
    value: float
    num_models: int


class ScalingRow(TypedDict):
    kind: Literal["scaling"]
    family: str
    model: str
    parameters: int
    loss: float
    expected: float
    residual: float


class ComparedRow(TypedDict):
    """One cell of a comparison; numbers are None where it has not come so far."""

    cell: str
    folder: str
    label: str
    method: str
    null: bool
    by: str
    keep: float
    seed: int
    bits: int | None
    achieved_keep: float | None
    missed_by: float | None
    impossible: str | None


# predict


class SignalRow(TypedDict):
    kind: Literal["signal"]
    signal: str
    depth: int
    value: float


class PredictionRow(TypedDict):
    kind: Literal["prediction"]
    signal: str
    depth: int | None
    low: NotRequired[int | None]  # of "all"
    high: NotRequired[int | None]
