/* A tree of files whose contents follow from a seed: made on a file system, and recognised there later. */
#define _GNU_SOURCE
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FOLDERS 8
#define FILES 12          /* in each folder: some small ones, the last one of LARGE bytes */
#define LARGE (768u << 10)
#define LONGEST 64

static uint8_t made[LARGE], found[LARGE];

__attribute__((format(printf, 2, 3))) static void path_of(char path[LONGEST], const char *form, ...)
{
	va_list arguments;

	va_start(arguments, form);
	vsnprintf(path, LONGEST, form, arguments);
	va_end(arguments);
}

/* Sizes around what a file system treats apart: nothing, one byte, within, at and beyond a block, many blocks. */
static size_t size_of(int file)
{
	static const size_t sizes[FILES - 1] = { 0, 1, 100, 511, 4095, 4096, 4097, 12288, 40000, 65536, 200001 };

	return file < FILES - 1 ? sizes[file] : LARGE;
}

static void contents(uint64_t seed, int folder, int file)
{
	fill_random(made, (size_of(file) + 7) / 8 * 8, seed + (uint64_t)(folder * FILES + file));
}

static void make_file(const char *path, size_t size)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);

	if (fd < 0)
		give_up("create %s", path);
	if (size)
		write_all(fd, made, size, 0);
	if (close(fd))
		give_up("close %s", path);
}

/* Files-make FOLDER SEED: every folder's file 3 renamed, file 4 removed, file 5 linked, file 6 cut to half. */
int files_make_main(int argc, char **argv)
{
	(void)argc;
	uint64_t seed = number(argv[1]);
	char path[LONGEST], other[LONGEST];

	if (chdir(argv[0]))
		give_up("%s", argv[0]);
	for (int folder = 0; folder < FOLDERS; folder++) {
		path_of(path, "%d", folder);
		if (mkdir(path, 0755))
			give_up("mkdir %s", path);
		for (int file = 0; file < FILES; file++) {
			contents(seed, folder, file);
			path_of(path, "%d/%d", folder, file);
			make_file(path, size_of(file));
		}
		path_of(path, "%d/3", folder);
		path_of(other, "%d/renamed", folder);
		if (rename(path, other))
			give_up("rename %s", path);
		path_of(path, "%d/4", folder);
		if (unlink(path))
			give_up("unlink %s", path);
		path_of(path, "%d/5", folder);
		path_of(other, "%d/hard", folder);
		if (link(path, other))
			give_up("link %s", path);
		path_of(path, "%d/soft", folder);
		if (symlink("5", path))
			give_up("symlink %s", path);
		path_of(path, "%d/6", folder);
		if (truncate(path, (off_t)(size_of(6) / 2)))
			give_up("truncate %s", path);
	}
	sync();
	printf("%d files in %d folders\n", FOLDERS * FILES, FOLDERS);
	return PASS;
}

static int same(const char *path, size_t size)
{
	struct stat state;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || fstat(fd, &state)) {
		printf("%s: %s\n", path, strerror(errno));
		return 0;
	}
	if ((size_t)state.st_size != size) {
		printf("%s has %lld bytes, not %zu\n", path, (long long)state.st_size, size);
		close(fd);
		return 0;
	}
	if (size)
		read_all(fd, found, size, 0);
	close(fd);
	for (size_t at = 0; at < size; at++) {
		if (found[at] != made[at]) {
			printf("%s: byte %zu is 0x%02x, was written as 0x%02x\n", path, at, found[at], made[at]);
			return 0;
		}
	}
	return 1;
}

static int entries(const char *path)
{
	DIR *folder = opendir(path);
	int count = 0;

	if (!folder)
		give_up("%s", path);
	while (readdir(folder))
		count++;
	closedir(folder);
	return count - 2; /* . and .. */
}

/* Files-compare FOLDER SEED: what files-make left there, and nothing else. */
int files_compare_main(int argc, char **argv)
{
	(void)argc;
	uint64_t seed = number(argv[1]);
	char path[LONGEST];
	int compared = 0;

	if (chdir(argv[0]))
		give_up("%s", argv[0]);
	for (int folder = 0; folder < FOLDERS; folder++) {
		for (int file = 0; file < FILES; file++) {
			if (file == 4)
				continue;
			contents(seed, folder, file);
			path_of(path, file == 3 ? "%d/renamed" : "%d/%d", folder, file);
			if (!same(path, file == 6 ? size_of(6) / 2 : size_of(file)))
				return FAIL;
			compared++;
			if (file != 5)
				continue;
			for (const char *const *name = (const char *const[]){ "hard", "soft", NULL }; *name; name++) {
				path_of(path, "%d/%s", folder, *name);
				if (!same(path, size_of(file)))
					return FAIL;
				compared++;
			}
		}
		path_of(path, "%d", folder);
		if (entries(path) != FILES + 1) {
			printf("folder %s has %d entries, not %d\n", path, entries(path), FILES + 1);
			return FAIL;
		}
	}
	printf("%d files as they were written\n", compared);
	return PASS;
}
