"""Python imports this first of all in the server's processes while `stages` runs: it marks when they pass their stages.

Nothing of the product knows of it. Marks are kept in memory and written when the process ends.
"""

import atexit
import functools
import importlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# (module, class, function, mark on entering, mark on leaving)
API = (
    ("flashbulb_service.connections", "PromptHeads", "data_received", "A1 request received", ""),
    ("flashbulb_service.api.middleware", "RequestFrame", "__call__", "A2 frame", ""),
    ("flashbulb_service.api.short_way", "ShortWay", "serve", "A3 short way", ""),
    ("flashbulb_service.api.images", "", "generate_images", "A4 validated", "A9b generated"),
    ("flashbulb_service.api.images", "", "make_plan", "A4b plan begin", "A5 planned"),
    ("flashbulb_service.queue.line", "_Wire", "send", "A6 send", "A7 written"),
    ("flashbulb_service.queue.line", "_Wire", "data_received", "A8 api hears", ""),
    ("flashbulb_service.queue.completions", "Completions", "_resolve", "A8b resolve", ""),
    ("flashbulb_service.api.images", "", "images_answer", "A9 woken", "A9a answered"),
    ("starlette.responses", "JSONResponse", "render", "A9c render", "A9d rendered"),
    ("starlette.responses", "Response", "__call__", "A9e send", "A9g all sent"),
    ("uvicorn.protocols.http.httptools_impl", "RequestResponseCycle", "send", "A9f uv send", ""),
)
WORKER = (
    ("flashbulb_service.queue.line", "_Wire", "data_received", "W1 worker hears", ""),
    ("flashbulb_service.queue.queue", "Queue", "wait_for_work", "", "W2 woken"),
    ("flashbulb_service.worker", "Worker", "_decide", "W2b decide", "W2c decided"),
    ("flashbulb_service.pipeline", "Pipeline", "submit", "W3 submit", ""),
    ("flashbulb_service.pipeline", "Pipeline", "_begin", "W3b begin", ""),
    ("flashbulb_service.pipeline", "Pipeline", "_run_stages", "W4 thread", ""),
    ("flashbulb_service.backends", "Student", "encode_prompts", "W5 text begun", "W5b text"),
    ("flashbulb_service.backends", "Student", "denoise", "W5c", "W6 denoised"),
    ("flashbulb_service.backends", "Student", "decode", "W6b", "W6c decoded"),
    ("flashbulb_service.finishing", "Finisher", "finish", "W7 finish", "W7c stored"),
    ("flashbulb_service.results", "ResultStore", "write", "W7b encoded", ""),
    ("flashbulb_service.queue.queue", "Queue", "complete_here", "W8 commit", ""),
    ("flashbulb_service.queue.direct", "Direct", "_ask", "W8b commit sent", "W9 committed"),
)
marks: list[tuple[int, str]] = []


def marked(function: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
    """Wrap a function so that it leaves its marks."""

    def mark(name: str) -> None:
        if name:
            marks.append((time.monotonic_ns(), name))

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def waiting(*args: Any, **kwargs: Any) -> Any:
            mark(before)
            result = await function(*args, **kwargs)
            mark(after)
            return result

        return waiting

    @functools.wraps(function)
    def calling(*args: Any, **kwargs: Any) -> Any:
        mark(before)
        result = function(*args, **kwargs)
        mark(after)
        return result

    return calling


def install(folder: str) -> None:
    """Mark the functions of this process's part."""
    for module, owner, name, before, after in WORKER if "worker" in sys.orig_argv else API:
        holder: Any = importlib.import_module(module)
        holder = getattr(holder, owner) if owner else holder
        setattr(holder, name, marked(getattr(holder, name), before, after))

    def write() -> None:
        (Path(folder) / f"{os.getpid()}.json").write_text(json.dumps(marks), encoding="utf-8")

    atexit.register(write)


if "flashbulb_service.cli" in sys.orig_argv and "MARKS_FOLDER" in os.environ:
    install(os.environ["MARKS_FOLDER"])
