/* A program that notices if anything is done to it: sixteen threads that wait in system calls,
   compute, take signals and sleep, each of which checks what it gets back.

       threads FILE MIB

   maps FILE and writes "ready". Each line on standard input is answered with "ok TURNS", or with
   "bad WHAT": what a thread has noticed. It ends at the end of standard input. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static _Atomic(const char *) bad;
static atomic_long turns, alarms;
static atomic_int opened;
static unsigned char *memory;
static size_t size;

static void check(int right, const char *what)
{
    const char *none = 0;
    if (!right)
        atomic_compare_exchange_strong(&bad, &none, what);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void *sleeps(void *unused)
{
    for (;; turns++) {
        struct timespec wanted = { 0, 30000000 }, left = { 0, 0 };
        double began = now();
        check(nanosleep(&wanted, &left) == 0, "nanosleep was interrupted");
        check(now() - began >= 0.03, "nanosleep was short");
    }
}

static void *sleeps_long(void *unused)
{
    struct timespec wanted = { 1, 0 };
    for (;; turns++) {
        double began = now();
        check(clock_nanosleep(CLOCK_MONOTONIC, 0, &wanted, 0) == 0, "clock_nanosleep");
        check(now() - began >= 1, "clock_nanosleep was short");
    }
}

static void *reads(void *unused)
{
    int ends[2];
    char got;
    if (pipe(ends))
        return 0;
    opened++;
    for (;; turns++) {
        struct pollfd one = { ends[0], POLLIN, 0 };
        check(poll(&one, 1, 40) == 0, "poll");
        check(write(ends[1], "x", 1) == 1, "write to a pipe");
        check(read(ends[0], &got, 1) == 1 && got == 'x', "read from a pipe");
    }
}

static int talk[2];
static void *reads_blocked(void *unused)
{
    unsigned char expected = 0, got;
    for (;; turns++, expected++)
        check(read(talk[0], &got, 1) == 1 && got == expected, "a blocked read");
}

static void *writes_slowly(void *unused)
{
    for (unsigned char next = 0;; next++) {
        usleep(20000);
        check(write(talk[1], &next, 1) == 1, "write");
    }
}

static void *waits_in_epoll(void *timeout)
{
    int set = epoll_create1(0);
    struct epoll_event event;
    opened++;
    for (;; turns++) {
        double began = now();
        check(epoll_wait(set, &event, 1, (int)(intptr_t)timeout) == 0, "epoll_wait");
        check(now() - began >= (intptr_t)timeout / 1e3 - 0.002, "epoll_wait was short");
    }
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static long passed;
static void *waits_in_futex(void *unused)
{
    for (;; turns++) {
        pthread_mutex_lock(&mutex);
        long before = passed;
        while (passed == before)
            check(pthread_cond_wait(&condition, &mutex) == 0, "pthread_cond_wait");
        pthread_mutex_unlock(&mutex);
    }
}

static void *wakes(void *unused)
{
    for (;;) {
        usleep(5000);
        pthread_mutex_lock(&mutex);
        passed++;
        pthread_cond_broadcast(&condition);
        pthread_mutex_unlock(&mutex);
    }
}

static void *waits_for_futex_time(void *unused)
{
    static int word;
    for (;; turns++) {
        struct timespec patience = { 0, 25000000 };
        long got = syscall(SYS_futex, &word, FUTEX_WAIT, 0, &patience, 0, 0);
        check(got == -1 && errno == ETIMEDOUT, "futex");
    }
}

static void *selects(void *unused)
{
    for (;; turns++) {
        struct timeval patience = { 0, 15000 };
        check(select(0, 0, 0, 0, &patience) == 0, "select");
    }
}

/* Registers of both kinds, for a known time. */
static void *computes(void *unused)
{
    for (;; turns++) {
        uint64_t whole = 1;
        double real = 1;
        for (int i = 0; i < 200000; i++) {
            whole = whole * 6364136223846793005u + 1442695040888963407u;
            real = real * 1.0000001 + 1e-9;
        }
        static _Atomic uint64_t first;
        static _Atomic double first_real;
        uint64_t none = 0;
        double zero = 0;
        atomic_compare_exchange_strong(&first, &none, whole);
        atomic_compare_exchange_strong(&first_real, &zero, real);
        check(whole == first && real == first_real, "a computation");
        usleep(1000);
    }
}

/* Each page holds how often it was written, twice. */
static void *writes_memory(void *unused)
{
    uint64_t at = 1;
    for (;; turns++) {
        at = at * 6364136223846793005u + 1;
        uint64_t *page = (uint64_t *)(memory + (at >> 33) % (size / 4096) * 4096);
        check(page[0] == page[511], "the memory");
        page[0]++;
        page[511]++;
        if (!(turns & 63))
            usleep(100);
    }
}

static void on_alarm(int number) { alarms++; }

static void *takes_signals(void *unused)
{
    sigset_t alarm;
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &alarm, 0);
    for (long before = -1;; turns++) {
        double until = now() + 0.5;
        while (now() < until)
            pause();
        check(alarms > before + 1, "the timer's signals");
        before = alarms;
    }
}

static void *waits_for_a_signal(void *unused)
{
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, SIGUSR2);
    for (;; turns++) {
        struct timespec patience = { 0, 35000000 };
        check(sigtimedwait(&one, 0, &patience) == -1 && errno == EAGAIN, "sigtimedwait");
    }
}

int main(int count, char **words)
{
    void *(*bodies[])(void *) = { sleeps, sleeps_long, reads, reads_blocked, writes_slowly,
        waits_in_epoll, waits_in_epoll, waits_in_futex, waits_in_futex, wakes,
        waits_for_futex_time, selects, computes, writes_memory, takes_signals, waits_for_a_signal };
    char line[64];
    sigset_t all;
    struct itimerval every = { { 0, 3000 }, { 0, 3000 } };
    int fd = open(words[1], O_RDWR | O_CREAT, 0600);
    size = (size_t)atoi(words[2]) << 20;
    if (count < 3 || fd < 0 || ftruncate(fd, 0) || ftruncate(fd, size) || pipe(talk))
        return 1;
    memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return 1;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, 0);
    signal(SIGALRM, on_alarm);
    for (unsigned i = 0; i < sizeof bodies / sizeof *bodies; i++) {
        pthread_t thread;
        pthread_create(&thread, 0, bodies[i], (void *)(intptr_t)(i == 5 ? 50 : 10));
    }
    setitimer(ITIMER_REAL, &every, 0);
    while (opened < 3) /* one that reads, two that wait in epoll */
        usleep(1000);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        const char *what = bad;
        what ? printf("bad %s\n", what) : printf("ok %ld\n", turns);
        fflush(stdout);
    }
    return 0;
}
