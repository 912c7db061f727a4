"""Interrupts at each point of a call where CPython looks for signals."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType


class Interrupter:
    """Raises KeyboardInterrupt inside *call* where CPython looks for signals.

    At the *step*-th function entry or return from C, and with *twice* once more, at the next entry, while the first
    one is being handled.
    """

    def __init__(self, call: Callable[..., object], step: int, twice: bool) -> None:
        self.code = call.__code__  # type: ignore[attr-defined]
        self.step, self.twice = step, twice
        self.seen = self.raised = 0
        # A hook that raises is taken off. If it does so in a destructor that a function's entry happens to run, CPython
        # 3.11 still calls it for that entry, and crashes when nobody else kept it (ceval.c, call_trace).
        self.hooks = self._trace, self._profile

    def _inside(self, frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code is not self.code:
            frame = frame.f_back
        return frame is not None

    def _profile(self, frame: FrameType, event: str, _argument: object) -> None:
        if event in ("call", "c_return") and self._inside(frame):
            self.seen += 1
            if self.seen == self.step:
                self.raised = 1
                raise KeyboardInterrupt

    def _trace(self, frame: FrameType, _event: str, _argument: object) -> None:
        if self.twice and self.raised == 1 and self._inside(frame):
            self.raised = 2
            raise KeyboardInterrupt

    def __enter__(self) -> None:
        gc.disable()  # the finalizers of other garbage are no part of the call, and swallow what is raised
        trace, profile = self.hooks
        sys.settrace(trace)
        sys.setprofile(profile)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        sys.settrace(None)
        gc.enable()
