"""Parts of a file, as RFC 9110 §14 asks for them. A pure function."""

import re

from flashbulb_service.api.errors import RangeNotSatisfiable

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})", re.IGNORECASE)


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return the (start, end before which) of a Range header; None: the whole file is to be sent.

    Several ranges, other units and what is no range at all are ignored, as the standard allows.

    Raises:
        RangeNotSatisfiable: the range lies outside the file.
    """
    found = _RANGE.fullmatch(header.replace(" ", "")) if header else None
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:  # the last so many
        length = min(int(found[2]), size)
        start, end = size - length, size
    else:
        start, end = int(found[1]), min(int(found[2]) + 1 if found[2] else size, size)
        if found[2] and int(found[2]) < start:
            return None
    if start >= end:
        raise RangeNotSatisfiable(size)
    return start, end
