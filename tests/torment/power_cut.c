/* Shuts down the file system at a path as a power cut would: what is not on its disk now never gets there. Built and
 * used by helpers.rs. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>

#define SHUTDOWN _IOR('X', 125, uint32_t) /* EXT4_IOC_SHUTDOWN */

int main(int count, char **words)
{
    uint32_t without_flush = 2; /* EXT4_GOING_FLAGS_NOLOGFLUSH */
    int fd = count == 2 ? open(words[1], O_RDONLY) : -1;

    if (fd < 0 || ioctl(fd, SHUTDOWN, &without_flush) != 0) {
        perror(count == 2 ? words[1] : "usage: power_cut DIRECTORY");
        return 1;
    }
    return 0;
}
