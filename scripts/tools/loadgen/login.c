/* From the TCP connection to a session that is ready: stream, STARTTLS, SASL, bind, roster, presence. During this the
 * input is kept and searched for the words waited for; servers send little of it and no tricks. */
#define _GNU_SOURCE
#include "loadgen.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool register_only; /* in-band registration (XEP-0077) in place of a login */

static void open_stream(struct conn *c) {
    c->in_length = 0;
    send_format(c,
                "<?xml version='1.0'?><stream:stream to='%s' xmlns='jabber:client' "
                "xmlns:stream='http://etherx.jabber.org/streams' version='1.0'>",
                opt.host);
}

void login_begin(struct conn *c) {
    if (!strcmp(opt.tls, "direct")) {
        conn_start_tls(c);
        return;
    }
    c->state = !strcmp(opt.tls, "starttls") ? PLAIN_FEATURES : FEATURES;
    open_stream(c);
}

void login_tls_done(struct conn *c) {
    c->state = FEATURES;
    open_stream(c);
}

static void authenticate(struct conn *c) {
    c->in_length = 0;
    if (register_only) {
        c->state = REGISTERING;
        send_format(c,
                    "<iq type='set' id='reg'><query xmlns='jabber:iq:register'><username>u%05d</username>"
                    "<password>p%05d</password></query></iq>",
                    c->user, c->user);
        return;
    }
    c->state = AUTHENTICATING;
    if (!strcmp(opt.auth, "plain")) {
        char text[64], encoded[128];
        int length = snprintf(text, sizeof text, "%cu%05d%cp%05d", 0, c->user, 0, c->user);
        base64(encoded, text, length);
        send_format(c, "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>%s</auth>", encoded);
    } else {
        scram_first_message(c);
    }
}

/* What every client does first. The answer to the ping tells that the server has worked through all before it. */
static void fetch_roster_and_show_up(struct conn *c) {
    char id[MARK_LENGTH + 1] = "";
    put_mark(id, (struct mark){.kind = 'p', .user = (uint32_t)c->user});
    send_format(c,
                "<iq type='get' id='roster'><query xmlns='jabber:iq:roster'/></iq><presence><show>chat</show></presence>"
                "<iq type='get' id='%s' to='%s'><ping xmlns='urn:xmpp:ping'/></iq>",
                id, opt.host);
}

static char *find(struct conn *c, const char *word) {
    return memmem(c->in, c->in_length, word, strlen(word));
}

static bool complete(struct conn *c) { /* as far as one can tell without parsing */
    return c->in_length && c->in[c->in_length - 1] == '>';
}

static void on_sasl(struct conn *c) {
    char *begin, *end;
    if (find(c, "<failure")) {
        if (find(c, "</failure>")) conn_failed(c, "not authenticated");
    } else if ((begin = find(c, "<challenge")) && (end = find(c, "</challenge>"))) {
        begin = memchr(begin, '>', (size_t)(end - begin));
        if (!begin || !scram_answer(c, begin + 1, (size_t)(end - begin - 1))) conn_failed(c, "SCRAM challenge not understood");
        else c->in_length = 0;
    } else if (find(c, "<success") && complete(c)) {
        c->state = BIND_FEATURES;
        open_stream(c);
    }
}

static void on_input(struct conn *c) {
    switch (c->state) {
    case PLAIN_FEATURES:
        if (!find(c, "</stream:features>")) return;
        c->in_length = 0;
        c->state = PROCEED;
        send_format(c, "<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>");
        return;
    case PROCEED:
        if (find(c, "<failure")) conn_failed(c, "STARTTLS refused");
        else if (find(c, "<proceed") && complete(c)) conn_start_tls(c);
        return;
    case FEATURES:
        if (find(c, "</stream:features>")) authenticate(c);
        return;
    case AUTHENTICATING: on_sasl(c); return;
    case BIND_FEATURES:
        if (!find(c, "</stream:features>")) return;
        c->in_length = 0;
        c->state = BINDING;
        send_format(c, "<iq type='set' id='bind'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>loadgen</resource></bind></iq>");
        return;
    case BINDING:
        if (find(c, "</error>")) {
            conn_failed(c, "resource not bound");
        } else if (find(c, "</jid>") && find(c, "</iq>")) {
            c->in_length = 0;
            if (!strcmp(opt.depth, "bind")) {
                conn_ready(c);
            } else {
                c->state = SETTLING;
                if (opt.ack >= 0) acks_enable(c);
                fetch_roster_and_show_up(c);
            }
        }
        return;
    case SETTLING:
        if (find(c, "~XLp") && complete(c)) conn_ready(c);
        return;
    case REGISTERING:
        if (!complete(c) || !find(c, "<iq")) return;
        if (find(c, "<error") && !find(c, "<conflict")) { /* conflict: there from an earlier run, as wanted */
            conn_failed(c, "not registered");
        } else {
            conn_ready(c);
            conn_close(c);
        }
        return;
    default: return;
    }
}

void login_input(struct conn *c, const char *data, size_t length) {
    if (c->in_length + length + 1 > c->in_capacity) {
        c->in_capacity = 2 * (c->in_length + length + 1);
        c->in = realloc(c->in, c->in_capacity);
        if (!c->in) die("out of memory");
    }
    memcpy(c->in + c->in_length, data, length);
    c->in_length += length;
    c->in[c->in_length] = 0;
    if (find(c, "<stream:error")) conn_failed(c, "stream error");
    else on_input(c);
}
