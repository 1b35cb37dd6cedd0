"""The usage block: tokens that the text encoder reads, and patches of 16 by 16 pixels that were drawn."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashbulb_service.catalog import Model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PATCH_PX = 16


def count_usage(model: Model, prompt: str, width: int, height: int, n: int) -> dict[str, Any]:
    """Count in OpenAI's form; equal requests count alike."""
    tokens = max(  # several encoders read the same prompt
        min(text.max_length, _count(model.bundle.file(text.tokenizer), prompt))
        for text in model.bundle.manifest.text
    )
    drawn = n * -(-width // PATCH_PX) * -(-height // PATCH_PX)
    return {
        "input_tokens": tokens,
        "input_tokens_details": {"text_tokens": tokens, "image_tokens": 0},
        "output_tokens": drawn,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        "total_tokens": tokens + drawn,
    }


def _count(path: Path, prompt: str) -> int:
    return len(_tokenizer(path).encode(prompt).ids)


@lru_cache(maxsize=16)
def _tokenizer(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer  # with the first answer: an API that only starts needs none

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
