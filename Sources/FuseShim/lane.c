/* A lane: one buffer that requests are received into and answered from. */
#include "shim.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/*
 * In front of a write's data stand struct fuse_in_header and struct fuse_write_in of linux/fuse.h, 40 bytes each.
 * Received at that distance before a page boundary, the data is page aligned, and a read request, as long as these
 * two, ends where its answer begins. One page more than the largest request leaves room for longer headers.
 */
enum { page = 4096, headers = 80, room = headers + FUSESHIM_MAX_TRANSFER + page, mapping = page + room };

struct fuseshim_lane {
    fuseshim_session *session;
    fuseshim_lane *next; /* of the session */
    pid_t thread;
    char *memory;
    struct fuse_buf request;
    int device;
};

/* Ignored by whoever does not wait for it, so it may go to every thread. */
enum { wake_signal = SIGURG };

_Thread_local void *fuseshim_lane_data;

fuseshim_lane *fuseshim_lane_new(fuseshim_session *session) {
    fuseshim_lane *lane = calloc(1, sizeof *lane);
    if (lane == NULL)
        return NULL;
    void *memory = mmap(NULL, mapping, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        free(lane);
        return NULL;
    }
    /* Dispatch blocks all signals in its threads; this one must get through to end a waiting receive. */
    sigset_t wake;
    sigemptyset(&wake);
    sigaddset(&wake, wake_signal);
    pthread_sigmask(SIG_UNBLOCK, &wake, NULL);
    lane->session = session;
    lane->memory = memory;
    lane->request.mem = lane->memory + page - headers;
    lane->device = fuse_session_fd(session->fuse);
    lane->thread = gettid();
    pthread_mutex_lock(&session->lanes_lock);
    lane->next = session->lanes;
    session->lanes = lane;
    pthread_mutex_unlock(&session->lanes_lock);
    return lane;
}

void fuseshim_lane_free(fuseshim_lane *lane) {
    if (lane == NULL)
        return;
    pthread_mutex_lock(&lane->session->lanes_lock);
    fuseshim_lane **link = &lane->session->lanes;
    while (*link != lane)
        link = &(*link)->next;
    *link = lane->next;
    pthread_mutex_unlock(&lane->session->lanes_lock);
    munmap(lane->memory, mapping);
    free(lane);
}

/*
 * What fuse_session_receive_buf does without splice; that one asks for a buffer of libfuse's own size, which differs
 * between its versions.
 */
ssize_t fuseshim_lane_receive(fuseshim_lane *lane) {
    for (;;) {
        if (__builtin_expect(__atomic_load_n(&lane->session->ending, __ATOMIC_RELAXED), 0))
            return 0;
        ssize_t size = read(lane->device, lane->request.mem, room);
        if (__builtin_expect(size > 0, 1)) {
            lane->request.size = (size_t)size;
            return size;
        }
        if (size == 0 || errno == ENODEV || fuse_session_exited(lane->session->fuse))
            return 0;
        /* ENOENT: the request was withdrawn while it was being handed over. */
        if (errno != EINTR && errno != ENOENT && errno != EAGAIN)
            return -errno;
    }
}

void fuseshim_lane_process(fuseshim_lane *lane) {
    fuseshim_lane_data = lane->memory + page;
    fuse_session_process_buf(lane->session->fuse, &lane->request);
}

static void wake_up(int signal) { (void)signal; }

void fuseshim_lanes_interrupt(fuseshim_session *session) {
    __atomic_store_n(&session->ending, true, __ATOMIC_RELAXED);
    /* Without SA_RESTART: the read it comes into returns EINTR. */
    struct sigaction action = {.sa_handler = wake_up};
    sigaction(wake_signal, &action, NULL);
    /* Under the lock no lane ends, so each thread is there, and is a lane's. */
    pthread_mutex_lock(&session->lanes_lock);
    for (fuseshim_lane *lane = session->lanes; lane != NULL; lane = lane->next)
        syscall(SYS_tgkill, getpid(), lane->thread, wake_signal);
    pthread_mutex_unlock(&session->lanes_lock);
}
