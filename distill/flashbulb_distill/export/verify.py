"""Hold a bundle against torch again: its graphs, and whole pictures drawn as its manifest says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bundle import Bundle, open_bundle
from ..teachers.demo import DemoTeacher
from ..teachers.emoji import load_emoji_teacher
from ..teachers.emoji_motion import load_motion_teacher
from ..teachers.load import open_source
from ..train.recipe import MAX_TOLERANCE
from .bundle import torch_demo
from .external import read_places
from .parity import Parity, check_component, check_padding
from .pictures import MIN_SSIM, TorchStudent, compare_pictures
from .pipeline import stored_dtype
from .student import batches, torch_student


def verify_bundle(path: Path) -> list[Parity]:
    """Compare every graph of a bundle with torch on the bundle's own weights, then whole pictures.

    Returns:
        what was measured; [] where the bundle holds no weights that torch could load.
    Raises:
        BundleError: a file is not what the manifest says.
        ParityError: a graph or a picture differs from torch.
    """
    bundle = open_bundle(path)
    student = load_student(bundle)
    if student is None:
        return []
    names = bundle.manifest.components.model_dump()
    # A manifest may ask for less than the largest tolerance; that it allows more excuses no changed weight.
    tolerance = min(float(bundle.manifest.parity.get("tolerance", 1e-4)), MAX_TOLERANCE)
    found = [
        check_component(one.name, bundle.file(names[one.name]), one.module, batches(one), tolerance)
        for one in student.components
    ]
    if bundle.manifest.text[0].padding == "zeros":
        check_padding(bundle.file(names["text_encoder"]), student.components[0].inputs, tolerance)
    pictures = compare_pictures(bundle, student)
    return [*found, Parity("pictures", 1 - pictures.ssim, 1 - MIN_SSIM)]


def load_student(bundle: Bundle) -> TorchStudent | None:
    """Load a bundle's student in torch, as its weights and their configurations say; None where it holds none."""
    path, manifest = bundle.path, bundle.manifest
    if (path / "model_index.json").is_file():
        network = "unet" if (path / "unet").is_dir() else "transformer"
        source = open_source(path, dtype=stored_dtype(read_places(path / network)))
        return torch_student(source.denoiser(), source.codec(), source.prompts(), manifest.shapes[0])
    load = _DEMOS.get(manifest.family)
    if load is None or not (path / "transformer" / "config.json").is_file():
        return None
    teacher = load(path)  # a bundle has the layout of a teacher's folder
    return torch_demo(manifest.family, teacher, teacher.denoiser)


_DEMOS: dict[str, Callable[[Path], DemoTeacher[Any, Any]]] = {
    "emoji": load_emoji_teacher,
    "emoji-motion": load_motion_teacher,
}
