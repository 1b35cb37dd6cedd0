"""SAM's and DINOv2's image encoders as frozen backbones of the pixel discriminator, through transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

import torch
from torch import Tensor, nn
from transformers import Dinov2Model, SamVisionModel

from ..errors import MissingFileError
from ..teachers.denoiser import watched
from .lite0 import check_taps, load_lite0

BackboneName = Literal["lite0", "sam", "dinov2"]

# ImageNet's, on which both were trained, for pixels in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PixelBackbone(Protocol):
    """A frozen network of pixels whose blocks can be read as maps."""

    def to(self, device: torch.device) -> Self:
        """Move the network to a device, and return it."""
        ...

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of each block's map."""
        ...

    def maps(self, pixels: Tensor, taps: Sequence[int]) -> tuple[Tensor, ...]:
        """Return maps [b, width, h', w'] after the numbered blocks of pixels [b, 3, h, w] in [-1, 1]."""
        ...


class VisionBackbone(nn.Module):
    """A frozen vision transformer whose layers are read as maps; gradients pass through it to the pixels.

    Layers after the last one that is read are dropped.
    """

    def __init__(self, model: SamVisionModel | Dinov2Model, last: int) -> None:
        super().__init__()
        encoder: Any = model.vision_encoder if isinstance(model, SamVisionModel) else model.encoder
        name = "layers" if isinstance(model, SamVisionModel) else "layer"
        layers = getattr(encoder, name)
        if not 0 <= last < len(layers):
            raise ValueError(f"pixel_taps: expected numbers from 0 to {len(layers) - 1}, got {last}")
        setattr(encoder, name, layers[: last + 1])
        self.model = model
        self._layers = tuple(layers[: last + 1])
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).reshape(3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of each layer's map."""
        return (int(self.model.config.hidden_size),) * len(self._layers)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the parent does."""
        return super().train(False)

    def maps(self, pixels: Tensor, taps: Sequence[int]) -> tuple[Tensor, ...]:
        """Return maps [b, width, h / patch, w / patch] after the numbered layers of pixels [b, 3, h, w] in [-1, 1]."""
        scaled = ((pixels + 1) / 2 - self.get_buffer("mean")) / self.get_buffer("std")
        with watched([self._layers[tap] for tap in taps]) as outputs:
            self.model(pixel_values=scaled)
        return tuple(self._map(outputs[place], pixels) for place in range(len(taps)))

    def _map(self, output: Any, pixels: Tensor) -> Tensor:
        tokens: Tensor = output[0] if isinstance(output, tuple) else output
        if tokens.ndim == 4:  # SAM's layers keep the picture's axes
            return tokens.movedim(-1, 1)
        height, width = (side // int(self.model.config.patch_size) for side in pixels.shape[2:])
        places = tokens[:, -height * width :]  # after the class token
        return places.transpose(1, 2).reshape(len(pixels), -1, height, width)


def load_pixel_backbone(
    name: BackboneName, source: str | Path | None, *, size: int, taps: Sequence[int]
) -> PixelBackbone:
    """Load a frozen backbone: EfficientNet-Lite0 from its package, SAM or DINOv2 from a folder or hub id.

    Args:
        size: side of the pictures that it will see, px.   taps: the blocks that will be read.
    Raises:
        ValueError: no source for SAM or DINOv2, a size that it cannot see, or a block that it does not have.
        MissingFileError: the source holds no such model.
    """
    if name == "lite0":
        network = load_lite0()
        check_taps(taps, len(network.blocks))
        return network
    if source is None:
        example = {"sam": "facebook/sam-vit-base", "dinov2": "facebook/dinov2-base"}[name]
        raise ValueError(f"pixel_source: expected a folder or hub id for {name}, like {example}, got none")
    kind = {"sam": SamVisionModel, "dinov2": Dinov2Model}[name]
    try:
        model, info = kind.from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise MissingFileError(f"pixel_source: expected a {name} model in {source}: {reason}") from error
    if info["missing_keys"]:
        some = sorted(info["missing_keys"])[0]
        raise MissingFileError(f"pixel_source: expected the weights of a {name} model in {source}, no {some}")
    if name == "sam" and size != model.config.image_size:
        raise ValueError(
            f"pixel_size: expected {model.config.image_size}, the only size this SAM sees, got {size}"
        )
    if size % model.config.patch_size:
        raise ValueError(f"pixel_size: expected a multiple of {model.config.patch_size}, got {size}")
    return cast(PixelBackbone, VisionBackbone(model, max(taps)))
