/* Loop devices: what losetup(8) does, with the device held open until somebody else uses it. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "FuseShim.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int configure(int device, int file, const char *path, bool read_only, bool direct, unsigned sector_size) {
    struct loop_config config = {
        .fd = (unsigned)file,
        .block_size = sector_size,
        .info = {.lo_flags = LO_FLAGS_AUTOCLEAR | (read_only ? LO_FLAGS_READ_ONLY : 0u) |
                             (direct ? LO_FLAGS_DIRECT_IO : 0u)},
    };
    strncpy((char *)config.info.lo_file_name, path, LO_NAME_SIZE - 1);
    return ioctl(device, LOOP_CONFIGURE, &config) == 0 ? 0 : -errno;
}

int fuseshim_loop_attach(const char *path, bool read_only, unsigned sector_size, char *name, size_t name_size) {
    int file = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    if (file < 0)
        return -errno;
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    int result = control < 0 ? -errno : -EBUSY;
    /* Somebody else may take the free device first. */
    for (int attempt = 0; control >= 0 && result == -EBUSY && attempt < 64; attempt++) {
        int number = ioctl(control, LOOP_CTL_GET_FREE);
        if (number < 0) {
            result = -errno;
            break;
        }
        snprintf(name, name_size, "/dev/loop%d", number);
        int device = open(name, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
        if (device < 0) {
            result = -errno;
            break;
        }
        result = configure(device, file, path, read_only, true, sector_size);
        if (result == -EINVAL)
            result = configure(device, file, path, read_only, false, sector_size);
        if (result == 0)
            result = device;
        else
            close(device);
    }
    if (control >= 0)
        close(control);
    close(file);
    return result;
}
