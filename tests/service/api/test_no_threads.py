"""A request costs no change of threads: FastAPI runs plain functions in a pool, which costs more than they do."""

import inspect
from collections.abc import Iterator

from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_dependant

from flashbulb_service.api import admin, edits, health, images, jobs, models, playground


def calls_of(dependant: Dependant) -> Iterator[object]:
    yield dependant.call
    for inner in dependant.dependencies:
        yield from calls_of(inner)


def plain_functions(dependant: Dependant) -> list[str]:
    calls = [call for call in calls_of(dependant) if callable(call)]
    return [
        repr(call)
        for call in calls
        if not inspect.iscoroutinefunction(call) and not inspect.isasyncgenfunction(call)
    ]


def test_routes_and_what_they_depend_on_are_coroutines() -> None:
    routers = [part.router for part in (admin, edits, health, images, jobs, models)]
    routes = [route for router in [*routers, playground.create_router()] for route in router.routes]
    assert len(routes) > 15
    assert [name for route in routes for name in plain_functions(route.dependant)] == []


def test_a_plain_function_would_be_found() -> None:
    def plain() -> None: ...

    assert plain_functions(get_dependant(path="/", call=plain))
