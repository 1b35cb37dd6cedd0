"""The components of SDXL, SD3, SD3.5 and CogVideoX as modules with positional tensors, ready to be exported.

A component takes and gives float32 whatever its weights are stored in, so that a runtime needs to know one interface:

    text encoder   input_ids [b, l], attention_mask [b, l]            -> prompt_embeds [b, l, d], pooled [b, p]
    denoiser       latents [b, c, (f,) h, w], timestep [b], embeds ... -> prediction, like latents
    decoder        latents [b, c, (f,) h, w]                          -> pixels in [-1, 1]

Classifier-free guidance is no part of a student, and the few-step loop is `core.sampler`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .positions import rotary_positions

Axes = Mapping[str, Mapping[int, str]]
IMAGE_AXES = {0: "batch", 2: "height", 3: "width"}
VIDEO_AXES = {0: "batch", 2: "frames", 3: "height", 4: "width"}


@dataclass(frozen=True)
class Component:
    """One graph to be: a module, the inputs it is traced with, and which axes may vary."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Axes
    outputs: tuple[str, ...]


class ClipEncoder(nn.Module):
    """A CLIP text model as pipelines read it: the last hidden states but one, and the pooled output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode; CLIP attends to its padding, so the mask is not used: pipelines give none."""
        out = self.model(input_ids, output_hidden_states=True)
        pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
        return out.hidden_states[-2].float(), pooled.float() + 0 * attention_mask[:, :1].float()


class T5Encoder(nn.Module):
    """A T5 encoder: its last hidden states; there is no pooled output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode; SD3's and CogVideoX's pipelines let T5 attend to its padding, so the mask is not used."""
        hidden = self.model(input_ids).last_hidden_state.float()
        return cast(Tensor, hidden + 0 * attention_mask[..., None].float())


class SdxlDenoiser(nn.Module):
    """SDXL's UNet; `time_ids` are original size, crop and target size, in pixels."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled: Tensor, time_ids: Tensor
    ) -> Tensor:
        """Run the network once."""
        dtype = _dtype(self.unet)
        # float32 as the sizes' embeddings that they are joined with: an ONNX Concat takes one type
        extra = {"text_embeds": pooled, "time_ids": time_ids}
        out = self.unet(
            latents.to(dtype), timestep, prompt_embeds.to(dtype), added_cond_kwargs=extra, return_dict=False
        )[0]
        return cast(Tensor, out.float())


class Sd3Denoiser(nn.Module):
    """SD3's and SD3.5's transformer."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled: Tensor) -> Tensor:
        """Run the network once."""
        dtype = _dtype(self.transformer)
        out = self.transformer(
            hidden_states=latents.to(dtype),
            timestep=timestep,
            encoder_hidden_states=prompt_embeds.to(dtype),
            pooled_projections=pooled.to(dtype),
            return_dict=False,
        )[0]
        return cast(Tensor, out.float())


class CogVideoXDenoiser(nn.Module):
    """CogVideoX's transformer on latents [b, c, f, h, w]; the 5B model's rotary positions are computed inside."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Run the network once."""
        dtype = _dtype(self.transformer)
        config: Any = self.transformer.config
        rotary = None
        if config.use_rotary_positional_embeddings:
            frames, height, width = latents.shape[2:]
            patch = config.patch_size
            grid = height // patch, width // patch
            base = config.sample_height // patch, config.sample_width // patch
            rotary = rotary_positions(config.attention_head_dim, frames, grid, base)
        out = self.transformer(
            hidden_states=latents.to(dtype).transpose(1, 2),
            encoder_hidden_states=prompt_embeds.to(dtype),
            timestep=timestep,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return cast(Tensor, out.float().transpose(1, 2))


class VaeDecoder(nn.Module):
    """A VAE's decoder, of images or of videos; latents are those of the VAE, without its pipeline's scaling."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """Decode into pixels clamped to [-1, 1]."""
        out = self.vae.decode(latents.to(_dtype(self.vae)), return_dict=False)[0]  # type: ignore[operator]
        return cast(Tensor, out.float().clamp(-1, 1))


def components_of(family: str, parts: Mapping[str, nn.Module]) -> list[Component]:
    """Return the graphs of a family's pipeline parts (as `DiffusionPipeline.components` names them).

    Args:
        family: "sdxl", "sd3" (3 and 3.5) or "cogvideox".

    Raises:
        ValueError: there is no such family, or a part of it is missing.
    """
    if family not in _DENOISERS:
        raise ValueError(f"expected a family of {', '.join(_DENOISERS)}, got {family!r}")
    denoiser = "unet" if family == "sdxl" else "transformer"
    missing = [name for name in (denoiser, "vae", "text_encoder") if parts.get(name) is None]
    if missing:
        raise ValueError(f"{family}: expected the parts {denoiser}, vae and text_encoder; missing: {missing}")
    names = sorted(
        name for name, part in parts.items() if name.startswith("text_encoder") and part is not None
    )
    return [component_of(family, name, parts[name]) for name in (*names, denoiser, "vae")]


def component_of(family: str, name: str, part: nn.Module) -> Component:
    """Return the graph of one part of a family's pipeline; see `components_of`."""
    if name.startswith("text_encoder"):
        return _text_component(name, part)
    return _decoder(part) if name == "vae" else _DENOISERS[family](part)


def variants(component: Component) -> list[dict[str, Tensor]]:
    """Return inputs of other batch sizes and, where axes may vary, other shapes: what parity is measured on."""
    cases = [_resized(component, batch=1), dict(component.inputs), _resized(component, batch=3)]
    spatial = {name for axes in component.axes.values() for name in axes.values()} - {"batch"}
    if spatial:
        cases.append(_resized(component, batch=2, grow=spatial))
    return cases


def _text_component(name: str, model: nn.Module) -> Component:
    config: Any = model.config
    is_t5 = config.model_type == "t5"
    length = 16 if is_t5 else config.max_position_embeddings
    ids = torch.randint(2, config.vocab_size - 1, (2, length), generator=torch.Generator().manual_seed(0))
    if not is_t5:
        ids[:, 0] = config.bos_token_id
        ids[0, length // 2 :] = ids[1, length // 3 :] = config.eos_token_id
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    axes: dict[int, str] = {0: "batch", 1: "length"} if is_t5 else {0: "batch"}
    outputs = ("prompt_embeds",) if is_t5 else ("prompt_embeds", "pooled_prompt_embeds")
    module = T5Encoder(model) if is_t5 else ClipEncoder(model)
    return Component(name, module, inputs, dict.fromkeys(inputs, axes), outputs)


def _sdxl(unet: nn.Module) -> Component:
    config: Any = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    side = min(config.sample_size, 16)
    inputs = {
        "latents": _normal(0, 2, config.in_channels, side, side),
        "timestep": torch.tensor([999.0, 1.0]),
        "prompt_embeds": _normal(1, 2, 77, config.cross_attention_dim),
        "pooled_prompt_embeds": _normal(2, 2, pooled),
        "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024], [768, 1024, 8, 0, 1024, 1024]]),
    }
    rows = {0: "batch"}
    axes = {**dict.fromkeys(inputs, rows), "latents": IMAGE_AXES}
    return Component("unet", SdxlDenoiser(unet), inputs, axes, ("prediction",))


def _sd3(transformer: nn.Module) -> Component:
    config: Any = transformer.config
    side = min(config.sample_size, 16)
    inputs = {
        "latents": _normal(0, 2, config.in_channels, side, side),
        "timestep": torch.tensor([1000.0, 1.0]),
        "prompt_embeds": _normal(1, 2, 21, config.joint_attention_dim),
        "pooled_prompt_embeds": _normal(2, 2, config.pooled_projection_dim),
    }
    rows = {0: "batch"}
    axes = {**dict.fromkeys(inputs, rows), "latents": IMAGE_AXES, "prompt_embeds": {0: "batch", 1: "length"}}
    return Component("transformer", Sd3Denoiser(transformer), inputs, axes, ("prediction",))


def _cogvideox(transformer: nn.Module) -> Component:
    config: Any = transformer.config
    inputs = {
        "latents": _normal(0, 2, config.in_channels, 4, *_unlike(config.sample_height, config.sample_width)),
        "timestep": torch.tensor([999.0, 1.0]),
        "prompt_embeds": _normal(1, 2, config.max_text_seq_length, config.text_embed_dim),
    }
    rows = {0: "batch"}
    axes: dict[str, Mapping[int, str]] = {**dict.fromkeys(inputs, rows), "latents": VIDEO_AXES}
    return Component("transformer", CogVideoXDenoiser(transformer), inputs, axes, ("prediction",))


def _unlike(height: int, width: int) -> tuple[int, int]:
    """Return a small size that differs from the trained one, whose positions diffusers takes from a table."""
    return (6 if height != 6 else 8), (10 if width != 10 else 12)


def _decoder(vae: nn.Module) -> Component:
    """Videos are decoded in groups of frames by a loop, so their number is part of the graph."""
    config: Any = vae.config
    is_video = hasattr(config, "temporal_compression_ratio")
    shape = (2, config.latent_channels, 3, 6, 8) if is_video else (2, config.latent_channels, 8, 8)
    axes = {0: "batch", 3: "height", 4: "width"} if is_video else IMAGE_AXES
    return Component(
        "vae_decoder", VaeDecoder(vae), {"latents": _normal(0, *shape)}, {"latents": axes}, ("pixels",)
    )


_DENOISERS = {"sdxl": _sdxl, "sd3": _sd3, "cogvideox": _cogvideox}


def _resized(
    component: Component, *, batch: int, grow: set[str] | frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """Return other inputs: rows repeated or cut to `batch`, and the named axes longer by a half, or by four tokens."""
    case = {}
    for name, value in component.inputs.items():
        axes = component.axes[name]
        for axis, what in axes.items():
            if what == "batch":
                value = value[torch.arange(batch) % len(value)]
            elif what in grow:
                more = {"length": 4, "frames": 1}.get(what, 4)
                rows = torch.arange(value.shape[axis] + more) % value.shape[axis]
                value = value.index_select(axis, rows)
        case[name] = value
    return case


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
