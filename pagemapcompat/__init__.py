"""Which pages of this memory were written since I last asked? On every Linux kernel from 5.10 on.

>>> import mmap
>>> from pagemapcompat import DirtyTracker, page_size
>>> memory = mmap.mmap(-1, 16 * page_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
>>> with DirtyTracker() as tracker, tracker.track(memory) as ram:
...     memory[5 * page_size()] = 1
...     list(ram.collect().page_indices())
...     list(ram.collect().page_indices())
[5]
[]
"""

from pagemapcompat.abi import EntryFlag as EntryFlag
from pagemapcompat.abi import Feature as Feature
from pagemapcompat.abi import Guarantee as Guarantee
from pagemapcompat.abi import PageCategory as PageCategory
from pagemapcompat.backends import BackendStatistics as BackendStatistics
from pagemapcompat.cursors import Cursor as Cursor
from pagemapcompat.errors import AccessError as AccessError
from pagemapcompat.errors import AlignmentError as AlignmentError
from pagemapcompat.errors import AlreadyRegisteredError as AlreadyRegisteredError
from pagemapcompat.errors import ClosedError as ClosedError
from pagemapcompat.errors import ConcurrentWriteError as ConcurrentWriteError
from pagemapcompat.errors import DisagreementError as DisagreementError
from pagemapcompat.errors import FaultThreadError as FaultThreadError
from pagemapcompat.errors import InvalidArgumentError as InvalidArgumentError
from pagemapcompat.errors import KernelError as KernelError
from pagemapcompat.errors import MissingPackageError as MissingPackageError
from pagemapcompat.errors import NotTrackableError as NotTrackableError
from pagemapcompat.errors import NotTrackedError as NotTrackedError
from pagemapcompat.errors import PagemapCompatError as PagemapCompatError
from pagemapcompat.errors import RestoreError as RestoreError
from pagemapcompat.errors import SnapshotFileError as SnapshotFileError
from pagemapcompat.errors import TargetGoneError as TargetGoneError
from pagemapcompat.errors import UnsupportedError as UnsupportedError
from pagemapcompat.limits import Limits as Limits
from pagemapcompat.memory import AddressRange as AddressRange
from pagemapcompat.memory import page_size as page_size
from pagemapcompat.pagemap import Pagemap as Pagemap
from pagemapcompat.pagemap import PagemapEntry as PagemapEntry
from pagemapcompat.pagemap import ScanQuery as ScanQuery
from pagemapcompat.probe import FeatureReport as FeatureReport
from pagemapcompat.probe import ProbeResult as ProbeResult
from pagemapcompat.probe import probe as probe
from pagemapcompat.results import PageRegion as PageRegion
from pagemapcompat.results import ScanResult as ScanResult
from pagemapcompat.selection import Selection as Selection
from pagemapcompat.snapshots import Snapshot as Snapshot
from pagemapcompat.tracker import DirtyTracker as DirtyTracker
from pagemapcompat.tracker import TrackedRange as TrackedRange

__all__ = [
    "AccessError",
    "AddressRange",
    "AlignmentError",
    "AlreadyRegisteredError",
    "BackendStatistics",
    "ClosedError",
    "ConcurrentWriteError",
    "Cursor",
    "DirtyTracker",
    "DisagreementError",
    "EntryFlag",
    "FaultThreadError",
    "Feature",
    "FeatureReport",
    "Guarantee",
    "InvalidArgumentError",
    "KernelError",
    "Limits",
    "MissingPackageError",
    "NotTrackableError",
    "NotTrackedError",
    "PageCategory",
    "PageRegion",
    "Pagemap",
    "PagemapCompatError",
    "PagemapEntry",
    "ProbeResult",
    "RestoreError",
    "ScanQuery",
    "ScanResult",
    "Selection",
    "Snapshot",
    "SnapshotFileError",
    "TargetGoneError",
    "TrackedRange",
    "UnsupportedError",
    "page_size",
    "probe",
]
