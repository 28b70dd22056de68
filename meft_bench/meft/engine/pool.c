/* Threads (helpers) that share the work of the kernels in elementwise.c and products.c, and sleep when there is none.

   A kernel takes chunks of its rows from a counter until none is left, so any number of threads may run it at once and
   each row is computed by one of them: which one changes no bit. Whoever calls run() works too, and waits for those
   helpers alone that have begun. Several threads may call at once; the first is helped first. Helpers are started when
   they are first wanted, and once; a forked child, which has none, starts its own. */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>

typedef void (*Kernel)(const void *about, int64_t count, int64_t grain, int64_t *next);

typedef struct Job {
    Kernel kernel;
    const void *about;
    int64_t count, grain, next;
    int64_t open, inside; /* helpers that may still come, and those that work on it */
    struct Job *behind;
} Job;

enum { MOST_CORES = 1024 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all below */
static pthread_cond_t offered = PTHREAD_COND_INITIALIZER, left = PTHREAD_COND_INITIALIZER;
static Job *first;
static int64_t helpers, ending, knows_forks;
static int64_t cores[MOST_CORES], cores_given;

#ifdef __linux__
#include <sched.h>
static void bind_to_core(int64_t number) {
    cpu_set_t one;
    if (!cores_given) return;
    CPU_ZERO(&one);
    CPU_SET(cores[number % cores_given], &one);
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
}
#else
static void bind_to_core(int64_t number) { (void)number; }
#endif

static void *help(void *number) {
    pthread_mutex_lock(&lock);
    bind_to_core((int64_t)(intptr_t)number);
    while (!ending) {
        Job *job = first;
        while (job && !job->open) job = job->behind;
        if (!job) {
            pthread_cond_wait(&offered, &lock);
            continue;
        }
        job->open--;
        job->inside++;
        pthread_mutex_unlock(&lock);
        job->kernel(job->about, job->count, job->grain, &job->next);
        pthread_mutex_lock(&lock);
        if (--job->inside == 0) pthread_cond_broadcast(&left);
    }
    if (--helpers == 0) pthread_cond_broadcast(&left);
    pthread_mutex_unlock(&lock);
    return 0;
}

/* One helper more; it answers no signal, which are Python's threads' to answer. Returns whether the system has room. */
static int start_helper(void) {
    sigset_t most, before;
    pthread_t thread;
    sigfillset(&most);
    sigdelset(&most, SIGSEGV), sigdelset(&most, SIGBUS), sigdelset(&most, SIGILL), sigdelset(&most, SIGFPE);
    pthread_sigmask(SIG_BLOCK, &most, &before);
    const int failed = pthread_create(&thread, 0, help, (void *)(intptr_t)helpers);
    pthread_sigmask(SIG_SETMASK, &before, 0);
    if (failed) return 0;
    pthread_detach(thread);
    helpers++;
    return 1;
}

static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork(void) { pthread_mutex_unlock(&lock); }

/* The child has the memory of its parent, and of its threads the one that forked. */
static void in_child(void) {
    const pthread_mutex_t fresh_lock = PTHREAD_MUTEX_INITIALIZER;
    const pthread_cond_t fresh = PTHREAD_COND_INITIALIZER;
    memcpy(&lock, &fresh_lock, sizeof lock);
    memcpy(&offered, &fresh, sizeof fresh);
    memcpy(&left, &fresh, sizeof fresh);
    first = 0;
    helpers = 0;
}

static void offer(Job *job) {
    const int64_t wanted = job->open;
    pthread_mutex_lock(&lock);
    if (!knows_forks) knows_forks = !pthread_atfork(before_fork, after_fork, in_child);
    while (knows_forks && !ending && helpers < wanted && start_helper()) {}
    const int64_t there = helpers;
    Job **at = &first;
    while (*at) at = &(*at)->behind;
    *at = job;
    pthread_mutex_unlock(&lock);
    if (wanted < there)
        for (int64_t i = 0; i < wanted; ++i) pthread_cond_signal(&offered);
    else
        pthread_cond_broadcast(&offered);
}

/* Nobody comes any more; returns when nobody is there. */
static void withdraw(Job *job) {
    pthread_mutex_lock(&lock);
    Job **at = &first;
    while (*at != job) at = &(*at)->behind;
    *at = job->behind;
    while (job->inside) pthread_cond_wait(&left, &lock);
    pthread_mutex_unlock(&lock);
}

/* kernel over count rows in chunks of grain, by this thread and up to `wanted` helpers. */
void run(Kernel kernel, const void *about, int64_t count, int64_t grain, int64_t wanted) {
    Job job = {kernel, about, count, grain, 0, wanted, 0, 0};
    if (wanted > 0) offer(&job);
    kernel(about, count, grain, &job.next);
    if (wanted > 0) withdraw(&job);
}

/* Helper i works on core some[i % n] alone; for helpers to come. */
void bind_helpers(const int64_t *some, int64_t n) {
    pthread_mutex_lock(&lock);
    cores_given = n < MOST_CORES ? n : MOST_CORES;
    memcpy(cores, some, cores_given * sizeof *cores);
    pthread_mutex_unlock(&lock);
}

/* Ends the helpers, and returns when they are gone; work that comes later is done by those who bring it. */
void end_helpers(void) {
    pthread_mutex_lock(&lock);
    ending = 1;
    pthread_cond_broadcast(&offered);
    while (helpers) pthread_cond_wait(&left, &lock);
    pthread_mutex_unlock(&lock);
}
