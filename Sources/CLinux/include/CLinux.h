/* What Glibc's Swift module lacks of Linux: constants behind casts, variadic calls, ioctls, atomics on plain memory.
   Every name carries the prefix clinux_, and each function is one system call or one instruction. */
#ifndef CLINUX_H
#define CLINUX_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* ---- open ---- */
enum {
    clinux_O_PATH = 010000000,
    clinux_O_DIRECT = 040000,
    clinux_O_TMPFILE = 020200000,
    clinux_SEEK_DATA = 3,
    clinux_SEEK_HOLE = 4,
};
/* O_RDONLY etc. plus O_CLOEXEC; returns the descriptor or -errno. */
int clinux_open(const char *path, int flags, mode_t mode);
int clinux_openat(int directory, const char *path, int flags, mode_t mode);
/* Makes a file in a folder and removes its name at once; the descriptor or -errno. */
int clinux_temporary(const char *folder);
/* Opens again what an O_PATH descriptor names, without another walk of the path. */
int clinux_reopen(int descriptor, int flags);

/* ---- storage ---- */
/* fallocate(2) with FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE; 0 or -errno. */
int clinux_punch_hole(int descriptor, int64_t offset, int64_t length);
/* fallocate(2) with FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE; 0 or -errno. */
int clinux_zero_range(int descriptor, int64_t offset, int64_t length);
/* fallocate(2), mode 0; 0 or -errno. */
int clinux_allocate(int descriptor, int64_t offset, int64_t length);
/* sync_file_range(2), begin writing and wait for nothing: so it takes no error from the fdatasync(2) to come. */
void clinux_start_writeback(int descriptor);
/* FICLONERANGE: makes a range of one file share the blocks of another; 0 or -errno. */
int clinux_clone_range(int source, uint64_t from, int target, uint64_t to, uint64_t length);
/* copy_file_range(2): bytes that were copied, fewer than asked for at times, or -errno. */
int64_t clinux_copy_range(int source, uint64_t from, int target, uint64_t to, uint64_t length);
/* fstatfs(2): the file system's block size, and its type (its magic number); 0 or -errno. */
int clinux_file_system(int descriptor, uint64_t *block_size, uint64_t *type);
/* BLKGETSIZE64: bytes of a block device; 0 or -errno. */
int clinux_device_size(int descriptor, uint64_t *bytes);
/* BLKSSZGET: bytes of a logical sector of a block device; 0 or -errno. */
int clinux_device_sector_size(int descriptor, uint32_t *bytes);
int clinux_device_discard(int descriptor, uint64_t offset, uint64_t length);
int clinux_device_zero(int descriptor, uint64_t offset, uint64_t length);

/* Gives one file the owner, the mode and the extended attributes of another, as far as the caller may. */
void clinux_copy_attributes(int from, int to);
/* renameat2(2) with RENAME_NOREPLACE; 0 or -errno. */
int clinux_rename_new(const char *path, const char *new_path);
/* dup3(2): `target` becomes another number for what `source` is; the number or -errno. */
int clinux_take_over(int source, int target);

/* ---- locks (open file descriptions', fcntl(2)) ---- */
/* Takes (or with type F_UNLCK gives back) a one-byte lock; 0 or -errno. write: exclusive. */
int clinux_ofd_lock(int descriptor, int64_t offset, int64_t length, bool write);
int clinux_ofd_unlock(int descriptor, int64_t offset, int64_t length);
/* 1: another open file description holds a lock in the way of an exclusive one there; 0: none; -errno. */
int clinux_ofd_is_locked(int descriptor, int64_t offset, int64_t length);

/* ---- futex ---- */
void clinux_futex_wait(const uint32_t *word, uint32_t expected);
void clinux_futex_wake_all(const uint32_t *word);

/* ---- atomics on memory that the Swift side owns as plain bytes ---- */
static inline uint32_t clinux_load32_relaxed(const void *p) {
    return __atomic_load_n((const uint32_t *)p, __ATOMIC_RELAXED);
}
static inline uint64_t clinux_load64_relaxed(const void *p) {
    return __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED);
}
static inline uint8_t clinux_load8_relaxed(const void *p) {
    return __atomic_load_n((const uint8_t *)p, __ATOMIC_RELAXED);
}
static inline uint32_t clinux_load32_acquire(const void *p) {
    return __atomic_load_n((const uint32_t *)p, __ATOMIC_ACQUIRE);
}
static inline uint64_t clinux_load64_acquire(const void *p) {
    return __atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE);
}
static inline void clinux_store32_relaxed(void *p, uint32_t v) { __atomic_store_n((uint32_t *)p, v, __ATOMIC_RELAXED); }
static inline void clinux_store64_relaxed(void *p, uint64_t v) { __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELAXED); }
static inline void clinux_store8_relaxed(void *p, uint8_t v) { __atomic_store_n((uint8_t *)p, v, __ATOMIC_RELAXED); }
static inline void clinux_store32_release(void *p, uint32_t v) { __atomic_store_n((uint32_t *)p, v, __ATOMIC_RELEASE); }
static inline void clinux_store64_release(void *p, uint64_t v) { __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELEASE); }
static inline uint32_t clinux_fetch_add32(void *p, uint32_t v) {
    return __atomic_fetch_add((uint32_t *)p, v, __ATOMIC_ACQ_REL);
}
static inline uint64_t clinux_fetch_add64_relaxed(void *p, uint64_t v) {
    return __atomic_fetch_add((uint64_t *)p, v, __ATOMIC_RELAXED);
}
static inline uint32_t clinux_fetch_sub32(void *p, uint32_t v) {
    return __atomic_fetch_sub((uint32_t *)p, v, __ATOMIC_ACQ_REL);
}
static inline uint32_t clinux_fetch_or32(void *p, uint32_t v) {
    return __atomic_fetch_or((uint32_t *)p, v, __ATOMIC_ACQ_REL);
}
static inline uint32_t clinux_fetch_and32(void *p, uint32_t v) {
    return __atomic_fetch_and((uint32_t *)p, v, __ATOMIC_ACQ_REL);
}
static inline bool clinux_compare_exchange32(void *p, uint32_t expected, uint32_t desired) {
    return __atomic_compare_exchange_n((uint32_t *)p, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
/* Loads before it stay before loads and stores after it. The thread sanitizer does not know fences; it sees an
   acquiring read-modify-write instead. */
static inline void clinux_fence_acquire(void *p) {
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
    (void)__atomic_fetch_add((uint32_t *)p, 0, __ATOMIC_ACQ_REL);
    return;
#endif
#endif
    (void)p;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
}
static inline void clinux_fence_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }

/* ---- processes ---- */
/* Gives the standard descriptors 0 to 2 that are closed to /dev/null; 0 or -errno. */
int clinux_fill_standard_descriptors(void);
/* Writes out what was printed to standard output; 0, or -errno if that failed now or before. */
int clinux_flush_output(void);
/* Sets the soft limit of open files to the hard one; 0 or -errno. */
int clinux_raise_file_limit(void);
/* 64 random bits from getrandom(2). */
uint64_t clinux_random(void);
int clinux_errno(void);
/* strerror_r(3) into the caller's memory. */
void clinux_strerror(int code, char *text, size_t size);

#endif
