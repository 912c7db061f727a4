// What the C files share. Layers, each using only those before it: output, image, files, vmas, uffd, lock, follow,
// fault, owed, then the engines (words, scan), then tracker, range, cursor, operations and copy; and query, for which
// there need be no tracker. Two calls point up: words asks pmc_next_untracked(), since huge pages are its own under the
// other engine too; and a tracker closes its ranges by pmc_range_close_locked().
#ifndef PMC_INTERNAL_H
#define PMC_INTERNAL_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "pmc.h"

#define PMC_REGIONS 512 // that PAGEMAP_SCAN finds at a time: its bounce buffer on x86-64
#define PMC_VECTOR (8 * PMC_REGIONS) // regions of one call of an engine: a call for each 512 takes 0.4 us more
#define PMC_CPUS 8192 // at most; with more the fault thread stays where it is
#define PMC_NO_CPU UINT32_MAX
#define PMC_FAULT_THREADS 2 // of a tracker, at most
#define PMC_MESSAGES 16 // that a fault thread reads at a time
#define PMC_ANSWERS (PMC_FAULT_THREADS * PMC_MESSAGES) // that the fault threads remember
#define PMC_LOOKS 64 // how often mappings that others change meanwhile are looked at
#define PMC_WORDS ((32 << 10) / sizeof(uint64_t)) // 32 KiB of pagemap words: from 16 on reading gets no faster

static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

static inline uint64_t align_down(uint64_t value, uint64_t unit)
{
	return value & ~(unit - 1);
}

static inline uint64_t align_up(uint64_t value, uint64_t unit)
{
	return align_down(value + unit - 1, unit);
}

// Zeroed pages of our own, so that no lock or buffer of the library lies in tracked memory. NULL: out of memory.
void *pmc_pages_alloc(size_t size);
void pmc_pages_free(void *pages, size_t size);

// -- output.c: regions, bit arrays ------------------------------------------------------------------------

// Where an engine puts its regions: as many as the vector and max_pages admit, neighbours merged.
struct output {
	struct page_region *vec;
	uint64_t capacity;
	uint64_t count;
	uint64_t pages;
	uint64_t max_pages;
	uint32_t page_shift;
};

// Adds [start, end), whose pages come in units of *unit* bytes, and returns the end of what fitted.
uint64_t pmc_output_add(struct output *out, uint64_t start, uint64_t end, uint64_t categories, uint64_t unit);
// How many regions a call that returned *rc* stored in *vec*, of *len*: *rc*, or where it failed those with an end.
// Before the call none has one.
uint64_t pmc_stored(const struct page_region *vec, uint64_t len, int rc);
// Takes back whatever lies at or after *end*.
void pmc_output_cut(struct output *out, uint64_t end);

// Empties it, to be filled again; *cursor* stays.
void pmc_result_empty(struct pmc_result *result);
// Gives back room that nothing is in.
void pmc_result_trim(struct pmc_result *result);
// Makes room for *more* regions. 0 or -ENOMEM.
int pmc_result_reserve(struct pmc_result *result, uint64_t more);
// Appends to a result that has room.
void pmc_result_append(struct pmc_result *result, uint64_t start, uint64_t end, uint64_t categories,
		       uint32_t page_shift);

// Likewise *count* regions, of which no two are one. Their ends are zero then.
void pmc_result_move_in(struct pmc_result *result, struct page_region *regions, uint64_t count, uint32_t page_shift);

// Puts the union of two ascending lists, as far as *stop*, into *vec*, a third one that has room for both, as WRITTEN.
// Returns its length.
uint64_t pmc_unite(struct page_region *vec, const struct page_region *a, uint64_t a_count, const struct page_region *b,
		   uint64_t b_count, uint64_t stop);

// One bit a page. The arrays are as long as their range; callers stay inside.
static inline bool bit_test(const uint64_t *bits, uint64_t index)
{
	return bits[index / 64] >> (index % 64) & 1;
}

static inline void bit_set(uint64_t *bits, uint64_t index)
{
	bits[index / 64] |= 1ull << (index % 64);
}

static inline void bit_clear(uint64_t *bits, uint64_t index)
{
	bits[index / 64] &= ~(1ull << (index % 64));
}

// Set or clear [from, to), and return how many bits changed.
uint64_t pmc_bits_fill(uint64_t *bits, uint64_t from, uint64_t to, bool value);
// The first index in [from, to) whose bit is *value*, else *to*.
uint64_t pmc_bits_find(const uint64_t *bits, uint64_t from, uint64_t to, bool value);

// -- image.c: what memory held ------------------------------------------------------------------------------

enum pmc_content { PMC_ZERO, PMC_HELD, PMC_MISSING };

bool pmc_is_zero(const unsigned char *bytes, uint32_t page_shift);
// What an image has at a page; *bytes* where it holds any.
enum pmc_content pmc_image_at(const struct pmc_image *image, uint64_t page, const unsigned char **bytes);
// The first page of [from, to) that is not missing, else to.
uint64_t pmc_image_first_there(const struct pmc_image *image, uint64_t from, uint64_t to);
// Makes [from, to) zero or missing.
int pmc_image_clear(struct pmc_image *image, uint64_t from, uint64_t to, enum pmc_content content);

// -- files.c ------------------------------------------------------------------------------------------------

// Which file a descriptor is of. On 5.10 all userfaultfds are one; on 6.1 each is its own (seen on both).
struct file_id {
	uint64_t device;
	uint64_t inode; // or 0: not known
};

int pmc_file_id(int fd, struct file_id *ret);
bool pmc_is_file(int fd, struct file_id id);
// Closes *fd*, which is -1 then, unless another file has its number.
void pmc_close_file(int *fd, struct file_id id);

// -- vmas.c: the mappings of a process, in ascending order --------------------------------------------------

struct vma {
	uint64_t start;
	uint64_t end;
	uint32_t kind; // one PMC_KIND_*
	uint32_t page_shift;
	int protection; // PROT_*
};

// A reading position in /proc/PID/maps, or in smaps, which is slow but knows the page size of hugetlb mappings.
struct vmas {
	int fd;
	struct file_id file;
	bool query; // by PROCMAP_QUERY: nothing below is used, and an answer is never stale
	bool sizes; // fd is smaps
	const char *operation; // that failed, when pmc_own_vma_at() did
	bool ahead_valid;
	bool ended;
	uint32_t page_shift;
	uint64_t floor; // the end of the mapping before *ahead*
	struct vma ahead;
	size_t have;
	size_t used;
	char text[16384];
};

int pmc_vmas_open(struct vmas *vmas, bool query, bool sizes);
void pmc_vmas_close(struct vmas *vmas);
// Forgets what was read ahead; the next look-up sees the mappings as they are then.
void pmc_vmas_refresh(struct vmas *vmas);
// The mapping that holds *address*, or the first after it. 1: found, 0: there is none, or -errno.
int pmc_vmas_at(struct vmas *vmas, uint64_t address, struct vma *ret);
// Likewise of this process, where *address* is a page's. What it calls unmapped is: Linux reads mappings without their
// lock since 6.17, and beside mprotect(2) leaves some out now and then (seen in the text, on 6.18.44); mincore(2) takes
// the lock.
int pmc_own_vma_at(struct vmas *vmas, uint64_t address, struct vma *ret);
// Between two looks, of which PMC_LOOKS are taken, at mappings that another thread changes. Two threads that hand the
// kernel's lock of the mappings to each other can keep in step, so that each look finds what the one before it did;
// after a few of those it sleeps.
void pmc_look_again(struct vmas *vmas, unsigned looks);

// -- The tracker's state ------------------------------------------------------------------------------------

// A lock that is handed over in the order of arrival, so that a tight collect loop cannot starve a fault thread.
struct fair_lock {
	atomic_uint next;
	atomic_uint serving;
};

// Consecutive memory of one kind, from the end of the piece before it. Holes belong to either neighbour.
struct piece {
	uint64_t end;
	uint32_t kind;
	uint32_t page_shift;
};

struct pmc_range {
	struct pmc_tracker *tracker;
	atomic_int references; // its owner's, and one for each cursor
	struct pmc_range *next; // in tracker->ranges; under fault_lock
	struct pmc_cursor *cursors; // under the tracker's mutex
	uint64_t start;
	uint64_t end;
	bool open;
	bool exact;
	bool rearm; // PMC_REARM
	uint32_t piece_count;
	uint32_t piece_capacity;
	struct piece *pieces;
	size_t bits_size; // of each array below, which one mapping holds, and of a cursor's
	uint64_t *quiet; // could carry no mark when last protected (empty, or a guard page), and was reported as such
	bool quiet_used;
	uint64_t *log; // written, by the fault threads; under fault_lock; NULL where pagemap shows marks
	size_t bare_size;
	uint64_t *bare; // blocks of scan.c with nothing in them, and no mark; NULL where there are none
};

// A reader of a range. Whoever takes pages from the engine owes them to all other cursors, so that each sees every
// write.
struct pmc_cursor {
	struct pmc_range *range;
	struct pmc_cursor *next; // in range->cursors
	uint64_t *owed; // taken and protected, and this one does not have it yet; NULL once closed
	uint64_t owed_count;
	uint64_t last_count; // regions of its last answer
};

struct stretch {
	uint64_t start;
	uint64_t end;
};

struct cpus {
	uint64_t bits[PMC_CPUS / 64];
};

struct fault_thread {
	struct pmc_tracker *tracker;
	pthread_t thread;
	void *stack;
	size_t stack_size;
	uint32_t cpu; // that it is tied to from first to last, or PMC_NO_CPU
	uint32_t id; // of the thread, or 0: it is not tied; under fault_lock
	struct stretch opening; // the page that it un-protects at this moment; under answers_lock
	bool again; // to be woken when it has, whoever waits there; under answers_lock
};

// How the fault thread follows its writer, where there is one alone: see follow.c.
struct follower {
	atomic_uint wanted; // the thread whose file is to be opened, or 0
	uint32_t known; // whose was; under fault_lock
	int stat; // that file, or -1; under fault_lock
	struct file_id stat_file;
	// The rest is the fault thread's own.
	uint32_t thread; // the last writer, or 0
	uint32_t faults; // since the last look
	uint32_t wait; // so many until the next one
	uint32_t moves; // that the last looks found in a row
	uint32_t cpu; // that it is tied to
	struct cpus given; // those that it may use
};

struct pmc_tracker {
	atomic_int references;
	int uffd;
	int pagemap;
	struct file_id uffd_file;
	struct file_id pagemap_file;
	volatile char *bells; // pages, each of whose faults tells a fault thread to end
	uint32_t abilities;
	uint32_t page_shift;
	bool closed;
	pthread_mutex_t mutex; // one call at a time
	const char *operation; // the system call that failed last; under mutex
	void *unreadable; // a page that nobody may read
	atomic_uint *alive; // 1; a page that the kernel zeroes in a forked child (MADV_WIPEONFORK)

	struct fair_lock fault_lock; // between the fault threads and whoever needs pages to stay protected
	struct pmc_range *ranges; // under fault_lock
	struct fault_thread fault_threads[PMC_FAULT_THREADS];
	unsigned fault_thread_count; // that were started, and not stopped
	unsigned fault_threads_serving; // that read messages; under fault_lock
	atomic_uint fault_threads_left; // that touch memory of ours: those, and who is about to end
	bool untied; // none is to be tied any more; under fault_lock
	atomic_int fault_errno; // not 0: a fault thread has ended, and nothing is registered any more
	atomic_ullong faults;
	struct fair_lock answers_lock; // between fault threads and who closes a range; held over no system call
	atomic_ullong answered; // how often; grows under answers_lock
	struct stretch answers[PMC_ANSWERS]; // where, the last ones; under answers_lock
	struct follower follower;

	uint64_t scans;
	uint64_t resets;
	uint64_t pages;
	void *copier; // of copy.c, once there was anything to copy
	size_t copier_size;
	// What precedes, and the first regions, lie in one page: a scan that protected something finds the TLB flushed.
	struct page_region regions[PMC_VECTOR]; // whose ends are zero between calls
	struct page_region halves[2][PMC_REGIONS / 2]; // likewise
	uint64_t words[PMC_WORDS];
	struct vmas vmas;
	struct vmas thread_vmas; // the fault threads' own; under fault_lock
};

static inline uint64_t page_size_of(const struct pmc_tracker *tracker)
{
	return 1ull << tracker->page_shift;
}

// What one page table of the lowest level maps, which is a huge page (PMD_SIZE).
static inline uint64_t huge_size_of(const struct pmc_tracker *tracker)
{
	return page_size_of(tracker) * (page_size_of(tracker) / sizeof(uint64_t));
}

static inline uint64_t page_index(const struct pmc_range *range, uint64_t address)
{
	return (address - range->start) >> range->tracker->page_shift;
}

static inline bool pmc_is_async(const struct pmc_tracker *tracker)
{
	return tracker->abilities & PMC_CAN_ASYNC;
}

// Whether pagemap does not show marks, so that the fault threads log what was written.
static inline bool pmc_logs(const struct pmc_tracker *tracker)
{
	return !(tracker->abilities & PMC_CAN_SEE_MARKS);
}

static inline const struct piece *pmc_piece_at(const struct pmc_range *range, uint64_t address)
{
	const struct piece *piece = range->pieces;
	while (piece->end <= address)
		piece++;
	return piece;
}

// pmc_own_vma_at() from the tracker's own reading position; under the mutex. A failure is the call's.
int pmc_find_vma(struct pmc_tracker *tracker, uint64_t address, struct vma *ret);

// -- uffd.c -------------------------------------------------------------------------------------------------

int pmc_uffd_wake(int uffd, uint64_t start, uint64_t end);
// Whether the page at *address*, *size* bytes, has a userfaultfd: 1, 0 or -errno. Changes nothing, whatever the page
// holds.
int pmc_uffd_is_registered(const struct pmc_tracker *tracker, uint64_t address, uint64_t size);
// Protects (or un-protects) every mapping in [start, end), which lies in one piece of pages of 1 << unit_shift bytes,
// holes skipped. -ENOENT: *untracked is the first address that is mapped and not registered; everything before it is
// done.
int pmc_protect(struct pmc_tracker *tracker, uint64_t start, uint64_t end, uint32_t unit_shift, int protect,
		uint64_t *untracked);
// Unregisters what is in [start, end), whatever else has been mapped there since, and wakes its waiters.
int pmc_unregister_all(struct pmc_tracker *tracker, struct vmas *vmas, uint64_t start, uint64_t end);

// -- lock.c -------------------------------------------------------------------------------------------------

void pmc_fair_lock(struct fair_lock *lock);
void pmc_fair_unlock(struct fair_lock *lock);
// Takes fault_lock. While it is held no signal handler may run on this thread: it could store into tracked memory.
void pmc_hold_fault_threads(struct pmc_tracker *tracker, sigset_t *before);
void pmc_release_fault_threads(struct pmc_tracker *tracker, const sigset_t *before);

// -- follow.c -----------------------------------------------------------------------------------------------

// Decides where fault threads are to run, before any is started. Returns how many there are to be.
unsigned pmc_place(struct pmc_tracker *tracker);
// Before one is started that is alone.
void pmc_follower_start(struct follower *follower);
// Ties the calling fault thread to its CPU, if it has one.
void pmc_settle(struct fault_thread *self);
// Lets those that have one run wherever they may; under fault_lock.
void pmc_untie(struct pmc_tracker *tracker);
// Closes what was opened to follow the writer.
void pmc_follower_close(struct follower *follower);
// Opens what the fault thread has to read to follow its writer, if it has asked. Under the mutex; not in the fault
// thread.
void pmc_find_writer(struct pmc_tracker *tracker);
// After the faults of *thread*, or 0 for several. In the fault thread, where there is one alone.
void pmc_follow(struct pmc_tracker *tracker, uint32_t thread);

// -- fault.c ------------------------------------------------------------------------------------------------

int pmc_fault_threads_start(struct pmc_tracker *tracker);
void pmc_fault_threads_stop(struct pmc_tracker *tracker);
// Says that somebody else has opened [start, end), or woken whoever waited there, for a message of theirs that was read
// may not be answered yet. From then on no page of it is opened that was to be before.
void pmc_answer(struct pmc_tracker *tracker, uint64_t start, uint64_t end);

// -- owed.c; all under the tracker's mutex ----------------------------------------------------------------------

// Owes the pages [start, end) to one cursor, or settles the debt.
void pmc_cursor_owe(struct pmc_cursor *cursor, uint64_t start, uint64_t end);
void pmc_cursor_settle(struct pmc_cursor *cursor, uint64_t start, uint64_t end);
// Owes [start, end) to every cursor of the range but *except*.
void pmc_owe_others(struct pmc_range *range, uint64_t start, uint64_t end, const struct pmc_cursor *except);

// -- The engines --------------------------------------------------------------------------------------------

// Each answers pm_scan_arg as PAGEMAP_SCAN would, for one piece of a range, always asked for PAGE_IS_WRITTEN alone, and
// owes what it took and cannot put there. Their walk_end is right on every return: all before it is answered, and with
// PM_SCAN_WP_MATCHING protected. -ENOENT: the memory at walk_end is mapped and not registered.
int pmc_words_scan(struct pmc_range *range, const struct piece *piece, struct pm_scan_arg *arg);
int pmc_words_reset(struct pmc_range *range, const struct piece *piece, uint64_t start, uint64_t end,
		    uint64_t *walk_end);
// The first stretch of [start, end) that is mapped and not registered. 1: found, 0: none, or -errno.
int pmc_next_untracked(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t *from, uint64_t *to);
int pmc_words_next_untracked(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t *from, uint64_t *to);
// Reads *count* pagemap words, one per 1 << unit_shift bytes. 0 or -errno; -ESRCH where the process is gone.
int pmc_words_read(int pagemap, uint64_t start, uint64_t count, uint32_t unit_shift, uint32_t page_shift,
		   uint64_t *words);
// Likewise of this process; a failure is the call's. -EBADF: the tracker's descriptor is another file's.
int pmc_own_words_read(struct pmc_tracker *tracker, uint64_t start, uint64_t count, uint32_t unit_shift,
		       uint64_t *words);

// Its vector is tracker->regions.
int pmc_kernel_scan(struct pmc_range *range, const struct piece *piece, struct pm_scan_arg *arg);
// Bytes of range->bare, one bit a block; 0 where blocks do not pay, or cannot be told from others.
size_t pmc_kernel_bare_size(const struct pmc_range *range);
// Takes all blocks for bare that lie in barred private memory of the range as a whole. Once, before its first reset. 0
// or -errno.
int pmc_kernel_bare_all(struct pmc_range *range);
// Arms all blocks, for good. 0 or -errno.
int pmc_kernel_arm_all(struct pmc_range *range);
int pmc_kernel_reset(struct pmc_range *range, const struct piece *piece, uint64_t start, uint64_t end,
		     uint64_t *walk_end);
int pmc_kernel_next_untracked(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t *from, uint64_t *to);

// -- tracker.c ------------------------------------------------------------------------------------------------

// Begins a call: 0 with the mutex held, or the reason why there is none.
int pmc_enter(struct pmc_tracker *tracker);
// Likewise for one that never takes fault_lock: it may fault, and so is never refused for what is tracked.
int pmc_enter_briefly(struct pmc_tracker *tracker);
// Whether [start, end) has a page that this thread may store into during a call: of its stack, or of what the C library
// keeps for it.
bool pmc_is_callers(uint64_t start, uint64_t end);
// Stores into what the rest of a call stores into, so that it does not fault later, holding what a fault thread needs.
// For calls that are not refused, under the mutex, when nobody protects memory.
void pmc_touch_callers(void);
// Ends it, and returns *rc*.
int pmc_leave(struct pmc_tracker *tracker, int rc, struct pmc_result *result);
// Drops a reference; the last one frees.
void pmc_tracker_put(struct pmc_tracker *tracker);

// -- range.c; all under the tracker's mutex ---------------------------------------------------------------------

// pmc_pages_alloc() outside of all that is tracked, and of [start, end), which is about to be. The kernel may put a
// mapping into a hole of tracked memory, where a rearm would protect it: then nobody could answer a fault of who holds
// fault_lock.
void *pmc_own_pages(struct pmc_tracker *tracker, uint64_t start, uint64_t end, size_t size);
int pmc_engine_scan(struct pmc_range *range, const struct piece *piece, struct pm_scan_arg *arg);
// Protects [start, end), whatever its pieces. *walk_end: done up to there.
int pmc_reset_stretch(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t *walk_end);
// Registers [start, end), and finds out what kinds of memory there are. -EINVAL: nothing, or nothing that can be
// registered.
int pmc_register_stretch(struct pmc_range *range, uint64_t start, uint64_t end);
int pmc_range_close_locked(struct pmc_range *range);
// Drops a reference; the last one frees.
void pmc_range_put(struct pmc_range *range);

// -- operations.c -------------------------------------------------------------------------------------------------

// pmc_enter() for a range that must be open.
int pmc_enter_range(struct pmc_range *range);

// -- cursor.c; all under the tracker's mutex --------------------------------------------------------------------

// Owes what is mapped of [start, end) to every cursor of the range. 0, or -errno where nobody can tell: then all of it.
int pmc_owe_mapped(struct pmc_range *range, uint64_t start, uint64_t end);

#endif
