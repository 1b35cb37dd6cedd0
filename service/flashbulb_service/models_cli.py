"""`flashbulb models load|unload|alias`: words on models for all workers and API processes of a queue."""

from typing import TYPE_CHECKING, Annotated

import typer

from flashbulb_service.admin_cli import Data, ModelName, Models, Redis, model_id_of, on_store

if TYPE_CHECKING:
    from flashbulb_service.queue import Queue
    from flashbulb_service.tenants.store import KeyStore

models_app = typer.Typer(no_args_is_help=True, help="Look at the model repository, and say what is served.")


@models_app.command("load")
def load(model: ModelName, models: Models = None, data: Data = None, redis: Redis = None) -> None:
    """Serve a model again on all workers, and have it in memory: flashbulb models load emoji@1."""
    _say(model, models, data, redis, unload=False)


@models_app.command("unload")
def unload(model: ModelName, models: Models = None, data: Data = None, redis: Redis = None) -> None:
    """Serve a model no longer, until it is loaded; batches in hand go on: flashbulb models unload emoji@2."""
    _say(model, models, data, redis, unload=True)


@models_app.command("alias")
def alias(
    name: Annotated[str | None, typer.Argument(metavar="[ALIAS]", help="[list all]")] = None,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="name or name@version")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Forget the alias")] = False,
    models: Models = None,
    data: Data = None,
    redis: Redis = None,
) -> None:
    """Let another name lead to a model: flashbulb models alias dall-e-3 emoji; without a model, show them."""
    from flashbulb_service.errors import InvalidRequest
    from flashbulb_service.model_book import ModelBook
    from flashbulb_service.parts import load_catalog
    from flashbulb_service.settings import read_settings

    if name is not None and not remove:
        if model is None:
            raise InvalidRequest("expected the model that the alias leads to, or --remove", param="MODEL")
        catalog = load_catalog(read_settings(models=models, data=data, redis=redis), verify=False)
        if name in catalog.names or model not in catalog.names:
            raise InvalidRequest(
                f"expected a new name and a model ({', '.join(catalog.names)}), got {name!r} and {model!r}"
            )

    async def work(queue: "Queue", _keys: "KeyStore") -> None:
        book = ModelBook(queue)
        if name is not None and model is not None and not remove:
            await book.set_alias(name, model)
        elif name is not None and not await book.remove_alias(name):
            raise InvalidRequest(f"expected an alias that was set, got {name!r}", param="ALIAS")
        for known, target in sorted((await book.read()).aliases.items()):
            typer.echo(f"{known}\t{target}")

    on_store(work, data, redis)


def _say(model: str, models: Models, data: Data, redis: Redis, *, unload: bool) -> None:
    from flashbulb_service.model_book import ModelBook
    from flashbulb_service.settings import read_settings

    model_id = model_id_of(read_settings(models=models, data=data, redis=redis), model)

    async def work(queue: "Queue", _keys: "KeyStore") -> None:
        book = ModelBook(queue)
        await (book.unload(model_id) if unload else book.load(model_id))
        typer.echo(f"{model_id}\t{'unloaded' if unload else 'served'}")

    on_store(work, data, redis)
