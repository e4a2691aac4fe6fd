/* Unix sockets by path: what Swift cannot write down are the addresses. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "FuseShim.h"

#include <errno.h>
#include <poll.h>
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

void fuseshim_control_end(int descriptor) { shutdown(descriptor, SHUT_RDWR); }

/* Room for the descriptors of one message, aligned as the kernel wants it. */
union control_room {
    struct cmsghdr header;
    char bytes[CMSG_SPACE(FUSESHIM_MAX_PASSED * sizeof(int))];
};

ssize_t fuseshim_control_receive(int descriptor, void *buffer, size_t size, int *passed, size_t *count) {
    union control_room room;
    struct iovec piece = {.iov_base = buffer, .iov_len = size};
    struct msghdr message = {
        .msg_iov = &piece, .msg_iovlen = 1, .msg_control = room.bytes, .msg_controllen = sizeof room.bytes};
    *count = 0;
    ssize_t received;
    do
        received = recvmsg(descriptor, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    while (received < 0 && errno == EINTR);
    if (received < 0)
        return -errno;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part != NULL; part = CMSG_NXTHDR(&message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        size_t bytes = part->cmsg_len - CMSG_LEN(0);
        memcpy(passed + *count, CMSG_DATA(part), bytes);
        *count += bytes / sizeof(int);
    }
    if ((message.msg_flags & MSG_CTRUNC) == 0)
        return received;
    /* This process has no room for more descriptors, or somebody sent more than there is an array for. */
    for (size_t i = 0; i < *count; i++)
        close(passed[i]);
    *count = 0;
    return -EMFILE;
}

ssize_t fuseshim_control_send(int descriptor, const void *bytes, size_t size, const int *passed, size_t count,
                              bool waits) {
    int flags = MSG_NOSIGNAL | (waits ? 0 : MSG_DONTWAIT);
    ssize_t sent;
    if (count == 0) {
        do
            sent = send(descriptor, bytes, size, flags);
        while (sent < 0 && errno == EINTR);
        return sent < 0 ? -errno : sent;
    }
    if (count > FUSESHIM_MAX_PASSED)
        return -EINVAL;
    union control_room room;
    memset(&room, 0, sizeof room);
    struct iovec piece = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = size};
    struct msghdr message = {.msg_iov = &piece,
                             .msg_iovlen = 1,
                             .msg_control = room.bytes,
                             .msg_controllen = CMSG_SPACE(count * sizeof(int))};
    struct cmsghdr *part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(part), passed, count * sizeof(int));
    do
        sent = sendmsg(descriptor, &message, flags);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : sent;
}

int fuseshim_control_wait(int descriptor, int milliseconds) {
    struct pollfd wanted = {.fd = descriptor, .events = POLLIN};
    int found = poll(&wanted, 1, milliseconds);
    return found < 0 ? (errno == EINTR ? 0 : -errno) : found;
}

bool fuseshim_control_is_quiet(int descriptor) {
    char byte;
    ssize_t seen = recv(descriptor, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return seen < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR);
}
