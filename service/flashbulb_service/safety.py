"""What may be asked for and what may be shown: a word list for prompts, a checker for pictures.

Both fail closed: a list that cannot be read stops the start, and a picture whose check fails is not delivered.
"""

import re
import unicodedata
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.settings import Settings

if TYPE_CHECKING:
    import numpy as np

CODE = "content_policy_violation"
MAX_LIST_BYTES = 1 << 20
HELD_BACK = "the image check held the picture back"


class ImageChecker(Protocol):
    """Judges finished pixels. Called from several threads."""

    def allows(self, pixels: "np.ndarray") -> bool:
        """Tell whether a picture (uint8 [h, w, 3]) may be delivered; raising counts as no."""
        ...


class PictureHeldBack(Exception):
    """The image check does not allow this picture."""


class WordList:
    """Words and phrases that no prompt may have; compared in lower case, as whole words, without accents."""

    def __init__(self, entries: list[str]) -> None:
        """Compile the entries; none allows everything."""
        plain = (" ".join(_plain(entry).replace("_", " ").split()) for entry in entries)
        words = sorted({*plain} - {""}, key=len, reverse=True)
        pattern = "|".join(r"[\s_]+".join(map(re.escape, entry.split())) for entry in words)
        letter = r"[^\W_]"  # an underscore parts words, as a blank does
        self._pattern = re.compile(rf"(?<!{letter})(?:{pattern})(?!{letter})") if words else None

    @classmethod
    def read(cls, path: Path) -> "WordList":
        """Read a file with one entry a line; empty lines and those that begin with # are skipped.

        Raises:
            InvalidRequest: it cannot be read, is no UTF-8 text or larger than 1 MiB.
        """
        try:
            data = path.expanduser().read_bytes()
            if len(data) > MAX_LIST_BYTES:
                raise ValueError(f"it has {len(data)} bytes, at most {MAX_LIST_BYTES} are allowed")
            lines = data.decode().splitlines()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise InvalidRequest(
                f"expected a list of blocked words in UTF-8 at {path}: {reason}", param="blocked_words"
            ) from error
        return cls([line for line in map(str.strip, lines) if not line.startswith("#")])

    def allows(self, prompt: str) -> bool:
        """Tell whether a prompt has none of the entries."""
        return self._pattern is None or self._pattern.search(_plain(prompt)) is None


def word_list_of(settings: Settings) -> WordList:
    """Read the word list that the settings name; without one, everything is allowed.

    Raises:
        InvalidRequest: it cannot be read.
    """
    return WordList.read(settings.blocked_words) if settings.blocked_words else WordList([])


def check_prompt(words: WordList, prompt: str) -> None:
    """Refuse a prompt that has a blocked word; the word is not told.

    Raises:
        InvalidRequest: with the code content_policy_violation.
    """
    if not words.allows(prompt):
        raise InvalidRequest(
            "prompt: it is against the content policy of this server: ask for something else",
            param="prompt",
            code=CODE,
        )


def image_checker_of(settings: Settings) -> ImageChecker | None:
    """Load the checker that the settings name as "module:factory"; None when they name none.

    The factory is called with the settings. It is loaded here and not imported above, so that only a worker
    that checks pictures loads what the checker needs.

    Raises:
        InvalidRequest: there is no such module or factory.
    """
    if settings.image_checker is None:
        return None
    module, _, name = settings.image_checker.partition(":")
    try:
        factory = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidRequest(
            f"expected an image checker as module:factory, got {settings.image_checker!r}: {error}",
            param="image_checker",
        ) from error
    return cast(ImageChecker, factory(settings))


def check_picture(checker: ImageChecker | None, pixels: "np.ndarray") -> None:
    """Hold a picture back that the checker does not allow.

    Raises:
        PictureHeldBack: it does not.
        Exception: whatever the checker raises; the picture must not be delivered then.
    """
    if checker is not None and not checker.allows(pixels):
        raise PictureHeldBack(HELD_BACK)


def _plain(text: str) -> str:
    """Return text without case, accents and invisible characters, so that one entry meets its disguises."""
    folded = unicodedata.normalize(
        "NFKD", text
    ).casefold()  # in this order: a capital in another type has no case
    decomposed = unicodedata.normalize("NFKD", folded)
    return "".join(c for c in decomposed if unicodedata.category(c) not in ("Mn", "Cf"))
