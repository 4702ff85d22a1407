/*
 * The client of the MMIO benchmark, the same for every server: reads 4 bytes of BAR0 over and over, one at a time.
 *
 *   mmio_client SOCKET COUNT      prints the nanoseconds of each round trip, one a line
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

struct header {
    uint16_t id, command;
    uint32_t size, flags, error;
};

struct read_request {
    struct header header;
    uint64_t offset;
    uint32_t region, count;
};

struct read_reply {
    struct read_request request;
    uint32_t value;
} __attribute__((packed));

static void
fail(const char *what)
{
    perror(what);
    exit(1);
}

static void
receive(int fd, void *buffer, size_t size)
{
    if (recv(fd, buffer, size, MSG_WAITALL) != (ssize_t)size) {
        fail("mmio_client: receive");
    }
}

static int64_t
now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

int
main(int argc, char **argv)
{
    static const struct {
        struct header header;
        uint16_t major, minor;
        char capabilities[3];
    } __attribute__((packed)) version = { { 0, 1, sizeof(version), 0, 0 }, 0, 0, "{}" };
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    struct read_request request = { { 1, 9, sizeof(request), 0, 0 }, 0, 0, 4 };
    struct read_reply reply;
    char skipped[4096];
    int64_t *taken;
    long count;
    int fd;

    if (argc != 3 || strlen(argv[1]) >= sizeof(address.sun_path) || (count = atol(argv[2])) < 1) {
        fprintf(stderr, "usage: %s SOCKET COUNT\n", argv[0]);
        return 2;
    }
    strcpy(address.sun_path, argv[1]);
    taken = calloc((size_t)count, sizeof(*taken));
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (taken == NULL || fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        fail("mmio_client: connect");
    }
    if (send(fd, &version, sizeof(version), 0) != (ssize_t)sizeof(version)) {
        fail("mmio_client: send");
    }
    receive(fd, &reply.request.header, sizeof(reply.request.header));
    if (reply.request.header.error != 0 || reply.request.header.size > sizeof(skipped)) {
        fprintf(stderr, "mmio_client: the server refused the version\n");
        return 1;
    }
    receive(fd, skipped, reply.request.header.size - sizeof(reply.request.header));
    for (long i = 0; i < count; i++) {
        int64_t start = now();

        request.header.id = (uint16_t)i;
        if (send(fd, &request, sizeof(request), 0) != (ssize_t)sizeof(request)) {
            fail("mmio_client: send");
        }
        receive(fd, &reply, sizeof(reply));
        taken[i] = now() - start;
        if (reply.request.header.error != 0 || reply.request.header.id != request.header.id) {
            fprintf(stderr, "mmio_client: round trip %ld failed\n", i);
            return 1;
        }
    }
    for (long i = 0; i < count; i++) {
        printf("%lld\n", (long long)taken[i]);
    }
    close(fd);
    free(taken);
    return 0;
}
