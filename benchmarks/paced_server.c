/* A streaming chat server with exact pacing, to judge load generators against.
 *
 *   cc -O2 -o paced_server benchmarks/paced_server.c && ./paced_server PORT TTFT_MS ITL_MS
 *
 * Each POST gets max_tokens chunks: the first TTFT_MS after the request's last byte was read, the
 * others ITL_MS apart on an absolute schedule, then usage and [DONE]. Requests of one connection
 * are served one after another. Any GET answers with a Prometheus page: how many requests came, how
 * many were open at once, and by how much this server itself missed its own schedule.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 65536, READ_BYTES = 65536, ROUND = 512 };

struct connection {
    char *request;
    size_t filled, room;
    double started; /* 0 while idle */
    int asked, written;
    int prompt_tokens;
};

struct due {
    double at;
    int fd;
};

static struct connection connections[MAX_CONNECTIONS];
static struct due queue[MAX_CONNECTIONS]; /* binary heap, the earliest first */
static int queued;
static double ttft, itl;
static long requests, open_now, open_peak, tokens;
static double late_sum, late_max;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void queue_add(double at, int fd) {
    int child = queued++;
    while (child > 0 && queue[(child - 1) / 2].at > at) {
        queue[child] = queue[(child - 1) / 2];
        child = (child - 1) / 2;
    }
    queue[child] = (struct due){at, fd};
}

static struct due queue_take(void) {
    struct due first = queue[0], last = queue[--queued];
    int hole = 0;
    for (int child = 1; child < queued; child = 2 * hole + 1) {
        if (child + 1 < queued && queue[child + 1].at < queue[child].at) child++;
        if (queue[child].at >= last.at) break;
        queue[hole] = queue[child];
        hole = child;
    }
    queue[hole] = last;
    return first;
}

static void forget(int fd) {
    if (connections[fd].started > 0) open_now--;
    free(connections[fd].request);
    memset(&connections[fd], 0, sizeof connections[fd]);
    close(fd);
}

static bool write_all(int fd, const char *data, size_t size) {
    while (size > 0) {
        ssize_t written = send(fd, data, size, MSG_NOSIGNAL);
        if (written < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        if (written < 0) return false;
        data += written;
        size -= (size_t)written;
    }
    return true;
}

static size_t put_event(char *out, const char *json) {
    return (size_t)sprintf(out, "%zx\r\ndata: %s\n\n\r\n", strlen(json) + 8, json);
}

/* Write the next token of this connection; false where the client is gone. */
static bool write_token(int fd) {
    struct connection *c = &connections[fd];
    char out[2048], json[512];
    size_t size = 0;
    bool last = ++c->written == c->asked;
    if (c->written == 1)
        size += (size_t)sprintf(out, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                                     "Transfer-Encoding: chunked\r\n\r\n");
    sprintf(json, "{\"id\":\"paced\",\"object\":\"chat.completion.chunk\",\"created\":0,\"model\":\"paced\","
                  "\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word\"},\"finish_reason\":%s}]}",
            last ? "\"length\"" : "null");
    size += put_event(out + size, json);
    if (last) {
        sprintf(json, "{\"choices\":[],\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d}}",
                c->prompt_tokens, c->asked);
        size += put_event(out + size, json);
        size += put_event(out + size, "[DONE]");
        size += (size_t)sprintf(out + size, "0\r\n\r\n");
        c->started = 0;
        open_now--;
    }
    tokens++;
    return write_all(fd, out, size);
}

static void answer_page(int fd) {
    char page[512], out[700];
    int size = sprintf(page,
                       "paced_requests_total %ld\npaced_open_peak %ld\npaced_tokens_total %ld\n"
                       "paced_late_mean_seconds %.6f\npaced_late_max_seconds %.6f\n",
                       requests, open_peak, tokens, tokens ? late_sum / (double)tokens : 0, late_max);
    int head = sprintf(out, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", size, page);
    write_all(fd, out, (size_t)head);
}

static int words(const char *text) {
    int spaces = 0;
    for (; *text; text++) spaces += *text == ' ';
    return spaces;
}

/* Serve the request at the head of the buffer once it is whole. */
static void take_request(int fd) {
    struct connection *c = &connections[fd];
    c->request[c->filled] = 0;
    char *body = strstr(c->request, "\r\n\r\n");
    if (!body || c->started > 0) return;
    body += 4;
    char *length = strcasestr(c->request, "\r\ncontent-length:");
    size_t whole = (size_t)(body - c->request) + (length && length < body ? strtoul(length + 17, 0, 10) : 0);
    if (c->filled < whole) return;
    if (!strncmp(c->request, "GET", 3)) {
        answer_page(fd);
    } else {
        char *asked = strstr(body, "\"max_tokens\":");
        if (!asked) asked = strstr(body, "\"max_completion_tokens\":");
        c->asked = asked ? atoi(strchr(asked, ':') + 1) : 16;
        c->prompt_tokens = words(body);
        c->written = 0;
        c->started = seconds();
        requests++;
        if (++open_now > open_peak) open_peak = open_now;
        queue_add(c->started + ttft, fd);
    }
    memmove(c->request, c->request + whole, c->filled - whole);
    c->filled -= whole;
}

static void read_some(int fd) {
    struct connection *c = &connections[fd];
    if (c->room - c->filled < READ_BYTES) {
        c->room = c->filled + READ_BYTES;
        c->request = realloc(c->request, c->room + 1);
    }
    ssize_t got = recv(fd, c->request + c->filled, c->room - c->filled, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) {
        forget(fd);
        return;
    }
    c->filled += (size_t)got;
    take_request(fd);
}

/* Write every token that is due, at most one round of them before sockets are looked at again. */
static void write_due(void) {
    for (int n = 0; n < ROUND && queued && queue[0].at <= seconds(); n++) {
        struct due due = queue_take();
        struct connection *c = &connections[due.fd];
        double at = c->started + ttft + itl * c->written;
        if (!(c->started > 0) || at - due.at > 1e-6 || due.at - at > 1e-6) continue; /* a gone one's */
        double late = seconds() - due.at;
        late_sum += late;
        if (late > late_max) late_max = late;
        if (!write_token(due.fd))
            forget(due.fd);
        else if (c->started > 0)
            queue_add(due.at + itl, due.fd);
        else if (c->filled)
            take_request(due.fd);
    }
}

static void accept_all(int listener, int poll) {
    int one = 1, fd;
    while ((fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0) {
        if (fd >= MAX_CONNECTIONS) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
    }
}

int main(int count, char **arguments) {
    if (count != 4) {
        fprintf(stderr, "usage: paced_server PORT TTFT_MS ITL_MS\n");
        return 2;
    }
    ttft = atof(arguments[2]) / 1e3;
    itl = atof(arguments[3]) / 1e3;
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(arguments[1]))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("paced_server");
        return 1;
    }
    int poll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, ready[ROUND];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        double wait_ms = queued ? (queue[0].at - seconds()) * 1e3 : 1e3;
        int n = epoll_wait(poll, ready, ROUND, wait_ms <= 0 ? 0 : wait_ms < 1 ? 1 : (int)wait_ms);
        for (int i = 0; i < n; i++) {
            if (ready[i].data.fd == listener)
                accept_all(listener, poll);
            else
                read_some(ready[i].data.fd);
        }
        write_due();
    }
}
