/* Preloaded into a member: the next sync of a log segment fails once the file named by TORMENT_FAIL is there, and takes
 * that file away, so that it fails only once. Built and used by helpers.rs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(int fd)
{
    char link[64], path[4096];
    const char *trigger = getenv("TORMENT_FAIL");
    ssize_t length;

    if (!trigger)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length < 4 || memcmp(path + length - 4, ".wal", 4) != 0)
        return 0;
    return unlink(trigger) == 0;
}

int fdatasync(int fd)
{
    static int (*real)(int);

    if (fails(fd)) {
        errno = EIO;
        return -1;
    }
    if (!real)
        real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return real(fd);
}

int fsync(int fd)
{
    static int (*real)(int);

    if (fails(fd)) {
        errno = EIO;
        return -1;
    }
    if (!real)
        real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return real(fd);
}
