"""Loads the Lua scripts: package data, each put behind the shared `lib.lua` and the key templates."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Self

from flashbulb_service.queue.keys import TEMPLATES
from flashbulb_service.queue.views import VIEW_FIELDS
from flashbulb_service.wire import WIRE

NAMES = (
    "enqueue",
    "window",
    "take",
    "publish",
    "heartbeat",
    "complete",
    "fail",
    "release",
    "cancel",
    "abandon",
    "reap",
    "replay",
    "watch",
    "stats",
    "gate",
    "progress",
    "step",
    "forget",
    "hooks",
    "hook_done",
    "wake",
)


@cache
def source(name: str) -> str:
    """Return the full text of a script, as it is sent to the server."""
    if name not in NAMES:
        raise ValueError(f"unknown script {name!r}; there are {', '.join(NAMES)}")
    return behind_lib("flashbulb_service.queue", name)


@dataclass(frozen=True)
class Script:
    """A script with the name that a server gives to it."""

    text: str
    sha1: str

    @classmethod
    def of(cls, text: str) -> Self:
        """Name a script."""
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def behind_lib(package: str, name: str) -> str:
    """Return a script of a package's folder `lua`, put behind the key templates and the shared functions."""
    lib = (resources.files("flashbulb_service.queue") / "lua" / "lib.lua").read_text(encoding="utf-8")
    body = (resources.files(package) / "lua" / f"{name}.lua").read_text(encoding="utf-8")
    templates = ", ".join(f"{key} = '{template}'" for key, template in TEMPLATES.items())
    fields = ", ".join(f"'{name}'" for name in VIEW_FIELDS)
    constants = f"local TEMPLATES = {{{templates}}}\nlocal VIEW_FIELDS = {{{fields}}}\nlocal WIRE = {WIRE}"
    return f"{constants}\n{lib}\n{body}"
