"""The kernel's numbers: the same in Python, in C, and in its documentation; and what is decoded with them."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagemapcompat import EntryFlag, Feature, Guarantee, InvalidArgumentError, PageCategory, PagemapEntry, ScanQuery
from pagemapcompat._kernel import compiled
from pagemapcompat._native import ffi
from pagemapcompat.abi import UffdFeature
from pagemapcompat.probe import BACKEND_NAMES

# Machines are slow and shared, and a failure must come again when it is looked for.
settings.register_profile("plain", deadline=None, database=None, derandomize=True)
PLAIN = settings.get_profile("plain")

WORDS = st.integers(min_value=0, max_value=(1 << 64) - 1)

# As printed in include/uapi/linux/fs.h, Documentation/admin-guide/mm/pagemap.rst and include/uapi/linux/userfaultfd.h.
DOCUMENTED: dict[str, int] = {
    "PAGE_IS_WPALLOWED": 0x1,
    "PAGE_IS_WRITTEN": 0x2,
    "PAGE_IS_FILE": 0x4,
    "PAGE_IS_PRESENT": 0x8,
    "PAGE_IS_SWAPPED": 0x10,
    "PAGE_IS_PFNZERO": 0x20,
    "PAGE_IS_HUGE": 0x40,
    "PAGE_IS_SOFT_DIRTY": 0x80,
    "PAGE_IS_GUARD": 0x100,
    "PM_WORD_SOFT_DIRTY": 0x0080_0000_0000_0000,
    "PM_WORD_EXCLUSIVE": 0x0100_0000_0000_0000,
    "PM_WORD_UFFD_WP": 0x0200_0000_0000_0000,
    "PM_WORD_GUARD": 0x0400_0000_0000_0000,
    "PM_WORD_FILE": 0x2000_0000_0000_0000,
    "PM_WORD_SWAPPED": 0x4000_0000_0000_0000,
    "PM_WORD_PRESENT": 0x8000_0000_0000_0000,
    "UFFD_FEATURE_PAGEFAULT_FLAG_WP": 0x1,
    "UFFD_FEATURE_EVENT_FORK": 0x2,
    "UFFD_FEATURE_EVENT_REMAP": 0x4,
    "UFFD_FEATURE_EVENT_REMOVE": 0x8,
    "UFFD_FEATURE_MISSING_HUGETLBFS": 0x10,
    "UFFD_FEATURE_MISSING_SHMEM": 0x20,
    "UFFD_FEATURE_EVENT_UNMAP": 0x40,
    "UFFD_FEATURE_SIGBUS": 0x80,
    "UFFD_FEATURE_THREAD_ID": 0x100,
    "UFFD_FEATURE_MINOR_HUGETLBFS": 0x200,
    "UFFD_FEATURE_MINOR_SHMEM": 0x400,
    "UFFD_FEATURE_EXACT_ADDRESS": 0x800,
    "UFFD_FEATURE_WP_HUGETLBFS_SHMEM": 0x1000,
    "UFFD_FEATURE_WP_UNPOPULATED": 0x2000,
    "UFFD_FEATURE_POISON": 0x4000,
    "UFFD_FEATURE_WP_ASYNC": 0x8000,
    "UFFD_FEATURE_MOVE": 0x10000,
}
PREFIX = {PageCategory: "PAGE_IS_", EntryFlag: "PM_WORD_", UffdFeature: "UFFD_FEATURE_"}
MEMBERS = [(PREFIX[kind] + member.name, int(member)) for kind in PREFIX for member in kind]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "value"), MEMBERS, ids=[name for name, _ in MEMBERS])
def test_number(name: str, value: int) -> None:
    """Python, the C compiler and the kernel's documentation agree."""
    assert value == compiled(name) == DOCUMENTED[name]


def test_every_documented_number_has_a_name() -> None:
    """Nothing that C knows is missing in Python."""
    assert {name for name, _ in MEMBERS} == set(DOCUMENTED)


@pytest.mark.parametrize(("name", "size"), [("struct pm_scan_arg", 96), ("struct page_region", 24)])
def test_struct_size(name: str, size: int) -> None:
    """The kernel refuses a pm_scan_arg of any other size, and fills page_regions of this one."""
    assert ffi.sizeof(name) == size


def test_names_are_unique() -> None:
    """Aliases would hide a wrong number, and a name in PAGEMAPCOMPAT_DISABLE must mean one thing."""
    for kind in (PageCategory, EntryFlag, UffdFeature, Guarantee, Feature):
        assert len(kind.__members__) == len({member.value for member in kind})
    # "pagemap-scan" is the ioctl and the backend that is nothing without it.
    assert {feature.value for feature in Feature} & set(BACKEND_NAMES) == {"pagemap-scan"}


@settings(PLAIN)
@given(WORDS)
def test_unknown_bits_survive(bits: int) -> None:
    """What a newer kernel says passes through every IntFlag untouched, and through their operators."""
    for kind in PREFIX:
        flags = kind(bits)
        assert int(flags) == bits
        assert type(flags) is kind
        assert int(flags | kind(0)) == bits
        assert [bit for bit in range(64) if kind(1 << bit) in flags] == [bit for bit in range(64) if bits >> bit & 1]


@settings(PLAIN)
@given(WORDS)
@example(0)
@example((1 << 64) - 1)
@example(1 << 63)
@example(1 << 62)
@example(1 << 62 | 63)
@example(1 << 63 | 1 << 62 | 77)
def test_decode(word: int) -> None:
    """As Documentation/admin-guide/mm/pagemap.rst lays it out; no bit is lost, unknown ones included."""
    entry = PagemapEntry.decode(word)
    low = word % (1 << 55)
    assert int(entry.flags) == word - low
    assert type(entry.flags) is EntryFlag
    present, swapped = word >> 63 & 1, word >> 62 & 1
    if present:
        assert entry.pfn == (low or None)  # 0 without CAP_SYS_ADMIN
        assert entry.swap is None
        assert int(entry.flags) | (entry.pfn or 0) == word
    elif swapped:
        assert entry.pfn is None
        assert entry.swap == (low % 32, low // 32)
        kind, offset = entry.swap
        assert int(entry.flags) | kind | offset << 5 == word
    else:
        assert (entry.pfn, entry.swap) == (None, None)


@settings(PLAIN)
@given(WORDS, WORDS)
def test_decoding_is_pure(one: int, other: int) -> None:
    """Equal words make equal entries, and only they, but for the low bits of an empty page."""
    first, second = PagemapEntry.decode(one), PagemapEntry.decode(other)
    assert first == PagemapEntry.decode(one)
    assert hash(first) == hash(PagemapEntry.decode(one))
    if (one | other) >> 62:
        assert (first == second) == (one == other)


# -- The masks of the 2023 proposal ------------------------------------------------------------------------------

MASKS = range(16)
MOVED = (PageCategory.WRITTEN, PageCategory.FILE, PageCategory.PRESENT, PageCategory.SWAPPED)
NEW = [sum(int(category) for bit, category in enumerate(MOVED) if old >> bit & 1) for old in MASKS]
"""The proposal's four bits, as the merged ABI numbers them."""


def proposed(page: int, required: int, anyof: int, excluded: int) -> bool:
    """Whether the proposal selects a page, in its own words."""
    if page & required != required:
        return False
    if page & excluded:
        return False
    return not anyof or bool(page & anyof)


def merged(page: int, query: ScanQuery) -> bool:
    """Whether the merged ioctl selects it (fs/proc/task_mmu.c, pagemap_scan_is_interesting_page)."""
    seen = page ^ int(query.inverted)
    all_of, any_of = int(query.all_of), int(query.any_of)
    return not query.never and seen & all_of == all_of and (not any_of or bool(seen & any_of))


def test_from_proposal_selects_the_same_pages() -> None:
    """For all 4,096 masks and every state that a page can be in; other categories of the page change nothing."""
    others = sum(PageCategory) & ~NEW[15]
    for required, anyof, excluded in product(MASKS, MASKS, MASKS):
        query = ScanQuery.from_proposal(required, anyof, excluded, 15)
        selected = [proposed(page, required, anyof, excluded) for page in MASKS]
        assert [merged(NEW[page], query) for page in MASKS] == selected, (required, anyof, excluded)
        assert [merged(NEW[page] | others, query) for page in MASKS] == selected, (required, anyof, excluded)
        assert query.never == (True not in selected)


def test_from_proposal_reports_the_same_categories() -> None:
    """In the merged numbering; pages with nothing to report are left out, whatever selects them."""
    for returned, (required, anyof, excluded) in product(MASKS, [(0, 0, 0), (1, 0, 0), (0, 3, 1), (5, 8, 2)]):
        query = ScanQuery.from_proposal(required, anyof, excluded, returned)
        assert int(query.report) == NEW[returned]
        assert query.drop_empty
        same = ScanQuery.from_proposal(required, anyof, excluded, 15)
        assert (query.all_of, query.any_of, query.inverted) == (same.all_of, same.any_of, same.inverted)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("value", [16, -1, 1 << 40])
def test_from_proposal_refuses_bits_it_never_had(position: int, value: int) -> None:
    """The error names the mask and the bits."""
    masks = [0, 0, 0, 0]
    masks[position] = value
    with pytest.raises(InvalidArgumentError) as caught:
        ScanQuery.from_proposal(*masks)
    assert ("required", "anyof", "excluded", "returned")[position] in str(caught.value)
    assert f"{value:#x}" in str(caught.value)
    assert caught.value.hint is not None


def test_plain_queries_have_none_of_the_extras() -> None:
    """And the extras cannot be asked for, or changed."""
    query = ScanQuery(all_of=PageCategory.WRITTEN)
    assert (query.never, query.drop_empty) == (False, False)
    with pytest.raises(TypeError):
        ScanQuery(never=True)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        query.drop_empty = True  # type: ignore[misc]
