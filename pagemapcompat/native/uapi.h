// The kernel interfaces this library speaks, restated. System headers lag the running kernel by years
// (those of Debian 12 know neither PAGEMAP_SCAN nor WP_ASYNC), so nothing is taken from them but _IO*().
// Sources are named by the kernel file that defines them and the first release that had it.
#ifndef PMC_UAPI_H
#define PMC_UAPI_H

#include <linux/ioctl.h>
#include <stdint.h>

// ---- PAGEMAP_SCAN on /proc/PID/pagemap: include/uapi/linux/fs.h, since 6.7 (52526ca7fdb9) ----

struct page_region {
	uint64_t start;
	uint64_t end; // exclusive
	uint64_t categories;
};

struct pm_scan_arg {
	uint64_t size; // of this struct, exactly
	uint64_t flags;
	uint64_t start;
	uint64_t end;
	uint64_t walk_end; // out
	uint64_t vec;
	uint64_t vec_len; // in regions
	uint64_t max_pages; // 0: no limit
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};

#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)

#define PM_SCAN_WP_MATCHING (1ull << 0)
#define PM_SCAN_CHECK_WPASYNC (1ull << 1)

#define PAGE_IS_WPALLOWED (1ull << 0)
#define PAGE_IS_WRITTEN (1ull << 1)
#define PAGE_IS_FILE (1ull << 2)
#define PAGE_IS_PRESENT (1ull << 3)
#define PAGE_IS_SWAPPED (1ull << 4)
#define PAGE_IS_PFNZERO (1ull << 5)
#define PAGE_IS_HUGE (1ull << 6)
#define PAGE_IS_SOFT_DIRTY (1ull << 7) // since 6.8 (e6a9a2cbc13b)
#define PAGE_IS_GUARD (1ull << 8) // since 6.16

// ---- The words of /proc/PID/pagemap: Documentation/admin-guide/mm/pagemap.rst ----

#define PM_WORD_SOFT_DIRTY (1ull << 55)
#define PM_WORD_EXCLUSIVE (1ull << 56)
#define PM_WORD_UFFD_WP (1ull << 57) // since 5.14 (fb8e37f35a2f)
#define PM_WORD_GUARD (1ull << 58) // since 6.15
#define PM_WORD_FILE (1ull << 61)
#define PM_WORD_SWAPPED (1ull << 62)
#define PM_WORD_PRESENT (1ull << 63)

// ---- PROCMAP_QUERY on /proc/PID/maps: include/uapi/linux/fs.h, since 6.11 ----

struct procmap_query {
	uint64_t size;
	uint64_t query_flags;
	uint64_t query_addr;
	uint64_t vma_start;
	uint64_t vma_end;
	uint64_t vma_flags;
	uint64_t vma_page_size;
	uint64_t vma_offset;
	uint64_t inode;
	uint32_t dev_major;
	uint32_t dev_minor;
	uint32_t vma_name_size;
	uint32_t build_id_size;
	uint64_t vma_name_addr;
	uint64_t build_id_addr;
};

#define PROCMAP_QUERY _IOWR('f', 17, struct procmap_query)

#define PROCMAP_QUERY_VMA_READABLE 0x01
#define PROCMAP_QUERY_VMA_WRITABLE 0x02
#define PROCMAP_QUERY_VMA_EXECUTABLE 0x04
#define PROCMAP_QUERY_VMA_SHARED 0x08
#define PROCMAP_QUERY_COVERING_OR_NEXT_VMA 0x10

// ---- userfaultfd: include/uapi/linux/userfaultfd.h ----

#define UFFD_API 0xAAull
#define UFFD_USER_MODE_ONLY 1 // since 5.11

#define UFFD_FEATURE_PAGEFAULT_FLAG_WP (1ull << 0) // since 5.7
#define UFFD_FEATURE_EVENT_FORK (1ull << 1)
#define UFFD_FEATURE_EVENT_REMAP (1ull << 2)
#define UFFD_FEATURE_EVENT_REMOVE (1ull << 3)
#define UFFD_FEATURE_MISSING_HUGETLBFS (1ull << 4)
#define UFFD_FEATURE_MISSING_SHMEM (1ull << 5)
#define UFFD_FEATURE_EVENT_UNMAP (1ull << 6)
#define UFFD_FEATURE_SIGBUS (1ull << 7)
#define UFFD_FEATURE_THREAD_ID (1ull << 8) // these since 4.14 at the latest
#define UFFD_FEATURE_MINOR_HUGETLBFS (1ull << 9) // since 5.13
#define UFFD_FEATURE_MINOR_SHMEM (1ull << 10) // since 5.14
#define UFFD_FEATURE_EXACT_ADDRESS (1ull << 11) // since 5.18
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1ull << 12) // since 5.19
#define UFFD_FEATURE_WP_UNPOPULATED (1ull << 13) // since 6.4
#define UFFD_FEATURE_POISON (1ull << 14) // since 6.6
#define UFFD_FEATURE_WP_ASYNC (1ull << 15) // since 6.7 (d61ea1cb0095)
#define UFFD_FEATURE_MOVE (1ull << 16) // since 6.8

#define UFFD_EVENT_PAGEFAULT 0x12

struct uffd_msg {
	uint8_t event;
	uint8_t reserved1;
	uint16_t reserved2;
	uint32_t reserved3;
	union {
		struct {
			uint64_t flags;
			uint64_t address;
			uint32_t thread_id;
		} pagefault;
		uint64_t words[3];
	} arg;
};

struct uffdio_api {
	uint64_t api;
	uint64_t features;
	uint64_t ioctls;
};

struct uffdio_range {
	uint64_t start;
	uint64_t len;
};

struct uffdio_register {
	struct uffdio_range range;
	uint64_t mode;
	uint64_t ioctls; // out: the ioctls this range answers, a bit each
};

struct uffdio_writeprotect {
	struct uffdio_range range;
	uint64_t mode;
};

struct uffdio_copy {
	uint64_t dst;
	uint64_t src;
	uint64_t len;
	uint64_t mode;
	int64_t copy; // out: bytes done, or -errno
};

#define UFFDIO_REGISTER_MODE_WP (1ull << 1)
#define UFFDIO_WRITEPROTECT_MODE_WP (1ull << 0)
#define UFFDIO_WRITEPROTECT_MODE_DONTWAKE (1ull << 1)
#define UFFDIO_COPY_MODE_DONTWAKE (1ull << 0)

#define UFFDIO_ZEROPAGE_BIT 0x04

#define UFFDIO_API _IOWR(0xAA, 0x3F, struct uffdio_api)
#define UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct uffdio_register)
#define UFFDIO_UNREGISTER _IOR(0xAA, 0x01, struct uffdio_range)
#define UFFDIO_WAKE _IOR(0xAA, 0x02, struct uffdio_range)
#define UFFDIO_COPY _IOWR(0xAA, 0x03, struct uffdio_copy)
#define UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct uffdio_writeprotect)
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00) // on /dev/userfaultfd, since 6.1

// ---- mmap and madvise: include/uapi/asm-generic/mman-common.h, the same on x86, arm64 and riscv ----

#define PMC_MAP_NORESERVE 0x4000
#define PMC_MAP_FIXED_NOREPLACE 0x100000 // since 4.17; before it is a hint
#define PMC_MAP_HUGETLB 0x40000
#define PMC_MADV_WIPEONFORK 18 // since 4.14
#define PMC_MADV_POPULATE_READ 22 // since 5.14
#define PMC_MADV_GUARD_INSTALL 102 // since 6.13

#endif
