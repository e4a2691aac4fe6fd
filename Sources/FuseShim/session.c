/* Creating, mounting and ending a libfuse session. */
#include "shim.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* libfuse says what went wrong only through its log; the last text is kept for the caller's message. */
static char last_log[512];

static void keep_log(enum fuse_log_level level, const char *format, va_list arguments) {
    if (level <= FUSE_LOG_ERR)
        vsnprintf(last_log, sizeof last_log, format, arguments);
}

/* Copies a text without leading "fuse: ", line ends turned into "; ". */
static void put_text(char *to, size_t size, const char *text) {
    static const char *const prefixes[] = {"fuse: ", "fusermount3: ", "fusermount: "};
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++)
        if (strncmp(text, prefixes[i], strlen(prefixes[i])) == 0)
            text += strlen(prefixes[i]);
    size_t length = strlen(text);
    while (length > 0 && text[length - 1] == '\n')
        length--;
    size_t at = 0;
    for (size_t i = 0; i < length && at + 3 < size; i++) {
        if (text[i] == '\n')
            to[at++] = ';';
        to[at++] = text[i] == '\n' ? ' ' : text[i];
    }
    if (size > 0)
        to[at] = 0;
}

fuseshim_session *fuseshim_session_new(const fuseshim_operations *operations, void *host, const char *const *options,
                                       size_t option_count, char *error, size_t error_size) {
    fuse_set_log_func(keep_log);
    last_log[0] = 0;
    fuseshim_session *session = calloc(1, sizeof *session);
    char *list = NULL;
    char limit[32];
    snprintf(limit, sizeof limit, "max_read=%d", FUSESHIM_MAX_TRANSFER);
    struct fuse_args arguments = FUSE_ARGS_INIT(0, NULL);
    bool complete = session != NULL && fuse_opt_add_opt(&list, limit) == 0;
    for (size_t i = 0; i < option_count && complete; i++)
        complete = fuse_opt_add_opt_escaped(&list, options[i]) == 0;
    complete = complete && fuse_opt_add_arg(&arguments, "vdmount") == 0 && fuse_opt_add_arg(&arguments, "-o") == 0 &&
               fuse_opt_add_arg(&arguments, list) == 0;
    if (complete) {
        session->operations = *operations;
        session->host = host;
        pthread_mutex_init(&session->lanes_lock, NULL);
        session->fuse = fuse_session_new(&arguments, &fuseshim_callbacks, sizeof fuseshim_callbacks, session);
    }
    fuse_opt_free_args(&arguments);
    free(list);
    if (session == NULL || session->fuse == NULL) {
        put_text(error, error_size, last_log[0] ? last_log : "out of memory");
        free(session);
        return NULL;
    }
    return session;
}

int fuseshim_session_mount(fuseshim_session *session, const char *mountpoint, char *error, size_t error_size) {
    last_log[0] = 0;
    /* fusermount3 prints its reason to standard error; a file in memory catches it. */
    int kept = dup(STDERR_FILENO);
    int caught = memfd_create("vdmount-messages", MFD_CLOEXEC);
    if (kept >= 0 && caught >= 0)
        dup2(caught, STDERR_FILENO);
    errno = 0;
    int result = fuse_session_mount(session->fuse, mountpoint);
    int reason = errno;
    if (kept >= 0 && caught >= 0)
        dup2(kept, STDERR_FILENO);
    if (result != 0) {
        char text[sizeof last_log] = {0};
        ssize_t length = caught >= 0 ? pread(caught, text, sizeof text - 1, 0) : 0;
        if (length > 0)
            put_text(error, error_size, text);
        else
            put_text(error, error_size, last_log[0] ? last_log : strerror(reason));
    }
    if (kept >= 0)
        close(kept);
    if (caught >= 0)
        close(caught);
    return result == 0 ? 0 : -1;
}

void fuseshim_session_destroy(fuseshim_session *session) {
    if (session == NULL)
        return;
    fuse_session_destroy(session->fuse);
    free(session);
}

bool fuseshim_session_ready(const fuseshim_session *session) {
    return __atomic_load_n(&session->ready, __ATOMIC_ACQUIRE);
}

const char *fuseshim_library_version(void) { return fuse_pkgversion(); }
