// pagemapcompat's C core: which pages of this process's memory were written since they were last asked for.
//
// It knows nothing of Python. Every function returns 0 or more, or a negative error: -errno of the call named in
// pmc_result.operation, or one of PMC_E*. Nothing is printed, there is no global state, and nothing aborts. A tracker,
// range or cursor that is NULL counts as closed. Unless its comment says otherwise a function may be called by any
// thread of the process that created the object, and may block on the tracker's mutex while another call runs, never on
// a page fault that needs the caller.
//
// This header is read by the C compiler and, without its preprocessor lines, by cffi.
#ifndef PMC_H
#define PMC_H

#include <stddef.h>
#include <stdint.h>

#include "uapi.h"

// Outside the range of errno values, so that a real EBADF is never mistaken for ours.
#define PMC_ECLOSED 10001 // the tracker, range or cursor was closed
#define PMC_EFORKED 10002 // the tracker belongs to the parent of this process
#define PMC_EFAULTTHREAD 10003 // a fault thread ended; pmc_tracker_fault_errno() says why
#define PMC_EOWNMEMORY 10004 // the range holds the caller's stack or this library's memory

// How to open a userfaultfd.
#define PMC_UFFD_SYSCALL 0
#define PMC_UFFD_DEVICE 1
#define PMC_UFFD_USER_MODE_ONLY 2

// What the kernel can do, as found by trying; bits of pmc_config.abilities.
#define PMC_CAN_ASYNC (1u << 0) // writes to protected pages resolve in the kernel; PAGEMAP_SCAN answers
#define PMC_CAN_SCAN_HOLES (1u << 1) // PAGEMAP_SCAN calls an empty, unmarked page written
#define PMC_CAN_SEE_MARKS (1u << 2) // pagemap bit 57 shows the protection
#define PMC_CAN_MARK_EMPTY (1u << 3) // WP_UNPOPULATED: an empty private page can be protected
#define PMC_CAN_SPAN_VMAS (1u << 4) // UFFDIO_WRITEPROTECT takes a range of several mappings
#define PMC_CAN_TRUST_MARKS (1u << 5) // a page that loses its registration loses its mark
#define PMC_CAN_QUERY_MAPS (1u << 6) // PROCMAP_QUERY
#define PMC_CAN_POPULATE (1u << 7) // MADV_POPULATE_READ
#define PMC_CAN_GUARD (1u << 8) // MADV_GUARD_INSTALL: pages exist that cannot carry a mark
#define PMC_CAN_SEE_GUARDS (1u << 9) // pagemap bit 58 shows them
#define PMC_CAN_TIE (1u << 10) // a fault thread that is tied to a CPU is not kept from it for good

// Kinds of memory; bits of pmc_range_kinds().
#define PMC_KIND_ANON (1u << 0) // private anonymous
#define PMC_KIND_SHARED (1u << 1) // shared, anonymous or tmpfs
#define PMC_KIND_FILE (1u << 2) // private mapping of a file
#define PMC_KIND_HUGETLB (1u << 3)

// The categories that a pagemap word can tell. HUGE and PFNZERO are in none, and FILE is set on the huge zero page,
// where the ioctl says nothing of the kind (seen on 6.18).
#define PMC_TELLABLE (~(PAGE_IS_HUGE | PAGE_IS_PFNZERO) & (PAGE_IS_GUARD * 2 - 1))

#define PMC_ENGAGE (1u << 0) // flag of pmc_scan(): write-protect what is returned
#define PMC_REARM (1u << 1) // of pmc_range_create(): collects and resets register what has lost its registration

// Regions, at most, of an answer whose memory is kept to be used again: 12 KiB, and with PMC_CAN_ASYNC, where a new one
// takes long beside the scan, 96 KiB.
#define PMC_KEEP 512
#define PMC_KEEP_ASYNC (8 * PMC_KEEP)

struct pmc_tracker;
struct pmc_range;
struct pmc_cursor;

struct pmc_config {
	int32_t uffd; // after its handshake; owned by the tracker from then on
	int32_t pagemap; // own /proc/self/pagemap; owned likewise
	uint32_t abilities;
};

// An answer. Zero it before first use; regions ascend, are disjoint, and adjacent equal ones are merged.
struct pmc_result {
	struct pmc_cursor *const *cursor; // whom pmc_*_all() ask; the caller's, and left as it is
	struct page_region *regions; // malloc'ed; pmc_result_release() frees them
	uint64_t count;
	uint64_t capacity;
	uint64_t pages; // in all regions together
	uint64_t walk_end; // where the scan stopped: the next call starts here
	// The memory that an error is about: with -ENOENT the first stretch that is not registered; where
	// UFFDIO_REGISTER failed, what it was asked for; of pmc_capture(), pmc_restore() and pmc_compare() the page
	// that was not copied.
	uint64_t untracked_start;
	uint64_t untracked_end;
	const char *operation; // with -errno: the call that failed; static
};

struct pmc_statistics {
	uint64_t faults; // write faults resolved by fault threads
	uint64_t scans; // peek and collect
	uint64_t resets;
	uint64_t pages; // handed out by collect
	uint64_t ranges;
	uint64_t tracked_bytes;
	uint64_t owed_pages; // to all cursors together
};

// -- Single calls. No state; any process and thread. ------------------------------------------------------

// Opens a userfaultfd, non-blocking and close-on-exec. Returns the descriptor or -errno.
int pmc_uffd_open(int how);
// Asks for *features* and returns what the kernel said it has in *granted*. -EINVAL: one is not supported.
int pmc_uffd_handshake(int uffd, uint64_t features, uint64_t *granted);
// Registers [start, end) for write-protect faults; *ioctls* is the kernel's answer.
int pmc_uffd_register(int uffd, uint64_t start, uint64_t end, uint64_t *ioctls);
int pmc_uffd_unregister(int uffd, uint64_t start, uint64_t end);
// Exactly one ioctl. *mode* is UFFDIO_WRITEPROTECT_MODE_*: 1 protects, 0 un-protects and wakes.
int pmc_uffd_writeprotect(int uffd, uint64_t start, uint64_t end, uint64_t mode);
// munlock(2): 0 or -errno.
int pmc_munlock(uint64_t start, uint64_t end);
// prctl(PR_GET_DUMPABLE): 1 where /proc/self is this process's user's to open, 0 or 2 where it is root's; or -errno.
int pmc_dumpable(void);
// One PAGEMAP_SCAN. Returns the number of regions or -errno.
int pmc_pagemap_scan(int pagemap, struct pm_scan_arg *arg);
// 1 if this descriptor of /proc/PID/maps answers PROCMAP_QUERY, else -errno.
int pmc_maps_query(int maps);
// madvise(2), by number: the C library's headers lack the newer ones.
int pmc_madvise(uint64_t start, uint64_t end, int advice);
// mprotect(2): 0 or -errno.
int pmc_mprotect(uint64_t start, uint64_t end, int protection);
// mremap(2) that moves the pages of private anonymous memory over whatever is at *to*, and leaves the mapping where it
// was.
int pmc_mremap_pages(uint64_t from, uint64_t to, uint64_t length);

// log2 of the size of a page, in bytes.
uint32_t pmc_page_shift(void);

// -- GET on any process -----------------------------------------------------------------------------------

// Answers *arg* (no vector, no WP flag) for [arg->start, arg->end) of the process behind *pagemap*. With *maps* below 0
// by the ioctl; else from pagemap words and the mappings listed by *maps*, where WPALLOWED is told by *registered*,
// *registered_count* sorted ranges. -EOPNOTSUPP: a category that words cannot tell is asked for.
// -ESRCH: the process has ended, or runs another program.
// *drop_empty* leaves out regions with no category to report, before max_pages counts them.
int pmc_query(int pagemap, int maps, const struct pm_scan_arg *arg, const struct page_region *registered,
	      uint64_t registered_count, int drop_empty, struct pmc_result *result);

// -- Trackers ---------------------------------------------------------------------------------------------

// Takes over both descriptors, on failure too, and starts fault threads unless PMC_CAN_ASYNC. *result* says which
// call failed.
int pmc_tracker_create(struct pmc_tracker **ret, const struct pmc_config *config, struct pmc_result *result);
// Unregisters everything, ends the fault threads, closes the descriptors. Waits for running calls. Idempotent. In a
// forked child: only closes the child's copies.
int pmc_tracker_close(struct pmc_tracker *tracker);
// Closes and drops the caller's reference; memory goes with the last range.
void pmc_tracker_destroy(struct pmc_tracker *tracker);
// 0, or the PMC_E* that a call would get now. Never blocks.
int pmc_tracker_state(struct pmc_tracker *tracker);
int pmc_tracker_fault_errno(struct pmc_tracker *tracker);
int pmc_tracker_statistics(struct pmc_tracker *tracker, struct pmc_statistics *ret);

// Registers and protects [start, end), page aligned. Holes are skipped. Nothing is left behind on failure.
int pmc_range_create(struct pmc_range **ret, struct pmc_tracker *tracker, uint64_t start, uint64_t end, uint32_t flags,
		     struct pmc_result *result);
// Unregisters. Idempotent.
int pmc_range_close(struct pmc_range *range);
void pmc_range_destroy(struct pmc_range *range);
// Kinds of memory in it, and the size of its largest page in bytes; a rearm may change both. In a forked child, and of
// no range: 0, like the next.
uint32_t pmc_range_kinds(struct pmc_range *range);
uint64_t pmc_range_granularity(struct pmc_range *range);
// 1 if every page could carry a mark when it was last armed, and none was left bare: only then are reads never taken
// for writes, nor a write for more than its page.
int pmc_range_exact(struct pmc_range *range);

// A reader of the range, which sees what is written from now on, and what was not collected or reset yet. Any number;
// one page of memory and one bit a page each. An operation of one cursor never takes a page from another.
int pmc_cursor_create(struct pmc_cursor **ret, struct pmc_range *range);
// Idempotent; later calls get -PMC_ECLOSED.
int pmc_cursor_close(struct pmc_cursor *cursor);
void pmc_cursor_destroy(struct pmc_cursor *cursor);

// Puts the written pages of [start, end) into *result*, whose memory is used again; what it held is released. At most
// max_pages (0: all). With PMC_ENGAGE protects exactly those. Where memory for more ran out, walk_end < end. On an
// error what was taken is in *result*, and walk_end says up to where. Returns 0, 1 for more regions than are kept, or
// -errno.
int pmc_scan(struct pmc_cursor *cursor, uint64_t start, uint64_t end, uint64_t max_pages, uint32_t flags,
	     struct pmc_result *result);
// Protects [start, end) whatever it held for this cursor.
int pmc_reset(struct pmc_cursor *cursor, uint64_t start, uint64_t end, struct pmc_result *result);
// A scan, one with PMC_ENGAGE, and a reset, of the whole range of *result->cursor, without a limit. One argument, since
// from Python one more takes as long as a tenth of a small scan.
int pmc_peek_all(struct pmc_result *result);
int pmc_collect_all(struct pmc_result *result);
int pmc_reset_all(struct pmc_result *result);
// Un-protects, whole huge pages where there are such; every mapped page counts as written once, for every cursor.
int pmc_unprotect(struct pmc_range *range, uint64_t start, uint64_t end, struct pmc_result *result);
// Registers and protects what has lost its registration; its pages count as written once, for every cursor.
int pmc_rearm(struct pmc_range *range, uint64_t start, uint64_t end, struct pmc_result *result);
// Gives back what a scan with PMC_ENGAGE took for *cursor* and reached nobody: the next scan returns it again. Once.
int pmc_owe(struct pmc_cursor *cursor, const struct pmc_result *result);

// -- Images -----------------------------------------------------------------------------------------------

// What the memory of a range held, page by page. Immutable once shared, by any threads; pages count from 0.

struct pmc_image;

// Of pmc_image_list().
#define PMC_LIST_HELD 1 // pages that are not all zeros
#define PMC_LIST_MISSING 2 // guard pages and holes

// An image of *pages* pages, like *base* (of as many pages) or all zeros. Until somebody else has it, pmc_capture(),
// pmc_image_load() and pmc_image_miss() may change it; where they fail, each page that they were to change is as before
// or as it was to be.
int pmc_image_create(struct pmc_image **ret, const struct pmc_image *base, uint64_t pages);
// Likewise, like *base*, which is the caller's. Where nobody else has that one it is *base* itself, which changes with
// it: so nothing has to be copied to be changed, nor to be freed.
int pmc_image_next(struct pmc_image **ret, struct pmc_image *base);
// The same image, for another owner.
void pmc_image_share(struct pmc_image **ret, struct pmc_image *image);
// Lets go of an owner's image, if there is one in *image*, which is NULL then.
void pmc_image_put(struct pmc_image **image);
// Copies the pages of *regions* from memory, and makes missing whatever of the range is not mapped. What is empty is
// not populated where pagemap can tell. -EIO: the page in result->untracked_* cannot be read.
int pmc_capture(struct pmc_range *range, struct pmc_image *image, const struct page_region *regions, uint64_t count,
		struct pmc_result *result);
// Sets [first, first + count) to *bytes*.
int pmc_image_load(struct pmc_image *image, uint64_t first, uint64_t count, const unsigned char *bytes);
// Makes [first, first + count) missing.
int pmc_image_miss(struct pmc_image *image, uint64_t first, uint64_t count);
// How many pages were copied into it, beside those of what it was made from.
uint64_t pmc_image_copied(const struct pmc_image *image);
// Copies [first, first + count) out; zeros where it holds nothing.
void pmc_image_read(const struct pmc_image *image, uint64_t first, uint64_t count, unsigned char *ret);
// Appends the pages of *categories* (PMC_LIST_*), as addresses from *base* on.
int pmc_image_list(const struct pmc_image *image, uint64_t base, uint64_t categories, struct pmc_result *result);
// Appends the pages whose content differs. Costs what differs in their trees, not their size.
int pmc_image_diff(const struct pmc_image *a, const struct pmc_image *b, uint64_t base, struct pmc_result *result);
// Writes the pages of *regions*, what is missing in *image* excepted. -EFAULT: the page in result->untracked_* cannot
// be written, being unmapped (then none was written), a guard page or somebody else's; those before it were.
int pmc_restore(struct pmc_range *range, const struct pmc_image *image, const struct page_region *regions,
		uint64_t count, struct pmc_result *result);
// Appends the pages of *regions* in which memory is not what *image* holds. -EIO: as for pmc_capture().
int pmc_compare(struct pmc_range *range, const struct pmc_image *image, const struct page_region *regions,
		uint64_t count, struct pmc_result *result);

// -- Results ----------------------------------------------------------------------------------------------

// Frees the regions. The struct is the caller's.
void pmc_result_release(struct pmc_result *result);
// Appends regions that ascend. 0 or -ENOMEM.
int pmc_result_fill(struct pmc_result *result, const struct page_region *regions, uint64_t count);
// Fills an empty result with the pages that are in *a* or *b*. 0 or -ENOMEM.
int pmc_result_unite(struct pmc_result *result, const struct pmc_result *a, const struct pmc_result *b);
// Sets bit i of *bits*, least significant first, for each page i of the *length* bytes from *base* on that is in
// *result*. Returns the number of pages in it. -EINVAL: *size* bytes are too few for all pages there are; nothing was
// set.
int64_t pmc_fill_bitmap(const struct pmc_result *result, uint64_t base, uint64_t length, unsigned char *bits,
			uint64_t size);
// Stores start and end of each of *regions*, as offsets from *base* and at most *length*.
void pmc_fill_spans(const struct page_region *regions, uint64_t count, uint64_t base, uint64_t length, uint64_t *spans);
// Stores the address, plus *shift* modulo 2**64, of every *step* bytes of *regions*.
void pmc_fill_addresses(const struct page_region *regions, uint64_t count, uint64_t shift, uint64_t step,
			uint64_t *addresses);

#endif
