// Writers for storms.py. Each store is a number, told in `begun` before it and in `done` after it.
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum kind { STORE, ADD, READ, PREADV, RECV, URING, REMOTE, SIGNAL, REFILL };

struct writer {
	uint64_t kind;
	uint64_t memory;
	uint64_t page_size;
	uint64_t pages;
	uint64_t slot; // the offset in each page
	uint64_t group; // of pages
	uint64_t barred; // which of a group may fail with EFAULT
	uint64_t discarded; // which of a group loses its content
	uint64_t target; // the process that has the memory, and its first thread
	uint64_t seed;
	uint64_t readers; // whose check of a page's number its next one waits for
	uint64_t stride; // between their numbers
	uint64_t *begun;
	uint64_t *done;
	uint64_t *checked;
	uint64_t *count;
	uint64_t *stop;
};

struct means {
	int file;
	int sockets[2];
	int ring;
	unsigned char *rings;
	size_t rings_size;
	unsigned char *sqes;
	size_t sqes_size;
	uint32_t sq_tail, sq_array, cq_head, cq_tail, cq_mask, cqes;
};

#define IO_URING_SETUP 425 // the same on every architecture
#define IO_URING_ENTER 426
#define IO_URING_OP_READ 22 // since 5.6
#define IO_URING_ASYNC 16 // by a thread of the kernel's
#define ENTRIES 4

static uint64_t load(uint64_t *word)
{
	return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

static void store(uint64_t *word, uint64_t value)
{
	__atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

static int uring_open(struct means *means)
{
	uint32_t params[30] = { 0 }; // struct io_uring_params
	means->ring = (int)syscall(IO_URING_SETUP, ENTRIES, params);
	if (means->ring < 0)
		return -errno;
	const uint32_t *sq = params + 10, *cq = params + 20; // struct io_sqring_offsets, io_cqring_offsets
	means->sq_tail = sq[1];
	means->sq_array = sq[6];
	means->cq_head = cq[0];
	means->cq_tail = cq[1];
	means->cq_mask = cq[2];
	means->cqes = cq[5];
	size_t submissions = sq[6] + params[0] * 4, completions = cq[5] + params[1] * 16;
	means->rings_size = submissions > completions ? submissions : completions;
	means->sqes_size = params[0] * 64;
	means->rings = mmap(NULL, means->rings_size, PROT_READ | PROT_WRITE, MAP_SHARED, means->ring, 0);
	means->sqes = mmap(NULL, means->sqes_size, PROT_READ | PROT_WRITE, MAP_SHARED, means->ring, 0x10000000);
	return means->rings == MAP_FAILED || means->sqes == MAP_FAILED ? -errno : 0;
}

static int uring_read(struct means *means, uint64_t at, uint64_t number)
{
	struct {
		uint8_t opcode, flags;
		uint16_t priority;
		int32_t file;
		uint64_t offset, address;
		uint32_t length, rest[9];
	} sqe = { .opcode = IO_URING_OP_READ, .file = means->file, .address = at, .length = sizeof(number) };
	sqe.flags = number % 2 ? IO_URING_ASYNC : 0;
	memcpy(means->sqes, &sqe, sizeof(sqe));
	uint32_t *tail = (uint32_t *)(means->rings + means->sq_tail);
	memset(means->rings + means->sq_array, 0, ENTRIES * sizeof(uint32_t)); // always the first entry
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	uint32_t *head = (uint32_t *)(means->rings + means->cq_head);
	uint32_t *ready = (uint32_t *)(means->rings + means->cq_tail);
	unsigned submit = 1;
	while (__atomic_load_n(ready, __ATOMIC_ACQUIRE) == *head) {
		long rc = syscall(IO_URING_ENTER, means->ring, submit, 1, 1, NULL, 0);
		if (rc < 0 && errno != EINTR && errno != EAGAIN)
			return -errno;
		if (rc >= 1)
			submit = 0;
	}
	uint32_t mask = *(uint32_t *)(means->rings + means->cq_mask);
	int32_t result;
	memcpy(&result, means->rings + means->cqes + (*head & mask) * 16 + 8, sizeof(result));
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return result;
}

static int means_open(struct means *means, uint64_t kind)
{
	*means = (struct means){ .file = -1, .sockets = { -1, -1 }, .ring = -1 };
	if (kind == RECV)
		return socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, means->sockets) ? -errno : 0;
	if (kind == READ || kind == PREADV || kind == URING) {
		means->file = memfd_create("numbers", MFD_CLOEXEC);
		if (means->file < 0)
			return -errno;
	}
	return kind == URING ? uring_open(means) : 0;
}

static void means_close(struct means *means)
{
	for (int i = 0; i < 2; i++)
		if (means->sockets[i] >= 0)
			close(means->sockets[i]);
	if (means->file >= 0)
		close(means->file);
	if (means->rings && means->rings != MAP_FAILED)
		munmap(means->rings, means->rings_size);
	if (means->sqes && means->sqes != MAP_FAILED)
		munmap(means->sqes, means->sqes_size);
	if (means->ring >= 0)
		close(means->ring);
}

// What a signal handler is to store.
static uint64_t *signal_slot;
static uint64_t signal_number;
static uint64_t signal_landed;

static void on_signal(int number)
{
	(void)number;
	store(signal_slot, signal_number);
	store(&signal_landed, 1);
}

static int by_signal(uint64_t target, uint64_t *slot, uint64_t number)
{
	struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
	signal_slot = slot;
	signal_number = number;
	store(&signal_landed, 0);
	if (sigaction(SIGUSR2, &action, NULL) || syscall(SYS_tgkill, target, target, SIGUSR2))
		return -errno;
	for (unsigned turns = 0; !load(&signal_landed); turns++)
		if (turns > 10000)
			sched_yield();
	return 0;
}

static int outcome(ssize_t got)
{
	return got == sizeof(uint64_t) ? 0 : got < 0 ? -errno : -EIO;
}

// Stores a number. 0 or -errno.
static int put(const struct writer *writer, struct means *means, uint64_t page, uint64_t number)
{
	uint64_t at = writer->memory + page * writer->page_size + writer->slot, other;
	uint64_t *slot = (uint64_t *)(uintptr_t)at;
	struct iovec local[2] = { { &number, sizeof(number) }, { slot, sizeof(number) } };
	struct iovec remote = { slot, sizeof(number) };
	int rc;

	if (means->file >= 0 && pwrite(means->file, &number, sizeof(number), 0) != sizeof(number))
		return -errno;
	switch (writer->kind) {
	case STORE:
		store(slot, number);
		return 0;
	case ADD:
		__atomic_fetch_add(slot, 1, __ATOMIC_SEQ_CST);
		return 0;
	case READ:
		return outcome(pread(means->file, slot, sizeof(number), 0));
	case PREADV:
		local[0].iov_base = &other;
		if (pwrite(means->file, &number, sizeof(number), sizeof(number)) != sizeof(number))
			return -errno;
		errno = EFAULT; // what stops it half-way
		return preadv(means->file, local, 2, 0) == 2 * sizeof(number) ? 0 : -errno;
	case RECV:
		if (send(means->sockets[0], &number, sizeof(number), 0) != sizeof(number))
			return -errno;
		rc = outcome(recv(means->sockets[1], slot, sizeof(number), 0));
		if (rc) // it is still in the queue
			(void)recv(means->sockets[1], &other, sizeof(other), MSG_DONTWAIT);
		return rc;
	case URING:
		rc = uring_read(means, at, number);
		return rc < 0 ? rc : rc == sizeof(number) ? 0 : -EIO;
	case REMOTE:
		return outcome(process_vm_writev((pid_t)writer->target, local, 1, &remote, 1, 0));
	case SIGNAL:
		return by_signal(writer->target, slot, number);
	case REFILL: // an empty page, which may be written without a fault
		if (madvise((void *)(uintptr_t)(at - writer->slot), writer->page_size, MADV_DONTNEED))
			return -errno;
		store(slot, number);
		return 0;
	}
	return -EINVAL;
}

static bool may_write(const struct writer *writer, uint64_t page)
{
	uint64_t number = load(&writer->done[page]), which = page % writer->group;
	bool by_thread = writer->kind == STORE || writer->kind == ADD || writer->kind == SIGNAL;
	if ((by_thread && which == writer->barred) || (writer->kind == REFILL && which != writer->discarded))
		return false;
	for (uint64_t i = 0; i < writer->readers; i++)
		if (load(&writer->checked[i * writer->stride + page]) < number)
			return false;
	return true;
}

// Writes until told to stop. 0 or -errno.
int storm_write(struct writer *writer)
{
	struct means means;
	uint64_t dice = writer->seed * 2 + 1, page = 0, refused = 0;
	int rc = means_open(&means, writer->kind);

	while (!rc && !load(writer->stop)) {
		dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
		page = dice % 4 ? page + 1 : dice >> 8;
		page %= writer->pages;
		if (!may_write(writer, page)) {
			if (refused++ > writer->pages)
				sched_yield();
			continue;
		}
		refused = 0;
		// Else all writes that wait for a reader begin when it has checked, and none in the midst of its next collect.
		for (volatile uint64_t turns = writer->readers ? dice >> 20 & 0x7fff : 0; turns; turns--)
			;
		uint64_t number = load(&writer->done[page]) + 1;
		store(&writer->begun[page], number);
		rc = put(writer, &means, page, number);
		if (!rc) {
			store(&writer->done[page], number);
			store(writer->count, load(writer->count) + 1);
		} else if ((rc == -EFAULT && page % writer->group == writer->barred) ||
			   (writer->kind == URING && rc == -ECANCELED)) {
			rc = 0; // barred; or a signal came before the kernel's thread began
		}
	}
	means_close(&means);
	return rc;
}

// Whether an io_uring can be had: 0 or -errno.
int storm_uring(void)
{
	struct means means;
	int rc = means_open(&means, URING);
	means_close(&means);
	return rc;
}

// What goes on beside.
enum trouble { SPLIT, BAR, DISCARD, FORK };

static int trouble(enum trouble trouble, uint64_t page, uint64_t size)
{
	void *at = (void *)(uintptr_t)page;
	long pid;

	switch (trouble) {
	case SPLIT:
		return madvise(at, size, MADV_DONTDUMP) || madvise(at, size, MADV_DODUMP) ? -errno : 0;
	case BAR: // readers copy it meanwhile
		return mprotect(at, size, PROT_READ) || mprotect(at, size, PROT_READ | PROT_WRITE) ? -errno : 0;
	case DISCARD:
		return madvise(at, size, MADV_DONTNEED) ? -errno : 0;
	case FORK: // not by fork(3), whose handlers are for children that do more than end
		pid = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
		if (!pid)
			_exit(0);
		while (pid > 0 && waitpid((pid_t)pid, NULL, 0) < 0 && errno == EINTR)
			;
		return pid < 0 ? -errno : 0;
	}
	return -EINVAL;
}

// Makes one kind of it until told to stop, at every page that is *which* of a group. 0 or -errno.
int storm_trouble(int kind, uint64_t memory, uint64_t size, uint64_t pages, uint64_t group, uint64_t which,
		  uint64_t *stop)
{
	int rc = 0;
	for (uint64_t page = which; !rc && !load(stop); page = page + group < pages ? page + group : which)
		rc = trouble(kind, memory + page * size, size);
	return rc;
}
