"""LitServe around the student: batches of at most --batch, a wait of --wait-ms, one worker."""

from pathlib import Path
from typing import Any

import litserve
from shape import ROUTE, draw_answers, options
from student import open_as_worker


class Pictures(litserve.LitAPI):
    """Bodies in, answers out."""

    def __init__(self, bundle: Path, threads: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._bundle, self._threads, self._batch = bundle, threads, settings["max_batch_size"]

    def setup(self, device: str) -> None:
        """Open the student in the worker."""
        self.student = open_as_worker(self._bundle, threads=self._threads, batch=self._batch)

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take a body as it is."""
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Keep a batch a list."""
        return inputs

    def predict(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Draw a batch."""
        return draw_answers(self.student, inputs)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Keep the answers of a batch a list."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Answer as drawn."""
        return output


if __name__ == "__main__":
    args = options()
    api = Pictures(
        args.bundle.resolve(),
        args.threads,
        max_batch_size=args.batch,
        batch_timeout=args.wait_ms / 1000,
        api_path=ROUTE,
    )
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, timeout=False)
    server.run(
        host="127.0.0.1",
        port=args.port,
        num_api_servers=1,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
