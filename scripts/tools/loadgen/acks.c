/* Stream management (XEP-0198): counts the stanzas that come and answers <r/>, at once or --ack seconds later. Stanzas are
 * told by their names alone, so no other element may be called message, presence or iq. */
#include <ctype.h>
#include <string.h>

#include "loadgen.h"

static void acknowledge(struct conn *c) {
    c->ack_at = 0;
    send_format(c, "<a xmlns='urn:xmpp:sm:3' h='%u'/>", c->handled);
}

static void on_element(struct conn *c) {
    const char *name = c->name;
    if (!c->managed) {
        c->managed = !strcmp(name, "enabled");
    } else if (!strcmp(name, "message") || !strcmp(name, "presence") || !strcmp(name, "iq")) {
        c->handled++;
    } else if (!strcmp(name, "r") && !c->ack_at) {
        if (opt.ack > 0) c->ack_at = loop_time + (uint64_t)(opt.ack * SECOND);
        else acknowledge(c);
    }
}

void acks_enable(struct conn *c) {
    c->name_length = -1;
    c->managing = true;
    send_format(c, "<enable xmlns='urn:xmpp:sm:3'/>");
}

void acks_input(struct conn *c, const char *data, size_t length) {
    for (const char *at = data, *end = data + length; at < end; at++) {
        if (c->name_length < 0) {
            at = memchr(at, '<', (size_t)(end - at));
            if (!at) return;
            c->name_length = 0;
        } else if (isalpha((unsigned char)*at) && c->name_length < (int)sizeof c->name - 1) {
            c->name[c->name_length++] = *at;
        } else {
            c->name[c->name_length] = 0;
            c->name_length = -1;
            on_element(c);
        }
    }
}

uint64_t acks_due(uint64_t now) {
    for (int i = 0; i < opt.users; i++)
        if (conns[i].ack_at && conns[i].ack_at <= now && conns[i].state != DEAD) acknowledge(&conns[i]);
    return now + 5 * MILLISECOND;
}
