"""Write the pages of docs/reference/ from the code, so that they cannot drift: make docs

Settings, error codes, the manifest and the command line are described where they are defined; these pages only list
them. `--check` writes nothing and names the pages that are not what the code says.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

DOCS = Path(__file__).resolve().parent
FOLDER = DOCS / "reference"
sys.path.insert(0, str(DOCS))
NOTE = "<!-- Made by docs/reference.py from the code; change it there. -->\n"


class Undescribed(ValueError):
    """Something that users meet has no description where it is defined."""


def settings_page(fields: dict[str, FieldInfo]) -> str:
    """List every setting: variable, default, meaning."""
    lines = [
        "# Settings",
        "",
        "An option of the command line wins over the environment, the environment over a file of that name (in",
        "lower case) in the folder `FLASHBULB_SECRETS_DIR`. An unknown `FLASHBULB_…` is an error.",
        "",
        "| variable | default | means |",
        "|---|---|---|",
    ]
    for name, field in fields.items():
        if not field.description:
            raise Undescribed(f"the setting {name}: expected Field(description=...) in settings.py")
        lines.append(f"| `FLASHBULB_{name.upper()}` | {_default(field)} | {_cell(field.description)} |")
    return _page(lines)


def errors_page(errors: Iterator[type[Exception]]) -> str:
    """List every error code with its meaning."""
    lines = [
        "# Error codes",
        "",
        'Every error answer is `{"error": {"message", "type", "param", "code"}}`; programs should look at `code`.',
        "Statuses, and the headers that tell when to come back, are in [the HTTP API](../http-api.md#errors).",
        "",
        "| code | means |",
        "|---|---|",
    ]
    rows = {}
    for error in errors:
        text = (inspect.getdoc(error) or "").split("\n\n")[0]
        if not text:
            raise Undescribed(f"the error {error.__name__}: expected a docstring")
        rows.setdefault(str(error.code), []).append(_cell(text))  # type: ignore[attr-defined]
    lines += [f"| `{code}` | {' / '.join(texts)} |" for code, texts in sorted(rows.items())]
    return _page(lines)


def manifest_page(model: type[BaseModel]) -> str:
    """List every field of a bundle's manifest, section by section."""
    lines = [
        "# The manifest",
        "",
        "`manifest.json` is all that is needed to run a student rightly and to trace it to its teacher. Unknown fields",
        "are errors; `schema_version` is checked before anything else is read.",
    ]
    seen: list[type[BaseModel]] = []
    waiting = [model]
    while waiting:
        section = waiting.pop(0)
        if section in seen:
            continue
        seen.append(section)
        text = (inspect.getdoc(section) or "").split("\n\n")[0]
        if not text:
            raise Undescribed(f"the record {section.__name__}: expected a docstring")
        lines += [
            "",
            f"## {section.__name__}",
            "",
            text,
            "",
            "| field | type | default | means |",
            "|---|---|---|---|",
        ]
        for name, field in section.model_fields.items():
            waiting += [part for part in _records(field.annotation) if part not in seen]
            means = _cell(field.description) if field.description else _meaning(name, field)
            lines.append(f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {means} |")
    return _page(lines)


def commands_page(root: click.Command) -> str:
    """List every command with its arguments and options."""
    lines = [
        "# Commands",
        "",
        "Exit code 0: success, 1: the work failed, 2: wrong usage. An error is one line on stderr; `--debug` adds the",
        "traceback.",
    ]
    for path, command in _commands(root, ("flashbulb",)):
        help_text = (command.help or "").split("\f")[0].strip()
        if not help_text:
            raise Undescribed(f"{' '.join(path)}: expected a docstring")
        lines += ["", f"## {' '.join(path)}", "", *help_text.splitlines()]
        parameters = [p for p in command.params if not getattr(p, "hidden", False) and "--help" not in p.opts]
        if parameters:
            lines += ["", "| option | means |", "|---|---|"]
        for parameter in parameters:
            text = getattr(parameter, "help", None)
            if not text:
                raise Undescribed(f"{' '.join(path)} {parameter.opts[0]}: expected a help text")
            lines.append(f"| {_option(parameter)} | {_cell(text)} |")
    return _page(lines)


def pages() -> dict[str, str]:
    """Return every page by its file name."""
    from flashbulb_distill.bundle import Manifest
    from flashbulb_service.cli import app
    from flashbulb_service.settings import Settings

    return {
        "settings.md": settings_page(Settings.model_fields),
        "errors.md": errors_page(_errors()),
        "manifest.md": manifest_page(Manifest),
        "../images/reference-run.svg": _curves(),
        "../performance.md": NOTE + "\n" + import_module("performance").performance_page(),
        "../plans.md": NOTE + "\n" + import_module("plans_page").plans_page(),
        "commands.md": commands_page(_with_plugins(typer.main.get_command(app))),
    }


def _errors() -> Iterator[type[Exception]]:
    import flashbulb_service
    from flashbulb_service.errors import ServiceError

    package = Path(flashbulb_service.__path__[0])
    for file in sorted(package.rglob("*.py")):  # or the page would hold what happened to be imported
        if "ServiceError" in file.read_text(encoding="utf-8"):
            import_module(".".join(("flashbulb_service", *file.relative_to(package).with_suffix("").parts)))
    waiting: list[type[Exception]] = [ServiceError]
    while waiting:
        error = waiting.pop(0)
        waiting += error.__subclasses__()
        if error is not ServiceError and error.__module__.startswith("flashbulb_"):
            yield error


def _with_plugins(root: click.Command) -> click.Command:
    """Put the commands of other packages where `flashbulb NAME` forwards to."""
    from flashbulb_service.bench.cli import app as bench

    assert hasattr(root, "commands")
    loaded: dict[str, Callable[..., Any]] = {"bench": bench}
    loaded |= {entry.name: entry.load() for entry in entry_points(group="flashbulb.commands")}
    for name, app in loaded.items():
        root.commands[name] = typer.main.get_command(app)  # type: ignore[arg-type]
    return root


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if getattr(command, "hidden", False):
        return
    yield path, command
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from _commands(child, (*path, name))


def _option(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return f"`{names}`"


def _records(annotation: Any) -> list[type[BaseModel]]:
    """Return the records that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for part in getattr(annotation, "__args__", ()) for record in _records(part)]


def _type(annotation: Any) -> str:
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        name = annotation.__name__
        return f"[{name}](#{name.lower()})" if issubclass(annotation, BaseModel) else f"`{name}`"
    text = str(annotation).replace("typing.", "").replace("collections.abc.", "")
    for record in _records(annotation):
        text = text.replace(f"{record.__module__}.{record.__qualname__}", record.__name__)
    return f"`{text}`".replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "see meaning"
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "none"
    value = field.default
    if isinstance(value, (frozenset, tuple, dict)) and not value:
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else "empty"


def _meaning(name: str, field: FieldInfo) -> str:
    """A record says of itself what it is; anything else needs words of its own."""
    if _records(field.annotation):
        return f"see {', '.join(_type(record) for record in _records(field.annotation))}"
    raise Undescribed(f"the field {name}: expected Field(description=...) where it is defined")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _page(lines: list[str]) -> str:
    return NOTE + "\n" + "\n".join(lines) + "\n"


def _curves() -> str:
    module = import_module("curves")
    return str(module.draw(module.read_curves(FOLDER.parent / "evaluation" / "reference-run")))


def main() -> None:
    """Write the pages, or check them."""
    made = pages()
    if "--check" in sys.argv[1:]:
        stale = [name for name, text in made.items() if not _is(FOLDER / name, text)]
        if stale:
            sys.exit(
                f"docs/reference: {', '.join(stale)} is not what the code says: run python docs/reference.py"
            )
        return
    FOLDER.mkdir(exist_ok=True)
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    main()
