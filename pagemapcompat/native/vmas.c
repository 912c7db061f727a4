// The mappings of a process: by PROCMAP_QUERY where the kernel has it, else from the text of /proc/PID/maps.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

#define LINE_LIMIT (1 << 20) // directories may nest until a path is longer than PATH_MAX

int pmc_maps_query(int maps)
{
	struct procmap_query query = { .size = sizeof(query), .query_flags = PROCMAP_QUERY_COVERING_OR_NEXT_VMA };
	if (ioctl(maps, PROCMAP_QUERY, &query) == 0 || errno == ENOENT)
		return 1;
	return -errno;
}

int pmc_vmas_open(struct vmas *vmas, bool query, bool sizes)
{
	vmas->fd = open(sizes ? "/proc/self/smaps" : "/proc/self/maps", O_RDONLY | O_CLOEXEC);
	if (vmas->fd < 0)
		return -errno;
	vmas->query = query && !sizes;
	vmas->sizes = sizes;
	vmas->page_shift = pmc_page_shift();
	pmc_vmas_refresh(vmas);
	return pmc_file_id(vmas->fd, &vmas->file);
}

void pmc_vmas_close(struct vmas *vmas)
{
	pmc_close_file(&vmas->fd, vmas->file);
}

void pmc_vmas_refresh(struct vmas *vmas)
{
	vmas->ahead_valid = false;
	vmas->ended = false;
	vmas->floor = UINT64_MAX; // makes the next look-up begin at the top of the file
}

void pmc_look_again(struct vmas *vmas, unsigned looks)
{
	if (looks > PMC_LOOKS / 8) {
		struct timespec pause = { .tv_nsec = 1000l * looks };
		(void)nanosleep(&pause, NULL); // cut short by a signal, it was a pause all the same
	}
	pmc_vmas_refresh(vmas);
}

static uint32_t kind_of(bool shared, uint64_t inode, uint32_t vma_shift, uint32_t page_shift)
{
	if (vma_shift != page_shift)
		return PMC_KIND_HUGETLB;
	if (shared)
		return PMC_KIND_SHARED;
	return inode ? PMC_KIND_FILE : PMC_KIND_ANON;
}

static int query_at(struct vmas *vmas, uint64_t address, struct vma *ret)
{
	struct procmap_query query = {
		.size = sizeof(query),
		.query_flags = PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
		.query_addr = address,
	};
	int rc;
	do
		rc = ioctl(vmas->fd, PROCMAP_QUERY, &query);
	while (rc < 0 && errno == EINTR);
	if (rc < 0)
		return errno == ENOENT ? 0 : -errno;
	uint32_t shift = (uint32_t)__builtin_ctzll(query.vma_page_size);
	*ret = (struct vma){
		.start = query.vma_start,
		.end = query.vma_end,
		.kind = kind_of(query.vma_flags & PROCMAP_QUERY_VMA_SHARED, query.inode, shift, vmas->page_shift),
		.page_shift = shift,
		.protection = (query.vma_flags & PROCMAP_QUERY_VMA_READABLE ? PROT_READ : 0) |
			(query.vma_flags & PROCMAP_QUERY_VMA_WRITABLE ? PROT_WRITE : 0) |
			(query.vma_flags & PROCMAP_QUERY_VMA_EXECUTABLE ? PROT_EXEC : 0),
	};
	return 1;
}

// The next line, without its newline, or NULL at the end (*rc 0) or on an error. Lines longer than the buffer (paths)
// lose their tail.
// -EBADMSG: one without end, as of a device that somebody put in the place of our file.
static char *next_line(struct vmas *vmas, int *rc)
{
	size_t length = 0;
	*rc = 0;
	for (;;) {
		char *line = vmas->text + vmas->used;
		char *newline = memchr(line, '\n', vmas->have - vmas->used);
		if (newline) {
			*newline = 0;
			vmas->used = (size_t)(newline - vmas->text) + 1;
			return line;
		}
		if (vmas->used) {
			vmas->have -= vmas->used;
			memmove(vmas->text, line, vmas->have);
			vmas->used = 0;
		}
		if (vmas->have == sizeof(vmas->text))
			vmas->have = sizeof(vmas->text) / 2;
		ssize_t got = read(vmas->fd, vmas->text + vmas->have, sizeof(vmas->text) - vmas->have);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0) {
			*rc = got < 0 ? -errno : 0;
			return NULL;
		}
		vmas->have += (size_t)got;
		length += (size_t)got;
		if (length > LINE_LIMIT) {
			*rc = -EBADMSG;
			return NULL;
		}
	}
}

static uint64_t parse(const char **text, unsigned base)
{
	uint64_t value = 0;
	for (;; (*text)++) {
		char c = **text;
		unsigned digit = base;
		if (c >= '0' && c <= '9')
			digit = (unsigned)(c - '0');
		else if (c >= 'a' && c <= 'f')
			digit = (unsigned)(c - 'a') + 10;
		if (digit >= base)
			return value;
		value = value * base + digit;
	}
}

static const char *skip_field(const char *text)
{
	while (*text && *text != ' ')
		text++;
	while (*text == ' ')
		text++;
	return text;
}

// "start-end perms " as in "7f12a000-7f12b000 rw-p ". Returns what follows, or NULL.
static const char *parse_head(const char *at, struct vma *ret, bool *shared)
{
	ret->start = parse(&at, 16);
	if (*at++ != '-')
		return NULL;
	ret->end = parse(&at, 16);
	if (ret->start >= ret->end || strspn(at, " ") != 1 || strcspn(at + 1, " ") != 4)
		return NULL;
	at++;
	ret->protection = (at[0] == 'r' ? PROT_READ : 0) | (at[1] == 'w' ? PROT_WRITE : 0) |
			  (at[2] == 'x' ? PROT_EXEC : 0);
	*shared = at[3] == 's';
	return skip_field(at);
}

// log2 of "KernelPageSize:    4 kB", or 0.
static uint32_t parse_page_shift(const char *at)
{
	at = skip_field(at);
	uint64_t size = parse(&at, 10) << 10;
	return size && !(size & (size - 1)) ? (uint32_t)__builtin_ctzll(size) : 0;
}

// "start-end perms offset device inode path"; in smaps, indented facts follow. -EBADMSG: something else.
static int text_next(struct vmas *vmas)
{
	int rc;
	char *line = next_line(vmas, &rc);
	if (!line)
		return rc;
	bool shared;
	struct vma vma = { .page_shift = vmas->page_shift };
	const char *at = parse_head(line, &vma, &shared);
	if (!at)
		return -EBADMSG;
	at = skip_field(skip_field(at));
	uint64_t inode = parse(&at, 10);
	// A private mapping of it has an inode, and is anonymous to the kernel all the same (drivers/char/mem.c:
	// mmap_zero).
	if (!shared && strcmp(skip_field(at), "/dev/zero") == 0)
		inode = 0;
	if (vmas->sizes) {
		static const char key[] = "KernelPageSize:", last[] = "VmFlags:";
		do {
			line = next_line(vmas, &rc);
			if (!line)
				return rc;
			if (strncmp(line, key, sizeof(key) - 1) == 0) {
				vma.page_shift = parse_page_shift(line);
				if (vma.page_shift < vmas->page_shift)
					return -EBADMSG;
			}
		} while (strncmp(line, last, sizeof(last) - 1) != 0);
	}
	vma.kind = kind_of(shared, inode, vma.page_shift, vmas->page_shift);
	vmas->floor = vmas->ahead_valid ? vmas->ahead.end : 0;
	vmas->ahead = vma;
	vmas->ahead_valid = true;
	return 1;
}

int pmc_vmas_at(struct vmas *vmas, uint64_t address, struct vma *ret)
{
	if (vmas->query)
		return query_at(vmas, address, ret);
	if (address < vmas->floor) {
		if (lseek(vmas->fd, 0, SEEK_SET) < 0)
			return -errno;
		vmas->have = vmas->used = 0;
		vmas->ahead_valid = vmas->ended = false;
		vmas->floor = 0;
	}
	while (!vmas->ended && (!vmas->ahead_valid || vmas->ahead.end <= address)) {
		int rc = text_next(vmas);
		if (rc < 0)
			return rc;
		if (!rc) {
			vmas->ended = true;
			vmas->floor = vmas->ahead_valid ? vmas->ahead.end : 0;
		}
	}
	if (vmas->ended)
		return 0;
	*ret = vmas->ahead;
	return 1;
}

// 1, 0, or -errno.
static int is_mapped(const struct vmas *vmas, uint64_t address)
{
	unsigned char resident;
	if (!mincore((void *)(uintptr_t)address, (size_t)1 << vmas->page_shift, &resident))
		return 1;
	return errno == ENOMEM ? 0 : -errno;
}

int pmc_own_vma_at(struct vmas *vmas, uint64_t address, struct vma *ret)
{
	for (unsigned looks = 0; looks < PMC_LOOKS; looks++) {
		vmas->operation = "/proc/self/maps";
		int rc = pmc_vmas_at(vmas, address, ret);
		if (rc < 0 || (rc && ret->start <= address))
			return rc;
		if (!rc && !vmas->query && !vmas->floor)
			return -EBADMSG; // without a mapping, no process would be here to ask
		int mapped = is_mapped(vmas, address);
		if (!mapped) {
			// The hole begins here; where it ends is asked twice, where that is cheap.
			struct vma again;
			int second = vmas->query ? pmc_vmas_at(vmas, address, &again) : rc;
			if (second < 0 || (second == rc && (!vmas->query || !rc || again.start == ret->start)))
				return second;
		}
		vmas->operation = "mincore";
		if (mapped < 0 && mapped != -EAGAIN)
			return mapped;
		pmc_look_again(vmas, looks);
	}
	return -EAGAIN;
}

int pmc_find_vma(struct pmc_tracker *tracker, uint64_t address, struct vma *ret)
{
	int rc = pmc_own_vma_at(&tracker->vmas, address, ret);
	if (rc < 0)
		tracker->operation = tracker->vmas.operation;
	return rc;
}
