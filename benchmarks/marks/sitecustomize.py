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
    ("flashbulb_service.connections", "PromptHeads", "data_received", "request received", ""),
    ("flashbulb_service.api.middleware", "RequestFrame", "__call__", "HTTP parsed", ""),
    ("flashbulb_service.api.short_way", "ShortWay", "serve", "body read", ""),
    ("flashbulb_service.api.images", "", "generate_images", "body validated", "handler ended"),
    ("flashbulb_service.api.images", "", "make_plan", "planning", "planned"),
    ("flashbulb_service.head_start", "ApiEnd", "give", "", "head start sent"),
    ("flashbulb_service.head_start", "ApiEnd", "hear", "API woken", ""),
    ("flashbulb_service.queue.completions", "Completions", "tell", "early result read", ""),
    ("flashbulb_service.api.images", "", "images_answer", "waiter woken", "answer made"),
    ("starlette.responses", "JSONResponse", "render", "headers made", "JSON written"),
    ("starlette.responses", "Response", "__call__", "answer begun", "answer sent"),
    ("uvicorn.protocols.http.httptools_impl", "RequestResponseCycle", "send", "answer on its way", ""),
)
WORKER = (
    ("flashbulb_service.pipeline", "Pipeline", "begin_ahead", "head start read", ""),
    ("flashbulb_service.pipeline", "Pipeline", "_run_stages", "thread runs", ""),
    ("flashbulb_service.backends", "Student", "encode_prompts", "text begun", "text encoded"),
    ("flashbulb_service.backends", "Student", "denoise", "denoise begun", "denoised"),
    ("flashbulb_service.backends", "Student", "decode", "decode begun", "decoded"),
    ("flashbulb_service.finishing", "Finisher", "encode", "finishing", "PNG marked"),
    ("flashbulb_service.head_start", "WorkerEnd", "answer", "early result made", "early result sent"),
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
