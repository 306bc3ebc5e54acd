/* Connections, TLS and the event loop. What is written during one turn of the loop goes out in one write each. */
#define _GNU_SOURCE
#include "loadgen.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define READ_SIZE (256 * 1024)
#define MAX_EVENTS 512
#define STALLED (40 * SECOND) /* no session came up or failed for so long: give up */
#define TOLD_FAILURES 8       /* on standard error; the rest are only counted */

struct counters count;
struct conn *conns;
uint64_t loop_time;
void (*on_mark)(struct conn *c, struct mark mark);
uint64_t (*on_tick)(uint64_t now);

static SSL_CTX *tls_context;
static int poller;
static struct conn **to_flush;
static int to_flush_count;
static uint64_t last_read;
static bool closing; /* we end the sessions ourselves: a closed connection is no failure */
static char read_buffer[MARK_LENGTH + READ_SIZE]; /* in front: room for a mark cut by the read before */

void net_init(void) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (files.rlim_cur < (rlim_t)opt.users + 16)
        die("%d sessions need as many open files; the limit is %llu (ulimit -n)", opt.users, (unsigned long long)files.rlim_cur);

    tls_context = SSL_CTX_new(TLS_client_method());
    if (!tls_context) die("TLS: no context");
    SSL_CTX_set_verify(tls_context, SSL_VERIFY_NONE, NULL);
    SSL_CTX_set_mode(tls_context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_read_ahead(tls_context, 1);
    SSL_CTX_set_session_cache_mode(tls_context, SSL_SESS_CACHE_OFF); /* every handshake is a whole one */

    poller = epoll_create1(0);
    if (poller < 0) die("epoll: %s", strerror(errno));
    bool same = !strcmp(opt.layout, "same");
    conns = allocate((size_t)opt.users * sizeof *conns);
    to_flush = allocate((size_t)opt.users * sizeof *to_flush);
    for (int i = 0; i < opt.users; i++) {
        conns[i].fd = -1;
        conns[i].user = opt.first_user + i;
        conns[i].target = &targets[(same ? i / 2 : i) % target_count]; /* users 0 and 1 are a pair, 2 and 3 are ... */
    }
}

/* ---- one connection ---- */

void conn_open(struct conn *c) {
    int yes = 1;
    struct epoll_event watch = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket: %s", strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    c->state = CONNECTING;
    c->want_write = true;
    c->started = now_ns();
    count.in_progress++;
    if (connect(c->fd, (const struct sockaddr *)c->target, sizeof *c->target) < 0 && errno != EINPROGRESS) {
        conn_failed(c, strerror(errno));
        return;
    }
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &watch);
}

void conn_close(struct conn *c) {
    if (c->ssl) SSL_free(c->ssl);
    ERR_clear_error(); /* one connection's TLS error must not be taken for the next one's */
    if (c->fd >= 0) close(c->fd); /* which takes it out of epoll as well */
    free(c->in);
    c->ssl = NULL;
    c->in = NULL;
    c->in_length = c->in_capacity = 0;
    c->fd = -1;
    c->state = DEAD;
    c->out_length = c->out_done = 0;
}

void conn_failed(struct conn *c, const char *why) {
    static int told;
    if (c->state == DEAD) return;
    if (!closing && told++ < TOLD_FAILURES) {
        size_t from = c->in_length > 400 ? c->in_length - 400 : 0;
        fprintf(stderr, "loadgen: u%05d: %s, in state %d. Last input: %s\n", c->user, why, c->state, c->in ? c->in + from : "(none)");
    }
    if (c->state != READY) {
        count.failed++;
        count.in_progress--;
    } else if (!closing) {
        count.closed_early++;
    }
    conn_close(c);
}

void conn_ready(struct conn *c) {
    c->state = READY;
    c->login_ns = now_ns() - c->started;
    count.in_progress--;
    count.ready++;
    free(c->in);
    c->in = NULL;
    c->in_length = c->in_capacity = 0;
}

static void watch_write(struct conn *c, bool on) {
    struct epoll_event watch = {.events = EPOLLIN | (on ? EPOLLOUT : 0), .data.ptr = c};
    if (c->want_write == on) return;
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &watch);
    c->want_write = on;
}

/* ---- TLS ---- */

static void continue_handshake(struct conn *c) {
    int result = SSL_do_handshake(c->ssl);
    if (result == 1) {
        c->tls_up = true;
        watch_write(c, false);
        login_tls_done(c);
        return;
    }
    switch (SSL_get_error(c->ssl, result)) {
    case SSL_ERROR_WANT_READ: watch_write(c, false); break;
    case SSL_ERROR_WANT_WRITE: watch_write(c, true); break;
    default: conn_failed(c, "TLS handshake failed");
    }
}

void conn_start_tls(struct conn *c) {
    static const unsigned char alpn[] = "\x0bxmpp-client"; /* XEP-0368; harmless with STARTTLS */
    c->ssl = SSL_new(tls_context);
    SSL_set_fd(c->ssl, c->fd);
    SSL_set_tlsext_host_name(c->ssl, opt.host);
    SSL_set_alpn_protos(c->ssl, alpn, sizeof alpn - 1);
    SSL_set_connect_state(c->ssl);
    c->state = HANDSHAKE;
    continue_handshake(c);
}

/* ---- writing ---- */

void send_bytes(struct conn *c, const char *data, size_t length) {
    if (c->state == DEAD || c->state == UNUSED) return;
    if (c->out_length + length > c->out_capacity) {
        memmove(c->out, c->out + c->out_done, c->out_length - c->out_done);
        c->out_length -= c->out_done;
        c->out_done = 0;
        if (c->out_length + length > c->out_capacity) {
            c->out_capacity = 2 * (c->out_length + length);
            c->out = realloc(c->out, c->out_capacity);
            if (!c->out) die("out of memory");
        }
    }
    memcpy(c->out + c->out_length, data, length);
    c->out_length += length;
    if (!c->queued) {
        c->queued = true;
        to_flush[to_flush_count++] = c;
    }
}

void send_format(struct conn *c, const char *format, ...) {
    char text[4096];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (length < 0 || (size_t)length >= sizeof text) die("stanza too long");
    send_bytes(c, text, (size_t)length);
}

static void flush(struct conn *c) {
    if (c->state == CONNECTING || c->state == HANDSHAKE) return;
    while (c->out_done < c->out_length) {
        const char *data = c->out + c->out_done;
        size_t length = c->out_length - c->out_done;
        ssize_t sent;
        bool later;
        if (c->tls_up) {
            sent = SSL_write(c->ssl, data, (int)length);
            int error = sent > 0 ? 0 : SSL_get_error(c->ssl, (int)sent);
            later = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
        } else {
            sent = send(c->fd, data, length, MSG_NOSIGNAL);
            later = sent < 0 && (errno == EAGAIN || errno == EINTR);
        }
        if (sent <= 0) {
            if (later) watch_write(c, true);
            else conn_failed(c, "write failed");
            return;
        }
        count.writes++;
        count.bytes_out += (uint64_t)sent;
        c->out_done += (size_t)sent;
    }
    c->out_length = c->out_done = 0;
    watch_write(c, false);
}

void flush_all(void) {
    for (int i = 0; i < to_flush_count; i++) {
        struct conn *c = to_flush[i];
        c->queued = false;
        if (c->fd >= 0) flush(c);
    }
    to_flush_count = 0;
}

/* ---- reading ---- */

/* `data` lies in read_buffer, so there is room in front of it for the piece carried over. */
static void scan_for_marks(struct conn *c, char *data, size_t length) {
    char *at = data - c->carry_length, *end = data + length;
    memcpy(at, c->carry, (size_t)c->carry_length);
    c->carry_length = 0;
    while ((at = memchr(at, '~', (size_t)(end - at)))) {
        struct mark mark;
        if (end - at < MARK_LENGTH) {
            c->carry_length = (int)(end - at);
            memcpy(c->carry, at, (size_t)c->carry_length);
            return;
        }
        if (!read_mark(at, &mark)) {
            at++;
            continue;
        }
        if (on_mark) on_mark(c, mark);
        if (c->state != READY) return;
        at += MARK_LENGTH;
    }
}

/* One read. Returns false when there is nothing more for now, or the connection is gone. */
static bool read_once(struct conn *c) {
    char *data = read_buffer + MARK_LENGTH;
    ssize_t length;
    bool later;
    if (c->tls_up) {
        length = SSL_read(c->ssl, data, READ_SIZE);
        int error = length > 0 ? 0 : SSL_get_error(c->ssl, (int)length);
        later = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
    } else {
        length = recv(c->fd, data, READ_SIZE, 0);
        later = length < 0 && (errno == EAGAIN || errno == EINTR);
    }
    if (length <= 0) {
        if (!later) conn_failed(c, "the server closed the connection");
        return false;
    }
    count.reads++;
    count.bytes_in += (uint64_t)length;
    if (c->managing) acks_input(c, data, (size_t)length);
    if (c->state == READY) scan_for_marks(c, data, (size_t)length);
    else login_input(c, data, (size_t)length);
    if (c->state == DEAD || c->state == HANDSHAKE) return false;
    return c->tls_up || length == READ_SIZE; /* TLS may hold more that epoll does not see */
}

static void on_event(struct conn *c, uint32_t events) {
    if (c->fd < 0) return;
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) conn_failed(c, strerror(error));
        else if (events & EPOLLOUT) {
            watch_write(c, false);
            login_begin(c);
        }
        return;
    }
    if (c->state == HANDSHAKE) {
        continue_handshake(c);
        if (c->state == HANDSHAKE || c->state == DEAD) return;
    }
    if (events & EPOLLOUT) flush(c);
    if (c->fd >= 0 && events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        while (read_once(c)) {}
}

/* ---- the loop ---- */

void loop_once(uint64_t deadline) {
    static struct epoll_event events[MAX_EVENTS];
    loop_time = now_ns();
    if (on_tick) {
        uint64_t next = on_tick(loop_time);
        if (next < deadline) deadline = next;
    }
    if (opt.ack > 0) {
        uint64_t next = acks_due(loop_time);
        if (next < deadline) deadline = next;
    }
    flush_all();
    uint64_t now = now_ns(), wait = deadline > now ? deadline - now : 0, before = count.bytes_in;
    struct timespec timeout = {.tv_sec = (time_t)(wait / SECOND), .tv_nsec = (long)(wait % SECOND)};
    int ready = epoll_pwait2(poller, events, MAX_EVENTS, &timeout, NULL);
    loop_time = now_ns();
    for (int i = 0; i < ready; i++) on_event(events[i].data.ptr, events[i].events);
    if (count.bytes_in != before) last_read = loop_time;
    flush_all();
}

void run_for(uint64_t ns) {
    uint64_t end = now_ns() + ns;
    while (now_ns() < end) loop_once(end);
}

void run_until_quiet(uint64_t quiet_ns, uint64_t at_most_ns) {
    uint64_t end = now_ns() + at_most_ns;
    last_read = now_ns();
    while (now_ns() < end && now_ns() - last_read < quiet_ns) loop_once(now_ns() + 50 * MILLISECOND);
}

static int next_to_open, at_one_time;

static uint64_t open_more(uint64_t now) {
    (void)now;
    while (next_to_open < opt.users && count.in_progress < at_one_time) conn_open(&conns[next_to_open++]);
    return UINT64_MAX;
}

void bring_up(int concurrency) {
    int done = 0;
    uint64_t progress = now_ns();
    at_one_time = concurrency;
    on_tick = open_more;
    while (count.ready + count.failed < opt.users) {
        loop_once(now_ns() + 200 * MILLISECOND);
        if (count.ready + count.failed != done) {
            done = count.ready + count.failed;
            progress = now_ns();
        } else if (now_ns() - progress > STALLED) {
            fprintf(stderr, "loadgen: stalled at %d of %d sessions\n", done, opt.users);
            for (int i = 0; i < opt.users; i++)
                if (conns[i].fd >= 0 && conns[i].state != READY) conn_failed(&conns[i], "stalled");
            count.failed = opt.users - count.ready; /* those that were never tried as well */
        }
    }
    on_tick = NULL;
}

void close_all(void) {
    closing = true;
    for (int i = 0; i < opt.users; i++)
        if (conns[i].state == READY) send_bytes(&conns[i], "</stream:stream>", 16);
    run_for(200 * MILLISECOND); /* servers answer, and clean up before the next run */
    for (int i = 0; i < opt.users; i++)
        if (conns[i].fd >= 0) conn_close(&conns[i]);
}
