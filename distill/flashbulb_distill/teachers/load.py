"""Teachers of SDXL, SD3, SD3.5 and CogVideoX from a diffusers folder or a hub id; which one, model_index.json says."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from ..bundle import Betas, hash_file
from ..core.schedule import Prediction
from ..errors import MissingFileError, UsageError
from .codec import VaeCodec, freeze
from .cogvideox import CogVideoXDenoiser
from .denoiser import Denoiser
from .prompts import CogVideoXPrompts, PromptEncoder, Sd3Prompts, SdxlPrompts
from .sd3 import Sd3Denoiser
from .sdxl import SdxlDenoiser

Family = Literal["sdxl", "sd3", "cogvideox"]
_TEXTS = ("*.json", "*.txt", "*.model")
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


@dataclass(frozen=True)
class Source:
    """A diffusers folder and the types to load it in; parts are loaded when they are asked for."""

    folder: Path
    family: Family
    dtype: torch.dtype = torch.float32
    bf16: bool = False
    variant: str | None = None
    is_fetched: bool = False  # then other variants may lie beside what was asked for
    loras: tuple[Path, ...] = ()
    weights: bool = True  # False: networks on the meta device, from their configurations alone

    def denoiser(self) -> Denoiser:
        """Load the network with its LoRAs merged, frozen; each call reads a new copy."""
        denoiser = _DENOISERS[self.family](self)
        for lora in self.loras:
            _merge_lora(self.family, next(denoiser.children()), lora)
        return cast(Denoiser, freeze(denoiser))

    def codec(self) -> VaeCodec:
        """Load the VAE, frozen, always in float32: SDXL's overflows in float16."""
        kind = AutoencoderKLCogVideoX if self.family == "cogvideox" else AutoencoderKL
        vae = _part(self, kind, "vae", torch.float32)
        return cast(VaeCodec, freeze(VaeCodec(vae)))

    def prompts(self) -> PromptEncoder:
        """Load the text encoders and tokenizers, frozen. Drop them once the prompts are encoded: T5 is large."""
        return cast(PromptEncoder, freeze(_PROMPTS[self.family](self)))

    def scheduler(self) -> dict[str, Any]:
        """Return the scheduler's configuration."""
        config: dict[str, Any] = json.loads((self.folder / "scheduler/scheduler_config.json").read_text())
        return config

    @property
    def patch_size(self) -> int:
        """How many latents a token of the network has in height and in width."""
        if self.family == "sdxl":  # whose UNet has no tokens
            return 1
        return int(json.loads((self.folder / "transformer/config.json").read_text())["patch_size"])

    def sha256(self, *parts: str) -> dict[str, str]:
        """Return the hashes of the weights that are read, of tokenizers and configurations, by path.

        Other variants may lie beside them, in the hub's cache for one: they are no part of the teacher.

        Args:
            parts: the sub-folders to look into; all by default.
        """
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = {path.relative_to(self.folder).as_posix(): path for path in files}
        names = {
            name: path for name, path in names.items() if _is_read(name, self.variant_of(name.split("/")[0]))
        }
        names |= {f"lora/{number}": path for number, path in enumerate(self.loras)}
        return {
            name: hash_file(path) for name, path in names.items() if not parts or name.split("/")[0] in parts
        }

    def variant_of(self, part: str) -> str | None:
        """Return the variant that a part is read in: None for a part of one's own folder that has no files of it."""
        if self.variant is None or self.is_fetched:
            return self.variant
        files = (path.name for path in (self.folder / part).glob("*.safetensors"))
        return self.variant if any(_is_read(f"{part}/{name}", self.variant) for name in files) else None

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Return the folders that decide what a prompt's embedding is."""
        numbers = {"sdxl": ("", "_2"), "sd3": ("", "_2", "_3"), "cogvideox": ("",)}[self.family]
        return tuple(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in numbers)


def open_source(
    place: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    bf16: bool = False,
    variant: str | None = None,
    revision: str | None = None,
) -> Source:
    """Find a teacher: a folder as diffusers writes it, or else a hub id, whose safetensors files are fetched.

    Args:
        dtype: of the network's and the text encoders' weights.
        bf16: compute in bfloat16 with float32 weights (autocast).
        variant: which files, like "fp16"; parts of a folder that have none are read as they are.
        revision: of the hub id.
    Raises:
        FileNotFoundError: neither a teacher folder, nor a hub id that can be fetched.
        UsageError: a pipeline of another family.
    """
    folder = Path(place)
    is_fetched = not folder.exists()
    if is_fetched:
        folder = _fetch(str(place), revision, variant)
    index = folder / "model_index.json"
    if not index.is_file():
        raise MissingFileError(
            f"{folder}: expected a diffusers folder with model_index.json, found none; "
            "give the folder that save_pretrained wrote, or a hub id like stabilityai/stable-diffusion-xl-base-1.0"
        )
    kind = json.loads(index.read_text()).get("_class_name")
    if kind not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise UsageError(f"{folder}: expected a pipeline of {known}, got {kind!r}")
    return Source(folder, _FAMILIES[kind], dtype, bf16, variant, is_fetched)


_FAMILIES: dict[str, Family] = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "CogVideoXPipeline": "cogvideox",
}


def betas_of(config: dict[str, Any]) -> Betas:
    """Read a scheduler's configuration as our noise levels.

    Raises:
        UsageError: betas of another form.
    """
    form = config.get("beta_schedule", "scaled_linear")
    if form != "scaled_linear" or config.get("trained_betas") is not None:
        raise UsageError(f"scheduler: expected beta_schedule scaled_linear, got {form!r} or trained betas")
    return Betas(
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        num_timesteps=config.get("num_train_timesteps", 1000),
        snr_shift=config.get("snr_shift_scale", 1.0),
        zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
    )


def prediction_of(config: dict[str, Any]) -> Prediction:
    """Read what the network predicts from a scheduler's configuration.

    Raises:
        UsageError: something that we do not know.
    """
    name = config.get("prediction_type", "epsilon")
    if name not in _PREDICTIONS:
        raise UsageError(f"scheduler: expected prediction_type among {list(_PREDICTIONS)}, got {name!r}")
    return _PREDICTIONS[name]


def _fetch(hub_id: str, revision: str | None, variant: str | None) -> Path:
    """Fetch a pipeline's parts and nothing beside them: no pickle, no other variant, no single-file checkpoint."""
    wanted, others = _patterns(variant)
    try:
        fetched = snapshot_download(hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=others)
        return Path(fetched)
    except Exception as error:  # a wrong name, no network, no access: many types, one meaning
        reason = str(error).splitlines()[0]
        # A network may come back; a name, a revision or an access that is not there will not.
        wrong = isinstance(error, (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError))
        raise (MissingFileError if wrong else FileNotFoundError)(
            f"{hub_id}: expected a folder or a hub id that can be fetched; no such folder, and {reason}"
        ) from error


def _patterns(variant: str | None) -> tuple[list[str], list[str]]:
    """Return which paths of a pipeline are read, and which of these are not."""
    if variant is None:
        return [*_TEXTS, "*/*.safetensors"], ["*.*.safetensors"]  # model.fp16.safetensors
    # A large one is model.fp16-00001-of-00002.safetensors.
    return [*_TEXTS, f"*/*.{variant}.safetensors", f"*/*.{variant}-*.safetensors"], []


def _is_read(name: str, variant: str | None) -> bool:
    wanted, others = _patterns(variant)
    return any(fnmatch(name, one) for one in wanted) and not any(fnmatch(name, one) for one in others)


def _part(source: Source, kind: Any, name: str, dtype: torch.dtype | None = None) -> Any:
    """Load one part from safetensors files, sharded or not, and never from a pickle."""
    if not (source.folder / name / "config.json").is_file():
        raise MissingFileError(f"{source.folder}: expected {name}/config.json, found none; fetch it anew")
    if not source.weights:
        with torch.device("meta"):
            network = kind.from_config(kind.load_config(source.folder, subfolder=name))
        return nn.Module.to(network, dtype or source.dtype)  # diffusers' own `to` warns
    options = {"torch_dtype" if hasattr(kind, "load_config") else "dtype": dtype or source.dtype}
    return kind.from_pretrained(
        source.folder,
        subfolder=name,
        local_files_only=True,
        use_safetensors=True,
        variant=source.variant_of(name),
        **options,
    )


def _merge_lora(family: Family, network: Any, path: Path) -> None:
    """Add a file of LoRA weights, in any form that diffusers reads, to a network.

    Raises:
        MissingFileError: there is no such file.
        UsageError: it holds nothing for this network, or something for a text encoder too.
    """
    if not path.is_file():
        raise MissingFileError(f"loras: expected a safetensors file of LoRA weights, found no {path}")
    options = {"use_safetensors": True, "local_files_only": True, "weight_name": path.name}
    if family == "sdxl":
        state, alphas = StableDiffusionXLPipeline.lora_state_dict(
            path.parent, unet_config=network.config, **options
        )
        _refuse_text(state, path)
        StableDiffusionXLPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=network)
    else:
        pipeline = StableDiffusion3Pipeline if family == "sd3" else CogVideoXPipeline
        state = pipeline.lora_state_dict(path.parent, **options)
        _refuse_text(state, path)
        pipeline.load_lora_into_transformer(state, transformer=network)
    if not getattr(network, "peft_config", None):
        raise UsageError(f"loras: expected weights for {type(network).__name__}, {path} has none")
    network.fuse_lora()
    network.unload_lora()


def _refuse_text(state: Iterable[str], path: Path) -> None:
    """Refuse LoRA weights of a text encoder: without them the network is given prompts that it was not tuned on."""
    if (key := next((name for name in state if name.startswith("text_encoder")), None)) is not None:
        raise UsageError(
            f"loras: expected weights of the denoising network alone, {path} has {key} too; merge it with diffusers "
            "(load_lora_weights, fuse_lora, unload_lora_weights, save_pretrained) and name that folder as teacher"
        )


def _tokenizers(source: Source) -> list[PreTrainedTokenizerBase]:
    names = [part for part in source.text_parts if part.startswith("tokenizer")]
    return [
        AutoTokenizer.from_pretrained(source.folder, subfolder=name, local_files_only=True) for name in names
    ]


def _sdxl(source: Source) -> Denoiser:
    config = source.scheduler()
    unet = _part(source, UNet2DConditionModel, "unet")
    return SdxlDenoiser(unet, betas_of(config), prediction=prediction_of(config), bf16=source.bf16)


def _sd3(source: Source) -> Denoiser:
    network = _part(source, SD3Transformer2DModel, "transformer")
    return Sd3Denoiser(network, shift=source.scheduler().get("shift", 1.0), bf16=source.bf16)


def _cogvideox(source: Source) -> Denoiser:
    config = source.scheduler()
    network = _part(source, CogVideoXTransformer3DModel, "transformer")
    return CogVideoXDenoiser(network, betas_of(config), prediction=prediction_of(config), bf16=source.bf16)


def _sdxl_prompts(source: Source) -> PromptEncoder:
    index = json.loads((source.folder / "model_index.json").read_text())
    return SdxlPrompts(
        _tokenizers(source),
        _part(source, CLIPTextModel, "text_encoder"),
        _part(source, CLIPTextModelWithProjection, "text_encoder_2"),
        zero_uncond=index.get("force_zeros_for_empty_prompt", True),
    )


def _sd3_prompts(source: Source) -> PromptEncoder:
    return Sd3Prompts(
        _tokenizers(source),
        _part(source, CLIPTextModelWithProjection, "text_encoder"),
        _part(source, CLIPTextModelWithProjection, "text_encoder_2"),
        _part(source, T5EncoderModel, "text_encoder_3"),
    )


def _cogvideox_prompts(source: Source) -> PromptEncoder:
    return CogVideoXPrompts(_tokenizers(source), _part(source, T5EncoderModel, "text_encoder"))


_DENOISERS: dict[Family, Callable[[Source], Denoiser]] = {
    "sdxl": _sdxl,
    "sd3": _sd3,
    "cogvideox": _cogvideox,
}
_PROMPTS: dict[Family, Callable[[Source], PromptEncoder]] = {
    "sdxl": _sdxl_prompts,
    "sd3": _sd3_prompts,
    "cogvideox": _cogvideox_prompts,
}
