/* What confine.c and process.c share. */
#ifndef FUSESHIM_CONFINE_H
#define FUSESHIM_CONFINE_H

#include "FuseShim.h"

/* There will be a thread that only waits; before any other exists. */
void fuseshim_park_prepare(void);

/* What that thread does: it waits, and is confined when the process is. Does not return. */
_Noreturn void fuseshim_park(void);

/* Gives up all capabilities of this thread; 0 or -errno. */
int fuseshim_give_up_capabilities(void);

#endif
