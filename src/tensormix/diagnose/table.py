"""The diagnostics that a recipe can ask for, and the section in which it does."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from tensormix.diagnose.base import Diagnostic
from tensormix.diagnose.residual import ResidualStream
from tensormix.diagnose.restoration import Restoration
from tensormix.diagnose.sensitivity import CompressSensitivity, DropSensitivity
from tensormix.diagnose.spectra import Spectra
from tensormix.diagnose.spectral_gap import SpectralGap
from tensormix.diagnose.super_weights import SuperWeights
from tensormix.settings import Settings, Source

SELECTABLE: dict[str, type[Diagnostic]] = {
    "residual_stream": ResidualStream,
    "spectra": Spectra,
    "restoration": Restoration,
    "super_weights": SuperWeights,
    "drop_sensitivity": DropSensitivity,
    "compress_sensitivity": CompressSensitivity,
    "spectral_gap": SpectralGap,
}

if TYPE_CHECKING:
    AnyDiagnostic = Diagnostic
else:
    AnyDiagnostic = Annotated[
        Annotated[reduce(or_, SELECTABLE.values()), Field(discriminator="name")],
        BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value),
        PlainSerializer(lambda diagnostic: diagnostic.model_dump(mode="json")),
    ]


class Diagnose(Settings):
    """How the model breaks: entropies and geometry at the answers of the exam, and what else is asked for."""

    num_prompts: int = Field(default=64, ge=1)  # of the exam, without one of MMLU, for the geometry
    entropies_of: tuple[str, ...] | None = None  # "exam", "mmlu"; without it every task answered by four letters
    run: tuple[AnyDiagnostic, ...] = ()  # names, or mappings with a name and settings
    text: Source = Source(exam=True)  # what the diagnostics of `run` read
    num_windows: int = Field(default=8, ge=1)
    window: int = Field(default=256, ge=2)  # tokens

    def chosen(self, dense: bool) -> list[Diagnostic]:
        """Those that look at an untouched model, or those that look at a compressed one beside it."""
        wanted: Any = "dense" if dense else "pair"
        return [diagnostic for diagnostic in self.run if diagnostic.looks_at == wanted]
