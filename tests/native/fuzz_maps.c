// What vmas.c makes of any text in the place of /proc/PID/maps and smaps: for libFuzzer, or with REPLAY for given files.
//
// The first byte chooses: bit 0 smaps, the others the step between the addresses that are looked up.
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void expect(bool holds)
{
	if (!holds)
		abort();
}

static void check(const struct vma *vma, uint64_t address)
{
	expect(vma->start < vma->end);
	expect(address < vma->end);
	expect(vma->page_shift >= pmc_page_shift() && vma->page_shift < 64);
	expect(vma->kind && !(vma->kind & (vma->kind - 1)));
	expect(!(vma->protection & ~(PROT_READ | PROT_WRITE | PROT_EXEC)));
}

// All mappings from 0 on, as callers walk them. Returns how many, or -errno.
static int walk(struct vmas *vmas, uint64_t step, uint64_t *last)
{
	struct vma vma;
	int count = 0, rc = 0;
	for (uint64_t address = 0; (rc = pmc_vmas_at(vmas, address, &vma)) > 0; count++) {
		check(&vma, address);
		*last = vma.end;
		if (vma.end + step < vma.end)
			break;
		address = vma.end + step;
	}
	return rc < 0 ? rc : count;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (!size)
		return 0;
	int fd = memfd_create("maps", MFD_CLOEXEC);
	expect(fd >= 0 && write(fd, data + 1, size - 1) == (ssize_t)(size - 1));
	// Of its own on the heap, where every byte beyond it is seen.
	struct vmas *vmas = malloc(sizeof(*vmas));
	expect(vmas);
	vmas->fd = fd;
	vmas->file = (struct file_id){ 0 };
	vmas->query = false;
	vmas->sizes = data[0] & 1;
	vmas->page_shift = pmc_page_shift();
	pmc_vmas_refresh(vmas);
	uint64_t last = 0, again = 0, step = (uint64_t)(data[0] >> 1) << vmas->page_shift;
	int count = walk(vmas, step, &last);
	pmc_vmas_refresh(vmas);
	expect(walk(vmas, step, &again) == count && again == last);
	pmc_vmas_close(vmas);
	free(vmas);
	return 0;
}

#ifdef REPLAY
int main(int count, char **arguments)
{
	static uint8_t data[1 << 20];
	for (int i = 1; i < count; i++) {
		FILE *file = fopen(arguments[i], "rb");
		expect(file);
		size_t size = fread(data, 1, sizeof(data), file);
		fclose(file);
		// A copy that ends where its last byte does.
		uint8_t *exact = malloc(size + !size);
		expect(exact);
		for (size_t k = 0; k < size; k++)
			exact[k] = data[k];
		LLVMFuzzerTestOneInput(exact, size);
		free(exact);
	}
	return 0;
}
#endif
