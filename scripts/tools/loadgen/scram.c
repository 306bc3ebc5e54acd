/* SCRAM (RFC 5802), the client's side, without channel binding. A salted password costs thousands of hashes, which would
 * make the generator dearer than the server: it is kept per account, and in a file from run to run. */
#define _GNU_SOURCE
#include "loadgen.h"

#include <errno.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_HASH 64
#define MAX_SALT 96 /* base64 */

struct salted {
    char salt[MAX_SALT];
    int iterations;
    bool fresh; /* not in the file yet */
    unsigned char password[MAX_HASH];
};

uint64_t passwords_salted;
static struct salted *accounts; /* one per user */
static const EVP_MD *hash;
static int hash_length;

void base64(char *to, const void *from, int length) {
    EVP_EncodeBlock((unsigned char *)to, from, length);
}

/* Returns the number of bytes, or -1. `to` must have room for 3/4 of length + 3. */
static int base64_decode(unsigned char *to, const char *from, int length) {
    int bytes = EVP_DecodeBlock(to, (const unsigned char *)from, length);
    for (; bytes > 0 && length > 0 && from[length - 1] == '='; length--) bytes--; /* padding was counted as zero bytes */
    return bytes;
}

static void hmac(const unsigned char *key, const char *text, unsigned char *result) {
    unsigned length;
    HMAC(hash, key, hash_length, (const unsigned char *)text, strlen(text), result, &length);
}

/* ---- the file: user mechanism salt iterations salted-password ---- */

void scram_init(void) {
    char mechanism[32], salt[MAX_SALT], hex[2 * MAX_HASH + 1];
    int user, iterations;
    hash = !strcmp(opt.auth, "scram-sha-256") ? EVP_sha256() : EVP_sha1();
    hash_length = EVP_MD_get_size(hash);
    accounts = allocate((size_t)opt.users * sizeof *accounts);
    FILE *file = *opt.scram_cache ? fopen(opt.scram_cache, "r") : NULL;
    if (!file) return;
    while (fscanf(file, "%d %31s %95s %d %128s", &user, mechanism, salt, &iterations, hex) == 5) {
        struct salted *account = &accounts[user - opt.first_user];
        if (user < opt.first_user || user >= opt.first_user + opt.users || strcmp(mechanism, opt.auth)) continue;
        if (strlen(hex) != 2 * (size_t)hash_length) continue;
        strcpy(account->salt, salt);
        account->iterations = iterations;
        for (int i = 0; i < hash_length; i++) sscanf(hex + 2 * i, "%2hhx", &account->password[i]);
    }
    fclose(file);
}

void scram_save_cache(void) {
    if (!*opt.scram_cache) return;
    FILE *file = fopen(opt.scram_cache, "a");
    if (!file) {
        fprintf(stderr, "loadgen: %s: %s\n", opt.scram_cache, strerror(errno));
        return;
    }
    for (int i = 0; i < opt.users; i++) {
        if (!accounts[i].fresh) continue;
        fprintf(file, "%d %s %s %d ", opt.first_user + i, opt.auth, accounts[i].salt, accounts[i].iterations);
        for (int k = 0; k < hash_length; k++) fprintf(file, "%02x", accounts[i].password[k]);
        fputc('\n', file);
    }
    fclose(file);
}

static const unsigned char *salted_password(const struct conn *c, const char *salt, int iterations) {
    struct salted *account = &accounts[c->user - opt.first_user];
    if (account->iterations != iterations || strcmp(account->salt, salt)) {
        unsigned char raw[MAX_SALT];
        char password[16];
        int raw_length = base64_decode(raw, salt, (int)strlen(salt));
        int password_length = snprintf(password, sizeof password, "p%05d", c->user);
        if (raw_length <= 0) return NULL;
        PKCS5_PBKDF2_HMAC(password, password_length, raw, raw_length, iterations, hash, hash_length, account->password);
        strcpy(account->salt, salt);
        account->iterations = iterations;
        account->fresh = true;
        passwords_salted++;
    }
    return account->password;
}

/* ---- the exchange ---- */

void scram_first_message(struct conn *c) {
    unsigned char random[15];
    char message[128], encoded[256];
    RAND_bytes(random, sizeof random);
    base64(c->nonce, random, sizeof random);
    free(c->client_first_bare);
    if (asprintf(&c->client_first_bare, "n=u%05d,r=%s", c->user, c->nonce) < 0) die("out of memory");
    base64(encoded, message, snprintf(message, sizeof message, "n,,%s", c->client_first_bare));
    send_format(c, "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='%s'>%s</auth>",
                !strcmp(opt.auth, "scram-sha-256") ? "SCRAM-SHA-256" : "SCRAM-SHA-1", encoded);
}

/* Answers the server's first message. False: it is none. */
bool scram_answer(struct conn *c, const char *challenge, size_t length) {
    char server_first[512], fields[512], *next;
    const char *nonce = NULL, *salt = NULL;
    int iterations = 0;
    if (length > 600) return false;
    int bytes = base64_decode((unsigned char *)server_first, challenge, (int)length);
    if (bytes <= 0) return false;
    server_first[bytes] = 0;
    strcpy(fields, server_first);
    for (char *field = strtok_r(fields, ",", &next); field; field = strtok_r(NULL, ",", &next)) {
        if (!strncmp(field, "r=", 2)) nonce = field + 2;
        else if (!strncmp(field, "s=", 2)) salt = field + 2;
        else if (!strncmp(field, "i=", 2)) iterations = atoi(field + 2);
    }
    if (!nonce || !salt || strlen(salt) >= MAX_SALT || iterations <= 0) return false;
    if (strncmp(nonce, c->nonce, strlen(c->nonce))) return false;
    const unsigned char *password = salted_password(c, salt, iterations);
    if (!password) return false;

    /* RFC 5802 section 3 */
    unsigned char client_key[MAX_HASH], stored_key[MAX_HASH], signature[MAX_HASH];
    char without_proof[600], auth_message[1400], proof[128], message[800], encoded[1200];
    snprintf(without_proof, sizeof without_proof, "c=biws,r=%s", nonce);
    snprintf(auth_message, sizeof auth_message, "%s,%s,%s", c->client_first_bare, server_first, without_proof);
    hmac(password, "Client Key", client_key);
    EVP_Digest(client_key, (size_t)hash_length, stored_key, NULL, hash, NULL);
    hmac(stored_key, auth_message, signature);
    for (int i = 0; i < hash_length; i++) client_key[i] ^= signature[i];
    base64(proof, client_key, hash_length);
    base64(encoded, message, snprintf(message, sizeof message, "%s,p=%s", without_proof, proof));
    send_format(c, "<response xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>%s</response>", encoded);
    return true;
}
