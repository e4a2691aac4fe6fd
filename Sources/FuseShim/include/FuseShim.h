/*
 * FuseShim: libfuse's low-level interface as plain C, so that Swift sees no libfuse type.
 *
 * A file system is a table of functions. Each gets plain arguments and returns 0 or an errno value; the shim turns
 * that into the one reply the kernel waits for, so no request can be answered twice or never. Requests are taken by
 * lanes: a lane is one thread's buffer, and the thread itself belongs to the caller.
 *
 * The second half holds what a daemon needs of the process and Swift cannot do: fork, spawn, signals as a descriptor.
 */
#ifndef FUSESHIM_H
#define FUSESHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* The most bytes one read or write request carries. */
#define FUSESHIM_MAX_TRANSFER (1024 * 1024)

/* The inode number of the root. */
#define FUSESHIM_ROOT 1

typedef struct fuseshim_session fuseshim_session;
typedef struct fuseshim_lane fuseshim_lane;

/* What stat(2) shows of an inode. `mode` holds the file type too. */
typedef struct fuseshim_attributes {
    uint64_t inode;
    uint64_t size;
    uint64_t allocated; /* bytes, rounded up to 512 for st_blocks */
    uint32_t mode;
    uint32_t links;
    uint32_t owner;
    uint32_t group;
    int64_t modified_seconds;
    uint32_t modified_nanoseconds;
    double valid_seconds; /* how long the kernel may keep these attributes */
} fuseshim_attributes;

/* What a setattr request asks for. */
typedef struct fuseshim_change {
    bool sets_size;
    bool sets_times;
    bool sets_other;    /* mode, owner or group */
    bool through_handle; /* ftruncate(2), not truncate(2) nor open(2) with O_TRUNC */
    uint64_t size;
} fuseshim_change;

/* The answer to an open request. */
typedef struct fuseshim_opened {
    uint64_t handle;        /* comes back with each later request on the open file */
    bool keep_cache;        /* what the page cache holds of the file is still right */
    bool direct;            /* this opener bypasses the page cache */
    bool parallel_writes;   /* with direct: its writes need not wait for each other */
    bool no_flush_on_close; /* nothing to do when a descriptor is closed */
} fuseshim_opened;

typedef struct fuseshim_statistics {
    uint64_t total_bytes;
    uint64_t free_bytes;
    uint64_t files;
} fuseshim_statistics;

/* What fallocate(2) asks for. */
typedef enum fuseshim_range_operation {
    FUSESHIM_ALLOCATE,
    FUSESHIM_DISCARD,
    FUSESHIM_ZERO,
} fuseshim_range_operation;

/*
 * A file system. Each function returns 0 or an errno value and may be called on any lane, several at once. `host` is
 * what the session was created with; `handle` what `open` answered. The data of `write` lies in the lane's buffer,
 * `read` fills the lane's buffer; both are page aligned and valid until the function returns.
 */
typedef struct fuseshim_operations {
    int (*lookup)(void *host, uint64_t parent, const char *name, fuseshim_attributes *found);
    int (*attributes)(void *host, uint64_t inode, fuseshim_attributes *answer);
    int (*change)(void *host, uint64_t inode, const fuseshim_change *change, fuseshim_attributes *answer);
    int (*open)(void *host, uint64_t inode, int flags, fuseshim_opened *answer);
    int (*read)(uint64_t handle, void *buffer, size_t size, uint64_t offset, size_t *done);
    int (*write)(uint64_t handle, const void *data, size_t size, uint64_t offset, int flags, size_t *done);
    void (*closed)(uint64_t handle, int flags); /* the last descriptor of an open file is gone; open(2)'s flags */
    int (*flush)(uint64_t handle);   /* a descriptor of the open file is being closed */
    int (*sync)(uint64_t handle);    /* fsync(2), fdatasync(2) */
    int (*range)(uint64_t handle, fuseshim_range_operation operation, uint64_t offset, uint64_t length, bool keep_size);
    int (*seek)(uint64_t handle, uint64_t offset, bool data, uint64_t *found);
    /* The entry at `position` (0 is the first) of the root folder; ENOENT behind the last. `name` stays valid. */
    int (*entry)(void *host, uint64_t position, const char **name, uint64_t *inode, uint32_t *mode);
    int (*statistics)(void *host, fuseshim_statistics *answer);
} fuseshim_operations;

/* ---- session (session.c) ---- */

/*
 * A session not yet mounted, or NULL with a text in `error`. `options` are mount options ("ro", "fsname=x"), each
 * taken literally: a comma in it is data. max_read is added here.
 */
fuseshim_session *fuseshim_session_new(const fuseshim_operations *operations, void *host, const char *const *options,
                                       size_t option_count, char *error, size_t error_size);

/*
 * Mounts at a folder or a regular file. Returns 0, or -1 with a text in `error`: what libfuse or fusermount3 said,
 * which they would otherwise print. To be called while the process has one thread.
 */
int fuseshim_session_mount(fuseshim_session *session, const char *mountpoint, char *error, size_t error_size);

/* Frees the session and closes its device. All lanes must have ended. It does not unmount. */
void fuseshim_session_destroy(fuseshim_session *session);

/* Whether a lane saw the handshake with the kernel succeed. */
bool fuseshim_session_ready(const fuseshim_session *session);

/* libfuse's version, such as "3.14.0". */
const char *fuseshim_library_version(void);

/* ---- lanes (lane.c) ---- */

/* A lane of the session with its own buffer, or NULL without memory. */
fuseshim_lane *fuseshim_lane_new(fuseshim_session *session);
void fuseshim_lane_free(fuseshim_lane *lane);

/*
 * Waits for a request and receives it: its size, 0 when the mount is gone for good, or -errno.
 */
ssize_t fuseshim_lane_receive(fuseshim_lane *lane);

/* Answers the request received last. */
void fuseshim_lane_process(fuseshim_lane *lane);

/*
 * Makes all lanes of the session end soon, though the mount is still there: their receive returns 0, also where it
 * waits now. A lane may slip into waiting while this runs: to be called again until all have ended.
 */
void fuseshim_lanes_interrupt(fuseshim_session *session);

/* ---- process (process.c) ---- */

/* fork(2). Only before the first thread and the first use of Dispatch: neither survives it. */
pid_t fuseshim_fork(void);

/*
 * Goes on in a new thread, with a stack as large as the first one's; the caller's thread does nothing any more but be
 * confined. Returns only if there is no new thread: an errno value.
 */
int fuseshim_go_on_in_thread(void (*body)(void *context), void *context);

/*
 * Starts the keeper: a process of its own that is connected with this one by a socket for messages, has nothing else
 * open, and overhears what this one is told to end by. Only before the first thread. Returns 0 in the keeper, its
 * number in the caller, or -errno; `end` is the end of the socket.
 */
int fuseshim_start_keeper(int *end);

/* Sends a message over a connected socket; whether all of it went. */
bool fuseshim_send(int descriptor, const void *message, size_t size);

/* Closes every descriptor from 3 on but this one: what the caller had open is not ours to keep. */
void fuseshim_close_others(int kept);

/*
 * Runs a program found in PATH with the arguments (NULL-terminated) and waits for its end. Returns its exit status,
 * -1 if it could not be run or was killed. What it wrote to standard error goes into `output`.
 */
int fuseshim_run(const char *const *arguments, char *output, size_t output_size);

/* ---- confinement (confine.c) ---- */

/* What a kernel may lack. */
#define FUSESHIM_NO_LANDLOCK 1
#define FUSESHIM_NO_SECCOMP 2

/*
 * Gives up, for good and in all threads: opening files, connecting, executing, other processes, all capabilities. Files
 * and sockets that are open stay so. To be called while there is no thread but the caller's and the one that
 * fuseshim_go_on_in_thread left waiting.
 *
 * Returns 0, and in `missing` what the kernel lacks; or -errno, and in `step` what failed.
 */
int fuseshim_confine(int *missing, const char **step);

/*
 * Gives up what a process does not need that only makes connections: writing to and executing files, reading any but
 * `files` (NULL-terminated) and the system's own, all capabilities, other processes. As far as the kernel can. To be
 * called before there are threads.
 */
void fuseshim_confine_client(const char *const *files);

/*
 * Lets this thread and those that it will start write out memory without waiting for memory to be written out, and the
 * process be one of the last to be ended for want of it. What the system does not let this user do stays as it is.
 */
void fuseshim_resist_memory_pressure(void);

/* ---- signals and events (process.c) ---- */

/* Lets SIGPIPE show up as EPIPE. */
void fuseshim_ignore_sigpipe(void);

/*
 * Blocks SIGINT, SIGTERM and SIGHUP in this thread and those it will start, and returns a descriptor that delivers
 * them, or -1. Dispatch blocks them in its own threads.
 */
int fuseshim_signal_descriptor(void);

/* An event descriptor (eventfd), or -1; and how to raise it. */
int fuseshim_event_descriptor(void);
void fuseshim_event_raise(int descriptor);

/* ---- loop devices (loop.c) ---- */

/*
 * Attaches a file to a free loop device with sectors of that size, with direct I/O if the file takes it. Returns a
 * descriptor of the device, or -errno; its name goes into `name`. When neither the descriptor nor anybody else has the
 * device open any more, the file is detached.
 */
int fuseshim_loop_attach(const char *path, bool read_only, unsigned sector_size, char *name, size_t name_size);

/* ---- control socket (control.c) ---- */

/* A listening Unix socket at a path that nobody but this user can connect to, or -errno. Sets the umask meanwhile. */
int fuseshim_control_listen(const char *path);
/* Takes a connection and says whose it is: a descriptor that waits two seconds at most, or -errno. */
int fuseshim_control_accept(int listening, uid_t *user);
/* Connects to one and says whose it is: a descriptor that waits two seconds at most, or -errno. */
int fuseshim_control_connect(const char *path, uid_t *user);
/* Nothing more will be sent. */
void fuseshim_control_end_sending(int descriptor);
/* Nothing more will be sent or received, by whichever thread. */
void fuseshim_control_end(int descriptor);

/* The most descriptors of one message: Linux' SCM_MAX_FD. unix(7) */
#define FUSESHIM_MAX_PASSED 253

/*
 * Receives what is there: bytes, 0 at the end, or -errno (-EAGAIN if nothing is). Descriptors that came with it are the
 * caller's: their numbers go into `passed`, which has room for FUSESHIM_MAX_PASSED, how many into `count`. -EMFILE if
 * not all of them could be had; then none is left.
 */
ssize_t fuseshim_control_receive(int descriptor, void *buffer, size_t size, int *passed, size_t *count);

/* Sends bytes and with them descriptors: how many bytes went (with descriptors: with the first of them), or -errno. */
ssize_t fuseshim_control_send(int descriptor, const void *bytes, size_t size, const int *passed, size_t count,
                              bool waits);

/* Waits until there is something to receive, or the end: 1; 0 if the time is over or a signal came; -errno. */
int fuseshim_control_wait(int descriptor, int milliseconds);

/* Whether nothing is there to be received, and the other side has not ended. */
bool fuseshim_control_is_quiet(int descriptor);

/*
 * Waits for either: the number of the signal that came, 0 if the event was raised, or -errno; -ETIMEDOUT after so many
 * milliseconds unless they are negative. A descriptor of -1 is not waited for.
 */
int fuseshim_wait(int signal_descriptor, int event_descriptor, int milliseconds);

#endif
