"""Builds the C core. Loaded by setuptools, never at run time."""

import re
from pathlib import Path

from cffi import FFI
from setuptools import Extension
from setuptools.command.build_ext import build_ext

NATIVE = Path(__file__).parent / "native"


def declarations() -> str:
    """Everything in pmc.h, and the structs and numbers of uapi.h that Python uses, as cffi reads them."""
    uapi, pmc = ((NATIVE / name).read_text() for name in ("uapi.h", "pmc.h"))
    constants = re.findall(
        r"^#define ((?:PMC|PAGE_IS|PM_WORD|PM_SCAN|UFFD_FEATURE)_\w+) .*\S", uapi + pmc, re.MULTILINE
    )
    structs = [
        re.search(rf"^struct {name} {{.*?^}};", uapi, re.MULTILINE | re.DOTALL)
        for name in ("page_region", "pm_scan_arg")
    ]
    plain = re.sub(r"(?:^#[^\n]*\\\n(?:[^\n]*\\\n)*[^\n]*\n)|(?:^#[^\n]*\n)", "", pmc, flags=re.MULTILINE)
    return "\n".join(
        [
            *(f"#define {name} ..." for name in constants),
            *(match.group() for match in structs if match),
            plain,
        ]
    )


class BuildNative(build_ext):
    """Adds cffi's glue, generated at build time, to the C sources."""

    def build_extension(self, ext: Extension) -> None:
        """Generate the glue where temporary files go, then compile as usual."""
        ffi = FFI()
        ffi.cdef(declarations())
        ffi.set_source(ext.name, '#include "pmc.h"')
        glue = Path(self.build_temp) / "_native.c"
        glue.parent.mkdir(parents=True, exist_ok=True)
        ffi.emit_c_code(str(glue))
        ext.sources = [*ext.sources, str(glue)]
        super().build_extension(ext)
