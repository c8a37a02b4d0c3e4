/* An NBD client that reads and does nothing with what it gets, so that a server is measured and not the client.
 *
 * It asks for `depth` pieces in one send, takes all replies, and asks again.
 *
 * usage: nbdclient SOCKET EXPORT DEPTH BYTES SECONDS SIZE ORDER
 *   BYTES  of each read; SIZE: of the export, in bytes
 *   ORDER  random or sequential; or flushing: random, one piece after the other, while on the same connection pieces are
 *          written and flushed, also one after the other, as a file system's journal does
 * Prints: reads seconds
 */
#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { READ, WRITE, FLUSH = 3 };
enum { GO = 7, ACK = 1, DEPTH_MAX = 1024, READ_MAX = 32 << 20 };

struct __attribute__((packed)) option { uint64_t magic; uint32_t number, length; };
struct __attribute__((packed)) option_reply { uint64_t magic; uint32_t number, kind, length; };
struct __attribute__((packed)) request { uint32_t magic; uint16_t flags, kind; uint64_t cookie, offset; uint32_t length; };
struct __attribute__((packed)) reply { uint32_t magic, error; uint64_t cookie; };

static void fail(const char *what) { perror(what); exit(1); }

static void take(int fd, void *data, size_t size)
{
    if (!size) return; /* recv would wait for something to come */
    ssize_t got = recv(fd, data, size, MSG_WAITALL);
    if (got != (ssize_t)size) { if (got >= 0) errno = ECONNRESET; fail("recv"); }
}

static void say(int fd, const void *data, size_t size)
{
    if (send(fd, data, size, MSG_NOSIGNAL) != (ssize_t)size) fail("send");
}

/* Connects, and chooses an export. */
static int open_export(const char *path, const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) fail(path);
    char greeting[18];
    take(fd, greeting, sizeof greeting);
    uint32_t flags = htobe32(3), name_length = htobe32((uint32_t)strlen(name));
    say(fd, &flags, sizeof flags);
    struct option go = {htobe64(0x49484156454F5054), htobe32(GO), htobe32((uint32_t)strlen(name) + 6)};
    say(fd, &go, sizeof go);
    say(fd, &name_length, sizeof name_length);
    say(fd, name, strlen(name));
    say(fd, "\0", 2); /* no information is asked for */
    for (;;) {
        struct option_reply told;
        char data[4096];
        take(fd, &told, sizeof told);
        if (be32toh(told.length) > sizeof data) { errno = EPROTO; fail(name); }
        take(fd, data, be32toh(told.length));
        if (be32toh(told.kind) == ACK) return fd;
        if (be32toh(told.kind) >> 31) { errno = ENOENT; fail(name); }
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint64_t random_piece(uint64_t pieces)
{
    static uint64_t seed = 88172645463325252u;
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17; /* xorshift64 */
    return seed % pieces;
}

/* The cookie of the next reply. */
static uint64_t take_reply(int fd)
{
    struct reply head;
    take(fd, &head, sizeof head);
    if (be32toh(head.magic) != 0x67446698 || head.error) { errno = EPROTO; fail("a reply"); }
    return head.cookie;
}

/* One request, whose cookie is its kind. */
static void ask(int fd, uint16_t kind, uint64_t offset, uint32_t length)
{
    struct request asked = {htobe32(0x25609513), 0, htobe16(kind), kind, htobe64(offset), htobe32(length)};
    say(fd, &asked, sizeof asked);
}

/* How many reads were answered beside writes that are flushed. */
static uint64_t read_beside_flushes(int fd, char *data, uint32_t length, uint64_t pieces, double end)
{
    uint64_t count = 0;
    ask(fd, READ, random_piece(pieces) * length, length);
    ask(fd, FLUSH, 0, 0);
    while (now() < end) {
        switch (take_reply(fd)) {
        case READ:
            take(fd, data, length);
            count++;
            ask(fd, READ, random_piece(pieces) * length, length);
            break;
        case WRITE:
            ask(fd, FLUSH, 0, 0);
            break;
        default:
            ask(fd, WRITE, random_piece(pieces) * length, length);
            say(fd, data, length);
        }
    }
    for (int left = 2; left; left--) /* a server that finds nobody to reply to may be gone for the next client */
        if (take_reply(fd) == READ) take(fd, data, length);
    return count;
}

int main(int argc, char **argv)
{
    static struct request requests[DEPTH_MAX];
    if (argc != 8) { fprintf(stderr, "usage: see nbdclient.c\n"); return 2; }
    unsigned depth = (unsigned)atoi(argv[3]), length = (unsigned)atoi(argv[4]);
    uint64_t pieces = strtoull(argv[6], NULL, 10) / length, piece = 0, count = 0;
    int in_order = !strcmp(argv[7], "sequential");
    if (depth > DEPTH_MAX || length > READ_MAX) { fprintf(stderr, "too much\n"); return 2; }
    char *data = calloc(1, length);
    int fd = open_export(argv[1], argv[2]);
    double start = now(), end = start + atof(argv[5]);
    if (!strcmp(argv[7], "flushing")) count = read_beside_flushes(fd, data, length, pieces, end);
    while (now() < end) {
        for (unsigned i = 0; i < depth; i++) {
            piece = in_order ? (piece + 1) % pieces : random_piece(pieces);
            requests[i] = (struct request){htobe32(0x25609513), 0, READ, i, htobe64(piece * length), htobe32(length)};
        }
        say(fd, requests, depth * sizeof *requests);
        for (unsigned i = 0; i < depth; i++) {
            take_reply(fd);
            take(fd, data, length);
        }
        count += depth;
    }
    printf("%llu %.6f\n", (unsigned long long)count, now() - start);
    return 0;
}
