"""The trials: each finds out one feature by doing it, in throw-away memory, never by version.

None of them makes a signal or a child, touches a tracker, or leaves a descriptor, a mapping or a thread behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagemapcompat.abi import Feature
from pagemapcompat.trials_kinds import KIND_TRIALS
from pagemapcompat.trials_pagemap import PAGEMAP_TRIALS, open_pagemap
from pagemapcompat.trials_uffd import UFFD_TRIALS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pagemapcompat.laboratory import Trial

TRIALS: Mapping[Feature, Trial] = {Feature.PAGEMAP: open_pagemap, **UFFD_TRIALS, **KIND_TRIALS, **PAGEMAP_TRIALS}
"""In an order in which each comes after what it builds on."""
