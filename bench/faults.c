/* Makes file operations fail. This library is loaded before the C library (LD_PRELOAD). It counts the operations of a
 * process on files under one folder, and at the chosen operation it ends or interrupts the process or returns an error.
 * Python, Rust and C all call the functions below. Calls that the C library makes by itself, in fopen, are not seen.
 * bench/faults.py compiles and controls this library.
 *
 *     gcc -shared -fPIC -O1 -o faults.so faults.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum mode { OFF, KILL, TEAR, FULL, UNREADABLE, CLOCK, INTERRUPT };
enum kind { READ, CHANGE, GROW, WRITE }; /* a GROW is a CHANGE that needs room on the disk; a
                                            WRITE is a GROW that can be half done */

static int mode = OFF;
static long at, counted[WRITE + 1];
static char root[PATH_MAX];

/* Starts to count. `number`, from 1, is the operation to hit. */
void faults_arm(const char *folder, int how, long number) {
    snprintf(root, sizeof root, "%s", folder);
    mode = how;
    at = number;
    memset(counted, 0, sizeof counted);
}

/* Returns the most general kind of operation that a mode hits. */
static enum kind hits(int how) {
    return how == UNREADABLE ? READ : how == FULL ? GROW : how == TEAR ? WRITE : CHANGE;
}

/* Returns the number of operations so far that a mode counts. */
long faults_counted(int how) { return counted[hits(how)]; }

static int within(const char *path) { return root[0] && strncmp(path, root, strlen(root)) == 0; }

static int watched_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return within(path);
}

static int watched(int folder, const char *path) {
    return path[0] == '/' || folder == AT_FDCWD ? within(path) : watched_fd(folder);
}

/* Counts an operation. Returns 0 if it should be done. Otherwise it must fail and errno is set, or the process ends in
 * this function. In the mode TEAR the caller does half of the write and then ends the process. */
static int hit(enum kind kind) {
    for (enum kind each = kind; each > READ; each--) counted[each]++;
    counted[READ] += kind == READ;
    int counts = kind == READ ? mode == UNREADABLE : mode != UNREADABLE && kind >= hits(mode);
    long number = faults_counted(mode);
    if (mode == OFF || mode == CLOCK || !counts || number < at) return 0;
    if (number > at && mode != FULL) return 0; /* a full disk stays full */
    if (mode == KILL) _exit(137);
    if (mode == INTERRUPT) return raise(SIGINT); /* the operation is done, and then Python stops */
    errno = mode == FULL ? ENOSPC : EIO;
    return 1;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name);

static enum kind opening(int flags) {
    if (flags & O_CREAT) return GROW;
    return (flags & O_ACCMODE) == O_RDONLY ? READ : CHANGE;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...) \
        __builtin_va_list list; \
        __builtin_va_start(list, flags); \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? __builtin_va_arg(list, mode_t) : 0; \
        __builtin_va_end(list); \
        if (watched(AT_FDCWD, path) && hit(opening(flags))) return -1; \
        return real(path, flags, bits); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...) \
        __builtin_va_list list; \
        __builtin_va_start(list, flags); \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? __builtin_va_arg(list, mode_t) : 0; \
        __builtin_va_end(list); \
        if (watched(folder, path) && hit(opening(flags))) return -1; \
        return real(folder, path, flags, bits); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t)
    if (watched_fd(fd) && hit(WRITE)) {
        if (mode != TEAR) return -1;
        real(fd, data, size / 2);
        _exit(137);
    }
    return real(fd, data, size);
}

#define ON_FD(type, name, kind, parameters, arguments, ...) \
    type name parameters { \
        REAL(type, name, __VA_ARGS__) \
        if (watched_fd(fd) && hit(kind)) return -1; \
        return real arguments; \
    }
ON_FD(ssize_t, pwrite, GROW, (int fd, const void *data, size_t size, off_t place), (fd, data, size, place), int, const void *,
      size_t, off_t)
ON_FD(ssize_t, pwrite64, GROW, (int fd, const void *data, size_t size, off64_t place), (fd, data, size, place), int,
      const void *, size_t, off64_t)
ON_FD(ssize_t, writev, GROW, (int fd, const struct iovec *parts, int count), (fd, parts, count), int,
      const struct iovec *, int)
ON_FD(ssize_t, sendfile, GROW, (int fd, int from, off_t *place, size_t size), (fd, from, place, size), int, int, off_t *,
      size_t)
ON_FD(ssize_t, sendfile64, GROW, (int fd, int from, off64_t *place, size_t size), (fd, from, place, size), int, int,
      off64_t *, size_t)
ON_FD(int, ftruncate, CHANGE, (int fd, off_t size), (fd, size), int, off_t)
ON_FD(int, ftruncate64, CHANGE, (int fd, off64_t size), (fd, size), int, off64_t)
ON_FD(ssize_t, read, READ, (int fd, void *data, size_t size), (fd, data, size), int, void *, size_t)
ON_FD(ssize_t, pread, READ, (int fd, void *data, size_t size, off_t place), (fd, data, size, place), int, void *, size_t,
      off_t)
ON_FD(ssize_t, pread64, READ, (int fd, void *data, size_t size, off64_t place), (fd, data, size, place), int, void *, size_t,
      off64_t)

/* No power is lost in these tests, so the output need not reach the disk. Syncing would take most of a tiny run. */
#define SYNC(name) \
    int name(int fd) { \
        REAL(int, name, int) \
        if (watched_fd(fd)) return -hit(GROW); \
        return real(fd); \
    }
SYNC(fsync)
SYNC(fdatasync)

#define MAP(name, offset) \
    void *name(void *where, size_t size, int protection, int flags, int fd, offset place) { \
        REAL(void *, name, void *, size_t, int, int, int, offset) \
        if (fd >= 0 && watched_fd(fd) && hit(READ)) return MAP_FAILED; \
        return real(where, size, protection, flags, fd, place); \
    }
MAP(mmap, off_t)
MAP(mmap64, off64_t)

#define ON_PATH(name, kind, parameters, arguments, path, ...) \
    int name parameters { \
        REAL(int, name, __VA_ARGS__) \
        if (watched(AT_FDCWD, path) && hit(kind)) return -1; \
        return real arguments; \
    }
ON_PATH(rename, GROW, (const char *from, const char *to), (from, to), to, const char *, const char *)
ON_PATH(unlink, CHANGE, (const char *path), (path), path, const char *)
ON_PATH(rmdir, CHANGE, (const char *path), (path), path, const char *)
ON_PATH(mkdir, GROW, (const char *path, mode_t bits), (path, bits), path, const char *, mode_t)

int renameat(int folder, const char *from, int other, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *)
    if (watched(other, to) && hit(GROW)) return -1;
    return real(folder, from, other, to);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int)
    if (watched(folder, path) && hit(CHANGE)) return -1;
    return real(folder, path, flags);
}

/* The time of day, an hour earlier at every call. */
int clock_gettime(clockid_t which, struct timespec *now) {
    static long back;
    REAL(int, clock_gettime, clockid_t, struct timespec *)
    int result = real(which, now);
    if (mode == CLOCK && which == CLOCK_REALTIME) now->tv_sec -= 3600 * ++back;
    return result;
}
