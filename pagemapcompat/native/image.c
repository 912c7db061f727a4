// Images: what memory held, page by page. One that is shared never changes, and images share whatever they have in
// common.
//
// A tree of nodes with 8 slots over the pages. Whoever changes a page copies the nodes above it that others share, so a
// snapshot of a few written pages costs those pages and a few nodes, a page is found in as many steps as the tree has
// levels however long the chain of snapshots is, and two images differ only where their slots do. The slots are few
// because to copy a node adds a reference to everything in it: with 512, as page tables have, that takes longer than to
// copy a page.
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define SLOT_BITS 3
#define SLOTS (1u << SLOT_BITS)
#define SPARE_BYTES (4u << 20) // of frames that a pool keeps, and as many nodes

// What a slot holds, and how many slots hold it.
struct shared {
	atomic_uint references;
	struct shared *next; // in a pool
};

struct frame {
	struct shared shared;
	unsigned char bytes[]; // a page
};

struct node {
	struct shared shared;
	void *slots[SLOTS]; // nodes, or on the lowest level frames; NULL: zero, MISSING: nothing there
};

struct spares {
	uint32_t count;
	struct shared *first;
};

// Frames and nodes that nobody holds any more, for the images to come: malloc(3) would give their memory back, and it
// takes longer to get it again than to copy a page. Whoever finds it busy goes to malloc(3), so nobody waits, not even
// in a child that was forked meanwhile.
struct pool {
	atomic_uint references; // one for each image
	atomic_flag busy;
	struct spares frames;
	struct spares nodes;
};

struct pmc_image {
	atomic_uint references;
	uint64_t pages;
	uint32_t page_shift;
	uint32_t levels;
	uint64_t copied; // pages that were put into it
	struct pool *pool; // which it shares with its base
	void *root;
};

static char missing;
#define MISSING ((void *)&missing)

static bool is_whole(const void *slot)
{
	return !slot || slot == MISSING;
}

static bool open_pool(struct pool *pool)
{
	return !atomic_flag_test_and_set_explicit(&pool->busy, memory_order_acquire);
}

static void close_pool(struct pool *pool)
{
	atomic_flag_clear_explicit(&pool->busy, memory_order_release);
}

static struct pool *pool_alloc(void)
{
	struct pool *pool = calloc(1, sizeof(*pool));
	if (pool)
		pool->references = 1;
	return pool;
}

static void spares_free(struct spares *spares)
{
	while (spares->first) {
		struct shared *spare = spares->first;
		spares->first = spare->next;
		free(spare);
	}
}

static void pool_put(struct pool *pool)
{
	if (atomic_fetch_sub(&pool->references, 1) != 1)
		return;
	spares_free(&pool->frames);
	spares_free(&pool->nodes);
	free(pool);
}

// One of the spares or a new one, with one reference. NULL: out of memory.
static void *take(struct pool *pool, struct spares *spares, size_t size)
{
	struct shared *spare = NULL;
	if (open_pool(pool)) {
		spare = spares->first;
		if (spare) {
			spares->first = spare->next;
			spares->count--;
		}
		close_pool(pool);
	}
	if (!spare)
		spare = malloc(size);
	if (spare)
		spare->references = 1;
	return spare;
}

static void give(const struct pmc_image *image, struct spares *spares, struct shared *spare)
{
	if (open_pool(image->pool)) {
		if (spares->count < SPARE_BYTES >> image->page_shift) {
			spare->next = spares->first;
			spares->first = spare;
			spares->count++;
			spare = NULL;
		}
		close_pool(image->pool);
	}
	free(spare);
}

static struct frame *frame_alloc(const struct pmc_image *image)
{
	return take(image->pool, &image->pool->frames, sizeof(struct frame) + (1ull << image->page_shift));
}

bool pmc_is_zero(const unsigned char *bytes, uint32_t page_shift)
{
	uint64_t first;
	memcpy(&first, bytes, sizeof(first));
	return !first && !memcmp(bytes, bytes + sizeof(first), (1ull << page_shift) - sizeof(first));
}

// The references of a node's slots lie in as many cache lines, each of which may be far away: all are fetched at once.
static void fetch(const struct node *node)
{
	for (uint32_t i = 0; i < SLOTS; i++)
		__builtin_prefetch(node->slots[i], 1); // of NULL or MISSING it is none, and no fault
}

static void *hold(void *slot)
{
	if (!is_whole(slot))
		atomic_fetch_add(&((struct shared *)slot)->references, 1);
	return slot;
}

static void let_go(const struct pmc_image *image, void *slot, uint32_t level)
{
	if (is_whole(slot) || atomic_fetch_sub(&((struct shared *)slot)->references, 1) != 1)
		return;
	if (!level) {
		give(image, &image->pool->frames, slot);
		return;
	}
	fetch(slot);
	for (uint32_t i = 0; i < SLOTS; i++)
		let_go(image, ((struct node *)slot)->slots[i], level - 1);
	give(image, &image->pool->nodes, slot);
}

// Makes the node in *slot* this image's alone, if its parents are. NULL: out of memory, nothing changed.
static struct node *own(const struct pmc_image *image, void **slot, uint32_t level)
{
	struct node *old = is_whole(*slot) ? NULL : *slot;
	if (old && atomic_load(&old->shared.references) == 1)
		return old;
	struct node *node = take(image->pool, &image->pool->nodes, sizeof(*node));
	if (!node)
		return NULL;
	if (old)
		fetch(old);
	for (uint32_t i = 0; i < SLOTS; i++)
		node->slots[i] = old ? hold(old->slots[i]) : *slot;
	let_go(image, old, level);
	*slot = node;
	return node;
}

// The slot of a page, in nodes that are this image's alone. NULL: out of memory, and nothing reads otherwise than
// before.
static void **own_slot(struct pmc_image *image, uint64_t page)
{
	void **slot = &image->root;
	for (uint32_t level = image->levels; level; level--) {
		struct node *node = own(image, slot, level);
		if (!node)
			return NULL;
		slot = &node->slots[page >> ((level - 1) * SLOT_BITS) & (SLOTS - 1)];
	}
	return slot;
}

// Puts a page's bytes there: into the frame that it has, if that is this image's alone.
static int put_bytes(struct pmc_image *image, uint64_t page, const unsigned char *bytes)
{
	void **slot = own_slot(image, page);
	if (!slot)
		return -ENOMEM;
	struct frame *frame = *slot;
	if (is_whole(frame) || atomic_load(&frame->shared.references) != 1) {
		frame = frame_alloc(image);
		if (!frame)
			return -ENOMEM;
		let_go(image, *slot, 0);
		*slot = frame;
	}
	memcpy(frame->bytes, bytes, 1ull << image->page_shift);
	image->copied++;
	return 0;
}

static void *get(const struct pmc_image *image, uint64_t page)
{
	void *slot = image->root;
	for (uint32_t level = image->levels; level && !is_whole(slot); level--)
		slot = ((struct node *)slot)->slots[page >> ((level - 1) * SLOT_BITS) & (SLOTS - 1)];
	return slot;
}

int pmc_image_create(struct pmc_image **ret, const struct pmc_image *base, uint64_t pages)
{
	struct pmc_image *image = calloc(1, sizeof(*image));
	if (!image)
		return -ENOMEM;
	image->pool = base ? base->pool : pool_alloc();
	if (!image->pool) {
		free(image);
		return -ENOMEM;
	}
	image->references = 1;
	image->pages = pages;
	image->page_shift = pmc_page_shift();
	while (image->levels * SLOT_BITS < 64 && pages > 1ull << (image->levels * SLOT_BITS))
		image->levels++;
	if (base) {
		atomic_fetch_add(&base->pool->references, 1);
		image->root = hold(base->root);
	}
	*ret = image;
	return 0;
}

void pmc_image_share(struct pmc_image **ret, struct pmc_image *image)
{
	atomic_fetch_add(&image->references, 1);
	*ret = image;
}

int pmc_image_next(struct pmc_image **ret, struct pmc_image *base)
{
	if (atomic_load(&base->references) != 1)
		return pmc_image_create(ret, base, base->pages);
	base->copied = 0;
	pmc_image_share(ret, base);
	return 0;
}

void pmc_image_put(struct pmc_image **handle)
{
	struct pmc_image *image = *handle;
	*handle = NULL;
	if (!image || atomic_fetch_sub(&image->references, 1) != 1)
		return;
	let_go(image, image->root, image->levels);
	pool_put(image->pool);
	free(image);
}

uint64_t pmc_image_copied(const struct pmc_image *image)
{
	return image->copied;
}

enum pmc_content pmc_image_at(const struct pmc_image *image, uint64_t page, const unsigned char **bytes)
{
	struct frame *frame = get(image, page);
	if (frame == MISSING)
		return PMC_MISSING;
	*bytes = frame ? frame->bytes : NULL;
	return frame ? PMC_HELD : PMC_ZERO;
}

// Puts NULL or MISSING at a page. Most of what is not there never was, and needs no nodes.
static int put_whole(struct pmc_image *image, uint64_t page, void *what)
{
	if (get(image, page) == what)
		return 0;
	void **slot = own_slot(image, page);
	if (!slot)
		return -ENOMEM;
	let_go(image, *slot, 0);
	*slot = what;
	return 0;
}

// Puts *what* at all pages [from, to) below *slot*, whose first page is *first*: whole slots at once.
static int fill(const struct pmc_image *image, void **slot, uint32_t level, uint64_t first, uint64_t from, uint64_t to,
		void *what)
{
	uint64_t size = 1ull << (level * SLOT_BITS);
	if (*slot == what)
		return 0;
	if (from <= first && first + size <= to) {
		let_go(image, *slot, level);
		*slot = what;
		return 0;
	}
	struct node *node = own(image, slot, level);
	if (!node)
		return -ENOMEM;
	size >>= SLOT_BITS;
	for (uint64_t i = (max_u64(from, first) - first) / size; i < SLOTS && first + i * size < to; i++) {
		int rc = fill(image, &node->slots[i], level - 1, first + i * size, from, to, what);
		if (rc)
			return rc;
	}
	return 0;
}

int pmc_image_clear(struct pmc_image *image, uint64_t from, uint64_t to, enum pmc_content content)
{
	// The last slots of a tree have more room than the image has pages; nobody asks for what is there.
	void *what = content == PMC_MISSING ? MISSING : NULL;
	return from < to ? fill(image, &image->root, image->levels, 0, from, to, what) : 0;
}

int pmc_image_miss(struct pmc_image *image, uint64_t first, uint64_t count)
{
	return pmc_image_clear(image, first, first + count, PMC_MISSING);
}

int pmc_image_load(struct pmc_image *image, uint64_t first, uint64_t count, const unsigned char *bytes)
{
	uint64_t size = 1ull << image->page_shift;
	for (uint64_t i = 0; i < count; i++, bytes += size) {
		bool zero = pmc_is_zero(bytes, image->page_shift);
		int rc = zero ? put_whole(image, first + i, NULL) : put_bytes(image, first + i, bytes);
		if (rc)
			return rc;
	}
	return 0;
}

void pmc_image_read(const struct pmc_image *image, uint64_t first, uint64_t count, unsigned char *ret)
{
	uint64_t size = 1ull << image->page_shift;
	const unsigned char *bytes;
	for (uint64_t i = 0; i < count; i++, ret += size)
		if (pmc_image_at(image, first + i, &bytes) == PMC_HELD)
			memcpy(ret, bytes, size);
		else
			memset(ret, 0, size);
}

// The first page of [from, to) below *slot* that is not missing, else to.
static uint64_t first_there(void *slot, uint32_t level, uint64_t first, uint64_t from, uint64_t to)
{
	uint64_t size = 1ull << (level * SLOT_BITS);
	if (slot == MISSING)
		return to;
	if (!slot || !level)
		return max_u64(first, from);
	size >>= SLOT_BITS;
	for (uint64_t i = (max_u64(from, first) - first) / size; i < SLOTS && first + i * size < to; i++) {
		uint64_t page = first_there(((struct node *)slot)->slots[i], level - 1, first + i * size, from, to);
		if (page < to)
			return page;
	}
	return to;
}

uint64_t pmc_image_first_there(const struct pmc_image *image, uint64_t from, uint64_t to)
{
	return from < to ? first_there(image->root, image->levels, 0, from, to) : to;
}

// ---- Walks ----------------------------------------------------------------------------------------------------

struct walk {
	const struct pmc_image *image;
	struct pmc_result *result;
	uint64_t base; // the address of page 0
	uint64_t want; // for lists: categories to return
};

static int found(const struct walk *walk, uint64_t from, uint64_t to, uint64_t categories)
{
	to = min_u64(to, walk->image->pages);
	if (from >= to)
		return 0;
	if (pmc_result_reserve(walk->result, 1))
		return -ENOMEM;
	uint32_t shift = walk->image->page_shift;
	pmc_result_append(walk->result, walk->base + (from << shift), walk->base + (to << shift), categories, shift);
	return 0;
}

static int list(const struct walk *walk, void *slot, uint32_t level, uint64_t first)
{
	uint64_t size = 1ull << (level * SLOT_BITS);
	if (!slot || first >= walk->image->pages)
		return 0;
	if (slot == MISSING || !level) {
		uint64_t category = slot == MISSING ? PMC_LIST_MISSING : PMC_LIST_HELD;
		return category & walk->want ? found(walk, first, first + size, category) : 0;
	}
	int rc = 0;
	for (uint32_t i = 0; i < SLOTS && !rc; i++)
		rc = list(walk, ((struct node *)slot)->slots[i], level - 1, first + i * (size >> SLOT_BITS));
	return rc;
}

int pmc_image_list(const struct pmc_image *image, uint64_t base, uint64_t categories, struct pmc_result *result)
{
	struct walk walk = { image, result, base, categories };
	int rc = list(&walk, image->root, image->levels, 0);
	result->walk_end = base + (image->pages << image->page_shift);
	return rc;
}

static int diff(const struct walk *walk, void *a, void *b, uint32_t level, uint64_t first)
{
	uint64_t size = 1ull << (level * SLOT_BITS);
	if (a == b || first >= walk->image->pages)
		return 0;
	if (is_whole(a) && is_whole(b))
		return found(walk, first, first + size, PAGE_IS_WRITTEN);
	if (!level) {
		bool equal = !is_whole(a) && !is_whole(b) &&
			     !memcmp(((struct frame *)a)->bytes, ((struct frame *)b)->bytes,
				     1ull << walk->image->page_shift);
		return equal ? 0 : found(walk, first, first + 1, PAGE_IS_WRITTEN);
	}
	int rc = 0;
	for (uint32_t i = 0; i < SLOTS && !rc; i++)
		rc = diff(walk, is_whole(a) ? a : ((struct node *)a)->slots[i],
			  is_whole(b) ? b : ((struct node *)b)->slots[i], level - 1, first + i * (size >> SLOT_BITS));
	return rc;
}

int pmc_image_diff(const struct pmc_image *a, const struct pmc_image *b, uint64_t base, struct pmc_result *result)
{
	struct walk walk = { a, result, base, 0 };
	int rc = diff(&walk, a->root, b->root, a->levels, 0);
	result->walk_end = base + (a->pages << a->page_shift);
	return rc;
}
