"""The open emoji art: npm packages pinned by hash, their SVG drawings, a rasteriser. For scripts that draw data."""

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image


def read_concepts(path: Path) -> list[str]:
    """Return the concept names of a list file, without comments and empty lines."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def fetch(package: str, version: str, sha256: str, cache: Path) -> Path:
    """Return the package's tarball, downloaded with npm once and checked against its pinned hash."""
    name = package.lstrip("@").replace("/", "-") + f"-{version}.tgz"
    path = cache / name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{package}@{version}"]
        subprocess.run(command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
    arrived = hashlib.sha256(path.read_bytes()).hexdigest()
    if arrived != sha256:
        raise ValueError(
            f"{path.name}: expected sha256 {sha256}, got {arrived}; delete the file and try again"
        )
    return path


def read_json(tarball: Path, member: str) -> dict:
    """Return one JSON file of an npm tarball."""
    with tarfile.open(tarball) as archive:
        handle = archive.extractfile(f"package/{member}")
        assert handle is not None
        return json.load(handle)


class Art:
    """The SVG art of one style, looked up by emoji code points."""

    def __init__(self, tarball: Path) -> None:
        icons = read_json(tarball, "icons.json")
        self._icons, self._aliases = icons["icons"], icons.get("aliases", {})
        self._size = (icons.get("width", 16), icons.get("height", 16))
        chars = read_json(tarball, "chars.json")
        self._names = {code.replace("-fe0f", ""): name for code, name in chars.items()}

    def svg(self, code: str, *, zoom: float, shift: tuple[float, float]) -> str:
        """Return a square SVG of one emoji: `zoom` 1 fills the square; `shift` in parts of its side."""
        name = self._names[code]
        icon = self._icons.get(name) or self._icons[self._aliases[name]["parent"]]
        width, height = icon.get("width", self._size[0]), icon.get("height", self._size[1])
        side = max(width, height) / zoom  # letterboxed: not every icon is square
        left = (width - side) / 2 - shift[0] * side
        top = (height - side) / 2 - shift[1] * side
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {side} {side}">{icon["body"]}</svg>'
        )


def rasterise(svg: str, size_px: int) -> np.ndarray:
    """Draw a square SVG as RGBA, float32 [size, size, 4] in [0, 255]."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size_px, height=size_px)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"), dtype=np.float32)


def emoji_codes(names: Path) -> dict[str, str]:
    """Map Unicode names to code points, from the tarball of names."""
    return {
        entry["name"]: "-".join(f"{ord(char):x}" for char in emoji if char != "\ufe0f")
        for emoji, entry in read_json(names, "data-by-emoji.json").items()
    }
