/* The synthetic load generator of the XBZRLE documentation, with its buffer in a shared file. */
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    int fd = argc > 1 ? open(argv[1], O_RDWR | O_CREAT, 0600) : -1;
    if (fd < 0 || ftruncate(fd, 4096 * 4096) != 0)
        return 1;
    char *buf = mmap(NULL, 4096 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (buf == MAP_FAILED)
        return 1;
    for (;;) {
        int i;
        for (i = 0; i < 4096 * 4; i++)
            buf[i * 4096 / 4]++;
        printf(".");
    }
}
