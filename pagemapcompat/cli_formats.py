"""The forms in which `pagemapcompat probe` answers. Each is a function of the same plain values."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]
Groups = Sequence[tuple[str, tuple[str, ...]]]

_COLOURS = {"yes": "32", "no": "31", "denied": "33", "disabled": "36", "unknown": "35"}
_PREFIX = "PAGEMAPCOMPAT"


def _constant(name: str) -> str:
    """A feature's name as C and the shell have names."""
    return name.upper().replace("-", "_")


def _plain(value: object) -> str:
    """A limit as one word, or as words."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)


# -- For people --------------------------------------------------------------------------------------------------


def _painted(state: str, width: int) -> str:
    text = state.ljust(width)
    if sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"\033[{_COLOURS.get(state, '0')}m{text}\033[0m"
    return text


def _lines(answers: Mapping[str, Values]) -> list[str]:
    width = max(map(len, answers), default=0)
    lines = []
    for name, answer in answers.items():
        error = f" ({answer['errno']})" if answer["errno"] else ""
        lines.append(f"  {name.ljust(width)}  {_painted(answer['state'], 8)}  {answer['detail']}{error}")
        if answer["hint"] and answer["state"] != "yes":
            lines.append(f"  {'':{width}}  {'':8}  remedy: {answer['hint']}")
    return lines


def text(values: Values, groups: Groups) -> str:
    """Grouped, with the backend that would be taken on top, and why each better one would not."""
    lines = [f"backend: {values['backend'] or 'none works here'}"]
    if values["backend"]:
        lines.append(f"  guarantees {', '.join(values['guarantees'])}")
    for name, backend in values["backends"].items():
        if name == values["backend"]:
            break
        error = f" ({backend['errno']})" if backend["errno"] else ""
        lines += [f"  not {name}: {backend['reason']}{error}", f"    remedy: {backend['hint'] or 'none'}"]
    if not values["privileged"]:
        lines.append("  (without privileges: root, or CAP_SYS_PTRACE, may be told otherwise)")
    left = dict(values["features"])
    for title, beginnings in groups:
        chosen = {name: answer for name, answer in left.items() if name.startswith(beginnings)}
        left = {name: answer for name, answer in left.items() if name not in chosen}
        lines += ["", title, *_lines(chosen)]
    width = max(map(len, values["limits"]))
    lines += ["", "limits", *(f"  {name.ljust(width)}  {_plain(limit)}" for name, limit in values["limits"].items())]
    return "\n".join(lines) + "\n"


def pid_text(values: Values) -> str:
    """What could be read of a process."""
    return "\n".join([f"process {values['pid']}", *_lines(values["answers"])]) + "\n"


# -- For programs ------------------------------------------------------------------------------------------------


def as_json(values: Values, _groups: Groups = ()) -> str:
    """One object; `probe.schema.json` describes it."""
    return json.dumps(values, indent=2) + "\n"


def env(values: Values, _groups: Groups) -> str:
    """Shell assignments: the state of each feature in lower case, lists as words."""
    pairs = {
        "BACKEND": values["backend"] or "none",
        "GUARANTEES": _plain(values["guarantees"]),
        **{f"BACKEND_{_constant(name)}": _plain(one["usable"]) for name, one in values["backends"].items()},
        **{f"FEATURE_{_constant(name)}": answer["state"] for name, answer in values["features"].items()},
        **{f"LIMIT_{name.upper()}": _plain(limit) for name, limit in values["limits"].items()},
    }
    return "".join(f"{_PREFIX}_{name}={shlex.quote(value)}\n" for name, value in pairs.items())


def macros(values: Values, _groups: Groups) -> str:
    """A C header. What is not there is not defined; a comment says why."""
    lines = [f"#ifndef {_PREFIX}_FEATURES_H", f"#define {_PREFIX}_FEATURES_H", ""]
    for name, answer in values["features"].items():
        macro = f"{_PREFIX}_HAVE_{_constant(name)}"
        error = f", {answer['errno']}" if answer["errno"] else ""
        lines.append(
            f"#define {macro} 1" if answer["state"] == "yes" else f"/* #undef {macro}: {answer['state']}{error} */"
        )
    lines += [
        f"#define {_PREFIX}_BACKEND_{_constant(name)} {int(one['usable'])}" for name, one in values["backends"].items()
    ]
    lines += [f"#define {_PREFIX}_PAGE_SIZE {values['limits']['page_size']}", "", "#endif"]
    return "\n".join(lines) + "\n"


def nfd(values: Values, _groups: Groups) -> str:
    """Lines for a file in node-feature-discovery's features.d."""
    lines = [f"pagemapcompat.backend={values['backend'] or 'none'}"]
    lines += [f"pagemapcompat.guarantee.{name}=true" for name in values["guarantees"]]
    lines += [f"pagemapcompat.{name}={answer['state']}" for name, answer in values["features"].items()]
    return "\n".join(lines) + "\n"


def prometheus(values: Values, _groups: Groups) -> str:
    """Metrics for node_exporter's textfile collector."""
    lines = _metric("feature", "Whether a feature is in this state.")
    for name, answer in values["features"].items():
        lines += [
            _sample("feature", int(state == answer["state"]), name=name, state=state) for state in sorted(_COLOURS)
        ]
    lines += _metric("backend_usable", "Whether a backend works.")
    lines += [_sample("backend_usable", int(one["usable"]), name=name) for name, one in values["backends"].items()]
    lines += _metric("backend_guarantee", "Whether a backend gives a guarantee for private anonymous memory.")
    for name, one in values["backends"].items():
        lines += [_sample("backend_guarantee", 1, name=name, guarantee=given) for given in one["guarantees"]]
    lines += _metric("page_size_bytes", "The size of a base page.")
    lines.append(_sample("page_size_bytes", values["limits"]["page_size"]))
    return "\n".join(lines) + "\n"


def _metric(name: str, meaning: str) -> list[str]:
    return [f"# HELP pagemapcompat_{name} {meaning}", f"# TYPE pagemapcompat_{name} gauge"]


def _sample(metric: str, value: int, **labels: str) -> str:
    inside = ",".join(f'{label}="{text}"' for label, text in labels.items())
    return f"pagemapcompat_{metric}{f'{{{inside}}}' if inside else ''} {value}"


def ansible(values: Values, _groups: Groups) -> str:
    """A local fact, with names that templates can write without brackets."""
    facts = {
        "backend": values["backend"],
        "guarantees": values["guarantees"],
        "backends": {name.replace("-", "_"): one["usable"] for name, one in values["backends"].items()},
        "features": {name.replace("-", "_"): answer["state"] for name, answer in values["features"].items()},
        "limits": values["limits"],
    }
    return json.dumps(facts) + "\n"


FORMATS: Mapping[str, Callable[[Values, Groups], str]] = {
    "text": text,
    "json": as_json,
    "env": env,
    "macros": macros,
    "nfd": nfd,
    "prometheus": prometheus,
    "ansible": ansible,
}
PID_FORMATS: Mapping[str, Callable[[Values], str]] = {"text": pid_text, "json": as_json}
