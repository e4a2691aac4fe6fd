/* What the shim's own files share. The only place that includes libfuse. */
#ifndef FUSESHIM_INTERNAL_H
#define FUSESHIM_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define _FILE_OFFSET_BITS 64
#define FUSE_USE_VERSION FUSE_MAKE_VERSION(3, 14)

#include "FuseShim.h"

#include <fuse_lowlevel.h>
#include <pthread.h>

struct fuseshim_session {
    struct fuse_session *fuse;
    fuseshim_operations operations;
    void *host;
    unsigned kernel_minor; /* the kernel's FUSE protocol is 7.this */
    bool ready;
    bool ending; /* lanes are to stop receiving */
    pthread_mutex_t lanes_lock;
    fuseshim_lane *lanes; /* each is used by its thread alone, but for the links */
};

/* The part of the running lane's buffer that read requests are answered from: page aligned, one transfer long. */
extern _Thread_local void *fuseshim_lane_data;

extern const struct fuse_lowlevel_ops fuseshim_callbacks;

#endif
