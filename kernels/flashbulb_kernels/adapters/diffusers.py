"""diffusers models on our attention: SDXL's UNet, SD3 and SD3.5, CogVideoX.

    use_attention(pipeline.unet)            # or pipeline.transformer

puts an attention processor in the place of each of the model's own. `model.set_default_attn_processor()` (UNet) or
`model.set_attn_processor(...)` takes them out again.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    CogVideoXAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from ..attention import Impl, Preparation, attention
from ..errors import KernelUnavailable


def use_attention(model: Any, *, impl: Impl = "auto") -> int:
    """Make a diffusers model compute attention with `flashbulb_kernels.attention`.

    Args:
        model: UNet2DConditionModel of SDXL, SD3Transformer2DModel, or CogVideoXTransformer3DModel.
        impl: as of `attention`. Rotary embedding and qk-norm go into the kernel where the norm is RMSNorm or LayerNorm
            over a head; any other norm is computed by the model's own module.
    Returns:
        How many attention layers were switched.
    Raises:
        ValueError: a layer has a processor or a part that is not known here; nothing was switched.
    """
    processors = {
        f"{name}.processor": _processor_for(name, module, impl)
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    }
    if not processors:
        raise ValueError(f"expected a diffusers model with attention layers, got {type(model).__name__}")
    model.set_attn_processor(dict(processors))
    return len(processors)


def _processor_for(name: str, layer: Any, impl: Impl) -> "_Processor":
    stock = layer.processor.stock if isinstance(layer.processor, _Processor) else layer.processor
    ours = _OURS.get(type(stock))
    if ours is None:
        raise ValueError(
            f"{name}: expected one of diffusers' own attention processors for SDXL, SD3 or CogVideoX, got "
            f"{type(stock).__name__}; take adapters and fused projections out first"
        )
    for part in ("spatial_norm", "group_norm", "norm_cross", "residual_connection"):
        if getattr(layer, part, None):
            raise ValueError(
                f"{name}: expected an attention layer without {part}, which SDXL, SD3 and CogVideoX lack"
            )
    return ours(stock, impl)


class _Processor:
    """Base of the processors: keeps the stock processor for calls with a mask, which these models never make."""

    def __init__(self, stock: Any, impl: Impl) -> None:
        self.stock = stock
        self.impl = impl

    def may_take(self, attention_mask: Tensor | None) -> bool:
        if attention_mask is None:
            return True
        if self.impl == "triton":
            raise KernelUnavailable(
                "impl='triton' cannot run here: expected no attention_mask, which diffusers gives as a bias, got one"
            )
        return False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, preparation: Preparation | None = None) -> Tensor:
        """Compute [b, n, h, d] from [b, n, h, d] and return [b, n, h * d]."""
        o = attention(q, k, v, preparation=preparation, layout="bnhd", impl=self.impl)
        return o.flatten(2)


class UNetProcessor(_Processor):
    """Self- and cross-attention of a UNet's transformer blocks."""

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if not self.may_take(attention_mask):
            result: Tensor = self.stock(layer, hidden_states, encoder_hidden_states, attention_mask, temb)
            return result
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = _heads(layer, layer.to_q(hidden_states))
        k, v = _heads(layer, layer.to_k(context)), _heads(layer, layer.to_v(context))
        q, k, preparation = _prepared(layer, q, k)
        o = _out(layer, self.attend(q, k, v, preparation))
        return o if layer.rescale_output_factor == 1 else o / layer.rescale_output_factor


class JointProcessor(_Processor):
    """Attention of SD3 and SD3.5: image and text tokens in one sequence, image first; or image tokens alone."""

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not self.may_take(attention_mask):
            result: Tensor | tuple[Tensor, Tensor] = self.stock(
                layer, hidden_states, encoder_hidden_states, attention_mask
            )
            return result
        q, k, v = (_heads(layer, to(hidden_states)) for to in (layer.to_q, layer.to_k, layer.to_v))
        if encoder_hidden_states is None:
            q, k, preparation = _prepared(layer, q, k)
            return _out(layer, self.attend(q, k, v, preparation))

        num_image = hidden_states.shape[1]
        added = (layer.add_q_proj, layer.add_k_proj, layer.add_v_proj)
        text_q, text_k, text_v = (_heads(layer, to(encoder_hidden_states)) for to in added)
        preparation = _joint_preparation(layer, num_image)
        if preparation is None:
            q, k = _normed(layer.norm_q, q), _normed(layer.norm_k, k)
            text_q, text_k = _normed(layer.norm_added_q, text_q), _normed(layer.norm_added_k, text_k)
        pairs = (q, text_q), (k, text_k), (v, text_v)
        q, k, v = (torch.cat(pair, dim=1) for pair in pairs)
        o = self.attend(q, k, v, preparation)
        image, text = o[:, :num_image], o[:, num_image:]
        return _out(layer, image), text if layer.context_pre_only else layer.to_add_out(text)


class CogVideoXProcessor(_Processor):
    """Attention of CogVideoX: text and video tokens in one sequence, text first; only video tokens are rotated."""

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self.may_take(attention_mask):
            result: tuple[Tensor, Tensor] = self.stock(
                layer, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return result
        num_text = encoder_hidden_states.shape[1]
        tokens = torch.cat((encoder_hidden_states, hidden_states), dim=1)
        q, k, v = (_heads(layer, to(tokens)) for to in (layer.to_q, layer.to_k, layer.to_v))
        q, k, preparation = _prepared(layer, q, k, image_rotary_emb, num_text)
        o = _out(layer, self.attend(q, k, v, preparation))
        return o[:, num_text:], o[:, :num_text]


_OURS: dict[type, type[_Processor]] = {
    AttnProcessor: UNetProcessor,
    AttnProcessor2_0: UNetProcessor,
    JointAttnProcessor2_0: JointProcessor,
    CogVideoXAttnProcessor2_0: CogVideoXProcessor,
}


def _heads(layer: Any, x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], layer.heads, -1)


def _out(layer: Any, o: Tensor) -> Tensor:
    result: Tensor = layer.to_out[1](layer.to_out[0](o))
    return result


def _normed(norm: Any, x: Tensor) -> Tensor:
    """Apply a norm over the last dimension of [b, n, h, d], where there is one."""
    result: Tensor = x if norm is None else norm(x)
    return result


def _prepared(
    layer: Any, q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor] | None = None, rope_start: int = 0
) -> tuple[Tensor, Tensor, Preparation | None]:
    """Return q, k and what is left to do with them: a norm that the kernel does not know is done at once."""
    norms = _fusable(layer.norm_q, layer.norm_k)
    if norms is None:
        q, k = _normed(layer.norm_q, q), _normed(layer.norm_k, k)
        norms = {}
    if rotary is not None:
        # diffusers repeats each angle for the two components of its pair
        cos, sin = (table[:, ::2] for table in rotary)
        norms |= {"cos": cos, "sin": sin, "rope_start": rope_start}
    return q, k, Preparation(**norms) if norms else None


def _joint_preparation(layer: Any, num_image: int) -> Preparation | None:
    image, text = _fusable(layer.norm_q, layer.norm_k), _fusable(layer.norm_added_q, layer.norm_added_k)
    if not image or not text or image.keys() != text.keys():
        return None
    if (image["norm"], image["eps"]) != (text["norm"], text["eps"]):
        return None
    stacked = {name: torch.stack((image[name], text[name])) for name in image if name not in ("norm", "eps")}
    return Preparation(**image | stacked | {"split": num_image})


def _fusable(norm_q: Any, norm_k: Any) -> dict[str, Any] | None:
    """Read two norms over a head as fields of `Preparation`; None where they are absent or of another kind."""
    kind = _NORMS.get(type(norm_q))
    if kind is None or type(norm_k) is not type(norm_q) or norm_k.eps != norm_q.eps:
        return None
    affine = {
        "q_weight": norm_q.weight,
        "k_weight": norm_k.weight,
        "q_bias": norm_q.bias,
        "k_bias": norm_k.bias,
    }
    given = {name: x for name, x in affine.items() if x is not None}
    if any(x.ndim != 1 for x in given.values()) or (kind == "rms" and given.keys() & {"q_bias", "k_bias"}):
        return None
    return {"norm": kind, "eps": norm_q.eps, **given}


_NORMS = {RMSNorm: "rms", nn.LayerNorm: "layer"}
