#ifndef CISCSI_SHIM_H
#define CISCSI_SHIM_H

#include <stdint.h>
#include <stdbool.h>

#include <iscsi/iscsi.h>
#include <iscsi/scsi-lowlevel.h>

/* Arrays inside a structure, which Swift sees as tuples. */
static inline const char *ciscsi_portal(const struct iscsi_url *url) { return url->portal; }
static inline const char *ciscsi_target(const struct iscsi_url *url) { return url->target; }

#endif
