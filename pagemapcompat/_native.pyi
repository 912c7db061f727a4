# The compiled core. Only _kernel.py imports it, and types what it uses.
from typing import Any

from cffi import FFI

ffi: FFI
lib: Any
