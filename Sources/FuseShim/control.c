/* Unix sockets by path: what Swift cannot write down are the addresses. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "FuseShim.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

static int control_socket(const char *path, struct sockaddr_un *address) {
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    if (strlen(path) >= sizeof address->sun_path)
        return -ENAMETOOLONG;
    strcpy(address->sun_path, path);
    int descriptor = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    return descriptor < 0 ? -errno : descriptor;
}

/* Nobody waits for the other side for long. */
static void limit_waiting(int descriptor) {
    struct timeval limit = {.tv_sec = 2};
    setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(descriptor, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

int fuseshim_control_listen(const char *path) {
    struct sockaddr_un address;
    int descriptor = control_socket(path, &address);
    if (descriptor < 0)
        return descriptor;
    /* The mode is right from the beginning: bind takes it from the umask. No other thread of ours makes files. */
    mode_t before = umask(0177);
    int bound = bind(descriptor, (struct sockaddr *)&address, sizeof address);
    int reason = errno;
    umask(before);
    if (bound != 0 || listen(descriptor, 8) != 0) {
        reason = bound != 0 ? reason : errno;
        close(descriptor);
        return -reason;
    }
    return descriptor;
}

/* Says whose process the other end of a connection is; takes the descriptor and gives it back, or -errno. */
static int with_peer(int descriptor, uid_t *user) {
    struct ucred peer = {0};
    socklen_t size = sizeof peer;
    if (getsockopt(descriptor, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
        int reason = errno;
        close(descriptor);
        return -reason;
    }
    *user = peer.uid;
    return descriptor;
}

int fuseshim_control_accept(int listening, uid_t *user) {
    int descriptor = accept4(listening, NULL, NULL, SOCK_CLOEXEC);
    if (descriptor < 0)
        return -errno;
    limit_waiting(descriptor);
    return with_peer(descriptor, user);
}

int fuseshim_control_connect(const char *path, uid_t *user) {
    struct sockaddr_un address;
    int descriptor = control_socket(path, &address);
    if (descriptor < 0)
        return descriptor;
    limit_waiting(descriptor);
    if (connect(descriptor, (struct sockaddr *)&address, sizeof address) != 0) {
        int reason = errno;
        close(descriptor);
        return -reason;
    }
    return with_peer(descriptor, user);
}

void fuseshim_control_end_sending(int descriptor) { shutdown(descriptor, SHUT_WR); }
