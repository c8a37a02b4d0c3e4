/* A load generator for request/reply servers on a Unix socket: one epoll loop, one thread.
 *
 * It drives rustord (HTTP/1.1) and Redis (RESP) with the same code, so that neither is measured through a better client
 * than the other. Each connection keeps `depth` requests under way. A request is the bytes of the template file, in
 * which the id at `id_offset` is overwritten before each use. Connections are opened before the clock starts.
 *
 * usage: loadgen PROTOCOL SOCKET CONNECTIONS DEPTH SECONDS COUNT TEMPLATE ID_OFFSET IDS ORDER EXPECT SAVE
 *   PROTOCOL  http or resp
 *   SECONDS   stop asking after so long (0: no limit); COUNT: or after so many requests (0: no limit)
 *   TEMPLATE  file with one whole request; ID_OFFSET: where its id stands, -1 if it has none
 *   IDS       file of ids of one width, a line each
 *   ORDER     once (each id once, in order, then stop) or random (for ever)
 *   EXPECT    file with the body that each reply must carry, or -
 *   SAVE      file to write the 36 bytes behind "/v1/objects/" of each reply to, a line each, or -
 * Prints: operations errors seconds client_cpu_seconds p50_us p99_us
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { REPLY_MAX = 1 << 20, CONNECTIONS_MAX = 1024 };

struct connection {
    int fd;
    unsigned under_way, oldest; /* requests without a reply; index of the oldest one in sent_ns */
    uint64_t *sent_ns;
    size_t filled;              /* bytes in `in` */
    char *in, *out;             /* `out`: depth copies of the template, one behind the other */
};

static int is_http, random_order;
static unsigned depth;
static uint64_t count_max, deadline_ns, asked, answered, errors, id_next, id_count, seed = 88172645463325252u;
static char *template, *ids, *expected;
static size_t template_size, ids_size, expected_size, id_width;
static long id_offset;
static uint32_t *latency_us;
static size_t latency_room;
static FILE *save;

static void fail(const char *what) { perror(what); exit(1); }

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static char *load(const char *path, size_t *size)
{
    struct stat st;
    FILE *file = fopen(path, "rb");
    if (!file || fstat(fileno(file), &st)) fail(path);
    char *data = malloc((size_t)st.st_size + 1);
    if (!data || fread(data, 1, (size_t)st.st_size, file) != (size_t)st.st_size) fail(path);
    fclose(file);
    *size = (size_t)st.st_size;
    return data;
}

/* Puts the next id into a request; 0 when there is none left. */
static int set_id(char *request)
{
    if (id_offset < 0) return 1;
    if (!random_order && id_next == id_count) return 0;
    uint64_t index = id_next++;
    if (random_order) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17; /* xorshift64 */
        index = seed % id_count;
    }
    memcpy(request + id_offset, ids + index * (id_width + 1), id_width);
    return 1;
}

/* Asks again until `depth` requests are under way, all in one send; stops at the end of time, count or ids. */
static void ask(struct connection *c, uint64_t now)
{
    unsigned more = 0;
    while (c->under_way < depth && (!count_max || asked < count_max) && (!deadline_ns || now < deadline_ns)
           && set_id(c->out + more * template_size)) {
        c->sent_ns[(c->oldest + c->under_way++) % depth] = now;
        asked++, more++;
    }
    for (size_t done = 0; done < more * template_size;) {
        ssize_t sent = send(c->fd, c->out + done, more * template_size - done, MSG_NOSIGNAL);
        if (sent < 0) fail("send");
        done += (size_t)sent;
    }
}

/* The length of the reply at the start of data, 0 if it is not complete; its body, and whether it says success. */
static size_t http_reply(char *data, size_t size, char **body, size_t *body_size, int *good)
{
    char *end = memmem(data, size, "\r\n\r\n", 4);
    if (!end) return 0;
    *good = size > 9 && data[9] == '2';
    *body = end + 4, *body_size = 0;
    for (char *line = memchr(data, '\n', size) + 1; line < end; line = (char *)memchr(line, '\n', size) + 1)
        if (!strncasecmp(line, "content-length:", 15)) *body_size = strtoul(line + 15, NULL, 10);
    size_t whole = (size_t)(*body - data) + *body_size;
    return whole <= size ? whole : 0;
}

static size_t resp_reply(char *data, size_t size, char **body, size_t *body_size, int *good)
{
    char *end = memmem(data, size, "\r\n", 2);
    if (!end) return 0;
    long value = strtol(data + 1, NULL, 10);
    *good = data[0] == '+' || (data[0] == ':' && value > 0) || (data[0] == '$' && value >= 0);
    *body = end + 2, *body_size = data[0] == '$' && value > 0 ? (size_t)value : 0;
    size_t whole = (size_t)(*body - data) + (data[0] == '$' && value >= 0 ? *body_size + 2 : 0);
    return whole <= size ? whole : 0;
}

static void account(struct connection *c, char *reply, size_t size, uint64_t now)
{
    if (answered == latency_room) {
        latency_room = latency_room ? 2 * latency_room : 1 << 20;
        if (!(latency_us = realloc(latency_us, latency_room * sizeof *latency_us))) fail("realloc");
    }
    latency_us[answered++] = (uint32_t)((now - c->sent_ns[c->oldest]) / 1000);
    c->oldest = (c->oldest + 1) % depth;
    c->under_way--;
    if (save) {
        char *id = memmem(reply, size, "/v1/objects/", 12);
        if (id && id + 12 + 36 <= reply + size) fprintf(save, "%.36s\n", id + 12);
        else errors++;
    }
}

static void receive(struct connection *c)
{
    ssize_t got = recv(c->fd, c->in + c->filled, REPLY_MAX - c->filled, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) { errno = got ? errno : ECONNRESET; fail("recv"); }
    c->filled += (size_t)got;
    uint64_t now = now_ns();
    size_t used = 0, whole, body_size;
    char *body;
    int good;
    while (c->under_way
           && (whole = (is_http ? http_reply : resp_reply)(c->in + used, c->filled - used, &body, &body_size, &good))) {
        if (!good || (expected && (body_size != expected_size || memcmp(body, expected, body_size)))) {
            if (!errors++) fprintf(stderr, "first bad reply: %.*s\n", (int)(whole < 400 ? whole : 400), c->in + used);
        }
        account(c, c->in + used, whole, now);
        used += whole;
    }
    if (c->filled == REPLY_MAX && !used) { errno = EMSGSIZE; fail("reply"); }
    memmove(c->in, c->in + used, c->filled -= used);
    ask(c, now);
}

static void dial(struct connection *c, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int room = 4 << 20;
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(c->fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&address, sizeof address)) fail(path);
    c->in = malloc(REPLY_MAX + 1), c->out = malloc(depth * template_size), c->sent_ns = calloc(depth, sizeof(uint64_t));
    for (unsigned i = 0; i < depth; i++) memcpy(c->out + i * template_size, template, template_size);
}

static int by_value(const void *a, const void *b)
{
    return (*(const uint32_t *)a > *(const uint32_t *)b) - (*(const uint32_t *)a < *(const uint32_t *)b);
}

int main(int argc, char **argv)
{
    static struct connection connections[CONNECTIONS_MAX];
    static struct epoll_event events[CONNECTIONS_MAX];
    if (argc != 13) { fprintf(stderr, "usage: see loadgen.c\n"); return 2; }
    is_http = !strcmp(argv[1], "http");
    unsigned connection_count = (unsigned)atoi(argv[3]);
    if (connection_count > CONNECTIONS_MAX) { fprintf(stderr, "at most %d connections\n", CONNECTIONS_MAX); return 2; }
    depth = (unsigned)atoi(argv[4]);
    count_max = strtoull(argv[6], NULL, 10);
    template = load(argv[7], &template_size);
    id_offset = atol(argv[8]);
    if (id_offset >= 0) {
        ids = load(argv[9], &ids_size);
        id_width = (size_t)(strchr(ids, '\n') - ids);
        id_count = ids_size / (id_width + 1);
    }
    random_order = !strcmp(argv[10], "random");
    if (strcmp(argv[11], "-")) expected = load(argv[11], &expected_size);
    if (strcmp(argv[12], "-") && !(save = fopen(argv[12], "w"))) fail(argv[12]);

    int poll = epoll_create1(EPOLL_CLOEXEC);
    for (unsigned i = 0; i < connection_count; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &connections[i]};
        dial(&connections[i], argv[2]);
        epoll_ctl(poll, EPOLL_CTL_ADD, connections[i].fd, &event);
    }
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    uint64_t start_ns = now_ns();
    if (atof(argv[5]) > 0) deadline_ns = start_ns + (uint64_t)(atof(argv[5]) * 1e9);
    for (unsigned i = 0; i < connection_count; i++) ask(&connections[i], now_ns());
    while (answered < asked) {
        int ready = epoll_wait(poll, events, CONNECTIONS_MAX, 60000);
        if (ready <= 0) { errno = ready ? errno : ETIMEDOUT; fail("waiting for a reply"); }
        for (int i = 0; i < ready; i++) receive(events[i].data.ptr);
    }
    double seconds = (double)(now_ns() - start_ns) / 1e9;
    getrusage(RUSAGE_SELF, &after);
    double cpu = (double)(after.ru_utime.tv_sec + after.ru_stime.tv_sec - before.ru_utime.tv_sec - before.ru_stime.tv_sec)
        + (double)(after.ru_utime.tv_usec + after.ru_stime.tv_usec - before.ru_utime.tv_usec - before.ru_stime.tv_usec) / 1e6;
    if (save && fclose(save)) fail(argv[12]);
    qsort(latency_us, answered, sizeof *latency_us, by_value);
    printf("%llu %llu %.6f %.6f %u %u\n", (unsigned long long)answered, (unsigned long long)errors, seconds, cpu,
           answered ? latency_us[answered / 2] : 0, answered ? latency_us[answered * 99 / 100] : 0);
    return 0;
}
