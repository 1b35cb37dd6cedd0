"""The plain way: a FastAPI route that runs the model, one request at a time."""

import threading
from typing import Any

import uvicorn
from fastapi import FastAPI
from shape import ROUTE, draw_answers, options
from student import open_as_worker

if __name__ == "__main__":
    args = options()
    student = open_as_worker(args.bundle, threads=args.threads, batch=1)
    one_at_a_time = threading.Lock()
    app = FastAPI()

    @app.post(ROUTE)
    def generate(body: dict[str, Any]) -> dict[str, Any]:
        """Run in FastAPI's thread pool, so that the loop stays free."""
        with one_at_a_time:
            return draw_answers(student, [body])[0]

    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning", access_log=False)
