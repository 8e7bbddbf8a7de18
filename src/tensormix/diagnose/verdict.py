"""When the outcome of a recovery is clear before its end: above or below a threshold of accuracy.

A checkpoint is *above* once the lower end of the Wilson 95 % interval of its accuracy lies above the threshold: more
steps seldom take back what recovery has given. It is *below* if, in the second half of the steps, the upper end lies
under the threshold and accuracy is not higher than the whole interval of the checkpoint before. That is a guess: a
model that would have learned late is given up, so the row says at which step it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tensormix.evaluate.batches import Asked
from tensormix.evaluate.choices import ChoicePrompt, evaluate_choices


class Verdict:
    """Asked with the model and the step at every checkpoint of a recovery; True ends it. Notes in `rows` why.

    Args:
        ask: the accuracy of a model with its 95 % interval (value, low, high).
        threshold: accuracy that the outcome is compared with. num_steps: of the whole recovery.
    """

    def __init__(self, ask: Callable[[Any], tuple[float, float, float]], *, threshold: float, num_steps: int) -> None:
        self.ask, self.threshold, self.num_steps = ask, threshold, num_steps
        self.rows: list[dict[str, Any]] = []
        self._high_before = 0.0

    def __call__(self, model: Any, step: int) -> bool:
        if step >= self.num_steps:
            return False
        value, low, high = self.ask(model)
        no_gain = self.rows and value <= self._high_before
        above, below = low > self.threshold, high < self.threshold and step > self.num_steps / 2 and bool(no_gain)
        self._high_before = high
        outcome = "above" if above else "below" if below else "open"
        self.rows.append({"kind": "early_stop", "step": step, "accuracy": value, "outcome": outcome})
        return above or below


def exam_accuracy(tokenizer: Any, prompts: Sequence[ChoicePrompt], batch_size: Asked) -> Callable[[Any], Any]:
    """What `Verdict` asks: accuracy on four-choice questions with its Wilson interval."""

    def ask(model: Any) -> tuple[float, float, float]:
        row = evaluate_choices(model, tokenizer, prompts, batch_size=batch_size)[0]
        return row["value"], row["low"], row["high"]

    return ask
