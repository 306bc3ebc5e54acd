/* What is measured. Each scenario marks its phases for the driver and prints one result. */
#define _GNU_SOURCE
#include "loadgen.h"

#include <stdio.h>
#include <string.h>

#define DRAIN (15 * SECOND) /* for messages still under way when the measuring ends */

static struct histogram latency;
static uint64_t began; /* marks count from here */

/* ---- phases ---- */

struct sample {
    double time, cpu; /* s */
    struct counters count;
};

/* Lets the driver sample the server, then samples ourselves. */
static struct sample phase(const char *name) {
    char answer[16];
    flush_all();
    printf("PHASE %s\n", name);
    fflush(stdout);
    if (!fgets(answer, sizeof answer, stdin)) die("the driver is gone");
    return (struct sample){.time = (double)now_ns() * 1e-9, .cpu = cpu_seconds(), .count = count};
}

static void print_common(struct sample from, struct sample until) {
    double wall = until.time - from.time, cpu = until.cpu - from.cpu;
    printf("\"sessions\":%d,\"failed\":%d,\"closed_early\":%d,\"wall_s\":%.3f,\"generator_cpu_s\":%.3f,\"generator_cores\":%.3f",
           count.ready, count.failed, count.closed_early, wall, cpu, wall > 0 ? cpu / wall : 0);
}

/* ---- chat: pairs of users write to each other ---- */

static struct {
    uint64_t sent, received, bounced;               /* from first to last */
    uint64_t sent_measured, received_measured;      /* while measuring */
    bool sending, refilling, measuring;
    uint64_t first_due, due_count;                  /* with a rate */
    uint64_t stride;
} chat;

static struct conn *peer_of(const struct conn *c) {
    return &conns[(c - conns) ^ 1];
}

static void encode_message(struct conn *c) {
    static const char text[] = "lorem ipsum dolor sit amet ";
    char buffer[8192], to[128];
    snprintf(to, sizeof to, "u%05d@%s%s", peer_of(c)->user, opt.host, !strcmp(opt.to, "full") ? "/loadgen" : "");
    size_t length = (size_t)snprintf(buffer, sizeof buffer, "<message to='%s' type='chat' id='", to);
    c->id_at = length;
    length += (size_t)sprintf(buffer + length, "00000000'><body>");
    c->mark_at = length;
    length += MARK_LENGTH;
    for (int i = MARK_LENGTH; i < opt.body; i++) buffer[length++] = text[(size_t)i % (sizeof text - 1)];
    length += (size_t)sprintf(buffer + length, "</body></message>");
    c->stanza = allocate(length);
    memcpy(c->stanza, buffer, length);
    c->stanza_length = length;
}

static void send_message(struct conn *c, uint64_t due) {
    c->number++;
    put_hex8(c->stanza + c->id_at, c->number);
    put_mark(c->stanza + c->mark_at,
             (struct mark){.kind = 'm', .user = (uint32_t)peer_of(c)->user, .number = c->number, .time = due - began});
    send_bytes(c, c->stanza, c->stanza_length);
    chat.sent++;
    if (chat.measuring) chat.sent_measured++;
}

static void on_chat(struct conn *c, struct mark mark) {
    if (mark.kind != 'm') return;
    if (mark.user != (uint32_t)c->user) { /* our own, returned with an error */
        chat.bounced++;
        return;
    }
    chat.received++;
    if (chat.measuring) {
        chat.received_measured++;
        histogram_add(&latency, loop_time - began - mark.time);
    }
    /* The one who sent this sends the next: each direction keeps its own window. If the receiver answered instead, the
     * messages of both would come to travel together, and servers would be spared half of the reads and writes. */
    if (chat.refilling && peer_of(c)->state == READY) send_message(peer_of(c), loop_time);
}

/* With a rate, messages are sent by the clock whatever the server does, and their latency counts from when they were
 * due: a server that stands still for a second cannot hide it by getting fewer messages to answer. */
static uint64_t send_what_is_due(uint64_t now) {
    if (!chat.sending) return UINT64_MAX;
    for (;;) {
        uint64_t due = chat.first_due + (uint64_t)((double)chat.due_count * 1e9 / opt.rate);
        if (due > now) return due;
        struct conn *c = &conns[chat.due_count++ * chat.stride % (uint64_t)opt.users];
        if (c->state == READY) send_message(c, due);
    }
}

/* A step that visits every user before any of them twice, without going through them in the order of their logins. */
static uint64_t stride_over(uint64_t users) {
    for (uint64_t step = (uint64_t)((double)users * 0.618) | 1;; step += 2) {
        uint64_t a = step, b = users;
        while (b) {
            uint64_t rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1) return step;
    }
}

void scenario_chat(void) {
    if (opt.users < 2 || opt.users % 2) die("chat needs pairs of users");
    for (int i = 0; i < opt.users; i++) encode_message(&conns[i]);
    bring_up(opt.concurrency);
    if (count.ready < opt.users) fprintf(stderr, "loadgen: %d sessions failed\n", count.failed);
    if (count.ready < 2) die("no sessions");
    run_until_quiet(SECOND / 2, 5 * SECOND); /* presence of all these logins, old offline messages */

    on_mark = on_chat;
    began = loop_time = now_ns();
    chat.sending = true;
    if (opt.rate > 0) {
        chat.first_due = began;
        chat.stride = stride_over((uint64_t)opt.users);
        on_tick = send_what_is_due;
    } else {
        chat.refilling = true;
        for (int i = 0; i < opt.users; i++)
            for (int k = 0; k < opt.window && conns[i].state == READY && peer_of(&conns[i])->state == READY; k++)
                send_message(&conns[i], began);
    }
    run_for((uint64_t)(opt.warm * 1e9));
    struct sample start = phase("start");
    chat.measuring = true;
    run_for((uint64_t)(opt.time * 1e9));
    chat.measuring = false;
    struct sample end = phase("end");
    chat.sending = chat.refilling = false;
    on_tick = NULL;
    for (uint64_t limit = now_ns() + DRAIN; chat.received + chat.bounced < chat.sent && now_ns() < limit;)
        loop_once(now_ns() + 50 * MILLISECOND);

    double wall = end.time - start.time, received = (double)chat.received_measured, sent = (double)chat.sent_measured;
    double reads = (double)(end.count.reads - start.count.reads), writes = (double)(end.count.writes - start.count.writes);
    printf("JSON {\"pairs\":%d,\"window\":%d,\"rate\":%g,\"messages\":%llu,\"messages_per_s\":%.1f,\"lost\":%lld,\"bounced\":%llu,",
           opt.users / 2, opt.rate > 0 ? 0 : opt.window, opt.rate, (unsigned long long)chat.received_measured, received / wall,
           (long long)(chat.sent - chat.received), (unsigned long long)chat.bounced);
    printf("\"bytes_in_per_message\":%.0f,\"bytes_out_per_message\":%.0f,\"messages_per_read\":%.2f,\"messages_per_write\":%.2f,",
           received ? (double)(end.count.bytes_in - start.count.bytes_in) / received : 0,
           sent ? (double)(end.count.bytes_out - start.count.bytes_out) / sent : 0, reads ? received / reads : 0,
           writes ? sent / writes : 0);
    histogram_print(&latency, "latency");
    putchar(',');
    print_common(start, end);
    printf(",\"units\":%llu}\n", (unsigned long long)chat.received_measured);
    fflush(stdout);
    close_all();
}

/* ---- login: from connect to the answer to the first ping, or to bind ---- */

static void add_login_times(void) {
    for (int i = 0; i < opt.users; i++)
        if (conns[i].state == READY) histogram_add(&latency, conns[i].login_ns);
}

void scenario_login(void) {
    struct sample start = phase("start");
    bring_up(opt.concurrency);
    struct sample end = phase("end");
    add_login_times();
    printf("JSON {\"auth\":\"%s\",\"tls\":\"%s\",\"depth\":\"%s\",\"concurrency\":%d,\"logins_per_s\":%.1f,\"passwords_salted\":%llu,",
           opt.auth, opt.tls, opt.depth, opt.concurrency, count.ready / (end.time - start.time), (unsigned long long)passwords_salted);
    histogram_print(&latency, "latency");
    putchar(',');
    print_common(start, end);
    printf(",\"units\":%d}\n", count.ready);
    fflush(stdout);
    close_all();
}

/* ---- idle: sessions that do nothing; the driver compares the server's memory before and with them ---- */

void scenario_idle(void) {
    phase("base");
    bring_up(opt.concurrency);
    run_for((uint64_t)(opt.settle * 1e9));
    struct sample start = phase("start");
    run_for((uint64_t)(opt.time * 1e9));
    struct sample end = phase("end");
    int sessions = count.ready;
    close_all();
    run_for((uint64_t)(opt.settle * 1e9));
    phase("closed");
    printf("JSON {\"auth\":\"%s\",\"tls\":\"%s\",", opt.auth, opt.tls);
    print_common(start, end);
    printf(",\"units\":%d}\n", sessions);
    fflush(stdout);
}

/* ---- register: accounts made in band (XEP-0077), on servers that allow it ---- */

void scenario_register(void) {
    register_only = true;
    struct sample start = phase("start");
    bring_up(opt.concurrency);
    struct sample end = phase("end");
    printf("JSON {\"accounts_per_s\":%.1f,", count.ready / (end.time - start.time));
    print_common(start, end);
    printf(",\"units\":%d}\n", count.ready);
    fflush(stdout);
}
