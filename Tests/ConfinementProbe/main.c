/*
 * A daemon that has been taken over: it confines itself as vdmount does and then tries to do harm.
 *
 *     ConfinementProbe attempt            prints a line an attempt: its name, and "allowed" or the name of the error
 *     ConfinementProbe without landlock|seccomp PROGRAM [ARGUMENT...]
 *                                         runs a program as on a kernel that lacks one of them
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "FuseShim.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static int before; /* open since before the confinement */
static int missing;

static void say(const char *thread, const char *name, long result) {
    /* Without the C library's buffers: a forked copy would print them again. */
    char line[200];
    int size = snprintf(line, sizeof line, "%s %s %s\n", thread, name, result >= 0 ? "allowed" : strerrorname_np(errno));
    if (write(STDOUT_FILENO, line, (size_t)size) != size)
        _exit(9);
}

static long attempt_socket(int family, int type) { return socket(family, type, 0); }

static long attempt_execute(void) {
    char *const arguments[] = {"/bin/true", NULL};
    return execv(arguments[0], arguments);
}

static long attempt_fork(void) {
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    return child;
}

static long attempt_executable_memory(void) {
    void *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? 0 : mprotect(memory, 4096, PROT_READ | PROT_EXEC);
}

static long attempt_send_elsewhere(void) {
    struct sockaddr_un place = {.sun_family = AF_UNIX, .sun_path = "/run/nowhere"};
    return sendto(before, "x", 1, 0, (struct sockaddr *)&place, sizeof place);
}

/* Calls that need no arguments to be refused: a filter looks before the kernel does. */
static const struct {
    const char *name;
    long number;
} calls[] = {
    {"bind", SYS_bind}, {"listen", SYS_listen}, {"connect", SYS_connect}, {"sendmsg", SYS_sendmsg},
    {"ptrace", SYS_ptrace}, {"process_vm_readv", SYS_process_vm_readv}, {"process_vm_writev", SYS_process_vm_writev},
    {"pidfd_open", 434}, {"pidfd_getfd", 438}, {"mount", SYS_mount}, {"umount2", SYS_umount2}, {"fsopen", 430},
    {"move_mount", 429}, {"pivot_root", SYS_pivot_root}, {"chroot", SYS_chroot}, {"unshare", SYS_unshare},
    {"setns", SYS_setns}, {"bpf", SYS_bpf}, {"perf_event_open", SYS_perf_event_open}, {"userfaultfd", SYS_userfaultfd},
    {"io_uring_setup", 425}, {"io_uring_enter", 426}, {"add_key", SYS_add_key}, {"keyctl", SYS_keyctl},
    {"init_module", SYS_init_module}, {"finit_module", SYS_finit_module}, {"reboot", SYS_reboot},
    {"swapon", SYS_swapon}, {"sethostname", SYS_sethostname}, {"settimeofday", SYS_settimeofday},
    {"setuid", SYS_setuid}, {"setresuid", SYS_setresuid}, {"setgroups", SYS_setgroups}, {"capset", SYS_capset},
    {"open_by_handle_at", SYS_open_by_handle_at}, {"memfd_create", SYS_memfd_create}, {"execveat", SYS_execveat},
    {"unlinkat", SYS_unlinkat}, {"renameat2", SYS_renameat2}, {"linkat", SYS_linkat}, {"symlinkat", SYS_symlinkat},
    {"mkdirat", SYS_mkdirat}, {"mknodat", SYS_mknodat}, {"fchmod", SYS_fchmod}, {"fchmodat", SYS_fchmodat},
    {"fchown", SYS_fchown}, {"fsetxattr", SYS_fsetxattr}, {"truncate", SYS_truncate}, {"readlinkat", SYS_readlinkat},
    {"getdents64", SYS_getdents64}, {"kcmp", SYS_kcmp}, {"personality", SYS_personality}, {"seccomp", SYS_seccomp},
};

static void *attempt(void *name) {
    const char *thread = name;
    char byte = 0;
    say(thread, "read-what-is-open", pread(before, &byte, 1, 0));
    say(thread, "read-shadow", open("/etc/shadow", O_RDONLY));
    say(thread, "read-folder", open("/etc", O_RDONLY | O_DIRECTORY));
    say(thread, "new-file", open("confinement-probe.new", O_CREAT | O_WRONLY, 0600));
    say(thread, "unnamed-file", open(".", O_TMPFILE | O_WRONLY, 0600));
    say(thread, "internet", attempt_socket(AF_INET, SOCK_STREAM));
    say(thread, "local-socket", attempt_socket(AF_UNIX, SOCK_STREAM));
    say(thread, "netlink", attempt_socket(AF_NETLINK, SOCK_RAW));
    say(thread, "send-elsewhere", attempt_send_elsewhere());
    say(thread, "execute", attempt_execute());
    say(thread, "fork", attempt_fork());
    say(thread, "signal-parent", kill(getppid(), 0));
    say(thread, "signal-thread-of-parent", syscall(SYS_tgkill, getppid(), getppid(), 0));
    say(thread, "executable-memory", attempt_executable_memory());
    say(thread, "limits", setrlimit(RLIMIT_NOFILE, &(struct rlimit){1000, 1000}));
    say(thread, "terminal-input", ioctl(STDOUT_FILENO, TIOCSTI, "x"));
    say(thread, "stat-by-path", syscall(SYS_newfstatat, AT_FDCWD, "/etc/shadow", &(struct stat){0}, 0));
    /* Without the filter some of them would do what they do. */
    for (size_t i = 0; i < sizeof calls / sizeof *calls && (missing & FUSESHIM_NO_SECCOMP) == 0; i++)
        say(thread, calls[i].name, syscall(calls[i].number, 0, 0, 0, 0, 0, 0));
    return NULL;
}

/* In the thread that vdmount's daemon goes on in. */
static void go_on(void *context) {
    (void)context;
    const char *step = "";
    int result = fuseshim_confine(&missing, &step);
    if (result != 0) {
        fprintf(stderr, "%s: %s\n", step, strerror(-result));
        exit(1);
    }
    printf("missing %d\n", missing);
    fflush(stdout);
    attempt("first");
    pthread_t later;
    if (pthread_create(&later, NULL, attempt, "later") != 0)
        exit(2);
    pthread_join(later, NULL);
    exit(0);
}

static int without(const char *what, char **command) {
    scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);
    int landlock = strcmp(what, "landlock") == 0;
    int added = landlock ? seccomp_rule_add(filter, SCMP_ACT_ERRNO(ENOSYS), 444 /* landlock_create_ruleset */, 0)
                         : seccomp_rule_add(filter, SCMP_ACT_ERRNO(EINVAL), SCMP_SYS(prctl), 1,
                                            SCMP_A0(SCMP_CMP_EQ, PR_GET_SECCOMP));
    if (added != 0 || seccomp_load(filter) != 0) {
        fprintf(stderr, "the filter of the test cannot be made\n");
        return 3;
    }
    execv(command[0], command);
    perror(command[0]);
    return 3;
}

int main(int count, char **arguments) {
    if (count >= 4 && strcmp(arguments[1], "without") == 0)
        return without(arguments[2], arguments + 3);
    before = open("/proc/self/exe", O_RDONLY);
    if (count != 2 || strcmp(arguments[1], "attempt") != 0 || before < 0)
        return 64;
    fuseshim_ignore_sigpipe();
    return fuseshim_go_on_in_thread(go_on, NULL);
}
