"""Peak memory of exporting a large network, beside the bytes of its weights.

    python -m benchmarks memory [--layers 5] [--dtype float16] [--out FILE.json] [--write]

A random SD3 transformer of SD3-Medium's width (1536, 24 heads) and few layers is saved as diffusers would; then a fresh
process opens the folder, traces the graph, places the weights and checks the result. Reported is that process's peak
resident memory (VmHWM), with and without what its libraries take before any weight is there.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rig

NAME = "export_memory"

EXPORT = """
import json, sys, time
from pathlib import Path
def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
import onnx, onnx_ir, onnxruntime, torch, diffusers
from diffusers import SD3Transformer2DModel
from flashbulb_distill.export.pipeline import export_pipeline
from torch.onnx._internal.exporter import _core  # what the tracer imports anyway
libraries = peak()
started = time.perf_counter()
(part,) = export_pipeline(Path(sys.argv[1]), check=False)
print(json.dumps({"libraries": libraries, "peak": peak(), "seconds": time.perf_counter() - started}))
"""


def save_network(folder: Path, layers: int, dtype: str) -> int:
    """Save a random SD3 transformer into a pipeline folder; return the bytes of its weights."""
    import torch
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        network = SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=layers,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        )
    network = network.to(getattr(torch, dtype)).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.uniform_(-0.02, 0.02)
    network.save_pretrained(folder / "transformer", max_shard_size="500MB")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))


def measure(layers: int, dtype: str) -> dict[str, Any]:
    """Export a network in a fresh process and return what it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = save_network(folder, layers, dtype)
        command = [sys.executable, "-W", "ignore", "-c", EXPORT, str(folder)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout.splitlines()[-1])
    return {
        "network": f"SD3 transformer, width 1536, {layers} layers, {dtype}",
        "weight_bytes": weights,
        "peak_bytes": found["peak"],
        "libraries_bytes": found["libraries"],
        "peak_over_weights": round(found["peak"] / weights, 3),
        "peak_less_libraries_over_weights": round((found["peak"] - found["libraries"]) / weights, 3),
        "seconds": round(found["seconds"], 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write a file where asked to."""
    parser = rig.plain_arguments(__doc__)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    result = measure(options.layers, options.dtype)
    rig.finish(NAME, result, write=options.write, out=options.out)


if __name__ == "__main__":
    main()
