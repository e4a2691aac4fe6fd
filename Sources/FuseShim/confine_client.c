/*
 * Giving up what the process does not need that reaches servers for a daemon: it goes on making connections and reading
 * what names and certificates take, and parses what servers send.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "confine.h"

#include <fcntl.h>
#include <seccomp.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* linux/landlock.h as Linux 6.12 has it; see confine.c. Landlock(7) */
struct client_rules {
    uint64_t files;
    uint64_t network;
    uint64_t scopes;
};

struct client_path {
    uint64_t rights;
    int32_t descriptor;
} __attribute__((packed));

static const unsigned char file_rights[] = {13, 14, 15, 15, 16};

enum { rule_for_path = 1, may_read = 1 << 2, may_list = 1 << 3, scopes_since = 6, scope_rights = 3 };

/* Where libraries find what they load as they go, names and certificates. */
static const char *const readable[] = {
    "/etc", "/usr", "/lib", "/lib32", "/lib64", "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager",
    "/run/connman", "/proc/sys", "/proc/self", "/dev/null", "/dev/urandom", "/dev/random", "/sys/devices/system/cpu",
    /* wherever that may be */
    "/etc/resolv.conf", "/etc/hosts",
};

static void allow_reading(int rules, const char *path) {
    int descriptor = open(path, O_PATH | O_CLOEXEC);
    struct stat status;
    if (descriptor < 0)
        return;
    if (fstat(descriptor, &status) == 0) {
        struct client_path rule = {
            .rights = S_ISDIR(status.st_mode) ? may_read | may_list : may_read, .descriptor = descriptor};
        syscall(SYS_landlock_add_rule, rules, rule_for_path, &rule, 0);
    }
    close(descriptor);
}

static void give_up_files(const char *const *files) {
    long version = syscall(SYS_landlock_create_ruleset, NULL, 0, 1U /* LANDLOCK_CREATE_RULESET_VERSION */);
    if (version < 1)
        return;
    const int known = sizeof file_rights / sizeof *file_rights;
    struct client_rules rules = {
        .files = (1ULL << file_rights[version < known ? version - 1 : known - 1]) - 1,
        .scopes = version >= scopes_since ? scope_rights : 0,
    };
    int descriptor = (int)syscall(SYS_landlock_create_ruleset, &rules, sizeof rules, 0);
    if (descriptor < 0)
        return;
    for (size_t i = 0; i < sizeof readable / sizeof *readable; i++)
        allow_reading(descriptor, readable[i]);
    for (; *files != NULL; files++)
        allow_reading(descriptor, *files);
    syscall(SYS_landlock_restrict_self, descriptor, 0);
    close(descriptor);
}

/* What no client of a server has use for. */
static const char *const refused[] = {
    "execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "pidfd_open",
    "kcmp", "mount", "umount2", "fsopen", "fsmount", "fsconfig", "open_tree", "move_mount", "mount_setattr",
    "pivot_root", "chroot", "unshare", "setns", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup",
    "io_uring_enter", "io_uring_register", "add_key", "request_key", "keyctl", "init_module", "finit_module",
    "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff", "open_by_handle_at",
    "settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "sethostname", "setdomainname", "acct",
    "quotactl", "iopl", "ioperm", "personality", "listen", "accept", "accept4",
};

static void give_up_system_calls(void) {
    scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);
    if (filter == NULL)
        return;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        int number = seccomp_syscall_resolve_name(refused[i]);
        if (number != __NR_SCMP_ERROR)
            seccomp_rule_add(filter, SCMP_ACT_ERRNO(1 /* EPERM */), number, 0);
    }
    seccomp_load(filter);
    seccomp_release(filter);
}

void fuseshim_confine_client(const char *const *files) {
    prctl(PR_SET_NAME, "vd-storages");
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    give_up_files(files);
    fuseshim_give_up_capabilities();
    give_up_system_calls();
}
