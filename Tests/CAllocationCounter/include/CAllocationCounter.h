/* Counts what a thread allocates: the test program's own malloc, calloc and realloc, in front of glibc's. */
#ifndef CALLOCATIONCOUNTER_H
#define CALLOCATIONCOUNTER_H

/* Begins to count the calling thread's allocations, from zero. */
void callocationcounter_begin(void);
/* Ends counting and answers how many there were; -1 where a sanitizer has taken the allocator over. */
long callocationcounter_end(void);

#endif
