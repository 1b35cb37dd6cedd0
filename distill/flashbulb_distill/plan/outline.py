"""A recipe's teacher on the meta device: its configurations, no weights, no text encoder."""

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

import torch

from ..teachers.cogvideox import CogVideoXDenoiser
from ..teachers.denoiser import Condition
from ..teachers.load import Source, open_source
from ..teachers.open import open_teacher
from ..teachers.pretrained import PretrainedTeacher
from ..teachers.prompts import CLIP_LENGTH, SD3_T5_LENGTH
from ..teachers.sd3 import Sd3Denoiser
from ..teachers.sdxl import SdxlDenoiser
from ..teachers.teacher import Teacher
from ..train.recipe import Recipe, RecipeError

META = torch.device("meta")
# The configurations of published checkpoints are part of this package, by their hub ids.
KNOWN = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd35-large",
    "zai-org/CogVideoX-2b": "cogvideox-2b",
    "THUDM/CogVideoX-2b": "cogvideox-2b",
    "zai-org/CogVideoX-5b": "cogvideox-5b",
    "THUDM/CogVideoX-5b": "cogvideox-5b",
}


class Outline(PretrainedTeacher):
    """A teacher of a family that people own, as shapes alone."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Return embeddings of the shape that the text encoders give; they would lie in the host's memory."""
        length, width, pooled = self._text_shape()
        return Condition(
            torch.zeros(len(prompts), length, width, device="meta"),
            torch.zeros(len(prompts), pooled, device="meta"),
        )

    def encode_uncond(self) -> Condition:
        """Return one row."""
        return self.encode([""])

    def _text_shape(self) -> tuple[int, int, int]:
        denoiser = self.denoiser
        if isinstance(denoiser, SdxlDenoiser):
            config = denoiser.unet.config
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            return CLIP_LENGTH, config.cross_attention_dim, pooled
        if isinstance(denoiser, Sd3Denoiser):
            config = denoiser.transformer.config
            return CLIP_LENGTH + SD3_T5_LENGTH, config.joint_attention_dim, config.pooled_projection_dim
        assert isinstance(denoiser, CogVideoXDenoiser)
        config = denoiser.transformer.config
        return config.max_text_seq_length, config.text_embed_dim, 0


def outline(recipe: Recipe) -> Teacher:
    """Return a recipe's teacher on the meta device. Nothing is fetched, and of large teachers no weight is read.

    Raises:
        RecipeError: the teacher is neither a folder nor a hub id whose configuration is known.
    """
    bf16 = recipe.precision == "bfloat16"
    if recipe.is_demo:
        return open_teacher(recipe.family, recipe.teacher, bf16=bf16, device=META)
    assert recipe.shape is not None  # the recipe checks it
    source = _source(recipe)
    if source.family != recipe.family:
        raise RecipeError(f"family: expected {source.family}, which {recipe.teacher} is, got {recipe.family}")
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Outline(Source(source.folder, source.family, dtype, weights=False), recipe.shape, META)


def _source(recipe: Recipe) -> Source:
    if Path(recipe.teacher).is_dir():
        return open_source(recipe.teacher)
    name = KNOWN.get(recipe.teacher)
    if name is None:
        raise RecipeError(
            f"teacher: expected a folder, or one of {', '.join(KNOWN)}, got {recipe.teacher}; "
            "a folder with its JSON files is enough to plan"
        )
    with as_file(files(__package__).joinpath("known", name)) as folder:
        return open_source(folder)
