"""Run the doctor's checks one after another and report a line each."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from . import checks
from .subject import Subject

Check = Callable[[Subject], str]

# Cheap ones and those that explain later faults first.
CHECKS: dict[str, Check] = {
    "round trips": checks.round_trips,
    "wrapper": checks.wrapper,
    "convention": checks.convention,
    "guidance": checks.guidance,
    "zero signal": checks.zero_signal,
    "finite": checks.finite,
    "codec": checks.codec,
    "denoising": checks.denoising,
    "images": checks.images,
}


class Finding(BaseModel):
    """What one check said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    verdict: Literal["ok", "fault", "skipped"]
    message: str
    seconds: float

    def line(self) -> str:
        """Return it as a line of text."""
        return f"{self.verdict:<8}{self.check:<12} {self.message}  ({self.seconds:.1f} s)"


class Record(BaseModel):
    """A run's doctor.json: all findings, and the hash of what was looked at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: str
    findings: tuple[Finding, ...]

    @property
    def is_fit(self) -> bool:
        """Tell whether there was no fault."""
        return all(finding.verdict != "fault" for finding in self.findings)


class Unfit(ValueError):
    """The doctor found faults: the run must not start."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        faults = [f"{finding.check}: {finding.message}" for finding in findings if finding.verdict == "fault"]
        super().__init__(f"doctor: {len(faults)} of {len(findings)} checks failed: {' | '.join(faults)}")


def examine(subject: Subject, clock: Callable[[], float] = time.perf_counter) -> Iterator[Finding]:
    """Yield each check's finding as soon as it is there. An error inside a check is a fault of the subject."""
    for name, check in CHECKS.items():
        start = clock()
        try:
            verdict, message = "ok", check(subject)
        except checks.NotApplicable as reason:
            verdict, message = "skipped", str(reason)
        except checks.Fault as fault:
            verdict, message = "fault", str(fault)
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            verdict, message = "fault", f"{type(error).__name__}: {str(error).splitlines()[0]}"
        yield Finding(check=name, verdict=verdict, message=message, seconds=clock() - start)
