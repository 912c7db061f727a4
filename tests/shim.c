// Makes the calls of the C core fail. Loaded by test_injection.py into a child of its own.
//
// The functions that one shared library imports are replaced in its relocation table, so that calls of it, and nobody else's, pass
// through here, tail calls too; what is tested is the library as it was built.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "uapi.h"

// Every argument of every function here is an integer or a pointer, and none has more than seven. Called so, each takes what it knows.
typedef long (*function)(long, ...);
#define ARGUMENTS long a, long b, long c, long d, long e, long f, long g
#define THEM (long[]){ a, b, c, d, e, f, g }

#define SYMBOLS(X) \
	X(calloc) X(close) X(fcntl) X(free) X(fstat) X(ioctl) X(lseek) X(madvise) X(malloc) X(mincore) X(mmap) X(mprotect) X(mremap) \
	X(munlock) X(munmap) X(open) X(prctl) X(pread) X(process_vm_readv) X(pthread_attr_init) \
	X(pthread_attr_setstack) X(pthread_create) X(pthread_setname_np) X(pwrite) X(read) X(realloc) \
	X(sched_getaffinity) X(sched_setaffinity) X(syscall) X(sysinfo)

#define NUMBER_OF(symbol) SYMBOL_##symbol,
enum symbol { SYMBOLS(NUMBER_OF) SYMBOL_COUNT };

enum failure { MINUS_ONE, NULL_POINTER, NUMBER }; // what it returns: -1 and errno, NULL and errno, or the errno

// What can fail: functions, and those with a request among their arguments once for each request.
struct entry {
	const char *name;
	enum symbol symbol;
	enum failure failure;
	int request_at; // its position, where there is one
	unsigned long request;
	atomic_uint calls[2]; // by the caller's threads, and by the core's own
};

#define PLAIN(symbol, failure) { #symbol, SYMBOL_##symbol, failure, -1, 0, { 0 } }
#define BY_REQUEST(symbol, at, request) { #request, SYMBOL_##symbol, MINUS_ONE, at, request, { 0 } }

static struct entry entries[] = {
	BY_REQUEST(ioctl, 1, UFFDIO_API),
	BY_REQUEST(ioctl, 1, UFFDIO_REGISTER),
	BY_REQUEST(ioctl, 1, UFFDIO_UNREGISTER),
	BY_REQUEST(ioctl, 1, UFFDIO_WAKE),
	BY_REQUEST(ioctl, 1, UFFDIO_COPY),
	BY_REQUEST(ioctl, 1, UFFDIO_WRITEPROTECT),
	BY_REQUEST(ioctl, 1, USERFAULTFD_IOC_NEW),
	BY_REQUEST(ioctl, 1, PAGEMAP_SCAN),
	BY_REQUEST(ioctl, 1, PROCMAP_QUERY),
	BY_REQUEST(fcntl, 1, F_GETFL),
	BY_REQUEST(fcntl, 1, F_SETFL),
	BY_REQUEST(prctl, 0, PR_GET_DUMPABLE),
	BY_REQUEST(syscall, 0, SYS_gettid),
	BY_REQUEST(syscall, 0, SYS_process_vm_readv),
	BY_REQUEST(syscall, 0, SYS_process_vm_writev),
	BY_REQUEST(syscall, 0, SYS_sched_getscheduler),
	BY_REQUEST(syscall, 0, SYS_sched_setscheduler),
	BY_REQUEST(syscall, 0, SYS_userfaultfd),
	BY_REQUEST(syscall, 2, FUTEX_WAIT_BITSET_PRIVATE),
	BY_REQUEST(syscall, 2, FUTEX_WAIT_PRIVATE),
	BY_REQUEST(syscall, 2, FUTEX_WAKE_PRIVATE),
	PLAIN(calloc, NULL_POINTER),
	PLAIN(close, MINUS_ONE),
	PLAIN(fstat, MINUS_ONE),
	PLAIN(lseek, MINUS_ONE),
	PLAIN(madvise, MINUS_ONE),
	PLAIN(malloc, NULL_POINTER),
	PLAIN(mincore, MINUS_ONE),
	PLAIN(mmap, MINUS_ONE), // MAP_FAILED
	PLAIN(mprotect, MINUS_ONE),
	PLAIN(mremap, MINUS_ONE),
	PLAIN(munlock, MINUS_ONE),
	PLAIN(munmap, MINUS_ONE),
	PLAIN(open, MINUS_ONE),
	PLAIN(pread, MINUS_ONE),
	PLAIN(process_vm_readv, MINUS_ONE),
	PLAIN(pthread_attr_init, NUMBER),
	PLAIN(pthread_attr_setstack, NUMBER),
	PLAIN(pthread_create, NUMBER),
	PLAIN(pthread_setname_np, NUMBER),
	PLAIN(pwrite, MINUS_ONE),
	PLAIN(read, MINUS_ONE),
	PLAIN(realloc, NULL_POINTER),
	PLAIN(sched_getaffinity, MINUS_ONE),
	PLAIN(sched_setaffinity, MINUS_ONE),
	PLAIN(sysinfo, MINUS_ONE),
};
#define ENTRIES (sizeof(entries) / sizeof(*entries))

enum how { INSTEAD, AFTERWARDS, HALFWAY, SHORT, UNDONE };

static struct {
	_Atomic(struct entry *) entry; // NULL: nothing fails
	bool own; // in a thread of the core's
	unsigned nth;
	bool always; // and every later one
	int error;
	enum how how;
	atomic_uint struck;
} plan;

// A static model: the first access must not allocate, in a thread on whose path nothing may.
static __thread bool own_thread __attribute__((tls_model("initial-exec")));
static atomic_long mapped, allocated;

static function real[SYMBOL_COUNT];

static struct entry *entry_of(enum symbol symbol, const long *arguments)
{
	for (size_t i = 0; i < ENTRIES; i++)
		if (entries[i].symbol == symbol &&
		    (entries[i].request_at < 0 || entries[i].request == (unsigned long)arguments[entries[i].request_at]))
			return &entries[i];
	abort(); // a request that is not in the table
}

static bool strikes(struct entry *entry)
{
	unsigned nth = atomic_fetch_add(&entry->calls[own_thread], 1) + 1;
	if (atomic_load(&plan.entry) != entry || own_thread != plan.own || (plan.always ? nth < plan.nth : nth != plan.nth))
		return false;
	atomic_fetch_add(&plan.struck, 1);
	return true;
}

static long fail(const struct entry *entry)
{
	if (entry->failure == NUMBER)
		return plan.error;
	errno = plan.error;
	return entry->failure == NULL_POINTER ? 0 : -1;
}

static long run(enum symbol symbol, const long *a)
{
	return real[symbol](a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
}

// As a kernel does that gives up in the middle.
static void run_half(const struct entry *entry, const long *a)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	if (entry->request == PAGEMAP_SCAN) {
		struct pm_scan_arg *arg = (struct pm_scan_arg *)a[2];
		uint64_t end = arg->end;
		arg->end = arg->start + ((end - arg->start) / 2 & -page);
		run(entry->symbol, a);
		arg->end = end;
	} else if (entry->request == UFFDIO_WRITEPROTECT) {
		struct uffdio_writeprotect half = *(struct uffdio_writeprotect *)a[2];
		half.range.len = half.range.len / 2 & -page;
		if (half.range.len)
			real[entry->symbol](a[0], a[1], &half);
	} else {
		abort();
	}
}

// Half of the iovecs, or of the bytes in whole words.
static long run_short(const struct entry *entry, long *a)
{
	if (entry->symbol == SYMBOL_process_vm_readv)
		a[4] = (a[4] + 1) / 2;
	else if (entry->symbol == SYMBOL_syscall)
		a[3] = (a[3] + 1) / 2; // the local ones, of which there are more
	else
		a[2] = (a[2] / 2 + 7) & -8;
	return run(entry->symbol, a);
}

// It succeeds, and then somebody maps anew what it protected.
static long run_in_vain(const struct entry *entry, const long *a)
{
	long rc = run(entry->symbol, a);
	uint64_t start, end;
	if (entry->request == PAGEMAP_SCAN) {
		const struct pm_scan_arg *arg = (const struct pm_scan_arg *)a[2];
		start = arg->start;
		end = arg->flags & PM_SCAN_WP_MATCHING ? arg->end : start;
	} else if (entry->request == UFFDIO_WRITEPROTECT) {
		const struct uffdio_writeprotect *arg = (const struct uffdio_writeprotect *)a[2];
		start = arg->range.start;
		end = start + arg->range.len;
	} else {
		abort();
	}
	if ((int)rc >= 0 && start < end)
		mmap((void *)start, end - start, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	return rc;
}

static long pass(enum symbol symbol, long *a)
{
	struct entry *entry = entry_of(symbol, a);
	if (!strikes(entry))
		return run(symbol, a);
	if (plan.how == UNDONE)
		return run_in_vain(entry, a);
	if (plan.how == SHORT)
		return run_short(entry, a);
	if (plan.how == AFTERWARDS)
		run(symbol, a);
	if (plan.how == HALFWAY)
		run_half(entry, a);
	return fail(entry);
}

#define PASS(symbol) \
	static long pass_##symbol(ARGUMENTS) \
	{ \
		return pass(SYMBOL_##symbol, THEM); \
	}
SYMBOLS(PASS)

// ---- What is more than passed: memory is counted, so that a test can tell what was not given back --------------------

static long count_mmap(ARGUMENTS)
{
	long rc = pass_mmap(a, b, c, d, e, f, g);
	if (rc != -1)
		atomic_fetch_add(&mapped, b);
	return rc;
}

static long count_munmap(ARGUMENTS)
{
	int rc = (int)pass_munmap(a, b, c, d, e, f, g);
	if (!rc)
		atomic_fetch_sub(&mapped, b);
	return rc;
}

static long count_malloc(ARGUMENTS)
{
	long rc = pass_malloc(a, b, c, d, e, f, g);
	atomic_fetch_add(&allocated, rc != 0);
	return rc;
}

static long count_calloc(ARGUMENTS)
{
	long rc = pass_calloc(a, b, c, d, e, f, g);
	atomic_fetch_add(&allocated, rc != 0);
	return rc;
}

static long count_realloc(ARGUMENTS)
{
	long rc = pass_realloc(a, b, c, d, e, f, g);
	atomic_fetch_add(&allocated, rc && !a);
	return rc;
}

static void count_free(void *pointer)
{
	atomic_fetch_sub(&allocated, pointer != NULL);
	free(pointer);
}

struct start {
	void *(*routine)(void *);
	void *argument;
};

static void *start(void *argument)
{
	struct start given = *(struct start *)argument;
	free(argument);
	own_thread = true;
	return given.routine(given.argument);
}

static long mark_pthread_create(ARGUMENTS)
{
	struct start *given = malloc(sizeof(*given));
	*given = (struct start){ (void *(*)(void *))c, (void *)d };
	int rc = (int)pass_pthread_create(a, b, (long)start, (long)given, e, f, g);
	if (rc)
		free(given);
	return rc;
}

static void *replacement(enum symbol symbol)
{
	static void *const counted[SYMBOL_COUNT] = {
		[SYMBOL_mmap] = count_mmap,	  [SYMBOL_munmap] = count_munmap,   [SYMBOL_malloc] = count_malloc,
		[SYMBOL_calloc] = count_calloc,	  [SYMBOL_realloc] = count_realloc, [SYMBOL_free] = count_free,
		[SYMBOL_pthread_create] = mark_pthread_create,
	};
#define PASSED(symbol) (void *)pass_##symbol,
	static void *const passed[] = { SYMBOLS(PASSED) };
	return counted[symbol] ? counted[symbol] : passed[symbol];
}

static enum symbol symbol_of(const char *name)
{
#define NAME_OF(symbol) #symbol,
	static const char *const names[] = { SYMBOLS(NAME_OF) };
	enum symbol symbol = 0;
	while (symbol < SYMBOL_COUNT && strcmp(names[symbol], name))
		symbol++;
	return symbol;
}

// ---- For the test -------------------------------------------------------------------------------------------------

// Replaces what the library at *path*, which is loaded, imports, and calls *seen* with the name of every import that is not replaced.
// Returns how many were, or -1.
int shim_attach(const char *path, void (*seen)(const char *symbol))
{
	struct link_map *map = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
	const ElfW(Sym) *symbols = NULL;
	const char *strings = NULL;
	const ElfW(Rela) *tables[2] = { NULL, NULL };
	size_t sizes[2] = { 0, 0 };
	int replaced = 0;

	if (!map)
		return -1;
	for (const ElfW(Dyn) *entry = map->l_ld; entry->d_tag != DT_NULL; entry++)
		switch (entry->d_tag) {
		case DT_SYMTAB:
			symbols = (const void *)entry->d_un.d_ptr;
			break;
		case DT_STRTAB:
			strings = (const void *)entry->d_un.d_ptr;
			break;
		case DT_RELA:
			tables[0] = (const void *)entry->d_un.d_ptr;
			break;
		case DT_RELASZ:
			sizes[0] = entry->d_un.d_val;
			break;
		case DT_JMPREL:
			tables[1] = (const void *)entry->d_un.d_ptr;
			break;
		case DT_PLTRELSZ:
			sizes[1] = entry->d_un.d_val;
			break;
		}
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	for (int table = 0; table < 2; table++)
		for (size_t i = 0; i < sizes[table] / sizeof(*tables[table]); i++) {
			const ElfW(Rela) *relocation = &tables[table][i];
			const ElfW(Sym) *imported = &symbols[ELF64_R_SYM(relocation->r_info)];
			if (!ELF64_R_SYM(relocation->r_info) || imported->st_shndx != SHN_UNDEF)
				continue;
			enum symbol symbol = symbol_of(strings + imported->st_name);
			if (symbol == SYMBOL_COUNT) {
				seen(strings + imported->st_name);
				continue;
			}
			uintptr_t slot = map->l_addr + relocation->r_offset;
			// Read-only once it is relocated, where the library was linked so.
			if (mprotect((void *)(slot & -page), page, PROT_READ | PROT_WRITE))
				return -1;
			real[symbol] = (function)dlsym(RTLD_DEFAULT, strings + imported->st_name);
			*(void **)slot = replacement(symbol);
			replaced++;
		}
	return replaced;
}

// The name of the function in row *index* of the table, or NULL behind the last.
const char *shim_name(size_t index)
{
	return index < ENTRIES ? entries[index].name : NULL;
}

// Counts from 0 again. From now on the *nth* call fails, for ever if *always*; nothing does if *nth* is 0.
void shim_arm(size_t index, int own, unsigned nth, int always, int error, int how)
{
	atomic_store(&plan.entry, NULL);
	for (size_t i = 0; i < ENTRIES; i++)
		entries[i].calls[0] = entries[i].calls[1] = 0;
	plan.own = own;
	plan.nth = nth;
	plan.always = always;
	plan.error = error;
	plan.how = (enum how)how;
	atomic_store(&plan.struck, 0);
	atomic_store(&plan.entry, nth ? &entries[index] : NULL);
}

// Nothing fails any more. Returns how often something did.
unsigned shim_disarm(void)
{
	atomic_store(&plan.entry, NULL);
	return atomic_load(&plan.struck);
}

unsigned shim_calls(size_t index, int own)
{
	return entries[index].calls[own];
}

long shim_mapped(void)
{
	return atomic_load(&mapped);
}

long shim_allocated(void)
{
	return atomic_load(&allocated);
}
