"""Interrupts inside a call: at each point where CPython looks for signals in turn, or wherever signals arrive."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

from children import Crew


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


class Interrupted(Exception):
    """What a storm's signals raise."""


class SignalStorm:
    """Interrupts the thread that enters it, the main one, wherever *call* is running in it, handlers and all.

    Each signal is sent as soon as the handler of the one before has run. Who sends faster than they are handled leaves
    the thread no time for anything else.
    """

    def __init__(self, call: Callable[..., object]) -> None:
        self.interrupts = 0
        self.paused = False
        self._code = call.__code__  # type: ignore[attr-defined]
        self._handled = 0
        self._over = threading.Event()
        self._sender = Crew()

    def _handle(self, _number: int, frame: FrameType | None) -> None:
        self._handled += 1
        while frame is not None:
            if frame.f_code is self._code:
                self.interrupts += 1
                raise Interrupted
            frame = frame.f_back

    def _send(self, to: int) -> None:
        sent = 0
        while not self._over.is_set():
            if sent == self._handled and not self.paused:
                sent += 1
                signal.pthread_kill(to, signal.SIGUSR1)
            time.sleep(0)

    def __enter__(self) -> Self:
        signal.signal(signal.SIGUSR1, self._handle)
        self._sender.add(self._send, threading.get_ident())
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._sender.join()
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
