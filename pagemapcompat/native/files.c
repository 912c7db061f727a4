// Descriptors that a program may close, as daemons do with all they find, and whose numbers are its own files' then.
#define _GNU_SOURCE
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

int pmc_file_id(int fd, struct file_id *ret)
{
	struct stat file;
	if (fstat(fd, &file))
		return -errno;
	*ret = (struct file_id){ file.st_dev, file.st_ino };
	return 0;
}

static bool is_same(struct file_id one, struct file_id other)
{
	return one.device == other.device && one.inode == other.inode;
}

bool pmc_is_file(int fd, struct file_id id)
{
	struct file_id now;
	return !pmc_file_id(fd, &now) && is_same(now, id);
}

void pmc_close_file(int *fd, struct file_id id)
{
	struct file_id now;
	bool others = id.inode && !pmc_file_id(*fd, &now) && !is_same(now, id);
	if (*fd >= 0 && !others)
		close(*fd);
	*fd = -1;
}
