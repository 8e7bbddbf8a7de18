"""The errors of transformers in one sentence."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def explained(location: Path | str) -> Generator[None]:
    """What transformers raises, as a ValueError that says what was tried: a folder, or as a string a Hub id."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, *_strict_errors()) as error:
        reason = " ".join(str(error).split())
        if isinstance(location, Path):
            raise ValueError(f"{location} could not be loaded: {reason}") from error
        raise ValueError(
            f"{location!r} could not be loaded: there is no folder of that name here, and as a Hub id it was neither "
            f"in the local cache nor to be had from the Hub ({reason})"
        ) from error


def _strict_errors() -> tuple[type[Exception], ...]:
    """What configs raise that check themselves."""
    from huggingface_hub.errors import StrictDataclassError

    return (StrictDataclassError,)
