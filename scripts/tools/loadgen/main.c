/* Options, and which scenario. Used by bench.py, which knows the defaults worth having; see there. */
#include "loadgen.h"

#include <arpa/inet.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct options opt = {
    .host = "localhost",
    .tls = "none",
    .auth = "scram-sha-1",
    .to = "bare",
    .layout = "cross",
    .depth = "full",
    .scram_cache = "",
    .users = 2,
    .window = 1,
    .body = 100,
    .concurrency = 50,
    .warm = 1.5,
    .time = 5,
    .ack = -1,
    .settle = 3,
};
struct sockaddr_in targets[MAX_TARGETS];
int target_count;

static const struct {
    const char *name;
    enum { TEXT, INTEGER, REAL } type;
    size_t at;
} known[] = {
    {"host", TEXT, offsetof(struct options, host)},
    {"tls", TEXT, offsetof(struct options, tls)},
    {"auth", TEXT, offsetof(struct options, auth)},
    {"to", TEXT, offsetof(struct options, to)},
    {"layout", TEXT, offsetof(struct options, layout)},
    {"depth", TEXT, offsetof(struct options, depth)},
    {"scram-cache", TEXT, offsetof(struct options, scram_cache)},
    {"users", INTEGER, offsetof(struct options, users)},
    {"first-user", INTEGER, offsetof(struct options, first_user)},
    {"window", INTEGER, offsetof(struct options, window)},
    {"body", INTEGER, offsetof(struct options, body)},
    {"concurrency", INTEGER, offsetof(struct options, concurrency)},
    {"rate", REAL, offsetof(struct options, rate)},
    {"warm", REAL, offsetof(struct options, warm)},
    {"time", REAL, offsetof(struct options, time)},
    {"ack", REAL, offsetof(struct options, ack)},
    {"settle", REAL, offsetof(struct options, settle)},
};

static void add_targets(char *list) {
    for (char *one = strtok(list, ","); one; one = strtok(NULL, ",")) {
        char *port = strrchr(one, ':');
        if (!port || target_count == MAX_TARGETS) die("--target: expected up to %d of IP:PORT, got %s", MAX_TARGETS, one);
        *port++ = 0;
        struct sockaddr_in *target = &targets[target_count++];
        target->sin_family = AF_INET;
        target->sin_port = htons((uint16_t)atoi(port));
        if (inet_pton(AF_INET, one, &target->sin_addr) != 1) die("--target: not an IPv4 address: %s", one);
    }
}

static void set_option(const char *name, char *value) {
    if (!strcmp(name, "target")) {
        add_targets(value);
        return;
    }
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(name, known[i].name)) continue;
        void *at = (char *)&opt + known[i].at;
        switch (known[i].type) {
        case TEXT: *(const char **)at = value; break;
        case INTEGER: *(int *)at = atoi(value); break;
        case REAL: *(double *)at = atof(value); break;
        }
        return;
    }
    die("unknown option --%s", name);
}

int main(int argc, char **argv) {
    if (argc < 2 || argc % 2) die("usage: loadgen chat|login|idle|register --target IP:PORT [--OPTION VALUE]...");
    opt.scenario = argv[1];
    for (int i = 2; i < argc; i += 2) {
        if (strncmp(argv[i], "--", 2)) die("expected an option, got %s", argv[i]);
        set_option(argv[i] + 2, argv[i + 1]);
    }
    if (!target_count) die("--target is needed");
    if (opt.users < 1 || opt.first_user < 0 || opt.first_user + opt.users > 100000) die("users must lie in 0 to 99999");
    if (opt.body < MARK_LENGTH || opt.body > 7000) die("--body must be %d to 7000", MARK_LENGTH);
    if (strcmp(opt.layout, "cross") && strcmp(opt.layout, "same")) die("--layout: expected cross or same");
    signal(SIGPIPE, SIG_IGN);
    net_init();
    scram_init();
    if (!strcmp(opt.scenario, "chat")) scenario_chat();
    else if (!strcmp(opt.scenario, "login")) scenario_login();
    else if (!strcmp(opt.scenario, "idle")) scenario_idle();
    else if (!strcmp(opt.scenario, "register")) scenario_register();
    else die("unknown scenario %s", opt.scenario);
    scram_save_cache();
    return 0;
}
