"""The process in which Triton compiles: a request per line on stdin, an answer per line on stdout. See `aot`."""

import contextlib
import io
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def compile_request(request: dict[str, Any]) -> None:
    """Compile one variant into the request's folder: kernel.ptx, kernel.cubin, ptxas.log and metadata.json."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f".attention.{request['file']}", __package__), request["function"])
    names = list(request["signature"])
    source = ASTSource(
        fn=kernel,
        signature=request["signature"],
        constexprs={(names.index(name),): value for name, value in request["constants"].items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in request["aligned"]},
    )
    target = GPUTarget("cuda", int(request["arch"].removeprefix("sm_")), 32)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=request["options"])
    folder = Path(request["folder"])
    (folder / "kernel.ptx").write_text(compiled.asm["ptx"], encoding="utf-8")
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    (folder / "ptxas.log").write_text(log.getvalue(), encoding="utf-8")
    known = ("name", "num_warps", "shared", "global_scratch_size", "profile_scratch_size", "tmem_size")
    metadata = {name: getattr(compiled.metadata, name, 0) for name in known}
    (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")


def main() -> None:
    """Answer requests until stdin ends; what goes wrong is an answer, in one line."""
    answers = sys.stdout
    for line in sys.stdin:
        error = None
        try:
            compile_request(json.loads(line))
        except Exception as failure:  # noqa: BLE001 - whatever the compiler raises is the caller's to report
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:500]}"
        answers.write(json.dumps({"error": error}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
