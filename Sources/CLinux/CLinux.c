#define _GNU_SOURCE
#include "CLinux.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

_Static_assert(clinux_O_PATH == O_PATH, "O_PATH differs on this architecture");
_Static_assert(clinux_O_DIRECT == O_DIRECT, "O_DIRECT differs on this architecture");

#define RETRY(call)                                                                                                   \
    ({                                                                                                                \
        long result_;                                                                                                 \
        do                                                                                                            \
            result_ = (call);                                                                                         \
        while (result_ < 0 && errno == EINTR);                                                                        \
        (int)(result_ < 0 ? -errno : result_);                                                                        \
    })

int clinux_open(const char *path, int flags, mode_t mode) { return RETRY(open(path, flags | O_CLOEXEC, mode)); }

int clinux_openat(int directory, const char *path, int flags, mode_t mode) {
    return RETRY(openat(directory, path, flags | O_CLOEXEC, mode));
}

int clinux_temporary(const char *folder) {
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/.vdmount-XXXXXX", folder) >= (int)sizeof path)
        return -ENAMETOOLONG;
    int descriptor = mkostemp(path, O_CLOEXEC);
    if (descriptor < 0)
        return -errno;
    unlink(path);
    return descriptor;
}

int clinux_reopen(int descriptor, int flags) {
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", descriptor);
    return RETRY(open(path, flags | O_CLOEXEC));
}

int clinux_punch_hole(int descriptor, int64_t offset, int64_t length) {
    return RETRY(fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length));
}

int clinux_clone_range(int source, uint64_t from, int target, uint64_t to, uint64_t length) {
    struct file_clone_range range = {.src_fd = source, .src_offset = from, .src_length = length, .dest_offset = to};
    return RETRY(ioctl(target, FICLONERANGE, &range));
}

int64_t clinux_copy_range(int source, uint64_t from, int target, uint64_t to, uint64_t length) {
    off_t in = (off_t)from, out = (off_t)to;
    ssize_t result;
    do
        result = copy_file_range(source, &in, target, &out, length, 0);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : result;
}

int clinux_file_system(int descriptor, uint64_t *block_size, uint64_t *type) {
    struct statfs status;
    if (fstatfs(descriptor, &status) != 0)
        return -errno;
    *block_size = (uint64_t)status.f_bsize;
    *type = (uint64_t)(unsigned long)status.f_type;
    return 0;
}

int clinux_zero_range(int descriptor, int64_t offset, int64_t length) {
    return RETRY(fallocate(descriptor, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length));
}

int clinux_allocate(int descriptor, int64_t offset, int64_t length) {
    return RETRY(fallocate(descriptor, 0, offset, length));
}

void clinux_copy_attributes(int from, int to) {
    struct stat status;
    if (fstat(from, &status) != 0)
        return;
    /* The group alone, where the owner cannot be given away. */
    if (fchown(to, status.st_uid, status.st_gid) != 0)
        (void)!fchown(to, (uid_t)-1, status.st_gid);
    char names[4096];
    ssize_t count = flistxattr(from, names, sizeof names);
    for (ssize_t start = 0; start < count; start += (ssize_t)strlen(names + start) + 1) {
        char value[4096];
        ssize_t size = fgetxattr(from, names + start, value, sizeof value);
        if (size >= 0)
            (void)fsetxattr(to, names + start, value, (size_t)size, 0);
    }
    (void)fchmod(to, status.st_mode & 07777);
}

int clinux_rename_new(const char *path, const char *new_path) {
    return RETRY(renameat2(AT_FDCWD, path, AT_FDCWD, new_path, RENAME_NOREPLACE));
}

int clinux_take_over(int source, int target) { return RETRY(dup3(source, target, O_CLOEXEC)); }

void clinux_start_writeback(int descriptor) { (void)sync_file_range(descriptor, 0, 0, SYNC_FILE_RANGE_WRITE); }

int clinux_device_size(int descriptor, uint64_t *bytes) { return RETRY(ioctl(descriptor, BLKGETSIZE64, bytes)); }

int clinux_device_sector_size(int descriptor, uint32_t *bytes) {
    int size = 0;
    int result = RETRY(ioctl(descriptor, BLKSSZGET, &size));
    *bytes = (uint32_t)size;
    return result;
}

int clinux_device_discard(int descriptor, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return RETRY(ioctl(descriptor, BLKDISCARD, range));
}

int clinux_device_zero(int descriptor, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return RETRY(ioctl(descriptor, BLKZEROOUT, range));
}

static struct flock byte_range(short type, int64_t offset, int64_t length) {
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = offset, .l_len = length};
}

int clinux_ofd_lock(int descriptor, int64_t offset, int64_t length, bool write) {
    struct flock lock = byte_range(write ? F_WRLCK : F_RDLCK, offset, length);
    return RETRY(fcntl(descriptor, F_OFD_SETLK, &lock));
}

int clinux_ofd_unlock(int descriptor, int64_t offset, int64_t length) {
    struct flock lock = byte_range(F_UNLCK, offset, length);
    return RETRY(fcntl(descriptor, F_OFD_SETLK, &lock));
}

int clinux_ofd_is_locked(int descriptor, int64_t offset, int64_t length) {
    struct flock lock = byte_range(F_WRLCK, offset, length);
    int result = RETRY(fcntl(descriptor, F_OFD_GETLK, &lock));
    return result < 0 ? result : lock.l_type != F_UNLCK;
}

void clinux_futex_wait(const uint32_t *word, uint32_t expected) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, NULL, NULL, 0);
}

void clinux_futex_wake_all(const uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

int clinux_fill_standard_descriptors(void) {
    for (int descriptor = 0; descriptor <= 2; descriptor++) {
        if (fcntl(descriptor, F_GETFD) >= 0 || errno != EBADF)
            continue;
        /* The lowest free number is this one: those below are open. */
        int opened = RETRY(open("/dev/null", O_RDWR));
        if (opened < 0)
            return opened;
    }
    return 0;
}

int clinux_flush_output(void) {
    int result = fflush(stdout) == 0 ? 0 : -errno;
    if (result == 0 && ferror(stdout))
        result = -EIO;
    clearerr(stdout);
    return result;
}

int clinux_raise_file_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return -errno;
    limit.rlim_cur = limit.rlim_max;
    return setrlimit(RLIMIT_NOFILE, &limit) == 0 ? 0 : -errno;
}

uint64_t clinux_random(void) {
    uint64_t value = 0;
    while (getrandom(&value, sizeof value, 0) != sizeof value) {
    }
    return value;
}

int clinux_errno(void) { return errno; }

void clinux_strerror(int code, char *text, size_t size) {
    const char *message = strerror_r(code, text, size);
    if (message != text)
        snprintf(text, size, "%s", message);
}
