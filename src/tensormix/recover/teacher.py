"""The dense model's logits, computed once and kept on the disk: the most probable tokens, and draws from the rest.

    cache.json                   what they are of: teacher, tokenizer, vocabulary, kept and drawn tokens, window
    logits-00000.safetensors     `ids` of 64 windows, and of every position but the last the parts of `losses.Kept`

A file is written whole or not at all, so a cache that was stopped goes on; and by one process at a time, so runs at the
same time share one. The windows themselves are in the files and are compared, so a cache serves every run that reads
the same windows, also one that reads only the first of them.

Shape letters: B windows, T tokens, K tokens kept of each position, M tokens drawn from the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tensormix.models import ModelSource, load_model, load_tokenizer
from tensormix.recover.losses import Kept, keep
from tensormix.storage.files import new_file, read_json, remove_unfinished, write_json
from tensormix.storage.locks import in_turn

WINDOWS_PER_FILE = 64


def tokenizer_digest(tokenizer: Any) -> str:
    """A short hash of what the tokens of a tokenizer mean: every entry of its vocabulary with its number."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def check_vocabulary(teacher: Any, student: Any) -> None:
    """Raise ValueError if the two models do not score the same number of tokens."""
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"recover: the teacher has a vocabulary of {sizes[0]} tokens and the model one of {sizes[1]}; "
            "distillation compares their logits token by token, so it needs a teacher with the same vocabulary."
        )


def open_teacher(source: ModelSource | str | Path | None, student: Any, tokenizer: Any) -> tuple[Any, ModelSource]:
    """The dense model in float32, where the student is, and where it came from.

    Raises ValueError if none is named or its tokens are others.
    """
    if source is None:
        raise ValueError(
            "recover: a loss that learns from the dense model needs a teacher; name one as distill.teacher."
        )
    source = ModelSource.of(source)
    teacher: Any = load_model(source, dtype="float32")
    check_vocabulary(teacher, student)
    if tokenizer_digest(load_tokenizer(source)) != tokenizer_digest(tokenizer):
        raise ValueError(
            f"recover: the tokenizer of the teacher ({source}) means other tokens than the model's; distillation "
            "compares logits token by token, so it needs a teacher with the same tokenizer."
        )
    return teacher.to(next(student.parameters()).device).requires_grad_(False), source


class TeacherLogits:
    """What is kept of a teacher's logits on a row of windows, in a folder.

    Args:
        folder: of the cache; made where it is missing.
        teacher: fingerprint of the teacher. tokenizer: digest of the tokenizer that made the windows.
        vocabulary: number of tokens that the teacher scores. window: tokens of each window.
        top_k, tail_samples: K and M.

    Raises:
        ValueError: the folder holds the logits of another teacher, tokenizer or window, or fewer tokens each.
    """

    def __init__(
        self, folder: Path, *, teacher: str, tokenizer: str, vocabulary: int, top_k: int, tail_samples: int, window: int
    ) -> None:
        self.folder, self.window = folder, window
        self.about = {
            "teacher": teacher,
            "tokenizer": tokenizer,
            "vocabulary": vocabulary,
            "top_k": min(top_k, vocabulary),
            "tail_samples": tail_samples,
            "window": window,
        }
        with in_turn(folder / "cache.json"):
            if (folder / "cache.json").exists():
                self._compare(read_json(folder / "cache.json"))
            else:
                write_json(folder / "cache.json", self.about)

    def _compare(self, found: dict[str, Any]) -> None:
        for key, wanted in self.about.items():
            if found.get(key) != wanted:
                raise ValueError(
                    f"recover: the logits in {self.folder} were kept for another {key} ({found.get(key)}, this run has "
                    f"{wanted}); name another folder as distill.cache, or delete that one."
                )

    def fill(
        self,
        windows: Callable[[int], Tensor],  # number -> ids (T,)
        wanted: range,
        num_windows: int,
        logits_of: Callable[[Tensor], Tensor],  # (B, T) -> (B, T, V)
        batch_size: int,
    ) -> None:
        """Compute what is missing of the `wanted` windows, in whole files of a row of `num_windows`.

        Raises:
            ValueError: the logits that are there are of other windows, or the teacher's are not finite.
        """
        size = WINDOWS_PER_FILE
        for number in range(wanted.start // size, -(-wanted.stop // size)):
            ids = torch.stack([windows(i) for i in range(size * number, min(size * (number + 1), num_windows))]).int()
            with in_turn(self._file(number)):
                if not self._has(number, ids):
                    self._write(number, ids, logits_of, batch_size)

    def _write(self, number: int, ids: Tensor, logits_of: Callable[[Tensor], Tensor], batch_size: int) -> None:
        """One file: what is kept of its windows."""
        file, kept = self._file(number), []
        remove_unfinished(self.folder, file.name)
        for batch in ids.split(batch_size):
            logits = self._finite(logits_of(batch.long()))[:, :-1]
            first = WINDOWS_PER_FILE * number + len(kept)
            kept += [self._keep(of_window, first + place) for place, of_window in enumerate(logits)]
        parts = {part: torch.stack([getattr(k, part) for k in kept]).cpu() for part in Kept._fields}
        with new_file(file) as handle:
            handle.write(save({name: tensor.contiguous() for name, tensor in {"ids": ids, **parts}.items()}))

    def _keep(self, logits: Tensor, number: int) -> Kept:  # (T - 1, V)
        """Of window `number`, which is the seed of its draws: they do not depend on the batch that it comes in."""
        return keep(logits, self.about["top_k"], self.about["tail_samples"], seed=number)

    def _finite(self, logits: Tensor) -> Tensor:
        if not logits.isfinite().all():
            raise ValueError("recover: the teacher's logits hold NaN or infinite values; it cannot be learned from.")
        return logits

    def _has(self, number: int, ids: Tensor) -> bool:
        """Whether a file holds these windows (it may hold more)."""
        if not self._file(number).exists():
            return False
        with safe_open(self._file(number), "pt") as file:
            there = file.get_tensor("ids")
        common = min(len(there), len(ids))
        if not torch.equal(there[:common], ids[:common]):
            raise ValueError(
                f"recover: the logits in {self.folder} were kept for other windows (another text, seed, mixture or "
                "loss_on); name another folder as distill.cache, or delete that one."
            )
        return len(there) >= len(ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Of one window the parts of `Kept` (T - 1, ...), each as teacher_NAME."""
        file, place = divmod(number, WINDOWS_PER_FILE)
        with safe_open(self._file(file), "pt") as opened:
            return {f"teacher_{name}": opened.get_slice(name)[place] for name in Kept._fields}

    def _file(self, number: int) -> Path:
        return self.folder / f"logits-{number:05d}.safetensors"
