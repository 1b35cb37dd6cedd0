"""The families' text encoders: one module each, token ids of every tokenizer in, (tokens, pooled) out.

As diffusers' pipelines do it: CLIP's hidden states before the last layer, no attention masks (padding is read too).
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from .denoiser import Condition

CLIP_LENGTH = 77
SD3_T5_LENGTH = 256
COGVIDEOX_T5_LENGTH = 226
BATCH_SIZE = 32


class PromptEncoder(nn.Module):
    """Base: prompts to conditions. Subclasses turn ids int64 [b, l], one tensor a tokenizer, into (tokens, pooled).

    Args:
        tokenizers: in the order of forward's arguments.   lengths: to which each cuts and pads.
    """

    def __init__(self, tokenizers: Sequence[PreTrainedTokenizerBase], lengths: Sequence[int]) -> None:
        super().__init__()
        self.tokenizers = tuple(tokenizers)
        self.lengths = tuple(lengths)

    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return ids int64 [b, l] for each tokenizer."""
        return tuple(
            cast(
                Tensor,
                tokenizer(
                    list(prompts),
                    padding="max_length",
                    max_length=length,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids,
            )
            for tokenizer, length in zip(self.tokenizers, self.lengths, strict=True)
        )

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode any number of prompts, one or more, float32."""
        parts = list(self.batches(prompts))
        return Condition(
            torch.cat([part.tokens for part in parts]), torch.cat([part.pooled for part in parts])
        )

    def batches(self, prompts: Sequence[str]) -> Iterator[Condition]:
        """Encode prompts in their order, a few at a time, float32."""
        for start in range(0, len(prompts), BATCH_SIZE):
            ids = self.tokenise(prompts[start : start + BATCH_SIZE])
            with torch.no_grad():
                tokens, pooled = self(*ids)
            yield Condition(tokens.float(), pooled.float())

    def encode_uncond(self) -> Condition:
        """Return the one row that the teacher was trained to take for no prompt."""
        return self.encode([""])


class SdxlPrompts(PromptEncoder):
    """CLIP-L and OpenCLIP-G side by side: tokens [b, 77, 768 + 1280], pooled [b, 1280] of the second.

    Args:
        zero_uncond: no prompt is zeros instead of the empty prompt (`force_zeros_for_empty_prompt`).
    """

    def __init__(
        self,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        clip_l: CLIPTextModel,
        clip_g: CLIPTextModelWithProjection,
        *,
        zero_uncond: bool,
    ) -> None:
        super().__init__(tokenizers, (CLIP_LENGTH, CLIP_LENGTH))
        self.clip_l, self.clip_g, self.zero_uncond = clip_l, clip_g, zero_uncond

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ids [b, 77] of both tokenizers."""
        first, _ = clip(self.clip_l, ids)
        second, pooled = clip(self.clip_g, ids_2)
        return torch.cat([first, second], dim=-1), pooled

    def encode_uncond(self) -> Condition:
        """Return zeros, or the empty prompt."""
        empty = self.encode([""])
        if not self.zero_uncond:
            return empty
        return Condition(torch.zeros_like(empty.tokens), torch.zeros_like(empty.pooled))


class Sd3Prompts(PromptEncoder):
    """CLIP-L and OpenCLIP-G side by side, padded to T5's width, then T5: [b, 77 + 256, 4096] and pooled [b, 2048]."""

    def __init__(
        self,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        clip_l: CLIPTextModelWithProjection,
        clip_g: CLIPTextModelWithProjection,
        t5: T5EncoderModel,
    ) -> None:
        super().__init__(tokenizers, (CLIP_LENGTH, CLIP_LENGTH, SD3_T5_LENGTH))
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5

    def forward(self, ids: Tensor, ids_2: Tensor, ids_3: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ids [b, 77], [b, 77] and [b, 256]."""
        first, pooled = clip(self.clip_l, ids)
        second, pooled_2 = clip(self.clip_g, ids_2)
        both = torch.cat([first, second], dim=-1)
        third = cast(Tensor, self.t5(ids_3)[0])
        both = F.pad(both, (0, third.shape[-1] - both.shape[-1]))
        return torch.cat([both, third], dim=-2), torch.cat([pooled, pooled_2], dim=-1)


class CogVideoXPrompts(PromptEncoder):
    """T5 alone: tokens [b, 226, 4096], pooled [b, 0]."""

    def __init__(self, tokenizers: Sequence[PreTrainedTokenizerBase], t5: T5EncoderModel) -> None:
        super().__init__(tokenizers, (COGVIDEOX_T5_LENGTH,))
        self.t5 = t5

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ids [b, 226]."""
        tokens = cast(Tensor, self.t5(ids)[0])
        return tokens, tokens[:, 0, :0]


def clip(model: CLIPTextModel | CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states before the last layer, [b, l, d], and the first output (pooled, if it projects)."""
    out: Any = model(ids, output_hidden_states=True)
    return out.hidden_states[-2], out[0]
