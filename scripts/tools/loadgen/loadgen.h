/* loadgen - an XMPP load generator far cheaper than any server: one thread, epoll, stanzas encoded beforehand.
 *
 * Once a session is up its incoming bytes are not parsed as XML. Every payload we send holds a mark of fixed width, and
 * receiving is a search for its first byte:
 *
 *     ~XL  kind(1)  user(8 hex)  number(8 hex)  time(16 hex)  ;
 *
 * kind 'm' is a chat message (user: who is to receive it), 'p' a ping (user: who sent it). time is nanoseconds since
 * the scenario began, of the moment the stanza was sent, or was due to be sent when a rate is given.
 *
 * The driver (bench.py) reads our standard output: "PHASE name" asks it to sample the server and to answer with one
 * line on our standard input; "JSON {...}" is the result.
 */
#ifndef LOADGEN_H
#define LOADGEN_H

#include <netinet/in.h>
#include <openssl/ssl.h>
#include <stdbool.h>
#include <stdint.h>

/* ---- options (main.c) ---- */
struct options {
    const char *scenario;    /* chat, login, idle, register */
    const char *host;        /* the XMPP domain */
    const char *tls;         /* none, starttls, direct */
    const char *auth;        /* scram-sha-1, scram-sha-256, plain */
    const char *to;          /* chat to the bare or the full address of the peer */
    const char *layout;      /* the users of a pair have sessions on: different targets (cross), one target (same) */
    const char *depth;       /* login ends at: full (roster, presence and a ping answered), bind */
    const char *scram_cache; /* file of salted passwords; "" for none */
    int users;               /* how many sessions */
    int first_user;          /* accounts are u%05d with passwords p%05d, from this number on */
    int window;              /* chat: messages in flight per user */
    int body;                /* chat: bytes of the message body */
    int concurrency;         /* sessions being set up at one time */
    double rate;             /* chat: messages per second in all, sent by the clock; 0: each arrival lets the next go */
    double warm;             /* seconds before measuring */
    double time;             /* seconds of measuring */
    double ack;              /* chat: stream management, <a/> so many seconds after <r/>; below 0: none */
    double settle;           /* idle: seconds between the last login and the measuring */
};
extern struct options opt;

#define MAX_TARGETS 16
extern struct sockaddr_in targets[MAX_TARGETS];
extern int target_count;

/* ---- base.c: time, numbers, marks ---- */
#define SECOND 1000000000ull /* ns */
#define MILLISECOND 1000000ull

#define MARK_LENGTH 37
struct mark {
    char kind;
    uint32_t user, number;
    uint64_t time;
};

struct histogram {
    uint64_t buckets[64 * 64]; /* about 1.6 % wide, of ns */
    uint64_t count, max;
    double sum;
};

uint64_t now_ns(void);
double cpu_seconds(void); /* this process's own, user and system */
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
void *allocate(size_t size); /* zeroed; does not return without memory */

void put_hex8(char *at, uint32_t value);
void put_mark(char *at, struct mark mark);
bool read_mark(const char *at, struct mark *mark); /* false: these MARK_LENGTH bytes are no mark */

void histogram_add(struct histogram *h, uint64_t ns);
void histogram_print(const struct histogram *h, const char *name); /* "name":{...} with microseconds */

/* ---- net.c: connections and the event loop ---- */
enum state {
    UNUSED,
    CONNECTING,
    PLAIN_FEATURES, /* waiting for the features of a stream without TLS */
    PROCEED,        /* waiting for the answer to <starttls/> */
    HANDSHAKE,
    FEATURES, /* waiting for the features before SASL */
    REGISTERING,
    AUTHENTICATING,
    BIND_FEATURES, /* waiting for the features after SASL */
    BINDING,
    SETTLING, /* bound; waiting for roster and ping */
    READY,
    DEAD,
};

struct conn {
    int fd; /* -1: none */
    int user;
    const struct sockaddr_in *target;
    enum state state;
    uint64_t started, login_ns; /* login_ns: from connect to READY */

    SSL *ssl;
    bool tls_up;

    char *out; /* to be sent: out[out_done .. out_length) */
    size_t out_length, out_done, out_capacity;
    bool queued;     /* stands in the list of connections to flush */
    bool want_write; /* epoll watches for room to write */

    char *in; /* what came during the login; NUL-terminated */
    size_t in_length, in_capacity;
    char carry[MARK_LENGTH]; /* the beginning of a mark that was cut at the end of a read */
    int carry_length;

    char nonce[32]; /* SCRAM: ours */
    char *client_first_bare;

    char *stanza; /* chat: the message, encoded once */
    size_t stanza_length, id_at, mark_at;
    uint32_t number; /* of the last message sent */

    bool managing, managed; /* stream management is asked for; is on */
    uint32_t handled;       /* stanzas that came since */
    uint64_t ack_at;        /* when to answer an <r/>; 0: none waits */
    char name[12];          /* of the element that begins */
    int name_length;        /* -1: none does */
};

struct counters {
    int in_progress, ready, failed, closed_early;
    uint64_t reads, writes, bytes_in, bytes_out;
};
extern struct counters count;
extern struct conn *conns; /* opt.users of them */
extern uint64_t loop_time; /* ns; read once per turn of the loop */
extern void (*on_mark)(struct conn *c, struct mark mark);
extern uint64_t (*on_tick)(uint64_t now); /* called every turn; returns when it wants to be called again */

void net_init(void);
void conn_open(struct conn *c);
void conn_failed(struct conn *c, const char *why);
void conn_close(struct conn *c);
void conn_start_tls(struct conn *c);
void conn_ready(struct conn *c);
void send_bytes(struct conn *c, const char *data, size_t length);
void send_format(struct conn *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
void flush_all(void);
void loop_once(uint64_t deadline);
void run_for(uint64_t ns);
void run_until_quiet(uint64_t quiet_ns, uint64_t at_most_ns);
void bring_up(int concurrency); /* sets up all sessions; returns when each is ready or has failed */
void close_all(void);

/* ---- login.c, scram.c ---- */
extern bool register_only;
void login_begin(struct conn *c);                              /* the TCP connection stands */
void login_tls_done(struct conn *c);                           /* the TLS handshake is over */
void login_input(struct conn *c, const char *data, size_t length);

extern uint64_t passwords_salted; /* PBKDF2 runs of ours */
void scram_init(void);
void scram_save_cache(void);
void scram_first_message(struct conn *c);
bool scram_answer(struct conn *c, const char *challenge, size_t length);
void base64(char *to, const void *from, int length);

/* ---- acks.c: stream management ---- */
void acks_enable(struct conn *c);
void acks_input(struct conn *c, const char *data, size_t length);
uint64_t acks_due(uint64_t now); /* answers what is due; when to ask again */

/* ---- scenarios.c ---- */
void scenario_chat(void);
void scenario_login(void);
void scenario_idle(void);
void scenario_register(void);

#endif
