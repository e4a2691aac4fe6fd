/* What a daemon needs of its process. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "confine.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

pid_t fuseshim_fork(void) { return fork(); }

struct thread_start {
    void (*body)(void *context);
    void *context;
};

static void *run_thread(void *argument) {
    struct thread_start start = *(struct thread_start *)argument;
    free(argument);
    start.body(start.context);
    return NULL;
}

int fuseshim_go_on_in_thread(void (*body)(void *context), void *context) {
    struct thread_start *start = malloc(sizeof *start);
    pthread_attr_t attributes;
    pthread_t thread;
    struct rlimit stack;
    if (start == NULL)
        return ENOMEM;
    *start = (struct thread_start){.body = body, .context = context};
    fuseshim_park_prepare();
    pthread_attr_init(&attributes);
    if (getrlimit(RLIMIT_STACK, &stack) == 0 && stack.rlim_cur != RLIM_INFINITY)
        pthread_attr_setstacksize(&attributes, stack.rlim_cur);
    int failure = pthread_create(&thread, &attributes, run_thread, start);
    pthread_attr_destroy(&attributes);
    if (failure != 0) {
        free(start);
        return failure;
    }
    /* Signals are the other thread's. */
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    fuseshim_park();
}

int fuseshim_start_keeper(int *end) {
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0)
        return -errno;
    pid_t child = fork();
    if (child != 0) {
        int reason = errno;
        close(ends[1]);
        if (child < 0)
            close(ends[0]);
        *end = ends[0];
        return child < 0 ? -reason : child;
    }
    /* What the daemon is told to end by is not meant for this one: it ends when the daemon has ended. */
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
        signal(signals[i], SIG_IGN);
    prctl(PR_SET_NAME, "vd-keeper");
    setsid();
    if (chdir("/") != 0)
        _exit(1);
    /* A pipe that the caller waits at would stay open. */
    int null = open("/dev/null", O_RDWR);
    for (int standard = 0; standard < 3; standard++)
        if (null < 0 || dup2(null, standard) < 0)
            _exit(1);
    int kept = fcntl(ends[1], F_DUPFD_CLOEXEC, 3);
    fuseshim_close_others(kept);
    *end = kept;
    return 0;
}

bool fuseshim_send(int descriptor, const void *message, size_t size) {
    ssize_t sent;
    while ((sent = send(descriptor, message, size, MSG_NOSIGNAL)) < 0 && errno == EINTR)
        ;
    return sent == (ssize_t)size;
}

void fuseshim_close_others(int kept) {
    if (kept > 3)
        close_range(3, (unsigned)kept - 1, 0);
    close_range(kept < 3 ? 3 : (unsigned)kept + 1, ~0U, 0);
}

int fuseshim_run(const char *const *arguments, char *output, size_t output_size) {
    if (output_size > 0)
        output[0] = 0;
    int caught = memfd_create("vdmount-messages", MFD_CLOEXEC);
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none, usual;
    sigemptyset(&none);
    sigemptyset(&usual);
    sigaddset(&usual, SIGPIPE);
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
    if (caught >= 0)
        posix_spawn_file_actions_adddup2(&actions, caught, STDERR_FILENO);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &usual);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    pid_t child = 0;
    int failure = posix_spawnp(&child, arguments[0], &actions, &attributes, (char *const *)arguments, environ);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    int status = -1, result = -1;
    if (failure == 0) {
        while (waitpid(child, &status, 0) < 0 && errno == EINTR)
            ;
        if (WIFEXITED(status))
            result = WEXITSTATUS(status);
        if (caught >= 0 && output_size > 1) {
            ssize_t length = pread(caught, output, output_size - 1, 0);
            output[length > 0 ? length : 0] = 0;
        }
    } else if (output_size > 0) {
        strncat(output, strerror(failure), output_size - 1);
    }
    if (caught >= 0)
        close(caught);
    return result;
}

void fuseshim_ignore_sigpipe(void) { signal(SIGPIPE, SIG_IGN); }

int fuseshim_signal_descriptor(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGHUP);
    if (pthread_sigmask(SIG_BLOCK, &set, NULL) != 0)
        return -1;
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

int fuseshim_event_descriptor(void) { return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); }

void fuseshim_event_raise(int descriptor) { eventfd_write(descriptor, 1); }

int fuseshim_wait(int signal_descriptor, int event_descriptor, int milliseconds) {
    struct pollfd both[2] = {{.fd = event_descriptor, .events = POLLIN}, {.fd = signal_descriptor, .events = POLLIN}};
    for (;;) {
        int count = poll(both, 2, milliseconds);
        if (count == 0)
            return -ETIMEDOUT;
        if (count < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (both[0].revents != 0)
            return 0;
        struct signalfd_siginfo info;
        if (both[1].revents != 0 && read(signal_descriptor, &info, sizeof info) == sizeof info)
            return (int)info.ssi_signo;
    }
}
