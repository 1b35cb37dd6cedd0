"""What all peers share: the images route's body in, OpenAI's answer out, and the command line of an app."""

import argparse
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from student import Ask, BareStudent

from flashbulb_service.images import encode_image

ROUTE = "/v1/images/generations"


def asks_of(body: dict[str, Any]) -> list[Ask]:
    """Read a request: a picture per index, as Flashbulb draws them."""
    return [Ask(str(body["prompt"]), int(body["seed"]), index) for index in range(int(body.get("n", 1)))]


def draw_answers(student: BareStudent, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Draw the pictures of several requests in one batch, and answer each."""
    asked = [asks_of(body) for body in bodies]
    pictures = iter(student.draw([ask for asks in asked for ask in asks]))
    return [
        {
            "created": 0,
            "data": [
                {"b64_json": base64.b64encode(encode_image(next(pictures), "png")).decode()} for _ in asks
            ],
            "batch_size": len(bodies),
        }
        for asks in asked
    ]


def options() -> argparse.Namespace:
    """Read the command line of an app."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--wait-ms", type=float, default=0.0)
    return parser.parse_args()
