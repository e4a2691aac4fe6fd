/*
 * The limit: passes one raw file through libfuse's low-level API and does nothing else. What vdmount reaches is
 * measured against it.
 *
 * cc -O2 passthrough.c -o passthrough $(pkg-config --cflags --libs fuse3) -lpthread
 * passthrough RAWFILE MOUNTPOINT [DELAY]    (a folder, which then holds disk.raw, or a file; stays in the foreground)
 *
 * With DELAY each read takes so many microseconds more: a slow disk.
 *
 * As fast as it can be done: one buffer a thread, allocated once; data page aligned; a request is answered where it
 * was received; threads are added while none waits, up to 16, and end when more than 4 wait; O_DIRECT openers get
 * direct I/O with parallel writes.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION FUSE_MAKE_VERSION(3, 14)
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { transfer = 1 << 20, page = 4096, headers = 80, most_threads = 16, kept_threads = 4 };

static int raw;
static useconds_t delay;
static struct stat raw_status;
static fuse_ino_t file_inode;
static struct fuse_session *session;
static atomic_int waiting, running;
static pthread_mutex_t end_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t end_condition = PTHREAD_COND_INITIALIZER;
static _Thread_local char *answer;

static void on_init(void *data, struct fuse_conn_info *connection) {
    (void)data;
    connection->max_write = connection->max_read = transfer;
    connection->max_background = 64;
    connection->congestion_threshold = 48;
#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17)
    fuse_unset_feature_flag(connection, FUSE_CAP_AUTO_INVAL_DATA);
    fuse_unset_feature_flag(connection, FUSE_CAP_SPLICE_READ);
#else
    connection->want &= ~(unsigned)(FUSE_CAP_AUTO_INVAL_DATA | FUSE_CAP_SPLICE_READ);
#endif
}

static struct stat status_of(fuse_ino_t inode) {
    struct stat status = raw_status;
    if (inode != file_inode)
        status = (struct stat){.st_mode = S_IFDIR | 0755, .st_nlink = 2};
    status.st_ino = inode;
    return status;
}

static void on_lookup(fuse_req_t request, fuse_ino_t parent, const char *name) {
    struct fuse_entry_param entry = {.ino = file_inode, .attr_timeout = 1, .entry_timeout = 3600};
    entry.attr = status_of(file_inode);
    if (parent == file_inode || strcmp(name, "disk.raw") != 0)
        fuse_reply_err(request, ENOENT);
    else
        fuse_reply_entry(request, &entry);
}

static void on_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info) {
    (void)info;
    struct stat status = status_of(inode);
    fuse_reply_attr(request, &status, 1);
}

static void on_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info) {
    (void)inode;
    info->keep_cache = 1;
    info->direct_io = (info->flags & O_DIRECT) != 0;
#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 15)
    info->parallel_direct_writes = info->direct_io;
    fuse_reply_open(request, info);
#else
    struct { uint64_t handle; uint32_t flags, padding; } opened = {.flags = 1 | 2 | 64}; /* struct fuse_open_out */
    if (info->direct_io)
        fuse_reply_buf(request, (char *)&opened, sizeof opened);
    else
        fuse_reply_open(request, info);
#endif
}

static void on_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *info) {
    (void)inode, (void)info;
    if (delay > 0)
        usleep(delay);
    ssize_t done = pread(raw, answer, size, offset);
    if (done < 0)
        fuse_reply_err(request, errno);
    else
        fuse_reply_buf(request, answer, (size_t)done);
}

static void on_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t size, off_t offset,
                     struct fuse_file_info *info) {
    (void)inode, (void)info;
    ssize_t done = pwrite(raw, data, size, offset);
    if (done < 0)
        fuse_reply_err(request, errno);
    else
        fuse_reply_write(request, (size_t)done);
}

static void on_fsync(fuse_req_t request, fuse_ino_t inode, int data_only, struct fuse_file_info *info) {
    (void)inode, (void)data_only, (void)info;
    fuse_reply_err(request, fdatasync(raw) == 0 ? 0 : errno);
}

static const struct fuse_lowlevel_ops operations = {
    .init = on_init, .lookup = on_lookup, .getattr = on_getattr, .open = on_open,
    .read = on_read, .write = on_write, .fsync = on_fsync,
};

static void *serve(void *unused);

static void add_thread(void) {
    pthread_t thread;
    atomic_fetch_add(&running, 1);
    atomic_fetch_add(&waiting, 1);
    if (pthread_create(&thread, NULL, serve, NULL) != 0)
        abort();
    pthread_detach(thread);
}

static void *serve(void *unused) {
    (void)unused;
    /* The two headers of a write request end at a page boundary, so its data is page aligned; reads answer there. */
    char *memory = mmap(NULL, transfer + 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        abort();
    struct fuse_buf request = {.mem = memory + page - headers};
    answer = memory + page;
    while (fuse_session_receive_buf(session, &request) > 0) {
        if (atomic_fetch_sub(&waiting, 1) == 1 && atomic_load(&running) < most_threads)
            add_thread();
        fuse_session_process_buf(session, &request);
        if (atomic_fetch_add(&waiting, 1) >= kept_threads)
            break;
    }
    atomic_fetch_sub(&waiting, 1);
    munmap(memory, transfer + 3 * page);
    pthread_mutex_lock(&end_lock);
    atomic_fetch_sub(&running, 1);
    pthread_cond_signal(&end_condition);
    pthread_mutex_unlock(&end_lock);
    return NULL;
}

int main(int count, char **arguments) {
    struct stat place;
    if (count < 3 || count > 4 || (raw = open(arguments[1], O_RDWR | O_CLOEXEC)) < 0 || fstat(raw, &raw_status) != 0 ||
        stat(arguments[2], &place) != 0) {
        fprintf(stderr, "usage: passthrough RAWFILE MOUNTPOINT [DELAY]: %s\n", strerror(errno));
        return 1;
    }
    delay = count == 4 ? (useconds_t)atoi(arguments[3]) : 0;
    file_inode = S_ISDIR(place.st_mode) ? FUSE_ROOT_ID + 1 : FUSE_ROOT_ID;
    char *options[] = {"passthrough", "-o", "max_read=1048576,allow_other,default_permissions,subtype=passthrough"};
    struct fuse_args list = FUSE_ARGS_INIT(3, options);
    session = fuse_session_new(&list, &operations, sizeof operations, NULL);
    if (session == NULL || fuse_session_mount(session, arguments[2]) != 0)
        return 1;
    add_thread();
    add_thread();
    pthread_mutex_lock(&end_lock);
    while (atomic_load(&running) > 0)
        pthread_cond_wait(&end_condition, &end_lock);
    pthread_mutex_unlock(&end_lock);
    fuse_session_destroy(session);
    return 0;
}
