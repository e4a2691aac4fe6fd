/*
 * Giving up what a daemon does not need any more: files it could open (Landlock), system calls (seccomp), capabilities.
 *
 * Landlock and capabilities belong to a thread and are inherited by the threads that it starts; the filter of system
 * calls is put on all threads at once.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "confine.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/fs.h>
#include <sched.h>
#include <seccomp.h>
#include <semaphore.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- Landlock ---- */

/* linux/landlock.h as Linux 6.12 has it; Debian 12's header ends with the first version. Landlock(7) */
struct landlock_rules {
    uint64_t files;
    uint64_t network;
    uint64_t scopes;
};

/* How many rights over files the versions of Landlock know, from the first on; the later ones none more. */
static const unsigned char file_rights[] = {13, 14, 15, 15, 16};

enum { network_since = 4, network_rights = 3, scopes_since = 6, scope_rights = 3 };

static int give_up_files(int *missing) {
    long version = syscall(SYS_landlock_create_ruleset, NULL, 0, 1U /* LANDLOCK_CREATE_RULESET_VERSION */);
    if (version < 0 && (errno == ENOSYS || errno == EOPNOTSUPP)) {
        *missing |= FUSESHIM_NO_LANDLOCK;
        return 0;
    }
    if (version < 1)
        return version < 0 ? -errno : -EINVAL;
    const int known = sizeof file_rights / sizeof *file_rights;
    struct landlock_rules rules = {
        .files = (1ULL << file_rights[version < known ? version - 1 : known - 1]) - 1,
        .network = version >= network_since ? network_rights : 0,
        .scopes = version >= scopes_since ? scope_rights : 0,
    };
    /* A kernel refuses a longer structure than it knows, unless what it does not know is zero. */
    int descriptor = (int)syscall(SYS_landlock_create_ruleset, &rules, sizeof rules, 0);
    if (descriptor < 0)
        return -errno;
    /* No rule is added: nothing can be opened. What is open already stays as it is. */
    int result = syscall(SYS_landlock_restrict_self, descriptor, 0) == 0 ? 0 : -errno;
    close(descriptor);
    return result;
}

/* ---- capabilities ---- */

int fuseshim_give_up_capabilities(void) {
    /* capset(2); the library for it would be one more dependency for one call. */
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0}}, held[_LINUX_CAPABILITY_U32S_3] = {{0}};
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    if (syscall(SYS_capget, &header, held) == 0 && memcmp(held, none, sizeof none) == 0)
        return 0;
    /* A service manager's filter may refuse the call; ours then leaves nothing that a capability is good for. */
    return syscall(SYS_capset, &header, none) == 0 || errno == EPERM ? 0 : -errno;
}

/* ---- this thread ---- */

static int confine_thread(int *missing, const char **step) {
    *step = "no new privileges";
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return -errno;
    *step = "Landlock";
    int result = give_up_files(missing);
    if (result == 0) {
        *step = "capabilities";
        result = fuseshim_give_up_capabilities();
    }
    return result;
}

/* ---- the thread that only waits ---- */

static struct {
    bool exists;
    sem_t asked, done;
    int missing, result;
    const char *step;
} parked;

void fuseshim_park_prepare(void) {
    sem_init(&parked.asked, 0, 0);
    sem_init(&parked.done, 0, 0);
    parked.exists = true;
}

void fuseshim_park(void) {
    for (;;) {
        while (sem_wait(&parked.asked) != 0)
            ;
        parked.result = confine_thread(&parked.missing, &parked.step);
        sem_post(&parked.done);
    }
}

static int confine_parked(int *missing, const char **step) {
    sem_post(&parked.asked);
    while (sem_wait(&parked.done) != 0)
        ;
    *missing |= parked.missing;
    *step = parked.step;
    return parked.result;
}

/* ---- system calls ---- */

/*
 * What serving a disk takes: its files and the kernel's requests, memory, threads and time. Nothing here opens,
 * connects, executes, mounts or signals others. Names that an architecture lacks are passed over.
 */
static const char *const allowed[] = {
    /* files that are open */
    "read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2", "lseek",
    "_llseek", "fsync", "fdatasync", "sync_file_range", "sync_file_range2", "fallocate", "ftruncate", "ftruncate64",
    "copy_file_range", "fadvise64", "fadvise64_64", "arm_fadvise64_64", "readahead", "fstat", "fstat64", "fstatfs",
    "fstatfs64", "close", "close_range", "dup", "dup2", "dup3", "fcntl", "fcntl64", "flock",
    /* waiting; connections to the control socket */
    "poll", "ppoll", "ppoll_time64", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2",
    "eventfd2", "timerfd_create", "timerfd_settime", "timerfd_settime64", "accept4", "getsockopt", "setsockopt",
    "shutdown", "recvfrom", "recvmsg",
    /* memory */
    "munmap", "mremap", "madvise", "brk", "membarrier",
    /* threads */
    "set_robust_list", "rseq", "futex", "futex_time64", "futex_waitv", "sched_yield", "sched_getaffinity",
    "sched_getparam", "sched_getscheduler", "sched_get_priority_max", "sched_get_priority_min", "setpriority",
    "gettid", "getpid", "getppid", "getuid", "geteuid", "getgid", "getegid", "exit", "exit_group", "wait4", "waitid",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait", "sigaltstack", "restart_syscall",
    /* time, and other questions to the kernel */
    "clock_gettime", "clock_gettime64", "clock_getres", "clock_nanosleep", "clock_nanosleep_time64", "nanosleep",
    "gettimeofday", "time", "getrandom", "getrlimit", "ugetrlimit", "getrusage", "sysinfo", "uname",
    /* leaving the terminal */
    "setsid", "chdir",
};

/* What the C library tries first and does without: told that there is no such call, it takes the older one. */
static const char *const unknown[] = {"clone3"};

static int allow(scmp_filter_ctx filter, const char *name, unsigned count, const struct scmp_arg_cmp *arguments) {
    int number = seccomp_syscall_resolve_name(name);
    if (number == __NR_SCMP_ERROR)
        return 0;
    int result = seccomp_rule_add_array(filter, SCMP_ACT_ALLOW, number, count, arguments);
    /* A call that only other architectures have. */
    return result == -EDOM ? 0 : result;
}

#define ALLOW(name, ...)                                                                                               \
    do {                                                                                                               \
        const struct scmp_arg_cmp arguments[] = {__VA_ARGS__};                                                         \
        int added = allow(filter, name, sizeof arguments / sizeof *arguments, arguments);                              \
        if (added != 0)                                                                                                \
            return added;                                                                                              \
    } while (0)

/* Calls that are harmless with some arguments alone. */
static int allow_some(scmp_filter_ctx filter) {
    /* Memory is never executable. */
    ALLOW("mmap", SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
    ALLOW("mmap2", SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
    ALLOW("mprotect", SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
    /* Threads, but no processes. */
    ALLOW("clone", SCMP_A0(SCMP_CMP_MASKED_EQ, CLONE_THREAD, CLONE_THREAD));
    /* Signals to this process alone. */
    ALLOW("tgkill", SCMP_A0(SCMP_CMP_EQ, (scmp_datum_t)getpid()));
    /* Files by descriptor: an empty path. */
    ALLOW("newfstatat", SCMP_A3(SCMP_CMP_MASKED_EQ, AT_EMPTY_PATH, AT_EMPTY_PATH));
    ALLOW("statx", SCMP_A2(SCMP_CMP_MASKED_EQ, AT_EMPTY_PATH, AT_EMPTY_PATH));
    /* To where a socket is connected, not to an address. */
    ALLOW("sendto", SCMP_A4(SCMP_CMP_EQ, 0));
    /* Limits are asked for, not changed. */
    ALLOW("prlimit64", SCMP_A2(SCMP_CMP_EQ, 0));
    ALLOW("prctl", SCMP_A0(SCMP_CMP_EQ, PR_SET_NAME));
    ALLOW("prctl", SCMP_A0(SCMP_CMP_EQ, PR_GET_NAME));
    ALLOW("prctl", SCMP_A0(SCMP_CMP_EQ, 0x53564d41 /* PR_SET_VMA: names of memory, for /proc */));
    static const unsigned long requests[] = {
        BLKDISCARD, BLKZEROOUT, BLKGETSIZE64, BLKSSZGET,          BLKPBSZGET,
        BLKFLSBUF,  FICLONE,    FICLONERANGE, 0x5401 /* TCGETS */};
    for (size_t i = 0; i < sizeof requests / sizeof *requests; i++)
        ALLOW("ioctl", SCMP_A1(SCMP_CMP_EQ, requests[i]));
    return 0;
}

static int fill(scmp_filter_ctx filter) {
    int result = seccomp_attr_set(filter, SCMP_FLTATR_CTL_TSYNC, 1);
    /* A binary tree instead of a list; libseccomp before 2.5 has none. */
    seccomp_attr_set(filter, SCMP_FLTATR_CTL_OPTIMIZE, 2);
    for (size_t i = 0; i < sizeof allowed / sizeof *allowed && result == 0; i++)
        result = allow(filter, allowed[i], 0, NULL);
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown && result == 0; i++)
        result = seccomp_rule_add(filter, SCMP_ACT_ERRNO(ENOSYS), seccomp_syscall_resolve_name(unknown[i]), 0);
    return result == 0 ? allow_some(filter) : result;
}

static int give_up_system_calls(int *missing) {
    /* Without CONFIG_SECCOMP_FILTER: EINVAL. */
    if (prctl(PR_GET_SECCOMP, 0, 0, 0, 0) < 0 && errno == EINVAL) {
        *missing |= FUSESHIM_NO_SECCOMP;
        return 0;
    }
    scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ERRNO(EPERM));
    if (filter == NULL)
        return -ENOMEM;
    int result = fill(filter);
    if (result == 0)
        result = seccomp_load(filter);
    seccomp_release(filter);
    return result;
}

/* ---- all of it ---- */

static int count_threads(void) {
    int count = 0;
    DIR *threads = opendir("/proc/self/task");
    if (threads == NULL)
        return -errno;
    struct dirent *thread;
    while ((thread = readdir(threads)) != NULL)
        count += thread->d_name[0] != '.';
    closedir(threads);
    return count;
}

int fuseshim_confine(int *missing, const char **step) {
    *missing = 0;
    *step = "threads";
    int threads = count_threads();
    if (threads != (parked.exists ? 2 : 1))
        return threads < 0 ? threads : -EBUSY;
    int result = parked.exists ? confine_parked(missing, step) : 0;
    if (result == 0)
        result = confine_thread(missing, step);
    if (result == 0) {
        *step = "seccomp";
        result = give_up_system_calls(missing);
    }
    return result;
}

/* ---- memory ---- */

void fuseshim_resist_memory_pressure(void) {
#ifndef PR_SET_IO_FLUSHER
    enum { PR_SET_IO_FLUSHER = 57 };
#endif
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
    int descriptor = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (descriptor < 0)
        return;
    static const char score[] = "-900";
    ssize_t written = write(descriptor, score, sizeof score - 1);
    (void)written;
    close(descriptor);
}
