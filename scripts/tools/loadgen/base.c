/* Time, memory, hexadecimal numbers, marks and histograms. */
#include "loadgen.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

double cpu_seconds(void) {
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    return (double)(use.ru_utime.tv_sec + use.ru_stime.tv_sec) + (double)(use.ru_utime.tv_usec + use.ru_stime.tv_usec) * 1e-6;
}

void die(const char *format, ...) {
    va_list arguments;
    fputs("loadgen: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(2);
}

void *allocate(size_t size) {
    void *memory = calloc(1, size);
    if (!memory) die("out of memory");
    return memory;
}

/* ---- marks ---- */

static const char digits[] = "0123456789abcdef";

void put_hex8(char *at, uint32_t value) {
    for (int i = 7; i >= 0; i--, value >>= 4) at[i] = digits[value & 15];
}

static bool read_hex8(const char *at, uint32_t *value) {
    uint32_t result = 0;
    for (int i = 0; i < 8; i++) {
        char c = at[i];
        uint32_t digit;
        if (c >= '0' && c <= '9') digit = (uint32_t)(c - '0');
        else if (c >= 'a' && c <= 'f') digit = (uint32_t)(c - 'a') + 10;
        else return false;
        result = result << 4 | digit;
    }
    *value = result;
    return true;
}

void put_mark(char *at, struct mark mark) {
    memcpy(at, "~XL", 3);
    at[3] = mark.kind;
    put_hex8(at + 4, mark.user);
    put_hex8(at + 12, mark.number);
    put_hex8(at + 20, (uint32_t)(mark.time >> 32));
    put_hex8(at + 28, (uint32_t)mark.time);
    at[36] = ';';
}

bool read_mark(const char *at, struct mark *mark) {
    uint32_t high, low;
    if (at[1] != 'X' || at[2] != 'L' || at[36] != ';') return false;
    if (!read_hex8(at + 4, &mark->user) || !read_hex8(at + 12, &mark->number)) return false;
    if (!read_hex8(at + 20, &high) || !read_hex8(at + 28, &low)) return false;
    mark->kind = at[3];
    mark->time = (uint64_t)high << 32 | low;
    return true;
}

/* ---- histograms ---- */

/* Row r holds values shifted right by r, so that each column is 1/32 to 1/64 of its value wide. */
void histogram_add(struct histogram *h, uint64_t ns) {
    int row = ns < 64 ? 0 : 63 - __builtin_clzll(ns) - 5;
    h->buckets[row * 64 + (int)(ns >> row)]++;
    h->count++;
    h->sum += (double)ns;
    if (ns > h->max) h->max = ns;
}

static double quantile(const struct histogram *h, double part) {
    uint64_t wanted = (uint64_t)(part * (double)h->count), seen = 0;
    if (!h->count) return 0;
    if (wanted >= h->count) wanted = h->count - 1;
    for (int i = 0; i < 64 * 64; i++) {
        seen += h->buckets[i];
        if (seen > wanted) {
            int row = i / 64;
            uint64_t low = (uint64_t)(i % 64) << row;
            return (double)(row ? low + (1ull << (row - 1)) : low); /* the middle of the bucket */
        }
    }
    return (double)h->max;
}

void histogram_print(const struct histogram *h, const char *name) {
    printf("\"%s\":{\"n\":%llu,\"mean_us\":%.1f,\"p50_us\":%.1f,\"p90_us\":%.1f,\"p99_us\":%.1f,\"p999_us\":%.1f,\"max_us\":%.1f}",
           name, (unsigned long long)h->count, h->count ? h->sum / (double)h->count / 1e3 : 0, quantile(h, .5) / 1e3,
           quantile(h, .9) / 1e3, quantile(h, .99) / 1e3, quantile(h, .999) / 1e3, (double)h->max / 1e3);
}
