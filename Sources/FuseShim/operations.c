/*
 * libfuse's callbacks: each unpacks its request, asks the file system's function and sends the one reply that
 * fuse_lowlevel.h lists for it.
 */
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Newer than the header of Debian 12's kernel in libfuse 3.14; from linux/fuse.h, protocol 7.38. */
enum { open_direct = 1 << 0, open_keep_cache = 1 << 1, open_no_flush = 1 << 5, open_parallel_direct_writes = 1 << 6 };

/* From this protocol (Linux 6.6) on, direct writers of a file drop what the page cache of others holds of it. */
enum { kernel_with_coherent_direct_io = 39 };

/* Names come and go with the partition table. */
static const double entry_seconds = 1;

static fuseshim_session *session_of(fuse_req_t request) { return fuse_req_userdata(request); }

static void set_feature(struct fuse_conn_info *connection, uint64_t feature, bool on) {
#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17)
    if (on)
        fuse_set_feature_flag(connection, feature);
    else
        fuse_unset_feature_flag(connection, feature);
#else
    if (on)
        connection->want |= connection->capable & (unsigned)feature;
    else
        connection->want &= ~(unsigned)feature;
#endif
}

static void on_init(void *data, struct fuse_conn_info *connection) {
    fuseshim_session *session = data;
    session->kernel_minor = connection->proto_minor;
    connection->max_write = FUSESHIM_MAX_TRANSFER;
    connection->max_read = FUSESHIM_MAX_TRANSFER;
    connection->max_background = 64;
    connection->congestion_threshold = 48;
    set_feature(connection, FUSE_CAP_ASYNC_READ, true);
    set_feature(connection, FUSE_CAP_ASYNC_DIO, true);
    set_feature(connection, FUSE_CAP_WRITEBACK_CACHE, false);
    set_feature(connection, FUSE_CAP_SPLICE_READ, false);
    set_feature(connection, FUSE_CAP_SPLICE_WRITE, false);
    set_feature(connection, FUSE_CAP_SPLICE_MOVE, false);
    /* Our own writes move the modification time; the page cache must not be dropped for that. */
    set_feature(connection, FUSE_CAP_AUTO_INVAL_DATA, false);
    /* O_TRUNC then comes as a change of the size to 0, whose answer keeps the kernel's size right at all times. */
    set_feature(connection, FUSE_CAP_ATOMIC_O_TRUNC, false);
#ifdef FUSE_CAP_DIRECT_IO_ALLOW_MMAP
    set_feature(connection, FUSE_CAP_DIRECT_IO_ALLOW_MMAP, true);
#endif
    __atomic_store_n(&session->ready, true, __ATOMIC_RELEASE);
}

static void fill_stat(struct stat *out, const fuseshim_attributes *in) {
    memset(out, 0, sizeof *out);
    out->st_ino = in->inode;
    out->st_mode = in->mode;
    out->st_nlink = in->links;
    out->st_uid = in->owner;
    out->st_gid = in->group;
    out->st_size = (off_t)in->size;
    out->st_blocks = (blkcnt_t)(in->allocated / 512 + (in->allocated % 512 != 0));
    out->st_blksize = 4096;
    out->st_mtim.tv_sec = in->modified_seconds;
    out->st_mtim.tv_nsec = in->modified_nanoseconds;
    out->st_atim = out->st_ctim = out->st_mtim;
}

static void reply_attributes(fuse_req_t request, int failure, const fuseshim_attributes *attributes) {
    if (failure != 0) {
        fuse_reply_err(request, failure);
        return;
    }
    struct stat status;
    fill_stat(&status, attributes);
    fuse_reply_attr(request, &status, attributes->valid_seconds);
}

static void on_lookup(fuse_req_t request, fuse_ino_t parent, const char *name) {
    fuseshim_session *session = session_of(request);
    fuseshim_attributes found = {0};
    int failure = session->operations.lookup(session->host, parent, name, &found);
    if (failure != 0) {
        fuse_reply_err(request, failure);
        return;
    }
    struct fuse_entry_param entry = {0};
    entry.ino = found.inode;
    entry.attr_timeout = found.valid_seconds;
    entry.entry_timeout = entry_seconds;
    fill_stat(&entry.attr, &found);
    fuse_reply_entry(request, &entry);
}

static void on_forget(fuse_req_t request, fuse_ino_t inode, uint64_t count) {
    (void)inode;
    (void)count;
    fuse_reply_none(request);
}

static void on_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info) {
    (void)info;
    fuseshim_session *session = session_of(request);
    fuseshim_attributes answer = {0};
    reply_attributes(request, session->operations.attributes(session->host, inode, &answer), &answer);
}

static void on_setattr(fuse_req_t request, fuse_ino_t inode, struct stat *status, int what,
                       struct fuse_file_info *info) {
    fuseshim_session *session = session_of(request);
    const int times = FUSE_SET_ATTR_ATIME | FUSE_SET_ATTR_MTIME | FUSE_SET_ATTR_CTIME | FUSE_SET_ATTR_ATIME_NOW |
                      FUSE_SET_ATTR_MTIME_NOW;
    fuseshim_change change = {
        .sets_size = (what & FUSE_SET_ATTR_SIZE) != 0,
        .sets_times = (what & times) != 0,
        .sets_other = (what & (FUSE_SET_ATTR_MODE | FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID)) != 0,
        .through_handle = info != NULL,
        .size = (uint64_t)status->st_size,
    };
    fuseshim_attributes answer = {0};
    reply_attributes(request, session->operations.change(session->host, inode, &change, &answer), &answer);
}

/* Sends the answer to an open request with a flag that struct fuse_file_info of this libfuse may not have. */
static void reply_opened(fuse_req_t request, struct fuse_file_info *info, const fuseshim_opened *opened, bool direct) {
    info->fh = opened->handle;
    info->keep_cache = opened->keep_cache;
    info->direct_io = direct;
    info->noflush = opened->no_flush_on_close;
#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 15)
    info->parallel_direct_writes = direct && opened->parallel_writes;
    fuse_reply_open(request, info);
#else
    if (!direct || !opened->parallel_writes) {
        fuse_reply_open(request, info);
        return;
    }
    const struct { /* struct fuse_open_out of linux/fuse.h */
        uint64_t handle;
        uint32_t flags;
        uint32_t padding;
    } answer = {
        .handle = opened->handle,
        .flags = open_direct | open_parallel_direct_writes | (opened->keep_cache ? open_keep_cache : 0u) |
                 (opened->no_flush_on_close ? open_no_flush : 0u),
    };
    fuse_reply_buf(request, (const char *)&answer, sizeof answer);
#endif
}

static void on_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info) {
    fuseshim_session *session = session_of(request);
    fuseshim_opened opened = {0};
    int failure = session->operations.open(session->host, inode, info->flags, &opened);
    if (failure != 0) {
        fuse_reply_err(request, failure);
        return;
    }
    /* An older kernel's way for O_DIRECT (through the page cache's direct I/O) is coherent, so it is left alone. */
    bool direct = opened.direct && (!opened.keep_cache || session->kernel_minor >= kernel_with_coherent_direct_io);
    reply_opened(request, info, &opened, direct);
}

static void on_release(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info) {
    (void)inode;
    session_of(request)->operations.closed(info->fh, info->flags);
    fuse_reply_err(request, 0);
}

static void on_releasedir(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info) {
    (void)inode;
    (void)info;
    fuse_reply_err(request, 0);
}

static void on_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *info) {
    (void)inode;
    size_t done = 0;
    if (__builtin_expect(size > FUSESHIM_MAX_TRANSFER || offset < 0, 0)) {
        fuse_reply_err(request, EINVAL);
        return;
    }
    int failure = session_of(request)->operations.read(info->fh, fuseshim_lane_data, size, (uint64_t)offset, &done);
    if (__builtin_expect(failure != 0, 0))
        fuse_reply_err(request, failure);
    else
        fuse_reply_buf(request, fuseshim_lane_data, done);
}

static void on_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t size, off_t offset,
                     struct fuse_file_info *info) {
    (void)inode;
    size_t done = 0;
    if (__builtin_expect(offset < 0, 0)) {
        fuse_reply_err(request, EINVAL);
        return;
    }
    int failure =
        session_of(request)->operations.write(info->fh, data, size, (uint64_t)offset, info->flags, &done);
    if (__builtin_expect(failure != 0, 0))
        fuse_reply_err(request, failure);
    else
        fuse_reply_write(request, done);
}

static void on_flush(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info) {
    (void)inode;
    fuse_reply_err(request, session_of(request)->operations.flush(info->fh));
}

static void on_fsync(fuse_req_t request, fuse_ino_t inode, int data_only, struct fuse_file_info *info) {
    (void)inode;
    (void)data_only;
    fuse_reply_err(request, session_of(request)->operations.sync(info->fh));
}

static void on_fallocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset, off_t length,
                         struct fuse_file_info *info) {
    (void)inode;
    fuseshim_range_operation operation;
    bool keep_size = (mode & FALLOC_FL_KEEP_SIZE) != 0;
    switch (mode & ~FALLOC_FL_KEEP_SIZE) {
    case 0:
        operation = FUSESHIM_ALLOCATE;
        break;
    case FALLOC_FL_PUNCH_HOLE:
        operation = FUSESHIM_DISCARD;
        break;
    case FALLOC_FL_ZERO_RANGE:
        operation = FUSESHIM_ZERO;
        break;
    default:
        fuse_reply_err(request, EOPNOTSUPP);
        return;
    }
    if (offset < 0 || length <= 0) {
        fuse_reply_err(request, EINVAL);
        return;
    }
    fuse_reply_err(request, session_of(request)->operations.range(info->fh, operation, (uint64_t)offset,
                                                                  (uint64_t)length, keep_size));
}

static void on_lseek(fuse_req_t request, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *info) {
    (void)inode;
    uint64_t found = 0;
    int failure = EINVAL;
    if ((whence == SEEK_DATA || whence == SEEK_HOLE) && offset >= 0)
        failure = session_of(request)->operations.seek(info->fh, (uint64_t)offset, whence == SEEK_DATA, &found);
    if (failure != 0)
        fuse_reply_err(request, failure);
    else
        fuse_reply_lseek(request, (off_t)found);
}

static void on_opendir(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info) {
    if (inode != FUSESHIM_ROOT) {
        fuse_reply_err(request, ENOTDIR);
        return;
    }
    fuse_reply_open(request, info);
}

static void on_readdir(fuse_req_t request, fuse_ino_t inode, size_t size, off_t position,
                       struct fuse_file_info *info) {
    (void)info;
    fuseshim_session *session = session_of(request);
    char buffer[4096];
    size_t room = size < sizeof buffer ? size : sizeof buffer, used = 0;
    for (uint64_t at = (uint64_t)position;; at++) {
        struct stat status = {.st_ino = inode, .st_mode = S_IFDIR};
        const char *name = at == 0 ? "." : "..";
        if (at >= 2) {
            uint64_t found = 0;
            uint32_t mode = 0;
            if (session->operations.entry(session->host, at - 2, &name, &found, &mode) != 0)
                break;
            status.st_ino = found;
            status.st_mode = mode;
        }
        size_t needed = fuse_add_direntry(request, buffer + used, room - used, name, &status, (off_t)(at + 1));
        if (needed > room - used)
            break;
        used += needed;
    }
    fuse_reply_buf(request, buffer, used);
}

/* What would change the tree: refused, as its names are fixed. */
static void on_mknod(fuse_req_t request, fuse_ino_t parent, const char *name, mode_t mode, dev_t device) {
    (void)parent, (void)name, (void)mode, (void)device;
    fuse_reply_err(request, EPERM);
}

static void on_mkdir(fuse_req_t request, fuse_ino_t parent, const char *name, mode_t mode) {
    (void)parent, (void)name, (void)mode;
    fuse_reply_err(request, EPERM);
}

static void on_unlink(fuse_req_t request, fuse_ino_t parent, const char *name) {
    (void)parent, (void)name;
    fuse_reply_err(request, EPERM);
}

static void on_rename(fuse_req_t request, fuse_ino_t parent, const char *name, fuse_ino_t new_parent,
                      const char *new_name, unsigned flags) {
    (void)parent, (void)name, (void)new_parent, (void)new_name, (void)flags;
    fuse_reply_err(request, EPERM);
}

static void on_symlink(fuse_req_t request, const char *target, fuse_ino_t parent, const char *name) {
    (void)target, (void)parent, (void)name;
    fuse_reply_err(request, EPERM);
}

static void on_link(fuse_req_t request, fuse_ino_t inode, fuse_ino_t new_parent, const char *name) {
    (void)inode, (void)new_parent, (void)name;
    fuse_reply_err(request, EPERM);
}

static void on_create(fuse_req_t request, fuse_ino_t parent, const char *name, mode_t mode,
                      struct fuse_file_info *info) {
    (void)parent, (void)name, (void)mode, (void)info;
    fuse_reply_err(request, EPERM);
}

static void on_statfs(fuse_req_t request, fuse_ino_t inode) {
    (void)inode;
    fuseshim_session *session = session_of(request);
    fuseshim_statistics answer = {0};
    int failure = session->operations.statistics(session->host, &answer);
    if (failure != 0) {
        fuse_reply_err(request, failure);
        return;
    }
    /* The block size is also the granularity at which a loop device discards. */
    struct statvfs status = {
        .f_bsize = 4096,
        .f_frsize = 4096,
        .f_blocks = answer.total_bytes / 4096,
        .f_bfree = answer.free_bytes / 4096,
        .f_bavail = answer.free_bytes / 4096,
        .f_files = answer.files,
        .f_namemax = NAME_MAX,
    };
    fuse_reply_statfs(request, &status);
}

const struct fuse_lowlevel_ops fuseshim_callbacks = {
    .init = on_init,
    .lookup = on_lookup,
    .forget = on_forget,
    .getattr = on_getattr,
    .setattr = on_setattr,
    .open = on_open,
    .read = on_read,
    .write = on_write,
    .flush = on_flush,
    .release = on_release,
    .fsync = on_fsync,
    .opendir = on_opendir,
    .readdir = on_readdir,
    .releasedir = on_releasedir,
    .statfs = on_statfs,
    .mknod = on_mknod,
    .mkdir = on_mkdir,
    .unlink = on_unlink,
    .rmdir = on_unlink,
    .rename = on_rename,
    .symlink = on_symlink,
    .link = on_link,
    .create = on_create,
    .fallocate = on_fallocate,
    .lseek = on_lseek,
};
